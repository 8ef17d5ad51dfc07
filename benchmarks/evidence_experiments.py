"""The experiments that settle open questions: protocol and decision rule stand here before the first run.

The arms of an experiment are trained on the same data from the same start, seed by seed, and compared in pairs with the
first arm, the default. `python -m benchmarks.evidence NAME` runs what has no result yet; `decision` is written after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence_rows import INFINI, RMT, LanguageRow, TaskRow
from segment_recurrence_pytorch.tasks import AssociativeRetrieval, Memorize, Task

SEEDS = (10, 11, 12, 13, 14)  # neither development seeds nor those of the table
RULE = (
    f'An arm becomes the default if its paired difference to the default over {len(SEEDS)} seeds has a 95 % t interval '
    'above 0 (for bits: below 0) in more tables than it has one on the other side. An interval that holds 0 decides '
    'nothing.'
)


@dataclass(kw_only=True)
class Experiment:
    """arms: what each changes, {} the default: options of the model, or with a key of `FIELDS` that field of the row.
    rows: what is trained in every arm."""

    name: str
    question: str
    rows: list[TaskRow | LanguageRow]
    arms: dict[str, dict[str, Any]]
    rule: str = RULE
    decision: str = ''

    def row(self, row: TaskRow | LanguageRow, arm: str) -> TaskRow | LanguageRow:
        """A row as that arm has it."""
        changes = dict(self.arms[arm])
        fields = {name: changes.pop(name) for name in FIELDS if name in changes}
        return replace(row, name=f'{self.name}, {row.name}, {arm}', options={**row.options, **changes}, **fields)


FIELDS = ('one_rate', 'wrapper_options')


def task_row(name: str, model: str, task: Callable[[], Task], stages: list[int], lengths: list[int], **more) -> TaskRow:
    """A small row: 256 sequences a length."""
    options = {'options': RMT if model == 'rmt' else INFINI, 'batch_size': 64, 'lr': 3e-3, 'sequences': 256, **more}
    return TaskRow(name=name, claim='', published='', model=model, task=task, stages=stages, lengths=lengths, **options)


def bytes_row(model: str, options: dict[str, Any], steps: int = 600) -> LanguageRow:
    """A byte model, segments of 32, 8 of them a step."""
    sizes = dict(dim=96, depth=2, heads=4, dim_head=24)
    return LanguageRow(
        name='bytes', claim='', published='', model=model, options={**sizes, **options}, segment_length=32, segments=8,
        batch_size=16, lr=3e-3, steps=steps, embedding_std=None, target=0.0,
    )  # fmt: skip


def short_memorize() -> Task:
    """8 values, segments of 16."""
    return Memorize(values=8, noise=32, segment_length=16)


def many_pairs() -> Task:
    """4 pairs a segment, up to 64 of them."""
    return AssociativeRetrieval(keys=64, pairs_per_segment=4)


RMT_QUIET = {**RMT, 'memory_noise': 0.0}
INFINI_MEMORIZE = task_row('passkey', 'infini', short_memorize, [2, 3, 4], [4, 16, 64, 256], steps=400)
INFINI_PAIRS = task_row('pairs', 'infini', many_pairs, [2, 3, 4, 5], [2, 3, 5, 9, 17], lr=2e-3, steps=1000)
RMT_MEMORIZE = task_row('memorize', 'rmt', short_memorize, [2, 3, 4], [4, 16, 64, 256], steps=600)

_experiments = [
    Experiment(
        name='rules',
        question='Which memory rule: linear, delta or deltanet, with learned strength, with decay?',
        rows=[INFINI_PAIRS, INFINI_MEMORIZE],
        arms={
            'linear': {}, 'delta': {'memory_rule': 'delta'}, 'deltanet': {'memory_rule': 'deltanet'},
            'linear, strength': {'learned_delta_update': True},
            'delta, strength': {'memory_rule': 'delta', 'learned_delta_update': True},
            'linear, decay': {'memory_decay': True},
            'deltanet, decay': {'memory_rule': 'deltanet', 'memory_decay': True},
        },
    ),
]  # fmt: skip
EXPERIMENTS = {experiment.name: experiment for experiment in _experiments}
