"""Runs of the training script beside each other: what each of them reached, and in what they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segment_recurrence_pytorch.checks import is_number
from segment_recurrence_pytorch.metrics import read_metrics

# how the state is treated in the validation that counts, by how it was treated in training
VALIDATED = {'on': 'carried', 'off': 'reset'}
# what two runs have to share, so that the difference of their validations is what their settings are worth
SHARED = {'sha256': 'corpus', 'valid_bytes': '--valid-bytes', 'step': 'steps'}
SHARED |= {name: f'--{name}' for name in ('preset', 'seed', 'precision')}
SHARED |= {'sizes': 'the sizes of the model', 'training': 'how they were trained'}
SHARED['parts'] = 'the steps from which on they were trained with other --steps, --minutes or --precision'
UNSAID = 'sha256', 'sizes', 'training', 'parts'  # what would be long to print
FROM_RUN = [name for name in SHARED if name not in (*UNSAID, 'step')]


HOW = 'steps', 'minutes', 'precision'  # settings of the training that may be others when a run is gone on with


class Run(NamedTuple):
    """A run that has ended.

    Attributes:
        folder: its folder.
        about: what it fixes: model, memory, preset, seed, precision, valid_bytes, sha256 of the corpus, sizes of the
            model, and how it is trained, in which parts; and step, the number of steps after which it was validated.
        validation: bits per byte of held-out bytes, with the state treated as in training.
    """

    folder: Path
    about: dict[str, Any]
    validation: float


def parts_of(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns how a run was trained: for each part, the step from which on, and its settings of `HOW`.

    Args:
        made: what run.json says of the run. That of earlier versions has no parts: it is then taken for one.
    """
    return made.get('parts') or [{'from': 0} | {name: made['run'][name] for name in HOW}]


def read_ended(folder: Path) -> Run:
    """Returns a run that has ended.

    Args:
        folder: the folder of the run.

    Raises:
        ValueError: if it is no folder of a run, or if the run has no validation after its last step.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} cannot be compared: there is no such folder. Give that of a run, as runs/NAME')
    try:
        made = json.loads((folder / 'run.json').read_text())
        about = {name: made['run'][name] for name in ('model', 'memory', *FROM_RUN)}
        about |= {name: made[name] for name in UNSAID if name != 'parts'}
        about['parts'] = [(part['from'], part['precision']) for part in parts_of(made)]
        kind = VALIDATED[about['memory']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f'run.json lacks {error}' if isinstance(error, KeyError) else error
        raise ValueError(f'{folder} cannot be compared: {why}. Give the folder of a run, as runs/NAME') from error
    lines = read_metrics(folder / 'metrics.jsonl')
    for line in reversed(lines):
        scores = line.get('valid')
        if isinstance(scores, dict) and is_number(scores.get(kind)):
            if lines[-1]['step'] > line['step']:
                raise ValueError(
                    f'{folder} was trained on to step {lines[-1]["step"]:,} after its validation at step '
                    f'{line["step"]:,}: let it end, or go on with it by --resume {folder}'
                )
            return Run(folder, about | {'step': line['step']}, scores[kind])
    raise ValueError(f'{folder} has no validation yet: let it end, or go on with it by --resume {folder}')


def table(runs: Sequence[Run]) -> str:
    """Returns the validations as a table, and under it in what else the runs differ.

    Args:
        runs: the runs. Differences are to the first one.
    """
    rows = [('run', 'model', 'memory', 'steps', 'bits per byte', 'to the first')]
    for run in runs:
        difference = f'{run.validation - runs[0].validation:+.3f}' if run is not runs[0] else ''
        model, memory, step = (str(run.about[name]) for name in ('model', 'memory', 'step'))
        rows.append((str(run.folder), model, memory, step, f'{run.validation:.3f}', difference))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    differing = []
    for name, shown in SHARED.items():
        values = [run.about[name] for run in runs]
        if name == 'sizes' and len({run.about['model'] for run in runs}) > 1:
            continue  # of course
        if any(value != values[0] for value in values):
            differing.append(shown if name in UNSAID else f'{shown} ({", ".join(map(str, values))})')
    if differing:
        lines.append(f'They also differ in {" and ".join(differing)}.')
    return '\n'.join(lines)
