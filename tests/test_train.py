"""The training script as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_enwik8

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments):
    return [sys.executable, str(ROOT / 'train_enwik8.py'), '--device', 'cpu', *map(str, arguments)]


def run(folder, *arguments, fails=False):
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp('corpus') / 'text'
    path.write_bytes(Path(ROOT / 'tests' / 'test_rmt.py').read_bytes() * 8)
    return path


def metrics(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('model', ['rmt', 'infini'])
def test_a_run_leaves_what_it_says(tmp_path, corpus, model):
    out = run(tmp_path, '--data', corpus, '--steps', 4, '--valid-bytes', 3000, '--name', 'a', '--model', model)
    assert re.search(r'corpus .*\n +sha256 [0-9a-f]{64}', out)
    for name in ('unigram', 'zlib', 'xz'):
        assert re.search(rf'{name} +\d\.\d+ bits per byte', out)
    carried, reset = re.findall(r'validation  (\d\.\d+) bits per byte, state (?:carried|reset)', out)
    assert 'is a diagnostic' in out
    assert f'--memory off --steps 4 --model {model} --preset small --seed 0 --data {corpus}' in out
    assert len(out.split('sample ')[1]) > 100
    folder = tmp_path / 'runs' / 'a'
    assert {file.name for file in folder.iterdir()} == {
        'config.json', 'loss.png', 'metrics.jsonl', 'model.safetensors', 'training.pt',
        *(['memory_shares.png'] if model == 'infini' else []),
    }  # fmt: skip
    lines = metrics(folder)
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 4]
    assert f'{lines[-1]["valid"]["carried"]:.3f}' == carried
    assert f'{lines[-1]["valid"]["reset"]:.3f}' == reset
    assert json.loads((folder / 'config.json').read_text())['run']['memory'] == 'on'
    assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_the_twin_without_memory_reads_the_same_bytes_and_needs_no_state(tmp_path, corpus):
    run(tmp_path, '--data', corpus, '--steps', 3, '--valid-bytes', 3000, '--name', 'on')
    out = run(tmp_path, '--data', corpus, '--steps', 3, '--valid-bytes', 3000, '--name', 'off', '--memory', 'off')
    on, off = metrics(tmp_path / 'runs' / 'on'), metrics(tmp_path / 'runs' / 'off')
    assert [line['bytes'] for line in on[:-1]] == [line['bytes'] for line in off[:-1]]
    assert on[-2]['bits'] != off[-2]['bits']
    assert torch.load(tmp_path / 'runs' / 'off' / 'training.pt', weights_only=True)['state'] is None
    assert '--memory on --steps 3' in out


@pytest.mark.parametrize('model', ['rmt', 'infini'])
def test_a_stopped_and_resumed_run_is_one_run(tmp_path, corpus, monkeypatch, model):
    """Stopped after two of four steps: the same weights, bit for bit, as without the stop."""

    class StopAfterTwo(train_enwik8.StopRequest):
        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 2

    def main(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train_enwik8.py', '--valid-bytes', '3000', *map(str, arguments)])
        train_enwik8.main()

    monkeypatch.chdir(tmp_path)
    main('--data', corpus, '--steps', 4, '--name', 'whole', '--model', model)
    with monkeypatch.context() as patch:
        patch.setattr(train_enwik8, 'StopRequest', StopAfterTwo)
        main('--data', corpus, '--steps', 4, '--name', 'cut', '--model', model)
    assert len(metrics(Path('runs/cut'))) == 2
    with open('runs/cut/metrics.jsonl', 'a') as file:  # as a killed run would have left it
        file.write('{"step": 3, "bits": 0}\n')
    main('--resume', 'runs/cut')
    whole, cut = (load_file(f'runs/{name}/model.safetensors') for name in ('whole', 'cut'))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for line, other in zip(metrics(Path('runs/whole')), metrics(Path('runs/cut')), strict=True):
        assert line.get('bits') == other.get('bits')
        assert line.get('valid') == other.get('valid')


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, corpus):
    process = subprocess.Popen(
        command('--data', corpus, '--steps', 2000, '--name', 'a'), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    path = tmp_path / 'runs' / 'a' / 'metrics.jsonl'
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and len(path.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f'stopped at step {len(metrics(tmp_path / "runs" / "a"))} and saved' in out
    assert 'python train_enwik8.py --resume runs/a' in out
    done = len(metrics(tmp_path / 'runs' / 'a'))
    assert f'from step {done} on' in run(tmp_path, '--resume', 'runs/a', '--steps', done + 1, '--valid-bytes', 3000)


def test_refusals_leave_nothing_behind(tmp_path, corpus):
    run(tmp_path, '--data', corpus, '--steps', 1, '--valid-bytes', 3000, '--name', 'a')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'config.json').write_text('{"hidden_size": 8}')
    before |= dict.fromkeys((tmp_path / 'other').rglob('*'), 0) | {tmp_path / 'other': 0}
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').touch()
    (tmp_path / 'small').write_bytes(b'a few bytes, ' * 10)
    before[tmp_path / 'file'] = before[tmp_path / 'empty'] = before[tmp_path / 'small'] = 0
    for arguments, message in [
        (('--resume', 'runs/a', '--preset', 'base'), 'was made with --preset small, not base'),
        (('--resume', 'runs/a', '--memory', 'off'), 'was made with --memory on, not off'),
        (('--resume', 'runs/none'), 'no run to go on with'),
        (('--resume', 'other'), 'no run to go on with'),
        (('--data', corpus, '--device', 'nowhere'), 'is not there'),
        (('--data', corpus, '--name', 'a'), 'is there already'),
        (('--data', corpus, '--out', 'file/runs'), 'cannot be written to'),
        (('--data', 'empty'), 'is empty'),
        (('--data', 'small'), 'less than one batch'),
        (('--data', 'absent'), 'cannot be read'),
        (('--data', corpus, '--steps', '0'), 'must be above 0'),
    ]:
        error = run(tmp_path, *arguments, fails=True)
        assert message in error
        assert 'Traceback' not in error
    assert set(tmp_path.rglob('*')) == set(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if time)


def test_weights_of_another_model_are_refused(tmp_path, corpus):
    run(tmp_path, '--data', corpus, '--steps', 1, '--valid-bytes', 3000, '--name', 'a')
    config = tmp_path / 'runs' / 'a' / 'config.json'
    config.write_text(config.read_text().replace('"small"', '"base"'))
    error = run(tmp_path, '--resume', 'runs/a', fails=True)
    assert 'model.safetensors was made with depth=3, this model has 8' in error


def test_a_damaged_training_state_is_refused(tmp_path, corpus):
    run(tmp_path, '--data', corpus, '--steps', 1, '--valid-bytes', 3000, '--name', 'a')
    (tmp_path / 'runs' / 'a' / 'training.pt').write_bytes(b'garbage')
    error = run(tmp_path, '--resume', 'runs/a', fails=True)
    assert 'no training state' in error
    assert 'Traceback' not in error


def test_a_trained_model_writes_on(tmp_path, corpus):
    run(tmp_path, '--data', corpus, '--steps', 2, '--valid-bytes', 3000, '--name', 'a')
    run(tmp_path, '--data', corpus, '--steps', 2, '--valid-bytes', 3000, '--name', 'off', '--memory', 'off')
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*'))
    options = '--sample', '--resume', 'runs/a', '--prompt', 'import ', '--temperature', 0
    out = run(tmp_path, *options, '--bytes', 150)
    assert out.startswith('import ')
    assert run(tmp_path, *options, '--bytes', 150) == out
    drawn = [run(tmp_path, *options[:-2], '--bytes', 150, '--seed', seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 'give --bytes' not in run(tmp_path, '--sample', '--resume', 'runs/off', '--bytes', 20)
    assert '7 in the prompt leave --bytes 57' in run(tmp_path, '--sample', '--resume', 'runs/off', fails=True)
    assert 'needs a trained model' in run(tmp_path, '--sample', fails=True)
    assert '--prompt is empty' in run(tmp_path, '--sample', '--resume', 'runs/a', '--prompt', '', fails=True)
    assert '--bytes is 0' in run(tmp_path, '--sample', '--resume', 'runs/a', '--bytes', 0, fails=True)
    assert 'no run to go on with' in run(tmp_path, '--sample', '--resume', 'runs/b', fails=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'runs').rglob('*')) == before
