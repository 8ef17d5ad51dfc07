"""The search for a start that learns: trains models with other initial weights than the library's.

    python -m benchmarks.search 'rmt memorize 400 emb=.1 pos=.02 v=1 ffin=1 out=.1'
    python -m benchmarks.search 'infini bytes-64 400 library' 'rmt bytes-16 401 private' --steps 3000
    python -m benchmarks.search --show

Each argument is one run: the model, the trial, the seed, and the start, which is 'library', 'private' (that of
`benchmarks.evidence.rows`), or standard deviations. Those of emb (token embeddings), pos (position embeddings) and mem
(memory tokens) are absolute; those of qk, v, ffin and out (queries and keys, values, input and output of a block) are
multiples of fan_in^-0.5. A run that is stored already is not repeated. Rules and results: results/search.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.evidence.rows import start_active
from benchmarks.evidence.training import update
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.data import Streams, python_source
from segment_recurrence_pytorch.tasks import Memorize, SegmentCurriculum, accuracy
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, train_loss, valid_streams, warmup_cosine

RUNS = Path(__file__).parent / 'results' / 'search' / 'runs.jsonl'
UNIFORM = 3**-0.5  # the standard deviation of `nn.Linear.reset_parameters`, in multiples of fan_in^-0.5
LR = 3e-3


@torch.no_grad()
def set_start(
    model: SegmentModel,
    *,
    emb: float,
    pos: float | None = None,
    mem: float | None = None,
    qk: float = UNIFORM,
    v: float = UNIFORM,
    ffin: float = UNIFORM,
    out: float = UNIFORM,
) -> None:
    """Draws the weights of a model anew, with the standard deviations that the top of this file explains.

    Args:
        model: the model.
        emb: that of the token embeddings.
        pos: that of the position embeddings. Default: None, emb.
        mem: that of the memory tokens. Default: None, emb.
        qk: that of queries and keys.
        v: that of values.
        ffin: that of the input of a feed-forward.
        out: that of the outputs of attention and feed-forward.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(('norm.weight', 'head_gates')):
            continue
        unit = parameter.shape[-1] ** -0.5
        if name.endswith('bias'):
            parameter.zero_()
        elif name.endswith(('to_out.weight', 'proj_out.weight')):
            parameter.normal_(std=out * unit)
        elif name.endswith('proj_in.weight'):
            parameter.normal_(std=ffin * unit)
        elif name.endswith('to_q.weight'):
            parameter.normal_(std=qk * unit)
        elif name.endswith(('to_kv.weight', 'to_qkv.weight')):
            *others, values = parameter.chunk(2 if name.endswith('to_kv.weight') else 3)
            for each in others:
                each.normal_(std=qk * unit)
            values.normal_(std=v * unit)
        elif name == 'logits.weight':
            parameter.normal_(std=UNIFORM * unit)
        elif name == 'token_emb.weight':
            parameter.normal_(std=emb)
        elif name == 'pos_emb.weight':
            parameter.normal_(std=emb if pos is None else pos)
        elif parameter.ndim == 2:
            parameter.normal_(std=emb if mem is None else mem)


def make(model: str, num_tokens: int, segment_length: int, seed: int, start: Any, dim: int) -> SegmentWrapper:
    """Returns a model of two layers and four heads with a start, in its wrapper."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(num_tokens=num_tokens, dim=dim, depth=2, heads=4, dim_head=dim // 4)
    made: SegmentModel
    if model == 'rmt':
        made = RecurrentMemoryTransformer(seq_len=segment_length, num_memory_tokens=4, **sizes)
    else:
        made = InfiniTransformer(**sizes)
    if start == 'private':
        start_active(made, 0.5)
    elif start != 'library':
        set_start(made, **start)
    return SegmentWrapper(made, segment_length=segment_length)


def learn_to_memorize(
    wrapper: SegmentWrapper, task: Memorize, steps: int, lr: float, seed: int, lengths: Iterable[int], name: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Trains on a task with a curriculum of 1 to 5 segments.

    Args:
        wrapper: the model in its wrapper.
        task: the task.
        steps: number of steps.
        lr: the learning rate.
        seed: seed of the sequences.
        lengths: numbers of segments at which the accuracy is measured.
        name: what the progress bar shows.

    Returns:
        The step at which each stage was reached, and the accuracy at each length.
    """
    draw, curriculum = torch.Generator().manual_seed(seed), SegmentCurriculum([1, 2, 3, 4, 5], threshold=0.9)
    optimizer = torch.optim.AdamW(wrapper.model.param_groups(lr, 0.01), betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda done: min(1, (done + 1) / 50) * max(0.03, 1 - done / steps))
    reached: dict[str, int] = {}
    wrapper.train()
    for done in tqdm(range(steps), desc=name, disable=None):
        segments = curriculum.draw(draw)
        tokens, labels = task.batch(segments, 32, draw)
        loss = wrapper.loss(tokens, labels=labels).loss
        update(wrapper, loss, optimizer, schedule)
        curriculum.update(math.exp(-loss.item()), segments)
        reached.setdefault(f'{curriculum.stages[curriculum.stage]}', done + 1)
    curve = {}
    for length in lengths:
        evaluation = torch.Generator().manual_seed(1000 + seed)
        count = 256 if length < 100 else 64
        curve[f'{length}'] = round(accuracy(wrapper, task, length, batch_size=count, generator=evaluation), 4)
    return reached, curve


def memorize(model: str, seed: int, start: Any, steps: int) -> dict[str, Any]:
    """Trains on Memorize, and returns the step at which each stage was reached, and the accuracy at several lengths."""
    task = Memorize()
    wrapper = make(model, task.num_tokens, task.segment_length, seed, start, dim=64)
    name = f'{model}, memorize, seed {seed}'
    reached, curve = learn_to_memorize(wrapper, task, steps, LR, seed, (5, 16, 64, 256), name)
    return {'passed': reached, 'acc': curve}


def learn_bytes(model: str, segment_length: int, seed: int, start: Any, steps: int) -> dict[str, Any]:
    """Trains on bytes of the default corpus, and returns the bits per byte of held-out ones."""
    corpus = python_source()
    wrapper = make(model, 256, segment_length, seed, start, dim=96)
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(seed)).tolist()
    length = max(128, 2 * segment_length if segment_length >= 128 else segment_length)
    streams = Streams([corpus.train[i] for i in order], 16, length, loop=True)
    optimizer = torch.optim.AdamW(wrapper.model.param_groups(LR, 0.01), betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda done: warmup_cosine(done / steps))
    state = None
    wrapper.train()
    for _ in tqdm(range(steps), desc=f'{model}, bytes, seed {seed}', disable=None):
        loss, _, state = train_loss(wrapper, next(streams), state, True)
        update(wrapper, loss, optimizer, schedule)
    held_out = first_bytes(corpus.valid, 131_072)
    return {'bits': round(bits_per_byte(wrapper, valid_streams(held_out, length), True), 4)}


def parsed(text: str, steps: int | None) -> dict[str, Any]:
    """Returns what a run is, from its words on the command line."""
    model, trial, seed, first, *others = text.split()
    start: Any = first
    if first not in ('library', 'private'):
        start = {name: float(value) for name, value in (word.split('=') for word in (first, *others))}
    default = 1000 if trial == 'memorize' else 800
    return {'model': model, 'trial': trial, 'seed': int(seed), 'steps': steps or default, 'start': start}


def stored() -> list[dict[str, Any]]:
    """Returns all runs."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN')
    parser.add_argument('--steps', type=int, help='default 1,000 of memorize, 800 of bytes')
    parser.add_argument('--show', action='store_true', help='print all runs')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for text in arguments.runs:
        spec = parsed(text, arguments.steps)
        if any(run['spec'] == spec for run in stored()):
            continue
        began = time.process_time()
        if spec['trial'] == 'memorize':
            found = memorize(spec['model'], spec['seed'], spec['start'], spec['steps'])
        else:
            length = int(spec['trial'].removeprefix('bytes-'))
            found = learn_bytes(spec['model'], length, spec['seed'], spec['start'], spec['steps'])
        line = json.dumps({'spec': spec, **found, 'cpu': round(time.process_time() - began)})
        print(line, flush=True)
        with open(RUNS, 'a') as file:
            file.write(line + '\n')
    if arguments.show:
        for run in stored():
            print(*run['spec'].values(), run.get('bits') or run.get('acc'), *run.get('passed', {}).values())


if __name__ == '__main__':
    main()
