"""The training script in two and four processes. The cases are in `train_cases`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import ranks, train_cases
from tests.script import ROOT, main


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


def test_a_rank_that_dies(tmp_path):
    """The others end with an error, at once and not after the timeout, and the last checkpoint stays."""
    (tmp_path / 'text').write_bytes((ROOT / 'tests' / 'test_rmt.py').read_bytes())
    command = [
        sys.executable, str(ROOT / 'train_enwik8.py'), '--device', 'cpu', '--threads', '1', '--data', 'text',
        '--steps', '1000', '--name', 'a', '--save-minutes', '0', '--valid-bytes', '5000',
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    address = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port, 'WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}
    running = [
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **address, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (tmp_path / 'runs' / 'a' / 'checkpoints' / 'step-2').exists():
            assert time.monotonic() < end
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.1)
        running[1].kill()
        _, err = running[0].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert running[1].returncode == -signal.SIGKILL
    assert running[0].returncode == 1
    assert 'error: rank 0 of 2: another rank has ended or does not answer: ' in err
    assert 'Traceback' not in err
    assert 'to go on: python' in err
    assert list((tmp_path / 'runs' / 'a' / 'checkpoints').glob('step-*'))
