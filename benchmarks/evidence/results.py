"""Stores the runs of rows and experiments as JSON, each with the configuration that made it."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import experiments
from benchmarks.evidence.experiments import Experiment, stored
from benchmarks.evidence.rows import LanguageRow, TaskRow
from benchmarks.evidence.training import parameter_groups, run_row
from segment_recurrence_pytorch.checkpoint import replacing

RESULTS = Path(__file__).parents[1] / 'results' / 'evidence'
PAGE = Path(__file__).parents[2] / 'docs' / 'results.md'
SEEDS = (0, 1, 2)  # the seeds on which rows are trained


def run(row: TaskRow | LanguageRow, seed: int, folder: Path, quick: bool, device: str = 'cpu') -> None:
    """Trains a row on one seed, and writes the result as JSON.

    Args:
        row: the row.
        seed: the seed.
        folder: the folder of the results.
        quick: whether to train only three steps.
        device: where to train. Default: 'cpu'.
    """
    done = run_row(row, seed, quick, device=device)
    about = {'row': row.name, 'command': f'python -m benchmarks.evidence {row.name}'}
    write(folder / f'{row.name}-{seed}.json', {**about, **origin(row, seed, quick, device), **done})


def run_experiment(experiment: Experiment, folder: Path, quick: bool, device: str = 'cpu') -> None:
    """Trains the runs of an experiment that have no result yet, and writes each one when it is done.

    If another experiment has made a run with the same configuration and seed, its result is copied. Do not run two
    processes for the same experiment.

    Args:
        experiment: the experiment.
        folder: the folder of the results.
        quick: whether to train only three steps, with one seed and two arms.
        device: where to train. Default: 'cpu'.
    """
    for base in experiment.rows:
        path = experiment.file(folder, base)
        runs = {(run['arm'], run['seed']): run for run in stored(path)}
        for seed in experiments.SEEDS[:1] if quick else experiments.SEEDS:
            for arm in list(experiment.arms)[: 2 if quick else None]:
                row = experiment.row(base, arm)
                wanted = json.loads(json.dumps(origin(row, seed, quick)))
                done = known(path.parent, wanted)
                if done is None:
                    done = {**origin(row, seed, quick, device), **run_row(row, seed, quick, False, device)}
                runs[arm, seed] = {**done, 'arm': arm}
                write(path, {'experiment': experiment.name, 'row': base.name, 'runs': list(runs.values())})


def known(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the run with the wanted configuration and seed, if any experiment has it, else None.

    Args:
        folder: the folder of the experiments.
        wanted: what `origin` returned.
    """
    for path in sorted(folder.glob('*.json')):
        for have in stored(path):
            if all(have[name] == wanted[name] for name in ('config', 'seed', 'quick')):
                return have
    return None


def origin(row: TaskRow | LanguageRow, seed: int, quick: bool, device: str = 'cpu') -> dict[str, Any]:
    """Returns what made a result: seed, versions, machine and configuration."""
    machine = torch.cuda.get_device_name() if device == 'cuda' else platform.machine()
    versions = {'torch': torch.__version__, 'python': platform.python_version(), 'machine': machine}
    return {'seed': seed, 'quick': quick, **versions, 'config': config(row)}


def config(row: TaskRow | LanguageRow) -> dict[str, Any]:
    """Returns the configuration on which a result depends.

    It contains the defaults of the model, its initial weights and its learning rates, too: if a default of the library
    changes, the stored result no longer fits.
    """
    texts = ('name', 'claim', 'label', 'published', 'targets', 'target', 'limits')
    fields = {name: value for name, value in vars(row).items() if name not in texts}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapper = row.wrapper()
    model = wrapper.model
    fields['start'] = digest_of_start(model)
    fields['rates'] = [group['lr'] for group in parameter_groups(row, wrapper)]
    fields['options'] = {name: getattr(model, name, value) for name, value in model.arguments.items()}
    if isinstance(row, TaskRow):
        fields['task'] = {'class': type(row.task()).__name__, **vars(row.task())}
    return fields


def digest_of_start(model: nn.Module) -> str:
    """Returns a digest of the initial weights: of the mean and the standard deviation of each, in three digits, since
    machines may differ in the last ones."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        numbers = weight.double()
        digest.update(f'{name} {tuple(weight.shape)} {numbers.mean():.2e} {numbers.std(correction=0):.2e}'.encode())
    return digest.hexdigest()[:16]


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON. The file is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + '\n')
