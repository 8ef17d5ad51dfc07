"""Axial attention: each memory slot looks down the axis of its own past.

A slot is overwritten at the end of every segment. Before a segment reads its memory, slot i of the newest memory
attends to slot i of the memories that entered the segments before it, so that what a slot once held is still there:

    q = W_q norm(x_T),    k_t = W_k norm(x_t) + position_t,    v_t = W_v norm(x_t),    t = 1 .. T, x_T the newest
    read = x_T + W_o softmax(q k / sqrt(d)) v,    beside a learned null key and value

The position enters after the projection; slots do not see each other. W_o starts at 0, so nothing changes at first.

Letters: b batch, t past memories, m memory tokens, h heads, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch.state import PastMemories
from segment_recurrence_pytorch.layers import NORM_EPS, attend


class AxialAttention(nn.Module):
    """Attention of each memory slot over its newest value and its `length - 1` values before it.

    It has no dropout, and always runs on the backend 'sdpa': one query a slot, with a mask.

    Args:
        dim: features of a memory token.
        heads: attention heads.
        dim_head: features of a head.
        length: how many values of a slot are seen, the newest one included.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, length: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.positions = nn.Parameter(torch.empty(length, heads, dim_head))
        self.null_kv = nn.Parameter(torch.empty(2, heads, 1, dim_head))

    def forward(self, memory: Tensor, past: PastMemories) -> Tensor:
        """Returns the memory that a segment reads, (b, m, dim).

        Args:
            memory: the newest memory (b, m, dim).
            past: the memories that entered the segments before.
        """
        batch, m, dim = memory.shape
        heads, d = self.positions.shape[1:]
        series = torch.cat((past.memories.to(memory.dtype), memory[:, None]), dim=1)
        normed = self.norm(series).transpose(1, 2).flatten(0, 1)  # every slot is a row of its own
        q = self.to_q(normed[:, -1:]).unflatten(-1, (heads, d)).transpose(1, 2)
        k, v = self.to_kv(normed).unflatten(-1, (2, heads, d)).permute(2, 0, 3, 1, 4)
        k = k + self.positions.transpose(0, 1).to(k.dtype)
        null_k, null_v = self.null_kv.to(k.dtype)[:, None].expand(-1, len(k), -1, -1, -1)
        k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
        valid = F.pad(past.valid(), (1, 1), value=True)  # null and newest
        mask = valid[:, None, None].repeat_interleave(m, dim=0)
        out = attend(q, k, v, mask=mask, backend='sdpa')
        return memory + self.to_out(out.flatten(1)).view(batch, m, dim)
