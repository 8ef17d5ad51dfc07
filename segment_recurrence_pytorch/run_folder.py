"""The folder of a training run. One process at a time trains in it, and its checkpoints are whole or not there.

    checkpoints/step-N/    a checkpoint: the files that the caller writes, and SHA256SUMS
    .lock                  what the process that trains holds locked

A checkpoint is written into a hidden folder. Its files are synced to the disk, then the folder is renamed. Whenever the
process is killed or the machine loses power, a folder called step-N is therefore a checkpoint of which nothing is
missing. Its SHA256SUMS shows whether it was damaged later, which neither PyTorch nor safetensors notice by themselves;
`sha256sum --check SHA256SUMS` reads it too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from segment_recurrence_pytorch.checkpoint import replacing, sync
from segment_recurrence_pytorch.checks import check_whole

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

SUMS = 'SHA256SUMS'
T = TypeVar('T')


@contextmanager
def held(folder: Path, *, new: bool) -> Iterator[Path]:
    """Keeps other processes out of the folder of a run, as long as the `with` block lasts.

    The lock is one of the operating system, which frees it when the process ends, however it ends. On file systems
    without such locks, and on Windows, nothing is locked.

    Args:
        folder: the folder of the run.
        new: whether the run begins. The folder then has to appear with its first checkpoint in it, so that each run
            that can be seen can be resumed.

    Yields:
        The folder. For a new run it is a hidden folder beside it, which the caller fills and then renames with
        `reveal`. If the caller does not, it is removed at the end.

    Raises:
        ValueError: if another process holds the folder.
    """
    place = folder.with_name(f'.{folder.name}.new') if new else folder
    if new:
        place.mkdir(parents=True, exist_ok=True)
    with open(place / '.lock', 'a') as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f'{folder} is in use: another process trains this run. Wait until it ends, or stop it'
            ) from error
        except OSError:  # a file system that has no locks
            pass
        try:
            _empty(place, '*' if new else '.*.part')  # what a process left that was killed
            yield place
        finally:
            if new:
                shutil.rmtree(place, ignore_errors=True)


def reveal(place: Path, folder: Path) -> Path:
    """Gives the folder of a new run its name, and returns its path.

    Args:
        place: the hidden folder that `held` gave.
        folder: the folder of the run.

    Raises:
        ValueError: if there is such a folder already.
    """
    if folder.exists():
        raise ValueError(f'{folder} is there already: give another name')
    place.rename(folder)
    sync(folder.parent)
    return folder


@contextmanager
def new_checkpoint(folder: Path, step: int, *, keep: int = 2) -> Iterator[Path]:
    """Gives a folder to fill with the files of a checkpoint. If the `with` block ends without an error, the folder
    becomes the checkpoint of a step, and older checkpoints are removed.

    Until then the disk holds one checkpoint more than `keep`.

    Args:
        folder: the folder of the run.
        step: number of steps done.
        keep: number of checkpoints that stay, the newest ones. Default: 2.

    Yields:
        The folder to fill.

    Raises:
        ValueError: if keep is below 1, or if there is a checkpoint of this step already.
        OSError: if something cannot be written, for example because the disk is full. All checkpoints then stay as they
            were.
    """
    check_whole(keep=keep)
    parent = folder / 'checkpoints'
    target, aside = parent / f'step-{step}', parent / f'.step-{step}'
    if target.exists():
        raise ValueError(f'{target} is there already: a checkpoint is written once')
    parent.mkdir(exist_ok=True)
    _empty(parent, '.*')  # what a process left that was killed while saving
    aside.mkdir()
    try:
        yield aside
        sums = [f'{_sha256(path)}  {path.relative_to(aside).as_posix()}\n' for path in _files(aside)]
        (aside / SUMS).write_text(''.join(sums))
        for path in [*aside.rglob('*'), aside]:
            sync(path)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with suppress(OSError):  # the checkpoint is there: what fails now makes it no worse
        sync(parent)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f'.{old.name}')), ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, the newest one last."""
    found = {path: re.fullmatch(r'step-(\d+)', path.name) for path in (folder / 'checkpoints').glob('step-*')}
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the number of steps that the name of a checkpoint tells."""
    return int(checkpoint.name.removeprefix('step-'))


def newest_usable(folder: Path, load: Callable[[Path], T]) -> tuple[T, list[str]]:
    """Loads the newest checkpoint of a run that is as it was written and that `load` accepts.

    The newer ones, which cannot be used, are then renamed to refused-step-N, so that they are not counted any more.

    Args:
        folder: the folder of the run.
        load: loads a checkpoint. It raises ValueError if the checkpoint is not one of this run.

    Returns:
        What `load` returned, and for each refused checkpoint a line that says why, and where it is now.

    Raises:
        ValueError: if no checkpoint can be used. They all keep their names then.
    """
    refused = {}
    for checkpoint in reversed(checkpoints(folder)):
        try:
            check_undamaged(checkpoint)
            loaded = load(checkpoint)
        except ValueError as error:
            refused[checkpoint] = error
        else:
            return loaded, [f'{error}; it is now {_set_aside(path)}' for path, error in refused.items()]
    reasons = '; '.join(map(str, refused.values())) or 'there is none'
    raise ValueError(f'{folder} has no checkpoint that can be used: {reasons}')


def check_undamaged(checkpoint: Path) -> None:
    """Raises ValueError, with the name of the file, if a file of a checkpoint is not as it was written."""
    try:
        lines = (checkpoint / SUMS).read_text(errors='replace').splitlines()
        sums = {name: digest for digest, _, name in (line.partition('  ') for line in lines)}
        files = {path.relative_to(checkpoint).as_posix(): path for path in _files(checkpoint)}
        for name, path in files.items():
            if _sha256(path) != sums.get(name):
                raise ValueError(f'{path} does not have the sha256 that {SUMS} says: one of them is damaged')
        if missing := set(sums) - set(files):
            raise ValueError(f'{checkpoint / min(missing)} is missing')
    except OSError as error:
        raise ValueError(f'{error.filename or checkpoint} cannot be read: {error.strerror}') from error


def copy_weights(folder: Path, step: int) -> None:
    """Copies model.safetensors of a checkpoint to the folder of its run.

    It is a copy and not a link, so that whoever changes it later changes no checkpoint.

    Args:
        folder: the folder of the run.
        step: the step of the checkpoint.

    Raises:
        OSError: if it cannot be written, for example because the disk is full.
    """
    with replacing(folder / 'model.safetensors') as part:
        shutil.copyfile(folder / 'checkpoints' / f'step-{step}' / 'model.safetensors', part)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as a JSON file, which is never half written."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + '\n')


def _set_aside(checkpoint: Path) -> Path:
    target = checkpoint.with_name(f'refused-{checkpoint.name}')
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def _files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint, without the list of their sums and without what programs that show folders
    leave there."""
    found = (path for path in folder.rglob('*') if path.is_file() and path != folder / SUMS)
    return sorted(path for path in found if path.name[0] != '.' and path.name not in ('Thumbs.db', 'desktop.ini'))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _empty(folder: Path, pattern: str) -> None:
    """Removes from a folder what matches a pattern, except the lock."""
    for path in folder.glob(pattern):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != '.lock':
            path.unlink()
