"""The rows of docs/results.md: what is trained, on what, how long, and what result is asked for.

Settings were chosen with other seeds. `python -m benchmarks.evidence NAME` trains a row on its seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.evidence.extras import EXTRAS
from examples.associative_rmt import AssociativeRMT
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.tasks import AssociativeRetrieval, Copy, Memorize, Task
from segment_recurrence_pytorch.wrapper import SegmentWrapper

MILLION = 31_250  # segments of 32 tokens
SEEDS = 0, 1, 2
# the defaults of the library are checked on these, and were chosen on seeds from 400 on
CHECKS = 500, 501, 502, 503, 504


@dataclass(kw_only=True)
class Row:
    """What is trained, and how long.

    Attributes:
        name: name of the row, in commands and files.
        claim: what the row shows, in one line.
        published: the published number to compare with. Default: '', none.
        label: a shorter form of the claim, for plots. Default: '', the name.
        model: 'rmt', 'infini', or 'armt' for the third model of `examples/associative_rmt.py`.
        options: arguments of the model.
        batch_size: number of sequences of a training step.
        lr: learning rate.
        steps: number of training steps.
        wrapper_options: further arguments of `SegmentWrapper`. Default: none.
        gate_lr: factor of the learning rate of the gates. Default: None, that of `param_groups`.
        emb_lr: factor of the learning rate of the embeddings. Default: None, that of `param_groups`.
        extra: a name in `extras.EXTRAS`. Default: '', none.
        seeds: the seeds on which the row is trained. Default: `SEEDS`.
    """

    name: str
    claim: str = ''
    published: str = ''
    label: str = ''
    model: str
    options: dict[str, Any]
    batch_size: int
    lr: float
    steps: int
    wrapper_options: dict[str, Any] = field(default_factory=dict)
    gate_lr: float | None = None
    emb_lr: float | None = None
    extra: str = ''
    seeds: tuple[int, ...] = SEEDS

    def build(self, num_tokens: int, segment_length: int) -> SegmentWrapper:
        """Returns a new model in its wrapper.

        Args:
            num_tokens: size of the vocabulary.
            segment_length: number of tokens of a segment.
        """
        model: SegmentModel
        if self.model == 'rmt':
            make = EXTRAS[self.extra] if self.extra else RecurrentMemoryTransformer
            model = make(num_tokens=num_tokens, seq_len=segment_length, **self.options)
        elif self.model == 'armt':
            model = AssociativeRMT(num_tokens=num_tokens, seq_len=segment_length, **self.options)
        else:
            model = InfiniTransformer(num_tokens=num_tokens, **self.options)
        return SegmentWrapper(model, segment_length=segment_length, **self.wrapper_options)


@dataclass(kw_only=True)
class TaskRow(Row):
    """A row that is trained on a task.

    Attributes:
        task: a function that makes the task.
        stages: numbers of segments of the curriculum.
        lengths: numbers of segments of the evaluations.
        targets: the lowest accuracy that is asked for, by number of segments. Default: none.
        limits: the highest accuracy that is asked for, by number of segments. Default: none.
        paper: the published accuracy, by number of segments. Default: none.
        sequences: number of sequences of an evaluation. Default: 64.
        million_sequences: number of sequences of an evaluation at a million tokens. Default: 16.
        repetition: in training, the largest number of times that a segment can be written to the memory (virtual
            length). Default: 0, each segment is written once.
    """

    task: Callable[[], Task]
    stages: list[int]
    lengths: list[int]
    targets: dict[int, float] = field(default_factory=dict)
    limits: dict[int, float] = field(default_factory=dict)
    paper: dict[int, float] = field(default_factory=dict)
    sequences: int = 64
    million_sequences: int = 16
    repetition: float = 0.0

    def wrapper(self) -> SegmentWrapper:
        """Returns a new model for the task, in its wrapper."""
        task = self.task()
        return self.build(task.num_tokens, task.segment_length)


@dataclass(kw_only=True)
class LanguageRow(Row):
    """A row that is trained on bytes, and compared with a twin that is trained without memory.

    Attributes:
        segment_length: number of bytes of a segment.
        segments: number of segments of a training step.
        target: the lowest gain over the twin that is asked for, in bits per byte. Default: 0.
    """

    segment_length: int
    segments: int
    target: float = 0.0

    def wrapper(self) -> SegmentWrapper:
        """Returns a new model of bytes, in its wrapper."""
        return self.build(256, self.segment_length)


RMT: dict[str, Any] = dict(dim=64, depth=2, heads=4, dim_head=16, num_memory_tokens=4)
SLOTS: dict[str, Any] = {**RMT, 'num_memory_tokens': 8}
INFINI: dict[str, Any] = dict(dim=64, depth=2, heads=4, dim_head=16)
LINEAR: dict[str, Any] = {**INFINI, 'memory_rule': 'linear'}
LENGTHS = [2, 5, 7, 16, 64, 256, 1024, MILLION]
MEMORIZE: dict[str, Any] = dict(task=Memorize, stages=[1, 2, 3, 4, 5], lengths=LENGTHS, batch_size=32, lr=3e-3)
DEFAULTS: dict[str, Any] = {**MEMORIZE, 'lengths': [5, 16, 64, 256], 'steps': 1000, 'seeds': CHECKS, 'sequences': 256}
DEFAULTS['targets'] = {5: 0.99}
PAIRS: dict[str, Any] = dict(
    model='infini', options=INFINI, task=lambda: AssociativeRetrieval(pairs_per_segment=2), stages=[2, 3, 4, 5, 6],
    lengths=[2, 4, 6, 7], targets={6: 0.98, 7: 0.98}, batch_size=64, lr=2e-3, steps=2500, sequences=1024,
)  # fmt: skip
RMT_PAPER = 'arXiv 2207.06881, in the table'
PASSKEY = 'passkey at 1M tokens with a 1B model (arXiv 2404.07143); this task: none'

_tasks: list[TaskRow] = [
    TaskRow(
        name='rmt_defaults',
        claim='RMT learns to remember, with nothing given but its sizes',
        published='none', model='rmt', options=RMT, **DEFAULTS,
    ),
    TaskRow(
        name='infini_defaults',
        claim='Infini learns to remember, with nothing given but its sizes',
        published='none', model='infini', options=INFINI, **DEFAULTS,
    ),
    TaskRow(
        name='rmt_memorize',
        claim='RMT keeps a fact through a million tokens, trained on at most 5 segments',
        label='Recurrent Memory Transformer',
        published='near 1.00 to 1M tokens and more (arXiv 2304.11062, BERT-base)',
        model='rmt', options=RMT, steps=2500, million_sequences=64,
        targets={5: 0.99, 7: 0.99, 1024: 0.95, MILLION: 0.85}, **MEMORIZE,
    ),
    TaskRow(
        name='infini_passkey',
        claim='Infini keeps a fact, trained on at most 5 segments',
        label='Infini-Transformer',
        published=PASSKEY, model='infini', options=INFINI, steps=1000, targets={16: 0.99, MILLION: 0.99},
        **MEMORIZE,
    ),
    TaskRow(
        name='infini_passkey_linear',
        claim='Infini keeps a fact: linear rule, as in the paper',
        label='Infini-Transformer, linear rule',
        published=PASSKEY, model='infini', options=LINEAR, steps=1000, targets={16: 0.99}, **MEMORIZE,
    ),
    TaskRow(
        name='infini_passkey_repetition',
        claim='Infini keeps a fact: linear rule, a training segment written up to 10,000 times (virtual length)',
        label='Infini-Transformer, linear rule, virtual length in training',
        published=PASSKEY, model='infini', options=LINEAR, steps=1000, repetition=1e4,
        targets={16: 0.99, MILLION: 0.9}, **MEMORIZE,
    ),
    TaskRow(
        name='infini_published_gate',
        claim='Infini with the published gate start, the linear rule and one learning rate: at most 0.2',
        published='gate start 10 (infini-transformer-pytorch 0.2.1)', gate_lr=1.0, emb_lr=1.0,
        model='infini', options={**LINEAR, 'head_gate_init_value': 10.0}, steps=1000,
        limits={2: 0.2, 5: 0.2, 16: 0.2}, **{**MEMORIZE, 'lengths': [2, 5, 16]},
    ),
    TaskRow(
        name='infini_associative',
        claim='Infini retrieves values by key: 10 pairs over 6 segments, and 12 untrained',
        published='none', **PAIRS,
    ),
    TaskRow(
        name='infini_associative_one_rate',
        claim='Infini retrieves values by key: the same, embeddings at the learning rate of all else',
        published='none', emb_lr=1.0, **PAIRS,
    ),
    TaskRow(
        name='rmt_copy',
        claim='RMT copies a source twice',
        published=RMT_PAPER, paper={3: 1.0, 6: 1.0, 9: 1.0},
        model='rmt', options=SLOTS, task=Copy, stages=[3, 6, 9],
        lengths=[3, 6, 9], targets={3: 0.95, 6: 0.85}, batch_size=64, lr=2e-3, steps=1200, sequences=512,
    ),
    TaskRow(
        name='rmt_reverse',
        claim='RMT writes a source backwards',
        published=RMT_PAPER, paper={2: 1.0, 4: 1.0, 6: 0.9},
        model='rmt', options=SLOTS, task=lambda: Copy(reverse=True),
        stages=[2, 4, 6], lengths=[2, 4, 6], targets={4: 0.2}, batch_size=64, lr=2e-3, steps=1500, sequences=512,
    ),
    TaskRow(
        name='rmt_associative',
        claim='RMT retrieves values by key, one pair a segment',
        published=RMT_PAPER, paper={2: 0.99, 3: 1.0, 4: 0.99, 5: 0.97},
        model='rmt', options={**RMT, 'qk_norm': True}, task=AssociativeRetrieval,
        stages=[3, 4, 5], lengths=[2, 3, 4, 5], targets={4: 0.45}, batch_size=32, lr=3e-3, steps=4500,
        sequences=1024,
    ),
    TaskRow(
        name='armt_associative',
        claim='A third model, examples/associative_rmt.py, retrieves values by key, one pair a segment',
        published='none', model='armt', options=dict(dim=64, depth=2), task=AssociativeRetrieval,
        stages=[3, 4, 5], lengths=[2, 3, 4, 5, 9], batch_size=32, lr=3e-3, steps=4500, sequences=1024,
    ),
    TaskRow(
        name='infini_pairs',
        claim='Infini retrieves values by key: 50 pairs over 10 segments, of 64 values',
        published='none', model='infini', options={**INFINI, 'dim': 128, 'dim_head': 32},
        task=lambda: AssociativeRetrieval(64, 64, pairs_per_segment=5),
        stages=[2, 3, 4, 6, 8, 11], lengths=[2, 4, 6, 11], batch_size=32, lr=2e-3, steps=8000, sequences=1024,
    ),
]  # fmt: skip


def longer(name: str, steps: int) -> TaskRow:
    """Returns a row with more steps, which else is the same and has no target.

    Args:
        name: name of the row.
        steps: number of training steps.
    """
    (row,) = [row for row in _tasks if row.name == name]
    return replace(row, name=f'{name}_{steps}', claim=f'{row.claim}, {steps:,} steps', steps=steps, targets={})


# as long as the first rows of the papers' tables seem to need: up to forty minutes of one core a seed
_tasks += [longer('rmt_copy', 9600), longer('rmt_associative', 45_000)]


def bytes_row(model: str, length: int, *, steps: int = 800, **more: Any) -> LanguageRow:
    """Returns the row of a byte model. A training step has 128 bytes of each text, or two segments if they are longer.
    The twin is trained without memory. These rows check the defaults, so they have five seeds.

    Args:
        model: 'rmt' or 'infini'.
        length: number of bytes of a segment.
        steps: number of training steps. Default: 800.
        more: further fields of the row.
    """
    return LanguageRow(
        name=f'{model}_bytes_{length}' + f'_{steps}' * (steps != 800), seeds=CHECKS,
        claim=f'{TITLES[model]} on bytes, segments of {length}, {steps:,} steps, against a twin trained without memory',
        published='none for models of this size', model=model, options=BYTES[model],
        segment_length=length, segments=max(2, 128 // length), batch_size=16, lr=3e-3, steps=steps, **more,
    )  # fmt: skip


TITLES = {'rmt': 'RMT', 'infini': 'Infini'}
BYTES: dict[str, dict[str, Any]] = {'infini': dict(dim=96, depth=2, heads=4, dim_head=24)}
BYTES['rmt'] = {**BYTES['infini'], 'num_memory_tokens': 4}
_language: list[TaskRow | LanguageRow] = [
    bytes_row(model, length, steps=steps, target=0.03 if (model, length) == ('rmt', 16) else 0.0)
    for steps in (800, 3000)
    for model, length in (('rmt', 16), ('rmt', 64), ('infini', 16), ('infini', 64), ('infini', 128))
]
ROWS: dict[str, TaskRow | LanguageRow] = {row.name: row for row in [*_tasks, *_language]}
