"""Functions on states. A state is what a model carries from one segment to the next.

A state is a value. It is a tree of tensors (tuples, NamedTuples, lists and dicts may be nested), and the first
dimension of every tensor is the batch. A model takes a state and returns a new one; it never changes one in place and
never stores one on itself. None in place of a whole state means the initial state. None inside a state means that this
part is absent.

Letters: b rows of the batch.
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
    """Returns a state with the same tree, with `fn` applied to each tensor."""
    return tree_map_only(Tensor, fn, state)


def leaves(state: State) -> list[Tensor]:
    """Returns the tensors of a state as a list, in the order of its fields."""
    return [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor)]


def detach(state: State) -> State:
    """Returns a state with the same values and without a graph. The given tensors are not changed."""
    return map_state(Tensor.detach, state)


def copied(state: State) -> State:
    """Returns a copy of a state, with the same values and the same graph. Its tensors share memory with no other
    tensor.

    Autograd refuses tensors that were made under `torch.inference_mode()`. Their copies are ordinary tensors, unless
    this function itself is called inside that mode.
    """
    return map_state(torch.clone, state)


def where_rows(rows: Tensor, chosen: State, other: State) -> State:
    """Returns a state that takes some rows from `chosen` and the other rows from `other`.

    A history may be shorter in one of the two states than in the other. The shorter one is then padded with zeros at
    its old end, so that the newest entries of both stand at the same place. The count of valid entries, which such a
    state holds, tells that the zeros are empty.

    Args:
        rows: (b,) bool, True for the rows to take from `chosen`.
        chosen: a state of the same model and batch size as `other`.
        other: the state that gives the remaining rows.
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
    """Returns the parts of a state as a plain list, which a file can store. `from_list` is the inverse."""
    return tree_flatten(state)[0]


def from_list(parts: list[Tensor | None], like: State) -> State:
    """Returns the state that `to_list` took apart.

    Args:
        parts: what `to_list` returned.
        like: any state of the same model. Only its tree is used.
    """
    return tree_unflatten(parts, tree_flatten(like)[1])
