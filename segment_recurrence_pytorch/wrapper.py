"""SegmentWrapper: train, score and continue sequences of any length with a model that reads segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from beartype import beartype
from torch import Tensor, nn

from segment_recurrence_pytorch.backprop import (
    Batch,
    Window,
    fill_gradients,
    plan_windows,
    read_window,
    replay,
    sequence_nll,
    touch_parameters,
)
from segment_recurrence_pytorch.checks import check_input
from segment_recurrence_pytorch.generation import generate_by_rereading
from segment_recurrence_pytorch.loss import IGNORE, mean_loss, valid_targets
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, detach

# tokens a window, for models that read segments in parallel: more cost memory and gain no speed
WINDOW_TOKENS = 8192


class LossReturn(NamedTuple):
    """loss: () or, with reduction='none', (b, n). num_targets: () valid targets. state: after the last segment."""

    loss: Tensor
    num_targets: Tensor
    state: State


class SegmentWrapper(nn.Module):
    """Reads sequences of any length as segments of `segment_length` tokens, with the state carried between them.

    segment_length: default, the model's longest segment.
    segments_per_pass: how many segments are held at once where windows matter: a model that reads segments in
        parallel, and recomputing. It changes speed and memory, no number.
    backprop_segments: k cuts the gradient at every k-th segment border of a call; None: exact, through all of them.
    recompute: `loss.backward()` computes each window again instead of keeping its activations.
    align: where a short segment goes: 'left', to the end; 'right', to the start.
    ignore_index: labels with this value, and with -100, are not counted; without labels such ids are padding.
    """

    @beartype
    def __init__(
        self,
        model: SegmentModel,
        *,
        segment_length: int | None = None,
        segments_per_pass: int | None = None,
        backprop_segments: int | None = None,
        recompute: bool = False,
        align: Literal['left', 'right'] = 'left',
        ignore_index: int = IGNORE,
    ):
        super().__init__()
        segment_length = _checked_length(model, model.max_segment_length if segment_length is None else segment_length)
        check_count('segments_per_pass', segments_per_pass)
        check_count('backprop_segments', backprop_segments)
        self.model = model
        self.segment_length = segment_length
        self.segments_per_pass = segments_per_pass
        self.backprop_segments = backprop_segments
        self.recompute = recompute
        self.align = align
        self.ignore_index = ignore_index

    @beartype
    def loss(
        self,
        x: Tensor,
        state: Any = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Literal['mean', 'sum', 'none'] = 'mean',
        backward: bool = False,
        backward_fn: Callable | None = None,
        backprop_segments: int | None = None,
        segment_length: int | None = None,
    ) -> LossReturn:
        """The loss over all valid targets of a sequence.

        x: ids (b, n) or embeddings (b, n, dim). mask: (b, n) bool, True = valid.
        labels: (b, n), aligned: labels[:, i] is the target of logit i. Without them a causal model learns the next
            token: a row's last token is then only a target, so the next piece of a stream starts with it.
        backward: run backward here, by replay, with one window held at a time; the loss and the state returned hold
            no graph. backward_fn: called with each window's scalar instead of `Tensor.backward`
            (`accelerator.backward`, or a gradient scaler).
        backprop_segments, segment_length: instead of the wrapper's, for this call.
        Returns (loss, num_targets, state); the state is attached to the graph unless backward=True. Every trainable
        parameter gets a gradient. ValueError, before anything is changed, for what does not fit.
        """
        check_count('backprop_segments', backprop_segments)
        if backward and reduction == 'none':
            raise ValueError("backward=True needs a scalar: reduction='mean' or 'sum'")
        if backward and not torch.is_grad_enabled():
            raise ValueError('backward=True inside torch.no_grad(): leave one of them out')
        if backward_fn is not None and not backward:
            raise ValueError('backward_fn is only called with backward=True')
        batch, state = self._batch(x, state, labels, mask)
        if state is None and not batch.tokens.shape[1]:
            state = self.model.initial_state(x.shape[0])
        windows = self._windows(batch, backprop_segments or self.backprop_segments, segment_length)
        num_targets = (batch.targets != IGNORE).sum()

        if backward:
            one = torch.ones((), dtype=torch.promote_types(self.model.dtype, torch.float32), device=x.device)
            scale = mean_loss(one, num_targets) if reduction == 'mean' else one
            nll, state = replay(self.model, batch, windows, state, scale=scale, backward_fn=backward_fn)
            fill_gradients(self.model)
            return LossReturn(nll * scale, num_targets, state)

        nll, state = sequence_nll(
            self.model, batch, windows, state, per_token=reduction == 'none', recompute=self.recompute
        )
        nll = touch_parameters(self.model, nll)
        return LossReturn(mean_loss(nll, num_targets) if reduction == 'mean' else nll, num_targets, state)

    @beartype
    def logits(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (b, n, num_tokens) of all positions, and the state after them. Arguments as in `loss`."""
        x, state, mask = check_input(self.model, x, state, mask=mask, padding_ids=self._padding_ids)
        batch = Batch(x, x[:, :0], mask)
        logits = [x.new_zeros(x.shape[0], 0, self.model.num_tokens, dtype=self.model.dtype)]
        state = self.model.initial_state(x.shape[0]) if state is None else state
        for window in self._windows(batch, self.backprop_segments):
            tokens, _, window_mask = batch.columns(window)
            state = detach(state) if window.truncate else state
            hidden, state = read_window(self.model, tokens, state, window_mask, window.segment_length)
            logits.append(self.model.to_logits(hidden))
        return (torch.cat(logits[1:], dim=1) if logits[1:] else logits[0]), state

    @beartype
    def reset(self, state: Any, rows: Tensor) -> Any:
        """The state with the rows where `rows` (b,) bool is True back at the initial state: a new text starts there.

        A learned initial state gets its gradient from such rows under `loss.backward()`; with backward=True every
        state that is given is a constant, so there it learns from calls without a state only.
        """
        if rows.dtype != torch.bool or rows.ndim != 1:
            raise ValueError(f'rows is {rows.dtype} of shape {tuple(rows.shape)}: give bool, (batch,)')
        if state is None:
            return None
        given, state = state, self.model.as_state(state, rows.shape[0])
        self.model.check_state(state, rows.shape[0])
        return self.model.reset(state, rows) if rows.any() else given

    @beartype
    def generate_tokens(
        self,
        prompt: Tensor,
        num_tokens: int,
        choose: Callable,
        *,
        state: Any = None,
        segment_length: int | None = None,
    ) -> Tensor:
        """New tokens (b, num_tokens) after prompt (b, n), n >= 1, and `state`. choose: logits (b, v) -> ids (b,)."""
        if not self.model.causal:
            raise ValueError('a model with causal=False cannot generate: it sees the tokens to come')
        if prompt.ndim == 2 and not prompt.shape[1]:
            raise ValueError('the prompt is empty: give at least one token a row to start from')
        if num_tokens < 0:
            raise ValueError(f'{num_tokens} new tokens: the length must be at least the length of the prompt')
        length = self.segment_length if segment_length is None else _checked_length(self.model, segment_length)
        if prompt.is_floating_point():
            raise ValueError('the prompt holds embeddings: give token ids')
        prompt, state, _ = check_input(self.model, prompt, state)
        return generate_by_rereading(self.model, prompt, num_tokens, choose, segment_length=length, state=state)

    @property
    def _padding_ids(self) -> tuple[int, ...]:
        return (IGNORE,) if self.ignore_index == IGNORE else (IGNORE, self.ignore_index)

    def _batch(self, x: Tensor, state: State, labels: Tensor | None, mask: Tensor | None) -> tuple[Batch, State]:
        """The columns to read and their targets, and the state, checked."""
        if labels is not None:
            x, state, mask = check_input(self.model, x, state, mask=mask, labels=labels, ignore_index=self.ignore_index)
            return Batch(x, valid_targets(labels, self.ignore_index, mask), mask), state
        if not self.model.causal:
            raise ValueError('a model with causal=False sees the next token, so there is nothing to learn: give labels')
        if x.is_floating_point():
            raise ValueError('embeddings do not tell the next token: give labels')
        x, state, mask = check_input(self.model, x, state, mask=mask, padding_ids=self._padding_ids)
        if mask is None:
            return Batch(x[:, :-1], x[:, 1:], None), state
        # as without padding, a row's last token is only a target
        followed = mask & (mask.flip(1).cumsum(1).flip(1) > 1)
        targets = valid_targets(x[:, 1:], None, mask[:, 1:] & mask[:, :-1])
        return Batch(x[:, :-1], targets, followed[:, :-1]), state

    def _windows(self, batch: Batch, backprop_segments: int | None, segment_length: int | None = None) -> list[Window]:
        length = self.segment_length if segment_length is None else _checked_length(self.model, segment_length)
        segments = self.segments_per_pass
        if segments is None:
            segments = max(1, WINDOW_TOKENS // length) if self.model.parallel_segments else 1
        return plan_windows(
            batch.tokens.shape[1],
            length,
            align=self.align,
            segments_per_pass=segments,
            backprop_segments=backprop_segments,
        )


def same_option(old_name: str, old: int | None, backprop_segments: int | None) -> int | None:
    """backprop_segments, given by its published name or by its own. ValueError if they differ."""
    if old is not None and backprop_segments is not None and old != backprop_segments:
        raise ValueError(f'{old_name}={old} is the old name of backprop_segments={backprop_segments}: give one')
    return backprop_segments if old is None else old


def _checked_length(model: SegmentModel, length: int | None) -> int:
    limit = model.max_segment_length
    if length is None or length < 1 or (limit is not None and length > limit):
        raise ValueError(f'segment_length is {length}: give 1 to {limit or "any number"}')
    return length


def check_count(name: str, value: int | None) -> None:
    """ValueError unless the value is None or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f'{name} is {value}: give 1 or more, or None')
