"""The file metrics.jsonl of a training run: one line of JSON for each step."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from segment_recurrence_pytorch.checkpoint import replacing


class MetricsLog:
    """Appends lines of JSON to a file, each as soon as it is written.

    A full disk is no error. What did not fit is kept, and written when there is space again.

    Args:
        path: the file. It is made if it is not there.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path):
        self._file = open(path, 'ab', buffering=0)  # noqa: SIM115  `close` closes it
        self._waiting = b''

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line. NaN and infinite numbers, which JSON does not have, become null.

        Args:
            line: what the line holds, by name.
        """
        self._waiting += _as_json(line).encode() + b'\n'
        with suppress(OSError):
            self._flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
            OSError: if they cannot be written, for example because the disk is full.
        """
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. What could not be written is lost."""
        with suppress(OSError):
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)  # on a disk that becomes full, only the first part
            self._waiting = self._waiting[written:]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file. Lines that are damaged or tell no step are left out.

    Args:
        path: the file. If it is not there, there are no lines.
    """
    return [line for line in map(_parsed, _lines(path)) if line is not None]


def keep_steps(path: Path, step: int) -> int:
    """Removes from a metrics file all lines except those of the training steps up to `step`, and the last validation
    after that step.

    A run that was killed may have logged steps after its last checkpoint, which the run will repeat.

    Args:
        path: the file. If it is not there, it is made.
        step: the step of the checkpoint.

    Returns:
        The number of steps up to `step` of which the file has no line.
    """
    kept, validation = {}, []
    for text in _lines(path):
        line = _parsed(text)
        if line is None:
            continue
        if 'valid' not in line and 1 <= line['step'] <= step:
            kept[line['step']] = text
        elif 'valid' in line and line['step'] == step:
            validation = [text]
    _write(path, [*kept.values(), *validation])
    return step - len(kept)


def write_validation(path: Path, line: dict[str, Any]) -> None:
    """Writes a validation at the end of a metrics file. It replaces all earlier ones, and damaged lines.

    Args:
        path: the file.
        line: what the line holds, by name: 'step', 'valid' and more.

    Raises:
        OSError: if it cannot be written, for example because the disk is full. The file then stays as it was.
        ValueError: if the folder of the file is gone.
    """
    found = [(text, _parsed(text)) for text in _lines(path)]
    kept = [text for text, old in found if old is not None and 'valid' not in old]
    _write(path, [*kept, _as_json(line)])


def _write(path: Path, lines: list[str]) -> None:
    with replacing(path) as part:
        part.write_text(''.join(f'{text}\n' for text in lines))


def _as_json(line: dict[str, Any]) -> str:
    finite = json.loads(json.dumps(line), parse_constant=lambda _: None)  # JSON has no NaN
    return json.dumps(finite)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors='replace').splitlines() if path.exists() else []


def _parsed(text: str) -> dict[str, Any] | None:
    """Returns the content of a line, or None if it is damaged or tells no step."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get('step'), int) else None
