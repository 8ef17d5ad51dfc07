"""Choosing the next token from logits, in float32 at least: sampling in half types is biased."""

from __future__ import annotations

from math import ceil, inf

import torch
from torch import Tensor


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the ceil((1 - thres) * vocabulary) largest logits (b, v), the others become -inf."""
    k = max(1, ceil(round((1 - thres) * logits.shape[-1], 6)))  # 1 - 0.7 is a little more than 0.3
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float('-inf'))


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the smallest set of logits (b, v) whose probability reaches thres, the others become -inf."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= thres
    beyond[..., 0] = False
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float('-inf'))


def sample(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Token ids (b,) drawn from softmax(logits / temperature), logits (b, v); temperature 0: the largest."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(dim=-1)
    # from the largest down: a small temperature must not overflow
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(shifted.softmax(dim=-1), num_samples=1).squeeze(-1)


def check_temperature(temperature: float) -> None:
    """ValueError unless it is a finite number from 0 (greedy) on."""
    if not 0 <= temperature < inf:
        raise ValueError(f'temperature is {temperature}: give 0 (greedy) or more, and a finite number')
