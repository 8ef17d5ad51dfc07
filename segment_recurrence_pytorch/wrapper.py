"""SegmentWrapper: train, score and continue sequences of any length with a model that reads segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from beartype import beartype
from torch import Tensor, nn
from tqdm import tqdm

from segment_recurrence_pytorch.backprop import (
    Batch,
    Window,
    fill_gradients,
    plan_windows,
    read_window,
    replay,
    segments_at_once,
    sequence_nll,
    touch_parameters,
)
from segment_recurrence_pytorch.checks import check_input
from segment_recurrence_pytorch.generation import CHECK_EVERY, Cursor, Stream, as_cursor, evaluating, read_segments
from segment_recurrence_pytorch.loss import IGNORE, mean_loss, valid_targets
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.sampling import Sampler
from segment_recurrence_pytorch.state import State, detach


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
        per_segment: dict | None = None,
    ) -> LossReturn:
        """The loss over all valid targets of a sequence.

        x: ids (b, n) or embeddings (b, n, dim). mask: (b, n) bool, True = valid.
        labels: (b, n), aligned: labels[:, i] is the target of logit i. Without them a causal model learns the next
            token: a row's last token is then only a target, so the next piece of a stream starts with it.
        backward: run backward here, by replay, with one window held at a time; the loss and the state returned hold
            no graph. backward_fn: called with each window's scalar instead of `Tensor.backward`
            (`accelerator.backward`, or a gradient scaler).
        backprop_segments, segment_length: instead of the wrapper's, for this call.
        per_segment: further arguments of the model's `advance` by name, (b, segments) each.
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
        batch = batch._replace(per_segment=per_segment)
        for name, value in (per_segment or {}).items():
            if tuple(value.shape[:2]) != (x.shape[0], windows[-1].segments.stop if windows else 0):
                raise ValueError(f'{name} has shape {tuple(value.shape)}: give one value a segment, (batch, segments)')
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
            tokens, _, window_mask, _ = batch.columns(window)
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
        prompt: Any,
        max_new_tokens: int,
        *,
        return_cursor: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """New tokens (b, n), n <= max_new_tokens, and the `Cursor` to go on from if return_cursor=True.

        prompt and options: see `stream`. n is less only if every row came to eos_token_id; rows that came to it
        earlier are filled with it. progress: a bar; default, only on a terminal.
        """
        if max_new_tokens < 0:
            raise ValueError(
                f'{max_new_tokens} new tokens: give 0 or more; a length counts the prompt, so it is at least its length'
            )
        on_cpu = self.model.device.type == 'cpu'
        stream = self._open_stream(prompt, max_new_tokens, 1 if on_cpu else CHECK_EVERY, **options)
        hidden = None if progress is None else not progress  # None: tqdm hides the bar where there is no terminal
        with stream.guarded():
            tokens = list(tqdm(stream.unguarded(), total=max_new_tokens, disable=hidden, unit='token'))
        new = torch.stack(tokens, dim=1) if tokens else stream.cursor.tokens[:, :0]
        if stream.eos is not None:  # a device is looked at now and then: rows may have gone on together for a while
            running = ((new == stream.eos).cumsum(dim=1) == 0).any(dim=0)
            new = new[:, : int(running.sum()) + 1]
        return (new, stream.cursor) if return_cursor else new

    @beartype
    def stream(self, prompt: Any = None, *, max_new_tokens: int | None = None, **options: Any) -> Stream:
        """An iterator over new tokens (b,), whose `cursor` tells at any time how to go on.

        prompt: ids (b, n), with prompt_lengths= (b,) if not all of a row counts, or a list of b tensors (n_i,): each
            row is continued as if alone. None: state= is a cursor that goes on, or batch_size= rows begin with
            start_token=0.
        state: what `loss` or `logits` returned, or a `Cursor`: the prompt is appended to its tokens.
        max_new_tokens: None: endless. eos_token_id: a row ends with this token.
        temperature, top_k, top_p, min_p, repetition_penalty, filter_fn, generator: see `sampling.Sampler`; a repetition
            counts from the tokens of the prompt and of the cursor on.
        compile: run each step under `torch.compile`, on CUDA as a graph: the first two segments are slow. The device is
            then looked at every 32 tokens only: an error, and the end of all rows, may come that much later.
        segment_length: instead of the wrapper's.
        A finished row goes on if its cursor is given again: `cursor.rows(~stream.finished)` leaves it out.
        Segments start at the first token, whatever `align` says. ValueError for what does not fit, and for logits that
        are NaN, with the place.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f'max_new_tokens is {max_new_tokens}: give 0 or more, or None for an endless stream')
        return self._open_stream(prompt, max_new_tokens, CHECK_EVERY if options.get('compile') else 1, **options)

    @beartype
    def read(
        self, prompt: Any, state: Any = None, *, prompt_lengths: Any = None, segment_length: int | None = None
    ) -> Cursor:
        """The cursor after a prompt, at the speed of an evaluation without logits; arguments as in `stream`."""
        length = self._length(segment_length)
        cursor = self._checked_cursor(prompt, prompt_lengths, state)
        with evaluating(self.model), torch.no_grad():
            return Cursor(*read_segments(self.model, cursor, length, self.segments_per_pass))

    def _open_stream(
        self,
        prompt: Any,
        max_new_tokens: int | None,
        check_every: int,
        *,
        state: Any = None,
        prompt_lengths: Any = None,
        batch_size: int | None = None,
        start_token: int = 0,
        segment_length: int | None = None,
        eos_token_id: int | None = None,
        compile: bool = False,
        **sampling: Any,
    ) -> Stream:
        sampler = Sampler(**sampling)
        if sampler.generator is not None and sampler.generator.device.type != self.model.device.type:
            raise ValueError(f'generator is on {sampler.generator.device}, the model on {self.model.device}')
        if eos_token_id is not None and not 0 <= eos_token_id < self.model.num_tokens:
            raise ValueError(f'eos_token_id is {eos_token_id}: give a token id in [0, {self.model.num_tokens})')
        length = self._length(segment_length)
        if batch_size is not None:
            check_count('batch_size', batch_size)
            if prompt is not None or isinstance(state, Cursor):
                raise ValueError(f'batch_size={batch_size} begins new rows with start_token: give no prompt or cursor')
            prompt = torch.full((batch_size, 1), start_token, device=self.model.device)
        cursor = self._checked_cursor(prompt, prompt_lengths, state)
        return Stream(
            self.model,
            cursor,
            segment_length=length,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            compile=compile,
            check_every=check_every,
            segments_per_pass=self.segments_per_pass,
        )

    def _checked_cursor(self, prompt: Any, prompt_lengths: Any, state: Any) -> Cursor:
        if not self.model.causal:
            raise ValueError('a model with causal=False cannot generate: it sees the tokens to come')
        cursor = as_cursor(prompt, prompt_lengths, state, self.model.device)
        tokens, state, _ = check_input(self.model, cursor.tokens, cursor.state)
        return Cursor(state, tokens, cursor.lengths)

    def _length(self, segment_length: int | None) -> int:
        """That of one call, or the wrapper's."""
        return self.segment_length if segment_length is None else _checked_length(self.model, segment_length)

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
        length = self._length(segment_length)
        return plan_windows(
            batch.tokens.shape[1],
            length,
            align=self.align,
            segments_per_pass=self.segments_per_pass or segments_at_once(self.model, length),
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
