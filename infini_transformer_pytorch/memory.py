"""The compressive memory of Infini-attention (arXiv 2404.07143, equations 3 to 6), for all segments of a layer at once.

A memory is a matrix M (d, e) and a normaliser z (d) a head. With phi = elu + 1, beta the strength of a token
(1 if it is not learned) and gamma its decay (1 without), a segment with keys k, values v changes them to

    linear    z' = G z + sum w beta phi(k)            M' = G M + sum w beta phi(k)^T v                           (eq 4)
    delta     z' as above                             M' = G M + sum w beta phi(k)^T (v - phi(k) M / phi(k) z)   (eq 5)

where G is the product of the segment's decays and w that of the decays after a token. `deltanet` (arXiv 2406.06484,
2412.06464) writes token after token with l2-normalised phi(k) and no normaliser:

    deltanet  M_t = gamma_t M_{t-1} + beta_t k_t^T (v_t - gamma_t k_t M_{t-1})

z does not depend on M, so every rule is affine in M: what each segment erases, writes and keeps is known for all
segments at once, and only a scan over d x d matrices is sequential (`scan`). Everything here is computed in float32 at
least, with autocast off. A masked key has phi(k) = 0 and decay 1: it writes, erases and forgets nothing.

Letters: s segments, b batch, h query heads, g key/value heads, n tokens of a segment, d key and e value features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini_transformer_pytorch.scan import affine_scan
from segment_recurrence_pytorch.layers import no_autocast

MEMORY_RULES = ('linear', 'delta', 'deltanet')
DELTANET_CHUNK = 64  # tokens whose delta rule is solved as one triangular system


class Memories(NamedTuple):
    """The memory of one layer, in float32 at least. All zeros: nothing was ever written."""

    kv_mem: Tensor  # M, (b, g, d, e); inside a window (s, b, g, d, e), what enters each segment
    k_norm: Tensor  # z, (b, g, d); inside a window (s, b, g, d). deltanet: 1 once something was written


class Writes(NamedTuple):
    """What the tokens of s segments write: keys (before rotation) and values, and how."""

    keys: Tensor  # (s, b, g, n, d)
    values: Tensor  # (s, b, g, n, e)
    strength: Tensor | None = None  # beta in (0, 1), (s, b, g, n)
    log_decay: Tensor | None = None  # log gamma, (s, b, g, n)
    mask: Tensor | None = None  # (s, b, n), True = valid
    scale: Tensor | None = None  # (s, b), how often a segment is written; not for deltanet, nor with decay


def phi(t: Tensor, rule: str) -> Tensor:
    """elu + 1 in float32 at least, l2-normalised for deltanet."""
    t = F.elu(t.to(torch.promote_types(t.dtype, torch.float32))).add_(1)
    return F.normalize(t, dim=-1) if rule == 'deltanet' else t


def write(
    writes: Writes, past: Memories, rule: str, *, strength_in_normaliser: bool = True
) -> tuple[Memories, Memories]:
    """The memories that enter each segment (s, b, ...), and those after the last (b, ...)."""
    with no_autocast(writes.keys.device.type):
        writes = _prepared(writes, rule)
        if rule == 'deltanet':
            return _write_deltanet(writes, past)
        keys, values, strength, log_decay, *_ = writes
        decay, weighted = None, keys
        if log_decay is not None:
            passed = log_decay.cumsum(-1)
            decay = passed[..., -1].exp()
            # ratios of products as exp of differences: quotients of products give NaN
            weighted = weighted * (passed[..., -1:] - passed).exp()[..., None]
        if writes.scale is not None:
            weighted = weighted * writes.scale[:, :, None, None, None]
        in_normaliser = weighted
        if strength is not None:
            weighted = weighted * strength[..., None]
            in_normaliser = weighted if strength_in_normaliser else in_normaliser
        norms = _prefix(in_normaliser.sum(-2), past.k_norm, decay)
        erase = None
        if rule == 'delta':
            normaliser = keys @ norms[:-1, ..., None]
            # an empty memory holds nothing to erase
            shares = torch.where(normaliser > 0, normaliser, 1).reciprocal() * (normaliser > 0)
            erase = weighted.mT @ (keys * shares)
        states = affine_scan(weighted.mT @ values, past.kv_mem, erase=erase, decay=decay)
        # copies: a view of the last would keep the memories of all segments alive
        return Memories(states[:-1], norms[:-1]), Memories(states[-1].clone(), norms[-1].clone())


def read(queries: Tensor, memories: Memories, rule: str) -> tuple[Tensor, Tensor]:
    """Equation 3 for queries (s, b, h, n, d) and the memories that enter each segment: values (s, b, h, n, e), and
    whether anything was ever written (s, b, h). An empty memory reads as 0."""
    with no_autocast(queries.device.type):
        groups = memories.k_norm.shape[2]
        q = rearrange(phi(queries, rule), 's b (g r) n d -> s b g (r n) d', g=groups)
        values = q @ memories.kv_mem
        if rule != 'deltanet':
            normaliser = q @ memories.k_norm[..., None]
            values = values / torch.where(normaliser > 0, normaliser, 1)
        written = (memories.k_norm > 0).any(-1).repeat_interleave(queries.shape[2] // groups, dim=-1)
        return rearrange(values, 's b g (r n) e -> s b (g r) n e', n=queries.shape[3]), written


def mix(local: Tensor, recalled: Tensor, written: Tensor, gates: Tensor) -> Tensor:
    """Equation 6: local (s, b, h, n, e) and recalled values, sigmoid(gates (h)) the share of the local ones.
    Where nothing was ever written (s, b, h) the local output passes ungated. In the dtype of `local`."""
    share = torch.where(written, gates.to(recalled.dtype).sigmoid(), 1)[..., None, None]
    return torch.lerp(recalled, local.to(recalled.dtype), share).to(local.dtype)


def _prepared(writes: Writes, rule: str) -> Writes:
    """Feature-mapped keys, all in float32 at least, nothing where the mask is False."""
    keys = phi(writes.keys, rule)
    strength, log_decay = (None if t is None else t.to(keys.dtype) for t in (writes.strength, writes.log_decay))
    if writes.mask is not None:
        hidden = ~writes.mask[:, :, None]
        keys = keys.masked_fill(hidden[..., None], 0)
        log_decay = None if log_decay is None else log_decay.masked_fill(hidden, 0)
    return Writes(keys, writes.values.to(keys.dtype), strength, log_decay, writes.mask, writes.scale)


def _prefix(updates: Tensor, start: Tensor, decay: Tensor | None) -> Tensor:
    """Normalisers (s + 1, b, g, d) before and after each segment."""
    if decay is None:
        return torch.cat((start[None], updates)).cumsum(0)
    return affine_scan(updates[..., None], start[..., None], decay=decay)[..., 0]


def _write_deltanet(writes: Writes, past: Memories) -> tuple[Memories, Memories]:
    """The delta rule token after token, solved in chunks (WY form): with u_t = beta_t (v_t - gamma_t k_t M_{t-1}),

    (I + T) u = beta v - beta G_t k M,   T_ti = beta_t (G_t / G_i) k_t k_i  for i < t,   G_t = gamma_1 ... gamma_t

    so a chunk turns M into G_n M + sum (G_n / G_i) k_i^T u_i, which is affine in M.
    """
    keys, values, strength, log_decay, mask, _ = writes
    assert strength is not None
    segments, n = keys.shape[0], keys.shape[3]
    size = min(n, DELTANET_CHUNK)
    chunks = -(-n // size)
    strength = strength[..., None]
    # keys that pad the last chunk are 0: they write nothing
    k, v, beta = (
        rearrange(F.pad(t, (0, 0, 0, chunks * size - n)), 's b g (c n) d -> (s c) b g n d', c=chunks)
        for t in (keys, values, strength)
    )
    erase_scale, decay, later = k, None, k
    overlap = (beta * k) @ k.mT
    if log_decay is not None:
        padded = F.pad(log_decay, (0, chunks * size - n))
        passed = rearrange(padded, 's b g (c n) -> (s c) b g n', c=chunks).cumsum(-1)[..., None]
        between = (passed - passed.mT).masked_fill(torch.ones_like(overlap, dtype=torch.bool).triu(), 0)
        overlap = overlap * between.exp()
        decay = passed[..., -1, 0].exp()
        erase_scale = k * passed.exp()
        later = k * (passed[..., -1:, :] - passed).exp()
    right = torch.cat((beta * v, beta * erase_scale), dim=-1)
    # unitriangular: the ones on the diagonal are implied, and nothing on or above it is looked at
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    written, erased = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    states = affine_scan(later.mT @ written, past.kv_mem, erase=later.mT @ erased, decay=decay)

    valid = keys.new_ones(segments, keys.shape[1]) if mask is None else mask.any(-1).to(keys.dtype)
    marks = (
        torch.cat((past.k_norm[None], valid[..., None, None].expand(-1, -1, *past.k_norm.shape[1:]))).cummax(0).values
    )
    entering = Memories(states[:-1:chunks], marks[:-1])
    return entering, Memories(states[-1].clone(), marks[-1].clone())
