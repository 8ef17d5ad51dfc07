"""Kills a training with SIGKILL at random moments, and resumes it each time: it must end as if nothing had happened.

    python -m benchmarks.kill                              # each model: 20 kills in one process, 5 in two
    python -m benchmarks.kill --kills 3 0 --models rmt     # does not write the JSON

One run goes to its end undisturbed. Another one of the same settings is killed again and again: it is left alone until
it has made the model, and for a random time after that. This time can end while the first
checkpoint is made, while a checkpoint is loaded, in a step, or while a checkpoint is saved, which every second process
on average does after each step. At the end the weights, the state of the optimizer and all of metrics.jsonl but the
clock must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from benchmarks.interleave import ROOT, write_results

MODELS = ('rmt', 'infini')
KILLS, STEPS = [20, 5], 60  # kills in one process, and in two


def start(folder: Path, *arguments: str, ranks: int = 1) -> list[subprocess.Popen]:
    """Starts the training script in a folder, and returns its processes once the first one has made its model.

    Args:
        folder: the working directory.
        arguments: the command line.
        ranks: number of processes, which find each other as those of torchrun do. Default: 1.
    """
    command = [sys.executable, str(ROOT / 'train_enwik8.py'), '--device', 'cpu', '--threads', '1', *arguments]
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    many = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {**os.environ, **(many | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks > 1 else {})}
        processes.append(
            subprocess.Popen(
                command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )  # fmt: skip
    first = processes[0]
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line)
        if line.startswith('model '):
            return processes
    raise SystemExit(f'{" ".join(command)} ended early:\n{"".join(lines)}')


def finish(processes: list[subprocess.Popen]) -> float:
    """Waits for the end of all processes, which must be a good one, and returns the seconds until then."""
    begin = time.perf_counter()
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f'{process.args!r} ended with status {process.returncode}:\n{out}')
    return time.perf_counter() - begin


def kill_and_compare(model: str, kills: int, steps: int, folder: Path, seed: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Makes the two runs, and returns what the kills met and whether the runs are equal.

    Args:
        model: 'rmt' or 'infini'.
        kills: number of kills.
        steps: number of steps of the runs.
        folder: an empty folder.
        seed: seed of the moments. Default: 0.
        ranks: number of processes of a run. Default: 1.
    """
    moments = random.Random(f'{model} {seed}')
    sources = sorted(path for path in ROOT.glob('*_pytorch/*.py'))
    (folder / 'text').write_bytes(b''.join(path.read_bytes() for path in sources))
    settings = ['--model', model, '--data', 'text', '--valid-bytes', '5000', '--steps', str(steps)]
    seconds = finish(start(folder, *settings, '--name', 'whole', '--save-minutes', '0', ranks=ranks))

    run = folder / 'runs' / 'killed'
    before_the_first_checkpoint = while_saving = 0
    steps_at_kills = []
    for kill in range(kills + 1):
        begun = ['--resume', str(run)] if run.exists() else [*settings, '--name', 'killed']
        half_written = hidden(run)
        processes = start(folder, *begun, '--save-minutes', moments.choice(['0', '0.02']), ranks=ranks)
        if kill == kills:
            finish(processes)
            break
        time.sleep(moments.uniform(0, 2 * seconds / (kills + 1)))
        for process in processes:
            process.kill()
        for process in processes:
            if process.wait() == 0:
                raise SystemExit(f'the run ended before kill {kill + 1} of {kills}: give more --steps than {steps}')
            assert process.stdout is not None
            process.stdout.close()
        before_the_first_checkpoint += not run.exists()
        while_saving += bool(hidden(run) - half_written)
        steps_at_kills.append(len(lines_of(run)))

    whole = folder / 'runs' / 'whole'
    return {
        'model': model,
        'ranks': ranks,
        'steps': steps,
        'kills': kills,
        'kills_before_the_first_checkpoint': before_the_first_checkpoint,
        'kills_while_saving': while_saving,
        'steps_in_the_log_at_kills': steps_at_kills,
        'weights_equal': equal(*(load_file(each / 'model.safetensors') for each in (whole, run))),
        'optimizer_equal': equal(*(optimizer(each, steps) for each in (whole, run))),
        'metrics_equal': lines_of(whole) == lines_of(run),
    }


def hidden(run: Path) -> set[tuple[Path, int]]:
    """Returns what is half written in the folder of a run, each with the time of its last change."""
    return {(path, path.stat().st_ctime_ns) for path in [*run.glob('checkpoints/.*'), *run.glob('.*.part')]}


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of metrics.jsonl without the clock. There are none if the file is not there."""
    path = run / 'metrics.jsonl'
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(text) for text in texts if text.endswith('\n')]
    return [{name: value for name, value in line.items() if name != 'seconds'} for line in lines]


def optimizer(run: Path, step: int) -> Any:
    """Returns the state of the optimizer in the checkpoint of a step."""
    path = run / 'checkpoints' / f'step-{step}' / 'training.pt'
    return torch.load(path, weights_only=True)['optimizer']['state']


def equal(one: Any, other: Any) -> bool:
    """Returns whether two trees of tensors are equal, bit for bit."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(mine, yours) for mine, yours in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of docs/reliability.md.

    Args:
        rows: what `kill_and_compare` returned.
    """
    lines = [
        '| model | processes | kills | of them while saving | weights, optimizer, metrics |',
        '|---|---|---|---|---|',
    ]
    for row in rows:
        equal = all(value for name, value in row.items() if name.endswith('_equal'))
        how = 'bit-equal' if equal else 'differ'
        lines.append(f'| {row["model"]} | {row["ranks"]} | {row["kills"]} | {row["kills_while_saving"]} | {how} |')
    return '\n'.join(lines)


def main() -> None:
    """Kills a run of each model, and runs of two processes. Writes the JSON, if all is default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, nargs=2, default=KILLS, metavar=('ONE', 'TWO'),
                        help='of each model in one process and in two, default %(default)s')  # fmt: skip
    parser.add_argument('--steps', type=int, default=STEPS, help=f'of each run, default {STEPS}')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    arguments = parser.parse_args()
    rows = []
    for ranks, kills in enumerate(arguments.kills, start=1):
        for model in arguments.models if kills else ():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(kill_and_compare(model, kills, arguments.steps, Path(folder), arguments.seed, ranks))
            print(json.dumps(rows[-1]), flush=True)
    if vars(arguments) == vars(parser.parse_args([])):
        write_results(__file__, {'torch': torch.__version__, 'rows': rows})
    if not all(value for row in rows for name, value in row.items() if name.endswith('_equal')):
        raise SystemExit('a run that was killed is not the one that was not')


if __name__ == '__main__':
    main()
