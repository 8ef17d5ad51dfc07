"""Back-propagation through segments, for any `SegmentModel`.

A sequence is cut into segments, and its segments into windows. The windows are read in order. There are three ways to
send the gradient back through the states between them:

    one graph    The caller's `loss.backward()` goes through one graph over all windows. All activations are kept.
    recompute    The same, but activations are not kept: `loss.backward()` computes each window again. Until then only
                 the states at the borders of the windows are kept.
    replay       The call itself runs backward, window by window, the last one first. This is memory replay
                 back-propagation (arXiv 2010.06891).

All three give the same gradients. Replay of two windows:

    1. Windows before the last are read without a graph. Only the states between windows are kept.

           state 0 ---> [window 0] ---> state 1

    2. The last window is read with a graph. Backward from its loss adds to the gradients of the parameters, and gives
       the gradient of state 1. This gradient is kept, and the graph is freed.

           state 1 ---> [window 1] ---> loss 1
           d loss 1 / d state 1 <------ backward

    3. The window before is read again, with a graph. One backward starts from both of its results: from loss 0 with
       gradient 1, and from state 1 with the gradient that step 2 found.

           state 0 ---> [window 0] ---> loss 0     gradient 1
                                   ---> state 1    gradient d loss 1 / d state 1

With more windows, step 3 is repeated down to the first one. Truncation cuts the state that enters a window from the
graph, so no gradient goes further back. In all three ways, random numbers (dropout, noise) are drawn as in one forward
pass over all windows.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segment_recurrence_pytorch.loss import hidden_nll
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.random_states import random_states, set_random_states
from segment_recurrence_pytorch.state import State, copied, detach, leaves, map_state

if TYPE_CHECKING:
    from segment_recurrence_pytorch.distributed import Chain

# tokens of a window, for models that read segments in parallel: larger windows need more memory and are not faster
WINDOW_TOKENS = 8192
# bytes of the states that a window holds, of all rows (`SegmentModel.segment_bytes`): with large heads they are most of
# its memory
WINDOW_STATE_BYTES = 2**30
BackwardFn = Callable[[Tensor], Any]


class Window(NamedTuple):
    """A range of columns of a sequence that is read at once, as one or more segments.

    Attributes:
        start: first column of the window.
        stop: the column after its last one.
        segment_length: number of columns of a segment; the last segment may be shorter.
        truncate: whether the state that enters the window is cut from the graph.
        segments: the segments of the window, as a slice of the segments of the sequence.
        cuts: the numbers of the segments, counted in the window, whose entering state is cut from the graph. The first
            number after the last segment stands for the state after the window. Only the window of a rank in
            `distributed.context_parallel` has cuts; all other windows end where the graph is cut. Default: none.
    """

    start: int
    stop: int
    segment_length: int
    truncate: bool
    segments: slice
    cuts: tuple[int, ...] = ()


class Batch(NamedTuple):
    """The tensors of one call, or of one window of it.

    Attributes:
        tokens: token ids (b, n) or embeddings (b, n, dim).
        targets: target ids (b, n), `loss.IGNORE` where nothing is asked. (b, 0) if only logits are wanted.
        mask: (b, n) bool, True = valid. None: all positions are valid.
        per_segment: further arguments of `advance` by name, (b, segments) each. In a window with cuts, they are one of
            these arguments. Default: None, there are none.
        parts: the least number of parts in which the logits of a window are computed. Default: 1.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None
    per_segment: dict[str, Any] | None = None
    parts: int = 1

    def columns(self, window: Window) -> Batch:
        """Returns the part of the batch that belongs to one window."""
        at = slice(window.start, window.stop)
        mask = None if self.mask is None else self.mask[:, at]
        per_segment = {name: value[:, window.segments] for name, value in (self.per_segment or {}).items()}
        if window.cuts:
            per_segment['cuts'] = window.cuts
        return Batch(self.tokens[:, at], self.targets[:, at], mask, per_segment, self.parts)


def plan_windows(
    length: int,
    segment_length: int,
    *,
    align: str = 'left',
    segments_per_pass: int | None = 1,
    backprop_segments: int | None = None,
) -> list[Window]:
    """Cuts a number of columns into segments, and the segments into windows.

    Args:
        length: number of columns.
        segment_length: number of columns of a segment.
        align: which segment is shorter than the others, if the length is not a multiple of segment_length: 'left', the
            last one; 'right', the first one, which is then a window of its own. Default: 'left'.
        segments_per_pass: number of segments of a window. None: as many as possible. Default: 1.
        backprop_segments: with the value k, the state that enters segment i is cut from the graph if i > 0 and i % k ==
            0. No window crosses such a border. Default: None, nothing is cut.

    Returns:
        The windows, in order. There are none if length is 0.
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


def window_of_rank(length: int, segment_length: int, chain: Chain, *, backprop_segments: int | None = None) -> Window:
    """Returns the one window that a rank reads of a sequence that is spread over ranks: its share of the segments.

    Args:
        length: number of columns of the whole sequence.
        segment_length: number of columns of a segment; the last one may be shorter.
        chain: the ranks.
        backprop_segments: see `plan_windows`. The segments of the whole sequence are counted. Default: None.

    Raises:
        ValueError: if there are fewer segments than ranks.
    """
    count = -(-length // segment_length)
    if count < chain.size:
        raise ValueError(
            f'{length} tokens are {count} segments of {segment_length}, too few for the {chain.size} ranks of '
            'context_parallel: every rank needs a segment. Give longer texts, or fewer ranks'
        )
    first, stop = (count * rank // chain.size for rank in (chain.rank, chain.rank + 1))
    # the state at the end of the sequence has no segment after it that could be cut off
    inner = range(max(1, first), min(stop, count - 1) + 1)
    cuts = tuple(i - first for i in inner if backprop_segments is not None and i % backprop_segments == 0)
    columns = first * segment_length, min(stop * segment_length, length)
    return Window(*columns, segment_length, False, slice(first, stop), cuts)


def segments_at_once(model: SegmentModel, segment_length: int, rows: int) -> int:
    """Returns the default number of segments of a window.

    For a model that reads segments in parallel, a window holds about `WINDOW_TOKENS` tokens of a row, and less if the
    states that it holds would take more than `WINDOW_STATE_BYTES`. For other models it is one segment.

    Args:
        model: the model.
        segment_length: number of tokens of a segment.
        rows: number of rows b. With sharded parameters it does not count, since all ranks must use the same windows.
    """
    if not model.parallel_segments:
        return 1
    held = model.segment_bytes(segment_length) * (rows if model.mesh is None else 1)
    return max(1, min(WINDOW_TOKENS // segment_length, WINDOW_STATE_BYTES // max(1, held)))


def read_window(
    model: SegmentModel,
    tokens: Tensor,
    state: State,
    mask: Tensor | None,
    segment_length: int,
    need_hidden: bool = True,
    per_segment: dict[str, Tensor] | None = None,
) -> tuple[Any, State]:
    """Reads the segments of one window: all at once if the model can do so, else one after the other.

    Args:
        model: the model.
        tokens: token ids (b, n) or embeddings (b, n, dim) of the window.
        state: the state that enters the window, or None.
        mask: (b, n) bool, True = valid. None: all positions are valid.
        segment_length: number of tokens of a segment.
        need_hidden: whether hidden states are needed. Default: True.
        per_segment: further arguments of `advance` by name, (b, segments) each. Default: None.

    Returns:
        The hidden states (b, n, dim), or None if need_hidden is False, and the state after the window.
    """
    more: dict[str, Any] = per_segment or {}
    if model.parallel_segments or tokens.shape[1] <= segment_length:
        return model.advance(tokens, state, segment_length=segment_length, mask=mask, need_hidden=need_hidden, **more)
    pieces = tokens.split(segment_length, dim=1)
    masks = [None] * len(pieces) if mask is None else mask.split(segment_length, dim=1)
    hiddens = []
    for i, (piece, piece_mask) in enumerate(zip(pieces, masks, strict=True)):
        one = {name: value[:, i : i + 1] for name, value in more.items()}
        hidden, state = model.advance(
            piece, state, segment_length=segment_length, mask=piece_mask, need_hidden=need_hidden, **one
        )
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
    """Reads tokens of any length, one window after the other.

    Args:
        model: the model.
        tokens: token ids (b, n) or embeddings (b, n, dim).
        state: the state before the tokens, or None.
        segment_length: number of tokens of a segment.
        mask: (b, n) bool, True = valid. Default: None, all positions are valid.
        need_hidden: whether hidden states are needed. Default: True.
        segments_per_pass: number of segments of a window. Default: None, the number that `segments_at_once` returns.

    Yields:
        For each window: its columns as a slice, its hidden states (None if need_hidden is False), and the state after
        it.
    """
    segments = segments_per_pass or segments_at_once(model, segment_length, tokens.shape[0])
    for window in plan_windows(tokens.shape[1], segment_length, segments_per_pass=segments):
        at = slice(window.start, window.stop)
        window_mask = None if mask is None else mask[:, at]
        hidden, state = read_window(model, tokens[:, at], state, window_mask, segment_length, need_hidden)
        yield at, hidden, state


def window_nll(
    model: SegmentModel, batch: Batch, state: State, segment_length: int, per_token: bool = False
) -> tuple[Tensor, State]:
    """Reads a window and returns the negative log likelihood of its targets, and the state after it.

    Args:
        model: the model.
        batch: the part of the batch that belongs to the window.
        state: the state that enters the window, or None.
        segment_length: number of tokens of a segment.
        per_token: whether to return a value for each token (b, n) instead of the sum (). Default: False.
    """
    hidden, state = read_window(model, batch.tokens, state, batch.mask, segment_length, per_segment=batch.per_segment)
    nll = hidden_nll(
        model.to_logits,
        hidden,
        batch.targets,
        model.num_tokens,
        draws_random=model.draws_random,
        parts=batch.parts,
    )
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
    """Computes the negative log likelihood of all windows, with one graph for the caller's `backward`.

    Args:
        model: the model.
        batch: the tensors of the call.
        windows: what `plan_windows` returned.
        state: the state before the first window, or None.
        per_token: whether to return a value for each token (b, n) instead of the sum (). Default: False.
        recompute: whether `backward` computes the activations of each window again, instead of keeping them.
            Default: False.

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
        part = batch.columns(window)
        loss, state = _kept_or_not(recompute, window_nll, model, part, state, window.segment_length, per_token)
        losses.append(loss)
    if per_token:
        return torch.cat(losses, dim=1), state
    return torch.stack([_zero_loss(model), *losses]).sum(), state


def sequence_hidden(
    model: SegmentModel, batch: Batch, windows: list[Window], state: State, *, recompute: bool = False
) -> tuple[Tensor, State]:
    """Returns the hidden states of all windows (b, n, dim), and the state after the last one.

    Args:
        model: the model.
        batch: the tensors of the call.
        windows: what `plan_windows` returned.
        state: the state before the first window, or None.
        recompute: see `sequence_nll`. Default: False.
    """
    hiddens = []
    for window in windows:
        if window.truncate:
            state = detach(state)
        part = batch.columns(window)
        hidden, state = _kept_or_not(
            recompute,
            read_window,
            model,
            part.tokens,
            state,
            part.mask,
            window.segment_length,
            True,
            part.per_segment,
        )
        hiddens.append(hidden)
    if hiddens:
        return torch.cat(hiddens, dim=1), state
    nothing = torch.zeros(len(batch.tokens), 0, model.dim, dtype=model.dtype, device=batch.tokens.device)
    return nothing, own_state(model, batch, state)


def _kept_or_not(recompute: bool, function: Callable[..., Any], model: SegmentModel, *arguments: Any) -> Any:
    """Calls a function of a model and of what belongs to a window. With `recompute`, its activations are not kept."""
    if recompute and torch.is_grad_enabled():
        random = model.draws_random
        return checkpoint(function, model, *arguments, use_reentrant=False, preserve_rng_state=random)
    return function(model, *arguments)


def own_state(model: SegmentModel, batch: Batch, state: State) -> State:
    """Returns the state after a call that reads nothing. It shares memory with no other tensor.

    Args:
        model: the model.
        batch: the tensors of the call.
        state: the state before the call. None: the initial state is returned.
    """
    return initial_state(model, batch.tokens.shape[0]) if state is None else copied(state)


def initial_state(model: SegmentModel, batch_size: int) -> State:
    """Returns `model.initial_state(batch_size)`, also if the parameters of the model are sharded.

    A sharded model has whole parameters only inside its methods `advance`, `to_logits` and `reset`.

    Args:
        model: the model.
        batch_size: number of rows b.
    """
    state = model.initial_state(batch_size)
    if model.mesh is None:
        return state
    empty = map_state(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=model.device), state)
    return model.reset(empty, torch.ones(batch_size, dtype=torch.bool, device=model.device))


def replay(
    model: SegmentModel,
    batch: Batch,
    windows: list[Window],
    state: State,
    *,
    scale: Tensor,
    backward_fn: BackwardFn | None = None,
) -> tuple[Tensor, State]:
    """Runs backward on scale * (summed negative log likelihood), while it holds the graph of one window at a time.

    Args:
        model: the model.
        batch: the tensors of the call.
        windows: what `plan_windows` returned.
        state: the state before the first window, or None. It is a constant: it gets no gradient and is not changed.
        scale: factor of the loss, ().
        backward_fn: a function that is called for each window instead of `Tensor.backward`. It gets a scalar tensor,
            and may scale it before it runs backward. Default: None, `Tensor.backward`.

    Returns:
        The summed negative log likelihood in nats (not scaled), and the state after the last window, both without a
        graph.
    """
    backward_fn = backward_fn or Tensor.backward
    given: list[Tensor] = []
    cut_off: list[Tensor] = []

    def without_graph(values: Tensor) -> Tensor:
        if not values.requires_grad:
            return values
        given.append(values)
        cut_off.append(values.detach().requires_grad_())
        return cut_off[-1]

    # embeddings and values of segments may have a graph of their own: backward goes through it once, at the end
    per_segment = {name: without_graph(values) for name, values in (batch.per_segment or {}).items()}
    batch = batch._replace(tokens=without_graph(batch.tokens), per_segment=per_segment)
    total = _zero_loss(model)
    if not windows:
        return total, detach(own_state(model, batch, state))
    state = detach(state)
    starts = [i for i, window in enumerate(windows) if i == 0 or window.truncate]
    try:
        for start, stop in zip(starts, [*starts[1:], len(windows)], strict=True):
            is_last = stop == len(windows)
            loss, state = _replay_block(model, batch, windows[start:stop], state, scale, backward_fn, is_last)
            total = total + loss
    finally:
        _let_reduce(model, True)
    if given:
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in cut_off]
        torch.autograd.backward(given, gradients)
    return total, state


def _let_reduce(model: SegmentModel, reduces: bool) -> None:
    """Sets whether the next backward reduces the gradients of sharded parameters over the ranks, or only adds them
    up."""
    if model.mesh is not None:
        fsdp: Any = model
        fsdp.set_requires_gradient_sync(reduces)


def _replay_block(
    model: SegmentModel,
    batch: Batch,
    windows: list[Window],
    state: State,
    scale: Tensor,
    backward_fn: BackwardFn,
    is_last: bool,
) -> tuple[Tensor, State]:
    """Replays a run of windows that has no truncation inside. The drawing at the top of this file shows the steps.
    Gradients of sharded parameters are reduced once, in the last backward of the last run."""
    entering, random_states = [state], [_random_state(model)]
    with torch.no_grad():
        for window in windows[:-1]:
            part = batch.columns(window)
            _, state = read_window(model, part.tokens, state, part.mask, window.segment_length, False, part.per_segment)
            entering.append(state)
            random_states.append(_random_state(model))
    # autocast caches the weights that it casts; those from the pass without a graph would get no gradient
    torch.clear_autocast_cache()

    losses: list[Tensor] = []
    gradients: list[Tensor | None] | None = None
    after: tuple[State, Any] | None = None
    try:
        for window in reversed(windows):
            _let_reduce(model, is_last and window is windows[0])
            state, random_state = entering.pop(), random_states.pop()
            if after is not None:
                _set_random_state(random_state)
            state = map_state(lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex()), state)
            with torch.enable_grad():
                loss, next_state = window_nll(model, batch.columns(window), state, window.segment_length)
                if after is None:
                    after = detach(next_state), _random_state(model)
                losses.append(loss.detach())
                joined = _joined(loss * scale, next_state, gradients)
                # the loss of this window may depend on no trained parameter: backward would then raise an error
                backward_fn(joined if joined.requires_grad else touch_parameters(model, joined))
            gradients = [_alone(leaf.grad) for leaf in leaves(state)]
    finally:  # even if backward_fn raises an error, the random state is that after one forward pass
        if after is not None:
            _set_random_state(after[1])
    assert after is not None
    return torch.stack(losses).sum(), after[0]


def _alone(gradient: Tensor | None) -> Tensor | None:
    """Returns a gradient that keeps nothing else alive: one may be a part of the gradients of a whole window."""
    if gradient is None or gradient.untyped_storage().nbytes() <= gradient.numel() * gradient.element_size():
        return gradient
    return gradient.clone()


class _Join(torch.autograd.Function):
    """Joins the two starts of a window's backward: its loss, and the state after it with the gradient that is known for
    it.

    The result is the loss. Its backward also sends the known gradient into the state, so there is one backward for each
    window. If backward_fn scales the loss, the known gradient is not scaled a second time: it comes from the losses of
    later windows, which backward_fn has scaled already.
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
    def forward(loss: Tensor, *parameters: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # apart, for `torch.func`
        ctx.parameters = inputs[1:]

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        # an expanded zero takes no memory. The gradient of a sharded parameter (DTensor) must be sharded like it
        zeros = [
            torch.zeros_like(p) if hasattr(p, 'full_tensor') else p.new_zeros(()).expand(p.shape)
            for p in ctx.parameters
        ]
        return grad_outputs[0], *zeros


def touch_parameters(model: SegmentModel, loss: Tensor) -> Tensor:
    """Returns the same loss, whose backward gives a gradient to every trainable parameter.

    A parameter that had no influence on the loss gets zeros, where PyTorch would leave its gradient None.

    Args:
        model: the model.
        loss: a loss of any shape.
    """
    if not torch.is_grad_enabled():
        return loss
    return _Touch.apply(loss, *[p for p in model.parameters() if p.requires_grad])


def fill_gradients(model: nn.Module) -> None:
    """Gives zeros as gradient to every trainable parameter that has none. It does after backward what
    `touch_parameters` does within it."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


RandomState = dict[torch.device, dict[str, Tensor]]


def _random_state(model: SegmentModel) -> RandomState:
    """Returns the random states of all devices of a model. Nothing, if it draws no random numbers."""
    if not model.draws_random:
        return {}
    devices = {model.device, *(parameter.device for parameter in model.parameters())}
    return {device: random_states(device) for device in devices}


def _set_random_state(random_state: RandomState) -> None:
    for device, states in random_state.items():
        set_random_states(device, states)
