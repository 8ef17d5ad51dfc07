"""Time per new token, against both published packages.

    make bench, or: python -m benchmarks.generation
    python -m benchmarks.generation --curves                # the time by position, and its plot

dim 256, depth 4, heads 4 x 64, float32, one thread. RMT has 32 memory tokens and no XL memories; the published package
has four residual streams, its default, and as 'fastest' one stream and use_flash_attn=True. Infini has the delta rule.
A step draws `TOKENS` tokens after the first one, so the time does not include reading the prompt.

It also measures how the time of a token depends on its position, the speed of a batch, the cost of rows of different
lengths, and how fast a prompt is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SIZES: dict = dict(num_tokens=256, dim=256, depth=4, heads=4, dim_head=64)
SEGMENTS = (('rmt', 256), ('rmt', 1024), ('infini', 512))
TOKENS = 32
# number of whole segments before the half segment in which tokens are drawn, for the plot: up to 65,536 tokens
POSITIONS = {'rmt': (0, 2, 16, 256), 'infini': (0, 1, 8, 128)}
NEAR, LONG = 1024, 65_536
BATCH = 16


def worker(name: str) -> None:
    """Serves one kind of step of one package.

    Args:
        name: six words: what is measured ('token', 'segment' or 'prompt'), the model ('rmt' or 'infini'), the tokens of
            a segment, the tokens of the prompt, the number of rows, and how: 'eager', 'compiled', 'published' or
            'published-fastest' for 'token'; 'eager', 'aligned' or 'ragged' for 'segment'; 'read' or 'evaluation' for
            'prompt'.
    """
    import torch
    from interleave import serve

    torch.set_num_threads(1)
    torch.manual_seed(0)
    what, model, *numbers, how = name.split()
    length, prompt_length, batch = map(int, numbers)
    wrapper = make(model, length, how)
    wrapper.eval()
    prompt = torch.randint(0, SIZES['num_tokens'], (batch, prompt_length))

    def published_token() -> float:
        # the time between the starts of the last forward passes, which does not include the prompt
        began: list[float] = []
        network = wrapper.transformer if model == 'rmt' else wrapper.model
        hook = network.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        if model == 'rmt':
            wrapper.generate(prompt, length=prompt_length + 1 + TOKENS)
        else:
            wrapper.generate(prompt=prompt, seq_len=prompt_length + 1 + TOKENS)
        hook.remove()
        return (began[-1] - began[-TOKENS]) / (TOKENS - 1)

    if what == 'token' and how.startswith('published'):
        serve(published_token)
    elif what == 'token':
        serve(lambda: draw(wrapper, prompt, TOKENS, compile=how == 'compiled'))
    elif what == 'segment':  # as many tokens as a segment has, which includes one border
        rows = list(prompt)
        if how == 'ragged':
            rows = [row[: prompt_length - i * length // batch] for i, row in enumerate(rows)]
        cursor = None
        for start in range(0, prompt_length, 1024):  # in pieces: memory does not grow with the prompt
            cursor = wrapper.read([row[start : start + 1024] for row in rows], cursor)
        draw(wrapper, None, length, state=cursor)
        serve(lambda: draw(wrapper, None, length, state=cursor), megabytes=resident())
    elif how == 'read':
        serve(lambda: timed(lambda: wrapper.read(prompt)))
    else:
        serve(lambda: timed(lambda: evaluate(wrapper, prompt)))


def make(model: str, length: int, how: str):
    """Returns a model in its wrapper, from the package that this process imports.

    Args:
        model: 'rmt' or 'infini'.
        length: number of tokens of a segment.
        how: see `worker`.
    """
    if model == 'rmt':
        from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

        sizes = {**SIZES, 'seq_len': length, 'num_memory_tokens': 32, 'causal': True}
        if how.startswith('published'):
            sizes['use_xl_memories'] = False
        if how == 'published-fastest':
            sizes |= {'num_residual_streams': 1, 'use_flash_attn': True}
        rmt = RecurrentMemoryTransformer(**sizes)
        return RecurrentMemoryTransformerWrapper(rmt)
    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    return InfiniTransformerWrapper(InfiniTransformer(**SIZES, use_mem_delta_rule=True), segment_length=length)


def draw(wrapper, prompt, count: int, **options) -> float:
    """Returns the seconds for each of `count` new tokens after the first one, in the loop that `generate` runs."""
    stream = wrapper.stream(prompt, max_new_tokens=1 + count, **options)
    next(stream)
    with stream.guarded():
        return timed(lambda: list(stream.unguarded())) / count


def evaluate(wrapper, prompt) -> None:
    """Reads the prompt with hidden states of all positions, without logits."""
    import torch

    from segment_recurrence_pytorch.backprop import read_windows

    with torch.no_grad():
        for _ in read_windows(wrapper.model, prompt, None, wrapper.segment_length):
            pass


def timed(run) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident() -> float:
    """Returns the resident megabytes of this process (Linux only)."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * 4096 / 2**20


def compare(names: dict[str, str], repetitions: int, warmup: int = 1) -> tuple[dict[str, float], dict]:
    """Returns the median seconds of a step for each worker, and what each worker says of itself. The workers take
    turns.

    Args:
        names: the argument of `worker` for each label.
        repetitions: number of steps of each worker that count.
        warmup: number of steps of each worker before these. Default: 1.
    """
    from benchmarks.interleave import PEER_PYTHON, Worker, interleaved_medians

    workers = {
        label: Worker(PEER_PYTHON if 'published' in name else sys.executable, __file__, name,
                      ours='published' not in name)
        for label, name in names.items()
    }  # fmt: skip
    about = {label: worker.about for label, worker in workers.items()}
    return interleaved_medians(workers, repetitions, warmup), about


def main(repetitions: int, quick: bool) -> None:
    """Runs all comparisons but the time by position, and writes the JSON.

    Args:
        repetitions: number of steps of each worker that count.
        quick: whether one step, short segments and texts, two rows, one model far away and nothing compiled are enough,
            and nothing is written.
    """

    segments: tuple[tuple[str, int], ...] = SEGMENTS
    batch, places = BATCH, (NEAR, LONG)
    if quick:
        segments, batch, places, repetitions = (('rmt', 64), ('infini', 64)), 2, (128, 256), 1
    few = 1 if quick else max(3, repetitions // 2)
    tokens = new_tokens(repetitions, ('eager',) if quick else ('eager', 'compiled'), segments, batch)
    positions, ragged, prompts = {}, {}, {}
    for model, length in segments[1:] if quick else (('rmt', 256), ('infini', 512)):
        near, far = (f'segment {model} {length} {place} 1 eager' for place in places)
        medians, about = compare({'near': near, 'far': far}, repetitions)
        grown = about['far']['megabytes'] - about['near']['megabytes']
        positions[model] = {'time_ratio': round(medians['far'] / medians['near'], 3), 'megabytes_more': round(grown, 1)}
        print(f'{model}: a token at {places[1]:,} against {places[0]:,}: {positions[model]}', flush=True)
        rows = {how: f'segment {model} {length} {2 * length} {batch} {how}' for how in ('aligned', 'ragged')}
        medians, _ = compare(rows, few)
        ragged[model] = round(medians['ragged'] / medians['aligned'], 2)
        print(f'{model}: rows of different lengths cost {ragged[model]} times aligned ones', flush=True)
        medians, _ = compare(
            {how: f'prompt {model} {length} {places[1]} 1 {how}' for how in ('read', 'evaluation')},
            few,
        )
        prompts[model] = round(medians['evaluation'] / medians['read'], 2)
        print(f'{model}: a prompt is read at {prompts[model]} times the speed of an evaluation', flush=True)

    results = {
        'sizes': SIZES, 'tokens': tokens, 'positions': positions, 'ragged_times_aligned': ragged,
        'prompt_times_evaluation': prompts,
    }  # fmt: skip
    if not quick:
        add_results(**results)


def new_tokens(
    repetitions: int, ours: tuple[str, ...], segments: tuple[tuple[str, int], ...] = SEGMENTS, batch: int = BATCH
) -> list[dict]:
    """Returns, for each model and length of a segment, how many times faster a new token is than with the published
    packages, and how many times as many tokens a batch gets.

    Args:
        repetitions: number of steps of each worker that count.
        ours: how this library runs: 'eager', 'compiled'.
        segments: the models and lengths. Default: `SEGMENTS`.
        batch: number of rows of the batch. Default: `BATCH`.
    """
    tokens = []
    for model, length in segments:
        at = f'token {model} {length} {length // 2}'
        theirs = ('published', 'published-fastest') if model == 'rmt' else ('published',)
        medians, _ = compare(
            {
                **{how: f'{at} 1 {how}' for how in (*ours, *theirs)},
                **{f'{how}, batch': f'{at} {batch} {how}' for how in ours},
            },
            repetitions,
        )
        row = {'model': model, 'segment_length': length}
        for how in ours:
            row[f'times_faster_{how}'] = round(medians['published'] / medians[how], 1)
            row[f'times_faster_than_fastest_{how}'] = round(medians[theirs[-1]] / medians[how], 1)
            row[f'batch_{how}'] = round(batch * medians[how] / medians[f'{how}, batch'], 1)
        tokens.append(row)
        print(row, flush=True)
    return tokens


def curves(repetitions: int) -> None:
    """Measures the time per token at several positions, adds it to the existing JSON, and plots it."""
    from benchmarks import check_plots

    check_plots()
    seconds: dict[str, dict[int, float]] = {}
    for model, length in (('rmt', 256), ('infini', 512)):
        for segments in POSITIONS[model]:
            position = segments * length + length // 2
            names = {f'{model}, {how}': f'token {model} {length} {position} 1 {how}'
                     for how in ('eager', 'compiled', 'published')}  # fmt: skip
            medians, _ = compare(names, 3 if segments > 16 else max(3, repetitions // 2))
            for label, taken in medians.items():
                seconds.setdefault(label, {})[position] = taken
    one = statistics.median(seconds['rmt, eager'].values())
    relative = {label: {p: round(s / one, 2) for p, s in curve.items()} for label, curve in seconds.items()}
    add_results(time_by_position=relative)
    plot(relative)


def add_results(**new: Any) -> None:
    """Replaces a part of the existing JSON."""
    from benchmarks.interleave import write_results

    path = Path(__file__).parent / 'results' / 'generation.json'
    before = json.loads(path.read_text()) if path.exists() else {}
    write_results(__file__, {**before, **new})


def plot(curves: dict[str, dict[int, float]]) -> None:
    """Plots the time per token against its position as results/generation.png. The unit is the time of our RMT without
    compile."""
    import matplotlib.pyplot as plt

    styles = {'eager': '-o', 'compiled': '--o', 'published': ':s'}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for label, curve in curves.items():
        model, how = label.split(', ')
        who = 'published package' if how == 'published' else f'this library, {how}'
        name = {'rmt': 'RMT', 'infini': 'Infini'}[model]
        color = {'rmt': 'tab:blue', 'infini': 'tab:orange'}[model]
        axes.plot([int(p) for p in curve], list(curve.values()), styles[how], color=color, label=f'{name}, {who}',
                  markersize=4)  # fmt: skip
    axes.set(xscale='log', yscale='log', xlabel='position of the token', ylabel='time per token, our eager RMT = 1',
             title='Segments of 256 (RMT) and 512 (Infini) tokens, one CPU thread')  # fmt: skip
    figure.legend(fontsize=8, loc='outside lower center', ncols=2)
    path = Path(__file__).parent / 'results' / 'generation.png'
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repetitions', type=int, default=7)
    parser.add_argument('--quick', action='store_true', help='does it all run? In a minute, and no file is written')
    parser.add_argument('--tokens', action='store_true', help='only new tokens, against the published packages')
    parser.add_argument('--curves', action='store_true', help='only the time by position')
    parser.add_argument('--worker')
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    elif arguments.tokens:
        add_results(tokens=new_tokens(arguments.repetitions, ('eager', 'compiled')))
    else:
        curves(arguments.repetitions) if arguments.curves else main(arguments.repetitions, arguments.quick)
