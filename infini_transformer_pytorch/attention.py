"""Infini-attention: causal attention inside each segment, and a compressive memory of all segments before it.

Letters: s segments, b rows of the batch, h query heads, g key/value heads, n tokens of a segment, d features of a head,
e features of a value in `FastweightMemory`, which may differ from d.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_transformer_pytorch.memory import (
    Memories,
    Recallable,
    Writes,
    chosen_rule,
    local_share,
    mix,
    recall,
    write,
)
from segment_recurrence_pytorch.checks import check_finite, check_like, check_positive, typed
from segment_recurrence_pytorch.layers import HeadNorm, attend, no_autocast, outputs_from, rotate
from segment_recurrence_pytorch.state import copied

PUBLISHED_NORM_EPS = 1e-12  # practically 0, as in the published package, whose checkpoints can be loaded
# Initial value of the gates, with which the local attention has a share of sigmoid(3) = 0.95. From equal shares (0)
# text is modelled worse; from 6, and from the published 10, no fact is learned either: benchmarks.evidence, `gate`
GATE_START = 3.0
# initial bias of the decay: a token keeps sigmoid(8) = 0.9997 of the memory, so 512 tokens keep 0.84
DECAY_BIAS = 8.0
# a map of `mem_transform` starts as the identity plus exp(-6) = 0.0025 in each entry (kv_proj: divided by dim_head)
TRANSFORM_START = -6.0


class CachedKV(NamedTuple):
    """The tokens of an unfinished segment in one layer. `InfiniTransformer.forward` returns it, to go on inside the
    segment.

    Attributes:
        kv: keys before rotation, and values, stacked, (2, b, g, n, d).
        strength: the strength of each token, (b, g, n). None if the model does not learn it.
        log_decay: the logarithm of the decay of each token, (b, g, n). None if the model does not learn it.
        mask: (b, n) bool, True = valid. A cache with padding cannot be gone on from. None: all tokens are valid.
    """

    kv: Tensor
    strength: Tensor | None = None
    log_decay: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of_last_segment(cls, writes: Writes) -> CachedKV:
        """Returns the cache of the last segment.

        Args:
            writes: what the tokens of some segments write in the layer.
        """
        parts = (writes.strength, writes.log_decay, writes.mask)
        return cls(
            torch.stack((writes.keys[-1], writes.values[-1])), *(None if part is None else part[-1] for part in parts)
        )

    def followed_by(self, new: Writes) -> Writes:
        """Returns what all tokens of the segment write, as one segment: first the tokens in the cache, then the new
        ones.

        Args:
            new: what the new tokens write, with s = 1.
        """
        keys, values = (torch.cat((old[None], fresh), dim=3) for old, fresh in zip(self.kv, new[:2], strict=True))
        strength, log_decay = (
            None if old is None or fresh is None else torch.cat((old[None], fresh), dim=3)
            for old, fresh in ((self.strength, new.strength), (self.log_decay, new.log_decay))
        )
        return Writes(keys, values, strength, log_decay)


class FastweightMemory(nn.Module):
    """The compressive memory of one layer, which can be added to any attention. `memory` has the rules and their
    equations.

    `create_new_memories` writes a segment to the memory. `retrieve_and_add_to_output` recalls from the memory and mixes
    the result with the output of the layer's own attention. docs/infini.md shows it in a plain transformer.

    Args:
        heads: number of query heads h. Each has a gate; sigmoid(gate) is the share of the layer's own attention, as in
            infini-transformer-pytorch.
        head_gate_init_value: initial value of the gates. Default: 3, a share of 0.95.
        use_mem_delta_rule: the published name of memory_rule='delta'. Default: False.
        kv_heads: number of memories g, a divisor of `heads`. Consecutive query heads share a memory. Default: None,
            `heads`.
        memory_rule: 'linear', 'delta' or 'deltanet'. Default: None, 'delta' if use_mem_delta_rule is True, else
            'linear'.
        strength_in_normaliser: whether the strength of a token also scales what it adds to the normaliser. Checkpoints
            of infini-transformer-pytorch need False. Default: True.
        mem_transform: a learned map of the memory before it is recalled from. 'talking_heads' mixes the memories of the
            heads; 'kv_proj' projects the keys and the values of each memory. Both start near the identity.
            Default: None, no map.
        dim_head: features of a head. Only 'kv_proj' needs it. Default: None.

    Attributes:
        scan_backend: what writes one segment after the other: 'auto', 'torch', or 'triton'. It can be set at any time,
            and is not saved, since it changes no result by more than rounding. See `memory.affine_scan`. Default:
            'auto', the Triton kernel on a GPU where it works, else PyTorch.

    Raises:
        ValueError: if a value is outside its range.
    """

    @typed
    def __init__(
        self,
        heads: int,
        head_gate_init_value: int | float = GATE_START,
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
        memory_rule, _ = chosen_rule(memory_rule, None, use_mem_delta_rule)
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
        self.scan_backend = 'auto'
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
        """Writes one segment, and returns the memories after it.

        Args:
            keys: keys before rotation, (b, g, n, d).
            values: (b, g, n, e).
            past_memories: the memories before the segment. Default: None, empty memories.
            weights: 1 - strength, (b, g, n, 1): the share of each token that is not written. It is the published form
                of `strength`. Default: None.
            strength: the share of each token that is written, in [0, 1], (b, g, n). Default: None, 1.
            log_decay: the logarithm of the decay of each token, finite and at most 0, (b, g, n). Default: None, 0: the
                whole memory is kept.
            mask: (b, n) bool, True = valid. Padded tokens write nothing. Default: None, all positions are valid.

        Raises:
            ValueError: if a shape or dtype does not fit, or if both weights and strength are given.
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
        """Recalls from the memories, and returns the mix with the output of the layer's own attention, (b, h, n, e).

        Args:
            out: output of the layer's own attention, (b, h, n, e).
            queries: queries before rotation, (b, h, n, d).
            past_memories: the memories before the segment. Default: None, `out` is returned unchanged.
            gates: gates to use instead of the learned ones, broadcastable to (b, h, n). sigmoid(gates) is the share of
                `out`. Default: None, the learned gates.

        Raises:
            ValueError: if a shape does not fit.
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

    def write(self, writes: Writes, past: Memories, **ranks: Any) -> tuple[Memories, Memories]:
        """See `memory.write`. It uses the rule of this module.

        Args:
            writes: what the tokens write.
            past: the memories before the first segment, (b, ...).
            ranks: chain and cuts, if the segments are spread over ranks.
        """
        options = dict(strength_in_normaliser=self.strength_in_normaliser, backend=self.scan_backend, **ranks)
        return write(writes, past, self.memory_rule, **options)

    def recall(self, local: Tensor, queries: Tensor, memories: Recallable, gates: Tensor | None = None) -> Tensor:
        """Recalls from memories, and returns the mix with local attention (equations 3 and 6), (..., b, h, n, e).

        Args:
            local: output of the local attention, (..., b, h, n, e).
            queries: queries before rotation, (..., b, h, n, d).
            memories: what `recallable` returned.
            gates: broadcastable to (..., b, h, n). Default: None, the learned gates `head_gates`.
        """
        recalled = recall(queries, memories, self.memory_rule)
        share = memories.share if gates is None else local_share(gates, memories.written, recalled.dtype)
        return mix(local, recalled, share)

    def recallable(self, memories: Memories) -> Recallable:
        """Returns memories in the form in which queries recall from them, after the map `mem_transform`, if there is
        one.

        M and z go through the same positive map of keys, so what is recalled is still a weighted mean of (projected)
        values.

        Args:
            memories: memories with shapes (..., b, g, ...).
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
    """What the tokens of a layer may attend to and recall from: their segments, or a cache of an open segment.

    Attributes:
        attend: a function that is called with the layer's attention, its queries, keys and values side by side (as
            `InfiniAttention.heads_of` returns them), the strength and the log decay of the tokens. It returns the
            output of the local attention, the queries before rotation, and the memories to recall from. It returns None
            if no output is needed.
        need_output: whether the output of the layer is needed. If False, only what the tokens write is needed.
            Default: True.
    """

    attend: Callable[..., tuple[Tensor, Tensor, Recallable] | None]
    need_output: bool = True


class LayerMemory(nn.Module):
    """The memory of one layer, with what tells how it is used: the gates, and the strength and decay of each token.

    A researcher can override `gates` to change how local attention and memory are mixed, and `strength_and_decay` to
    change how much of each token is written and how much of the memory it keeps. Training and generation use the same
    methods.
    """

    def add_memory(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        memory_rule: str,
        learned_strength: bool,
        memory_decay: bool,
        **memory: Any,
    ) -> None:
        """Adds the memory. The constructor of a subclass calls it.

        Args:
            dim: features of a token.
            heads: number of query heads h.
            kv_heads: number of key/value heads and memories g, a divisor of `heads`.
            memory_rule: a name in `memory.MEMORY_RULES`.
            learned_strength: whether the strength of each token is learned, in each head. With 'deltanet' it always is.
            memory_decay: whether the decay of each token is learned, in each head.
            memory: further arguments of `FastweightMemory`.
        """
        deltanet = memory_rule == 'deltanet'
        # published checkpoints, which have other rules, have no bias here
        self.to_strength = nn.Linear(dim, kv_heads, bias=deltanet) if learned_strength or deltanet else None
        self.to_decay = nn.Linear(dim, kv_heads) if memory_decay else None
        self.fastweight_mem = FastweightMemory(heads, kv_heads=kv_heads, memory_rule=memory_rule, **memory)

    def gates(self, x: Tensor) -> Tensor | None:
        """Returns a gate for each token, broadcastable to (..., b, h, n). sigmoid(gate) is the share of the local
        attention.

        The default returns None: each head uses its learned gate `fastweight_mem.head_gates` for all tokens. Override
        it to compute gates from the tokens, from each of them alone: generation gives one token at a time.

        Args:
            x: tokens after the norm of the layer, (..., b, n, dim). n may be 0 or 1.
        """
        return None

    def strength_and_decay(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the strength and the log decay of each token, (..., b, g, n), in float32 at least.

        Either of them is None if it is not learned. Override it to compute them in another way, for each token alone:
        generation gives one token at a time.

        Args:
            x: tokens after the norm of the layer, (..., b, n, dim). n may be 0 or 1.
        """
        strength = log_decay = None
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.to_strength is not None:
            strength = self.to_strength(x).to(dtype).sigmoid().transpose(-1, -2)
        if self.to_decay is not None:
            log_decay = F.logsigmoid(self.to_decay(x).to(dtype)).transpose(-1, -2)
        return strength, log_decay


class InfiniAttention(LayerMemory):
    """The attention of one layer: local attention inside a segment, and a memory in each head. See `LayerMemory` for
    what a researcher can override.

    Args:
        dim: features of a token.
        heads: number of query heads h.
        kv_heads: number of key/value heads and memories g, a divisor of `heads`.
        dim_head: features of a head d.
        dropout: probability that a weight of the local attention is dropped during training.
        qk_norm: whether queries and keys go through an RMS norm with a learned gain.
        learned_strength: whether the strength of each token is learned, in each head.
        memory_decay: whether the decay of each token is learned, in each head.
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
        self.q_norm = HeadNorm(dim_head, eps=PUBLISHED_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim_head, eps=PUBLISHED_NORM_EPS) if qk_norm else nn.Identity()
        self.add_memory(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            learned_strength=learned_strength,
            memory_decay=memory_decay,
            **memory,
        )

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Returns the outputs of the layer (..., b, n, dim), or (..., b, 0, dim) if no output is needed.

        Args:
            x: tokens after the norm of the layer, (..., b, n, dim).
            surroundings: what the tokens may attend to and recall from.
        """
        heads = self.heads_of(x, surroundings.need_output)
        found = surroundings.attend(self, heads, *self.strength_and_decay(x))
        if found is None:
            return x[..., :0, :]
        local, queries, memories = found
        out = self.fastweight_mem.recall(local, queries, memories, self.gates(x))
        return self.to_out(out.transpose(-3, -2).flatten(-2))

    def heads_of(self, x: Tensor, need_query: bool = True) -> Tensor:
        """Returns the projected queries, keys and values side by side, (..., b, h + 2 g, n, d).

        Args:
            x: tokens after the norm of the layer, (..., b, n, dim).
            need_query: whether queries are needed. If False, the result is (..., b, 2 g, n, d). Default: True.
        """
        heads = outputs_from(self.to_qkv, x, 0 if need_query else self.heads * self.dim_head)
        return heads.unflatten(-1, (-1, self.dim_head)).transpose(-3, -2)

    def split(self, heads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns queries, keys and values after their norms. The queries are None if `heads` has none.

        Args:
            heads: what `heads_of` returned.
        """
        # made contiguous once, since each product that follows would copy a view again
        *query, k, v = (part.contiguous() for part in self._parts(heads))
        return self.q_norm(query[0]) if query else None, self.k_norm(k), v

    def normed(self, heads: Tensor) -> Tensor:
        """Returns queries, keys and values side by side, after their norms.

        Args:
            heads: what `heads_of` returned, with queries.
        """
        if getattr(self.split, '__func__', None) is not InfiniAttention.split:  # of a subclass, or of this module
            return torch.cat([part for part in self.split(heads) if part is not None], dim=-3)
        if type(self.q_norm) is type(self.k_norm) is nn.Identity:
            return heads
        q, k, v = self._parts(heads)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-3)

    def _parts(self, heads: Tensor) -> tuple[Tensor, ...]:
        """Returns the queries, if there are any, the keys and the values."""
        have_query = [self.heads] * (heads.shape[-3] > 2 * self.kv_heads)
        return heads.split([*have_query, self.kv_heads, self.kv_heads], dim=-3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, backend: str
    ) -> Tensor:
        """Calls `layers.attend` with the dropout of this layer. Parallel reading and generation both use it."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, causal=causal, mask=mask, dropout=dropout, backend=backend)


class Segments:
    """The surroundings of the tokens of a window in one layer, for all its segments at once.

    After a call of `attend`, the attributes `writes` and `after` are set.

    Args:
        past: the memories that enter the first segment, (b, g, ...).
        rotations: the rotations of the positions of a segment, (n, d / 2, 2).
        mask: which tokens are written, (s, b, n) bool, True = valid. None: all tokens.
        attn_mask: which keys each query of the local attention may attend to, (s b, 1, n, n) bool. None: causal
            attention without padding.
        backend: the name of an attention backend.
        recall_from: memories (b, g, ...) to recall from instead of the layer's own. Only for a single segment.
            Default: None.
        cached: the tokens of the segment before the present ones. Only for a single segment. Default: None.
        write_scale: how many times each segment is written, (s, b). Default: None, once.
        ranks: chain and cuts, see `memory.affine_scan`, if the segments are spread over ranks. Default: None.
        closes: whether the tokens are written into the memories. If not, there is a single segment, which stays open.
            Default: True.

    Attributes:
        writes: what the tokens write.
        after: the memories after the last segment, (b, g, ...). Those that entered, if the segment stays open.
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
        ranks: dict[str, Any] | None = None,
        closes: bool = True,
    ):
        self.past = past
        self.rotations = rotations
        self.mask = mask
        self.attn_mask = attn_mask
        self.backend = backend
        self.recall_from = recall_from
        self.cached = cached
        self.write_scale = write_scale
        self.ranks = ranks or {}
        self.closes = closes

    def attend(
        self, attention: InfiniAttention, heads: Tensor, strength: Tensor | None, log_decay: Tensor | None
    ) -> tuple[Tensor, Tensor, Recallable] | None:
        """See `Surroundings.attend`."""
        query, k, v = attention.split(heads)
        writes = Writes(k, v, strength, log_decay, self.mask, self.write_scale)
        self.writes = writes if self.cached is None else self.cached.followed_by(writes)
        if self.closes:
            entering, self.after = attention.fastweight_mem.write(self.writes, self.past, **self.ranks)
        else:
            entering, self.after = Memories(*(part[None] for part in self.past)), self.past
        if query is None:
            return None
        local = self._local(attention, query, self.writes.keys, self.writes.values)
        if self.recall_from is not None:
            entering = Memories(*(part[None] for part in self.recall_from))
        return local, query, attention.fastweight_mem.recallable(entering)

    def _local(self, attention: InfiniAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns causal attention inside each segment. The queries are those of its last tokens."""
        segments, length = k.shape[0], k.shape[3]
        q, k = rotate(q, self.rotations[length - q.shape[3] :]), rotate(k, self.rotations)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = attention.attend(q, k, v, causal=self.attn_mask is None, mask=self.attn_mask, backend=self.backend)
        return out.unflatten(0, (segments, -1))


def empty_memories(like: Tensor, value_features: int | None = None) -> Memories:
    """Returns memories in which nothing was ever written.

    Args:
        like: keys (b, g, n, d).
        value_features: number e of features of a value. Default: None, d.
    """
    batch, heads, _, features = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    kv_mem = like.new_zeros(batch, heads, features, value_features or features, dtype=dtype)
    return Memories(kv_mem, kv_mem.new_zeros(batch, heads, features))


def _four(name: str, tensor: Tensor) -> torch.Size:
    """Returns the shape of a tensor. Raises ValueError if it has not four dimensions."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f'{name} has shape {found}: give (batch, heads, tokens, features)')
    return tensor.shape


def _check_shapes(**pairs: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError, with the name, if a tensor does not have the shape that is given beside it. None always
    passes."""
    for name, (tensor, shape) in pairs.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f'{name} has shape {found}: this memory needs {shape}')


def _check_gates(gates: Tensor, shape: torch.Size) -> None:
    """Raises ValueError if the gates cannot be broadcast to the shape (b, h, n)."""
    found = tuple(gates.shape) if isinstance(gates, Tensor) else type(gates).__name__
    fits = isinstance(found, tuple) and len(found) <= 3
    if not fits or any(size not in (1, want) for size, want in zip(found[::-1], shape[::-1], strict=False)):
        raise ValueError(f'gates has shape {found}: give a tensor that is broadcast to {tuple(shape)}')


def _checked_memories(memories: Memories, like: Memories) -> Memories:
    """Returns the memories, which may be given as a plain pair. Raises ValueError if they are not like those of
    `like`."""
    if not isinstance(memories, tuple) or len(memories) != 2:
        raise ValueError(f'the past memories are a {type(memories).__name__}: give what create_new_memories returned')
    for name, have, want in zip(Memories._fields, memories, like, strict=True):
        check_like(f'past_memories.{name}', have, want)
    return Memories(*memories)


def _near_identity(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    exponents = exponents.to(dtype)
    return torch.eye(exponents.shape[-1], dtype=dtype, device=exponents.device) + exponents.exp()
