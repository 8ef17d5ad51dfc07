"""Choosing the next token from logits. It is done in float32 at least, since sampling in half types is biased.

Letters: b rows of the batch, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from segment_recurrence_pytorch.checks import is_number, is_whole
from segment_recurrence_pytorch.loss import at_least_float32

FilterFn = Callable[..., Tensor]


class Sampler:
    """Chooses a token for each row from its logits.

    The steps come in this order: filter_fn, repetition_penalty, temperature, top_k, top_p, min_p, and then the draw.

    Args:
        temperature: divides the logits. With 0 the most likely token is taken. Default: 1.
        top_k: keeps the top_k most likely tokens. Default: None, all tokens.
        top_p: keeps the smallest set of most likely tokens whose probabilities sum to at least top_p, in (0, 1] (arXiv
            1904.09751). Default: None, all tokens.
        min_p: keeps the tokens that are at least min_p times as likely as the most likely one, in (0, 1] (arXiv
            2407.01082). Default: None, all tokens.
        repetition_penalty: makes tokens that occurred before less likely, if above 1: it divides their positive logits
            and multiplies their negative ones (arXiv 1909.05858). Default: 1, no penalty.
        filter_fn: a function from logits (b, v) to logits (b, v). Default: None.
        generator: the generator of the random numbers. Default: None, PyTorch's default generator.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        filter_fn: FilterFn | None = None,
        generator: torch.Generator | None = None,
    ):
        if not (is_number(temperature) and 0 <= temperature < inf):
            raise ValueError(f'temperature is {temperature!r}: give 0 (greedy) or more, and a finite number')
        if top_k is not None and not (is_whole(top_k) and top_k >= 1):
            raise ValueError(f'top_k is {top_k!r}: give a whole number of tokens from 1 on, or None for all')
        for name, value in (('top_p', top_p), ('min_p', min_p)):
            if value is not None and not (is_number(value) and 0 < value <= 1):
                raise ValueError(f'{name} is {value!r}: give a share in (0, 1], or None')
        if not (is_number(repetition_penalty) and 0 < repetition_penalty < inf):
            raise ValueError(f'repetition_penalty is {repetition_penalty!r}: give a number above 0, 1 for none')
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f'generator is a {type(generator).__name__}: give a torch.Generator, or None')
        if filter_fn is not None and not callable(filter_fn):
            raise ValueError(f'filter_fn is a {type(filter_fn).__name__}: give a function of logits, or None')
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self.filter_fn = filter_fn
        self.generator = generator

    @property
    def needs_seen(self) -> bool:
        """Whether the argument `seen` is needed, which tells what tokens occurred before."""
        return self.repetition_penalty != 1

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses one token for each row.

        Args:
            logits: (b, v).
            seen: which tokens occurred before in each row, (b, v) bool. Default: None, there is no repetition penalty.

        Returns:
            The token ids (b,), and the largest logit of each row after filter_fn and the penalty, (b,). If the largest
            logit of a row is not finite, no token could be drawn, and the id of that row means nothing.

        Raises:
            ValueError: if filter_fn returns something other than logits of the same shape and device.
        """
        logits = at_least_float32(logits)
        if self.filter_fn is not None:
            shape, device = logits.shape, logits.device
            logits = self.filter_fn(logits.clone())
            if not isinstance(logits, Tensor) or logits.shape != shape:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else f'a {type(logits).__name__}'
                raise ValueError(f'filter_fn made {found} of {tuple(shape)}: it must return logits of the same shape')
            if not logits.is_floating_point() or logits.device != device:
                raise ValueError(
                    f'filter_fn made {logits.dtype} on {logits.device}: it must return floating point on {device}'
                )
            logits = at_least_float32(logits)
        if seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        largest = logits.amax(dim=-1)
        if self.temperature < torch.finfo(torch.float32).tiny:
            return logits.argmax(dim=-1), largest
        logits = _tempered(logits, self.temperature)
        if self.top_k is not None:
            logits = _keep_largest(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return _draw(logits, self.generator), largest


def has_filter(options: Mapping[str, Any]) -> bool:
    """Returns whether the options of a call restrict which tokens can be drawn. A published default filter is then not
    used.

    Args:
        options: the options by name.
    """
    return any(options.get(name) is not None for name in ('filter_fn', 'top_k', 'top_p', 'min_p'))


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Returns the logits (b, v) with only the ceil((1 - thres) * v) largest of each row kept; the others become -inf.

    This is the filter of recurrent-memory-transformer-pytorch, with its argument.

    Args:
        logits: (b, v).
        thres: share of the tokens to remove, in [0, 1]. Default: 0.9.
    """
    _check_share(thres)
    k = max(1, ceil(round((1 - thres) * logits.shape[-1], 6)))  # in floating point, 1 - 0.7 is a little more than 0.3
    return _keep_largest(logits, k)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Returns the logits (b, v) with only the most likely tokens of each row kept; the others become -inf.

    Args:
        logits: (b, v).
        thres: the kept tokens are the smallest set whose probabilities sum to at least thres, in [0, 1]. Default: 0.9.
    """
    _check_share(thres)
    logits = at_least_float32(logits)
    if thres == 1:  # all tokens, although their rounded probabilities may come to 1 before the last one
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= thres
    beyond[..., 0] = False
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))


def min_p(logits: Tensor, thres: float = 0.1) -> Tensor:
    """Returns the logits (b, v) with only the likely tokens of each row kept; the others become -inf.

    Args:
        logits: (b, v).
        thres: a kept token is at least thres times as likely as the most likely one, in [0, 1]. Default: 0.1.
    """
    _check_share(thres)
    logits = at_least_float32(logits)
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < thres * probabilities.amax(dim=-1, keepdim=True), float('-inf'))


def _check_share(thres: float) -> None:
    if not (is_number(thres) and 0 <= thres <= 1):
        raise ValueError(f'thres is {thres!r}: give a share in [0, 1]')


def _keep_largest(logits: Tensor, k: int) -> Tensor:
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, float('-inf')).scatter(-1, ids, values)  # exactly k, also of equal logits


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return logits
    # the largest logit becomes 0, so a small temperature cannot overflow
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    # The first of v exponential clocks to ring, with the probabilities as rates, is a draw from them. Unlike
    # torch.multinomial this does not wait for the device, and a NaN, which the caller reports, does not end the process
    probabilities = logits.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)
