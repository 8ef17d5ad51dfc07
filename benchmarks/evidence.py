"""What the memories really learn: trains the rows and experiments of docs/results.md.

    python -m benchmarks.evidence                      # the rows and experiments, and which of them have results
    python -m benchmarks.evidence rmt_memorize         # trains its seeds, writes JSON and the plot, then the page
    python -m benchmarks.evidence rmt_memorize --seed 2
    python -m benchmarks.evidence rules                # an experiment: what it has no result of yet
    python -m benchmarks.evidence --all --quick        # everything at reduced size, into a scratch folder
    python -m benchmarks.evidence --report             # the page and the plots from the JSON: make evidence

One CPU thread a process. Recipes were chosen on other seeds (100 and up) than those of the table (0, 1, 2) and of the
experiments (10 to 14).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import evidence_experiments
from benchmarks.evidence_experiments import EXPERIMENTS, Experiment, stored
from benchmarks.evidence_report import load, report
from benchmarks.evidence_rows import ROWS, LanguageRow, TaskRow
from benchmarks.evidence_training import run_row
from segment_recurrence_pytorch.checkpoint import replacing

RESULTS = Path(__file__).parent / 'results' / 'evidence'
PAGE = Path(__file__).parents[1] / 'docs' / 'results.md'
SEEDS = (0, 1, 2)


def run(row: TaskRow | LanguageRow, seed: int, folder: Path, quick: bool) -> None:
    """One seed of one row, written as JSON."""
    done = run_row(row, seed, quick)
    about = {'row': row.name, 'command': f'python -m benchmarks.evidence {row.name}'}
    write(folder / f'{row.name}-{seed}.json', {**about, **origin(row, seed, quick), **done})


def run_experiment(experiment: Experiment, folder: Path, quick: bool) -> None:
    """The runs of an experiment that are not there yet, written one by one; one that another experiment has is taken
    from there. One process an experiment."""
    for base in experiment.rows:
        path = experiment.file(folder, base)
        runs = {(run['arm'], run['seed']): run for run in stored(path)}
        for seed in evidence_experiments.SEEDS[:1] if quick else evidence_experiments.SEEDS:
            for arm in list(experiment.arms)[: 2 if quick else None]:
                row = experiment.row(base, arm)
                wanted = json.loads(json.dumps(origin(row, seed, quick)))
                done = known(path.parent, wanted) or {**wanted, **run_row(row, seed, quick, twin=False)}
                runs[arm, seed] = {**done, 'arm': arm}
                write(path, {'experiment': experiment.name, 'row': base.name, 'runs': list(runs.values())})


def known(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The run of that configuration and seed, if any experiment has it."""
    for path in sorted(folder.glob('*.json')):
        for have in stored(path):
            if all(have[name] == wanted[name] for name in ('config', 'seed', 'quick')):
                return have
    return None


def origin(row: TaskRow | LanguageRow, seed: int, quick: bool) -> dict[str, Any]:
    """What made a result."""
    versions = {'torch': torch.__version__, 'python': platform.python_version(), 'machine': platform.machine()}
    return {'seed': seed, 'quick': quick, **versions, 'config': config(row)}


def config(row: TaskRow | LanguageRow) -> dict[str, Any]:
    """What a result depends on, the model's defaults spelled out: they may change, and the result with them."""
    texts = ('name', 'claim', 'label', 'published', 'remark', 'targets', 'target', 'limits')
    fields = {name: value for name, value in vars(row).items() if name not in texts}
    model = row.wrapper().model
    fields['options'] = {name: getattr(model, name, value) for name, value in model.arguments.items()}
    if isinstance(row, TaskRow):
        fields['task'] = {'class': type(row.task()).__name__, **vars(row.task())}
    return fields


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes JSON: all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + '\n')


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='names of rows and experiments')
    parser.add_argument('--all', action='store_true', help='every row and every experiment')
    parser.add_argument('--seed', type=int, help='only this seed of the rows')
    parser.add_argument('--quick', action='store_true', help='three steps a run, into a scratch folder')
    parser.add_argument('--report', action='store_true', help='the page and the plots from the JSON that is there')
    parser.add_argument('--out', type=Path, help='folder of the JSON')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out or (Path(tempfile.mkdtemp()) if arguments.quick else RESULTS)
    names = [*ROWS, *EXPERIMENTS] if arguments.all else arguments.names
    unknown = [name for name in names if name not in ROWS and name not in EXPERIMENTS]
    if unknown:
        sys.exit(f'nothing called {", ".join(unknown)}: choose from {", ".join([*ROWS, *EXPERIMENTS])}')
    if arguments.seed is not None and set(names) & set(EXPERIMENTS):
        parser.error('--seed is for rows: an experiment has seeds of its own')
    for name in names:
        if name in EXPERIMENTS:
            run_experiment(EXPERIMENTS[name], folder, arguments.quick)
            continue
        for seed in [arguments.seed] if arguments.seed is not None else [0] if arguments.quick else SEEDS:
            run(ROWS[name], seed, folder, arguments.quick)
    if names or arguments.report:
        report(folder, PAGE if folder == RESULTS else folder / 'results.md')
        return
    for name, row in ROWS.items():
        seeds = [result['seed'] for result in load(RESULTS, name)]
        print(f'{name:28} {row.claim:70} seeds {seeds or "not run"}')
    for name, experiment in EXPERIMENTS.items():
        print(f'{name:28} {experiment.question:70} {", ".join(experiment.lacking(RESULTS)) or "all runs"}')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
