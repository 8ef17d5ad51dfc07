"""Checkpoints are whole or not there, whenever a process is killed; one process holds a folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from segment_recurrence_pytorch import run_folder
from segment_recurrence_pytorch.run_folder import (
    SUMS,
    check_undamaged,
    checkpoints,
    copy_weights,
    held,
    new_checkpoint,
    newest_usable,
    reveal,
    step_of,
    write_json,
)
from tests.script import full_disk


def save(folder, step, keep=2, content='weights'):
    with new_checkpoint(folder, step, keep=keep) as aside:
        (aside / 'model.safetensors').write_text(content)
        (aside / 'inner').mkdir(exist_ok=True)
        (aside / 'inner' / 'part').write_text('a part')


def names(folder):
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def test_the_newest_checkpoints_stay(tmp_path):
    for step in (0, 8, 9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ['step-10', 'step-100']
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 100]
    save(tmp_path, 101, keep=9)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 100, 101]


@pytest.mark.skipif(not shutil.which('sha256sum'), reason='needs sha256sum')
def test_the_sums_are_those_that_sha256sum_reads(tmp_path):
    save(tmp_path, 3)
    done = subprocess.run(['sha256sum', '--check', SUMS], cwd=tmp_path / 'checkpoints' / 'step-3', capture_output=True)
    assert (done.returncode, done.stdout) == (0, b'inner/part: OK\nmodel.safetensors: OK\n')


def test_other_folders_are_no_checkpoints(tmp_path):
    save(tmp_path, 3)
    for name in ('step-', 'step-x', 'step-3.old', 'refused-step-9', '.step-8', 'step--1'):
        (tmp_path / 'checkpoints' / name).mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3]
    assert checkpoints(tmp_path / 'none') == []


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='asks /proc which file is synced')
def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """Files, then their folders, then the new name, then the folder that holds the name."""
    done = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: [done.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)])
    monkeypatch.setattr(Path, 'rename', lambda path, to: [done.append('rename'), rename(path, to)][1])
    save(tmp_path, 7)
    folder = str(tmp_path / 'checkpoints')
    aside = f'{folder}/.step-7'
    files = {f'{aside}/{name}' for name in (SUMS, 'inner', 'inner/part', 'model.safetensors')}
    assert set(done[:4]) == files
    assert done[4:] == [aside, 'rename', folder]
    done.clear()
    with held(tmp_path / 'a', new=True) as place:
        reveal(place, tmp_path / 'a')
    assert done == ['rename', str(tmp_path)]


@pytest.mark.parametrize('moment', ['write', 'sums', 'sync', 'rename', 'prune'])
def test_an_error_at_any_moment_leaves_the_old_checkpoints(tmp_path, monkeypatch, moment):
    for step in (1, 2):
        save(tmp_path, step)

    def fail(*_, **__):
        raise OSError(28, 'No space left on device')

    if moment == 'write':
        monkeypatch.setattr(Path, 'write_text', fail)
    elif moment == 'sums':
        monkeypatch.setattr(run_folder, '_sha256', fail)
    elif moment == 'sync':
        monkeypatch.setattr(run_folder, 'sync', fail)
    elif moment == 'rename':
        monkeypatch.setattr(Path, 'rename', fail)
    if moment == 'prune':
        monkeypatch.setattr(shutil.os, 'unlink', fail)
        save(tmp_path, 3)
        assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 3]
        monkeypatch.undo()
        save(tmp_path, 4)
        assert names(tmp_path) == ['step-3', 'step-4']
        return
    with pytest.raises(OSError, match='No space left'):
        save(tmp_path, 3)
    assert names(tmp_path) == ['step-1', 'step-2']


def test_what_fails_after_a_checkpoint_has_its_name_is_no_error(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    sync = run_folder.sync

    def fails_at_the_folder(path):
        if Path(path).name == 'checkpoints':
            raise OSError(5, 'Input/output error')
        sync(path)

    monkeypatch.setattr(run_folder, 'sync', fails_at_the_folder)
    save(tmp_path, 3)
    assert names(tmp_path)[-1] == 'step-3'


def test_a_really_full_disk(tmp_path):
    save(tmp_path, 1)
    with full_disk(100), pytest.raises(OSError, match='File too large'):
        save(tmp_path, 2, content='x' * 1000)
    assert names(tmp_path) == ['step-1']


def test_a_checkpoint_is_written_once(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match='step-1 is there already'):
        save(tmp_path, 1)
    with pytest.raises(ValueError, match='keep is 0'):
        save(tmp_path, 2, keep=0)
    assert names(tmp_path) == ['step-1']


@pytest.mark.parametrize(
    ('name', 'how', 'message'),
    [
        ('model.safetensors', 'changed', 'model.safetensors does not have the sha256'),
        ('inner/part', 'changed', 'inner/part does not have the sha256'),
        ('inner/part', 'missing', 'inner/part is missing'),
        (SUMS, 'missing', f'{SUMS} cannot be read'),
        (SUMS, 'changed', 'does not have the sha256'),
        (SUMS, 'cut', 'does not have the sha256'),
        (SUMS, 'emptied', 'does not have the sha256'),
        ('more', 'changed', 'more does not have the sha256'),
        ('.', 'missing', 'cannot be read'),
    ],
)
def test_damage_is_told_by_the_name_of_the_file(tmp_path, name, how, message):
    save(tmp_path, 1)
    checkpoint = tmp_path / 'checkpoints' / 'step-1'
    check_undamaged(checkpoint)
    path = checkpoint / name
    if how == 'missing':
        path.unlink() if path.is_file() else shutil.rmtree(path)
    else:
        path.write_text(path.read_text()[:20] if how == 'cut' else {'emptied': ''}.get(how, 'other'))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_undamaged(checkpoint)


def test_a_file_that_another_program_leaves_is_no_damage(tmp_path):
    save(tmp_path, 1)
    for name in ('.DS_Store', 'Thumbs.db'):
        (tmp_path / 'checkpoints' / 'step-1' / name).touch()
    check_undamaged(tmp_path / 'checkpoints' / 'step-1')


def test_the_newest_usable_checkpoint_is_loaded(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    (tmp_path / 'checkpoints' / 'step-4' / 'inner' / 'part').unlink()

    def load(checkpoint):
        if checkpoint.name == 'step-3':
            raise ValueError(f'{checkpoint} is foreign')
        return checkpoint.name

    loaded, refused = newest_usable(tmp_path, load)
    assert loaded == 'step-2'
    assert [why.replace(f'{tmp_path}/checkpoints/', '') for why in refused] == [
        'step-4/inner/part is missing; it is now refused-step-4',
        'step-3 is foreign; it is now refused-step-3',
    ]
    assert names(tmp_path) == ['refused-step-3', 'refused-step-4', 'step-1', 'step-2']
    assert newest_usable(tmp_path, load) == ('step-2', [])


def test_no_usable_checkpoint_is_an_error_and_nothing_is_renamed(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)

    def load(checkpoint):
        raise ValueError(f'{checkpoint.name} is foreign')

    with pytest.raises(ValueError, match='no checkpoint that can be used: step-2 is foreign; step-1 is foreign'):
        newest_usable(tmp_path, load)
    assert names(tmp_path) == ['step-1', 'step-2']
    with pytest.raises(ValueError, match='no checkpoint that can be used: there is none'):
        newest_usable(tmp_path / 'none', load)


def test_the_weights_of_the_newest_checkpoint_are_copied(tmp_path):
    save(tmp_path, 1)
    copy_weights(tmp_path, 1)
    path = tmp_path / 'model.safetensors'
    assert path.read_text() == 'weights'
    path.write_text('changed')
    check_undamaged(tmp_path / 'checkpoints' / 'step-1')


def test_a_new_folder_appears_with_its_content_or_not_at_all(tmp_path):
    folder = tmp_path / 'runs' / 'a'
    with held(folder, new=True) as place:
        assert not folder.exists()
        (place / 'file').touch()
    assert os.listdir(folder.parent) == []
    with held(folder, new=True) as place:
        (place / 'file').touch()
        assert reveal(place, folder) == folder
        assert os.listdir(folder.parent) == ['a']
    with held(folder, new=True) as place, pytest.raises(ValueError, match='is there already'):
        reveal(place, folder)
    assert os.listdir(folder.parent) == ['a']


def test_what_a_killed_process_left_of_a_new_folder_is_removed(tmp_path):
    left = tmp_path / '.a.new'
    (left / 'checkpoints' / 'step-0').mkdir(parents=True)
    (left / 'file').touch()
    with held(tmp_path / 'a', new=True) as place:
        assert place == left
        assert os.listdir(place) == ['.lock']


@pytest.mark.skipif(run_folder.fcntl is None, reason='this system has no locks')
def test_one_process_holds_a_folder(tmp_path):
    with held(tmp_path, new=False), pytest.raises(ValueError, match='is in use: another process'):
        with held(tmp_path, new=False):
            pass
    with held(tmp_path, new=False):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr(run_folder.fcntl, 'flock', no_locks)
    with held(tmp_path, new=False) as place:
        assert place == tmp_path
    monkeypatch.setattr(run_folder, 'fcntl', None)
    with held(tmp_path, new=False) as place:
        assert place == tmp_path


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / 'a.json', {'a': 1})
    with pytest.raises(ValueError, match='Out of range float'):
        write_json(tmp_path / 'a.json', {'a': float('nan')})
    assert (tmp_path / 'a.json').read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ['a.json']
