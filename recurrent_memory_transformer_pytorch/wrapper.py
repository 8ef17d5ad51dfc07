"""The wrapper of the Recurrent Memory Transformer, with the calls of recurrent-memory-transformer-pytorch, on top of
`SegmentWrapper`.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer
from segment_recurrence_pytorch.checks import check_count, check_finite, is_number, typed
from segment_recurrence_pytorch.generation import StreamOptions, new_token_count
from segment_recurrence_pytorch.sampling import has_filter, top_k
from segment_recurrence_pytorch.wrapper import SegmentWrapper, same_option


class RecurrentMemoryTransformerWrapper(SegmentWrapper):
    """Trains a `RecurrentMemoryTransformer` on sequences of any length, and generates with it.

    Args:
        transformer: the model.
        truncate_at_step: the published name of backprop_segments. Default: None.
        segment_length: see `SegmentWrapper`. Default: None, the seq_len of the model.
        segments_per_pass: see `SegmentWrapper`. Default: None, one segment.
        backprop_segments: see `SegmentWrapper`. Default: None, gradients are exact, through the whole sequence.
        recompute: see `SegmentWrapper`. Default: False.
        align: see `SegmentWrapper`. Default: 'left'.
        process_group: see `SegmentWrapper`. Default: None.
        check_values: see `SegmentWrapper`. Default: True.

    Raises:
        ValueError: if a value is outside its range, or if an option is given under both names with different values.
    """

    model: RecurrentMemoryTransformer

    @typed
    def __init__(
        self,
        transformer: RecurrentMemoryTransformer,
        truncate_at_step: int | None = None,
        *,
        segment_length: int | None = None,
        segments_per_pass: int | None = None,
        backprop_segments: int | None = None,
        recompute: bool = False,
        align: Literal['left', 'right'] = 'left',
        process_group: Any = None,
        check_values: bool = True,
    ):
        super().__init__(
            transformer,
            segment_length=segment_length,
            segments_per_pass=segments_per_pass,
            backprop_segments=same_option('truncate_at_step', truncate_at_step, backprop_segments),
            recompute=recompute,
            align=align,
            ignore_index=transformer.ignore_index,
            process_group=process_group,
            check_values=check_values,
        )

    @property
    def transformer(self) -> RecurrentMemoryTransformer:
        """The model, under its published name."""
        return self.model

    @typed
    def forward(
        self,
        x: Tensor,
        memories: Any = None,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_loss: bool = False,
        truncate_at_step: int | None = None,
        memory_replay_backprop: bool = False,
        mrbp_loss_weight: int | float = 1.0,
        return_memories: bool = False,
        backward_fn: Callable | None = None,
    ) -> Any:
        """Reads sequences and returns logits or a loss. With memory replay it also runs backward.

        Args:
            x: token ids (b, n) or embeddings (b, n, dim), of any length n.
            memories: the memories that the last call returned, to go on with the same texts. Default: None, new texts
                start.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            labels: target ids (b, n), see `SegmentWrapper.loss`. With labels, a loss is returned. Default: None.
            return_loss: whether to return the loss instead of the logits. Without labels, the targets are the next
                tokens. Default: False.
            truncate_at_step: replaces the wrapper's backprop_segments in this call. Default: None, the wrapper's value.
            memory_replay_backprop: whether to run backward inside this call, by memory replay, while one window is held
                at a time. Default: False.
            mrbp_loss_weight: factor of the loss and its gradients, for example 1 / (number of accumulation steps). It
                needs memory_replay_backprop=True. Default: 1.
            return_memories: whether to return the memories, too. It only matters with memory_replay_backprop=True.
                Default: False.
            backward_fn: see `SegmentWrapper.loss`. It needs memory_replay_backprop=True. Default: None.

        Returns:
            (logits (b, n, num_tokens), memories), or (loss (), memories) with return_loss or labels. With memory replay
            it is only the loss, without a graph, or (loss, memories) if return_memories is True. Losses are means in
            nats.

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
        """
        check_finite(mrbp_loss_weight=mrbp_loss_weight)
        check_count('truncate_at_step', truncate_at_step)
        if memory_replay_backprop:
            backward_fn = backward_fn or Tensor.backward
            loss, _, state = self.loss(
                x,
                memories,
                labels=labels,
                mask=mask,
                backward=True,
                backward_fn=lambda loss: backward_fn(loss * mrbp_loss_weight),
                backprop_segments=truncate_at_step,
            )
            loss = loss * mrbp_loss_weight
            return (loss, self.model.as_memories(state)) if return_memories else loss
        if backward_fn is not None or mrbp_loss_weight != 1.0:
            raise ValueError('backward_fn and mrbp_loss_weight need memory_replay_backprop=True')
        if return_loss or labels is not None:
            loss, _, state = self.loss(x, memories, labels=labels, mask=mask, backprop_segments=truncate_at_step)
            return loss, self.model.as_memories(state)
        logits, state = self.logits(x, memories, mask=mask, backprop_segments=truncate_at_step)
        return logits, self.model.as_memories(state)

    @typed
    def generate(
        self,
        prime: Any = None,
        *,
        length: int | None = None,
        max_new_tokens: int | None = None,
        memories: Any = None,
        filter_thres: int | float | None = None,
        return_cursor: bool = False,
        progress: bool | None = None,
        **options: Unpack[StreamOptions],
    ) -> Any:
        """Generates new tokens after a prompt.

        Args:
            prime: the prompt: token ids (b, n), or a list of rows (n_i,). Default: None, which needs a `Cursor` as
                memories, or batch_size.
            length: number of tokens of the prompt and the new tokens together, as published. Give either length or
                max_new_tokens.
            max_new_tokens: number of new tokens of each row.
            memories: the memories that a call returned, or a `Cursor`. Default: None, new texts start.
            filter_thres: the next token is drawn from the ceil((1 - filter_thres) * num_tokens) most likely ones, in
                [0, 1]. Default: None, 0.9 unless top_k, top_p, min_p or filter_fn is given.
            return_cursor: see `SegmentWrapper.generate_tokens`. Default: False.
            progress: see `SegmentWrapper.generate_tokens`. Default: None.
            options: the other arguments of `SegmentWrapper.stream`.

        Returns:
            The new tokens (b, length - n), and the cursor if return_cursor is True.

        Raises:
            ValueError: if an argument does not fit, or if logits are NaN or infinite.
        """
        if filter_thres is None and not has_filter(options):
            filter_thres = 0.9
        if filter_thres is not None:
            if not (is_number(filter_thres) and 0 <= filter_thres <= 1):
                raise ValueError(f'filter_thres is {filter_thres!r}: give a share in [0, 1]')
            if options.get('filter_fn') is not None:
                raise ValueError(f'filter_thres={filter_thres} and filter_fn: give one of them')
            options['filter_fn'] = partial(top_k, thres=filter_thres)
        count = new_token_count('length', length, max_new_tokens, prime)
        return self.generate_tokens(
            prime, count, state=memories, return_cursor=return_cursor, progress=progress, **options
        )

    @typed
    def reset(self, state: Any, rows: Tensor) -> Any:
        """See `SegmentWrapper.reset`. It takes and returns memories in the form in which `forward` returns them."""
        after = super().reset(state, rows)
        return after.memory if isinstance(state, Tensor) and not isinstance(after, Tensor) else after
