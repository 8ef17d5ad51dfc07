"""The search for a start that learns: trains models with other initial weights than the library's.

    python -m benchmarks.search 'rmt memorize 400 emb=.1 pos=.02 v=1 ffin=1 out=.1'
    python -m benchmarks.search 'infini bytes-64 400 default' 'rmt bytes-16 401 library' --steps 3000
    python -m benchmarks.search 'infini bytes-64 400 emb=.1 out=.1 memory_rule=deltanet gates=token gate_lr=1'
    python -m benchmarks.search --show

Each argument is one run: the model, the trial (memorize, copy, pairs, associative, or bytes- with the length of a
segment), the seed, the start, and options. The start is 'default', as the library has it now; 'library', as it had it
before the search, or 'private', with which the page of results was trained then (both without a rate of their own for
embeddings); or standard deviations. Those of emb (token embeddings), pos (position embeddings) and mem (memory tokens)
are absolute; those of qk, v, ffin and out (queries and keys, values, input and output of a block) are multiples of
fan_in^-0.5. Options are arguments of the model, or

    blocks=.25    standard deviation, times fan_in^-0.5, of the outputs of blocks, instead of the library's .1
    twin=1        bytes without memory: each segment starts a text
    gate_lr=3     factor of the learning rate of the gates
    lr=.004       learning rate of the trial pairs, instead of 2e-3
    emb_lr=5      factor of the learning rate of token and position embeddings
    gates=token   the gates of an Infini-Transformer are computed from the token. Their weights start at 0, their bias
                  at head_gate_init_value
    normed=1      what is recalled goes through an RMS norm with a learned gain, before the gate
    strength=2    initial bias of the strength, which has none in the library
    write_gate=1  the memory that an RMT carries is old + sigmoid(gate) (written - old), with a gate in each feature
                  computed from both, as in the Block-Recurrent Transformer; its weights and bias start at 0
    write_old=.1  the write rows of an RMT get the memory times this number, beside what write_init says

A run that is stored already is not repeated. Rules and results: results/search.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.evidence.training import COMPILED_FROM
from examples.train_a_task import train
from infini_transformer_pytorch import FastweightMemory, InfiniTransformer
from infini_transformer_pytorch.attention import InfiniAttention
from infini_transformer_pytorch.memory import Recallable, local_share, mix, recall
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.data import Streams, python_source
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.layers import OUTPUT
from segment_recurrence_pytorch.tasks import AssociativeRetrieval, Copy, Memorize, Task, accuracy
from segment_recurrence_pytorch.trainer import compiled_advance, reading_by
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, valid_streams, warmup_cosine

RUNS = Path(__file__).parent / 'results' / 'search' / 'runs.jsonl'
UNIFORM = 3**-0.5  # the standard deviation of `nn.Linear.reset_parameters`, in multiples of fan_in^-0.5
LR = 3e-3
LENGTHS = 5, 16, 64, 256
START = ('emb', 'pos', 'mem', 'qk', 'v', 'ffin', 'out')


class NormedMemory(FastweightMemory):
    """A memory with an RMS norm of what is recalled."""

    gain: nn.Parameter

    def recall(self, local: Tensor, queries: Tensor, memories: Recallable, gates: Tensor | None = None) -> Tensor:
        recalled = recall(queries, memories, self.memory_rule)
        recalled = F.rms_norm(recalled, recalled.shape[-1:], self.gain.to(recalled.dtype), 1e-6)
        share = memories.share if gates is None else local_share(gates, memories.written, recalled.dtype)
        return mix(local, recalled, share)


class SearchedAttention(InfiniAttention):
    """The attention of a layer with the options that the library does not have."""

    def __init__(self, dim: int, *, token_gates: bool, normed: bool, strength: float | None, **options: Any):
        super().__init__(dim, **options)
        self.to_gates: nn.Linear | None = None
        if token_gates:
            self.to_gates = nn.Linear(dim, self.heads)
            self.fastweight_mem.head_gates.requires_grad_(False)
        if normed:
            self.fastweight_mem.__class__ = NormedMemory
            self.fastweight_mem.gain = nn.Parameter(torch.ones(self.dim_head))
        if strength is not None:
            self.to_strength = nn.Linear(dim, self.kv_heads)
        self.starts = float(options['head_gate_init_value']), strength

    def gates(self, x: Tensor) -> Tensor | None:
        return None if self.to_gates is None else self.to_gates(x).transpose(-1, -2)

    @torch.no_grad()
    def start(self) -> None:
        gate, strength = self.starts
        if self.to_gates is not None:
            self.to_gates.weight.zero_()
            self.to_gates.bias.fill_(gate)
        if strength is not None and self.to_strength is not None:
            self.to_strength.bias.fill_(strength)


class SearchedInfini(InfiniTransformer):
    """An Infini-Transformer with the options that the library does not have."""

    searched: dict[str, Any]

    def __init__(self, *, gates: str = 'head', normed: bool = False, strength: float | None = None, **options: Any):
        self.__dict__['searched'] = {'token_gates': gates == 'token', 'normed': bool(normed), 'strength': strength}
        super().__init__(**options)

    def make_attention(self, index: int, **options: Any) -> InfiniAttention:
        return SearchedAttention(self.dim, **self.searched, **options)

    def param_groups(self, lr: float, weight_decay: float, **options: Any) -> list[dict[str, Any]]:
        groups = super().param_groups(lr, weight_decay, **options)
        for group in groups:
            group['params'] = [p for p in group['params'] if p.requires_grad]
        return [group for group in groups if group['params']]


class SearchedRMT(RecurrentMemoryTransformer):
    """A Recurrent Memory Transformer with the options that the library does not have."""

    def __init__(self, *, write_gate: int = 0, write_old: float = 0.0, **options: Any):
        super().__init__(**options)
        self.write_old = write_old
        self.to_write_gate = None
        if write_gate:
            self.to_write_gate = nn.Linear(2 * self.dim, self.dim)
            nn.init.zeros_(self.to_write_gate.weight)

    def write_rows(self, memory: Tensor) -> Tensor:
        rows = super().write_rows(memory)
        return rows + self.write_old * memory if self.write_old else rows

    def next_memory(self, written: Tensor, memory: Tensor) -> Tensor:
        if self.to_write_gate is None:
            return written
        return torch.lerp(memory, written, self.to_write_gate(torch.cat((written, memory), dim=-1)).sigmoid())


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
        if name.endswith(('norm.weight', 'head_gates', 'to_decay.bias', 'mem.gain', 'write_gate.weight')):
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
        elif name == 'logits.weight' or name.endswith(('to_strength.weight', 'to_decay.weight', 'to_gates.weight')):
            parameter.normal_(std=UNIFORM * unit)
        elif name == 'token_emb.weight':
            parameter.normal_(std=emb)
        elif name == 'pos_emb.weight':
            parameter.normal_(std=emb if pos is None else pos)
        elif parameter.ndim == 2:
            parameter.normal_(std=emb if mem is None else mem)
    for module in model.modules():
        if isinstance(module, SearchedAttention):
            module.start()


@torch.no_grad()
def start_as_before(model: SegmentModel) -> None:
    """Draws the weights anew as the library did before the search: each block starts as the identity."""
    for name, parameter in model.named_parameters():
        if name.endswith('bias') and not name.endswith('to_decay.bias'):
            nn.init.zeros_(parameter)
        elif name.startswith('layers.') and name.endswith('weight') and parameter.ndim == 2:
            writes = name.endswith(('to_out.weight', 'proj_out.weight'))
            nn.init.normal_(parameter, std=0.0 if writes else parameter.shape[1] ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def start_active(model: SegmentModel) -> None:
    """Draws the weights anew as the rows of the page had them before: embeddings of 0.5, and PyTorch's own start."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if not name.startswith(('layers.', 'logits.')) and parameter.ndim == 2:
            parameter.normal_(std=0.5)


def make(spec: dict[str, Any], num_tokens: int, segment_length: int, dim: int) -> SegmentWrapper:
    """Returns a model of two layers and four heads with the start and the options of a run, in its wrapper."""
    torch.manual_seed(spec['seed'])
    sizes: dict[str, Any] = dict(num_tokens=num_tokens, dim=dim, depth=2, heads=4, dim_head=dim // 4)
    options = spec.get('options', {})
    sizes |= {
        name: value for name, value in options.items() if name not in ('twin', 'lr', 'gate_lr', 'emb_lr', 'blocks')
    }
    start = spec['start']
    made: SegmentModel
    if spec['model'] == 'rmt':
        sizes = {'seq_len': segment_length, 'num_memory_tokens': 4, **sizes}
        made = SearchedRMT(**sizes) if {'write_gate', 'write_old'} & set(sizes) else RecurrentMemoryTransformer(**sizes)
    elif {'gates', 'normed', 'strength'} & set(sizes):
        made = SearchedInfini(**sizes)
    else:
        made = InfiniTransformer(**sizes)
    if isinstance(start, dict):
        set_start(made, **start)
    elif start != 'default':
        {'library': start_as_before, 'private': start_active}[start](made)
    else:
        for module in made.modules():
            if isinstance(module, SearchedAttention):
                module.start()
    if 'blocks' in options:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith(('to_out.weight', 'proj_out.weight')):
                    parameter.mul_(options['blocks'] / OUTPUT)
    return SegmentWrapper(made, segment_length=segment_length)


def groups(spec: dict[str, Any], model: SegmentModel, lr: float) -> list[dict[str, Any]]:
    """Returns the parameter groups of a run, with the rates that it names."""
    options = spec.get('options', {})
    rates = {name: options[name] for name in ('gate_lr', 'emb_lr') if name in options}
    if spec['start'] in ('library', 'private'):
        rates['emb_lr'] = 1
    return model.param_groups(lr, 0.01, **rates)


def learn(
    spec: dict[str, Any],
    task: Task,
    *,
    lr: float,
    stages: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    **defaults: Any,
) -> dict[str, Any]:
    """Trains on a task of the page, and returns the step at which each stage was reached, and the accuracy at several
    lengths. `defaults` are options of the model that the run may have otherwise."""
    spec = {**spec, 'options': defaults | spec.get('options', {})}
    wrapper = make(spec, task.num_tokens, task.segment_length, dim=64)
    rates, name = groups(spec, wrapper.model, lr), f'{spec["model"]}, {spec["trial"]}, seed {spec["seed"]}'
    made = train(
        wrapper, task, rates, stages=stages, steps=spec['steps'], batch_size=batch_size, seed=spec['seed'], name=name
    )
    passed = {f'{stage}': step for stage, step in made.reached.items()}
    return {'passed': passed, 'acc': curve(wrapper, task, spec['seed'], lengths)}


def curve(wrapper: SegmentWrapper, task: Task, seed: int, lengths: Sequence[int] = LENGTHS) -> dict[str, float]:
    """Returns the accuracy at several numbers of segments, each on new sequences."""
    found = {}
    for segments in lengths:
        evaluation = torch.Generator().manual_seed(1000 + seed)
        count = 256 if segments < 100 else 64 if segments < 10_000 else 16
        found[f'{segments}'] = round(accuracy(wrapper, task, segments, batch_size=count, generator=evaluation), 4)
    return found


def learn_bytes(spec: dict[str, Any], segment_length: int, device: str) -> dict[str, Any]:
    """Trains on bytes of the default corpus, and returns the bits per byte of held-out ones."""
    corpus, seed, steps = python_source(), spec['seed'], spec['steps']
    dim = spec.get('options', {}).get('dim', 96)
    wrapper = make(spec, 256, segment_length, dim=dim).to(device)
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(seed)).tolist()
    length = max(128, 2 * segment_length if segment_length >= 128 else segment_length)
    streams = Streams([corpus.train[i] for i in order], 16, length, loop=True)
    rates = groups(spec, wrapper.model, LR)
    train_step = TrainingStep(wrapper, rates, betas=(0.9, 0.95), schedule=lambda done: warmup_cosine(done / steps))
    state, memory = None, not spec.get('options', {}).get('twin')
    wrapper.train()
    with reading_by(wrapper.model, compiled_advance(wrapper.model) if steps >= COMPILED_FROM else None):
        for _ in tqdm(range(steps), desc=f'{spec["model"]}, bytes, seed {seed}', disable=None):
            _, state = train_step.read(next(streams), state, memory)
    held_out = first_bytes(corpus.valid, 131_072)
    found: dict[str, Any] = {'bits': round(bits_per_byte(wrapper, valid_streams(held_out, length), memory), 4)}
    if isinstance(wrapper.model, InfiniTransformer):
        found['shares'] = [[round(share, 2) for share in layer] for layer in wrapper.model.memory_shares().tolist()]
    return found


def parsed(text: str, steps: int | None) -> dict[str, Any]:
    """Returns what a run is, from its words on the command line."""
    model, trial, seed, *words = text.split()
    named = dict(word.split('=') for word in words if '=' in word)
    start: Any = {name: float(value) for name, value in named.items() if name in START}
    if not start:
        [start] = [word for word in words if word in ('default', 'library', 'private')]
    options = {name: value if value.islower() else ast.literal_eval(value) for name, value in named.items()}
    options = {name: value for name, value in options.items() if name not in START}
    default = {'memorize': 1000, 'passkey': 1000, 'copy': 1200, 'pairs': 1000, 'associative': 4500}.get(trial, 800)
    spec = {'model': model, 'trial': trial, 'seed': int(seed), 'steps': steps or default, 'start': start}
    return spec | ({'options': options} if options else {})


def stored() -> list[dict[str, Any]]:
    """Returns all runs."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN')
    parser.add_argument(
        '--steps', type=int, help='default 800 of bytes, 1,200 of copy, 4,500 of associative, else 1,000'
    )
    parser.add_argument('--device', default='cpu', help='where the bytes are learned (default: %(default)s)')
    parser.add_argument('--show', action='store_true', help='print all runs')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for text in arguments.runs:
        spec = parsed(text, arguments.steps)
        if any(run['spec'] == spec for run in stored()):
            continue
        began = time.process_time()
        if spec['trial'] in ('memorize', 'passkey'):
            lengths = LENGTHS if spec['trial'] == 'memorize' else (5, 1024, 31_250)
            found = learn(spec, Memorize(), lr=LR, stages=[1, 2, 3, 4, 5], lengths=lengths, batch_size=32)
        elif spec['trial'] == 'copy':
            sizes = [3, 6, 9]
            found = learn(spec, Copy(), lr=2e-3, stages=sizes, lengths=sizes, batch_size=64, num_memory_tokens=8)
        elif spec['trial'] == 'pairs':
            task, lr = AssociativeRetrieval(pairs_per_segment=2), spec.get('options', {}).get('lr', 2e-3)
            found = learn(spec, task, lr=lr, stages=[2, 3, 4, 5, 6], lengths=[2, 4, 6], batch_size=64)
        elif spec['trial'] == 'associative':  # as the row rmt_associative
            task, sizes = AssociativeRetrieval(), [3, 4, 5]
            found = learn(spec, task, lr=3e-3, stages=sizes, lengths=[2, *sizes], batch_size=32, qk_norm=True)
        else:
            found = learn_bytes(spec, int(spec['trial'].removeprefix('bytes-')), arguments.device)
        line = json.dumps({'spec': spec, **found, 'cpu': round(time.process_time() - began)})
        print(line, flush=True)
        with open(RUNS, 'a') as file:
            file.write(line + '\n')
    if arguments.show:
        for run in stored():
            print(*run['spec'].values(), run.get('bits') or run.get('acc'), *run.get('passed', {}).values())


if __name__ == '__main__':
    main()
