"""Generation by reading the open segment again for every new token: slow, obvious, exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with` block; afterwards every submodule is back in the mode that it was in."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


@torch.no_grad()
def generate_by_rereading(
    model: SegmentModel,
    prompt: Tensor,
    num_tokens: int,
    choose: Callable[[Tensor], Tensor],
    *,
    segment_length: int,
    state: State = None,
) -> Tensor:
    """New tokens (b, num_tokens) after a prompt (b, n), n >= 1. choose: logits (b, v) -> ids (b,).

    A segment is closed, and its memory written, when the token after its last one arrives.
    """
    *past, current = prompt.split(segment_length, dim=1)
    with evaluating(model):
        for segment in past:
            _, state = model.advance(segment, state, need_hidden=False)
        tokens = []
        for _ in range(num_tokens):
            hidden, next_state = model.advance(current, state)
            token = choose(model.to_logits(hidden[:, -1:])[:, 0])[:, None]
            tokens.append(token)
            if current.shape[1] == segment_length:
                current, state = token, next_state
            else:
                current = torch.cat((current, token), dim=1)
    return torch.cat(tokens, dim=1) if tokens else prompt[:, :0]
