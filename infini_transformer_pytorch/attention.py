"""Infini-attention: causal attention inside each segment, and a compressive memory of all segments before it.

Letters: s segments, b batch, h query heads, g key/value heads, n tokens of a segment, d features of a head.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_transformer_pytorch.memory import Memories, Writes, mix, read, write
from segment_recurrence_pytorch.attention import attend
from segment_recurrence_pytorch.layers import ResidualBlock, no_autocast, rotary_turns, rotate

NORM_EPS = 1e-12  # the published package has none to speak of, and its checkpoints are loaded
ROTARY_THETA = 10000.0
# a token keeps sigmoid(8) = 0.9997 of the memory at the start, so 512 tokens keep 0.84
DECAY_BIAS = 8.0
# off-diagonal entries of a memory transform start at exp(-6) = 0.0025: near the identity, and able to move
TRANSFORM_START = -6.0


class CachedKV(NamedTuple):
    """Keys before rotation and values of a segment's tokens so far (2, b, g, n, d), with their strength and decay."""

    kv: Tensor
    strength: Tensor | None = None
    log_decay: Tensor | None = None

    @classmethod
    def of_last_segment(cls, writes: Writes) -> CachedKV:
        """The cache after the last of some segments."""
        strength, log_decay = (None if part is None else part[-1] for part in (writes.strength, writes.log_decay))
        return cls(torch.stack((writes.keys[-1], writes.values[-1])), strength, log_decay)

    def followed_by(self, new: Writes) -> Writes:
        """All tokens of the segment: those in the cache, then the new ones (s = 1)."""
        keys, values = (torch.cat((old[None], fresh), dim=3) for old, fresh in zip(self.kv, new[:2], strict=True))
        strength, log_decay = (
            None if old is None or fresh is None else torch.cat((old[None], fresh), dim=3)
            for old, fresh in ((self.strength, new.strength), (self.log_decay, new.log_decay))
        )
        return Writes(keys, values, strength, log_decay)


class FastweightMemory(nn.Module):
    """The compressive memory as a module, usable in any attention layer; see `memory` for rules and equations.

    heads: query heads, each with a gate: sigmoid(gate) is the share of the local attention, published sign.
    kv_heads: memories (default `heads`), each read by heads / kv_heads query heads.
    mem_transform: what is read passes through 'talking_heads' (mixes the heads' memories) or 'kv_proj' (a projection of
        M's keys and one of its values), both near the identity at the start.
    """

    def __init__(
        self,
        heads: int,
        head_gate_init_value: float = 0.0,
        use_mem_delta_rule: bool = False,
        *,
        kv_heads: int | None = None,
        memory_rule: str | None = None,
        strength_in_normaliser: bool = True,
        mem_transform: str | None = None,
        dim_head: int | None = None,
    ):
        super().__init__()
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.memory_rule = memory_rule or ('delta' if use_mem_delta_rule else 'linear')
        self.strength_in_normaliser = strength_in_normaliser
        self.mem_transform = mem_transform
        self.head_gates = nn.Parameter(torch.full((heads,), float(head_gate_init_value)))
        if mem_transform == 'talking_heads':
            self.talking_heads = nn.Parameter(torch.full((self.kv_heads, self.kv_heads), TRANSFORM_START))
        elif mem_transform == 'kv_proj':
            assert dim_head is not None
            start = torch.full((self.kv_heads, dim_head, dim_head), TRANSFORM_START - log(dim_head))
            self.key_proj = nn.Parameter(start)
            self.value_proj = nn.Parameter(torch.eye(dim_head).repeat(self.kv_heads, 1, 1))

    def create_new_memories(
        self, keys: Tensor, values: Tensor, past_memories: Memories | None = None, weights: Tensor | None = None,
        *, mask: Tensor | None = None,
    ) -> Memories:  # fmt: skip
        """The memories after one segment with keys (b, g, n, d) and values (b, g, n, e).

        weights (b, g, n, 1): the share of each token that is not stored (published sign: 1 - strength).
        mask (b, n): True = valid.
        """
        strength = None if weights is None else (1 - weights)[None, ..., 0]
        writes = Writes(keys[None], values[None], strength, None, None if mask is None else mask[None])
        past = empty_memories(keys, values.shape[-1]) if past_memories is None else past_memories
        return self.write(writes, past)[1]

    def retrieve_and_add_to_output(self, out: Tensor, queries: Tensor, past_memories: Memories | None = None) -> Tensor:
        """Local output (b, h, n, e) mixed with what queries (b, h, n, d), before rotation, recall."""
        if past_memories is None:
            return out
        return self.recall(out[None], queries[None], Memories(*(part[None] for part in past_memories)))[0]

    def write(self, writes: Writes, past: Memories) -> tuple[Memories, Memories]:
        """See `memory.write`, with this module's rule."""
        return write(writes, past, self.memory_rule, strength_in_normaliser=self.strength_in_normaliser)

    def recall(self, local: Tensor, queries: Tensor, memories: Memories) -> Tensor:
        """Local output (s, b, h, n, e) mixed with what queries (s, b, h, n, d) recall from the memories that enter."""
        recalled, written = read(queries, self.transformed(memories), self.memory_rule)
        return mix(local, recalled, written, self.head_gates)

    def transformed(self, memories: Memories) -> Memories:
        """The memories as they are read: M and z through the same positive maps, so that a read stays a mean."""
        kv_mem, k_norm = memories
        with no_autocast(kv_mem.device.type):
            if self.mem_transform == 'talking_heads':
                over_heads = _near_identity(self.talking_heads, kv_mem.dtype)
                kv_mem = torch.einsum('hg,sbgde->sbhde', over_heads, kv_mem)
                k_norm = torch.einsum('hg,sbgd->sbhd', over_heads, k_norm)
            elif self.mem_transform == 'kv_proj':
                over_keys = _near_identity(self.key_proj, kv_mem.dtype)
                kv_mem = over_keys @ kv_mem @ self.value_proj.to(kv_mem.dtype)
                k_norm = (over_keys @ k_norm[..., None])[..., 0]
        return Memories(kv_mem, k_norm)


class InfiniAttention(nn.Module):
    """The attention of one layer over the segments of a window, all at once."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        dim_head: int,
        dropout: float,
        qk_norm: bool,
        learned_strength: bool,
        memory_decay: bool,
        **memory,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.dim_head, self.dropout = heads, kv_heads, dim_head, dropout
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.to_strength = nn.Linear(dim, kv_heads, bias=False) if learned_strength else None
        self.to_decay = nn.Linear(dim, kv_heads) if memory_decay else None
        self.fastweight_mem = FastweightMemory(heads, kv_heads=kv_heads, dim_head=dim_head, **memory)

    def forward(
        self,
        x: Tensor,
        past: Memories,
        *,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        backend: str,
        need_output: bool = True,
        read_from: Memories | None = None,
        cached: CachedKV | None = None,
        write_scale: Tensor | None = None,
    ) -> tuple[Tensor | None, Memories, Writes]:
        """x (s, b, n, dim) normed. past: the memories entering the first segment, (b, g, ...).

        mask (s, b, n): which keys are written. attn_mask: for the local attention, None = causal.
        read_from: memories to read instead of the layer's own (b, g, ...), for one segment.
        write_scale (s, b): how often each segment is written.
        cached: keys and values of the segment's tokens before x, for one segment.
        Returns output (s, b, n, dim), the memories after the last segment, and what was written.
        """
        query, k, v, strength, log_decay = self.project(x, need_output)
        writes = Writes(k, v, strength, log_decay, mask, write_scale)
        if cached is not None:
            writes = cached.followed_by(writes)
        entering, after = self.fastweight_mem.write(writes, past)
        if query is None:
            return None, after, writes
        local = self._local(query, writes.keys, writes.values, attn_mask, backend)
        memories = entering if read_from is None else Memories(*(part[None] for part in read_from))
        out = self.fastweight_mem.recall(local, query, memories)
        return self.merge(out), after, writes

    def project(
        self, x: Tensor, need_query: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        """x (..., n, dim) normed -> queries (..., h, n, d), keys and values (..., g, n, d), none of them rotated, and
        the strength and log decay (..., g, n). Queries only if need_query."""
        parts = self._parts(self.heads_of(x, need_query))
        # copied once into the order of the products that follow: each of them would copy a view again
        *query, k, v = (part.contiguous() for part in parts)
        return self.q_norm(query[0]) if query else None, self.k_norm(k), v, *self.strength_and_decay(x)

    def heads_of(self, x: Tensor, need_query: bool = True) -> Tensor:
        """x (..., n, dim) normed -> queries, keys and values side by side (..., h + 2 g, n, d), as projected."""
        heads = self.to_qkv(x) if need_query else F.linear(x, self.to_qkv.weight[self.heads * self.dim_head :])
        return heads.unflatten(-1, (-1, self.dim_head)).transpose(-3, -2)

    def normed(self, heads: Tensor) -> Tensor:
        """What `heads_of` returned, after the norms of queries and keys."""
        if isinstance(self.q_norm, nn.Identity):
            return heads
        q, k, v = self._parts(heads)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-3)

    def _parts(self, heads: Tensor) -> tuple[Tensor, ...]:
        """Queries, if there are any, keys and values."""
        have_query = [self.heads] * (heads.shape[-3] > 2 * self.kv_heads)
        return heads.split([*have_query, self.kv_heads, self.kv_heads], dim=-3)

    def merge(self, out: Tensor) -> Tensor:
        """(..., h, n, d) -> (..., n, dim)."""
        return self.to_out(out.transpose(-3, -2).flatten(-2))

    def _local(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, backend: str) -> Tensor:
        """Causal attention inside each segment, positions counted from its start; the queries are its last ones."""
        segments, length = k.shape[0], k.shape[3]
        turns = self.turns(length)
        q, k = rotate(q, turns[length - q.shape[3] :]), rotate(k, turns)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, causal=attn_mask is None, mask=attn_mask, dropout=dropout, backend=backend)
        return out.unflatten(0, (segments, -1))

    def turns(self, length: int) -> Tensor:
        """The rotations of the positions of a segment, see `layers.rotary_turns`."""
        weight = self.to_out.weight
        positions = torch.arange(length, device=weight.device)
        return rotary_turns(positions, self.dim_head, theta=ROTARY_THETA, dtype=weight.dtype)

    def strength_and_decay(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """beta and log gamma (..., g, n) of each token, in float32 at least."""
        strength = log_decay = None
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.to_strength is not None:
            strength = self.to_strength(x).to(wide).sigmoid().transpose(-1, -2)
        if self.to_decay is not None:
            log_decay = F.logsigmoid(self.to_decay(x).to(wide)).transpose(-1, -2)
        return strength, log_decay


class Block(ResidualBlock):
    """One layer; arguments as in `InfiniAttention`."""

    def __init__(self, dim: int, *, ff_mult: float, ff_dropout: float, **attention):
        attn = InfiniAttention(dim, **attention)
        super().__init__(dim, attn, ff_mult=ff_mult, ff_dropout=ff_dropout, norm_eps=NORM_EPS)

    def forward(self, x: Tensor, past: Memories, **attention) -> tuple[Tensor, Memories, Writes]:
        """x (s, b, n, dim) -> the same shape, the memories after the last segment, and what was written."""
        out, after, writes = self.attn(self.attn_norm(x), past, **attention)
        if out is not None:
            x = self.add(x, out)
        return x, after, writes


def empty_memories(like: Tensor, value_features: int | None = None) -> Memories:
    """Memories in which nothing was ever written, for keys (b, g, n, d)."""
    batch, heads, _, features = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    kv_mem = like.new_zeros(batch, heads, features, value_features or features, dtype=dtype)
    return Memories(kv_mem, kv_mem.new_zeros(batch, heads, features))


def _near_identity(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    exponents = exponents.to(dtype)
    return torch.eye(exponents.shape[-1], dtype=dtype, device=exponents.device) + exponents.exp()
