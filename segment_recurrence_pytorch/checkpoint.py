"""Weights, training states and cursors on disk. A file is written beside its place, then moved: never half a file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from segment_recurrence_pytorch.generation import Cursor
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import from_list, to_list


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to; when the `with` block ends well, that file takes the place of `path`."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes a model's weights as safetensors."""
    with replacing(path) as part:
        save_model(model, str(part))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads what `save_weights` wrote. ValueError, with the model as it was, for another model's or a damaged file."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_model(model, str(path), device=str(next(model.parameters()).device))
    except (RuntimeError, SafetensorError, OSError) as error:
        model.load_state_dict(before)
        raise ValueError(f'{path} does not hold the weights of this {type(model).__name__}: {error}') from error


def save_cursor(cursor: Cursor, path: str | Path, model: SegmentModel) -> None:
    """Writes a place in a text (the state, and the tokens since its border) as safetensors, with the fingerprint of
    the model that read it. ValueError for a cursor that is not the model's."""
    cursor = _checked(cursor, model)
    parts = {str(i): part for i, part in enumerate(to_list(cursor)) if part is not None}
    with replacing(path) as part_path:
        save_file(
            {name: part.detach().cpu().contiguous() for name, part in parts.items()},
            str(part_path),
            metadata={'fingerprint': json.dumps(fingerprint(model))},
        )


def load_cursor(path: str | Path, model: SegmentModel) -> Cursor:
    """What `save_cursor` wrote, on the model's device. ValueError for a cursor of another model or a damaged file."""
    try:
        with safe_open(str(path), framework='pt', device=str(model.device)) as file:
            saved = json.loads(file.metadata()['fingerprint'])
            parts = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no cursor: {error}') from error
    now = fingerprint(model)
    if saved['class'] != now['class']:
        raise ValueError(f'{path} was made by a {saved["class"]}, not {now["class"]}: its state means nothing here')
    for name in sorted(set(saved['arguments']) | set(now['arguments'])):
        have, want = saved['arguments'].get(name), now['arguments'].get(name)
        if have != want:
            raise ValueError(f'{path} was made with {name}={have!r}, this model has {want!r}')
    if saved['sha256'] != now['sha256']:
        raise ValueError(f'{path} was made with other weights than this model has: read the text again')
    like = Cursor(model.initial_state(1), torch.empty(0), torch.empty(0))
    needed = to_list(like)
    if any(part is not None and i not in parts for i, part in enumerate(needed)):
        raise ValueError(f'{path} holds no cursor: parts are missing')
    return _checked(from_list([parts.get(i) for i in range(len(needed))], like), model)


def _checked(cursor: Cursor, model: SegmentModel) -> Cursor:
    rows = len(cursor.tokens)
    state = model.initial_state(rows) if cursor.state is None else model.as_state(cursor.state, rows)
    model.check_state(state, rows)
    return cursor._replace(state=state)


def fingerprint(model: SegmentModel) -> dict[str, Any]:
    """What a state depends on: the model's class, its constructor arguments, and the sha256 of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    arguments = json.loads(json.dumps(model.arguments))
    return {'class': type(model).__name__, 'arguments': arguments, 'sha256': digest.hexdigest()}


def save_training_state(state: dict[str, Any], path: str | Path) -> None:
    """Writes optimizer state, counters, random and stream states: a dict of tensors and plain values."""
    with replacing(path) as part:
        torch.save(state, part)


def load_training_state(path: str | Path) -> dict[str, Any]:
    """What `save_training_state` wrote, on the CPU. ValueError for a missing or damaged file."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path} is no training state that can be resumed: {error}') from error
