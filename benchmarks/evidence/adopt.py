"""Adds a new option of the library to the configurations of results that are older than the option.

    python -m benchmarks.evidence.adopt CHECKOUT       # CHECKOUT: a folder with the code before the option was added

A result stays true if the default of a new option computes what was computed before. This is tested, not assumed. For
every stored configuration that lacks only new options, the model is trained for two steps with the code before and with
the code now. The initial weights, and the losses and weights after each step, must be the same bit for bit. The options
are then written into the JSON, and `options_added_later` names them. If anything else differs, even one bit, nothing is
written: that run has to be made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]


def worker() -> None:
    """For each line of standard input, trains two steps and prints a digest of the weights and losses.

    A line is a list in JSON: [experiment or null, row, arm or null, seed]. The worker runs with the code that is on its
    path, which is either the present code or the code before.
    """
    import torch

    from benchmarks.evidence.experiments import EXPERIMENTS
    from benchmarks.evidence.rows import ROWS, TaskRow
    from benchmarks.evidence.training import parameter_groups
    from segment_recurrence_pytorch.tasks import virtual_lengths

    torch.set_num_threads(1)
    for line in sys.stdin:
        experiment, name, arm, seed = json.loads(line)
        row = ROWS[name] if experiment is None else EXPERIMENTS[experiment].row(
            next(row for row in EXPERIMENTS[experiment].rows if row.name == name), arm
        )  # fmt: skip
        torch.manual_seed(seed)
        wrapper = row.wrapper()
        digest = hashlib.sha256()

        def note(wrapper=wrapper, digest=digest) -> None:
            for weight_name, tensor in sorted(wrapper.state_dict().items()):
                digest.update(weight_name.encode() + tensor.numpy().tobytes())

        note()
        optimizer = torch.optim.AdamW(parameter_groups(row, wrapper))
        generator = torch.Generator().manual_seed(seed)
        shape = row.batch_size, 4 * wrapper.segment_length + 1
        wrapper.train()
        state = None
        for _ in range(2):
            tokens = torch.randint(0, wrapper.model.num_tokens, shape, generator=generator)
            options: dict[str, Any] = {}
            if isinstance(row, TaskRow) and row.repetition:
                scale = virtual_lengths(row.batch_size, 4, most=row.repetition, generator=generator)
                options = {'per_segment': {'write_scale': scale}}
            returned = wrapper.loss(tokens, state, **options)
            optimizer.zero_grad()
            returned.loss.backward()
            torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
            optimizer.step()
            state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, returned.state)
            digest.update(repr(returned.loss.item()).encode())
            note()
        print(digest.hexdigest(), flush=True)


class Training:
    """A process that runs `worker` with the code of a checkout, inside a `with` block.

    Args:
        checkout: the folder of the code.
    """

    def __init__(self, checkout: Path):
        self.checkout = checkout
        env = dict(os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
        command = [sys.executable, str(Path(__file__).resolve()), '--worker']
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout
        )

    def digest(self, question: list[Any]) -> str:
        """Returns a digest of the initial weights, and of the losses and the weights after each step.

        Args:
            question: [experiment or None, row, arm or None, seed].
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f'training {question} failed in {self.checkout}')
        return answer

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        with self.process:
            self.process.kill()


def questions(folder: Path) -> list[tuple[Path, dict[str, Any], list[Any], dict[str, Any]]]:
    """Returns four things for each stored run: its file, the run, the question for `worker` that trains it, and its
    configuration as the present code would write it.

    Args:
        folder: the folder of the results.
    """
    from benchmarks.evidence.experiments import EXPERIMENTS, stored
    from benchmarks.evidence.results import config
    from benchmarks.evidence.rows import ROWS

    found: list[tuple[Path, dict[str, Any], list[Any], dict[str, Any]]] = []
    for name, row in ROWS.items():
        for path in sorted(folder.glob(f'{name}-*.json')):
            run = json.loads(path.read_text())
            if run['row'] == name:
                found.append((path, run, [None, name, None, run['seed']], config(row)))
    for experiment in EXPERIMENTS.values():
        for base in experiment.rows:
            path = experiment.file(folder, base)
            now = {arm: config(experiment.row(base, arm)) for arm in experiment.arms}
            for run in stored(path):
                question = [experiment.name, base.name, run['arm'], run['seed']]
                found.append((path, run, question, now[run['arm']]))
    return [(path, run, question, json.loads(json.dumps(now))) for path, run, question, now in found]


def added_options(before: dict[str, Any], now: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the options of a configuration that an older one does not have. Exits if anything else differs.

    Args:
        before: the stored configuration.
        now: the configuration as the present code would write it.
        name: what the error message calls the run.
    """
    added = {key: value for key, value in now['options'].items() if key not in before['options']}
    if {**now, 'options': {key: now['options'][key] for key in now['options'] if key not in added}} != before:
        raise SystemExit(f'{name}: more than new options differs, the run has to be made again')
    return added


def main(checkout: Path, folder: Path) -> None:
    """Compares every stored configuration, and then writes the new options.

    Args:
        checkout: a folder with the code before the option was added.
        folder: the folder of the results.
    """
    changes: list[tuple[Path, list[Any], dict[str, Any]]] = []
    trained: dict[str, bool] = {}
    with Training(checkout) as before, Training(ROOT) as now:
        for path, run, question, config in tqdm(questions(folder), desc='runs', disable=None):
            added = added_options(run['config'], config, f'{path.name} {question}')
            if not added:
                continue
            key = json.dumps([run['config'], question[-1]], sort_keys=True)
            if key not in trained:
                trained[key] = before.digest(question) == now.digest(question)
            if not trained[key]:
                raise SystemExit(f'{path.name} {question} trains to other bits: the run has to be made again')
            changes.append((path, question, added))
    write(changes)
    print(f'{len(changes)} runs in {len(trained)} configurations and seeds train to the same bits: options added')


def write(changes: list[tuple[Path, list[Any], dict[str, Any]]]) -> None:
    """Adds the options to the configurations of the runs, and to their `options_added_later`.

    Args:
        changes: for each run, its file, its question for `worker`, and the options.
    """
    from benchmarks.evidence.results import write as write_json

    for path in sorted({path for path, _, _ in changes}):
        content = json.loads(path.read_text())
        for _, (_, _, arm, seed), added in (change for change in changes if change[0] == path):
            for run in content.get('runs', [content]):
                if run['seed'] == seed and run.get('arm') == arm:
                    run['config']['options'] |= added
                    run['options_added_later'] = sorted({*run.get('options_added_later', []), *added})
        write_json(path, content)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkout', type=Path, nargs='?', help='a folder with the code before')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
    elif arguments.checkout is None:
        parser.error('give the folder with the code before')
    else:
        from benchmarks.evidence.results import RESULTS

        main(arguments.checkout.resolve(), RESULTS)
