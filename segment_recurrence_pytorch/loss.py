"""Next-token loss as a sum over valid targets divided by their number, so that it does not depend on how a
text is cut into segments, micro-batches or ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def valid_targets(labels: Tensor, ignore_index: int | None, mask: Tensor | None) -> Tensor:
    """Labels (b, n) with IGNORE where they are `ignore_index`, or where mask (b, n) is False."""
    labels = labels.long()
    if ignore_index is not None:
        labels = labels.masked_fill(labels == ignore_index, IGNORE)
    return labels if mask is None else labels.masked_fill(~mask, IGNORE)


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihoods (b, n) in nats, in float32 at least, 0 where a target is IGNORE."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction='none')
    return nll.view_as(targets)


def mean_loss(nll_sum: Tensor, num_targets: Tensor) -> Tensor:
    """The mean over the valid targets; 0, with zero gradients, if there is none."""
    return nll_sum / num_targets.clamp(min=1)
