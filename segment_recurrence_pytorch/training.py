"""What a script that trains on bytes needs besides its loop: an orderly stop, a schedule, scores and samples.

The folder of a run is in `run_folder`, its log in `metrics`, its plots in `plots`, the search for NaN in `bad_steps`.

Letters: b rows of the batch, n bytes.
"""

from __future__ import annotations

import codecs
import math
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed_state

from segment_recurrence_pytorch.data import Piece, Streams, segments_as_rows
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.state import State, detach
from segment_recurrence_pytorch.wrapper import LossReturn, SegmentWrapper

TOP_P = 0.9  # top_p of the samples that are printed
WHOLE = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)

# the signals that end programs; SIGHUP comes when a terminal is closed, and Windows has none
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class StopRequest:
    """A `with` block in which a signal to end only sets `signal`, so that a loop can end after its step.

    The signals are Ctrl-C, SIGTERM, by which systems end programs, and SIGHUP. A second Ctrl-C interrupts the program
    as usual; more of the others change nothing. A signal that is ignored, as by `nohup`, stays ignored.

    Attributes:
        signal: the number of the signal. None if there was no signal.
    """

    signal: int | None = None

    def __enter__(self) -> StopRequest:
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.request) for number in heeded}
        return self

    def request(self, number: int, *_: object) -> None:
        """Handles a signal: sets `signal`, and lets Python handle the next Ctrl-C."""
        if self.signal is None:
            self.signal = number
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)


def warmup_cosine(progress: float, warmup: float = 0.05, last: float = 0.05) -> float:
    """Returns a factor for the learning rate. It rises linearly during the warm-up and then falls along a cosine.

    Args:
        progress: the share of the training that is done, in [0, 1].
        warmup: the share of the training that is the warm-up. Default: 0.05.
        last: the factor at the end of the training. Default: 0.05.
    """
    if progress < warmup:
        return min(1, max(progress, 1e-3) / warmup)
    cosine = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
    return last + (1 - last) * cosine


def train_loss(
    wrapper: SegmentWrapper, piece: Piece, state: State, memory: bool, loss: Callable[..., LossReturn] | None = None
) -> LossReturn:
    """Computes the loss of one piece of the streams.

    Args:
        wrapper: the model in its wrapper.
        piece: the piece, from `data.Streams`.
        state: the state that the last call returned. None at the start.
        memory: whether the state is carried from segment to segment. If False, every segment is read as a text of its
            own, so a piece has to consist of whole segments.
        loss: the function that computes the loss, such as the wrapper inside DistributedDataParallel. Default: None,
            `wrapper.loss`.

    Returns:
        The loss, the number of targets, and the state to give with the next piece: detached, and None without memory.

    Raises:
        ValueError: if a piece does not consist of whole segments, without memory.
    """
    device = wrapper.model.device
    loss = loss or wrapper.loss
    tokens = piece.tokens.to(device)
    if not memory:
        return loss(segments_as_rows(tokens, wrapper.segment_length))._replace(state=None)
    returned = loss(tokens, wrapper.reset(state, piece.starts))  # on the host, which knows whether a text starts
    return returned._replace(state=detach(returned.state))


@torch.no_grad()
def bits_per_byte(wrapper: SegmentWrapper, streams: Iterable[Piece], memory: bool) -> float:
    """Returns the mean loss in bits per byte, over all bytes except the first one of each document and of each row's
    share of them. With one row no document is cut.

    If the wrapper has a process_group, it is the mean over the bytes of all ranks.

    Args:
        wrapper: the model in its wrapper.
        streams: the validation bytes, `data.Streams` with loop=False, or the rows of this rank of them.
        memory: whether the state is carried from segment to segment. If False, every segment is read as a text of its
            own, so pieces have to consist of whole segments.

    Raises:
        ValueError: if a piece does not consist of whole segments, without memory.
    """
    losses = []
    state = None
    with evaluating(wrapper):
        for piece in streams:
            loss, num_targets, state = train_loss(wrapper, piece, state, memory)
            losses.append(torch.stack((loss, num_targets.to(loss.dtype))))
    found = torch.stack(losses).tolist()  # at the end: a GPU is waited for once
    return math.fsum(mean * count for mean, count in found) / sum(count for _, count in found) / math.log(2)


def first_bytes(documents: list[Tensor], limit: int) -> list[Tensor]:
    """Returns the first bytes of some documents, as a list of documents.

    Args:
        documents: uint8 tensors (n_i,).
        limit: number of bytes, over all documents. 0 means all bytes.
    """
    kept, total = [], 0
    for document in documents:
        kept.append(document[: limit - total] if limit else document)
        total += len(kept[-1])
        if limit and total >= limit:
            break
    return kept


def valid_streams(documents: list[Tensor], length: int) -> Streams:
    """Returns streams that go through validation documents once.

    There are up to 16 rows, but no more than leave each row at least four pieces. There is always at least one row.

    Args:
        documents: uint8 tensors (n_i,).
        length: number of bytes that the model reads of a piece.

    Raises:
        ValueError: if there are too few bytes for one piece.
    """
    total = sum(map(len, documents))
    if total <= length:
        raise ValueError(
            f'{total} bytes are too few to validate with, since a piece has {length + 1}: give a larger corpus, of '
            'which a part is kept for validation, or more validation bytes'
        )
    return Streams(documents, max(1, min(16, total // (4 * length))), length, loop=False)


def write_on(wrapper: SegmentWrapper, prompt: Tensor, count: int, temperature: float = 1.0) -> None:
    """Generates bytes after a prompt and prints each one as it comes.

    Args:
        wrapper: a model of bytes in its wrapper.
        prompt: byte ids (1, n).
        count: number of new bytes.
        temperature: divides the logits. With 0 the most likely byte is taken. Default: 1.
    """
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for token in wrapper.stream(prompt, max_new_tokens=count, temperature=temperature, top_p=TOP_P):
        print(decoder.decode(bytes(token.tolist())), end='', flush=True)
    print(decoder.decode(b'', final=True))


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has instructions for bfloat16, and so is fast with it."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()


def check_writable(folder: Path, fix: str) -> None:
    """Raises ValueError if no file can be made in the folder.

    Args:
        folder: the folder.
        fix: what the message tells to do then.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'{folder} cannot be written to ({error.strerror}): {fix}') from error


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Returns the state of an optimizer by the names of the parameters, on the CPU. All ranks have to make the call.

    It is the same whether and over how many ranks the parameters are sharded.

    Args:
        model: the model.
        optimizer: the optimizer of its parameters.

    Returns:
        The state, on the first rank; the others get an empty one if parameters are sharded. None before the first step.
    """
    if not optimizer.state:  # PyTorch would make an empty step to fill it
        return None
    return distributed_state.get_optimizer_state_dict(model, optimizer, options=WHOLE)


def set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
    """Gives an optimizer the state that `optimizer_state` returned. All ranks have to make the call.

    Args:
        model: the model.
        optimizer: a new optimizer of its parameters.
        state: the state, on all ranks.
    """
    if state is not None:
        distributed_state.set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
