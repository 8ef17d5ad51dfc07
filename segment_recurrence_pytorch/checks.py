"""Checks of what a user passes in. They run before anything is changed.

Every error is a ValueError that says the value, the limit and the fix. Shapes and dtypes are checked without looking at
values. The checks of values (ids out of range, NaN) are fetched from the device together, so that each call waits for
the device once.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.state import State, map_state

if TYPE_CHECKING:
    from segment_recurrence_pytorch.model import SegmentModel

# checks the arguments of a call against their type hints: what is none of the names in a Literal, too, is a ValueError
typed = beartype(conf=BeartypeConf(violation_param_type=ValueError))


def can_hold_ids(dtype: torch.dtype) -> bool:
    """Returns whether token ids can have a dtype: any integer one."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_positive(**values: float) -> None:
    """Raises ValueError, with the name, if a value is not a finite number above 0."""
    for name, value in values.items():
        if not (is_number(value) and 0 < value < inf):
            raise ValueError(f'{name} is {value!r}: give a finite number above 0')


def check_not_negative(**values: float) -> None:
    """Raises ValueError, with the name, if a value is not a finite number of at least 0."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value < inf):
            raise ValueError(f'{name} is {value!r}: give 0, or a finite number above it')


def check_finite(**values: float) -> None:
    """Raises ValueError, with the name, if a value is not a finite number."""
    for name, value in values.items():
        if not (is_number(value) and -inf < value < inf):
            raise ValueError(f'{name} is {value!r}: give a finite number')


def check_probability(**values: float) -> None:
    """Raises ValueError, with the name, if a value is not a dropout probability, in [0, 1)."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value < 1):
            raise ValueError(f'{name} is {value!r}: a dropout probability must be in [0, 1)')


def check_whole(**values: Any) -> None:
    """Raises ValueError, with the name, if a value is not a whole number of at least 1."""
    for name, value in values.items():
        if not (is_whole(value) and value >= 1):
            raise ValueError(f'{name} is {value!r}: give a whole number from 1 on')


def check_count(name: str, value: Any) -> None:
    """Raises ValueError, with the name, unless the value is None or a whole number of at least 1."""
    if value is not None and not (is_whole(value) and value >= 1):
        raise ValueError(f'{name} is {value!r}: give a whole number from 1 on, or None')


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number. A bool is not one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number. A bool is not one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def needs_extra(what: str, extra: str, error: ImportError) -> ImportError:
    """Returns an error that tells what to install.

    Args:
        what: what was asked for.
        extra: the extra of this library that has the missing package.
        error: the error of the import.
    """
    package = (error.name or str(error)).partition('.')[0]
    return ImportError(f"{what} needs the package {package}: pip install 'segment-recurrence-pytorch[{extra}]'")


def check_has_weights(model: nn.Module) -> None:
    """Raises ValueError if the model is on the meta device, where it has no weights."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_meta:
        raise ValueError('the model is on the meta device, where it has no weights: make it on a device, or load them')


def check_like(name: str, have: Any, want: Tensor, shorter_along: int | None = None) -> None:
    """Raises ValueError unless a part of a state is a tensor of the expected shape, dtype and device.

    Args:
        name: what the error message calls the part.
        have: the given part.
        want: a tensor of the expected shape, dtype and device.
        shorter_along: an axis along which `have` may be shorter than `want`. Default: None, there is no such axis.
    """
    if not isinstance(have, Tensor):
        raise ValueError(f'{name} is a {type(have).__name__}: give a tensor, as the last call returned it')
    shape = list(want.shape)
    if shorter_along is not None and have.ndim == want.ndim:
        shape[shorter_along] = min(have.shape[shorter_along], want.shape[shorter_along])
    if list(have.shape) != shape:
        at_most = '' if shorter_along is None else f', or shorter along axis {shorter_along}'
        raise ValueError(f'{name}: shape {tuple(have.shape)}, this model and batch need {tuple(want.shape)}{at_most}')
    if (have.dtype, have.device) != (want.dtype, want.device):
        raise ValueError(
            f'{name}: {have.dtype} on {have.device}, the model needs {want.dtype} on {want.device}; '
            'convert the state, or start from None'
        )


def check_state_like(have: Any, want: Any, name: str = 'state', shorter_along: int | None = None) -> None:
    """Raises ValueError unless two states have the same tree, with tensors of the same shapes, dtypes and devices.

    A NamedTuple can allow that some of its tensors are shorter than in `want`. Its property `shorter_along` is then a
    dict from the name of a field to the axis along which that field may be shorter. An example is
    `recurrent_memory_transformer_pytorch.XLMemory`.

    Args:
        have: the state that a caller gave.
        want: a state that fits the model and the batch, with the largest shapes.
        name: what the error message calls the state. Default: 'state'.
        shorter_along: if both states are tensors, the axis along which `have` may be shorter. Default: None, there is
            no such axis.
    """
    if isinstance(want, Tensor):
        check_like(name, have, want, shorter_along)
        return
    if type(have) is not type(want) and not {type(have), type(want)} <= {tuple, list}:
        expected, found = ('None' if each is None else type(each).__name__ for each in (want, have))
        raise ValueError(
            f'{name} is {found}, this model has {expected} there: give what its last call returned, or start from None'
        )
    if isinstance(want, dict):
        have_parts, want_parts = have, want
    elif isinstance(want, (tuple, list)):
        names = getattr(want, '_fields', range(len(want)))
        have_parts, want_parts = dict(enumerate(have)), dict(zip(names, want, strict=True))
        if len(have) == len(want):
            have_parts = dict(zip(names, have, strict=True))
    elif want is None:
        return
    else:
        raise ValueError(f'{name} is a {type(want).__name__}: a state is made of tensors, tuples, lists and dicts')
    if list(have_parts) != list(want_parts):
        if isinstance(want, dict):
            raise ValueError(
                f'{name} has the entries {list(have_parts)}: this model needs {list(want_parts)}, in this order'
            )
        raise ValueError(f'{name} has {len(have_parts)} entries: this model needs {len(want_parts)}')
    axes = getattr(want, 'shorter_along', {})
    for part, each in want_parts.items():
        inner = f'{name}.{part}' if isinstance(part, str) else f'{name}[{part}]'
        check_state_like(have_parts[part], each, inner, axes.get(part))


def check_form(model: SegmentModel) -> None:
    """Raises ValueError unless the model says its two sizes, and the first dimension of every tensor of its states is
    the batch."""
    for name in ('num_tokens', 'dim'):
        size: Any = getattr(model, name, None)
        if not is_whole(size) or size < 1:
            raise ValueError(f'{type(model).__name__}.{name} is {size!r}: a model sets num_tokens and dim, from 1 on')
    for rows in (2, 3):
        parts = tree_flatten_with_path(model.initial_state(rows))[0]
        if not any(isinstance(leaf, Tensor) for _, leaf in parts):
            raise ValueError(f'initial_state({rows}) returned no tensor: a state holds at least one')
        for path, leaf in parts:
            if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != rows):
                raise ValueError(
                    f'initial_state({rows}) returned state{keystr(path)} of shape {tuple(leaf.shape)}: the first '
                    f'dimension has to be the batch, here {rows}'
                )


def not_finite(state: State) -> list[tuple[str, Tensor]]:
    """Returns a check for each floating point or complex tensor of a state: an error message, and a flag () bool, True
    if it applies."""
    found = []
    for path, leaf in tree_flatten_with_path(state)[0]:
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            found.append((f'state{keystr(path)} holds NaN or infinite values', ~leaf.isfinite().all()))
    return found


def check_faults(faults: list[tuple[str, Tensor]]) -> None:
    """Raises ValueError with the first message whose flag is True. It waits for the device once.

    Args:
        faults: pairs of an error message and a flag () bool.
    """
    if not faults:
        return
    for (message, _), is_wrong in zip(faults, torch.stack([flag for _, flag in faults]).tolist(), strict=True):
        if is_wrong:
            raise ValueError(message)


def outside_inference(value: Any) -> Any:
    """Returns the same tensor or tree of tensors, with copies of the tensors that were made under
    `torch.inference_mode()`.

    Autograd refuses such tensors, and accepts their copies. Inside inference mode nothing is copied.

    Args:
        value: a tensor or a tree of tensors.
    """
    if torch.compiler.is_compiling():
        return value
    return map_state(lambda t: t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t, value)


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
    check_values: bool = True,
    further: Sequence[tuple[str, Tensor]] = (),
) -> tuple[Tensor, State, Tensor | None]:
    """Checks the input of a call, and converts it into the form that the model takes.

    While `torch.compile` traces a call, no value is checked, and ids in `padding_ids` are not treated as padding.

    Args:
        model: the model that will read the input.
        x: token ids (b, n) or embeddings (b, n, dim).
        state: a state in any form that `model.as_state` takes. Default: None, the initial state.
        mask: (b, n) bool, True = valid. Default: None, all positions are valid.
        labels: target ids (b, n). Default: None.
        ignore_index: a label that does not count, besides `IGNORE`. Default: None, there is no other such label.
        padding_ids: ids that mean padding. Default: none.
        max_length: the largest n. Default: None, there is no limit.
        check_values: whether values are checked, which waits for the device once. Without it a wrong value goes
            unnoticed, and ids in `padding_ids` are not treated as padding. Default: True.
        further: further checks of values: pairs of an error message and a flag () bool. Default: none.

    Returns:
        x, with ids as int64 and 0 at padded positions; the state as the model takes it; and the mask, which is None if
        every position is valid.

    Raises:
        ValueError: if the input does not fit the model.
    """
    x, state, mask, labels = outside_inference((x, state, mask, labels))
    _check_shapes(model, x, mask=mask, labels=labels, max_length=max_length)
    state = model.as_state(state, x.shape[0])
    if state is not None:
        model.check_state(state, x.shape[0])
    labels = None if labels is None else labels.long()  # uint8 holds neither the limit nor -100, and wraps them
    check_values, valid = check_values and not torch.compiler.is_compiling(), mask
    if x.is_floating_point():
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
    else:
        x = x.long()
        for padding_id in padding_ids if check_values else ():
            is_text = x != padding_id
            valid = is_text if valid is None else valid & is_text
        x = x if valid is None else x.masked_fill(~valid, 0)
    if not check_values:
        return x, state, valid
    has_padding = _check_values(model, x, state, labels, ignore_index, valid, further)
    return x, state, (valid if has_padding else None)


def _check_shapes(
    model: SegmentModel, x: Tensor, *, mask: Tensor | None, labels: Tensor | None, max_length: int | None
) -> None:
    if x.is_floating_point():
        if x.ndim != 3 or x.shape[-1] != model.dim:
            raise ValueError(f'embeddings have shape {tuple(x.shape)}: give (batch, length, dim={model.dim})')
    elif x.ndim != 2 or not can_hold_ids(x.dtype):
        raise ValueError(f'x is {x.dtype} of shape {tuple(x.shape)}: give token ids (batch, length) or embeddings')
    check_has_weights(model)
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
        if not can_hold_ids(labels.dtype):
            raise ValueError(f'labels are {labels.dtype}: give token ids')
        if tuple(labels.shape) != shape:
            raise ValueError(
                f'labels have shape {tuple(labels.shape)}: give one a token, {shape}, aligned '
                f'(labels[:, i] is the target of logits[:, i]); {IGNORE} is not counted'
            )
        if labels.device != x.device:
            raise ValueError(f'labels are on {labels.device}, x on {x.device}: move one of them')


def _check_values(
    model: SegmentModel,
    x: Tensor,
    state: State,
    labels: Tensor | None,
    ignore_index: int | None,
    valid: Tensor | None,
    further: Sequence[tuple[str, Tensor]],
) -> bool:
    """Raises ValueError if a value is wrong. Returns whether any position is padding. It waits for the device once."""
    flags = [x.new_zeros((), dtype=torch.bool) if valid is None else ~valid.all()]
    faults: list[tuple[str, Tensor | None]] = []  # an error message, and the ids whose range it shows
    if x.is_floating_point():
        faults.append(('an embedding is NaN or infinite', None))
        flags.append(~x.isfinite().all())
    elif x.numel():
        faults.append((f'a token id is outside [0, {model.num_tokens})', x))
        flags.append(_outside(x, model.num_tokens))
    if labels is not None and labels.numel():
        not_counted = [IGNORE] if ignore_index in (None, IGNORE) else [ignore_index, IGNORE]
        counted = labels if valid is None else labels.masked_fill(~valid, 0)
        for value in not_counted:
            counted = counted.masked_fill(labels == value, 0)
        message = f'a label is outside [0, {model.num_tokens}) and none of {not_counted}, which are not counted'
        faults.append((message, labels))
        flags.append(_outside(counted, model.num_tokens))
    if state is not None:
        further = [*model.state_faults(state), *further]
    for message, flag in further:
        faults.append((message, None))
        flags.append(flag)
    has_padding, *wrong = torch.stack(flags).tolist()
    for (message, ids), is_wrong in zip(faults, wrong, strict=True):
        if is_wrong:
            found = '' if ids is None else f' (values from {int(ids.min())} to {int(ids.max())})'
            raise ValueError(message + found)
    return has_padding


def _outside(ids: Tensor, limit: int) -> Tensor:
    low, high = ids.aminmax()
    return (low < 0) | (high >= limit)
