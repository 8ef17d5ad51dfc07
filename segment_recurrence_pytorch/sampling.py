"""Choosing the next token from logits, in float32 at least: sampling in half types is biased."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

FilterFn = Callable[..., Tensor]


class Sampler:
    """Chooses tokens: filter_fn, then the repetition penalty, then temperature, then top_k, top_p and min_p.

    temperature: 0 means the most likely token. top_k: that many most likely tokens. top_p: the smallest set whose
    probability reaches it (arXiv 1904.09751). min_p: tokens at least min_p times as likely as the first
    (arXiv 2407.01082). repetition_penalty: divides positive and multiplies negative logits of tokens that occurred
    (arXiv 1909.05858). filter_fn: logits (b, v) -> logits. generator: of the random numbers.
    ValueError for values outside their range.
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
        if not 0 <= temperature < inf:
            raise ValueError(f'temperature is {temperature}: give 0 (greedy) or more, and a finite number')
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f'top_k is {top_k}: give a whole number of tokens from 1 on, or None for all')
        for name, value in (('top_p', top_p), ('min_p', min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f'{name} is {value}: give a share in (0, 1], or None')
        if not 0 < repetition_penalty < inf:
            raise ValueError(f'repetition_penalty is {repetition_penalty}: give a number above 0, 1 for none')
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f'generator is a {type(generator).__name__}: give a torch.Generator, or None')
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty, self.filter_fn, self.generator = repetition_penalty, filter_fn, generator

    @property
    def needs_seen(self) -> bool:
        """Whether it asks which tokens occurred."""
        return self.repetition_penalty != 1

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (b,) from logits (b, v), and the largest logit of each row that they were drawn from, (b,): if that
        is not finite there was nothing to draw from, and the token means nothing. seen (b, v) bool: which occurred."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.filter_fn is not None:
            shape = logits.shape
            logits = self.filter_fn(logits.clone())
            if logits.shape != shape:
                raise ValueError(f'filter_fn made {tuple(logits.shape)} of {tuple(shape)}: it must keep the shape')
        if seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        most = logits.amax(dim=-1)
        if self.temperature < torch.finfo(torch.float32).tiny:
            return logits.argmax(dim=-1), most
        logits = _tempered(logits, self.temperature)
        if self.top_k is not None:
            logits = _largest(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return _draw(logits, self.generator), most


def has_filter(options: dict[str, Any]) -> bool:
    """Whether options choose which tokens may be drawn: then no published default does."""
    return any(options.get(name) is not None for name in ('filter_fn', 'top_k', 'top_p', 'min_p'))


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the ceil((1 - thres) * vocabulary) largest logits (b, v), the others become -inf. As published."""
    k = max(1, ceil(round((1 - thres) * logits.shape[-1], 6)))  # 1 - 0.7 is a little more than 0.3
    return _largest(logits, k)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the smallest set of logits (b, v) whose probability reaches thres, the others become -inf."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= thres
    beyond[..., 0] = False
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))


def min_p(logits: Tensor, thres: float = 0.1) -> Tensor:
    """Keeps the logits (b, v) at least thres times as likely as the first, the others become -inf."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < thres * probabilities.amax(dim=-1, keepdim=True), float('-inf'))


def _largest(logits: Tensor, k: int) -> Tensor:
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
