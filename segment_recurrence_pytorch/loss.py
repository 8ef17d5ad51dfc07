"""The loss of a model: the sum over the valid targets, divided by their number.

The loss therefore does not depend on how a text is cut into segments, micro-batches or processes.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label that never counts in a loss
# logits that are held at once: 256 MB in float32. With a vocabulary of 50,000 these are those of 1,342 tokens
LOGITS_AT_ONCE = 2**26


def valid_targets(labels: Tensor, ignore_index: int | None, mask: Tensor | None) -> Tensor:
    """Returns the labels as int64, with `IGNORE` at every position that does not count in the loss.

    Args:
        labels: target ids (b, n).
        ignore_index: a label that does not count, besides `IGNORE`. None: there is no other such label.
        mask: (b, n) bool, True = valid. Positions where it is False do not count. None: all positions are valid.
    """
    labels = labels.long()
    if ignore_index is not None:
        labels = labels.masked_fill(labels == ignore_index, IGNORE)
    return labels if mask is None else labels.masked_fill(~mask, IGNORE)


def at_least_float32(logits: Tensor) -> Tensor:
    """Returns logits in float32, or as they are if their dtype has more digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log likelihood of each target, (b, n), in nats and at least float32.

    Args:
        logits: (b, n, num_tokens).
        targets: target ids (b, n). Where a target is `IGNORE`, the result is 0.
    """
    nll = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction='none'
    )
    return nll.view_as(targets)


def hidden_nll(
    to_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    num_tokens: int,
    *,
    draws_random: bool = False,
    parts: int = 1,
) -> Tensor:
    """Returns the negative log likelihood of each target, (b, n), in nats and at least float32.

    It holds at most `LOGITS_AT_ONCE` logits, or those of one token. If there are more, they are computed part by part,
    and computed again in backward.

    Args:
        to_logits: a function from hidden states (..., dim) to logits (..., num_tokens).
        hidden: hidden states (b, n, dim).
        targets: target ids (b, n). Where a target is `IGNORE`, the result is 0.
        num_tokens: size of the vocabulary.
        draws_random: whether `to_logits` may draw random numbers. Default: False.
        parts: the least number of parts. Default: 1.
    """

    def of_part(part: Tensor, asked: Tensor) -> Tensor:
        return target_nll(to_logits(part), asked)

    parts = max(parts, parts_of_logits(targets.numel(), num_tokens))
    if parts == 1:
        return of_part(hidden, targets)
    pieces = (each[None].tensor_split(parts, dim=1) for each in (hidden.flatten(0, 1), targets.flatten()))
    found = [
        checkpoint(of_part, *each, use_reentrant=False, preserve_rng_state=draws_random)
        for each in zip(*pieces, strict=True)
    ]
    return torch.cat(found, dim=1).view_as(targets)


def parts_of_logits(targets: int, num_tokens: int) -> int:
    """Returns the number of parts in which the logits of so many targets are computed."""
    return max(1, -(-targets // max(1, LOGITS_AT_ONCE // num_tokens)))


def mean_loss(nll_sum: Tensor, num_targets: Tensor) -> Tensor:
    """Returns the mean loss over the valid targets, () in nats. Without any valid target it is 0, with zero gradients.

    Args:
        nll_sum: the negative log likelihood, summed over the valid targets, ().
        num_targets: number of valid targets, ().
    """
    return nll_sum / num_targets.clamp(min=1)
