"""`SegmentWrapper`: trains, scores and generates sequences of any length, with any `SegmentModel`.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Unpack

from segment_recurrence_pytorch.backprop import (
    Batch,
    Window,
    fill_gradients,
    plan_windows,
    replay,
    segments_at_once,
    sequence_hidden,
    sequence_nll,
    touch_parameters,
    window_of_rank,
)
from segment_recurrence_pytorch.checks import (
    check_count,
    check_form,
    check_has_weights,
    check_input,
    is_whole,
    outside_inference,
    typed,
)
from segment_recurrence_pytorch.cursor import Cursor, as_cursor, no_cursor, read_segments
from segment_recurrence_pytorch.distributed import agree_on_reads, check_call, ranks_of, sum_over_ranks
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.generation import Stream, StreamOptions, open_stream
from segment_recurrence_pytorch.loss import IGNORE, mean_loss, valid_targets
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, copied


class LossReturn(NamedTuple):
    """What `SegmentWrapper.loss` returns.

    Attributes:
        loss: the loss in nats, (). With reduction='none' it has a value for each target: (b, n) with labels, (b, n - 1)
            without.
        num_targets: number of valid targets, ().
        state: the state after the last segment.

    If the wrapper has a process_group, loss and num_targets are those of all ranks together, and so are the same on
    all ranks: log them on any of them. Only the values of reduction='none' are those of this rank.
    """

    loss: Tensor
    num_targets: Tensor
    state: State


class SegmentWrapper(nn.Module):
    """Reads sequences of any length segment by segment, and carries the state from each segment to the next.

    Args:
        model: any `SegmentModel`.
        segment_length: number of tokens of a segment. Default: None, the longest segment that the model can read.
        segments_per_pass: number of segments of a window. The segments of a window are held at once, where windows are
            used: by a model that reads segments in parallel, by recomputing and by replay. It changes speed and memory
            but no result; with dropout, other random numbers are drawn. Default: None, about 8,192 tokens for a model
            that reads segments in parallel, and fewer if the states that it holds would take more than 1 GiB; else one
            segment.
        backprop_segments: with the value k, the gradient does not pass the border after every k-th segment of a call.
            Default: None, the gradient is exact and passes all borders.
        recompute: whether `loss.backward()` computes the activations of each window again, instead of keeping them.
            Default: False.
        align: which segment is shorter than the others, if the length is not a multiple of segment_length: 'left', the
            last one; 'right', the first one. Generation ignores it and always uses 'left'. Default: 'left'.
        ignore_index: labels with this value, or with -100, do not count in the loss. In a call without labels, token
            ids with these values are padding; under torch.compile, which looks at no value, give a mask. Default: -100.
        process_group: the ranks (processes) that train the model together, for example `dist.group.WORLD`. Losses are
            then those of one process that has the rows and segments of all ranks: sums over their targets, divided by
            the number of their targets. Gradients must be averaged over the same ranks, as DistributedDataParallel,
            FSDP2 and `distributed.sync_gradients` do. All ranks have to make each call of `loss`, also without
            gradients; to score a text on one rank, use a wrapper without a group. Default: None, this process alone.
        check_values: whether values that are given are checked: ids and labels in their range, numbers that are finite,
            a mask that hides anything at all. A GPU waits for this once a call. Without it a wrong id can end the whole
            process, and padding is only what a mask says, not ids equal to `ignore_index`. Default: True.

    Raises:
        ValueError: if an argument is outside its range.
    """

    @typed
    def __init__(
        self,
        model: Any,
        *,
        segment_length: int | None = None,
        segments_per_pass: int | None = None,
        backprop_segments: int | None = None,
        recompute: bool = False,
        align: Literal['left', 'right'] = 'left',
        ignore_index: int = IGNORE,
        process_group: Any = None,
        check_values: bool = True,
    ):
        super().__init__()
        if not isinstance(model, SegmentModel):
            raise ValueError(
                f'the model is a {type(model).__name__}: give a SegmentModel. Where another module holds it, give the '
                'one inside, as in `averaged.module` or `peft_model.base_model.model`'
            )
        check_form(model)
        segment_length = _checked_length(model, model.max_segment_length if segment_length is None else segment_length)
        check_count('segments_per_pass', segments_per_pass)
        check_count('backprop_segments', backprop_segments)
        self.model: SegmentModel = model
        self.segment_length = segment_length
        self.segments_per_pass = segments_per_pass
        self.backprop_segments = backprop_segments
        self.recompute = recompute
        self.align = align
        self.ignore_index = ignore_index
        self.process_group = process_group
        self.check_values = check_values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `loss`. A module that calls this wrapper, such as DistributedDataParallel, thus computes its loss."""
        return self.loss(*args, **kwargs)

    @typed
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
        """Computes the loss over all valid targets of a sequence, and its gradients if backward is True.

        Without labels, a causal model learns the next token. The last column of x is then only a target, and the model
        does not read it. The next piece of the same text therefore starts with this token: consecutive pieces overlap
        by one token. A row whose last column is padding has no such token: all of its tokens are read, and the state is
        the one after its last token, which the next piece must not repeat.

        Args:
            x: token ids (b, n) or embeddings (b, n, dim).
            state: the state that the last call returned, to go on with the same texts. Default: None, new texts start.
            labels: target ids (b, n). labels[:, i] is the target of the logits at position i. Default: None, the
                targets are the next tokens.
            mask: (b, n) bool, True = valid. What a padded position holds has no effect, and it is no target. Positions
                and segments count columns, padded ones too: pad rows at their end, since a row that begins later is
                cut into other segments. Default: None, all positions are valid.
            reduction: 'mean' or 'sum' over the valid targets, or 'none' for a loss of each target. Default: 'mean'.
            backward: whether to run backward inside this call, by replay, which holds one window at a time. The loss
                and the state that are returned then have no graph. Weights must not change before the call returns,
                as an optimizer in a gradient hook would do. Default: False.
            backward_fn: a function that is called for each window, with a scalar tensor, instead of `Tensor.backward`:
                for example `accelerator.backward`, or one that uses a gradient scaler. It has to give gradients to all
                that the loss depends on, not to chosen `inputs`: the state is one of them. It needs backward=True.
                Default: None.
            backprop_segments: replaces the wrapper's value in this call. Default: None, the wrapper's value.
            segment_length: replaces the wrapper's value in this call. Default: None, the wrapper's value.
            per_segment: further arguments of the model's `advance`, as a dict from their names to tensors (b, segments)
                with a value for each row and segment. Default: None.

        Returns:
            A `LossReturn`: (loss, num_targets, state). The state is attached to the graph unless backward is True, or
            the segments are spread over ranks (`distributed.context_parallel`). After an optimizer step, give
            `detach(state)` to the next call: the graph of the step before is gone.
            After backward, every trainable parameter has a gradient; it is zero where the parameter had no influence on
            the loss.

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
        """
        check_count('backprop_segments', backprop_segments)
        if backward_fn is not None and not backward:
            raise ValueError('backward_fn is only called with backward=True')
        if backward and reduction == 'none':
            raise ValueError("backward=True needs a scalar: reduction='mean' or 'sum'")
        if backward and not torch.is_grad_enabled():
            raise ValueError('backward=True inside torch.no_grad() or inference_mode(): leave one of them out')
        if backward and not self._can_learn(x, per_segment):
            constant = ', and a state that is given is a constant here: recompute=True trains it' * (state is not None)
            raise ValueError(
                f'backward=True, but every parameter is frozen{constant}. Unfreeze one, or leave backward out'
            )
        check_call(self, backward=backward, mean=reduction == 'mean')
        further = []
        if per_segment and x.ndim > 1:
            columns = x.shape[1] if labels is not None else max(0, x.shape[1] - 1)
            further = self._per_segment_faults(per_segment, x.shape[0], -(-columns // self._length(segment_length)))
        batch, state = self._batch(x, state, labels, mask, further)
        batch = batch._replace(per_segment=outside_inference(per_segment or {}))
        windows = self._windows(batch, backprop_segments or self.backprop_segments, segment_length)
        batch = batch._replace(parts=agree_on_reads(self.model, windows, batch.targets.shape[0]))
        group = self.process_group
        own = batch.targets[:, windows[0].start : windows[-1].stop] if windows else batch.targets
        num_targets = sum_over_ranks((own != IGNORE).sum(), group)

        if backward:
            one = torch.ones((), dtype=torch.promote_types(self.model.dtype, torch.float32), device=x.device)
            scale = mean_loss(one, num_targets) if reduction == 'mean' else one
            # gradients are averaged over the ranks later, so they are made larger here
            of_rank = scale * ranks_of(group)
            nll, state = replay(self.model, batch, windows, state, scale=of_rank, backward_fn=backward_fn)
            fill_gradients(self.model)
            return LossReturn(sum_over_ranks(nll, group) * scale, num_targets, self._shared(state))

        nll, state = sequence_nll(
            self.model, batch, windows, state, per_token=reduction == 'none', recompute=self.recompute
        )
        nll = touch_parameters(self.model, nll)
        if reduction != 'none':
            nll = sum_over_ranks(nll, group)
        loss = mean_loss(nll, num_targets) if reduction == 'mean' else nll
        return LossReturn(loss, num_targets, self._shared(state))

    @typed
    def logits(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        backprop_segments: int | None = None,
        segment_length: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Computes the logits of all positions. With recompute=True, `backward` computes each window again.

        Args:
            x: token ids (b, n) or embeddings (b, n, dim).
            state: the state that the last call returned, to go on with the same texts. Default: None, new texts start.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            backprop_segments: replaces the wrapper's value in this call. Default: None, the wrapper's value.
            segment_length: replaces the wrapper's value in this call. Default: None, the wrapper's value.

        Returns:
            The logits (b, n, num_tokens), and the state after the last segment.

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
        """
        hidden, state = self.hidden(
            x, state, mask=mask, backprop_segments=backprop_segments, segment_length=segment_length
        )
        return self.model.to_logits(hidden), state

    @typed
    def hidden(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        backprop_segments: int | None = None,
        segment_length: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Computes the hidden states of all positions, from which `model.to_logits` makes logits: for a head of your
        own, or to look into a model.

        Args:
            x: see `logits`.
            state: see `logits`. Default: None.
            mask: see `logits`. Default: None.
            backprop_segments: see `logits`. Default: None.
            segment_length: see `logits`. Default: None.

        Returns:
            The hidden states (b, n, dim), and the state after the last segment.

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
        """
        check_count('backprop_segments', backprop_segments)
        x, state, mask = self._checked(x, state, mask=mask, padding_ids=self._padding_ids)
        batch = Batch(x, x[:, :0], mask)
        windows = self._windows(batch, backprop_segments or self.backprop_segments, segment_length)
        agree_on_reads(self.model, windows)
        hidden, state = sequence_hidden(self.model, batch, windows, state, recompute=self.recompute)
        return hidden, self._shared(state)

    @typed
    def reset(self, state: Any, rows: Tensor) -> Any:
        """Starts new texts in some rows of a batch.

        If the initial state is learned, it gets a gradient from these rows when the caller runs `loss.backward()`. With
        backward=True, a state that is given is a constant; the initial state then learns only from calls without a
        state.

        Args:
            state: the state that the last call returned, or None.
            rows: (b,) bool, True where a new text starts, on the device of the model or on the CPU. On the CPU a GPU
                need not be waited for to know whether there is any.

        Returns:
            The state with these rows set back to the initial state. None if the given state is None.

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
        """
        if rows.dtype != torch.bool or rows.ndim != 1:
            raise ValueError(f'rows is {rows.dtype} of shape {tuple(rows.shape)}: give a bool tensor (batch,)')
        check_has_weights(self.model)
        if rows.device not in (self.model.device, torch.device('cpu')):
            raise ValueError(f'rows is on {rows.device}, the model on {self.model.device}: move one of them')
        if state is None:
            return None
        state, rows = outside_inference((self.model.as_state(no_cursor(state), rows.shape[0]), rows))
        self.model.check_state(state, rows.shape[0])
        # ranks that share parameters gather them inside `reset`, all of them or none
        may_look = self.model.mesh is None and (self.check_values or rows.device.type == 'cpu')
        if may_look and not rows.any():
            return copied(state)
        return self.model.reset(state, rows.to(self.model.device, non_blocking=True))

    @typed
    def generate_tokens(
        self,
        prompt: Any,
        max_new_tokens: int,
        *,
        state: Any = None,
        return_cursor: bool = False,
        progress: bool | None = None,
        **options: Unpack[StreamOptions],
    ) -> Any:
        """Generates new tokens after a prompt.

        Args:
            prompt: see `stream`.
            max_new_tokens: number of new tokens of each row.
            state: see `stream`. Default: None, new texts start.
            return_cursor: whether to return also the `Cursor` from which generation can go on. Default: False.
            progress: whether to show a progress bar. Default: None, only on a terminal.
            options: the other arguments of `stream`.

        Returns:
            The new tokens (b, n), and the cursor if return_cursor is True. n is max_new_tokens, or less if every row
            has ended with eos_token_id. A row that ends before others is filled up with eos_token_id, the first one of
            a list.

        Raises:
            ValueError: if an argument does not fit, or if logits are NaN or infinite. The message then tells the
                position.
        """
        if not is_whole(max_new_tokens) or max_new_tokens < 0:
            raise ValueError(f'max_new_tokens is {max_new_tokens}: give 0 or more')
        stream = self._open_stream(prompt, max_new_tokens, state, **options)
        hidden = None if progress is None else not progress  # None: tqdm hides the bar where there is no terminal
        with stream.guarded():
            tokens = list(tqdm(stream.unguarded(), total=max_new_tokens, disable=hidden, unit='token'))
        new = torch.stack(tokens, dim=1) if tokens else stream.cursor.tokens[:, :0]
        if stream.eos is not None:  # a GPU is checked now and then: cut what came after the end of all rows
            running = (stream.is_end(new).cumsum(dim=1) == 0).any(dim=0)
            new = new[:, : int(running.sum()) + 1]
        return (new, stream.cursor) if return_cursor else new

    @typed
    def stream(
        self,
        prompt: Any = None,
        *,
        max_new_tokens: int | None = None,
        state: Any = None,
        **options: Unpack[StreamOptions],
    ) -> Stream:
        """Returns an iterator over new tokens (b,), one for each row. Its `cursor` tells at any time where each row
        stands.

        Segments start at the first token of a text, even with align='right'. The cursor of a finished row can be
        continued like any other. To go on without the finished rows, take `cursor.rows(~stream.finished)`.

        On a GPU the values are looked at every 32 tokens, since each look waits for the device: there an error, or the
        end of all rows, is noticed up to 31 tokens late.

        Args:
            prompt: token ids (b, n), or a list of b tensors (n_i,), which may differ in length. Each row is continued
                as if it were alone. All of its ids are text, also one that is `ignore_index`. Default: None, which
                needs a cursor as state, or batch_size.
            max_new_tokens: number of new tokens of each row. Default: None, the stream has no end.
            prompt_lengths: number of tokens of each row in a prompt (b, n), (b,); the tokens after them are ignored.
                Default: None, all n tokens.
            state: a state that `loss` or `logits` returned, or a `Cursor`. The prompt follows the tokens of the cursor.
                Default: None, new texts start.
            batch_size: number of rows that begin with start_token. It is given instead of a prompt or a cursor.
                Default: None.
            start_token: id of the first token of these rows. Default: 0.
            eos_token_id: a row ends when this token is drawn, or one of these, if it is a list. Default: None, no row
                ends.
            temperature: see `sampling.Sampler`. Default: 1.
            top_k: see `sampling.Sampler`. Default: None.
            top_p: see `sampling.Sampler`. Default: None.
            min_p: see `sampling.Sampler`. Default: None.
            repetition_penalty: see `sampling.Sampler`. It applies to tokens of the cursor, of the prompt and of the
                stream. Default: 1.
            filter_fn: see `sampling.Sampler`. Default: None.
            generator: see `sampling.Sampler`. Default: None.
            compile: whether to run each step under `torch.compile`, and on CUDA as a CUDA graph. The first two segments
                are then slow, in the first stream of a shape. Default: False.
            segment_length: replaces the wrapper's value in this call. Default: None, the wrapper's value.

        Raises:
            ValueError: if an argument does not fit. While the stream runs: if logits are NaN or infinite. The message
                then tells the position.
        """
        if max_new_tokens is not None and (not is_whole(max_new_tokens) or max_new_tokens < 0):
            raise ValueError(f'max_new_tokens is {max_new_tokens}: give 0 or more, or None for an endless stream')
        return self._open_stream(prompt, max_new_tokens, state, **options)

    @typed
    def read(
        self, prompt: Any, state: Any = None, *, prompt_lengths: Any = None, segment_length: int | None = None
    ) -> Cursor:
        """Reads a prompt and returns the cursor after it. It computes no logits, and is as fast as an evaluation
        without them.

        Args:
            prompt: see `stream`.
            state: see `stream`. Default: None, new texts start.
            prompt_lengths: see `stream`. Default: None, all tokens count.
            segment_length: replaces the wrapper's value in this call. Default: None, the wrapper's value.

        Raises:
            ValueError: if an argument does not fit.
        """
        length = self._length(segment_length)
        cursor, counts = as_cursor(self.model, prompt, prompt_lengths, state, check_values=self.check_values)
        with evaluating(self.model), torch.no_grad():
            return read_segments(self.model, cursor, length, self.segments_per_pass, counts=counts)[0]

    def _open_stream(
        self, prompt: Any, max_new_tokens: int | None, state: Any, segment_length: int | None = None, **options: Any
    ) -> Stream:
        return open_stream(
            self.model,
            prompt,
            max_new_tokens,
            state,
            segment_length=self._length(segment_length),
            segments_per_pass=self.segments_per_pass,
            check_values=self.check_values,
            **options,
        )

    def _can_learn(self, x: Tensor, per_segment: dict | None) -> bool:
        """Returns whether anything that replay can send a gradient to wants one."""
        tensors = [x, *self.model.parameters(), *(per_segment or {}).values()]
        return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)

    def _length(self, segment_length: int | None) -> int:
        """Returns the segment length of one call: the given one, or the wrapper's, which may have been set anew."""
        return _checked_length(self.model, self.segment_length if segment_length is None else segment_length)

    @property
    def _padding_ids(self) -> tuple[int, ...]:
        return (IGNORE,) if self.ignore_index == IGNORE else (IGNORE, self.ignore_index)

    def _checked(self, x: Tensor, state: State, **more: Any) -> tuple[Tensor, State, Tensor | None]:
        """Returns x, the state and the mask as `check_input` does. Its further arguments are `more`."""
        return check_input(self.model, x, no_cursor(state), check_values=self.check_values, **more)

    def _batch(
        self,
        x: Tensor,
        state: State,
        labels: Tensor | None,
        mask: Tensor | None,
        further: list[tuple[str, Tensor]],
    ) -> tuple[Batch, State]:
        """Returns the tokens to read with their targets, and the state. All of them are checked."""
        if labels is not None:
            x, state, mask = self._checked(
                x, state, mask=mask, labels=labels, ignore_index=self.ignore_index, further=further
            )
            return Batch(x, valid_targets(labels, self.ignore_index, mask), mask), state
        if not self.model.causal:
            raise ValueError('a model with causal=False sees the next token, so there is nothing to learn: give labels')
        if x.is_floating_point():
            raise ValueError('embeddings do not tell the next token: give labels')
        x, state, mask = self._checked(x, state, mask=mask, padding_ids=self._padding_ids, further=further)
        if mask is None:
            return Batch(x[:, :-1], x[:, 1:], None), state
        # the last column is a target and is not read, since the next piece starts with it. A row whose last column is
        # padding has no token there: all of its tokens are read
        targets = valid_targets(x[:, 1:], None, mask[:, 1:] & mask[:, :-1])
        return Batch(x[:, :-1], targets, mask[:, :-1]), state

    def _per_segment_faults(self, per_segment: dict, rows: int, segments: int) -> list[tuple[str, Tensor]]:
        """Returns the checks of the values of further arguments, whose names and shapes are checked here."""
        parameters = inspect.signature(self.model.advance).parameters
        takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        takes = set(parameters) - {*inspect.signature(SegmentModel.advance).parameters, 'cuts'}
        for name, value in per_segment.items():
            if name not in takes and not takes_any:
                known = ', '.join(sorted(takes)) or 'no further arguments'
                raise ValueError(f'per_segment has {name!r}, but {type(self.model).__name__}.advance takes {known}')
            if not isinstance(value, Tensor) or tuple(value.shape) != (rows, segments):
                found = tuple(value.shape) if isinstance(value, Tensor) else f'no shape, but is {value!r}'
                raise ValueError(
                    f'{name} has shape {found}: give one value a segment, (batch, segments) = {rows, segments}'
                )
            if value.device != self.model.device:
                raise ValueError(f'{name} is on {value.device}, the model on {self.model.device}: move one of them')
        return self.model.per_segment_faults(per_segment)

    def _windows(self, batch: Batch, backprop_segments: int | None, segment_length: int | None = None) -> list[Window]:
        length, columns = self._length(segment_length), batch.tokens.shape[1]
        if self.model.chain is not None:
            if self.check_values:
                self.model.chain.check_same(batch.tokens, batch.targets, batch.mask)
            return [self._window_of_rank(columns, length, backprop_segments)]
        return plan_windows(
            columns,
            length,
            align=self.align,
            segments_per_pass=self.segments_per_pass or segments_at_once(self.model, length, batch.tokens.shape[0]),
            backprop_segments=backprop_segments,
        )

    def _window_of_rank(self, columns: int, length: int, backprop_segments: int | None) -> Window:
        """Returns the window of this rank inside `distributed.context_parallel`."""
        chain = self.model.chain
        assert chain is not None
        if self.align == 'right':
            raise ValueError("align='right' inside context_parallel: the first segment must be whole, use 'left'")
        segments = -(-columns // length)
        most = -(-segments // chain.size)
        if self.segments_per_pass is not None and self.segments_per_pass < most:
            raise ValueError(
                f'segments_per_pass={self.segments_per_pass}, but each rank of context_parallel reads up to {most} '
                'segments, and all of them at once, since the next rank waits for its memories layer by layer: leave '
                'segments_per_pass out, or use more ranks'
            )
        return window_of_rank(columns, length, chain, backprop_segments=backprop_segments)

    def _shared(self, state: State) -> State:
        """Returns the state after the sequence: inside `distributed.context_parallel` it is that of the last rank."""
        return state if self.model.chain is None else self.model.chain.last(state)


def same_option(old_name: str, old: int | None, backprop_segments: int | None) -> int | None:
    """Returns the value of backprop_segments, which can be given by its own name or by its published name.

    Args:
        old_name: the published name, for the error message.
        old: the value given by the published name, or None.
        backprop_segments: the value given by the name backprop_segments, or None.

    Raises:
        ValueError: if both are given and differ, or if the value is no number of segments.
    """
    check_count(old_name, old)
    if old is not None and backprop_segments is not None and old != backprop_segments:
        raise ValueError(f'{old_name}={old} and backprop_segments={backprop_segments} mean the same: give one')
    return backprop_segments if old is None else old


def _checked_length(model: SegmentModel, length: int | None) -> int:
    limit = model.max_segment_length
    if length is None:
        raise ValueError('segment_length is None, and the model has no max_segment_length: give segment_length=')
    if not is_whole(length) or length < 1 or (limit is not None and length > limit):
        allowed = 'a whole number from 1 on' if limit is None else f'1 to {limit}, the longest segment of this model'
        raise ValueError(f'segment_length is {length!r}: give {allowed}')
    return length
