"""Trains what rows and experiments ask for, and stores each run as JSON, with the configuration that made it."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.at_once import at_once
from benchmarks.evidence import experiments
from benchmarks.evidence.experiments import EXPERIMENTS, Experiment, stored
from benchmarks.evidence.rows import ROWS, LanguageRow, TaskRow
from benchmarks.evidence.training import parameter_groups, run_row
from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.wrapper import SegmentWrapper

RESULTS = Path(__file__).parents[1] / 'results' / 'evidence'
PAGE = Path(__file__).parents[2] / 'docs' / 'results.md'


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a row, or an arm of an experiment on one of its rows, with a seed.

    It has names and no rows, since another process can train it.

    Attributes:
        name: name of the row or of the experiment.
        seed: the seed.
        base: name of the row of an experiment. Default: '', a row by itself.
        arm: name of the arm of an experiment. Default: ''.
    """

    name: str
    seed: int
    base: str = ''
    arm: str = ''

    @property
    def experiment(self) -> Experiment:
        """The experiment, if it is a run of one."""
        return EXPERIMENTS[self.name]

    @property
    def base_row(self) -> TaskRow | LanguageRow:
        """The row of the experiment, without the changes of the arm."""
        return next(row for row in self.experiment.rows if row.name == self.base)

    @property
    def row(self) -> TaskRow | LanguageRow:
        """What is trained."""
        return self.experiment.row(self.base_row, self.arm) if self.base else ROWS[self.name]

    def path(self, folder: Path) -> Path:
        """Returns the file of the result. The runs of an experiment on a row are in one file.

        Args:
            folder: the folder of the results.
        """
        return self.experiment.file(folder, self.base_row) if self.base else folder / f'{self.name}-{self.seed}.json'

    def result(self, folder: Path) -> dict[str, Any] | None:
        """Returns the stored result. None: there is none.

        Args:
            folder: the folder of the results.
        """
        path = self.path(folder)
        if not self.base:
            return json.loads(path.read_text()) if path.exists() else None
        return next((run for run in stored(path) if (run['arm'], run['seed']) == (self.arm, self.seed)), None)

    def store(self, result: dict[str, Any], folder: Path) -> None:
        """Writes a result into the file.

        Args:
            result: what `trained` returned.
            folder: the folder of the results.
        """
        path = self.path(folder)
        if not self.base:
            write(path, {'row': self.name, 'command': f'python -m benchmarks.evidence {self.name}', **result})
            return
        runs = {(run['seed'], run['arm']): run for run in stored(path)}
        runs[self.seed, self.arm] = {**result, 'arm': self.arm}
        arms = {arm: index for index, arm in enumerate(self.experiment.arms)}
        ordered = sorted(runs.values(), key=lambda run: (run['seed'], arms.get(run['arm'], len(arms))))
        write(path, {'experiment': self.name, 'row': self.base, 'runs': ordered})


def jobs_of(name: str, quick: bool = False) -> list[Job]:
    """Returns the runs that a row or an experiment asks for.

    Args:
        name: its name.
        quick: whether to ask for one seed and two arms only. Default: False.
    """
    if name in ROWS:
        return [Job(name=name, seed=seed) for seed in ROWS[name].seeds[: 1 if quick else None]]
    experiment = EXPERIMENTS[name]
    seeds, arms = experiments.SEEDS[: 1 if quick else None], list(experiment.arms)[: 2 if quick else None]
    runs = itertools.product(experiment.rows, seeds, arms)
    return [Job(name=name, base=row.name, arm=arm, seed=seed) for row, seed, arm in runs]


def run(jobs: list[Job], folder: Path, quick: bool = False, device: str = 'cpu', processes: int = 1) -> list[Job]:
    """Trains what is asked for, and writes each result as soon as it is there.

    Runs of experiments that have the same configuration and seed are trained once, also if another experiment has them
    already. A run that fails does not stop the others.

    Args:
        jobs: the runs.
        folder: the folder of the results. Only one call at a time may write into it.
        quick: whether to train only three steps. Default: False.
        device: where to train. Default: 'cpu'.
        processes: the number of runs at once, each in a process with one CPU thread. Default: 1, in this process.

    Returns:
        The runs that failed. Why is printed.
    """
    same: dict[str, list[Job]] = {}
    for job in jobs:
        wanted = json.loads(json.dumps(origin(job.row, job.seed, quick)))
        done = known(folder / 'experiments', wanted) if job.base else None
        if done is not None:
            job.store(done, folder)
            continue
        same.setdefault(json.dumps([bool(job.base), wanted['config'], job.seed]), []).append(job)
    groups = list(same.values())

    def keep(index: int, found: dict[str, Any]) -> None:
        for job in groups[index]:
            job.store(found, folder)

    failed = at_once(trained, [(group[0], quick, device) for group in groups], processes, keep)
    return [job for index in failed for job in groups[index]]


def trained(job: Job, quick: bool, device: str) -> dict[str, Any]:
    """Trains one run in this process, and returns its result."""
    return {**origin(job.row, job.seed, quick, device), **run_row(job.row, job.seed, quick, not job.base, device)}


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
    texts = ('name', 'claim', 'label', 'published', 'targets', 'target', 'limits', 'paper', 'seeds')
    fields = {name: value for name, value in vars(row).items() if name not in (*texts, 'emb_lr')}  # `rates` has it
    wrapper = as_started(row.wrapper)
    model = wrapper.model
    fields['start'] = digest_of_start(model)
    fields['rates'] = [group['lr'] for group in parameter_groups(row, wrapper)]
    fields['options'] = {name: getattr(model, name, value) for name, value in model.arguments.items()}
    if isinstance(row, TaskRow):
        fields['task'] = {'class': type(row.task()).__name__, **vars(row.task())}
    return fields


def as_started(build: Callable[[], SegmentWrapper]) -> SegmentWrapper:
    """Returns the model that a function builds, with the initial weights of seed 0, and draws no random number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


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
