"""Weights and training states on disk. A file is written beside its place, then moved there: never half a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn


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
