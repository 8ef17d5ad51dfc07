"""The calls that users of the published package know, over `SegmentWrapper`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from infini_transformer_pytorch.infini import InfiniTransformer
from segment_recurrence_pytorch.generation import Cursor, new_token_count
from segment_recurrence_pytorch.sampling import has_filter, top_p
from segment_recurrence_pytorch.wrapper import SegmentWrapper, same_option


class InfiniTransformerWrapper(SegmentWrapper):
    """Trains an `InfiniTransformer` on sequences of any length, and generates from it.

    Gradients are exact, through the whole sequence. detach_mems_every_num_segments is the published name of
    backprop_segments, which cuts them at every k-th segment border. segments_per_pass: how many segments are evaluated
    at once (default: about 8,192 tokens); it changes speed and memory, no number. ignore_index: as published, ids with
    this value (and with -100) are padding. The other arguments: see `SegmentWrapper`.
    """

    model: InfiniTransformer

    @beartype
    def __init__(
        self,
        model: InfiniTransformer,
        segment_length: int = 512,
        detach_mems_every_num_segments: int | None = None,
        ignore_index: int = -1,
        *,
        segments_per_pass: int | None = None,
        backprop_segments: int | None = None,
        recompute: bool = False,
    ):
        if not model.parallel_segments and segments_per_pass is not None:
            raise ValueError(
                f"segments_per_pass={segments_per_pass}: a model with mem_read_from='above' reads one segment at a time"
            )
        super().__init__(
            model,
            segment_length=segment_length,
            segments_per_pass=segments_per_pass,
            backprop_segments=same_option(
                'detach_mems_every_num_segments', detach_mems_every_num_segments, backprop_segments
            ),
            recompute=recompute,
            ignore_index=ignore_index,
        )

    @beartype
    def forward(
        self,
        seq: Tensor,
        segment_length: int | None = None,
        backward: bool = False,
        grad_accum_scale: int | float = 1.0,
        *,
        past_memories: Any = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        return_memories: bool = False,
        backward_fn: Callable | None = None,
    ) -> Any:
        """The loss of seq (b, any length), times grad_accum_scale (1 / accumulation steps); and, with
        return_memories=True, the memories to go on with: the next piece starts with the last token of this one.

        backward=True runs backward here, in training mode, with one window of segments held at a time, and returns a
        loss without a graph. Labels, mask and backward_fn: see `SegmentWrapper.loss`.
        """
        modes = {module: module.training for module in self.modules()}
        options: dict[str, Any] = {}
        if backward:
            run_backward = backward_fn or Tensor.backward
            options = {'backward': True, 'backward_fn': lambda loss: run_backward(loss * grad_accum_scale)}
            self.train()
        try:
            loss, _, state = self.loss(
                seq, past_memories, labels=labels, mask=mask, segment_length=segment_length, **options
            )
        finally:
            for module, mode in modes.items():
                module.training = mode
        loss = loss * grad_accum_scale
        return (loss, state) if return_memories else loss

    @beartype
    def generate(
        self,
        *,
        seq_len: int | None = None,
        prompt: Any = None,
        max_new_tokens: int | None = None,
        batch_size: int = 1,
        filter_fn: Callable | None = None,
        filter_kwargs: dict | None = None,
        exclude_prompt: bool = True,
        past_memories: Any = None,
        **options: Any,
    ) -> Any:
        """New tokens (b, seq_len - n) after prompt (b, n): seq_len counts the prompt, as published; or max_new_tokens.

        exclude_prompt=False: the prompt (b, n) stands in front of them. Without a prompt, and without a `Cursor` as
        past_memories, batch_size rows start from start_token=0, which counts as the prompt.
        filter_fn(logits, **filter_kwargs) -> logits; `sampling.top_p` unless top_k, top_p or min_p is given.
        The other options: see `SegmentWrapper.generate_tokens`.
        """
        if prompt is None and not isinstance(past_memories, Cursor):
            prompt = torch.full((batch_size, 1), options.pop('start_token', 0), device=self.model.device)
        if not exclude_prompt and not isinstance(prompt, Tensor):
            raise ValueError('exclude_prompt=False needs a prompt of shape (batch, length)')
        if filter_fn is None and not has_filter(options):
            filter_fn = top_p
        if filter_fn is not None:
            options['filter_fn'] = partial(filter_fn, **(filter_kwargs or {}))
        count = new_token_count('seq_len', seq_len, max_new_tokens, prompt)
        out = self.generate_tokens(prompt, count, state=past_memories, **options)
        if exclude_prompt:
            return out
        new, *cursor = (out,) if isinstance(out, Tensor) else out
        whole = torch.cat((prompt.to(new.device), new), dim=1)
        return (whole, *cursor) if cursor else whole
