"""A training that is killed at any moment and resumed ends as if nothing had happened, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_enwik8
from benchmarks.kill import kill_and_compare
from segment_recurrence_pytorch import run_folder, trainer
from segment_recurrence_pytorch.metrics import MetricsLog
from tests.script import main, metrics, steps, train, without_clock

MOMENTS = {
    'while the first checkpoint is written': (trainer, 'save_training_state', 1),
    'before the folder of the run appears': (trainer, 'reveal', 1),
    'before the first step': (train_enwik8, 'keep_steps', 1),
    'in a step': (trainer, 'train_loss', 3),
    'after a step, before its line': (MetricsLog, 'write', 3),
    'after the line of a step, before its checkpoint': (MetricsLog, 'sync', 3),
    'before the weights are written': (trainer, 'save_weights', 4),
    'between weights and training state': (trainer, 'save_training_state', 4),
    'before the sums are written': (run_folder, '_sha256', 8),
    'before a checkpoint is renamed': (run_folder, 'sync', 20),
    'before an old checkpoint is removed': (run_folder, 'checkpoints', 4),
    'while an old checkpoint is removed': (run_folder.shutil, 'rmtree', 2),
    'before the weights are copied': (trainer, 'copy_weights', 4),
    'while the weights are copied': (run_folder.shutil, 'copyfile', 4),
    'in validation': (train_enwik8, 'bits_per_byte', 2),
    'before the last line': (train_enwik8, 'write_validation', 1),
}


def killed(place, name, call, *arguments):
    """Runs the script in a child process, which kills itself when a function is called for the n-th time."""
    child = os.fork()
    if child == 0:
        try:
            function, calls = getattr(place, name), [0]

            def dying(*given, **options):
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **options)

            setattr(place, name, dying)
            train(*arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(torch.cuda.is_available(), reason='a process cannot be forked once CUDA runs in it')
@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_at_each_moment(at_work, moment):
    settings = '--steps', 4, '--save-minutes', 0
    assert killed(*MOMENTS[moment], *settings)
    again = main('--resume', 'runs/a', '--save-minutes', 0) if Path('runs/a').exists() else train(*settings)
    assert (again.code, again.err) == (0, '')
    whole, cut = load_file('runs/rmt/model.safetensors'), load_file('runs/a/model.safetensors')
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_clock(metrics('runs/a')) == without_clock(metrics('runs/rmt'))
    assert steps('runs/a') == [3, 4]
    assert [path.name for path in Path('runs/a').glob('.*')] == ['.lock']
    assert {path.name for path in Path('runs').iterdir()} == {'rmt', 'infini', 'a'}


@pytest.mark.long
@pytest.mark.parametrize('ranks', [1, 2])
def test_two_kills_at_random_moments(tmp_path, ranks):
    """The same with real processes and the real presets: what `python -m benchmarks.kill` does more often."""
    found = kill_and_compare('rmt', kills=2, steps=5, folder=tmp_path, ranks=ranks)
    assert found['kills'] == 2
    assert found['weights_equal']
    assert found['optimizer_equal']
    assert found['metrics_equal']
