"""The compressive memory of Infini-attention (arXiv 2404.07143, equations 3 to 6), for all segments of a layer at once.

A memory is a matrix M (d, e) and a normaliser z (d) for each head. With phi = elu + 1, beta the strength of a token
(1 if it is not learned) and gamma its decay (1 without), a segment with keys k and values v changes them to

    linear    z' = G z + sum w beta phi(k)            M' = G M + sum w beta phi(k)^T v                           (eq 4)
    delta     z' as above                             M' = G M + sum w beta phi(k)^T (v - phi(k) M / phi(k) z)   (eq 5)

where G is the product of the segment's decays, and w that of the decays after a token. `deltanet` (arXiv 2406.06484,
2412.06464) writes token after token, with l2-normalised phi(k) and no normaliser:

    deltanet  M_t = gamma_t M_{t-1} + beta_t k_t^T (v_t - gamma_t k_t M_{t-1})

A query recalls phi(q) M / phi(q) z (equation 3; deltanet: phi(q) M), which a gate mixes with the local attention
(equation 6). `write`, `recall` and `mix` are these equations, in training and in decoding alike.

z does not depend on M, so every rule is affine in M: what each segment erases, writes and keeps is known for all
segments at once, and only a scan over d x d matrices is sequential (`affine_scan`). Everything here is computed in
float32 at least, with autocast off. A masked key has phi(k) = 0 and decay 1: it writes, erases and forgets nothing.

Letters: s segments, b batch, h query heads, g key/value heads, n tokens of a segment, d key and e value features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from segment_recurrence_pytorch.layers import no_autocast

MEMORY_RULES = ('linear', 'delta', 'deltanet')
DELTANET_CHUNK = 64  # tokens whose delta rule is solved as one triangular system


class Memories(NamedTuple):
    """The memory of one layer, in float32 at least. All zeros: nothing was ever written.

    Attributes:
        kv_mem: M, (b, g, d, e); inside a window (s, b, g, d, e), what enters each segment.
        k_norm: z, (b, g, d); inside a window (s, b, g, d). For deltanet it is 1 once something was written.
    """

    kv_mem: Tensor
    k_norm: Tensor


class Recallable(NamedTuple):
    """Memories in the form in which queries recall from them; `FastweightMemory.recallable` makes it.

    Attributes:
        kv_mem: M of all memories one behind the other, (.. b g, d, e).
        k_norm: z as columns, (.. b g, d, 1).
        written: whether anything was ever written, (..., b, h, 1) bool.
        share: the share of the local attention by the learned gates of the heads, (..., b, h, 1).
    """

    kv_mem: Tensor
    k_norm: Tensor
    written: Tensor
    share: Tensor


class Writes(NamedTuple):
    """What the tokens of s segments write.

    Attributes:
        keys: before rotation, (s, b, g, n, d).
        values: (s, b, g, n, e).
        strength: beta, in (0, 1), (s, b, g, n). Default: None, 1 everywhere.
        log_decay: log gamma, at most 0, (s, b, g, n). Default: None, nothing decays.
        mask: (s, b, n) bool, True = valid. Default: None, all tokens are.
        scale: how many times each segment counts, (s, b). Not for deltanet, and not with decay. Default: None, once.
    """

    keys: Tensor
    values: Tensor
    strength: Tensor | None = None
    log_decay: Tensor | None = None
    mask: Tensor | None = None
    scale: Tensor | None = None


def phi(t: Tensor, rule: str) -> Tensor:
    """Returns the features of queries or keys (..., d): elu + 1 in float32 at least, l2-normalised for deltanet."""
    t = F.elu(t.to(torch.promote_types(t.dtype, torch.float32))).add_(1)
    return F.normalize(t, dim=-1) if rule == 'deltanet' else t


def write(
    writes: Writes, past: Memories, rule: str, *, strength_in_normaliser: bool = True
) -> tuple[Memories, Memories]:
    """Writes the tokens of s segments (equations 4 and 5, or deltanet).

    Args:
        writes: what the tokens write.
        past: the memories (b, ...) before the first segment.
        rule: a name of `MEMORY_RULES`.
        strength_in_normaliser: whether the strength of a token also scales what it adds to z. Default: True.

    Returns:
        The memories that enter each segment (s, b, ...), and those after the last (b, ...).
    """
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
        norms = _normalisers(in_normaliser.sum(-2), past.k_norm, decay)
        erase = None
        if rule == 'delta':
            normaliser = keys @ norms[:-1, ..., None]
            # an empty memory holds nothing to erase
            shares = torch.where(normaliser > 0, normaliser, 1).reciprocal() * (normaliser > 0)
            erase = weighted.mT @ (keys * shares)
        states = affine_scan(weighted.mT @ values, past.kv_mem, erase=erase, decay=decay)
        # copies: a view of the last would keep the memories of all segments alive
        return Memories(states[:-1], norms[:-1]), Memories(states[-1].clone(), norms[-1].clone())


def recall(queries: Tensor, memories: Recallable, rule: str) -> Tensor:
    """Returns what queries recall, equation 3: (..., b, h, n, e). An empty memory gives 0.

    Args:
        queries: before rotation, (..., b, h, n, d), h a multiple of g: consecutive query heads share a memory.
        memories: what enters the segment of the queries.
        rule: a name of `MEMORY_RULES`.
    """
    with no_autocast(queries.device.type):
        q = phi(queries, rule)
        # the query heads of a memory, and their tokens, are rows of one product
        q = q.reshape(len(memories.kv_mem), -1 if q.numel() else 0, q.shape[-1])
        values = torch.bmm(q, memories.kv_mem)
        if rule != 'deltanet':
            normaliser = torch.bmm(q, memories.k_norm)
            values = values / (normaliser + (normaliser == 0))  # an empty memory: 0 / 1
        return values.reshape(*queries.shape[:-1], values.shape[-1])


def local_share(gates: Tensor, written: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the share of the local attention, sigmoid(gates); all of it where nothing was ever written.

    Args:
        gates: broadcast to (..., b, h, n).
        written: whether anything was ever written, (..., b, h, 1) bool.
        dtype: of the result.
    """
    return torch.where(written, gates.to(dtype).sigmoid(), 1)


def mix(local: Tensor, recalled: Tensor, share: Tensor) -> Tensor:
    """Returns the mix of local attention and memory, equation 6, (..., b, h, n, e) in the dtype of `local`.

    Args:
        local: what the local attention gives, (..., b, h, n, e).
        recalled: what `recall` gives, of the same shape.
        share: of the local attention, broadcast to (..., b, h, n).
    """
    return torch.lerp(recalled, local.to(recalled.dtype), share.unsqueeze(-1)).to(local.dtype)


def _prepared(writes: Writes, rule: str) -> Writes:
    """Returns feature-mapped keys, all in float32 at least, and nothing where the mask is False."""
    keys = phi(writes.keys, rule)
    strength, log_decay, scale = (
        None if t is None else t.to(keys.dtype) for t in (writes.strength, writes.log_decay, writes.scale)
    )
    if writes.mask is not None:
        hidden = ~writes.mask[:, :, None]
        keys = keys.masked_fill(hidden[..., None], 0)
        log_decay = None if log_decay is None else log_decay.masked_fill(hidden, 0)
    return Writes(keys, writes.values.to(keys.dtype), strength, log_decay, writes.mask, scale)


def _normalisers(updates: Tensor, start: Tensor, decay: Tensor | None) -> Tensor:
    """Returns the normalisers before the first segment and after each, (s + 1, b, g, d)."""
    if decay is None:
        return torch.cat((start[None], updates)).cumsum(0)
    return affine_scan(updates[..., None], start[..., None], decay=decay)[..., 0]


def _write_deltanet(writes: Writes, past: Memories) -> tuple[Memories, Memories]:
    """The delta rule token after token, solved in chunks (WY form): with u_t = beta_t (v_t - gamma_t k_t M_{t-1}),

    (I + T) u = beta v - beta G_t k M,   T_ti = beta_t (G_t / G_i) k_t k_i  for i < t,   G_t = gamma_1 ... gamma_t

    so a chunk turns M into G_n M + sum (G_n / G_i) k_i^T u_i, which is affine in M.
    """
    keys, values, strength, log_decay, mask, _ = writes
    strength = keys.new_ones(keys.shape[:-1]) if strength is None else strength
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
    added, erased = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    states = affine_scan(later.mT @ added, past.kv_mem, erase=later.mT @ erased, decay=decay)

    valid = keys.new_ones(segments, keys.shape[1]) if mask is None else mask.any(-1).to(keys.dtype)
    valid = valid[..., None, None].expand(-1, -1, *past.k_norm.shape[1:])
    written = torch.cat((past.k_norm[None], valid)).cummax(0).values
    entering = Memories(states[:-1:chunks], written[:-1])
    return entering, Memories(states[-1].clone(), written[-1].clone())


def affine_scan(write: Tensor, start: Tensor, *, erase: Tensor | None = None, decay: Tensor | None = None) -> Tensor:
    """Computes M_i = decay_i M_{i-1} - erase_i M_{i-1} + write_i, the one part that is sequential in the segments.

    All of erase, write and decay are there when the scan starts, so it is two small operations a segment, out of sight
    of autograd and of `torch.compile` (a custom operator with its own backward): a loop that either of them records
    costs more than the arithmetic. `benchmarks/scan.py` measures it against the chunked and the associative form.

    Args:
        write: (s, b, g, d, e).
        start: M_0, (b, g, d, e).
        erase: (s, b, g, d, d). Default: None, 0.
        decay: (s, b, g). Default: None, 1.

    Returns:
        (s + 1, b, g, d, e): the start, then the state after each segment. Differentiable once.
    """
    return _scan(write, start, erase, decay)


@torch.library.custom_op('infini_transformer_pytorch::affine_scan', mutates_args=())
def _scan(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    states = write.new_empty(write.shape[0] + 1, *start.shape)
    states[0] = start
    flat = states.flatten(1, 2).unbind(0)
    writes = write.flatten(1, 2).unbind(0)
    erases = None if erase is None else erase.flatten(1, 2).unbind(0)
    decays = None if decay is None else decay.flatten(1, 2)[..., None, None].unbind(0)
    for i, update in enumerate(writes):
        if decays is None:
            torch.add(update, flat[i], out=flat[i + 1])
        else:
            torch.addcmul(update, flat[i], decays[i], out=flat[i + 1])
        if erases is not None:
            flat[i + 1].baddbmm_(erases[i], flat[i], alpha=-1)
    return states


@_scan.register_fake
def _(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    return write.new_empty(write.shape[0] + 1, *start.shape)


@torch.library.custom_op('infini_transformer_pytorch::affine_scan_backward', mutates_args=())
def _scan_backward(grad_states: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    grads = grad_states.clone(memory_format=torch.contiguous_format)
    flat = grads.flatten(1, 2).unbind(0)
    erases = None if erase is None else erase.flatten(1, 2).mT.unbind(0)
    decays = None if decay is None else decay.flatten(1, 2)[..., None, None].unbind(0)
    for i in range(len(flat) - 2, -1, -1):
        if decays is None:
            flat[i].add_(flat[i + 1])
        else:
            flat[i].addcmul_(flat[i + 1], decays[i])
        if erases is not None:
            flat[i].baddbmm_(erases[i], flat[i + 1], alpha=-1)
    return grads


@_scan_backward.register_fake
def _(grad_states: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    return torch.empty_like(grad_states, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, _, erase, decay = inputs
    ctx.save_for_backward(output, erase, decay)


def _backward(ctx, grad_states: Tensor):
    states, erase, decay = ctx.saved_tensors
    grads = _scan_backward(grad_states, erase, decay)
    after, before = grads[1:], states[:-1]
    grad_erase = None if erase is None else -(after @ before.mT)
    grad_decay = None if decay is None else (after * before).sum((-1, -2))
    return after, grads[0], grad_erase, grad_decay


torch.library.register_autograd('infini_transformer_pytorch::affine_scan', _backward, setup_context=_setup_context)
