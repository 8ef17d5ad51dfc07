"""What full attention costs, and what the models of this library cost instead, by the length of the text.

    python -m benchmarks.full_attention                    # up to 8,192 tokens
    python -m benchmarks.full_attention --long             # from 16,384 to a million tokens: more than an hour
    python -m benchmarks.full_attention --device cuda      # both, on a GPU
    python -m benchmarks.full_attention --quick            # small models, in a folder of its own: does it all run?
    python -m benchmarks.full_attention --plot             # the plots, from what was measured

Five models of one size (dim 256, depth 4, heads 4 x 64), one row: RMT with segments of 256 and 16 memory tokens; Infini
with segments of 512, with its default rule and with the delta rule; segments of 512 without a memory (RMT with 0 memory
tokens); and a transformer of the same blocks with full causal attention and a preallocated cache of keys and values.

Three questions, each with a plot:

    training    forward and backward of one text: in one graph, with replay, and with activations computed again
    reading     a prompt, without gradients and logits: the state or the cache after it
    decoding    a new token at a position: the mean of a segment, so that closing it counts; what is held between tokens

In decoding, our streams have read a text up to the position; the cache of full attention is filled with random numbers.
Memory is the peak above what stood before the call. On a CPU each point has a process of its own, with two threads.
Steps that take under 5 seconds (reading 8, a segment of new tokens 15) are repeated in turn: medians. On a GPU all runs
in one process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import check_plots
from benchmarks.crossings import FULL, QUESTIONS, Line, curve, plot, report, summary
from benchmarks.full_transformer import FullTransformer, KVCache
from benchmarks.interleave import interleaved_medians, machine
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, replacing, save_cursor
from segment_recurrence_pytorch.state import leaves

SIZES: dict = dict(num_tokens=256, dim=256, depth=4, heads=4, dim_head=64)
SMALL: dict = dict(num_tokens=64, dim=32, depth=2, heads=2, dim_head=16)
SEGMENTS = {'RMT': 256, 'Infini': 512, 'Infini, delta rule': 512, 'no memory': 512}
ENOUGH = {'training': 5.0, 'reading': 8.0, 'decoding': 15.0}  # seconds: a step that takes longer is measured once
RESULTS = Path(__file__).parent / 'results'
LIBRARIES = ('torch._dynamo', 'benchmarks.full_transformer', 'segment_recurrence_pytorch.checkpoint')  # for all points
K = 1024
Plan = list[tuple[str, Line, tuple[int, ...]]]


def plan(device: str, part: str) -> Plan:
    """Returns which lines have a point at which lengths, question by question.

    Args:
        device: 'cpu' or 'cuda'. A GPU measures all lengths in one run.
        part: 'short', 'long' or 'quick'.
    """
    cuda = device == 'cuda'
    ours: tuple[int, ...]
    full: tuple[int, ...]
    if part == 'quick':
        ours, full = (1, 4), (1, 2)
    elif cuda:
        ours, full = (1, 4, 16, 64, 256, 1024), (1, 2, 4, 8, 16, 32, 64, 128)
    else:
        ours, full = {'short': ((1, 4, 8), (1, 2, 4, 8)), 'long': ((16, 64, 256, 1024), (16, 32))}[part]
    full_read = (*full, 64) if part == 'long' and not cuda else full
    graph = tuple(n for n in ours if n <= (256 if cuda else 64))  # the activations of more do not fit
    main, second = ('bfloat16', 'float32') if cuda else ('float32', 'bfloat16')
    made = [('training', Line(FULL, 'one graph', main), full)]
    made += [('training', Line(model, 'one graph', main), graph) for model in SEGMENTS]
    made += [('training', Line(model, 'replay', main), ours) for model in SEGMENTS if model != 'no memory']
    for model in (FULL, 'Infini'):
        made.append(('training', Line(model, 'recompute', main), tuple(n for n in full if n <= 16)))
    made += [('reading', Line(FULL, 'eager', main), full_read)]
    made += [('reading', Line(model, 'eager', main), ours) for model in SEGMENTS]
    made += [('decoding', Line(model, 'eager', main), ours) for model in (FULL, *SEGMENTS)]
    if cuda or torch.cpu._is_avx512_bf16_supported():
        few = tuple(n for n in full if n in (4, 16))
        for model in (FULL, 'RMT', 'Infini'):
            made.append(('training', Line(model, 'one graph' if model == FULL else 'replay', second), few))
            made += [(question, Line(model, 'eager', second), few) for question in ('reading', 'decoding')]
    if cuda:
        made += [('decoding', Line(model, 'compiled', main), (1,)) for model in ('RMT', 'Infini')]
    return [(asked, line, tuple(n * K for n in lengths)) for asked, line, lengths in made]


@lru_cache
def build(name: str, dtype: str, device: str) -> Any:
    """Returns a model."""
    torch.manual_seed(0)
    made: nn.Module
    if name == FULL:
        made = FullTransformer(**SIZES)
    elif name.startswith('Infini'):
        made = InfiniTransformer(**SIZES, memory_rule='delta' if 'delta' in name else None)
    else:
        memory_tokens = 16 if name == 'RMT' else 0
        made = RecurrentMemoryTransformer(**SIZES, num_memory_tokens=memory_tokens, seq_len=SEGMENTS[name])
    return made.to(device, getattr(torch, dtype))


def wrapped(line: Line, dtype: str, device: str) -> SegmentWrapper:
    """Returns a model of this library in its wrapper."""
    model = build(line.model, dtype, device)
    return SegmentWrapper(model, segment_length=SEGMENTS[line.model], recompute=line.mode == 'recompute')


def random_text(length: int, device: str) -> Tensor:
    """Returns token ids (1, length)."""
    return torch.randint(0, SIZES['num_tokens'], (1, length), device=device)


def timed(run: Callable[[], object], device: str) -> float:
    """Returns the seconds of one call, all work on the device included."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


Step = Callable[[], float]


def training_step(line: Line, length: int, device: str, folder: Path) -> tuple[Step, dict]:
    """Returns a function that runs forward and backward on `length` tokens, and returns its seconds."""
    tokens = random_text(length + 1, device)
    model = build(line.model, 'float32', device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=line.dtype == 'bfloat16')
    wrapper = None if line.model == FULL else wrapped(line, 'float32', device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            if wrapper is None:
                loss = model.loss(tokens, recompute=line.mode == 'recompute')
            elif line.mode == 'replay':
                wrapper.loss(tokens, backward=True)
                return
            else:
                loss = wrapper.loss(tokens).loss
        loss.backward()

    return (lambda: timed(step, device)), {}


def cursor_file(folder: Path, line: Line, length: int) -> Path:
    """Returns where the state after reading is kept, for decoding."""
    return folder / f'{line.model}_{line.dtype}_{length}.safetensors'.replace(' ', '_')


def reading_step(line: Line, length: int, device: str, folder: Path) -> tuple[Step, dict]:
    """Returns a function that reads `length` tokens, and returns its seconds."""
    tokens = random_text(length, device)
    model = build(line.model, line.dtype, device)
    if line.model == FULL:
        return (lambda: timed(lambda: model.extend(tokens, KVCache(model, length)), device)), {}
    wrapper = wrapped(line, line.dtype, device)
    cursors: list[Any] = []

    def step() -> float:
        seconds = timed(lambda: cursors.append(wrapper.read(tokens)), device)
        save_cursor(cursors.pop(), cursor_file(folder, line, length), wrapper.model)
        return seconds

    return step, {}


def decoding_step(line: Line, length: int, device: str, folder: Path) -> tuple[Step, dict]:
    """Returns a function that draws tokens after `length` tokens and returns the seconds of one, and the bytes that
    are held between two tokens."""
    if line.model == FULL:
        return full_decoding_step(line, length, device)
    wrapper = wrapped(line, line.dtype, device)
    path = cursor_file(folder, line, length)
    if not path.exists():  # a run that was stopped goes on with this question
        save_cursor(wrapper.read(random_text(length, device)), path, wrapper.model)
    cursor = load_cursor(path, wrapper.model)
    count = wrapper.segment_length

    def step() -> float:
        stream = wrapper.stream(state=cursor, max_new_tokens=1 + count, temperature=0, compile=line.mode == 'compiled')
        next(stream)
        with stream.guarded():
            return timed(lambda: list(stream.unguarded()), device) / count

    if line.mode == 'compiled':  # the first segments compile, and record CUDA graphs
        step(), step()
    segment = wrapper.model.open_segment(cursor.state, count)
    return step, {'bytes': size(leaves(vars(segment))), 'state_bytes': size(leaves(cursor.state)), 'drawn': count}


def full_decoding_step(line: Line, length: int, device: str) -> tuple[Step, dict]:
    """Returns what `decoding_step` does, of full attention."""
    model = build(FULL, line.dtype, device)
    count = max(4, min(256, 2**22 // length))
    cache = KVCache(model, length + count)
    block = torch.randn(*cache.keys.shape[:3], K, cache.keys.shape[4], device=device).to(cache.keys)
    for kept in (cache.keys, cache.values):
        for start in range(0, length, K):
            part = kept[:, :, :, start : min(length, start + K)]
            part.copy_(block[:, :, :, : part.shape[3]])
    first = random_text(1, device)

    def draw() -> None:
        cache.length, token = length, first
        for _ in range(count):
            token = model.logits(model.extend(token, cache)).argmax(-1)

    held = size([cache.keys, cache.values]) * length // (length + count)
    return (lambda: timed(draw, device) / count), {'bytes': held, 'state_bytes': held, 'drawn': count}


def size(tensors: list[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


STEPS = {'training': training_step, 'reading': reading_step, 'decoding': decoding_step}


def status(field: str) -> float:
    """Returns megabytes of this process, by the name of a line in /proc/self/status (Linux only)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def give_back() -> None:
    """Gives memory that was freed back to the system, so that it does not hide a later peak (glibc only)."""
    if (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)) is not None:
        trim(0)


def first_step(question: str, line: Line, length: int, device: str, folder: Path) -> tuple[Step, dict]:
    """Runs the first step of a point. Returns the step, and what is known now: the seconds of the first step, its
    peak of memory, and what else the question wants."""
    torch.manual_seed(0)
    if question != 'decoding':  # what is imported, chosen or reserved in the first call of all does not count
        STEPS[question](line, 2 * K, device, folder)[0]()  # several segments: the first scan of all imports for seconds
        give_back()
    step, about = STEPS[question](line, length, device, folder)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = step()
        megabytes = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from what is resident
        resident = status('VmRSS')
        seconds = step()
        megabytes = status('VmHWM') - resident
    return step, {'seconds': seconds, 'megabytes': megabytes, **about}


def answer(asked: Connection, threads: int, question: str, line: Line, length: int, folder: Path) -> None:
    """Answers with what is known of a point on the CPU, and then with the seconds of a step each time it is asked."""
    torch.set_num_threads(threads)
    step, about = first_step(question, line, length, 'cpu', folder)
    give_back()  # so that waiting processes hold little
    asked.send(about)
    while asked.recv():
        asked.send(step())
        give_back()


class Point:
    """What `interleave.Worker` is, in a process that has the libraries from the start: to import them takes longer than
    most steps."""

    def __init__(self, threads: int, question: str, line: Line, length: int, folder: Path):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload([*LIBRARIES])
        self.asking, asked = context.Pipe()
        point = asked, threads, question, line, length, folder
        self.process = context.Process(target=answer, args=point, daemon=True)
        self.process.start()
        asked.close()  # only the process has it now: if it fails, waiting for an answer ends
        self.about = self.asking.recv()

    def step(self) -> float:
        """Runs one step, and returns its seconds."""
        self.asking.send(True)
        return self.asking.recv()

    def close(self) -> None:
        """Ends the process."""
        self.asking.send(False)
        self.process.join()


class Here:
    """What `interleave.Worker` is, in this process: for a GPU, and for small sizes."""

    def __init__(self, question: str, line: Line, length: int, device: str, folder: Path):
        made, self.about = first_step(question, line, length, device, folder)
        self.made: Step | None = made

    def step(self) -> float:
        """Runs one step, and returns its seconds."""
        assert self.made is not None
        return self.made()

    def close(self) -> None:
        """Lets go of what the step holds."""
        self.made = None


def row(line: Line, length: int, seconds: float, steps: int, about: dict) -> dict[str, Any]:
    """Returns a point as it stands in the JSON."""
    made = {**line._asdict(), 'tokens': length, 'seconds': float(f'{seconds:.4g}'), 'steps': steps}
    if 'bytes' in about:  # what decoding holds is exact: its peak is not asked for
        return {**made, 'bytes': about['bytes'], 'state_bytes': about['state_bytes']}
    return {**made, 'megabytes': max(1.0, round(about['megabytes'], 1))}  # less than a megabyte is noise


def measure(results: dict[str, Any], points: Plan, path: Path, make: Callable[..., Any], steps: int) -> None:
    """Measures the points that are not there yet, in the order of their lengths, and writes the JSON after each length.

    Args:
        results: what stands in the JSON.
        points: what `plan` returned.
        path: the JSON.
        make: returns a `Point` or what does the same, of a question, a line and a length.
        steps: number of steps of a point whose steps are short.
    """
    for length in sorted({length for _, _, lengths in points for length in lengths}):
        for question in sorted(QUESTIONS, key=lambda question: question == 'training'):  # which takes longest
            workers: dict[str, Any] = {}
            waiting: dict[str, Line] = {}
            for asked, line, lengths in points:
                if asked != question or length not in lengths or length in curve(results[question], line):
                    continue
                made = make(question, line, length)
                first = made.about['seconds']
                if first * made.about.get('drawn', 1) < ENOUGH[question]:
                    waiting[str(line)], workers[str(line)] = line, made
                    continue
                made.close()
                results[question].append(row(line, length, first, 1, made.about))
                print(f'{question}: {line} at {length:,}: {first:.4g} s, one step', flush=True)
            abouts = {label: made.about for label, made in workers.items()}
            for label, seconds in interleaved_medians(workers, steps, warmup=0).items():
                results[question].append(row(waiting[label], length, seconds, steps, abouts[label]))
                print(f'{question}: {label} at {length:,}: {seconds:.4g} s, {steps} steps', flush=True)
            results |= summary(results)
            with replacing(path) as new:
                new.write_text(json.dumps(results, indent=1) + '\n')


def main(arguments: argparse.Namespace) -> None:
    """Measures, and writes the JSON and the plots."""
    device = arguments.device
    folder = Path(tempfile.mkdtemp(prefix='full_attention_')) if arguments.quick else RESULTS
    part = 'quick' if arguments.quick else 'long' if arguments.long else 'short'
    stem = 'full_attention' + ('_cuda' if device == 'cuda' else '')
    path = folder / f'{stem}{"_long" if arguments.long else ""}.json'
    if not arguments.plot:
        if arguments.quick:
            SIZES.update(SMALL)
            torch.set_num_threads(1)  # all is small, and runs in this process
        about: dict[str, Any] = {
            'command': ' '.join(['python -m benchmarks.full_attention', *sys.argv[1:]]), **machine(),
            'torch': torch.__version__,
            'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu', 'sizes': SIZES, 'segments': SEGMENTS,
            'threads': arguments.threads,
        }  # fmt: skip
        results: dict[str, Any] = {**about, **{question: [] for question in QUESTIONS}}
        if arguments.long and path.exists():  # a run that was stopped goes on
            results |= {key: value for key, value in json.loads(path.read_text()).items() if key not in about}
        # threads that wait sleep: on a machine that does other work, they would else keep each other from working
        os.environ['OMP_WAIT_POLICY'] = 'passive'
        with tempfile.TemporaryDirectory() as cursors:

            def make(question: str, line: Line, length: int) -> Any:
                if device == 'cuda' or arguments.quick:
                    return Here(question, line, length, device, Path(cursors))
                return Point(arguments.threads, question, line, length, Path(cursors))

            measure(results, plan(device, part), path, make, 1 if arguments.quick else 3)
        print(f'{report(results)}\nwrote {path}')
    for made in plot([folder / f'{stem}.json', folder / f'{stem}_long.json'], folder):
        print(f'wrote {made}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--quick', action='store_true', help='small models and few lengths, in a folder of its own')
    parser.add_argument('--long', action='store_true', help='the points from 16,384 tokens on. It goes on after a stop')
    parser.add_argument('--plot', action='store_true', help='only plot what was measured')
    parser.add_argument('--threads', type=int, default=2, help='threads of a point on the CPU. Default: 2')
    arguments = parser.parse_args()
    check_plots()
    main(arguments)
