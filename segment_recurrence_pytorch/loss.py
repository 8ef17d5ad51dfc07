"""The loss of segments: a sum over valid targets that is divided by their number.

So it does not depend on how a text is cut into segments, micro-batches or processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label that is never counted


def valid_targets(labels: Tensor, ignore_index: int | None, mask: Tensor | None) -> Tensor:
    """Returns labels as int64, with `IGNORE` at every position that is not counted.

    Args:
        labels: target ids (b, n).
        ignore_index: a label that is not counted; None: no such label but `IGNORE`.
        mask: (b, n) bool, False where a position is not counted; None: all are.
    """
    labels = labels.long()
    if ignore_index is not None:
        labels = labels.masked_fill(labels == ignore_index, IGNORE)
    return labels if mask is None else labels.masked_fill(~mask, IGNORE)


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log likelihood of each target, (b, n), in nats and in float32 at least.

    Args:
        logits: (b, n, num_tokens).
        targets: ids (b, n); where one is `IGNORE`, the result is 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction='none')
    return nll.view_as(targets)


def mean_loss(nll_sum: Tensor, num_targets: Tensor) -> Tensor:
    """Returns the mean over the valid targets, () in nats; 0, with zero gradients, if there is none.

    Args:
        nll_sum: the summed negative log likelihood, ().
        num_targets: how many targets it sums, ().
    """
    return nll_sum / num_targets.clamp(min=1)
