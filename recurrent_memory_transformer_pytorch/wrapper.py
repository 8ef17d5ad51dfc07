"""The calls that users of the published package know, over `SegmentWrapper`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from beartype import beartype
from torch import Tensor

from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer
from segment_recurrence_pytorch.checks import check_count, check_finite
from segment_recurrence_pytorch.generation import new_token_count
from segment_recurrence_pytorch.sampling import has_filter, top_k
from segment_recurrence_pytorch.wrapper import SegmentWrapper, same_option


class RecurrentMemoryTransformerWrapper(SegmentWrapper):
    """Trains a `RecurrentMemoryTransformer` on sequences of any length, and generates from it.

    Args:
        transformer: the model.
        truncate_at_step: the published name of backprop_segments. Default: None.
        segment_length, segments_per_pass, backprop_segments, recompute, align: see `SegmentWrapper`.

    Raises:
        ValueError: for values outside their range, and for two different values of one option.
    """

    model: RecurrentMemoryTransformer

    @beartype
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
    ):
        super().__init__(
            transformer,
            segment_length=segment_length,
            segments_per_pass=segments_per_pass,
            backprop_segments=same_option('truncate_at_step', truncate_at_step, backprop_segments),
            recompute=recompute,
            align=align,
            ignore_index=transformer.ignore_index,
        )

    @property
    def transformer(self) -> RecurrentMemoryTransformer:
        """The model, by its published name."""
        return self.model

    @beartype
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
        """Reads sequences, and returns logits or a loss; with memory replay it also runs backward.

        Args:
            x: ids (b, n) or embeddings (b, n, dim), any n.
            memories: what the last call returned. Default: None, texts start.
            mask, labels: see `SegmentWrapper.loss`.
            return_loss: whether to return the loss instead of logits; labels ask for it too. Default: False.
            truncate_at_step: instead of the wrapper's backprop_segments, for this call. Default: None.
            memory_replay_backprop: whether to run backward inside this call, with one segment held at a time.
                Default: False.
            mrbp_loss_weight: with memory replay, the loss and its gradients are multiplied by it
                (1 / accumulation steps). Default: 1.
            return_memories: with memory replay, whether to return the memories beside the loss. Default: False.
            backward_fn: see `SegmentWrapper.loss`; only with memory replay. Default: None.

        Returns:
            (logits (b, n, num_tokens), memories), or (loss (), memories). With memory replay the loss alone, without a
            graph, or (loss, memories) if return_memories is True.

        Raises:
            ValueError: before anything is changed, for what does not fit.
        """
        check_finite(mrbp_loss_weight=mrbp_loss_weight)
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
        check_count('truncate_at_step', truncate_at_step)
        logits, state = self.logits(x, memories, mask=mask)
        return logits, self.model.as_memories(state)

    @beartype
    def generate(
        self,
        prime: Any = None,
        *,
        length: int | None = None,
        max_new_tokens: int | None = None,
        memories: Any = None,
        filter_thres: int | float | None = None,
        **options: Any,
    ) -> Any:
        """Generates new tokens after a prompt.

        Args:
            prime: the prompt: ids (b, n), or a list of rows. Default: None, for a `Cursor` as memories, or with
                batch_size.
            length: tokens of prime and new tokens together, as published. Give it or max_new_tokens.
            max_new_tokens: how many new tokens.
            memories: what a call returned, or a `Cursor`. Default: None, texts start.
            filter_thres: samples from the ceil((1 - filter_thres) * num_tokens) most likely tokens. Default: 0.9,
                unless top_k, top_p, min_p or filter_fn is given.
            options: see `SegmentWrapper.generate_tokens`.

        Returns:
            The new tokens (b, length - n), and the cursor too if return_cursor is True.

        Raises:
            ValueError: for what does not fit.
        """
        if filter_thres is None and not has_filter(options):
            filter_thres = 0.9
        if filter_thres is not None:
            if not 0 <= filter_thres <= 1:
                raise ValueError(f'filter_thres is {filter_thres}: give a share in [0, 1]')
            if 'filter_fn' in options:
                raise ValueError(f'filter_thres={filter_thres} and filter_fn: give one of them')
            options['filter_fn'] = partial(top_k, thres=filter_thres)
        count = new_token_count('length', length, max_new_tokens, prime)
        return self.generate_tokens(prime, count, state=memories, **options)

    @beartype
    def reset(self, state: Any, rows: Tensor) -> Any:
        """See `SegmentWrapper.reset`; takes and returns memories as `forward` returns them, too."""
        after = super().reset(state, rows)
        return after.memory if isinstance(state, Tensor) and not isinstance(after, Tensor) else after
