"""What the training script does when something fails. docs/reliability.md has a row for each of these tests."""

import builtins
import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_enwik8
from segment_recurrence_pytorch import console, run_folder, trainer
from segment_recurrence_pytorch.run_folder import SUMS, held
from tests.script import (
    IMPORT_PLOTS,
    ROOT,
    at_step,
    files,
    full_disk,
    main,
    metrics,
    spoiled,
    steps,
    train,
    without_clock,
)

NAN = float('nan')


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


def same_weights(one, other):
    one, other = load_file(one), load_file(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- signals


def test_a_second_ctrl_c_ends_at_once_and_loses_no_checkpoint(at_work, monkeypatch):
    at_step(monkeypatch, {3: lambda: [interrupt(), interrupt()]})
    done = train('--steps', 9, '--save-minutes', 0)
    assert (done.code, done.err) == (130, '')
    assert 'stopped; to go on: python train_enwik8.py --resume runs/a' in done.out
    assert steps('runs/a') == [1, 2]


def test_more_sigterms_do_not_stop_the_saving(at_work, monkeypatch):
    """Some systems send it to each process of a group, and again."""
    at_step(monkeypatch, {3: lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(3)] and None})
    done = train('--steps', 9)
    assert done.code == 143
    assert steps('runs/a') == [0, 3]


def test_nohup_is_respected(at_work, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, {2: lambda: signal.raise_signal(signal.SIGHUP)})
        assert train('--steps', 3).code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ('moment', 'said'),
    [
        ('load_corpus', '\nstopped\n'),
        ('baselines', 'stopped; to go on'),
        ('bits_per_byte', 'stopped; to go on'),
        ('draw_plots', 'stopped; to go on'),
        ('print_sample', 'stopped; to go on'),
    ],
)
def test_ctrl_c_outside_the_steps_ends_at_once_without_a_traceback(at_work, monkeypatch, moment, said):
    with monkeypatch.context() as patch:
        patch.setattr(train_enwik8, moment, interrupt)
        done = train('--steps', 2)
    assert (done.code, done.err) == (130, '')
    assert said in done.out
    if said != '\nstopped\n':
        assert main('--resume', 'runs/a').code == 0
        assert metrics('runs/a')[-1]['valid']


def test_ctrl_c_while_sampling(at_work, monkeypatch):
    monkeypatch.setattr(train_enwik8, 'write_on', interrupt)
    done = main('--sample', '--resume', 'runs/rmt')
    assert (done.code, done.err) == (130, '')
    assert done.out.endswith('stopped\n')


@pytest.mark.skipif(not Path('/proc').exists(), reason='looks into /proc for the libraries that are loaded')
def test_ctrl_c_while_the_libraries_load(at_work):
    process = subprocess.Popen([sys.executable, ROOT / 'train_enwik8.py'], stderr=subprocess.PIPE)
    maps = Path(f'/proc/{process.pid}/maps')
    while b'libtorch' not in maps.read_bytes():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, b'')


# ---- the disk


def test_a_full_disk_while_saving(at_work, monkeypatch):
    """The run goes on and says it, the last good checkpoint stays, and the next save works."""
    full = full_disk(20_000)
    at_step(monkeypatch, {3: full.__enter__, 5: lambda: full.__exit__(None, None, None)})
    done = train('--steps', 6, '--save-minutes', 0, '--keep', 9)
    assert (done.code, done.err) == (0, '')
    for step in (3, 4):
        assert f'not saved   step {step}: ' in done.out
    assert 'File too large' in done.out
    assert 'The newest checkpoint is that of step 2' in done.out
    assert steps('runs/a') == [0, 1, 2, 5, 6]
    assert [line['step'] for line in metrics('runs/a')] == [1, 2, 3, 4, 5, 6, 6]


def test_no_checkpoint_is_ahead_of_the_log(at_work, monkeypatch):
    """The lines of its steps are on the disk before a checkpoint is written: else a power cut could lose them."""

    def fail(_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsLog, 'sync', fail)
        done = train('--steps', 2, '--save-minutes', 0)
    assert done.code == 1
    assert 'not saved   step 2: [Errno 28] No space left on device' in done.out
    assert steps('runs/a') == [0]


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint(at_work, monkeypatch):
    full = full_disk(20_000)
    with monkeypatch.context() as patch:
        at_step(patch, {3: full.__enter__})
        try:
            done = train('--steps', 4, '--save-minutes', 0)
        finally:
            full.__exit__(None, None, None)
    assert done.code == 1
    assert 'validation' in done.out
    assert done.err == (
        'error: the end of the training is not saved, only step 2; to go on: python train_enwik8.py --resume runs/a '
        '--save-minutes 0\n'
    )
    assert steps('runs/a') == [1, 2]
    assert main('--resume', 'runs/a').code == 0
    assert same_weights('runs/a/model.safetensors', 'runs/rmt/model.safetensors')
    assert without_clock(metrics('runs/a')) == without_clock(metrics('runs/rmt'))


@pytest.mark.parametrize('end', [4, 6])
def test_a_disk_with_room_for_the_checkpoint_and_none_for_the_copy(at_work, monkeypatch, end):
    """The folder of the run keeps old weights for a while, which is said; at the end it is an error."""
    copy_weights = trainer.copy_weights

    def copying(folder, step):
        if step in (3, 4):
            raise OSError(28, 'No space left on device')
        copy_weights(folder, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'copy_weights', copying)
        done = train('--steps', end, '--save-minutes', 0)
    lost = 'Its checkpoint is saved, but model.safetensors is that of step 2'
    assert f'not copied  step 4: [Errno 28] No space left on device. {lost}' in done.out
    if end == 6:
        assert (done.code, done.err) == (0, '')
        return
    assert done.code == 1
    assert done.err.startswith(
        'error: runs/a/model.safetensors is that of step 2 still, and the checkpoint that of step 4: make room on the '
        'disk; to go on: python train_enwik8.py --resume runs/a'
    )
    assert main('--resume', 'runs/a').code == 0
    assert same_weights('runs/a/model.safetensors', 'runs/rmt/model.safetensors')


def test_a_full_disk_at_the_validation_keeps_the_lines_and_the_validation_before(at_work, monkeypatch):
    monkeypatch.setattr(train_enwik8, 'report', lambda *_: full.__enter__())
    before, full = Path('runs/rmt/metrics.jsonl').read_text(), full_disk(100)
    try:
        done = main('--resume', 'runs/rmt')
    finally:
        full.__exit__(None, None, None)
    assert 'not logged  [Errno 27] File too large' in done.out
    assert Path('runs/rmt/metrics.jsonl').read_text() == before


def test_a_full_disk_at_the_start_leaves_nothing_behind(at_work):
    before = files('.')
    with full_disk():
        done = train('--steps', 2)
    assert done.code == 1
    assert done.err.startswith('error: ')
    assert 'File too large' in done.err
    assert set(files('.')) == set(before)


def test_a_full_disk_while_plotting(at_work, monkeypatch):
    monkeypatch.setattr(train_enwik8, 'import_plots', IMPORT_PLOTS)
    draw_plots = train_enwik8.draw_plots

    def drawing(*arguments):
        with full_disk(20_000):
            draw_plots(*arguments)

    monkeypatch.setattr(train_enwik8, 'draw_plots', drawing)
    done = train('--steps', 1)
    assert (done.code, done.err) == (0, '')
    assert 'no plot     ' in done.out
    assert 'sample ' in done.out
    assert not list(Path('runs/a').glob('*.png*'))


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_log_on_a_full_disk(monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        console.say('a line')
        console.say('another one')
        console.discard_output()


def test_a_run_whose_folder_disappears_goes_on_and_says_it(at_work, monkeypatch):
    at_step(monkeypatch, {2: lambda: shutil.rmtree('runs/a')})
    done = train('--steps', 4, '--save-minutes', 0)
    assert done.code == 1
    assert 'not saved   step 2: ' in done.out
    assert 'validation' in done.out
    assert 'not logged  runs/a/metrics.jsonl cannot be written: the folder runs/a is not there' in done.out
    assert done.err == 'error: the end of the training is not saved, only step 1\n'
    assert not Path('runs/a').exists()


# ---- processes


def test_a_second_process_is_refused(at_work):
    """By --resume and by --name, while the first process trains; the lock of a process that ended counts no more."""
    with held(Path('runs/rmt'), new=False):
        before = files('.')
        for arguments in (('--resume', 'runs/rmt'), ('--data', 'text', '--name', 'rmt')):
            done = main(*arguments, '--steps', 5)
            assert done.code == 1
            assert 'runs/rmt is ' in done.err
        assert 'another process trains this run' in main('--resume', 'runs/rmt').err
        assert main('--sample', '--resume', 'runs/rmt', '--bytes', 2).code == 0
        assert files('.') == before
    assert main('--resume', 'runs/rmt').code == 0


def test_two_processes_that_begin_with_the_same_name(at_work):
    with held(Path('runs/a'), new=True):
        assert 'runs/a is in use' in train('--steps', 1).err
    assert train('--steps', 1).code == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_named_again(at_work):
    left = Path('runs/.a.new/checkpoints/.step-0')
    left.mkdir(parents=True)
    (left / 'model.safetensors').write_text('half')
    for name in ('.lock', 'run.json', 'metrics.jsonl'):
        Path('runs/.a.new', name).write_text('{"step": 7}')
    assert 'no run to go on with' in main('--resume', 'runs/a').err
    assert train('--steps', 1).code == 0
    assert [line['step'] for line in metrics('runs/a')] == [1, 1]
    assert {path.name for path in Path('runs').iterdir()} == {'rmt', 'infini', 'a'}


def test_what_a_kill_left_while_saving_is_removed(at_work):
    left = Path('runs/rmt/checkpoints/.step-5')
    left.mkdir()
    (left / 'model.safetensors').write_text('half')
    assert main('--resume', 'runs/rmt', '--steps', 5).code == 0
    assert steps('runs/rmt') == [4, 5]


# ---- numbers that are not finite


@pytest.mark.parametrize('memory', ['on', 'off'])
def test_a_nan_loss_stops_before_the_step_and_overwrites_nothing(at_work, memory):
    with spoiled(step=3, segment=2):
        done = train('--steps', 9, '--memory', memory, '--save-minutes', 0)
    assert done.code == 1
    assert done.err == (
        'error: step 3 has NaN or infinite values, first in segment 2 of 3: the output of layers.1.ff.proj_out. '
        'It was not made, and the checkpoints stay; '
        'to go on: python train_enwik8.py --resume runs/a --save-minutes 0 --skip-bad-steps 1, which leaves out such '
        'steps\n'
    )
    assert steps('runs/a') == [1, 2]
    assert len(metrics('runs/a')) == 2
    assert all(tensor.isfinite().all() for tensor in load_file('runs/a/model.safetensors').values())
    assert main('--resume', 'runs/a', '--steps', 3).code == 0


def test_bad_steps_are_left_out_if_asked_for(at_work):
    with spoiled(step=3, segment=2):
        done = train('--steps', 4, '--skip-bad-steps', 1, '--save-minutes', 0, '--keep', 9)
    assert done.code == 0
    assert 'step      3 left out, not finite: segment 2 of 3: the output of layers.1.ff.proj_out' in done.out
    lines = metrics('runs/a')
    assert lines[2]['skipped'].startswith('segment 2 of 3')
    assert 'bits' not in lines[2]
    assert math.isfinite(lines[3]['bits'])
    checkpoints = 'runs/a/checkpoints'
    assert same_weights(f'{checkpoints}/step-2/model.safetensors', f'{checkpoints}/step-3/model.safetensors')
    assert torch.load(f'{checkpoints}/step-3/training.pt', weights_only=True)['skipped'] == 1


def test_more_bad_steps_than_allowed(at_work, monkeypatch):
    """Those before a stop count too."""
    with monkeypatch.context() as patch:
        at_step(patch, {2: lambda: torch.tensor(NAN, requires_grad=True), 3: interrupt})
        assert train('--steps', 9, '--skip-bad-steps', 1).code == 130
    at_step(monkeypatch, {2: lambda: torch.tensor(NAN, requires_grad=True)})
    done = main('--resume', 'runs/a', '--skip-bad-steps', 1)
    assert done.code == 1
    assert 'step 5 has NaN' in done.err
    assert '--resume runs/a --skip-bad-steps 2, which leaves out such steps' in done.err


def test_weights_that_become_infinite_are_not_saved(at_work, monkeypatch):
    class Exploding(torch.optim.AdamW):
        @torch.no_grad()
        def step(self):
            self.param_groups[0]['params'][0].fill_(math.inf)

    monkeypatch.setattr(torch.optim, 'AdamW', Exploding)
    done = train('--steps', 9, '--save-minutes', 0)
    assert done.code == 1
    assert 'is not saved: the weight ' in done.err
    assert steps('runs/a') == [0]
    done = train('--steps', 9, '--skip-bad-steps', 9, name='b')
    assert done.code == 1
    assert 'step 2 has NaN or infinite values, first in the weight ' in done.err
    assert '--skip-bad-steps' not in done.err


# ---- files that are damaged, missing or of another run


def damage(path, how):
    if how == 'missing':
        path.unlink()
    elif how == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    elif how == 'one bit':
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize('name', ['model.safetensors', 'training.pt', SUMS])
@pytest.mark.parametrize('how', ['missing', 'cut', 'one bit'])
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_used(at_work, name, how):
    main('--resume', 'runs/rmt', '--steps', 5, '--keep', 3)
    damage(Path('runs/rmt/checkpoints/step-5', name), how)
    done = main('--resume', 'runs/rmt', '--keep', 3)
    assert done.code == 0
    named = name if how == 'missing' or name != SUMS else ''  # with damaged sums, another file looks damaged
    assert f'refused     runs/rmt/checkpoints/step-5/{named}' in done.out
    assert 'it is now runs/rmt/checkpoints/refused-step-5' in done.out
    assert 'from step 4 on' in done.out
    shutil.rmtree('runs/rmt/checkpoints/refused-step-5')
    assert steps('runs/rmt') == [0, 4, 5]
    assert 'refused' not in main('--resume', 'runs/rmt').out


def test_no_good_checkpoint_is_an_error_that_changes_nothing(at_work):
    for step in (0, 4):
        damage(Path(f'runs/rmt/checkpoints/step-{step}/training.pt'), 'cut')
    before = files('.')
    done = main('--resume', 'runs/rmt')
    assert done.code == 1
    for step in (0, 4):
        assert f'step-{step}/training.pt does not have the sha256 that' in done.err
    assert files('.') == before


def test_a_checkpoint_of_another_run_is_refused(at_work):
    train('--steps', 1, '--seed', 1)
    checkpoints = Path('runs/rmt/checkpoints')
    shutil.copytree('runs/a/checkpoints/step-1', checkpoints / 'step-11')
    shutil.copytree('runs/infini/checkpoints/step-4', checkpoints / 'step-12')
    shutil.copytree(checkpoints / 'step-4', checkpoints / 'step-13')
    out = main('--resume', 'runs/rmt').out
    assert 'step-11 is of another run: its seed is 1, not 0' in out
    assert 'step-12 is of another run: its model is infini, not rmt' in out
    assert 'step-13 is of another run: its step is 4, not 13' in out
    assert 'from step 4 on' in out


def test_a_checkpoint_can_run_no_code(at_work):
    class Evil:
        def __reduce__(self):
            return builtins.open, ('evil', 'w')

    path = Path('runs/rmt/checkpoints/step-4/training.pt')
    path.write_bytes(pickle.dumps(Evil()))
    torch.save({'state': Evil()}, path)
    sums = Path('runs/rmt/checkpoints/step-4', SUMS)
    lines = [f'{run_folder._sha256(path)}  training.pt' if 'training.pt' in line else line
             for line in sums.read_text().splitlines()]  # fmt: skip
    sums.write_text('\n'.join(lines))
    out = main('--resume', 'runs/rmt').out
    assert 'training.pt is no training state that can be resumed' in out
    assert 'from step 0 on' not in out
    assert 'trained     4 steps' in out
    assert not Path('evil').exists()


def test_weights_beside_a_run_can_be_changed_and_are_made_again(at_work):
    """They are a copy: who writes into them changes no checkpoint."""
    path = Path('runs/rmt/model.safetensors')
    with open(path, 'r+b') as file:
        file.write(b'damaged')
    done = main('--sample', '--resume', 'runs/rmt')
    assert done.code == 1
    assert 'runs/rmt/model.safetensors does not hold the weights' in done.err
    assert main('--resume', 'runs/rmt').code == 0
    assert same_weights(path, 'runs/infini/model.safetensors'.replace('infini', 'rmt/checkpoints/step-4'))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', 'Expecting value'),
        ('{"run": {"mod', 'Unterminated'),
        ('[1]', ''),
        ('{"run": {"model": "rmt"}}', "lacks 'preset'"),
        ('"steps": "many"', "steps is 'many'"),
        ('"steps": null', 'neither steps nor minutes'),
        ('"seed": 1.5', 'seed is 1.5'),
        ('"dim": 17', 'was made with'),
    ],
)
def test_a_damaged_run_json(at_work, content, message):
    path = Path('runs/rmt/run.json')
    name, _, value = content.partition(': ')
    if content.startswith('"'):
        lines = [f'{name}: {value},' if name in line else line for line in path.read_text().splitlines()]
        content = '\n'.join(lines)
    path.write_text(content)
    before = files('.')
    done = main('--resume', 'runs/rmt')
    assert done.code == 1
    assert message in done.err
    assert 'runs/rmt' in done.err
    assert files('.') == before


def test_a_run_made_before_there_were_checkpoints(at_work):
    Path('runs/old').mkdir()
    for name in ('config.json', 'training.pt', 'model.safetensors', 'metrics.jsonl'):
        Path('runs/old', name).write_text('{"run": {}}')
    assert 'runs/old was made by an earlier version of this program' in main('--resume', 'runs/old').err


@pytest.mark.parametrize('how', ['missing', 'cut', 'no field', 'no json'])
def test_a_damaged_metrics_file(at_work, monkeypatch, how):
    path = Path('runs/infini/metrics.jsonl')
    lines = path.read_text().splitlines()
    broken = {'no field': '{"bits": 3.0}', 'no json': '{"step": 2, "bits": NaN'}.get(how, lines[1][:30])
    path.unlink() if how == 'missing' else path.write_text('\n'.join([lines[0], broken, *lines[2:]]))
    monkeypatch.setattr(train_enwik8, 'import_plots', IMPORT_PLOTS)
    done = main('--resume', 'runs/infini', '--steps', 5)
    assert (done.code, done.err) == (0, '')
    lost = 4 if how == 'missing' else 1
    assert f'metrics.jsonl has no line of {lost} of 4 steps: plots leave them out' in done.out
    assert [line['step'] for line in metrics('runs/infini')] == [5, 5] if how == 'missing' else [1, 3, 4, 5, 5]


def test_plots_leave_out_lines_that_lack_something(at_work):
    plots = IMPORT_PLOTS()
    path = Path('runs/infini/metrics.jsonl')
    lines = ['{"step": 1}', '{"step": 2, "bits": null, "bytes": 9}', '{"step": 3, "bits": 2.0, "bytes": 9}']
    shares = '[[0.5, 0.5], [0.5]]', '[[0.5, 0.25], [0.5, 0.25]]', '[[0.5, 0.5]]', '3', '[[0.5, null], [0.5, 0.5]]'
    lines += [f'{{"step": {step}, "memory_shares": {each}}}' for step, each in enumerate(shares, start=4)]
    path.write_text('\n'.join(lines) + '\n')
    for name in ('loss', 'memory_shares'):
        Path(f'runs/infini/{name}.png').unlink()
    plots.plot_losses(Path('runs/infini'), {'validation': 1.0})
    plots.plot_memory_shares(Path('runs/infini'))
    for name in ('loss', 'memory_shares'):
        assert Path(f'runs/infini/{name}.png').read_bytes().startswith(b'\x89PNG')


# ---- the corpus


def test_a_corpus_that_was_moved(at_work):
    """It is known by its bytes: its place does not matter, and is written down."""
    Path('text').rename('moved')
    done = main('--resume', 'runs/rmt')
    assert 'text cannot be read' in done.err
    assert 'say where it is now with --data' in done.err
    assert main('--resume', 'runs/rmt', '--data', 'moved', '--steps', 5).code == 0
    assert json.loads(Path('runs/rmt/run.json').read_text())['run']['data'] == 'moved'
    assert main('--resume', 'runs/rmt').code == 0


def test_other_bytes_are_refused(at_work):
    before = set(files('.'))
    with open('text', 'a') as file:
        file.write('more')
    for arguments in ((), ('--data', 'text')):
        done = main('--resume', 'runs/rmt', *arguments)
        assert done.code == 1
        assert 'has other bytes than those that runs/rmt was trained on, which were text with sha256' in done.err
        assert 'give the file that holds these as --data' in done.err
    assert set(files('.')) == before


# ---- the output


def test_a_reader_that_goes_away(at_work):
    """`| head -1`: the run is saved and ends as a program ends that writes to a closed pipe."""
    command = f'{sys.executable} {ROOT}/train_enwik8.py --data text --steps 3000 --name a 2> err; echo $? > code'
    done = subprocess.run(f'({command}) | head -9', shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stderr, Path('err').read_text()) == ('', '')
    assert done.stdout.splitlines()[8].startswith('step      2 ')
    assert Path('code').read_text() == f'{128 + signal.SIGPIPE}\n'
    assert steps('runs/a')[-1] == len(metrics('runs/a')) >= 2


def test_an_ascii_terminal(at_work):
    done = main('--sample', '--resume', 'runs/rmt', '--bytes', 40, '--prompt', 'grün ', encoding='ascii')
    assert (done.code, done.err) == (0, '')
    assert done.out.startswith('gr?n ')
    assert train('--steps', 1, encoding='ascii').code == 0


def test_an_output_that_is_closed(at_work, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    monkeypatch.setattr(sys, 'stderr', None)
    monkeypatch.setattr(sys, 'argv', ['train_enwik8.py', '--sample', '--resume', 'runs/rmt', '--bytes', '2'])
    train_enwik8.main()
    for name in ('stdout', 'stderr'):
        getattr(sys, name).close()


# ---- what is not installed


def test_without_matplotlib_a_run_has_no_plots_and_says_so(at_work, monkeypatch):
    monkeypatch.setattr(train_enwik8, 'import_plots', IMPORT_PLOTS)
    for name in [name for name in sys.modules if name.startswith(('matplotlib', 'segment_recurrence_pytorch.plots'))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr('segment_recurrence_pytorch.plots', raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'matplotlib', None)
        done = train('--steps', 1)
    assert (done.code, done.err) == (0, '')
    (line,) = [line for line in done.out.splitlines() if line.startswith('plots ')]
    assert re.fullmatch('plots       none, .*matplotlib.*: pip install matplotlib, then --resume makes them', line)
    assert not list(Path('runs/a').glob('*.png'))


def test_help_needs_no_matplotlib():
    code = 'import runpy, sys; sys.modules["matplotlib"] = None; sys.argv = ["x", "--help"]; '
    code += 'runpy.run_path("train_enwik8.py", run_name="__main__")'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert '--skip-bad-steps' in done.stdout
