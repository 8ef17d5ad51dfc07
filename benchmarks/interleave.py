"""Times programs against each other: each runs in a process of its own, their steps alternate, and medians are
compared.

The two published packages have the same import names as ours, so they live in an environment of their own, which `make
bench` makes. A process runs one step for each line on its standard input, and answers with the seconds that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / '.venv-peer' / 'bin' / 'python'


class Worker:
    """A process that runs `python script --worker name` and answers with the seconds of each step.

    Several get ready at the same time: the first look at `about` waits until this one is.

    Args:
        python: the Python interpreter.
        script: the benchmark, which calls `serve` when it is run with --worker.
        name: tells the script what to run.
        ours: whether the process imports this library instead of a published package.
    """

    def __init__(self, python: str | Path, script: str | Path, name: str, *, ours: bool):
        if not Path(python).exists():
            raise SystemExit(f'{python} is missing: `make bench` makes the environment of the published packages')
        env = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
        env['TQDM_DISABLE'] = '1'  # the published packages draw bars that cannot be turned off
        env.pop('PYTHONPATH', None)
        if ours:
            env['PYTHONPATH'] = str(ROOT)
        self.process = subprocess.Popen(
            [str(python), str(script), '--worker', name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=Path(script).parent,
        )  # fmt: skip

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the process says of itself, the keyword arguments of `serve`."""
        return json.loads(self._answer())

    def step(self) -> float:
        """Runs one step, and returns its seconds."""
        assert self.process.stdin is not None
        _ = self.about  # its first answer
        self.process.stdin.write('step\n')
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f'the worker {self.process.args!r} ended with status {self.process.wait()}')
        return line

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(step: Callable[[], object], **about) -> None:
    """Runs in the process of a `Worker`: runs a step for every line of standard input, and prints its seconds.

    Args:
        step: the step. If it returns a float, this is printed as its seconds instead of the time of the call.
        about: what the process says of itself, as values for JSON.
    """
    import torch

    print(json.dumps({'torch': torch.__version__, **about}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        measured = step()
        print(measured if isinstance(measured, float) else time.perf_counter() - start, flush=True)


def interleaved_medians(workers: dict[str, Worker], repetitions: int, warmup: int = 2) -> dict[str, float]:
    """Returns the median seconds of a step for each worker. The workers take turns, one step each, and are closed at
    the end.

    Args:
        workers: the workers by name.
        repetitions: number of steps of each worker that count.
        warmup: number of steps of each worker before these, which do not count. Default: 2.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        _ = worker.about  # all are ready before the first step is timed
    for repetition in tqdm(range(warmup + repetitions), disable=None, desc=', '.join(workers)):
        for name, worker in workers.items():
            taken = worker.step()
            if repetition >= warmup:
                seconds[name].append(taken)
    for worker in workers.values():
        worker.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def quick_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the command line with the option --quick, which each benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='does it all run? In a minute, and no file is written')
    return parser


def machine() -> dict[str, Any]:
    """Returns what a JSON says of the machine."""
    return {'machine': platform.machine(), 'cpus': os.cpu_count(), 'python': platform.python_version()}


def write_results(script: str, results: dict, quick: bool = False) -> None:
    """Writes results/SCRIPT.json beside the benchmarks, with the command and the machine.

    Args:
        script: the file of the benchmark.
        results: what was measured.
        quick: whether nothing is written, because it was measured with --quick. Default: False.
    """
    if quick:
        return
    path = Path(__file__).parent / 'results' / f'{Path(script).stem}.json'
    path.parent.mkdir(exist_ok=True)
    command = f'python -m benchmarks.{Path(script).stem}'
    path.write_text(json.dumps({'command': command, **machine(), **results}, indent=2) + '\n')
    print(f'wrote {path.relative_to(ROOT)}')
