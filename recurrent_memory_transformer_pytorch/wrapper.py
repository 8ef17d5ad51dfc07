"""The calls that users of the published package know, over `SegmentWrapper`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from beartype import beartype
from torch import Tensor

from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer
from segment_recurrence_pytorch.sampling import check_temperature, sample, top_k
from segment_recurrence_pytorch.wrapper import SegmentWrapper, check_count, same_option


class RecurrentMemoryTransformerWrapper(SegmentWrapper):
    """Trains a `RecurrentMemoryTransformer` on sequences of any length, and generates from it.

    truncate_at_step: the published name of backprop_segments. The other arguments: see `SegmentWrapper`.
    """

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

    model: RecurrentMemoryTransformer

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
        """(logits, memories), or (loss, memories) with return_loss=True or labels, for x (b, any length).

        memories: what the last call returned. Labels, mask and loss: see `SegmentWrapper.loss`.
        memory_replay_backprop=True runs backward here, on the loss times mrbp_loss_weight (1 / accumulation steps),
        with one segment held at a time; it returns that loss alone, without a graph, and the memories too if
        return_memories=True.
        """
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
        prime: Tensor,
        *,
        length: int,
        memories: Any = None,
        temperature: int | float = 1.0,
        filter_thres: int | float = 0.9,
    ) -> Tensor:
        """New tokens (b, length - n) after prime (b, n): length counts the prime, as published.

        Segments start at the prompt's first token, whatever `align` says.
        Samples from the ceil((1 - filter_thres) * num_tokens) most likely tokens; temperature 0: the most likely one.
        """
        check_temperature(temperature)
        if not 0 <= filter_thres <= 1:
            raise ValueError(f'filter_thres is {filter_thres}: give a share in [0, 1]')
        choose = partial(_choose, temperature=temperature, filter_thres=filter_thres)
        return self.generate_tokens(prime, length - prime.shape[-1], choose, state=memories)

    @beartype
    def reset(self, state: Any, rows: Tensor) -> Any:
        """See `SegmentWrapper.reset`; takes and returns memories as `forward` returns them, too."""
        after = super().reset(state, rows)
        return after.memory if isinstance(state, Tensor) and not isinstance(after, Tensor) else after


def _choose(logits: Tensor, *, temperature: float, filter_thres: float) -> Tensor:
    return sample(top_k(logits, filter_thres), temperature=temperature)
