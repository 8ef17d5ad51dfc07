"""What is checked where a user's call comes in, before anything is changed.

Every error is a ValueError that says the value, the limit and the fix. Shapes and dtypes cost nothing;
values (ids, NaN) are looked at together, with one synchronisation a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.state import State, leaves

if TYPE_CHECKING:
    from segment_recurrence_pytorch.model import SegmentModel


def check_positive(**values: float) -> None:
    """Each named value must be above 0."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f'{name} is {value}: it must be above 0')


def check_probability(**values: float) -> None:
    """Each named value must be a dropout probability, in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f'{name} is {value}: a dropout probability must be in [0, 1)')


def check_like(name: str, have: Tensor, want: Tensor) -> None:
    """A part of a state must have the shape, dtype and device that the model needs."""
    if have.shape != want.shape:
        raise ValueError(f'{name}: shape {tuple(have.shape)}, this model and batch need {tuple(want.shape)}')
    if (have.dtype, have.device) != (want.dtype, want.device):
        raise ValueError(
            f'{name}: {have.dtype} on {have.device}, the model needs {want.dtype} on {want.device}; '
            'convert the state, or start from None'
        )


def check_input(
    model: SegmentModel,
    x: Tensor,
    state: State = None,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int | None = None,
    padding_ids: tuple[int, ...] = (),
    max_length: int | None = None,
) -> tuple[Tensor, State, Tensor | None]:
    """Checks a call's input against the model.

    padding_ids: positions with these ids are padding too. While compiling no value is looked at, these neither.
    Returns x with ids as int64 and padded positions as 0, the state as the model takes it, and the mask: None if every
    position is valid.
    """
    _check_shapes(model, x, mask=mask, labels=labels, max_length=max_length)
    state = model.as_state(state, x.shape[0])
    if state is not None:
        model.check_state(state, x.shape[0])
    compiling, valid = torch.compiler.is_compiling(), mask
    if x.is_floating_point():
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
    else:
        x = x.long()
        for padding_id in () if compiling else padding_ids:
            is_text = x != padding_id
            valid = is_text if valid is None else valid & is_text
        x = x if valid is None else x.masked_fill(~valid, 0)
    if compiling:
        return x, state, valid
    has_padding = _check_values(model, x, state, labels, ignore_index, valid)
    return x, state, (valid if has_padding else None)


def _check_shapes(
    model: SegmentModel, x: Tensor, *, mask: Tensor | None, labels: Tensor | None, max_length: int | None
) -> None:
    if x.is_floating_point():
        if x.ndim != 3 or x.shape[-1] != model.dim:
            raise ValueError(f'embeddings have shape {tuple(x.shape)}: give (batch, length, dim={model.dim})')
    elif x.ndim != 2 or x.dtype == torch.bool or x.is_complex():
        raise ValueError(f'x is {x.dtype} of shape {tuple(x.shape)}: give token ids (batch, length) or embeddings')
    if x.device != model.device:
        raise ValueError(f'x is on {x.device}, the model on {model.device}: move one of them')
    if max_length is not None and x.shape[1] > max_length:
        raise ValueError(
            f'{x.shape[1]} tokens, but a segment has at most seq_len={max_length}: '
            'wrap the model, the wrapper takes sequences of any length'
        )
    shape = tuple(x.shape[:2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f'mask is {mask.dtype}: give torch.bool, True = valid')
        if tuple(mask.shape) != shape:
            raise ValueError(f'mask has shape {tuple(mask.shape)}: give one value a token, {shape}')
        if mask.device != x.device:
            raise ValueError(f'mask is on {mask.device}, x on {x.device}: move one of them')
    if labels is not None:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f'labels are {labels.dtype}: give token ids')
        if tuple(labels.shape) != shape:
            raise ValueError(
                f'labels have shape {tuple(labels.shape)}: give one a token, {shape}, aligned '
                f'(labels[:, i] is the target of logits[:, i]); {IGNORE} is not counted'
            )
        if labels.device != x.device:
            raise ValueError(f'labels are on {labels.device}, x on {x.device}: move one of them')


def _check_values(
    model: SegmentModel, x: Tensor, state: State, labels: Tensor | None, ignore_index: int | None, valid: Tensor | None
) -> bool:
    """Raises for a wrong value; tells whether a position is padding. One synchronisation."""
    flags = [x.new_zeros((), dtype=torch.bool) if valid is None else ~valid.all()]
    messages = []
    if x.is_floating_point():
        messages.append('an embedding is NaN or infinite')
        flags.append(~x.isfinite().all())
    elif x.numel():
        messages.append(f'a token id is outside [0, {model.num_tokens})')
        flags.append(_outside(x, model.num_tokens))
    if labels is not None and labels.numel():
        not_counted = [IGNORE] if ignore_index in (None, IGNORE) else [ignore_index, IGNORE]
        counted = labels
        for value in not_counted:
            counted = counted.masked_fill(labels == value, 0)
        messages.append(f'a label is outside [0, {model.num_tokens}) and none of {not_counted}, which are not counted')
        flags.append(_outside(counted, model.num_tokens))
    for leaf in leaves(state):
        if leaf.is_floating_point():
            messages.append('the state holds NaN or infinite values')
            flags.append(~leaf.isfinite().all())
    has_padding, *wrong = torch.stack(flags).tolist()
    for message, is_wrong in zip(messages, wrong, strict=True):
        if is_wrong:
            ids = x if message.startswith('a token') else labels if message.startswith('a label') else None
            found = '' if ids is None else f' (values from {int(ids.min())} to {int(ids.max())})'
            raise ValueError(message + found)
    return has_padding


def _outside(ids: Tensor, limit: int) -> Tensor:
    low, high = ids.aminmax()
    return (low < 0) | (high >= limit)
