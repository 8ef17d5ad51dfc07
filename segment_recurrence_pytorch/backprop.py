"""Back-propagation through segments, for any model that keeps the contract and any state.

A sequence is read in windows of one or more segments, in order; the gradient comes back through the state.

    one graph    the caller's `loss.backward()` walks one graph over all windows, whose activations are all kept
    recompute    `loss.backward()` computes each window again: until then only the states at the borders are kept
    replay       the call runs backward itself, last window first (memory replay back-propagation, arXiv 2010.06891)

All three give the same gradients. Two windows of replay:

    first pass, without a graph:     state 0 --> [window 0] --> state 1           (the states are kept)

    then the last window, with one:  state 1 --> [window 1] --> loss 1
                                        |
                                     d loss 1 / d state 1     (all that is kept of window 1)
                                        |
    then the window before it:       state 0 --> [window 0] --> loss 0 and state 1
                                     backward from both: from loss 0 with 1, from state 1 with d loss 1 / d state 1

Truncation cuts the state entering a window from the graph. All random numbers (dropout, noise) are drawn as one forward
pass would draw them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from segment_recurrence_pytorch.loss import target_nll
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, copied, detach, leaves, map_state

# tokens of a window, for models that read segments in parallel: more cost memory and gain no speed
WINDOW_TOKENS = 8192
BackwardFn = Callable[[Tensor], Any]


class Window(NamedTuple):
    """Columns [start, stop) of a sequence, which are read at once.

    Attributes:
        start, stop: the columns.
        segment_length: columns of a segment; the last segment may be shorter.
        truncate: whether the state that enters the window is cut from the graph.
        segments: which segments of the sequence the window holds.
    """

    start: int
    stop: int
    segment_length: int
    truncate: bool
    segments: slice


class Batch(NamedTuple):
    """The columns of one call.

    Attributes:
        tokens: ids (b, n) or embeddings (b, n, dim).
        targets: (b, n), with `loss.IGNORE` where nothing is asked; (b, 0) where only logits are wanted.
        mask: (b, n) bool, or None if every position is valid.
        per_segment: further arguments of `advance` by name, one value for each row and segment, (b, segments).
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None
    per_segment: dict[str, Tensor] | None = None

    def columns(self, window: Window) -> Batch:
        """Returns the columns of one window."""
        at = slice(window.start, window.stop)
        mask = None if self.mask is None else self.mask[:, at]
        per_segment = {name: value[:, window.segments] for name, value in (self.per_segment or {}).items()}
        return Batch(self.tokens[:, at], self.targets[:, at], mask, per_segment)


def plan_windows(
    length: int,
    segment_length: int,
    *,
    align: str = 'left',
    segments_per_pass: int | None = 1,
    backprop_segments: int | None = None,
) -> list[Window]:
    """Cuts columns into segments, and those into windows.

    Args:
        length: number of columns.
        segment_length: columns of a segment.
        align: where a segment that is shorter comes: 'left', last; 'right', first, and then it is a window of its own.
            Default: 'left'.
        segments_per_pass: segments of a window; None: as many as possible. Default: 1.
        backprop_segments: the state entering segment i is cut from the graph if i > 0 and i % backprop_segments == 0,
            and no window crosses such a border. Default: None, nothing is cut.
    """
    first = length % segment_length if align == 'right' else 0
    borders = [0] if length else []
    borders += range(first or segment_length, length, segment_length)
    count = len(borders)
    borders.append(length)
    windows, i = [], 0
    while i < count:
        stop = count if segments_per_pass is None else min(count, i + segments_per_pass)
        if backprop_segments is not None:
            stop = min(stop, i - i % backprop_segments + backprop_segments)
        if first and i == 0:
            stop = 1
        truncate = backprop_segments is not None and i > 0 and i % backprop_segments == 0
        windows.append(Window(borders[i], borders[stop], segment_length, truncate, slice(i, stop)))
        i = stop
    return windows


def segments_at_once(model: SegmentModel, segment_length: int) -> int:
    """Returns how many segments a window holds by default: about `WINDOW_TOKENS` tokens for a model that reads segments
    in parallel, else one segment."""
    return max(1, WINDOW_TOKENS // segment_length) if model.parallel_segments else 1


def read_window(
    model: SegmentModel,
    tokens: Tensor,
    state: State,
    mask: Tensor | None,
    segment_length: int,
    need_hidden: bool = True,
    per_segment: dict[str, Tensor] | None = None,
) -> tuple[Any, State]:
    """Reads the segments of one window: at once where the model can, else one after the other.

    Args:
        model, tokens, state, mask, segment_length, need_hidden: see `SegmentModel.advance`.
        per_segment: further arguments of `advance` by name, (b, segments) each. Default: None.

    Returns:
        What `advance` returns.
    """
    more: dict[str, Any] = per_segment or {}
    if model.parallel_segments or tokens.shape[1] <= segment_length:
        return model.advance(tokens, state, segment_length=segment_length, mask=mask, need_hidden=need_hidden, **more)
    pieces = tokens.split(segment_length, dim=1)
    masks = [None] * len(pieces) if mask is None else mask.split(segment_length, dim=1)
    hiddens = []
    for i, (piece, piece_mask) in enumerate(zip(pieces, masks, strict=True)):
        one = {name: value[:, i : i + 1] for name, value in more.items()}
        hidden, state = model.advance(piece, state, mask=piece_mask, need_hidden=need_hidden, **one)
        hiddens.append(hidden)
    return (torch.cat(hiddens, dim=1) if need_hidden else None), state


def read_windows(
    model: SegmentModel,
    tokens: Tensor,
    state: State,
    segment_length: int,
    *,
    mask: Tensor | None = None,
    need_hidden: bool = True,
    segments_per_pass: int | None = None,
) -> Iterator[tuple[slice, Any, State]]:
    """Reads tokens (b, n), one window after the other.

    Args:
        model, tokens, state, segment_length, mask, need_hidden: see `SegmentModel.advance`.
        segments_per_pass: segments of a window. Default: None, `segments_at_once`.

    Yields:
        The columns of a window, its hidden states (None if need_hidden is False), and the state after it.
    """
    segments = segments_per_pass or segments_at_once(model, segment_length)
    for window in plan_windows(tokens.shape[1], segment_length, segments_per_pass=segments):
        at = slice(window.start, window.stop)
        window_mask = None if mask is None else mask[:, at]
        hidden, state = read_window(model, tokens[:, at], state, window_mask, segment_length, need_hidden)
        yield at, hidden, state


def window_nll(
    model: SegmentModel, batch: Batch, state: State, segment_length: int, per_token: bool = False
) -> tuple[Tensor, State]:
    """Returns the negative log likelihood of a window's targets, summed () or per token (b, n), and the next state."""
    hidden, state = read_window(model, batch.tokens, state, batch.mask, segment_length, per_segment=batch.per_segment)
    nll = target_nll(model.to_logits(hidden), batch.targets)
    return (nll if per_token else nll.sum()), state


def sequence_nll(
    model: SegmentModel,
    batch: Batch,
    windows: list[Window],
    state: State,
    *,
    per_token: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, State]:
    """Computes the negative log likelihood of all windows as one graph, for the caller's `backward`.

    Args:
        model: the model.
        batch: the columns.
        windows: what `plan_windows` returned.
        state: the state before the first window, or None.
        per_token: whether to return (b, n) instead of the sum (). Default: False.
        recompute: whether `backward` computes each window again instead of keeping its activations. Default: False.

    Returns:
        The negative log likelihood in nats, and the state after the last window.
    """
    if not windows:
        zero = _zero_loss(model)
        return (zero.expand(batch.tokens.shape[:2]) if per_token else zero), own_state(model, batch, state)
    losses = []
    for window in windows:
        if window.truncate:
            state = detach(state)
        arguments = (model, batch.columns(window), state, window.segment_length, per_token)
        if recompute and torch.is_grad_enabled():
            loss, state = checkpoint(window_nll, *arguments, use_reentrant=False)
        else:
            loss, state = window_nll(*arguments)
        losses.append(loss)
    if per_token:
        return torch.cat(losses, dim=1), state
    return torch.stack([_zero_loss(model), *losses]).sum(), state


def own_state(model: SegmentModel, batch: Batch, state: State) -> State:
    """Returns a state that shares memory with nobody, where nothing is read: the initial one if none is given."""
    return model.initial_state(batch.tokens.shape[0]) if state is None else copied(state)


def replay(
    model: SegmentModel,
    batch: Batch,
    windows: list[Window],
    state: State,
    *,
    scale: Tensor,
    backward_fn: BackwardFn | None = None,
) -> tuple[Tensor, State]:
    """Runs backward on scale * (summed negative log likelihood), with one window held at a time.

    Args:
        model: the model.
        batch: the columns.
        windows: what `plan_windows` returned.
        state: the state before the first window, or None. It is a constant, and is not changed.
        scale: () factor of the loss.
        backward_fn: called once a window with a scalar, instead of `Tensor.backward`; it may scale it. Default: None.

    Returns:
        The summed negative log likelihood in nats and the state after the last window, both without a graph.
    """
    backward_fn = backward_fn or Tensor.backward
    given = batch.tokens
    if given.requires_grad:  # embeddings that someone computed: their graph is walked once, at the end
        batch = batch._replace(tokens=given.detach().requires_grad_())
    total = _zero_loss(model)
    if not windows:
        return total, detach(own_state(model, batch, state))
    state = detach(state)
    starts = [i for i, window in enumerate(windows) if i == 0 or window.truncate]
    for start, stop in zip(starts, [*starts[1:], len(windows)], strict=True):
        loss, state = _replay_block(model, batch, windows[start:stop], state, scale, backward_fn)
        total = total + loss
    if given.requires_grad:
        given.backward(batch.tokens.grad)
    return total, state


def _replay_block(
    model: SegmentModel, batch: Batch, windows: list[Window], state: State, scale: Tensor, backward_fn: BackwardFn
) -> tuple[Tensor, State]:
    """Replays windows between which nothing is cut; the drawing at the top of this file."""
    entering, random_states = [state], [_random_state(model)]
    with torch.no_grad():
        for window in windows[:-1]:
            tokens, _, mask, more = batch.columns(window)
            _, state = read_window(model, tokens, state, mask, window.segment_length, False, more)
            entering.append(state)
            random_states.append(_random_state(model))
    # autocast would hand the weights that it cast without a graph to the pass that needs one
    torch.clear_autocast_cache()

    losses: list[Tensor] = []
    gradients: list[Tensor | None] | None = None
    after: tuple[State, Any] | None = None
    try:
        for window in reversed(windows):
            state, random_state = entering.pop(), random_states.pop()
            if after is not None:
                _set_random_state(random_state)
            state = map_state(lambda t: t.detach().requires_grad_(t.is_floating_point()), state)
            with torch.enable_grad():
                loss, next_state = window_nll(model, batch.columns(window), state, window.segment_length)
                if after is None:
                    after = detach(next_state), _random_state(model)
                losses.append(loss.detach())
                joined = _joined(loss * scale, next_state, gradients)
                # what is trained may have no influence here: only on a state that nobody reads, say
                backward_fn(joined if joined.requires_grad else touch_parameters(model, joined))
            gradients = [leaf.grad for leaf in leaves(state)]
    finally:  # also if backward_fn raises: the random numbers go on as after one forward pass
        if after is not None:
            _set_random_state(after[1])
    assert after is not None
    return torch.stack(losses).sum(), after[0]


class _Join(torch.autograd.Function):
    """The loss of a window, whose backward also starts from the next state, with the gradient that it already has.

    So there is one backward a window. If backward_fn scales the loss, the gradient of the next state is not scaled
    again: it comes from the loss of a later window, which was scaled when it was its turn.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        gradients = ctx.saved_tensors
        return grad_outputs[0], None, *gradients, *[None] * len(gradients)


def _joined(loss: Tensor, next_state: State, gradients: list[Tensor | None] | None) -> Tensor:
    if gradients is None:
        return loss
    pairs = [
        (leaf, gradient)
        for leaf, gradient in zip(leaves(next_state), gradients, strict=True)
        if gradient is not None and leaf.requires_grad
    ]
    if not pairs:
        return loss
    tensors, kept = zip(*pairs, strict=True)
    return _Join.apply(loss, len(tensors), *tensors, *kept)


def _zero_loss(model: SegmentModel) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters]
        return grad_outputs[0], *zeros


def touch_parameters(model: SegmentModel, loss: Tensor) -> Tensor:
    """Returns the same loss, whose backward gives every trainable parameter a gradient: zeros without influence."""
    if not torch.is_grad_enabled():
        return loss
    return _Touch.apply(loss, *[p for p in model.parameters() if p.requires_grad])


def fill_gradients(model: SegmentModel) -> None:
    """Gives every trainable parameter that has no gradient zeros: what `touch_parameters` does, after backward."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _random_state(model: SegmentModel) -> tuple[Tensor, list[int], list[Tensor]]:
    return torch.get_rng_state(), *get_device_states(*model.parameters())


def _set_random_state(random_state: tuple[Tensor, list[int], list[Tensor]]) -> None:
    cpu, devices, states = random_state
    torch.set_rng_state(cpu)
    set_device_states(devices, states)
