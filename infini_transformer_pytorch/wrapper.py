"""The calls that users of the published package know, over `SegmentWrapper`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from infini_transformer_pytorch.infini import InfiniTransformer
from segment_recurrence_pytorch.checks import check_count, check_finite, is_whole
from segment_recurrence_pytorch.generation import Cursor, new_token_count
from segment_recurrence_pytorch.sampling import has_filter, top_p
from segment_recurrence_pytorch.wrapper import SegmentWrapper, same_option


class InfiniTransformerWrapper(SegmentWrapper):
    """Trains an `InfiniTransformer` on sequences of any length, and generates from it.

    Args:
        model: the model.
        segment_length: tokens of a segment. Default: 512.
        detach_mems_every_num_segments: the published name of backprop_segments. Default: None, gradients are exact,
            through the whole sequence.
        ignore_index: ids and labels with this value, and with -100, are padding. Default: -1, as published.
        segments_per_pass, backprop_segments, recompute: see `SegmentWrapper`.

    Raises:
        ValueError: for values outside their range, and for two different values of one option.
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
        """Computes the loss of a sequence, and on request its gradients.

        Args:
            seq: ids (b, n) or embeddings (b, n, dim), any n.
            segment_length: instead of the wrapper's. Default: None.
            backward: whether to run backward inside this call, in training mode, with one window of segments held at a
                time. Default: False.
            grad_accum_scale: with backward=True, the gradients are multiplied by it (1 / accumulation steps); the loss
                that is returned is not. Default: 1.
            past_memories: what a call returned as memories: the next piece of a text starts with the last token of the
                piece before. Default: None, texts start.
            labels, mask: see `SegmentWrapper.loss`.
            return_memories: whether to return the memories to go on with, too. Default: False.
            backward_fn: see `SegmentWrapper.loss`; only with backward=True. Default: None.

        Returns:
            The mean loss () in nats, without a graph if backward is True; or (loss, memories).

        Raises:
            ValueError: before anything is changed, for what does not fit.
        """
        check_finite(grad_accum_scale=grad_accum_scale)
        if not backward and grad_accum_scale != 1:
            raise ValueError(
                f'grad_accum_scale={grad_accum_scale} scales the gradients of backward=True: '
                'without it, multiply the loss that is returned'
            )
        options: dict[str, Any] = {'backward_fn': backward_fn}
        modes = {module: module.training for module in self.modules()}
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
        return (loss, state) if return_memories else loss

    @beartype
    def generate(
        self,
        *,
        seq_len: int | None = None,
        prompt: Any = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        filter_fn: Callable | None = None,
        filter_kwargs: dict | None = None,
        exclude_prompt: bool = True,
        past_memories: Any = None,
        **options: Any,
    ) -> Any:
        """Generates new tokens after a prompt.

        Args:
            seq_len: tokens of prompt and new tokens together, as published. Give it or max_new_tokens.
            prompt: ids (b, n), or a list of rows. Default: None, rows begin with start_token, which counts as the
                prompt, unless past_memories is a `Cursor`.
            max_new_tokens: how many new tokens.
            batch_size: without a prompt: how many rows. Default: None, one.
            filter_fn: called with logits and filter_kwargs, returns logits. Default: None, `sampling.top_p`, unless
                top_k, top_p or min_p is given.
            filter_kwargs: further arguments of filter_fn. Default: None.
            exclude_prompt: False puts the prompt (b, n) in front of the new tokens. Default: True.
            past_memories: what a call returned, or a `Cursor`. Default: None, texts start.
            options: see `SegmentWrapper.generate_tokens`.

        Returns:
            The new tokens (b, seq_len - n), and the cursor too if return_cursor is True.

        Raises:
            ValueError: for what does not fit.
        """
        if prompt is None and not isinstance(past_memories, Cursor):
            check_count('batch_size', batch_size)
            start = options.pop('start_token', 0)
            if not (is_whole(start) and 0 <= start < self.model.num_tokens):
                raise ValueError(f'start_token is {start!r}: give a token id in [0, {self.model.num_tokens})')
            prompt = torch.full((batch_size or 1, 1), start, device=self.model.device)
        elif batch_size is not None:
            raise ValueError(f'batch_size={batch_size} begins new rows: give no prompt and no cursor')
        if not exclude_prompt and not isinstance(prompt, Tensor):
            raise ValueError('exclude_prompt=False needs a prompt of shape (batch, length)')
        if filter_fn is None and not has_filter(options):
            filter_fn = top_p
        if filter_fn is not None:
            options['filter_fn'] = partial(filter_fn, **(filter_kwargs or {}))
        elif filter_kwargs:
            raise ValueError(f'filter_kwargs={filter_kwargs} are of filter_fn: give it too, or leave them out')
        count = new_token_count('seq_len', seq_len, max_new_tokens, prompt)
        out = self.generate_tokens(prompt, count, state=past_memories, **options)
        if exclude_prompt:
            return out
        new, *cursor = (out,) if isinstance(out, Tensor) else out
        whole = torch.cat((prompt.to(new.device), new), dim=1)
        return (whole, *cursor) if cursor else whole
