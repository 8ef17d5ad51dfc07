"""Times programs against each other: one process each, one step at a time in turn, medians.

The two published packages have our import names, so they live in an environment of their own
(`make bench` makes it); a worker answers each line on its standard input with the seconds of one step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / '.venv-peer' / 'bin' / 'python'


class Worker:
    """A process that runs `python script --worker name` and answers with the seconds of one step."""

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
        self.about = json.loads(self._answer())

    def step(self) -> float:
        """Runs one step; its seconds."""
        assert self.process.stdin is not None
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
    """The worker's side: runs `step` for every line of standard input. A step that measures itself returns seconds."""
    import torch

    print(json.dumps({'torch': torch.__version__, **about}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        measured = step()
        print(measured if isinstance(measured, float) else time.perf_counter() - start, flush=True)


def interleaved_medians(workers: dict[str, Worker], repetitions: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of a step of each worker, the steps taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for repetition in tqdm(range(warmup + repetitions), disable=None, desc=', '.join(workers)):
        for name, worker in workers.items():
            taken = worker.step()
            if repetition >= warmup:
                seconds[name].append(taken)
    for worker in workers.values():
        worker.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_results(script: str, results: dict) -> None:
    """Writes results/SCRIPT.json beside the benchmarks, with the machine and the command."""
    machine = {'machine': platform.machine(), 'cpus': os.cpu_count(), 'python': platform.python_version()}
    path = Path(__file__).parent / 'results' / f'{Path(script).stem}.json'
    path.parent.mkdir(exist_ok=True)
    command = f'python -m benchmarks.{Path(script).stem}'
    path.write_text(json.dumps({'command': command, **machine, **results}, indent=2) + '\n')
    print(f'wrote {path.relative_to(ROOT)}')
