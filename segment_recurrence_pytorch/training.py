"""What a script that trains on bytes needs besides its loop: a stop on Ctrl-C, a schedule, scores, samples and plots.

It needs the extra `train` of the package.

Letters: b rows of the batch, n bytes.
"""

from __future__ import annotations

import codecs
import json
import math
import signal
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.data import Piece, Streams
from segment_recurrence_pytorch.generation import evaluating
from segment_recurrence_pytorch.state import State, detach
from segment_recurrence_pytorch.wrapper import LossReturn, SegmentWrapper

TOP_P = 0.9  # top_p of the samples that are printed


class StopRequest:
    """A `with` block in which Ctrl-C only sets `requested`, so that a loop can stop after its step.

    A second Ctrl-C interrupts the program as usual.

    Attributes:
        requested: whether Ctrl-C was pressed.
    """

    requested = False

    def __enter__(self) -> StopRequest:
        self.before = signal.signal(signal.SIGINT, self.request)
        return self

    def request(self, *_: object) -> None:
        """Handles the first Ctrl-C: sets `requested`, and lets Python handle the next Ctrl-C."""
        self.requested = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def warmup_cosine(progress: float, warmup: float = 0.05, last: float = 0.05) -> float:
    """Returns a factor for the learning rate. It rises linearly during the warm-up and then falls along a cosine.

    Args:
        progress: the share of the training that is done, in [0, 1].
        warmup: the share of the training that is the warm-up. Default: 0.05.
        last: the factor at the end of the training. Default: 0.05.
    """
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    cosine = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
    return last + (1 - last) * cosine


def train_loss(wrapper: SegmentWrapper, piece: Piece, state: State, memory: bool) -> LossReturn:
    """Computes the loss of one piece of the streams.

    Args:
        wrapper: the model in its wrapper.
        piece: the piece, from `data.Streams`.
        state: the state that the last call returned. None at the start.
        memory: whether the state is carried from segment to segment. If False, every segment is read as a text of its
            own.

    Returns:
        The loss, the number of targets, and the state to give with the next piece: detached, and None without memory.
    """
    device = wrapper.model.device
    tokens = piece.tokens.to(device)
    if not memory:
        # every segment becomes a row of its own, followed by the next token as its last target
        rows = tokens.unfold(1, wrapper.segment_length + 1, wrapper.segment_length).flatten(0, 1)
        return wrapper.loss(rows)._replace(state=None)
    returned = wrapper.loss(tokens, wrapper.reset(state, piece.starts.to(device)))
    return returned._replace(state=detach(returned.state))


@torch.no_grad()
def bits_per_byte(wrapper: SegmentWrapper, streams: Streams, memory: bool) -> float:
    """Returns the mean loss in bits per byte, over all bytes except the first one of each document.

    Args:
        wrapper: the model in its wrapper.
        streams: the validation bytes, with loop=False.
        memory: whether the state is carried from segment to segment. If False, every segment is read as a text of its
            own.
    """
    nats = targets = 0.0
    state = None
    with evaluating(wrapper):
        for piece in streams:
            loss, num_targets, state = train_loss(wrapper, piece, state, memory)
            nats += loss.item() * num_targets.item()
            targets += num_targets.item()
    return nats / targets / math.log(2)


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
        if total == limit:
            break
    return kept


def valid_streams(documents: list[Tensor], length: int) -> Streams:
    """Returns streams that go through validation documents once.

    There are up to 16 rows, but no more than leave each row at least four pieces. There is always at least one row.

    Args:
        documents: uint8 tensors (n_i,).
        length: number of bytes that the model reads of a piece.
    """
    rows = sum(map(len, documents)) // (4 * length)
    return Streams(documents, max(1, min(16, rows)), length, loop=False)


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
        return torch.cuda.is_bf16_supported()
    return device.type == 'cpu' and getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()


def check_writable(folder: Path) -> None:
    """Raises ValueError if no file can be made in the folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'{folder} cannot be written to ({error.strerror}): give another --out') from error


def drop_lines_after(folder: Path, step: int) -> None:
    """Removes from metrics.jsonl the lines of the steps after `step`, and the line of the validation.

    A run that was killed may have logged steps after its last save. The saved weights do not include these steps.

    Args:
        folder: the folder of the run.
        step: the step of the last save.
    """
    path = folder / 'metrics.jsonl'
    lines = [
        line for line in path.read_text().splitlines() if json.loads(line)['step'] <= step and '"valid"' not in line
    ]
    with replacing(path) as part:
        part.write_text(''.join(f'{line}\n' for line in lines))


def plot_losses(folder: Path, levels: dict[str, float]) -> None:
    """Plots the training losses in metrics.jsonl as loss.png.

    Args:
        folder: the folder of the run.
        levels: bits per byte by name. Each is drawn as a horizontal line. The validation comes first.
    """
    lines = _training_lines(folder)
    megabytes = torch.tensor([line['bytes'] for line in lines]).cumsum(0) / 1e6
    bits = torch.tensor([line['bits'] for line in lines])
    width = max(1, len(bits) // 100)
    smooth = bits[: len(bits) // width * width].view(-1, width).mean(1)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    axes.plot(megabytes, bits, color='tab:blue', alpha=0.25, linewidth=0.8)
    axes.plot(megabytes[width - 1 :: width][: len(smooth)], smooth, color='tab:blue', label='training')
    for (name, value), style in zip(levels.items(), ('-', ':', '--', '-.'), strict=True):
        color = 'tab:red' if name == 'validation' else 'gray'
        axes.axhline(value, color=color, linestyle=style, linewidth=1, label=f'{name} {value:.3f}')
    axes.set(xlabel='megabytes read', ylabel='bits per byte', title=folder.name, ylim=(0, 8.5))
    axes.legend()
    _write(figure, folder / 'loss.png')


def plot_memory_shares(folder: Path) -> None:
    """Plots, as memory_shares.png, the share that the memory has in the output of each head at each training step.

    Figure 3 of arXiv 2404.07143 shows these shares at the end of a training.

    Args:
        folder: the folder of the run.
    """
    lines = _training_lines(folder)
    shares = torch.tensor([line['memory_shares'] for line in lines])  # (steps, depth, heads)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for layer in range(shares.shape[1]):
        for head in range(shares.shape[2]):
            label = f'layer {layer}' if head == 0 else None
            axes.plot([line['step'] for line in lines], shares[:, layer, head], color=f'C{layer}', label=label)
    axes.set(xlabel='step', ylabel="memory's share, 1 - sigmoid(gate)", ylim=(0, 1), title=folder.name)
    axes.legend(title='one line a head')
    _write(figure, folder / 'memory_shares.png')


def _training_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if 'bits' in line]


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f'plot        {path}')
