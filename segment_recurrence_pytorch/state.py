"""Functions over states: what a model carries from one segment to the next.

A state is a value: a tree (NamedTuples, tuples) of tensors with the batch first, taken and returned,
never changed in place. None stands for 'the initial state', or for a part that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

State = Any


def map_state(fn: Callable[[Tensor], Any], state: State) -> State:
    """The same tree with `fn` applied to each tensor."""
    return tree_map_only(Tensor, fn, state)


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, in the order of its fields."""
    return [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor)]


def detach(state: State) -> State:
    """The same values without their graph. The tensors given are not touched."""
    return map_state(Tensor.detach, state)


def where_rows(rows: Tensor, chosen: State, other: State) -> State:
    """Rows of `chosen` where `rows` (b,) is True, rows of `other` elsewhere.

    A history may be shorter in one of the two: histories are aligned at their newest entry, so the
    shorter one is padded with zeros in front (its count of valid entries says that they are empty).
    """
    left, spec = tree_flatten(chosen)
    right, _ = tree_flatten(other)
    return tree_unflatten([_where_leaf(rows, a, b) for a, b in zip(left, right, strict=True)], spec)


def _where_leaf(rows: Tensor, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor):
        return a
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    a, b = _pad_front(a, shape), _pad_front(b, shape)
    return torch.where(rows.view(-1, *([1] * (a.ndim - 1))), a, b)


def _pad_front(t: Tensor, shape: list[int]) -> Tensor:
    missing = [size - have for size, have in zip(shape, t.shape, strict=True)]
    if not any(missing):
        return t
    return F.pad(t, [pad for gap in reversed(missing) for pad in (gap, 0)])


def to_list(state: State) -> list[Tensor | None]:
    """The parts of a state as a plain list, for a file."""
    return tree_flatten(state)[0]


def from_list(parts: list[Tensor | None], like: State) -> State:
    """The state that `to_list` took apart; `like`: any state of the same model."""
    return tree_unflatten(parts, tree_flatten(like)[1])
