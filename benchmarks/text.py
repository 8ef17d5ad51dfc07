"""What a memory is worth on text: segment transformers with and without memory, and full attention, on equal bytes.

    python -m benchmarks.text                          # trains all runs that have no result yet: hours on a CPU
    python -m benchmarks.text --device cuda --processes 15          # the same on a GPU, many at once: minutes
    python -m benchmarks.text rmt-64-0                 # one run: arm, length of a segment, seed
    python -m benchmarks.text --times                  # how long a training step of each arm takes, against the first
    python -m benchmarks.text --quick                  # all at reduced size, into a scratch folder

Rules: results/text/rules.md. The page of results has the tables and plots (`make evidence`).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.at_once import add_processes, at_once
from benchmarks.evidence.results import as_started, digest_of_start, write
from benchmarks.evidence.training import COMPILED_FROM
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.data import Piece, Streams, python_source
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.trainer import compiled_advance, reading_by
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, valid_streams, warmup_cosine

RESULTS = Path(__file__).parent / 'results' / 'text'
SIZES: dict[str, Any] = dict(num_tokens=256, dim=128, depth=4, heads=4, dim_head=32)
STEPS, ROWS, LENGTH, LR = 5000, 16, 256, 2e-3
FULL = 512  # bytes that full attention sees
BORDERS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of the positions in a document, for the table by position
LABELS = {
    'segments': 'segments alone',
    'xl': 'Transformer-XL',
    'rmt': 'RMT',
    'rmt_xl': 'RMT with XL memories',
    'infini': 'Infini-Transformer',
    'full': f'full attention over {FULL}',
}
RUNS = [(arm, length, seed) for seed in (0, 1, 2) for length in (64, 128) for arm in LABELS if arm != 'full']
RUNS += [('full', FULL, seed) for seed in (0, 1, 2)]


def build(arm: str, length: int) -> SegmentWrapper:
    """Returns a new model in its wrapper.

    Args:
        arm: a name of `LABELS`.
        length: number of bytes of a segment.
    """
    model: SegmentModel
    if arm == 'infini':
        model = InfiniTransformer(**SIZES)
    else:
        more: dict[str, Any] = {'use_xl_memories': True, 'xl_mem_len': length} if 'xl' in arm else {}
        tokens = 8 if arm.startswith('rmt') else 0
        more |= {'abs_pos_emb': False, 'rotary_pos_emb': True}
        model = RecurrentMemoryTransformer(**SIZES, seq_len=length, num_memory_tokens=tokens, **more)
    return SegmentWrapper(model, segment_length=length)


def stepping(wrapper: SegmentWrapper, schedule: Callable[[int], float]) -> TrainingStep:
    """Returns the training step of a model, with the recipe of the rules."""
    return TrainingStep(wrapper, wrapper.model.param_groups(LR, 0.01), betas=(0.9, 0.95), schedule=schedule)


def start_of(arm: str, length: int) -> str:
    """Returns a digest of the initial weights of an arm: a result that has another one is of an earlier library."""
    return digest_of_start(as_started(lambda: build(arm, length)).model)


def stored(folder: Path, arm: str, length: int, seed: int) -> dict[str, Any] | None:
    """Returns the result of a run of the library as it is, if there is one, else None.

    Args:
        folder: the folder of the results.
        arm: a name of `LABELS`.
        length: number of bytes of a segment.
        seed: the seed.
    """
    path = folder / f'{arm}-{length}-{seed}.json'
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get('start') == start_of(arm, length) else None


def has_memory(arm: str) -> bool:
    """Returns whether an arm carries a state from segment to segment."""
    return arm not in ('segments', 'full')


def train(arm: str, length: int, seed: int, device: str, steps: int, held_out: int) -> dict[str, Any]:
    """Trains one run, and returns its scores.

    Args:
        arm: a name of `LABELS`.
        length: number of bytes of a segment.
        seed: seed of the weights and of the order of the documents.
        device: where to train.
        steps: number of training steps.
        held_out: number of bytes of the validation.
    """
    corpus = python_source()
    torch.manual_seed(seed)
    wrapper = build(arm, length).to(device)
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, read = (ROWS * LENGTH // FULL, FULL) if arm == 'full' else (ROWS, LENGTH)
    streams = Streams([corpus.train[i] for i in order], rows, read, loop=True)
    train_step = stepping(wrapper, lambda step: warmup_cosine(step / steps))
    valid = first_bytes(corpus.valid, held_out)
    # on a GPU the step is recorded as a whole; evaluations read by the model's own `advance`
    advance = compiled_advance(wrapper.model) if device == 'cpu' and steps >= COMPILED_FROM else None
    state, curve, spent, began = None, {}, 0.0, time.perf_counter()
    wrapper.train()
    for step in (bar := tqdm(range(1, steps + 1), desc=f'{LABELS[arm]}, {length}, seed {seed}', disable=None)):
        with reading_by(wrapper.model, advance):
            _, state = train_step.read(next(streams), state, has_memory(arm))
        if step % max(1, steps // 10) == 0:
            spent += time.perf_counter() - began
            some = first_bytes(valid, held_out // 4)
            curve[f'{step}'] = round(bits_per_byte(wrapper, valid_streams(some, read), has_memory(arm)), 4)
            bar.set_postfix_str(f'{curve[f"{step}"]:.3f} bits')
            began = time.perf_counter()
    losses, counts = by_position(wrapper, valid, has_memory(arm), overlap=arm == 'full')
    return {
        'arm': arm, 'segment_length': length, 'seed': seed, 'steps': steps, 'start': start_of(arm, length),
        'corpus': corpus.name,
        'sha256': corpus.sha256, 'parameters': sum(p.numel() for p in wrapper.parameters()), 'device': name_of(device),
        'compiled': advance is not None,
        'torch': torch.__version__, 'python': platform.python_version(), 'train_seconds': round(spent),
        'curve': curve, 'bits': round(sum(losses) / sum(counts), 4),
        'by_position': [round(loss / count, 4) if count else None for loss, count in zip(losses, counts, strict=True)],
        'bytes_by_position': counts,
    }  # fmt: skip


@torch.no_grad()
def by_position(
    wrapper: SegmentWrapper, documents: list[Tensor], memory: bool, overlap: bool
) -> tuple[list[float], list[int]]:
    """Returns the sum of the losses in bits, and the number of bytes, for each range of positions in a document.

    Args:
        wrapper: the model in its wrapper.
        documents: uint8 tensors (n_i,).
        memory: whether the state is carried from segment to segment.
        overlap: whether to read windows of one segment that overlap by half, and to count only the later half.
    """
    losses = torch.zeros(len(BORDERS) + 1, dtype=torch.float64)
    counts = torch.zeros(len(BORDERS) + 1, dtype=torch.long)
    read = windows if overlap else stretches
    with evaluating(wrapper):
        for nll, at, counted in read(wrapper, documents, memory):
            ranges = torch.bucketize(at[counted], torch.tensor(BORDERS), right=True)
            losses.index_add_(0, ranges, nll.cpu().double()[counted] / math.log(2))
            counts += torch.bincount(ranges, minlength=len(counts))
    return losses.tolist(), counts.tolist()


def stretches(
    wrapper: SegmentWrapper, documents: list[Tensor], memory: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the losses of some bytes, their positions in their documents, and which of them count, all (b, n)."""
    streams = valid_streams(documents, max(LENGTH, wrapper.segment_length))
    begins, state = torch.zeros(len(streams.rows), dtype=torch.long), None
    for tokens, starts in streams:
        begins[starts] = 0
        at = begins[:, None] + torch.arange(1, tokens.shape[1])
        begins += streams.length
        counted, tokens = tokens[:, 1:] >= 0, tokens.to(wrapper.model.device)
        if memory:
            nll, _, state = wrapper.loss(tokens, wrapper.reset(state, starts), reduction='none')
        else:
            rows = tokens.unfold(1, wrapper.segment_length + 1, wrapper.segment_length).flatten(0, 1)
            nll = wrapper.loss(rows, reduction='none').loss.view(at.shape)
        yield nll, at, counted


def windows(wrapper: SegmentWrapper, documents: list[Tensor], _: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields what `stretches` yields, by windows of one segment that overlap by half."""
    length = wrapper.segment_length
    for document in documents:
        begins = torch.arange(0, max(1, len(document) - 1), length // 2)
        padded = F.pad(document.long(), (0, length + 1), value=IGNORE)
        for some in begins.split(64):
            tokens = padded[some[:, None] + torch.arange(length + 1)]
            columns = torch.arange(length)
            counted = (tokens[:, 1:] >= 0) & ((columns >= length // 2) | (some[:, None] == 0))
            nll = wrapper.loss(tokens.to(wrapper.model.device), reduction='none').loss
            yield nll, some[:, None] + columns + 1, counted


def name_of(device: str) -> str:
    """Returns the name of a device."""
    return torch.cuda.get_device_name() if device == 'cuda' else 'CPU'


def times(repetitions: int) -> dict[str, Any]:
    """Returns the median time of a training step of each arm, as a multiple of the first arm's. The arms take turns."""
    seconds: dict[tuple[str, int], list[float]] = {}
    made = {(arm, length): build(arm, length) for arm, length, seed in RUNS if seed == 0}
    steps = {key: stepping(wrapper, lambda _: 1.0) for key, wrapper in made.items()}
    for repetition in tqdm(range(repetitions + 1), desc='training steps', disable=None):
        for (arm, length), step in steps.items():
            rows, read = (ROWS * LENGTH // FULL, FULL) if arm == 'full' else (ROWS, LENGTH)
            piece = Piece(torch.randint(256, (rows, read + 1)), torch.ones(rows, dtype=torch.bool))
            began = time.perf_counter()
            step.read(piece, None, has_memory(arm))
            if repetition:  # the first step of each also makes its caches
                seconds.setdefault((arm, length), []).append(time.perf_counter() - began)
    medians = {key: statistics.median(each) for key, each in seconds.items()}
    return {f'{arm}-{length}': round(each / medians['segments', length if length != FULL else 64], 3)
            for (arm, length), each in medians.items()}  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN', help='arm-length-seed (default: all without a result)')
    parser.add_argument('--device', default='cpu', help='where to train (default: %(default)s)')
    add_processes(parser)
    parser.add_argument('--times', action='store_true', help='time the training steps on one CPU thread')
    parser.add_argument('--quick', action='store_true', help='20 steps a run, into a scratch folder')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp()) if arguments.quick else RESULTS
    if arguments.times:
        found = {
            'threads': 1,
            'over': 'segments alone, of the same length',
            'times': times(2 if arguments.quick else 15),
        }
        write(folder / 'times.json', found)
        print(found)
        return
    named = {f'{arm}-{length}-{seed}': (arm, length, seed) for arm, length, seed in RUNS}
    if unknown := [name for name in arguments.runs if name not in named]:
        parser.error(f'no run {", ".join(unknown)}: choose from {", ".join(named)}')
    steps, held_out = (20, 16_384) if arguments.quick else (STEPS, 262_144)
    missing = [name for name in arguments.runs or named if stored(folder, *named[name]) is None]
    calls = [(*named[name], arguments.device, steps, held_out) for name in missing]

    def keep(index: int, result: dict[str, Any]) -> None:
        write(folder / f'{missing[index]}.json', result)
        print(f'{missing[index]}: {result["bits"]:.4f} bits per byte', flush=True)

    if failed := at_once(train, calls, arguments.processes, keep):
        sys.exit(f'{len(failed)} runs failed')


if __name__ == '__main__':
    main()
