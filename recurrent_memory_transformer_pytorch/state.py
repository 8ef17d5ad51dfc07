"""What the Recurrent Memory Transformer carries from one segment to the next.

Letters: b batch, m memory tokens, l XL positions, t past memories, g key/value heads, d features of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class XLMemory(NamedTuple):
    """Detached keys (before rotation) and values of the last text positions, the newest last.

    Attributes:
        keys: (b, depth, g, l, d).
        values: (b, depth, g, l, d).
        counts: (b,), how many entries of a row are valid: the newest ones. None: all l, in every row.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None

    @property
    def shorter_along(self) -> dict[str, int]:
        """The axis along which a field may be shorter than in the largest state, see `SegmentModel.largest_state`."""
        return {'keys': 3, 'values': 3}

    @property
    def length(self) -> int:
        """The number of entries, valid or not."""
        return self.keys.shape[3]

    def counted(self) -> XLMemory:
        """Returns the same with a tensor as counts, which rows of different length need."""
        if self.counts is not None:
            return self
        batch = self.keys.shape[0]
        return self._replace(counts=torch.full((batch,), self.length, device=self.keys.device))

    def padded(self, length: int) -> XLMemory:
        """Returns the same with `length` entries, those in front not valid. `counts` must be a tensor."""
        missing = length - self.length
        keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (self.keys, self.values))
        return XLMemory(keys, values, self.counts)

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None, max_length: int) -> XLMemory:
        """Returns the memory with the text of a segment behind it, of which the last entries are kept.

        Args:
            keys: of the text, (b, depth, g, n, d).
            values: of the text, (b, depth, g, n, d).
            mask: (b, n) bool; padded positions are left out, and valid ones move up to close the gap. None: all valid.
            max_length: how many entries are kept.
        """
        if mask is None and self.counts is None:
            # cut before joining: a slice of the joined tensor would keep all of it alive
            drop = max(0, self.length + keys.shape[3] - max_length)
            new = [
                torch.cat((old[:, :, :, drop:], fresh[:, :, :, max(0, drop - self.length) :].detach()), dim=3)
                for old, fresh in ((self.keys, keys), (self.values, values))
            ]
            return XLMemory(new[0], new[1], None)
        text_valid = keys.new_ones(keys.shape[0], keys.shape[3], dtype=torch.bool) if mask is None else mask
        valid = torch.cat((self.valid(), text_valid), dim=1)
        # a stable sort moves what is not valid to the front and keeps the order of the rest
        order = valid.int().argsort(dim=1, stable=True)[:, -max_length:]
        kept = valid.gather(1, order)
        index = order[:, None, None, :, None]
        new = []
        for old, fresh in ((self.keys, keys), (self.values, values)):
            both = torch.cat((old, fresh.detach()), dim=3)
            both = both.gather(3, index.expand(*both.shape[:3], -1, both.shape[4]))
            new.append(both.masked_fill(~kept[:, None, None, :, None], 0))
        return XLMemory(new[0], new[1], kept.sum(dim=1))

    def valid(self) -> Tensor:
        """Returns which entries are valid, (b, l) bool."""
        batch, device = self.keys.shape[0], self.keys.device
        if self.counts is None:
            return torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return _newest(self.counts, self.length)


class PastMemories(NamedTuple):
    """The memories that entered the segments before, the newest last, in a buffer of fixed size: for `axial`.

    Attributes:
        memories: (b, t, m, dim).
        counts: (b,), how many entries of a row are valid: the newest ones.
    """

    memories: Tensor
    counts: Tensor

    def append(self, memory: Tensor) -> PastMemories:
        """Returns the past with a memory (b, m, dim) behind it, and without its oldest entry."""
        length = self.memories.shape[1]
        # cut before joining: a slice of the joined tensor would keep all of it alive
        memories = torch.cat((self.memories[:, 1:], memory[:, None]), dim=1) if length else self.memories.clone()
        return PastMemories(memories, (self.counts + 1).clamp_max(length))

    def valid(self) -> Tensor:
        """Returns which entries are valid, (b, t) bool."""
        return _newest(self.counts, self.memories.shape[1])


class RMTState(NamedTuple):
    """The state of a Recurrent Memory Transformer.

    Attributes:
        memory: the memory tokens (b, m, dim).
        xl: the XL memories, None if the model has none.
        past: the memories before, None if the model has no axial attention.
    """

    memory: Tensor
    xl: XLMemory | None = None
    past: PastMemories | None = None


def _newest(counts: Tensor, length: int) -> Tensor:
    """Returns which entries are the last counts[i] of row i, (b, length) bool."""
    return torch.arange(length, device=counts.device) >= length - counts[:, None]
