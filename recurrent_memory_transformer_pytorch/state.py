"""What the Recurrent Memory Transformer carries from one segment to the next.

Letters: b batch, m memory tokens, l XL positions, g key/value heads, d features of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segment_recurrence_pytorch.checks import check_like


class XLMemory(NamedTuple):
    """Detached keys (before rotation) and values of the last text positions, newest last."""

    keys: Tensor  # (b, depth, g, l, d)
    values: Tensor  # (b, depth, g, l, d)
    counts: Tensor | None  # (b,) valid entries of a row, the newest ones; None: all l, in every row

    @property
    def length(self) -> int:
        """Number of entries, valid or not."""
        return self.keys.shape[3]

    def counted(self) -> XLMemory:
        """The same with an explicit counts: needed where rows differ in length."""
        if self.counts is not None:
            return self
        batch = self.keys.shape[0]
        return self._replace(counts=torch.full((batch,), self.length, device=self.keys.device))

    def padded(self, length: int) -> XLMemory:
        """The same with `length` entries, the ones in front not valid. Needs counts."""
        missing = length - self.length
        keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (self.keys, self.values))
        return XLMemory(keys, values, self.counts)

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None, max_length: int) -> XLMemory:
        """With the text's keys and values (b, depth, g, n, d) behind it, of which the last max_length are kept.
        mask (b, n): padded positions are left out, and valid ones move up to close the gap."""
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

    def check(self, like: XLMemory, max_length: int) -> None:
        """Raises ValueError unless shapes, dtypes and device are those of `like`, with at most max_length entries."""
        if not isinstance(self, XLMemory) or self.keys.ndim != 5:
            raise ValueError('the XL memories of the state are no XLMemory: give what the last call returned')
        if self.length > max_length:
            raise ValueError(f'{self.length} XL memories: this model keeps xl_mem_len={max_length}')
        want = like.keys.new_empty(()).expand(*like.keys.shape[:3], self.length, like.keys.shape[4])
        check_like('XL keys', self.keys, want)
        check_like('XL values', self.values, want)
        if self.counts is not None:
            check_like('XL counts', self.counts, torch.empty(len(want), dtype=torch.long, device=want.device))

    def valid(self) -> Tensor:
        """(b, l) bool: which entries are valid."""
        batch, device = self.keys.shape[0], self.keys.device
        if self.counts is None:
            return torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return _newest(self.counts, self.length)


class PastMemories(NamedTuple):
    """The memories that entered the segments before, newest last, in a buffer of fixed size: for `axial`."""

    memories: Tensor  # (b, t, m, dim)
    counts: Tensor  # (b,) valid entries of a row, the newest ones

    def append(self, memory: Tensor) -> PastMemories:
        """With a memory (b, m, dim) behind it; the oldest one goes."""
        length = self.memories.shape[1]
        if not length:
            return self
        # cut before joining: a slice of the joined tensor would keep all of it alive
        memories = torch.cat((self.memories[:, 1:], memory[:, None]), dim=1)
        return PastMemories(memories, (self.counts + 1).clamp_max(length))

    def check(self, like: PastMemories) -> None:
        """Raises ValueError unless shapes, dtypes and device are those of `like`."""
        if not isinstance(self, PastMemories):
            raise ValueError('the past memories of the state are no PastMemories: give what the last call returned')
        check_like('past memories', self.memories, like.memories)
        check_like('counts of past memories', self.counts, like.counts)

    def valid(self) -> Tensor:
        """(b, t) bool: which entries are valid."""
        return _newest(self.counts, self.memories.shape[1])


class RMTState(NamedTuple):
    """The memory, and the XL memories and past memories where the model has them."""

    memory: Tensor  # (b, m, dim)
    xl: XLMemory | None = None
    past: PastMemories | None = None

    def past_after(self) -> PastMemories | None:
        """The past memories of the next state: with this memory among them."""
        return None if self.past is None else self.past.append(self.memory)


def _newest(counts: Tensor, length: int) -> Tensor:
    """(b, length) bool: the last counts[i] entries of row i."""
    return torch.arange(length, device=counts.device) >= length - counts[:, None]
