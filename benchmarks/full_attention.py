"""What full attention costs, and what the models of this library cost instead, by the length of the text.

    python -m benchmarks.full_attention                    # CPU, under 10 minutes
    python -m benchmarks.full_attention --long             # the points that it leaves out: more than 20 seconds each
    python -m benchmarks.full_attention --device cuda      # under 2 minutes, in files of its own
    python -m benchmarks.full_attention --quick            # small models, in a folder of its own: does it all run?

Five models of one size (dim 256, depth 4, heads 4 x 64), one row: RMT with segments of 256 and 16 memory tokens; Infini
with segments of 512, with its default rule and with the delta rule; segments of 512 without a memory (RMT with 0 memory
tokens); and a transformer of the same blocks with full causal attention and a preallocated cache of keys and values.

Three questions, each with a plot:

    training    forward and backward of one text: in one graph, with replay, and with activations computed again
    reading     a prompt, without gradients and logits: the state or the cache after it
    decoding    a new token at a position: the mean of a segment, so that closing it counts; what is held between tokens

In decoding, our streams have read a text up to the position; the cache of full attention is filled with random numbers.
Memory is the peak above what stood before the call. On a CPU each point has a process of its own, with two threads, and
steps that take under 5 seconds are repeated in turn: medians. With a GPU all runs in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segment_recurrence_pytorch.layers import NORM_EPS, Blocks, ResidualBlock, rotate, rotations_between
from segment_recurrence_pytorch.loss import hidden_nll

SIZES: dict = dict(num_tokens=256, dim=256, depth=4, heads=4, dim_head=64)
SMALL: dict = dict(num_tokens=64, dim=32, depth=2, heads=2, dim_head=16)
SEGMENTS = {'RMT': 256, 'Infini': 512, 'Infini, delta rule': 512, 'no memory': 512}
FULL = 'full attention'
LENGTHS = tuple(2**k for k in range(10, 21, 2))  # 1,024 to 1,048,576
# seconds: a step that takes longer is measured once
ENOUGH = {'cpu': 5.0, 'cuda': 1.5}
LONG = 20.0  # seconds: a point that takes longer is left to --long
# the share of the time at which each part has to end
SHARES = {'training': 0.45, 'reading': 0.55, 'decoding': 0.66, 'compiled': 1.0}
COMPILATION = 20.0  # seconds that the first compiled point of a model may take


class KVCache:
    """The keys and values of all tokens so far, (depth, b, h, capacity, d) each, of which `length` are filled."""

    def __init__(self, model: FullTransformer, capacity: int, batch: int = 1):
        like = model.token_emb.weight
        shape = len(model.layers), batch, model.heads, capacity, model.dim_head
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.rotations = rotations_between(0, capacity, model.dim_head, theta=10000.0, like=like)
        self.length = 0


class Surroundings(NamedTuple):
    """What the tokens of a layer attend to.

    Attributes:
        rotations: the rotations of the positions of the tokens.
        cache: the keys and values of this layer, (b, h, capacity, d) each. None: the tokens are the whole text.
        start: number of tokens that the cache held before.
        last_only: whether only the output of the last token is needed.
    """

    rotations: Tensor
    cache: tuple[Tensor, Tensor] | None = None
    start: int = 0
    last_only: bool = False


class FullAttention(nn.Module):
    """Causal attention to all tokens before, with rotary positions."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        rotations, cache, start, last_only = surroundings
        q, k, v = rearrange(self.to_qkv(x), 'b n (three h d) -> three b h n d', three=3, h=self.heads)
        q, k = rotate(q, rotations), rotate(k, rotations)
        if cache is not None:
            stop = start + k.shape[2]
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start:stop] = new
            k, v = (kept[:, :, :stop] for kept in cache)
        q = q[:, :, -1:] if last_only else q
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)  # a single query sees all keys
        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))


class FullTransformer(nn.Module):
    """A causal transformer of this library's blocks with full attention."""

    def __init__(self, *, num_tokens: int, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.num_tokens, self.heads, self.dim_head = num_tokens, heads, dim_head
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = Blocks(ResidualBlock(dim, FullAttention(dim, heads, dim_head)) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """Returns the hidden states (b, n, dim) of a whole text (b, n).

        Args:
            tokens: token ids (b, n).
            recompute: whether backward computes the activations of each block again. Default: False.
        """
        x = self.token_emb(tokens)
        surroundings = Surroundings(rotations_between(0, tokens.shape[1], self.dim_head, theta=10000.0, like=x))
        for block in self.layers:
            if recompute:
                x = checkpoint(block, x, surroundings, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, surroundings)
        return self.norm(x)

    def loss(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """Returns the mean loss of the next tokens."""
        hidden = self(tokens[:, :-1], recompute=recompute)
        return hidden_nll(self.logits, hidden, tokens[:, 1:], self.num_tokens).mean()

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Reads tokens after those of the cache, and returns the hidden state of the last one, (b, 1, dim).

        Raises:
            ValueError: if the cache is neither empty nor followed by a single token, or if it is full.
        """
        start, stop = cache.length, cache.length + tokens.shape[1]
        if start and tokens.shape[1] > 1:
            raise ValueError(f'{tokens.shape[1]} tokens after {start}: give one token after a prompt')
        if stop > cache.keys.shape[3]:
            raise ValueError(f'{stop} tokens in a cache of {cache.keys.shape[3]}: make it larger')
        x, last = self.token_emb(tokens), len(self.layers) - 1
        for index, block in enumerate(self.layers):
            kept = cache.keys[index], cache.values[index]
            x = block(x, Surroundings(cache.rotations[start:stop], kept, start, last_only=index == last))
        cache.length = stop
        return self.norm(x)


class Line(NamedTuple):
    """What one line of a plot shows.

    Attributes:
        model: a name in `SEGMENTS`, or `FULL`.
        mode: 'one graph', 'replay' or 'recompute' in training, 'eager' or 'compiled' elsewhere.
        dtype: 'float32' or 'bfloat16': that of autocast in training, else that of the weights.
    """

    model: str
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f'{self.model}, {self.mode}, {self.dtype}'


Plan = list[tuple[str, list[tuple[Line, tuple[int, ...]]]]]


def plan(device: str, quick: bool) -> Plan:
    """Returns the parts of a run: which question they answer, and which lines have a point at which lengths."""
    if device == 'cuda':
        main, second, few = 'bfloat16', 'float32', LENGTHS[:4]
        full, full_read = (*LENGTHS[:4], 2**17), (*LENGTHS[:4], 2**17)
    else:
        main, few = 'float32', LENGTHS[1:3]
        second = 'bfloat16' if torch.cpu._is_avx512_bf16_supported() else ''
        full, full_read = tuple(2**k for k in range(10, 16)), tuple(2**k for k in range(10, 17))
    lengths = LENGTHS
    if quick:
        lengths, few, full, full_read = (1024, 4096), (1024,), (1024, 2048), (1024, 2048)
        second = 'float32' if device == 'cuda' else 'bfloat16'
    rules = [name for name in SEGMENTS if name != 'no memory']
    training = [(Line(FULL, mode, main), full) for mode in ('one graph', 'recompute')]
    training += [(Line(model, mode, main), lengths) for model in rules for mode in ('one graph', 'replay')]
    training += [(Line('Infini', 'recompute', main), lengths), (Line('no memory', 'one graph', main), lengths)]
    reading = [(Line(FULL, 'eager', main), full_read), *((Line(model, 'eager', main), lengths) for model in SEGMENTS)]
    decoding = [(Line(model, 'eager', main), lengths) for model in (FULL, *SEGMENTS)]
    if second:
        training += [(Line(FULL, 'one graph', second), few)]
        training += [(Line(model, 'replay', second), few) for model in ('RMT', 'Infini')]
        decoding += [(Line(model, 'eager', second), few) for model in (FULL, 'RMT', 'Infini')]
    parts: Plan = [('training', training), ('reading', reading), ('decoding', decoding)]
    if device == 'cuda':
        some = tuple(length for length in lengths if length in (2**10, 2**14, 2**18))
        parts.append(('compiled', [(Line(model, 'compiled', main), some) for model in ('RMT', 'Infini')]))
    return parts


@lru_cache
def build(name: str, dtype: str, device: str) -> Any:
    """Returns a model."""
    from infini_transformer_pytorch import InfiniTransformer
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

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


def wrapped(line: Line, dtype: str, device: str) -> Any:
    """Returns a model of this library in its wrapper."""
    from segment_recurrence_pytorch import SegmentWrapper

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
cursors: dict[tuple[str, str, int], Any] = {}  # where reading has ended, for decoding in the same process


def training_step(line: Line, length: int, device: str) -> tuple[Step, dict]:
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


def reading_step(line: Line, length: int, device: str) -> tuple[Step, dict]:
    """Returns a function that reads `length` tokens, and returns its seconds."""
    tokens = random_text(length, device)
    model = build(line.model, line.dtype, device)
    wrapper = None if line.model == FULL else wrapped(line, line.dtype, device)

    def step() -> None:
        if wrapper is None:
            model.extend(tokens, KVCache(model, length))
        else:
            cursors[line.model, line.dtype, length] = wrapper.read(tokens)

    return (lambda: timed(step, device)), {}


def decoding_step(line: Line, length: int, device: str) -> tuple[Step, dict]:
    """Returns a function that draws tokens after `length` tokens and returns the seconds of one, and the bytes that
    are held between two tokens."""
    from segment_recurrence_pytorch.state import leaves

    def size(tensors: list[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    if line.model == FULL:
        model = build(FULL, line.dtype, device)
        count = max(4, min(256, 2**22 // length))
        cache = KVCache(model, length + count)
        block = torch.randn(*cache.keys.shape[:3], 1024, cache.keys.shape[4], device=device).to(cache.keys)
        for kept in (cache.keys, cache.values):
            for start in range(0, length, 1024):
                part = kept[:, :, :, start : min(length, start + 1024)]
                part.copy_(block[:, :, :, : part.shape[3]])

        def draw() -> None:
            cache.length, token = length, first
            for _ in range(count):
                token = model.logits(model.extend(token, cache)).argmax(-1)

        first = random_text(1, device)
        held = size([cache.keys, cache.values]) * length // (length + count)
        return (lambda: timed(draw, device) / count), {'bytes': held, 'state_bytes': held, 'tokens_drawn': count}

    wrapper = wrapped(line, line.dtype, device)
    cursor = cursors.get((line.model, line.dtype, length))
    reading = 0.0
    if cursor is None:
        began = time.perf_counter()
        cursor = wrapper.read(random_text(length, device))
        reading = time.perf_counter() - began
    count = wrapper.segment_length

    def step() -> float:
        stream = wrapper.stream(state=cursor, max_new_tokens=1 + count, temperature=0, compile=line.mode == 'compiled')
        next(stream)
        with stream.guarded():
            return timed(lambda: list(stream.unguarded()), device) / count

    if line.mode == 'compiled':  # the first segments compile, and record CUDA graphs
        step(), step()
    segment = wrapper.model.open_segment(cursor.state, count)
    about = {'bytes': size(leaves(vars(segment))), 'state_bytes': size(leaves(cursor.state)), 'tokens_drawn': count}
    return step, {**about, 'reading_seconds': reading}


STEPS = {'training': training_step, 'reading': reading_step, 'decoding': decoding_step}


def status(field: str) -> float:
    """Returns megabytes of this process, by the name of a line in /proc/self/status (Linux only)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def first_step(question: str, line: Line, length: int, device: str) -> tuple[Step, dict]:
    """Runs the first step of a point. Returns the step, and what is known now: the seconds of the first step, its
    peak of memory, and what else the question wants."""
    torch.manual_seed(0)
    if question != 'decoding':  # what is imported, chosen or reserved in the first call of all does not count
        STEPS[question](line, 512, device)[0]()
    step, about = STEPS[question](line, length, device)
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


def worker(name: str) -> None:
    """Serves the steps of one point on the CPU.

    Args:
        name: the question, the line, the length and the number of threads, as JSON.
    """
    import ctypes

    from benchmarks.interleave import serve

    question, line, length, threads = json.loads(name)
    torch.set_num_threads(threads)
    step, about = first_step(question, Line(*line), length, 'cpu')
    give_back = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # so that waiting processes hold little (glibc only)

    def again() -> float:
        seconds = step()
        if give_back is not None:
            give_back(0)
        return seconds

    if give_back is not None:
        give_back(0)
    serve(again, **about)


class Here:
    """What `interleave.Worker` is, in this process: for a GPU, and for small sizes."""

    def __init__(self, question: str, line: Line, length: int, device: str):
        self.step, self.about = first_step(question, line, length, device)

    def close(self) -> None:
        """Lets go of what the step holds."""
        self.step = _closed


def _closed() -> float:
    raise RuntimeError('this point is closed')


class Results:
    """The JSON of a run, written whenever a point is known.

    Args:
        path: the JSON.
        about: what stands at its top.
    """

    def __init__(self, path: Path, about: dict):
        self.path = path
        old = json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, list[dict]] = {q: old.get(q, []) for q in ('training', 'reading', 'decoding')}
        self.left_out: dict[str, str] = old.get('left_out', {})
        self.about = about

    def curve(self, question: str, line: Line, field: str = 'seconds') -> dict[int, float]:
        """Returns a field of the points of a line by length, in order."""
        rows = [row for row in self.rows[question] if Line(row['model'], row['mode'], row['dtype']) == line]
        return {row['tokens']: row[field] for row in sorted(rows, key=lambda row: row['tokens']) if field in row}

    def lines(self, question: str) -> list[Line]:
        """Returns the lines that have a point."""
        return list(dict.fromkeys(Line(row['model'], row['mode'], row['dtype']) for row in self.rows[question]))

    def put(self, question: str, line: Line, length: int, seconds: float, steps: int, about: dict) -> None:
        """Adds or replaces a point."""
        row = {'model': line.model, 'mode': line.mode, 'dtype': line.dtype, 'tokens': length,
               'seconds': float(f'{seconds:.4g}'), 'steps': steps}  # fmt: skip
        # less than a megabyte is noise of the measurement
        row |= {key: max(1.0, round(value, 1)) if key == 'megabytes' else value for key, value in about.items()}
        if question == 'decoding':
            row.pop('megabytes', None)  # what is held is exact, the peak of a step is not asked for
        if question != 'decoding':
            row['tokens_per_second'] = round(length / seconds)
        same = {'model': line.model, 'mode': line.mode, 'dtype': line.dtype, 'tokens': length}
        self.rows[question] = [old for old in self.rows[question] if any(old[k] != v for k, v in same.items())]
        self.rows[question].append(row)
        self.left_out.pop(f'{question}: {line} at {length}', None)
        self.write()
        print(f'{question}: {line} at {length:,}: {seconds:.4g} s, {steps} steps', flush=True)

    def leave(self, question: str, line: Line, length: int, why: str) -> None:
        """Notes that a point is left out, unless it is there already."""
        if length not in self.curve(question, line):
            self.left_out[f'{question}: {line} at {length}'] = why
            print(f'{question}: {line} at {length:,}: left out, {why}', flush=True)

    def write(self, **more: Any) -> None:
        """Writes the JSON."""
        from segment_recurrence_pytorch.checkpoint import replacing

        with replacing(self.path) as part:
            part.write_text(json.dumps({**self.about, **self.rows, 'left_out': self.left_out, **more}, indent=1) + '\n')


def memory_limit(device: str) -> float:
    """Returns the megabytes that a point may take."""
    if device == 'cuda':
        return torch.cuda.get_device_properties(0).total_memory / 2**20 * 0.9
    lines = Path('/proc/meminfo').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable')) / 1024 * 0.6


def reason_to_leave(results: Results, part: str, line: Line, length: int, device: str, left: float, most: float) -> str:
    """Returns why a point is not measured now, or ''. It is foreseen from the point before.

    Args:
        results: the points so far.
        part: the part of the run.
        line: the line.
        length: the length of the point.
        device: 'cpu' or 'cuda'.
        left: seconds that are left for this part.
        most: seconds that a point may take.
    """
    question = 'decoding' if part == 'compiled' else part
    before = [each for each in results.curve(question, line) if each < length]
    cost = COMPILATION if part == 'compiled' and not before else 0.0
    if before:
        last = before[-1]
        ratio = length / last
        drawn = results.curve(question, line, 'tokens_drawn').get(last, 1)
        read = results.curve(question, line, 'reading_seconds').get(last, 0.0)
        grows = ratio**2 if line.model == FULL and question != 'decoding' else ratio
        cost = results.curve(question, line)[last] * drawn
        if line.model == FULL or question != 'decoding':
            cost *= grows
        cost = max(cost, read * ratio)
        held = results.curve(question, line, 'bytes').get(last, 0.0) / 2**20
        if ratio * max(held, results.curve(question, line, 'megabytes').get(last, 0.0)) > memory_limit(device):
            return 'memory'
        if question != 'decoding' and last * 4 < length:
            return 'the point before was left out'
    if cost > most:
        return 'time'
    return 'time' if cost > left else ''


def measure(results: Results, parts: Plan, device: str, here: bool, long: bool, seconds: float, steps: int) -> None:
    """Measures all points, in the order of their lengths.

    Args:
        results: takes the points.
        parts: what `plan` returned.
        device: 'cpu' or 'cuda'.
        here: whether points are measured in this process.
        long: whether points that are there are kept, and others measured however long they take.
        seconds: the time that the run may take, unless `long`.
        steps: number of steps of a point whose steps are short.
    """
    from benchmarks.interleave import Worker, interleaved_medians

    began = time.perf_counter()
    for part, lines in parts:
        question = 'decoding' if part == 'compiled' else part
        for length in sorted({length for _, lengths in lines for length in lengths}):
            points: dict[str, tuple[Line, Any]] = {}
            point: Any
            for line, lengths in lines:
                if length not in lengths or (long and length in results.curve(question, line)):
                    continue
                left = math.inf if long else seconds * SHARES[part] - (time.perf_counter() - began)
                why = reason_to_leave(results, part, line, length, device, left, math.inf if long else LONG)
                if why or left < 0:
                    results.leave(question, line, length, why or 'time')
                    continue
                try:
                    if here:
                        point = Here(question, line, length, device)
                    else:
                        name = json.dumps([question, line, length, results.about['threads']])
                        point = Worker(sys.executable, __file__, name, ours=True)
                except torch.cuda.OutOfMemoryError:
                    results.leave(question, line, length, 'memory')
                    point = None
                except Exception as error:  # of the compiler: the other lines do not depend on it
                    if line.mode != 'compiled':
                        raise
                    results.leave(question, line, length, f'{type(error).__name__}: {str(error)[:300]}')
                    point = None
                if point is None:  # outside of the handler, which holds what the failed step held
                    if device == 'cuda':
                        torch.cuda.empty_cache()
                    continue
                point.about.pop('torch', None)
                first = point.about['seconds']
                about = {key: value for key, value in point.about.items() if key != 'seconds'}
                results.put(question, line, length, first, 1, about)
                if first * about.get('tokens_drawn', 1) < ENOUGH[device]:
                    points[str(line)] = line, point
                else:
                    point.close()
            if points:
                labels = {label: point for label, (_, point) in points.items()}
                medians = interleaved_medians(labels, steps, warmup=0)
                for label, (line, point) in points.items():
                    about = {key: value for key, value in point.about.items() if key != 'seconds'}
                    results.put(question, line, length, medians[label], steps, about)
            if device == 'cuda':
                torch.cuda.empty_cache()


FIELDS = {'training': ('seconds', 'megabytes'), 'reading': ('seconds', 'megabytes'), 'decoding': ('seconds', 'bytes')}


def square(curve: dict[int, float]) -> dict[int, float]:
    """Returns seconds beyond the last length of full attention, from a n + b n^2 with the least relative errors."""
    lengths = torch.tensor(list(curve), dtype=torch.float64)
    seconds = torch.tensor(list(curve.values()), dtype=torch.float64)
    terms = torch.stack((lengths, lengths**2), dim=1) / seconds[:, None]
    a, b = torch.linalg.lstsq(terms, torch.ones(len(seconds), 1, dtype=torch.float64)).solution.flatten().tolist()
    if min(a, b) < 0:  # too noisy to tell the two apart: the square alone, through the last point
        a, b = 0.0, (seconds[-1] / lengths[-1] ** 2).item()
    return {n: a * n + b * n * n for n in LENGTHS if n > max(curve)}


def crossing(ours: dict[int, float], full: dict[int, float], measured_to: int) -> dict[str, Any] | None:
    """Returns from how many tokens on `ours` is below `full`, by interpolation on logarithmic scales.

    Args:
        ours: values by length.
        full: values of full attention by length.
        measured_to: the length after which values of full attention are extrapolated.

    Returns:
        tokens; whether it lies among extrapolated values; and whether it is the shortest length of all, so that the
        crossing may lie before. None if `ours` is above at the longest length.
    """

    def at(curve: dict[int, float], n: int) -> float:
        known = sorted(curve)
        right = next(i for i, each in enumerate(known) if each >= n)
        if known[right] == n:
            return math.log(curve[n])
        x0, x1 = math.log(known[right - 1]), math.log(known[right])
        y0, y1 = math.log(curve[known[right - 1]]), math.log(curve[known[right]])
        return y0 + (y1 - y0) * (math.log(n) - x0) / (x1 - x0)

    if not ours or not full:
        return None
    low, high = max(min(ours), min(full)), min(max(ours), max(full))
    grid = sorted(n for n in {*ours, *full} if low <= n <= high)
    ahead = [at(full, n) - at(ours, n) for n in grid]
    if len(grid) < 2 or ahead[-1] <= 0:
        return None
    behind = [i for i, each in enumerate(ahead) if each <= 0]
    if not behind:
        return {'tokens': grid[0], 'extrapolated': False, 'from_the_first_length_on': True}
    i = behind[-1]
    share = -ahead[i] / (ahead[i + 1] - ahead[i])
    tokens = round(math.exp(math.log(grid[i]) + share * math.log(grid[i + 1] / grid[i])))
    return {'tokens': tokens, 'extrapolated': tokens > measured_to, 'from_the_first_length_on': False}


def summary(results: Results) -> dict[str, Any]:
    """Returns the extrapolated points, the crossings and the slopes, and prints the last two."""
    extrapolated: dict[str, dict[str, dict[int, float]]] = {}
    crossings: dict[str, dict[str, Any]] = {}
    slopes: dict[str, dict[str, Any]] = {}
    for question, fields in FIELDS.items():
        for line in results.lines(question):
            curve = results.curve(question, line)
            per_token = curve if question == 'decoding' else {n: s / n for n, s in curve.items()}
            reference = min(2**14, max(curve))
            if reference in curve and max(curve) > reference:
                slope = {
                    'from': reference,
                    'to': max(curve),
                    'times': round(per_token[max(curve)] / per_token[reference], 2),
                }
                slopes.setdefault(question, {})[str(line)] = slope
                print(
                    f'{question}: {line}: a token at {slope["to"]:,} costs {slope["times"]} times one at {reference:,}'
                )
            if line.model == FULL:
                continue
            standard = Line(FULL, 'eager' if question != 'training' else 'one graph', line.dtype)
            for field in fields:
                full = results.curve(question, standard, field)
                measured_to = max(full, default=0)
                if question != 'decoding' and len(full) > 1:
                    more = square(full) if field == 'seconds' else {
                        n: full[measured_to] * n / measured_to for n in LENGTHS if n > measured_to
                    }  # fmt: skip
                    extrapolated.setdefault(question, {})[f'{standard}, {field}'] = {
                        n: float(f'{value:.4g}') for n, value in more.items()
                    }
                    full = {**full, **more}
                found = crossing(results.curve(question, line, field), full, measured_to)
                crossings.setdefault(question, {})[f'{line}, {field}'] = found
                if found is None:
                    print(f'{question}: {line}: {field}: never below full attention, up to the longest length')
                else:
                    guess = ' (extrapolated)' if found['extrapolated'] else ''
                    print(
                        f'{question}: {line}: {field}: below full attention from {found["tokens"]:,} tokens on{guess}'
                    )
    return {'extrapolated': extrapolated, 'crossings': crossings, 'slopes': slopes}


COLORS = {
    FULL: 'black',
    'RMT': 'tab:blue',
    'Infini': 'tab:orange',
    'Infini, delta rule': 'tab:green',
    'no memory': 'tab:gray',
}
STYLES = {'one graph': '-o', 'eager': '-o', 'replay': '--s', 'recompute': ':^', 'compiled': '--D'}
TITLES = {
    'training': 'Training: forward and backward of one text',
    'reading': 'Reading a prompt, without gradients',
    'decoding': 'A new token, by its position',
}


def plot(results: Results, found: dict[str, Any], folder: Path, stem: str) -> None:
    """Plots each question as STEM_QUESTION.png."""
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    for question, title in TITLES.items():
        if not results.rows[question]:
            continue
        figure, both = plt.subplots(1, 2, figsize=(12, 4.8), layout='constrained')
        main = 'bfloat16' if results.about['device'] != 'cpu' else 'float32'
        for axes, field in zip(both, FIELDS[question], strict=True):
            per_second = field == 'seconds' and question != 'decoding'
            unit = {'seconds': 1e3, 'bytes': 2**-20, 'megabytes': 1.0}[field]
            for line in results.lines(question):
                curve = results.curve(question, line, field)
                same = line.dtype == main
                label = str(line) if not same else f'{line.model}, {line.mode}'.removesuffix(', eager')
                axes.plot(
                    list(curve), [n / value if per_second else unit * value for n, value in curve.items()],
                    STYLES[line.mode], label=label, color=COLORS[line.model], markersize=5,
                    linewidth=1.6 if same else 0.8, markerfacecolor=None if same else 'white',
                )  # fmt: skip
            standard = Line(FULL, 'eager' if question != 'training' else 'one graph', main)
            more = found['extrapolated'].get(question, {}).get(f'{standard}, {field}', {})
            last = results.curve(question, standard, field)
            if more and last:
                ends = {max(last): last[max(last)], **{int(n): value for n, value in more.items()}}
                values = [n / value if per_second else unit * value for n, value in ends.items()]
                axes.plot(list(ends), values, '--', color='black', linewidth=1, label=f'{FULL}, extrapolated')
            what = {'seconds': 'milliseconds per token' if question == 'decoding' else 'tokens per second',
                    'megabytes': 'peak of memory, MB', 'bytes': 'held between tokens, MB'}[field]  # fmt: skip
            axes.set(xscale='log', yscale='log', xlabel='position' if question == 'decoding' else 'tokens', ylabel=what)
            ticks = [n for n in LENGTHS if axes.get_xlim()[0] <= n <= axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f'{n // 1024}k' if n < 2**20 else '1M' for n in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.25)
        handles, labels = both[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside right upper', fontsize=8)
        figure.suptitle(f'{title} ({results.about["device"]}, {main})', fontsize=11)
        figure.savefig(folder / f'{stem}_{question}.png', dpi=110)
        plt.close(figure)


def main(arguments: argparse.Namespace) -> None:
    """Measures, and writes the JSON and the plots."""
    device, folder, command = arguments.device, Path(__file__).parent / 'results', 'python -m benchmarks.full_attention'
    if arguments.quick:
        SIZES.update(SMALL)
        folder = Path(tempfile.mkdtemp(prefix='full_attention_'))
    stem = 'full_attention_cuda' if device == 'cuda' else 'full_attention'
    about: dict[str, Any] = {
        'command': command + (' --device cuda' if device == 'cuda' else ''), 'machine': platform.machine(),
        'cpus': os.cpu_count(), 'python': platform.python_version(), 'torch': torch.__version__,
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu', 'sizes': SIZES, 'segments': SEGMENTS,
        'threads': arguments.threads,
    }  # fmt: skip
    if device == 'cpu':
        # threads that wait sleep: on a machine that does other work, they would else keep each other from working
        os.environ['OMP_WAIT_POLICY'] = 'passive'
        torch.set_num_threads(1)  # of this process, which measures only small sizes
    results = Results(folder / f'{stem}.json', about)
    seconds = arguments.seconds or (85.0 if device == 'cuda' else 480.0)
    try:
        measure(results, plan(device, arguments.quick), device, device == 'cuda' or arguments.quick, arguments.long,
                seconds, 1 if arguments.quick else 3)  # fmt: skip
    finally:
        found = summary(results)
        results.write(**found)
        plot(results, found, folder, stem)
        print(f'wrote {results.path} and its plots')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--quick', action='store_true', help='small models and few lengths, in a folder of its own')
    parser.add_argument('--long', action='store_true', help='measure the points that are not in the JSON yet')
    parser.add_argument('--seconds', type=float, help='time of the run: 480 on a CPU, 85 on a GPU')
    parser.add_argument('--threads', type=int, default=2, help='threads of a point on the CPU')
    parser.add_argument('--worker')
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    else:
        with suppress(KeyboardInterrupt):
            main(arguments)
