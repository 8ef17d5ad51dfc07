"""The wrapper of the Infini-Transformer, with the calls of infini-transformer-pytorch, on top of `SegmentWrapper`.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from infini_transformer_pytorch.infini import InfiniTransformer
from segment_recurrence_pytorch.checks import check_count, check_finite, is_whole, typed
from segment_recurrence_pytorch.cursor import Cursor
from segment_recurrence_pytorch.generation import GenerationOptions, new_token_count
from segment_recurrence_pytorch.sampling import has_filter, top_p
from segment_recurrence_pytorch.wrapper import SegmentWrapper, same_option


class InfiniTransformerWrapper(SegmentWrapper):
    """Trains an `InfiniTransformer` on sequences of any length, and generates with it.

    Args:
        model: the model.
        segment_length: number of tokens of a segment. Default: 512.
        detach_mems_every_num_segments: the published name of backprop_segments. Default: None.
        ignore_index: labels with this value, or with -100, do not count in the loss. In a call without labels, token
            ids with these values are padding. Default: -1, as published.
        segments_per_pass: see `SegmentWrapper`. Default: None.
        backprop_segments: see `SegmentWrapper`. Default: None, gradients are exact, through the whole sequence.
        recompute: see `SegmentWrapper`. Default: False.
        process_group: see `SegmentWrapper`. Default: None.
        check_values: see `SegmentWrapper`. Default: True.

    Raises:
        ValueError: if a value is outside its range, or if an option is given under both names with different values.
    """

    model: InfiniTransformer

    @typed
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
        process_group: Any = None,
        check_values: bool = True,
    ):
        super().__init__(
            model,
            segment_length=segment_length,
            segments_per_pass=segments_per_pass,
            backprop_segments=same_option(
                'detach_mems_every_num_segments', detach_mems_every_num_segments, backprop_segments
            ),
            recompute=recompute,
            ignore_index=ignore_index,
            process_group=process_group,
            check_values=check_values,
        )

    @typed
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
        """Computes the loss of a sequence, and its gradients if backward is True.

        Args:
            seq: token ids (b, n) or embeddings (b, n, dim), of any length n.
            segment_length: replaces the wrapper's value in this call. Default: None, the wrapper's value.
            backward: whether to run backward inside this call, in training mode, while one window of segments is held
                at a time. Default: False.
            grad_accum_scale: factor of the gradients, for example 1 / (number of accumulation steps). It needs
                backward=True. The loss that is returned is not scaled. Default: 1.
            past_memories: the memories that the last call returned, to go on with the same texts. A piece then has to
                start with the last token of the piece before. Default: None, new texts start.
            labels: target ids (b, n), see `SegmentWrapper.loss`. Default: None, the targets are the next tokens.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            return_memories: whether to return the memories, too, to go on with the same texts. Default: False.
            backward_fn: see `SegmentWrapper.loss`. It needs backward=True. Default: None.

        Returns:
            The mean loss () in nats, without a graph if backward is True. If return_memories is True: (loss, memories).

        Raises:
            ValueError: if an argument does not fit the model or another argument. Nothing has been changed then.
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

    @typed
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
        return_cursor: bool = False,
        progress: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Any:
        """Generates new tokens after a prompt.

        Args:
            seq_len: number of tokens of the prompt and the new tokens together, as published. Give either seq_len or
                max_new_tokens.
            prompt: token ids (b, n), or a list of rows (n_i,). Default: None: generation goes on from a `Cursor` in
                past_memories, or else from start_token, which then is the prompt.
            max_new_tokens: number of new tokens of each row.
            batch_size: number of rows, if there is no prompt and no cursor. Default: None, one row.
            filter_fn: a function that gets logits (b, v) and filter_kwargs, and returns logits (b, v). Default: None,
                `sampling.top_p`, unless top_k, top_p or min_p is given.
            filter_kwargs: further arguments of filter_fn. Default: None.
            exclude_prompt: whether only the new tokens are returned. If False, the prompt (b, n) stands in front of
                them. Default: True.
            past_memories: the memories that a call returned, or a `Cursor`. Default: None, new texts start.
            return_cursor: see `SegmentWrapper.generate_tokens`. Default: False.
            progress: see `SegmentWrapper.generate_tokens`. Default: None.
            options: the other arguments of `SegmentWrapper.stream`.

        Returns:
            The new tokens (b, seq_len - n), and the cursor if return_cursor is True.

        Raises:
            ValueError: if an argument does not fit, or if logits are NaN or infinite.
        """
        if prompt is None and not isinstance(past_memories, Cursor):
            check_count('batch_size', batch_size)
            given = options.pop('start_token', None)
            start = 0 if given is None else given
            if not (is_whole(start) and 0 <= start < self.model.num_tokens):
                raise ValueError(f'start_token is {start!r}: give a token id in [0, {self.model.num_tokens})')
            prompt = torch.full((batch_size or 1, 1), start, device=self.model.device)
        elif batch_size is not None:
            raise ValueError(f'batch_size={batch_size} begins new rows: give no prompt and no cursor')
        if not exclude_prompt and (not isinstance(prompt, Tensor) or options.get('prompt_lengths') is not None):
            raise ValueError('exclude_prompt=False needs a prompt of shape (batch, length), without prompt_lengths')
        if filter_fn is None and not has_filter(options):
            filter_fn = top_p
        if filter_fn is not None:
            filter_fn = partial(filter_fn, **(filter_kwargs or {}))
        elif filter_kwargs:
            raise ValueError(f'filter_kwargs={filter_kwargs} are of filter_fn: give it too, or leave them out')
        count = new_token_count('seq_len', seq_len, max_new_tokens, prompt)
        out = self.generate_tokens(
            prompt,
            count,
            state=past_memories,
            filter_fn=filter_fn,
            return_cursor=return_cursor,
            progress=progress,
            **options,
        )
        if exclude_prompt:
            return out
        new, *cursor = (out,) if isinstance(out, Tensor) else out
        whole = torch.cat((prompt.to(new.device), new), dim=1)
        return (whole, *cursor) if cursor else whole
