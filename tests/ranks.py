"""Runs test cases in several processes that work together, once for all cases of one number of processes.

A module of cases has functions that are marked with `@case(2, 4)`: the numbers of processes for which they run, the
smallest one first. `make test` runs them for that one, `make test-long` for all, and those with `@case(4, long=True)`.
Every process runs the same cases in the same order. A case passes if it raises no error on any of them.

    python -m tests.ranks FOLDER RANK RANKS MODULE     what each process runs
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import LONG
from tests.once import made_once

ROOT = Path(__file__).resolve().parent.parent
SECONDS_OF_A_WAIT = 60  # of one rank for another, before it is an error
SECONDS = 300  # of all cases together, of which they need about 50


def case(*numbers, long=False):
    """Marks a function (rank, ranks) as a case for some numbers of processes; `long`: only for `make test-long`."""

    def mark(function):
        function.numbers = numbers if LONG else numbers[:1] if not long else ()
        return function

    return mark


def cases(module, ranks: int) -> list[str]:
    """The names of the cases for one number of processes, in the order of the file."""
    return [name for name, each in vars(module).items() if ranks in getattr(each, 'numbers', ())]


def once(module, tmp_path_factory, config, prepare=lambda folder: None):
    """A function from a number of processes to what went wrong in each case. The processes are started once, by
    whichever worker of pytest-xdist comes first.

    Args:
        module: the module of cases.
        tmp_path_factory: the fixture.
        config: that of pytest.
        prepare: called with the folder of the processes before they start.
    """
    name = module.__name__.rpartition('.')[2]

    def of(ranks: int) -> dict[str, str]:
        def make(folder: Path) -> dict[str, str]:
            prepare(folder)
            return run(module, ranks, folder)

        return made_once(tmp_path_factory, config, f'{name}-{ranks}', make)

    return of


def run(module, ranks: int, folder: Path) -> dict[str, str]:
    """What went wrong in each case, by its name: nothing, or the errors of all ranks."""
    command = [sys.executable, '-W', 'error', '-m', 'tests.ranks', str(folder)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'WORLD_SIZE': str(ranks)}
    outputs = [(folder / f'output-{rank}').open('w') for rank in range(ranks)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), module.__name__],
            cwd=ROOT, env={**environment, 'RANK': str(rank)},
            stdout=outputs[rank], stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    end = time.monotonic() + SECONDS
    try:
        for process in running:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in running:
            process.kill()
            process.wait()
        for output in outputs:
            output.close()
    said = {rank: _lines(folder / f'results-{rank}') for rank in range(ranks)}
    ended = '\n'.join(f'rank {rank}: {(folder / f"output-{rank}").read_text()[-2000:]}' for rank in range(ranks))
    found = {}
    for name in cases(module, ranks):
        errors = [f'rank {rank}: {said[rank].get(name, "did not get to the end of it")}' for rank in range(ranks)]
        wrong = [error for rank, error in enumerate(errors) if said[rank].get(name) != '']
        found[name] = '\n'.join([*wrong, ended]) if wrong else ''
    return found


def _lines(path: Path) -> dict[str, str]:
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


def _run_as_rank(folder: Path, rank: int, ranks: int, module) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=SECONDS_OF_A_WAIT)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=ranks, timeout=wait)
    module.FOLDER = folder
    with (folder / f'results-{rank}').open('w') as results:
        for name in cases(module, ranks):
            torch.manual_seed(0)
            start = time.monotonic()
            try:
                getattr(module, name)(rank, ranks)
                wrong = ''
            except Exception:
                wrong = traceback.format_exc()
            print(f'{time.monotonic() - start:6.2f} s  {name}  {"failed" if wrong else ""}', flush=True)
            results.write(json.dumps([name, wrong]) + '\n')
            results.flush()
            # if one rank has failed alone, the others are somewhere else: no further case would mean anything
            dist.monitored_barrier(timeout=wait)
    dist.destroy_process_group()


if __name__ == '__main__':
    _run_as_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), importlib.import_module(sys.argv[4]))
