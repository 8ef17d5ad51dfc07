"""Choosing the next token from logits, in float32 at least: sampling in half types is biased."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from segment_recurrence_pytorch.checks import is_number, is_whole

FilterFn = Callable[..., Tensor]


class Sampler:
    """Chooses tokens: filter_fn, then the repetition penalty, then temperature, then top_k, top_p and min_p.

    Args:
        temperature: divides the logits; 0 takes the most likely token. Default: 1.
        top_k: draws from that many most likely tokens. Default: None, from all.
        top_p: draws from the smallest set of tokens whose probability reaches it (arXiv 1904.09751). Default: None.
        min_p: draws from the tokens that are at least min_p times as likely as the first one (arXiv 2407.01082).
            Default: None.
        repetition_penalty: divides the positive logits of tokens that occurred, and multiplies the negative ones
            (arXiv 1909.05858). Default: 1, no penalty.
        filter_fn: called with logits (b, v), returns logits (b, v). Default: None.
        generator: of the random numbers. Default: None, torch's own.

    Raises:
        ValueError: for values outside their range.
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
        """Whether it asks which tokens occurred."""
        return self.repetition_penalty != 1

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses one token for each row.

        Args:
            logits: (b, v).
            seen: which tokens occurred, (b, v) bool. Default: None, no penalty.

        Returns:
            Token ids (b,), and the largest logit (b,) of each row that they were drawn from. If that is not finite,
            there was nothing to draw from, and the token means nothing.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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


def has_filter(options: dict[str, Any]) -> bool:
    """Whether options say which tokens may be drawn: then no published default does."""
    return any(options.get(name) is not None for name in ('filter_fn', 'top_k', 'top_p', 'min_p'))


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Returns logits (b, v) of which the ceil((1 - thres) * v) largest are kept; the others are -inf. As published."""
    _check_share(thres)
    k = max(1, ceil(round((1 - thres) * logits.shape[-1], 6)))  # 1 - 0.7 is a little more than 0.3
    return _keep_largest(logits, k)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Returns logits (b, v) of which the smallest set whose probability reaches thres is kept; the others are -inf."""
    _check_share(thres)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= thres
    beyond[..., 0] = False
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))


def min_p(logits: Tensor, thres: float = 0.1) -> Tensor:
    """Returns logits (b, v): those at least thres times as likely as the first are kept, the others are -inf."""
    _check_share(thres)
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < thres * probabilities.amax(dim=-1, keepdim=True), float('-inf'))


def _check_share(thres: float) -> None:
    if not (is_number(thres) and 0 <= thres <= 1):
        raise ValueError(f'thres is {thres!r}: give a share in [0, 1]')


def _keep_largest(logits: Tensor, k: int) -> Tensor:
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float('-inf'))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return logits
    # from the largest down: a small temperature must not overflow
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    # the first of v exponential clocks, with the probabilities as rates: unlike torch.multinomial it waits for no
    # device, and does not end the process at a NaN, which the caller reports
    probabilities = logits.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)
