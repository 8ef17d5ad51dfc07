"""Infini-attention: causal attention inside each segment, and a compressive memory of all segments before it.

Letters: s segments, b batch, h query heads, g key/value heads, n tokens of a segment, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from infini_transformer_pytorch.memory import (
    MEMORY_RULES,
    Memories,
    Recallable,
    Writes,
    local_share,
    mix,
    recall,
    write,
)
from segment_recurrence_pytorch.checks import check_finite, check_like, check_positive
from segment_recurrence_pytorch.layers import HeadNorm, attend, no_autocast, rotate
from segment_recurrence_pytorch.state import copied

NORM_EPS = 1e-12  # the published package has none to speak of, and its checkpoints are loaded
# a token keeps sigmoid(8) = 0.9997 of the memory at the start, so 512 tokens keep 0.84
DECAY_BIAS = 8.0
# off-diagonal entries of a memory transform start at exp(-6) = 0.0025: near the identity, and able to move
TRANSFORM_START = -6.0


class CachedKV(NamedTuple):
    """The tokens of a segment so far, in one layer: what `InfiniTransformer.forward` returns to go on inside it.

    Attributes:
        kv: keys before rotation, and values, (2, b, g, n, d).
        strength: (b, g, n), if the model learns it.
        log_decay: (b, g, n), if the model learns it.
    """

    kv: Tensor
    strength: Tensor | None = None
    log_decay: Tensor | None = None

    @classmethod
    def of_last_segment(cls, writes: Writes) -> CachedKV:
        """Returns the cache after the last of some segments."""
        strength, log_decay = (None if part is None else part[-1] for part in (writes.strength, writes.log_decay))
        return cls(torch.stack((writes.keys[-1], writes.values[-1])), strength, log_decay)

    def followed_by(self, new: Writes) -> Writes:
        """Returns what all tokens of the segment write: those in the cache, then the new ones (s = 1)."""
        keys, values = (torch.cat((old[None], fresh), dim=3) for old, fresh in zip(self.kv, new[:2], strict=True))
        strength, log_decay = (
            None if old is None or fresh is None else torch.cat((old[None], fresh), dim=3)
            for old, fresh in ((self.strength, new.strength), (self.log_decay, new.log_decay))
        )
        return Writes(keys, values, strength, log_decay)


class FastweightMemory(nn.Module):
    """The compressive memory of one layer, for any attention: `memory` has the rules and equations.

    `create_new_memories` writes a segment, and `retrieve_and_add_to_output` mixes what its queries recall into the
    output of the layer's own attention. The README has it in a plain transformer.

    Args:
        heads: query heads, each with a gate: sigmoid(gate) is the share of the layer's own attention (published sign).
        head_gate_init_value: the start of the gates. Default: 0, equal shares.
        use_mem_delta_rule: the published name of memory_rule='delta'. Default: False.
        kv_heads: memories, a divisor of `heads`; consecutive query heads share one. Default: None, `heads`.
        memory_rule: 'linear', 'delta' or 'deltanet'. Default: None, 'delta' if use_mem_delta_rule is True, else
            'linear'.
        strength_in_normaliser: whether the strength of a token also scales what it adds to the normaliser; False as in
            published checkpoints. Default: True.
        mem_transform: what is recalled passes through 'talking_heads', which mixes the heads' memories, or 'kv_proj', a
            projection of keys and one of values; both start near the identity. Default: None, neither.
        dim_head: features of a head; only 'kv_proj' needs it. Default: None.

    Raises:
        ValueError: for values outside their range.
    """

    @beartype
    def __init__(
        self,
        heads: int,
        head_gate_init_value: int | float = 0.0,
        use_mem_delta_rule: bool = False,
        *,
        kv_heads: int | None = None,
        memory_rule: str | None = None,
        strength_in_normaliser: bool = True,
        mem_transform: str | None = None,
        dim_head: int | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(heads=heads, kv_heads=kv_heads)
        check_finite(head_gate_init_value=head_gate_init_value)
        if heads % kv_heads:
            raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
        if use_mem_delta_rule and memory_rule not in (None, 'delta'):
            raise ValueError(
                f"use_mem_delta_rule=True means memory_rule='delta', not {memory_rule!r}: give one of them"
            )
        if memory_rule is None:
            memory_rule = 'delta' if use_mem_delta_rule else 'linear'
        if memory_rule not in MEMORY_RULES:
            raise ValueError(f'memory_rule is {memory_rule!r}: give one of {", ".join(MEMORY_RULES)}')
        if mem_transform not in (None, 'talking_heads', 'kv_proj'):
            raise ValueError(f"mem_transform is {mem_transform!r}: give 'talking_heads', 'kv_proj' or None")
        if mem_transform == 'kv_proj' and dim_head is None:
            raise ValueError("mem_transform='kv_proj' projects the features of a head: give dim_head")
        if dim_head is not None:
            check_positive(dim_head=dim_head)
        self.heads = heads
        self.kv_heads = kv_heads
        self.memory_rule = memory_rule
        self.strength_in_normaliser = strength_in_normaliser
        self.mem_transform = mem_transform
        self.dim_head = dim_head if mem_transform == 'kv_proj' else None
        self.head_gates = nn.Parameter(torch.full((heads,), float(head_gate_init_value)))
        if mem_transform == 'talking_heads':
            self.talking_heads = nn.Parameter(torch.full((kv_heads, kv_heads), TRANSFORM_START))
        elif mem_transform == 'kv_proj' and dim_head is not None:
            start = torch.full((kv_heads, dim_head, dim_head), TRANSFORM_START - log(dim_head))
            self.key_proj = nn.Parameter(start)
            self.value_proj = nn.Parameter(torch.eye(dim_head).repeat(kv_heads, 1, 1))

    def create_new_memories(
        self,
        keys: Tensor,
        values: Tensor,
        past_memories: Memories | None = None,
        weights: Tensor | None = None,
        *,
        strength: Tensor | None = None,
        log_decay: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Memories:
        """Returns the memories after one segment.

        Args:
            keys: before rotation, (b, g, n, d).
            values: (b, g, n, e).
            past_memories: the memories before. Default: None, empty ones.
            weights: the share of each token that is not stored, (b, g, n, 1): the published name and sign of
                1 - strength. Default: None.
            strength: the share of each token that is stored, in [0, 1], (b, g, n). Default: None, all of it.
            log_decay: the logarithm of the share of the memory that each token keeps, at most 0, (b, g, n).
                Default: None, nothing decays.
            mask: (b, n) bool, True = valid; padded tokens write nothing. Default: None, all are valid.

        Raises:
            ValueError: for shapes that do not fit, for a mask that is not bool, and if both weights and strength are
                given.
        """
        if weights is not None and strength is not None:
            raise ValueError('weights are 1 - strength: give only strength')
        batch, _, n, features = _four('keys', keys)
        groups, value_features = self.kv_heads, _four('values', values)[3]
        _check_shapes(
            keys=(keys, (batch, groups, n, self.dim_head or features)),
            values=(values, (batch, groups, n, self.dim_head or value_features)),
            weights=(weights, (batch, groups, n, 1)),
            strength=(strength, (batch, groups, n)),
            log_decay=(log_decay, (batch, groups, n)),
            mask=(mask, (batch, n)),
        )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f'mask is {mask.dtype}: give torch.bool, True = valid')
        empty = empty_memories(keys, value_features)
        past = empty if past_memories is None else _checked_memories(past_memories, empty)
        if not n:
            return copied(past)
        if weights is not None:
            strength = (1 - weights)[..., 0]
        per_token = (None if part is None else part[None] for part in (strength, log_decay, mask))
        return self.write(Writes(keys[None], values[None], *per_token), past)[1]

    def retrieve_and_add_to_output(
        self, out: Tensor, queries: Tensor, past_memories: Memories | None = None, gates: Tensor | None = None
    ) -> Tensor:
        """Returns the output of a layer's own attention, mixed with what its queries recall, (b, h, n, e).

        Args:
            out: what the layer's own attention gives, (b, h, n, e).
            queries: before rotation, (b, h, n, d).
            past_memories: the memories before the segment. Default: None, nothing is mixed in.
            gates: instead of the learned ones; sigmoid(gates) is the share of `out`; broadcast to (b, h, n).
                Default: None.

        Raises:
            ValueError: for shapes that do not fit.
        """
        batch, _, n, features = _four('queries', queries)
        value_features = _four('out', out)[3]
        _check_shapes(
            queries=(queries, (batch, self.heads, n, self.dim_head or features)),
            out=(out, (batch, self.heads, n, self.dim_head or value_features)),
        )
        if gates is not None:
            _check_gates(gates, queries.shape[:3])
        if past_memories is None:
            return out
        past = _checked_memories(past_memories, empty_memories(queries[:, : self.kv_heads], value_features))
        return self.recall(out, queries, self.recallable(past), gates)

    def write(self, writes: Writes, past: Memories) -> tuple[Memories, Memories]:
        """See `memory.write`, with this module's rule."""
        return write(writes, past, self.memory_rule, strength_in_normaliser=self.strength_in_normaliser)

    def recall(self, local: Tensor, queries: Tensor, memories: Recallable, gates: Tensor | None = None) -> Tensor:
        """Returns local attention mixed with what queries recall (equations 3 and 6), (..., b, h, n, e).

        Args:
            local: what the local attention gives, (..., b, h, n, e).
            queries: before rotation, (..., b, h, n, d).
            memories: what `recallable` returned.
            gates: broadcast to (..., b, h, n). Default: None, `head_gates`.
        """
        recalled = recall(queries, memories, self.memory_rule)
        share = memories.share if gates is None else local_share(gates, memories.written, recalled.dtype)
        return mix(local, recalled, share)

    def recallable(self, memories: Memories) -> Recallable:
        """Returns memories (..., b, g, ...) as queries recall from them: through the transform, if there is one.

        M and z pass through the same positive maps, so that what is recalled stays a mean of values.
        """
        kv_mem, k_norm = memories
        with no_autocast(kv_mem.device.type):
            if self.mem_transform == 'talking_heads':
                over_heads = _near_identity(self.talking_heads, kv_mem.dtype)
                kv_mem = torch.einsum('hg,...gde->...hde', over_heads, kv_mem)
                k_norm = torch.einsum('hg,...gd->...hd', over_heads, k_norm)
            elif self.mem_transform == 'kv_proj':
                over_keys = _near_identity(self.key_proj, kv_mem.dtype)
                kv_mem = over_keys @ kv_mem @ self.value_proj.to(kv_mem.dtype)
                k_norm = (over_keys @ k_norm[..., None])[..., 0]
            written = (k_norm > 0).any(-1).repeat_interleave(self.heads // self.kv_heads, dim=-1).unsqueeze(-1)
            share = local_share(self.head_gates.unsqueeze(-1), written, kv_mem.dtype)
        return Recallable(kv_mem.flatten(0, -3), k_norm.flatten(0, -2).unsqueeze(-1), written, share)


class Surroundings(NamedTuple):
    """What the tokens that a layer is given attend to: their segments, or a cache of one.

    Attributes:
        attend: called with the layer's attention, its heads (`InfiniAttention.heads_of`), strength and log decay.
            Returns what the local attention gives, the queries before rotation, and the memories to recall from; or
            None, if no output is needed.
        need_output: whether output is needed, and not just what the tokens write. Default: True.
    """

    attend: Callable[..., tuple[Tensor, Tensor, Recallable] | None]
    need_output: bool = True


class InfiniAttention(nn.Module):
    """The attention of one layer: local attention, and a memory in each head.

    What a researcher may want to replace is one method, which training and decoding share: `gates` makes the gates, and
    `strength_and_decay` what scales and fades the writes.

    Args:
        dim: features of a token.
        heads: query heads.
        kv_heads: key/value heads and memories, a divisor of `heads`.
        dim_head: features of a head.
        dropout: probability that a local attention weight is dropped while training.
        qk_norm: whether queries and keys pass an RMS norm with a learned gain.
        learned_strength: whether each token has a learned strength in each head.
        memory_decay: whether each token has a learned decay in each head.
        memory: further arguments of `FastweightMemory`.
    """

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
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.dropout = dropout
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = HeadNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.to_strength = nn.Linear(dim, kv_heads, bias=False) if learned_strength else None
        self.to_decay = nn.Linear(dim, kv_heads) if memory_decay else None
        self.fastweight_mem = FastweightMemory(heads, kv_heads=kv_heads, dim_head=dim_head, **memory)

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Returns the outputs (..., b, n, dim) of normed tokens x (..., b, n, dim); no token's, if none is needed."""
        heads = self.heads_of(x, surroundings.need_output)
        found = surroundings.attend(self, heads, *self.strength_and_decay(x))
        if found is None:
            return x[..., :0, :]
        local, queries, memories = found
        out = self.fastweight_mem.recall(local, queries, memories, self.gates(x))
        return self.to_out(out.transpose(-3, -2).flatten(-2))

    def gates(self, x: Tensor) -> Tensor | None:
        """Returns the gates of the tokens, broadcast to (..., b, h, n): sigmoid(gate) is the share of the local
        attention. None: the learned gate of each head, `fastweight_mem.head_gates`, for all tokens.

        By default None. Override it to make gates of the tokens.

        Args:
            x: the layer's input after its norm, (..., b, n, dim).
        """
        return None

    def strength_and_decay(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the strength beta and the log decay of each token, (..., b, g, n), in float32 at least; None for what
        is not learned.

        Args:
            x: the layer's input after its norm, (..., b, n, dim).
        """
        strength = log_decay = None
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.to_strength is not None:
            strength = self.to_strength(x).to(dtype).sigmoid().transpose(-1, -2)
        if self.to_decay is not None:
            log_decay = F.logsigmoid(self.to_decay(x).to(dtype)).transpose(-1, -2)
        return strength, log_decay

    def heads_of(self, x: Tensor, need_query: bool = True) -> Tensor:
        """Returns queries, keys and values side by side, as projected, (..., b, h + 2 g, n, d); without the queries
        (..., b, 2 g, n, d) if need_query is False."""
        heads = self.to_qkv(x) if need_query else F.linear(x, self.to_qkv.weight[self.heads * self.dim_head :])
        return heads.unflatten(-1, (-1, self.dim_head)).transpose(-3, -2)

    def split(self, heads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns what `heads_of` returned as queries (None if there are none), keys and values, after the norms."""
        # copied once into the order of the products that follow: each of them would copy a view again
        *query, k, v = (part.contiguous() for part in self._parts(heads))
        return self.q_norm(query[0]) if query else None, self.k_norm(k), v

    def normed(self, heads: Tensor) -> Tensor:
        """Returns what `heads_of` returned, side by side as it was, after the norms of queries and keys."""
        if isinstance(self.q_norm, nn.Identity):
            return heads
        q, k, v = self._parts(heads)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-3)

    def _parts(self, heads: Tensor) -> tuple[Tensor, ...]:
        """Returns queries, if there are any, keys and values."""
        have_query = [self.heads] * (heads.shape[-3] > 2 * self.kv_heads)
        return heads.split([*have_query, self.kv_heads, self.kv_heads], dim=-3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, backend: str
    ) -> Tensor:
        """One call of `layers.attend`, in training and in decoding alike, with this layer's dropout."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, causal=causal, mask=mask, dropout=dropout, backend=backend)


class Segments:
    """The segments of a window, all at once: what their tokens attend to in one layer.

    After `attend` was called it holds what the tokens wrote, and the memories after the last segment.

    Args:
        past: the memories entering the first segment, (b, g, ...).
        rotations: of the positions of a segment, (n, d / 2, 2).
        mask: which keys are written, (s, b, n) bool; None: all.
        attn_mask: of the local attention, (s b, 1, n, n) bool; None: causal.
        backend: the name of an attention backend.
        recall_from: memories (b, g, ...) to recall from instead of the layer's own, for one segment. Default: None.
        cached: the segment's tokens before these, for one segment. Default: None.
        write_scale: how many times each segment counts, (s, b). Default: None, once.
    """

    after: Memories
    writes: Writes

    def __init__(
        self,
        past: Memories,
        *,
        rotations: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        backend: str,
        recall_from: Memories | None = None,
        cached: CachedKV | None = None,
        write_scale: Tensor | None = None,
    ):
        self.past = past
        self.rotations = rotations
        self.mask = mask
        self.attn_mask = attn_mask
        self.backend = backend
        self.recall_from = recall_from
        self.cached = cached
        self.write_scale = write_scale

    def attend(
        self, attention: InfiniAttention, heads: Tensor, strength: Tensor | None, log_decay: Tensor | None
    ) -> tuple[Tensor, Tensor, Recallable] | None:
        """See `Surroundings`."""
        query, k, v = attention.split(heads)
        writes = Writes(k, v, strength, log_decay, self.mask, self.write_scale)
        self.writes = writes if self.cached is None else self.cached.followed_by(writes)
        entering, self.after = attention.fastweight_mem.write(self.writes, self.past)
        if query is None:
            return None
        local = self._local(attention, query, self.writes.keys, self.writes.values)
        if self.recall_from is not None:
            entering = Memories(*(part[None] for part in self.recall_from))
        return local, query, attention.fastweight_mem.recallable(entering)

    def _local(self, attention: InfiniAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each segment; the queries are its last ones."""
        segments, length = k.shape[0], k.shape[3]
        q, k = rotate(q, self.rotations[length - q.shape[3] :]), rotate(k, self.rotations)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = attention.attend(q, k, v, causal=self.attn_mask is None, mask=self.attn_mask, backend=self.backend)
        return out.unflatten(0, (segments, -1))


def empty_memories(like: Tensor, value_features: int | None = None) -> Memories:
    """Returns memories in which nothing was ever written.

    Args:
        like: keys (b, g, n, d).
        value_features: e. Default: None, d.
    """
    batch, heads, _, features = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    kv_mem = like.new_zeros(batch, heads, features, value_features or features, dtype=dtype)
    return Memories(kv_mem, kv_mem.new_zeros(batch, heads, features))


def _four(name: str, tensor: Tensor) -> torch.Size:
    """Returns the shape of a tensor with four dimensions. ValueError for others."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f'{name} has shape {found}: give (batch, heads, tokens, features)')
    return tensor.shape


def _check_shapes(**pairs: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError, with the name, for a tensor that has not the shape that stands beside it; None has any."""
    for name, (tensor, shape) in pairs.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f'{name} has shape {found}: this memory needs {shape}')


def _check_gates(gates: Tensor, shape: torch.Size) -> None:
    """Raises ValueError for gates that are not broadcast to (b, h, n)."""
    found = tuple(gates.shape) if isinstance(gates, Tensor) else type(gates).__name__
    fits = isinstance(found, tuple) and len(found) <= 3
    if not fits or any(size not in (1, want) for size, want in zip(found[::-1], shape[::-1], strict=False)):
        raise ValueError(f'gates has shape {found}: give a tensor that is broadcast to {tuple(shape)}')


def _checked_memories(memories: Memories, like: Memories) -> Memories:
    """Returns the memories, also if they are a plain pair. ValueError unless they are tensors like those of `like`."""
    if not isinstance(memories, tuple) or len(memories) != 2:
        raise ValueError(f'the past memories are a {type(memories).__name__}: give what create_new_memories returned')
    for name, have, want in zip(Memories._fields, memories, like, strict=True):
        check_like(f'past_memories.{name}', have, want)
    return Memories(*memories)


def _near_identity(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    exponents = exponents.to(dtype)
    return torch.eye(exponents.shape[-1], dtype=dtype, device=exponents.device) + exponents.exp()
