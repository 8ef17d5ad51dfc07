"""The experiments, which settle open questions.

An experiment trains several variants, called its arms, with the same seeds. Each arm is compared with the first one,
which is the default, seed by seed. `python -m benchmarks.evidence NAME` trains the runs that have no result yet. The
protocol and the rule for decisions were written before the first run (results/evidence/prose/rule.md). The decision is
written after the last run (prose/decisions/NAME.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.extras import EXTRAS
from benchmarks.evidence.rows import INFINI, RMT, LanguageRow, TaskRow, bytes_row
from segment_recurrence_pytorch.tasks import AssociativeRetrieval, Copy, Memorize, Task

SEEDS = (10, 11, 12, 13, 14)  # neither the seeds with which settings were chosen nor those of the rows


@dataclass(kw_only=True)
class Experiment:
    """A question, and what is trained to answer it.

    Attributes:
        name: name of the experiment, in commands and files.
        question: the question.
        rows: the rows that are trained, each in every arm.
        arms: what each arm changes, by its name: options of the model, or fields of the row if their names are in
            `FIELDS`. The first arm is the default.
    """

    name: str
    question: str
    rows: list[TaskRow | LanguageRow]
    arms: dict[str, dict[str, Any]]

    def row(self, row: TaskRow | LanguageRow, arm: str) -> TaskRow | LanguageRow:
        """Returns a row with the changes of an arm.

        Args:
            row: one of the rows of the experiment.
            arm: name of the arm.
        """
        changes = dict(self.arms[arm])
        fields = {name: changes.pop(name) for name in FIELDS if name in changes}
        return replace(row, name=f'{self.name}, {row.name}, {arm}', options={**row.options, **changes}, **fields)

    def file(self, folder: Path, row: TaskRow | LanguageRow) -> Path:
        """Returns the file that holds the runs of a row.

        Args:
            folder: the folder of the results.
            row: one of the rows of the experiment.
        """
        return folder / 'experiments' / f'{self.name}-{row.name}.json'

    def lacking(self, folder: Path) -> list[str]:
        """Returns the rows that lack runs, each with the number of runs that it lacks.

        Args:
            folder: the folder of the results.
        """
        missing = {row.name: len(self.arms) * len(SEEDS) - len(stored(self.file(folder, row))) for row in self.rows}
        return [f'{name} {count} runs' for name, count in missing.items() if count]


FIELDS = ('gate_lr', 'wrapper_options', 'extra')


def stored(path: Path) -> list[dict[str, Any]]:
    """Returns the runs in a file of an experiment. There are none if the file does not exist."""
    return json.loads(path.read_text())['runs'] if path.exists() else []


def task_row(name: str, model: str, task: Callable[[], Task], stages: list[int], lengths: list[int], **more) -> TaskRow:
    """Returns a small row: by default with batches of 16, and 256 sequences in each evaluation.

    Args:
        name: name of the row.
        model: 'rmt' or 'infini'.
        task: a function that makes the task.
        stages: numbers of segments of the curriculum.
        lengths: numbers of segments of the evaluations.
        more: further fields of `TaskRow`, which replace the defaults.
    """
    options: dict[str, Any] = {'options': RMT if model == 'rmt' else INFINI, 'batch_size': 16, 'lr': 3e-3}
    options |= {'sequences': 256, **more}
    return TaskRow(name=name, model=model, task=task, stages=stages, lengths=lengths, **options)


def short_memorize() -> Task:
    """Returns the task `Memorize` with 8 values and segments of 16 tokens."""
    return Memorize(values=8, noise=32, segment_length=16)


MEMORIZE = task_row('memorize', 'rmt', short_memorize, [1, 2, 3, 4], [4, 64, 256], steps=600, batch_size=32,
                    sequences=64)  # fmt: skip
COPY = task_row('copy', 'rmt', Copy, [3], [3, 6], steps=600)
REVERSE = task_row('reverse', 'rmt', lambda: Copy(reverse=True), [2, 4], [2, 4], steps=600)
RMT_PAIRS = task_row('pairs', 'rmt', AssociativeRetrieval, [3], [3, 4], steps=1200, options={**RMT, 'qk_norm': True})
RMT_BYTES, INFINI_BYTES = bytes_row('rmt', 16, steps=300), bytes_row('infini', 16, steps=300)
PASSKEY = task_row('passkey', 'infini', short_memorize, [1, 2, 3, 4], [4, 64, 1024], steps=600, batch_size=32,
                   sequences=64)  # fmt: skip
INFINI_PAIRS = task_row('pairs', 'infini', lambda: AssociativeRetrieval(pairs_per_segment=2), [2, 3, 4, 6],
                        [2, 4, 6, 9, 14], lr=2e-3, steps=1200, batch_size=64,
                        options={**INFINI, 'qk_norm': True})  # fmt: skip


def with_memory(row: TaskRow | LanguageRow, tokens: int) -> TaskRow | LanguageRow:
    """Returns a row with another number of memory tokens.

    Args:
        row: the row.
        tokens: number of memory tokens.
    """
    return replace(row, name=f'{row.name}_m{tokens}', options={**row.options, 'num_memory_tokens': tokens})


_experiments = [
    Experiment(
        name='rules',
        question='Which memory rule: linear, delta or deltanet, with learned strength, with decay?',
        rows=[INFINI_PAIRS, PASSKEY, INFINI_BYTES],
        arms={
            'deltanet, decay': {}, 'deltanet': {'memory_decay': False},
            'linear': {'memory_rule': 'linear'}, 'delta': {'memory_rule': 'delta'},
            'linear, strength': {'memory_rule': 'linear', 'learned_delta_update': True},
            'delta, strength': {'memory_rule': 'delta', 'learned_delta_update': True},
            'linear, decay': {'memory_rule': 'linear', 'memory_decay': True},
            'delta, strength, decay': {'memory_rule': 'delta', 'learned_delta_update': True, 'memory_decay': True},
        },
    ),
    Experiment(
        name='enhanced',
        question='Does enhanced recurrence pay: a transform of what is read, or the memory of the layer above?',
        rows=[INFINI_PAIRS, PASSKEY, INFINI_BYTES],
        arms={
            'same layer': {}, 'talking heads': {'mem_transform': 'talking_heads'},
            'kv projection': {'mem_transform': 'kv_proj'}, 'layer above': {'mem_read_from': 'above'},
        },
    ),
    Experiment(
        name='gate',
        question='Where should the gates start, and at what learning rate?',
        rows=[PASSKEY, INFINI_BYTES],
        arms={'3': {}}
        | {f'{value}': {'head_gate_init_value': float(value)} for value in (0, 6, 10)}
        | {f'3, {factor:g} times': {'gate_lr': factor} for factor in (1.0, 10.0, 30.0)},
    ),
    Experiment(
        name='backprop',
        question='How many segments should the gradient go back, of 4 in a sequence?',
        rows=[MEMORIZE, PASSKEY],
        arms={'all': {}} | {f'{k}': {'wrapper_options': {'backprop_segments': k}} for k in (1, 2)},
    ),
    Experiment(
        name='backprop_bytes',
        question='How many segments should the gradient go back, of 8 in a step of a byte model?',
        rows=[RMT_BYTES, INFINI_BYTES],
        arms={'all': {}} | {f'{k}': {'wrapper_options': {'backprop_segments': k}} for k in (1, 2, 4)},
    ),
    Experiment(
        name='write_init',
        question='What should enter the write rows: learned tokens, the memory before, or a sum of both?',
        rows=[MEMORIZE, COPY, RMT_BYTES],
        arms={name: {'write_init': name} for name in ('scaled', 'learned', 'sum', 'previous')},
    ),
    Experiment(
        name='axial',
        question='Does axial attention down the past memories pay?',
        rows=[with_memory(RMT_PAIRS, 2), MEMORIZE],
        arms={'off': {}, 'the last 8 memories': {'axial_mem_len': 8}, 'the last one (control)': {'axial_mem_len': 1}},
    ),
    Experiment(
        name='memory_mask',
        question='Memory rows causally masked or not?',
        rows=[with_memory(row, m) for row in (COPY, REVERSE, RMT_PAIRS, MEMORIZE, RMT_BYTES) for m in (4, 16)],
        arms={'block': {}, 'causal': {'memory_mask': 'causal'}, 'mixed': {'memory_mask': 'mixed'}},
    ),
    Experiment(
        name='extras',
        question='Do the extras of the published RMT package pay?',
        rows=[RMT_BYTES, MEMORIZE],
        arms={'none': {}} | {extra: {'extra': extra} for extra in EXTRAS},
    ),
]  # fmt: skip
EXPERIMENTS = {experiment.name: experiment for experiment in _experiments}
