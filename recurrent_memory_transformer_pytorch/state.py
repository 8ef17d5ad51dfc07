"""The state of the Recurrent Memory Transformer: what it carries from one segment to the next.

Letters: b rows of the batch, n tokens, m memory tokens, l XL positions, t past memories, g key/value heads, d features
of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class XLMemory(NamedTuple):
    """XL memories: the keys and values of the last text positions, without a graph. The newest position comes last.

    Attributes:
        keys: keys before rotation, (b, depth, g, l, d).
        values: (b, depth, g, l, d).
        counts: number of valid positions of each row, (b,). They are the newest ones. None: all l, in every row.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None

    @property
    def shorter_along(self) -> dict[str, int]:
        """The axis along which each field may be shorter than in the largest state. See
        `SegmentModel.largest_state`."""
        return {'keys': 3, 'values': 3}

    def length(self) -> int:
        """Returns the number l of positions, valid or not. PyTorch 2.9 cannot compile a property of a NamedTuple."""
        return self.keys.shape[3]

    def counted(self) -> XLMemory:
        """Returns the same XL memories with a tensor as `counts`, which is needed if rows have different numbers of
        positions."""
        if self.counts is not None:
            return self
        batch = self.keys.shape[0]
        return self._replace(counts=torch.full((batch,), self.length(), device=self.keys.device))

    def padded(self, length: int) -> XLMemory:
        """Returns the same XL memories with more positions, which are added in front and are not valid.

        Args:
            length: the new number of positions. `counts` must be a tensor.
        """
        missing = length - self.length()
        keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (self.keys, self.values))
        return XLMemory(keys, values, self.counts)

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None, max_length: int) -> XLMemory:
        """Returns the XL memories after a segment: its text positions are appended, and only the newest positions are
        kept.

        Args:
            keys: keys of the text before rotation, (b, depth, g, n, d).
            values: values of the text, (b, depth, g, n, d).
            mask: (b, n) bool, True = valid. Padded positions are left out, without a gap. None: all positions are
                valid.
            max_length: largest number of positions to keep.
        """
        if mask is None and self.counts is None:
            # cut before joining: a slice of the joined tensor would keep all of it alive
            drop = max(0, self.length() + keys.shape[3] - max_length)
            new = [
                torch.cat((old[:, :, :, drop:], fresh[:, :, :, max(0, drop - self.length()) :].detach()), dim=3)
                for old, fresh in ((self.keys, keys), (self.values, values))
            ]
            return XLMemory(new[0], new[1], None)
        text_valid = keys.new_ones(keys.shape[0], keys.shape[3], dtype=torch.bool) if mask is None else mask
        valid = torch.cat((self.valid(), text_valid), dim=1)
        # Moves the positions that are not valid to the front, and keeps the order of the others: a stable sort of two
        # values, which takes no comparisons and has a form in ONNX
        columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        counts = valid.cumsum(dim=1)
        target = torch.where(valid, counts - counts[:, -1:] + valid.shape[1] - 1, columns - counts)
        order = torch.empty_like(target).scatter_(1, target, columns)[:, -max_length:]
        kept = valid.gather(1, order)
        index = order[:, None, None, :, None]
        new = []
        for old, fresh in ((self.keys, keys), (self.values, values)):
            both = torch.cat((old, fresh.detach()), dim=3)
            both = both.gather(3, index.expand(*both.shape[:3], -1, both.shape[4]))
            new.append(both.masked_fill(~kept[:, None, None, :, None], 0))
        return XLMemory(new[0], new[1], kept.sum(dim=1))

    def valid(self) -> Tensor:
        """Returns which positions are valid, (b, l) bool."""
        batch, device = self.keys.shape[0], self.keys.device
        if self.counts is None:
            return torch.ones(batch, self.length(), dtype=torch.bool, device=device)
        return _newest(self.counts, self.length())


class PastMemories(NamedTuple):
    """The memories that entered the segments before, for axial attention (see `axial`). The newest memory comes last.

    Attributes:
        memories: (b, t, m, dim). The number t is always axial_mem_len - 1.
        counts: number of valid memories of each row, (b,). They are the newest ones.
    """

    memories: Tensor
    counts: Tensor

    def append(self, memory: Tensor) -> PastMemories:
        """Returns the past memories with a memory added at the end. The oldest one is dropped.

        Args:
            memory: (b, m, dim).
        """
        length = self.memories.shape[1]
        # cut before joining: a slice of the joined tensor would keep all of it alive
        memories = torch.cat((self.memories[:, 1:], memory[:, None]), dim=1) if length else self.memories.clone()
        return PastMemories(memories, (self.counts + 1).clamp_max(length))

    def valid(self) -> Tensor:
        """Returns which memories are valid, (b, t) bool."""
        return _newest(self.counts, self.memories.shape[1])


class RMTState(NamedTuple):
    """The state of a Recurrent Memory Transformer.

    Attributes:
        memory: the memory tokens (b, m, dim).
        xl: the XL memories. None if the model has none.
        past: the memories that entered the segments before. None if the model has no axial attention.
    """

    memory: Tensor
    xl: XLMemory | None = None
    past: PastMemories | None = None


def _newest(counts: Tensor, length: int) -> Tensor:
    """Returns a mask (b, length) that is True for the last counts[i] entries of row i."""
    return torch.arange(length, device=counts.device) >= length - counts[:, None]
