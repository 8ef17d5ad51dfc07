"""The training script as a user runs it: what a run leaves, how it is stopped and resumed, and what is refused."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_enwik8
from segment_recurrence_pytorch import data, trainer
from segment_recurrence_pytorch.checkpoint import load_weights
from segment_recurrence_pytorch.ranks import Ranks
from segment_recurrence_pytorch.training import has_bfloat16
from tests.script import MODELS, ROOT, at_step, files, main, metrics, steps, train, without_clock


@pytest.mark.parametrize('model', MODELS)
def test_a_run_leaves_what_it_says(made, model):
    folder, out = made[0] / 'runs' / model, made[1][model]
    assert re.search(r'corpus .*\n +sha256 [0-9a-f]{64}', out)
    for name in ('unigram', 'zlib', 'xz'):
        assert re.search(rf'{name} +\d\.\d+ bits per byte', out)
    carried, reset = re.findall(r'validation  (\d\.\d+) bits per byte, state (?:carried|reset)', out)
    assert 'is a diagnostic' in out
    assert f'--memory off --steps 4 --model {model} --preset small --seed 0 --data text' in out
    assert f'--valid-bytes 600 --compare runs/{model}' in out
    assert 'sample      the model has read 56 bytes of a validation text' in out
    assert 'sample      without memory of the 48 bytes before these 8:' in out
    assert len(out.split('sample ')[1]) > 60
    assert {file.name for file in folder.iterdir()} == {
        '.lock', 'checkpoints', 'config.json', 'loss.png', 'metrics.jsonl', 'model.safetensors', 'run.json',
        *(['memory_shares.png'] if model == 'infini' else []),
    }  # fmt: skip
    assert steps(folder) == [0, 4]
    for checkpoint in (folder / 'checkpoints').iterdir():
        assert {file.name for file in checkpoint.iterdir()} == {'SHA256SUMS', 'model.safetensors', 'training.pt'}
    lines = metrics(folder)
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 4]
    assert f'{lines[-1]["valid"]["carried"]:.3f}' == carried
    assert f'{lines[-1]["valid"]["reset"]:.3f}' == reset
    assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('model', MODELS)
def test_the_weights_beside_the_arguments_make_the_model_again(made, model):
    folder = made[0] / 'runs' / model
    again = MODELS[model](**json.loads((folder / 'config.json').read_text()))
    load_weights(again, folder / 'model.safetensors')
    newest = load_file(folder / 'checkpoints' / 'step-4' / 'model.safetensors')
    assert all(torch.equal(tensor, newest[name]) for name, tensor in again.state_dict().items())
    run = json.loads((folder / 'run.json').read_text())
    assert run['run']['memory'] == 'on'
    assert run['corpus'] == 'text'


def test_a_checkpoint_holds_all_that_going_on_needs(made):
    saved = torch.load(made[0] / 'runs' / 'rmt' / 'checkpoints' / 'step-4' / 'training.pt', weights_only=True)
    assert saved['step'] == 4
    assert saved['fixed']['sha256'] == json.loads((made[0] / 'runs' / 'rmt' / 'run.json').read_text())['sha256']
    assert {'model', 'preset', 'memory', 'seed', 'sizes', 'training'} < set(saved['fixed'])
    assert len(saved['streams']['position']) == 4
    (state,), (random,) = saved['state'], saved['random']  # of each process
    assert all(part is None or len(part) == 4 for part in state)  # the rows of the batch
    assert set(random) == {'cpu'}
    assert set(saved['optimizer']['state']) == set(load_file(made[0] / 'runs' / 'rmt' / 'model.safetensors'))


def test_the_twin_without_memory_reads_the_same_bytes_and_needs_no_state(at_work):
    out = train('--steps', 3, '--memory', 'off').out
    on, off = metrics('runs/rmt'), metrics('runs/a')
    assert [line['bytes'] for line in on[:3]] == [line['bytes'] for line in off[:3]]
    assert on[2]['bits'] != off[2]['bits']
    assert torch.load('runs/a/checkpoints/step-3/training.pt', weights_only=True)['state'] == [None]
    assert '--memory on --steps 3' in out


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(at_work, monkeypatch, number):
    with monkeypatch.context() as patch:
        at_step(patch, {2: lambda: signal.raise_signal(number)})
        done = train('--steps', 9)
    assert done.code == 128 + number
    assert 'stopped at step 2 and saved at step 2; to go on: python train_enwik8.py --resume runs/a\n' in done.out
    assert steps('runs/a') == [0, 2]
    assert len(metrics('runs/a')) == 2
    assert 'from step 2 on' in main('--resume', 'runs/a', '--steps', 3).out


def test_a_signal_while_the_end_is_saved_stops_the_run(at_work, monkeypatch):
    """It is not forgotten: validation, plots and sample would go on as if nobody had asked to stop."""
    save = trainer.save_training_state

    def saving(parts, path):
        if parts['step'] == 3:
            signal.raise_signal(signal.SIGTERM)
        save(parts, path)

    monkeypatch.setattr(trainer, 'save_training_state', saving)
    done = train('--steps', 3)
    assert done.code == 128 + signal.SIGTERM
    assert 'stopped at step 3 and saved at step 3; to go on: ' in done.out
    assert '\nvalidation' not in done.out


def test_the_command_to_go_on_has_what_the_run_does_not_hold(at_work, monkeypatch):
    """The command, as it is printed, keeps as many checkpoints, and saves as often, as before."""
    options = '--save-minutes', 0, '--keep', 5, '--skip-bad-steps', 2, '--threads', torch.get_num_threads()
    with monkeypatch.context() as patch:
        at_step(patch, {3: lambda: signal.raise_signal(signal.SIGTERM)})
        out = train('--steps', 4, *options, '--timeout-minutes', 3, '--compare', 'runs/infini').out
    _, command = out.strip().splitlines()[-1].split('; to go on: python train_enwik8.py ')
    assert command == (
        '--resume runs/a --save-minutes 0 --keep 5 --skip-bad-steps 2 --timeout-minutes 3 --compare runs/infini '
        f'--threads {torch.get_num_threads()}'
    )
    assert main(*command.split()).code == 0
    assert steps('runs/a') == [0, 1, 2, 3, 4]


def test_a_run_that_is_done_keeps_its_validation_when_it_is_resumed_and_stopped(at_work, monkeypatch):
    before = metrics('runs/rmt')[-1]
    assert 'valid' in before
    with monkeypatch.context() as patch:
        patch.setattr(train_enwik8, 'bits_per_byte', lambda *_: signal.raise_signal(signal.SIGINT))
        assert main('--resume', 'runs/rmt').code == 130
    assert metrics('runs/rmt')[-1] == before
    assert main('--compare', 'runs/rmt', 'runs/infini').code == 0


def test_a_run_on_the_source_of_python_goes_on_with_it(at_work, monkeypatch):
    """enwik8 that has come into data/ since is not read in its place."""
    Path('source').mkdir()
    for i in range(40):
        Path('source', f'{i}.py').write_text(f'x{i} = {i}\n' * 60)
    source = train_enwik8.python_source
    for module in (train_enwik8, data):
        monkeypatch.setattr(module, 'python_source', lambda: source('source'))
    assert main('--steps', 1, '--name', 'a', '--valid-bytes', 600).code == 0
    Path('data').mkdir()
    Path('data/enwik8').write_bytes(Path('text').read_bytes())
    assert main('--resume', 'runs/a', '--steps', 2).code == 0
    Path('source/new.py').write_text('y = 1\n')
    err = main('--resume', 'runs/a', '--steps', 3).err
    assert re.search(r'with sha256 \w+: go on with the standard library of Python 3\.', err), err


def test_runs_without_a_name_that_are_started_at_once(at_work, monkeypatch):
    times = iter([5_001_000_000, 5_002_000_000])
    monkeypatch.setattr(train_enwik8.time, 'strftime', lambda _: 'now')
    monkeypatch.setattr(train_enwik8.time, 'time_ns', lambda: next(times))
    for _ in range(2):
        assert main('--data', 'text', '--valid-bytes', 600, '--steps', 1).code == 0
    assert Path('runs/rmt-small-now-001').exists()
    assert Path('runs/rmt-small-now-002').exists()


@pytest.mark.parametrize('model', MODELS)
def test_a_stopped_and_resumed_run_is_one_run(at_work, monkeypatch, model):
    """Stopped after two of four steps: the same weights and losses, bit for bit, as without the stop."""
    with monkeypatch.context() as patch:
        at_step(patch, {2: lambda: signal.raise_signal(signal.SIGTERM)})
        train('--steps', 4, '--model', model)
    with open('runs/a/metrics.jsonl', 'a') as file:  # as a killed run would have left it
        file.write('{"step": 3, "bits": 0}\n')
    torch.manual_seed(5)
    assert main('--resume', 'runs/a').code == 0
    whole, cut = (load_file(f'runs/{name}/model.safetensors') for name in (model, 'a'))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_clock(metrics(f'runs/{model}')) == without_clock(metrics('runs/a'))


def test_checkpoints_are_as_many_and_as_often_as_asked_for(at_work):
    train('--steps', 5, '--save-minutes', 0, '--keep', 3)
    assert steps('runs/a') == [3, 4, 5]
    main('--resume', 'runs/a', '--steps', 6, '--keep', 1)
    assert steps('runs/a') == [6]


def test_a_longer_run_is_written_down(at_work):
    """A run that was prolonged goes on for as long when it is resumed a second time."""
    main('--resume', 'runs/rmt', '--steps', 6)
    assert json.loads(Path('runs/rmt/run.json').read_text())['run']['steps'] == 6
    assert 'trained     6 steps' in main('--resume', 'runs/rmt').out
    assert [line['step'] for line in metrics('runs/rmt')] == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize('umask', [0o022, 0o027])
def test_all_files_have_the_mode_that_the_umask_gives(at_work, umask):
    before = os.umask(umask)
    try:
        train('--steps', 1, '--model', 'infini')
    finally:
        os.umask(before)
    for path in Path('runs/a').rglob('*'):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_ctrl_c_in_a_real_process(at_work):
    """The same as above with a process and the real presets: nothing but the printed lines, and a code of 130."""
    process = subprocess.Popen(
        [sys.executable, ROOT / 'train_enwik8.py', '--data', 'text', '--steps', '2000', '--name', 'a'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = Path('runs/a/metrics.jsonl')
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    done = len(metrics('runs/a'))
    assert (process.returncode, err) == (130, '')
    assert f'stopped at step {done} and saved at step {done}; to go on: python {ROOT}/train_enwik8.py' in out


def test_minutes_that_are_over_may_be_asked_for_again(at_work):
    assert train('--minutes', 1e-4).code == 0
    assert main('--resume', 'runs/a', '--minutes', 1e-4).code == 0


def test_refusals_leave_nothing_behind(at_work):
    Path('other').mkdir()
    Path('other/run.json').write_text('{"hidden_size": 8}')
    for name in ('file', 'empty'):
        Path(name).touch()
    Path('small').write_bytes(b'a few bytes, ' * 10)
    before = files('.')
    for arguments, message in [
        (('--resume', 'runs/rmt', '--preset', 'base'), 'was made with --preset small, not base'),
        (('--resume', 'runs/rmt', '--memory', 'off'), 'was made with --memory on, not off'),
        (('--resume', 'runs/rmt', '--steps', 3), 'runs/rmt is at step 4 already, beyond --steps 3'),
        (('--resume', 'runs/rmt', '--minutes', 1e-5), 'minutes already, beyond --minutes 1e-05, which counts from the'),
        (('--data', 'text', '--name', '.k.new'), "--name is '.k.new': it begins with a point"),
        (('--data', 'text', '--minutes', 1e300), '--minutes is 1e+300: give at most 1e+09'),
        (('--data', 'text', '--timeout-minutes', 1e300), '--timeout-minutes is 1e+300: give at most 1e+09'),
        (('--resume', 'runs/none'), 'no run to go on with: there is no such folder'),
        (('--data', 'text', '--prompt', 'x'), '--prompt is for a sample from a run: add --sample'),
        (('--data', 'text', '--temperature', 1), '--temperature is for a sample'),
        (('--resume', 'runs/rmt', '--sample', '--temperature', 'nan'), '--temperature is nan: give 0, or a finite'),
        (('--compare', 'runs/rmt', './runs/rmt'), '--compare names a run twice'),
        (('--compare', 'runs/none'), 'runs/none cannot be compared: there is no such folder'),
        (('--resume', 'other'), 'no run to go on with: other/run.json lacks'),
        (('--resume', ''), '--resume is empty'),
        (('--resume', 'x' * 300), 'no run to go on with'),
        (('--resume', 'runs/rmt', '--name', 'b'), 'give one of them'),
        (('--data', 'text', '--device', 'nowhere'), 'cannot be used here'),
        (('--data', 'text', '--device', 'meta'), '--device meta cannot be used here'),
        (('--data', 'text', '--name', 'rmt'), 'is there already'),
        (('--data', 'text', '--name', ''), "--name is ''"),
        (('--data', 'text', '--name', '..'), "--name is '..'"),
        (('--data', 'text', '--steps', 1, '--name', 'q\udcff'), 'cannot be written: its name is not UTF-8'),
        (('--data', 'text', '--name', 'a/b'), "--name is 'a/b': give the name of one folder"),
        (('--data', 'text', '--name', 'ä' * 150), '--name has 300 bytes: give at most 200'),
        (('--data', 'text', '--out', 'file/runs'), 'cannot be written to'),
        (('--data', 'text', '--out', 'x' * 300), 'File name too long'),
        (('--data', 'empty'), 'is empty'),
        (('--data', 'small'), '6 bytes are too few to validate with, since a piece has 49'),
        (('--data', 'text', '--valid-bytes', 20), '20 bytes are too few to validate with, since a piece has 49'),
        (('--data', 'absent'), 'cannot be read'),
        (('--data', 'text', '--steps', 0), 'must be above 0'),
        (('--data', 'text', '--minutes', 'inf'), '--minutes is inf: it must be above 0, and finite'),
        (('--data', 'text', '--minutes', 'nan'), '--minutes is nan'),
        (('--data', 'text', '--save-minutes', 'nan'), '--save-minutes is nan'),
        (('--data', 'text', '--save-minutes', -1), '--save-minutes is -1.0: give 0'),
        (('--data', 'text', '--keep', 0), '--keep is 0'),
        (('--data', 'text', '--skip-bad-steps', -1), '--skip-bad-steps is -1'),
        (('--data', 'text', '--seed', 2**64), 'must fit into 64 bits'),
        (('--data', 'text', '--download'), 'give one of them'),
    ]:
        done = main(*arguments)
        assert done.code != 0, arguments
        assert message in done.err, (arguments, done)
    assert files('.') == before


def test_a_process_makes_nothing_on_the_gpu_of_another_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch, 'ones', lambda *_, **__: chosen.append('made') or torch.zeros(1))
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setattr(sys, 'argv', ['train_enwik8.py', '--device', 'cuda'])
    train_enwik8.parse_arguments()
    assert chosen == [2, 'made']


def test_a_gpu_that_only_emulates_bfloat16_is_not_fast_with_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert not has_bfloat16(torch.device('cuda'))


def test_the_seed_of_a_run_that_goes_on_fits_into_64_bits():
    for seed in (-(2**63), 0, 2**64 - 1):
        torch.manual_seed(Ranks().seed(seed + 100))


def test_a_trained_model_writes_on(at_work):
    train('--steps', 2, '--memory', 'off', name='off')
    before = files('runs')
    options = '--sample', '--resume', 'runs/rmt', '--prompt', 'import ', '--bytes', 60
    out = main(*options, '--temperature', 0).out
    assert out.startswith('import ')
    assert main(*options, '--temperature', 0).out == out
    drawn = [main(*options, '--seed', seed).out for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert main('--sample', '--resume', 'runs/off', '--bytes', 9).code == 0
    for arguments, message in [
        (('--resume', 'runs/off'), '7 in the prompt leave --bytes 9'),
        ((), 'needs a trained model'),
        (('--resume', 'runs/rmt', '--prompt', ''), '--prompt is empty'),
        (('--resume', 'runs/rmt', '--bytes', 0), '--bytes is 0'),
        (('--resume', 'runs/b'), 'no run to go on with'),
    ]:
        assert message in main('--sample', *arguments).err
    assert files('runs') == before


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # the compiler's own modules use what torch has deprecated
def test_a_compiled_run_is_the_run(made, at_work, monkeypatch):
    """Traced as one graph, and run without the slow compilation of it; the method of the class is back afterwards."""
    traced, compiled = [], torch.compile
    torch._dynamo.reset()

    def backend(graph, _):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, 'compile', lambda fn, **options: compiled(fn, **options | {'backend': backend}))
    assert train('--steps', 4, '--compile', name='compiled').code == 0
    # one graph to try the compiler, one for the first step and one for those that begin with a state of full length
    assert 2 <= len(traced) <= 4
    have, want = metrics(at_work / 'runs' / 'compiled'), metrics(at_work / 'runs' / 'rmt')
    assert [line.get('bits') for line in have] == pytest.approx([line.get('bits') for line in want], abs=1e-5)
    assert have[-1]['valid'] == pytest.approx(want[-1]['valid'], abs=1e-5)


def test_what_cannot_be_compiled_is_refused(at_work, monkeypatch):
    for options, why in (
        (('--context-parallel', 2), '--compile reads on one rank'),
        (('--parallel', 'fsdp'), '--compile needs whole parameters'),
    ):
        done = train('--steps', 4, '--compile', *options, name='refused')
        assert done.code == 2
        assert why in done.err

    def fail(*_, **__):
        raise RuntimeError('no compiler\nat all')

    monkeypatch.setattr(torch, 'compile', fail)
    done = train('--steps', 4, '--compile', name='refused')
    assert done.code == 2
    assert '--compile cannot be used here: no compiler. Install a C++ compiler, or leave it out' in done.err
    assert not (at_work / 'runs' / 'refused').exists()


@pytest.mark.parametrize('given', [None, 'active'])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given):
    """Threads that spin made a step fifty times slower while another program kept one of two cores busy."""
    code = (
        "import os, runpy, sys\nsys.argv = ['train_enwik8.py', '--help']\n"
        "try:\n    runpy.run_path('train_enwik8.py', run_name='__main__')\n"
        "except SystemExit:\n    print('policy', os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    environment |= {'OMP_WAIT_POLICY': given} if given else {}
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f'policy {given or "passive"}' in run.stdout, run.stderr
