"""Axial attention: each memory slot attends to the values that it had before earlier segments.

A slot is one of the m memory tokens. It gets a new value at the end of every segment. With axial attention, information
that a slot held earlier stays within reach. Let x_1 .. x_T be the values of a slot that entered the last segments, x_T
being the newest. The value that goes into the read rows is

    q = W_q norm(x_T),    k_t = W_k norm(x_t) + position_t,    v_t = W_v norm(x_t),    t = 1 .. T
    value = x_T + W_o softmax(q k / sqrt(d)) v

with a learned null key and null value beside those of t = 1 .. T. Positions are added after the projection. Slots do
not see each other. W_o starts at 0, so at first the value is x_T.

Letters: b rows of the batch, t past memories, m memory tokens, h heads, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch.state import PastMemories
from segment_recurrence_pytorch.layers import NORM_EPS, attend


class AxialAttention(nn.Module):
    """Attention of each memory slot to its newest value and to its `length - 1` values before that one.

    It has no dropout, and one query for each slot.

    Args:
        dim: features of a memory token.
        heads: number of attention heads h.
        dim_head: features of a head d.
        length: number of values of a slot that are seen, with the newest one.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, length: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.positions = nn.Parameter(torch.empty(length, heads, dim_head))
        self.null_kv = nn.Parameter(torch.empty(2, heads, 1, dim_head))

    def forward(self, memory: Tensor, past: PastMemories, backend: str = 'sdpa') -> Tensor:
        """Returns the memory that goes into the read rows, (b, m, dim).

        Args:
            memory: the newest memory (b, m, dim).
            past: the memories that entered the segments before.
            backend: the name of an attention backend that takes a mask. Default: 'sdpa'.
        """
        batch, m, dim = memory.shape
        heads, d = self.positions.shape[1:]
        series = torch.cat((past.memories.to(memory.dtype), memory[:, None]), dim=1)
        normed = self.norm(series).transpose(1, 2).flatten(0, 1)  # (b m, t + 1, dim): each slot is a row of the batch
        q = self.to_q(normed[:, -1:]).unflatten(-1, (heads, d)).transpose(1, 2)
        k, v = self.to_kv(normed).unflatten(-1, (2, heads, d)).permute(2, 0, 3, 1, 4)
        k = k + self.positions.transpose(0, 1).to(k.dtype)
        null_k, null_v = self.null_kv.to(k.dtype)[:, None].expand(-1, k.shape[0], -1, -1, -1)
        k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
        valid = F.pad(past.valid(), (1, 1), value=True)  # the null key and the newest value are always valid
        mask = valid[:, None, None].repeat_interleave(m, dim=0)
        out = attend(q, k, v, mask=mask, backend=backend)
        return memory + self.to_out(out.flatten(1)).view(batch, m, dim)
