"""The loss of a model: the sum over the valid targets, divided by their number.

The loss therefore does not depend on how a text is cut into segments, micro-batches or processes.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label that never counts in a loss


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


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log likelihood of each target, (b, n), in nats and at least float32.

    Args:
        logits: (b, n, num_tokens).
        targets: target ids (b, n). Where a target is `IGNORE`, the result is 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction='none')
    return nll.view_as(targets)


def mean_loss(nll_sum: Tensor, num_targets: Tensor) -> Tensor:
    """Returns the mean loss over the valid targets, () in nats. Without any valid target it is 0, with zero gradients.

    Args:
        nll_sum: the negative log likelihood, summed over the valid targets, ().
        num_targets: number of valid targets, ().
    """
    return nll_sum / num_targets.clamp(min=1)
