"""The training script in two and four processes. The cases are in `train_cases`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks, train_cases
from tests.script import ROOT, main, metrics


@pytest.fixture(scope='session')
def results(tmp_path_factory, request):
    return ranks.once(train_cases, tmp_path_factory, request.config, train_cases.prepare)


NAMED = [(count, name) for count in (2, 4) for name in ranks.cases(train_cases, count)]


@pytest.mark.parametrize(('count', 'name'), NAMED, ids=[f'{count} ranks, {name}' for count, name in NAMED])
def test_ranks_make_one_run(results, count, name):
    wrong = results(count)[name]
    assert not wrong, wrong


@pytest.mark.parametrize(('name', 'whole'), [('rmt-for-one', 'rmt-whole'), ('infini-for-one', 'infini-whole')])
def test_a_run_of_two_goes_on_in_one(results, tmp_path_factory, request, monkeypatch, name, whole):
    assert not results(2)['a_checkpoint_for_one_process']
    base = tmp_path_factory.getbasetemp()
    monkeypatch.chdir((base.parent if hasattr(request.config, 'workerinput') else base) / 'train_cases-2')
    with train_cases.tiny(train_cases.SIZES):
        done = main('--resume', f'runs/{name}')
    assert (done.code, done.err) == (0, '')
    assert 'ranks       1 instead of 2' in done.out
    train_cases.same_losses(name, whole)


def start(folder, *arguments, command=(sys.executable,), **environment):
    """The script with its real sizes, on a corpus of its own."""
    command = [
        *command, str(ROOT / 'train_enwik8.py'), '--device', 'cpu', '--threads', '1', '--data', 'text',
        '--valid-bytes', '5000', *arguments,
    ]  # fmt: skip
    (folder / 'text').write_bytes(b''.join(path.read_bytes() for path in sorted((ROOT / 'tests').glob('test_*.py'))))
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_does_not_answer(tmp_path, how):
    """The other one ends with an error, at once or after the timeout, and the last checkpoint stays."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}
    minutes = '10' if how == signal.SIGKILL else '0.2'
    arguments = '--steps', '1000', '--name', 'a', '--save-minutes', '0', '--timeout-minutes', minutes
    running = [start(tmp_path, *arguments, **address, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        wait_for(tmp_path / 'runs' / 'a' / 'checkpoints' / 'step-2', running[0])
        running[1].send_signal(how)
        _, err = running[0].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert running[0].returncode == 1
    assert err.startswith('error: rank 0 of 2: another rank has ended or does not answer (gloo: ')
    assert len(err.splitlines()) == 1
    assert '; to go on: torchrun --nproc-per-node=2 ' in err
    assert list((tmp_path / 'runs' / 'a' / 'checkpoints').glob('step-*'))


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the processes of torchrun in /proc')
def test_two_processes_of_torchrun_are_killed_and_one_goes_on(tmp_path):
    """As the README says it: two processes train, are killed, one goes on, and samples."""
    torchrun = sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'
    many = start(tmp_path, '--steps', '6', '--name', 'a', '--save-minutes', '0', command=torchrun)
    try:
        wait_for(tmp_path / 'runs' / 'a' / 'checkpoints' / 'step-2', many)
        children = [
            int(pid)
            for task in Path(f'/proc/{many.pid}/task').iterdir()
            for pid in (task / 'children').read_text().split()
        ]
        assert len(children) == 2
        for child in children:
            os.kill(child, signal.SIGKILL)
        many.communicate(timeout=120)
    finally:
        many.kill()
        many.communicate()
    one = start(tmp_path, '--resume', 'runs/a')
    out, err = one.communicate(timeout=120)
    assert (one.returncode, err) == (0, '')
    assert 'ranks       1 instead of 2' in out
    assert metrics(tmp_path / 'runs' / 'a')[-1]['step'] == 6
    sample = start(tmp_path, '--sample', '--resume', 'runs/a', '--bytes', '20', '--prompt', 'import ')
    out, err = sample.communicate(timeout=120)
    assert (sample.returncode, err) == (0, '')
    assert out.startswith('import ')
