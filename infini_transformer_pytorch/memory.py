"""The compressive memory of Infini-attention, for all segments of a layer at once.

Equations 3 to 6 are those of arXiv 2404.07143 in its first version; the second version adds 4 to each number.

The memory of a head is a matrix M (d, e) and a normaliser z (d). Let phi = elu + 1, let beta be the strength of a token
(how much of it is written; 1 if it is not learned), and gamma its decay (the share of the memory that it keeps; 1 if it
is not learned). A segment with keys k and values v changes M and z to

    linear    z' = G z + sum w beta phi(k)            M' = G M + sum w beta phi(k)^T v                           (eq 4)
    delta     z' as above                             M' = G M + sum w beta phi(k)^T (v - G phi(k) M / phi(k) z) (eq 5)

The sums go over the tokens of the segment. G is the product of the decays of all these tokens, and w is the product of
the decays of the tokens after the one in the sum. (The paper has no decay: G = w = 1. G phi(k) M is what is left of the
old memory: to erase all of phi(k) M would write its opposite.) The rule `deltanet` (arXiv 2406.06484, 2412.06464)
writes token after token and has no normaliser. Its k_t is the l2-normalised phi of the key of token t:

    deltanet  M_t = gamma_t M_{t-1} + beta_t k_t^T (v_t - gamma_t k_t M_{t-1})

A query recalls phi(q) M / phi(q) z (equation 3; for deltanet it is phi(q) M with l2-normalised phi(q)). A gate mixes
what is recalled with the local attention (equation 6). The functions `write`, `recall` and `mix` are these equations.
Parallel reading and generation both use them.

z does not depend on M, so every rule is affine in M. What each segment erases, writes and keeps can therefore be
computed for all segments at once. Only a scan over matrices (d, e) goes from segment to segment (`affine_scan`).
Everything is computed in float32 at least, with autocast off. A padded key has phi(k) = 0 and decay 1: it writes
nothing, erases nothing, and keeps the whole memory.

Letters: s segments, b rows of the batch, h query heads, g key/value heads, n tokens of a segment, d features of a key,
e features of a value.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from segment_recurrence_pytorch.layers import no_autocast

if TYPE_CHECKING:
    from segment_recurrence_pytorch.distributed import Chain

MEMORY_RULES = ('linear', 'delta', 'deltanet')
SCAN_BACKENDS = ('auto', 'torch', 'triton')
DELTANET_CHUNK = 64  # tokens of a chunk, which deltanet solves as one triangular system


class Memories(NamedTuple):
    """The memory of one layer, in float32 at least. If all of it is zero, nothing was ever written.

    Attributes:
        kv_mem: the matrices M, (b, g, d, e). For the segments of a window it is (s, b, g, d, e): the memory that enters
            each segment.
        k_norm: the normalisers z, (b, g, d), or (s, b, g, d) for the segments of a window. With the rule deltanet it is
            not a normaliser: it is 1 if anything was written, else 0.
    """

    kv_mem: Tensor
    k_norm: Tensor


class Recallable(NamedTuple):
    """Memories in the form in which queries recall from them. `FastweightMemory.recallable` makes it.

    Attributes:
        kv_mem: the matrices M of all memories in one dimension, (... b g, d, e).
        k_norm: the normalisers z as columns, (... b g, d, 1).
        written: whether anything was ever written, (..., b, h, 1) bool.
        share: the share of the local attention, from the learned gate of each head, (..., b, h, 1).
    """

    kv_mem: Tensor
    k_norm: Tensor
    written: Tensor
    share: Tensor


class Writes(NamedTuple):
    """What the tokens of some segments write.

    Attributes:
        keys: keys before rotation, (s, b, g, n, d).
        values: (s, b, g, n, e).
        strength: beta of each token, in [0, 1], (s, b, g, n). Default: None, 1 for all tokens.
        log_decay: log gamma of each token, finite and at most 0, (s, b, g, n). Default: None, 0 for all tokens.
        mask: (s, b, n) bool, True = valid. Default: None, all positions are valid.
        scale: how many times each segment is written, (s, b). Not for deltanet and not together with decay.
            Default: None, once.
    """

    keys: Tensor
    values: Tensor
    strength: Tensor | None = None
    log_decay: Tensor | None = None
    mask: Tensor | None = None
    scale: Tensor | None = None


def phi(t: Tensor, rule: str) -> Tensor:
    """Returns the feature map of queries or keys: elu + 1, in float32 at least, and l2-normalised for the rule
    deltanet.

    Args:
        t: queries or keys (..., d).
        rule: a name in `MEMORY_RULES`.
    """
    t = F.elu(t.to(torch.promote_types(t.dtype, torch.float32))).add_(1)
    return F.normalize(t, dim=-1) if rule == 'deltanet' else t


def write(
    writes: Writes,
    past: Memories,
    rule: str,
    *,
    strength_in_normaliser: bool = True,
    chain: Chain | None = None,
    cuts: tuple[int, ...] = (),
    backend: str = 'auto',
) -> tuple[Memories, Memories]:
    """Writes the tokens of s segments, one segment after the other (equation 4 or 5, or deltanet).

    Args:
        writes: what the tokens write.
        past: the memories before the first segment, (b, ...).
        rule: a name in `MEMORY_RULES`.
        strength_in_normaliser: whether the strength of a token also scales what it adds to z. Default: True.
        chain: see `affine_scan`. Default: None.
        cuts: see `affine_scan`. Default: none.
        backend: see `affine_scan`. Default: 'auto'.

    Returns:
        The memories that enter each segment, (s, b, ...), and the memories after the last segment, (b, ...).
    """
    with no_autocast(writes.keys.device.type):
        writes = _prepared(writes, rule)
        if rule == 'deltanet':
            return _write_deltanet(writes, past, chain, cuts, backend)
        keys, values, strength, log_decay, *_ = writes
        decay, weighted = None, keys
        if log_decay is not None:
            passed = log_decay.cumsum(-1)
            decay = passed[..., -1].exp()
            # exp of a difference of sums, and not a ratio of products: products can underflow to 0 / 0
            weighted = weighted * (passed[..., -1:] - passed).exp()[..., None]
        if writes.scale is not None:
            weighted = weighted * writes.scale[:, :, None, None, None]
        in_normaliser = weighted
        if strength is not None:
            weighted = weighted * strength[..., None]
            in_normaliser = weighted if strength_in_normaliser else in_normaliser
        to_norm = in_normaliser.sum(-2)
        if chain is not None and rule == 'linear':  # z is one more column of M: one message instead of two
            both = affine_scan(
                torch.cat((weighted.mT @ values, to_norm[..., None]), dim=-1),
                torch.cat((past.kv_mem, past.k_norm[..., None]), dim=-1),
                decay=decay,
                chain=chain,
                cuts=cuts,
                backend=backend,
            )
            states, norms = both[..., :-1], both[..., -1]
            return Memories(states[:-1], norms[:-1]), Memories(states[-1].clone(), norms[-1].clone())
        norms = _normalisers(to_norm, past.k_norm, decay, chain, cuts, backend)
        erase = None
        if rule == 'delta':
            normaliser = keys @ norms[:-1, ..., None]
            # an empty memory holds nothing to erase
            shares = torch.where(normaliser > 0, normaliser, 1).reciprocal() * (normaliser > 0)
            erase = weighted.mT @ (keys * shares)
            erase = erase if decay is None else erase * decay[..., None, None]
        states = affine_scan(
            weighted.mT @ values, past.kv_mem, erase=erase, decay=decay, chain=chain, cuts=cuts, backend=backend
        )
        # clones, since a view of the last memory would keep the memories of all segments alive
        return Memories(states[:-1], norms[:-1]), Memories(states[-1].clone(), norms[-1].clone())


def chosen_rule(
    memory_rule: str | None, memory_decay: bool | None, use_mem_delta_rule: bool | None = None
) -> tuple[str, bool]:
    """Returns the rule and whether it decays, as the options of a model name them.

    Not to name them is to choose what costs nothing on text and still learns to remember: 'deltanet' with decay. A rule
    that is named, by either option, has no decay unless it is asked for, but for 'deltanet'.

    Args:
        memory_rule: a name in `MEMORY_RULES`, or None.
        memory_decay: whether the memory decays, or None.
        use_mem_delta_rule: the published option: True is 'delta', False is 'linear' unless memory_rule names another
            rule, None is not given.

    Raises:
        ValueError: if the rule is unknown, or if the options contradict each other.
    """
    if use_mem_delta_rule and memory_rule not in (None, 'delta'):
        raise ValueError(f"use_mem_delta_rule=True means memory_rule='delta', not {memory_rule!r}: give one of them")
    if memory_rule is None:
        memory_rule = 'deltanet' if use_mem_delta_rule is None else 'delta' if use_mem_delta_rule else 'linear'
    if memory_rule not in MEMORY_RULES:
        raise ValueError(f'memory_rule is {memory_rule!r}: give one of {", ".join(MEMORY_RULES)}')
    return memory_rule, memory_rule == 'deltanet' if memory_decay is None else memory_decay


def recall(queries: Tensor, memories: Recallable, rule: str) -> Tensor:
    """Returns what queries recall from memories (equation 3), (..., b, h, n, e). From an empty memory they recall 0.

    Args:
        queries: queries before rotation, (..., b, h, n, d). h is a multiple of g, and consecutive query heads share a
            memory.
        memories: the memories that enter the segment of the queries.
        rule: a name in `MEMORY_RULES`.
    """
    with no_autocast(queries.device.type):
        q = phi(queries, rule)
        # one product for each memory: its rows are all tokens of all query heads that share it
        q = q.reshape(memories.kv_mem.shape[0], -1 if q.numel() else 0, q.shape[-1])
        values = torch.bmm(q, memories.kv_mem)
        if rule != 'deltanet':
            normaliser = torch.bmm(q, memories.k_norm)
            values = values / (normaliser + (normaliser == 0))  # for an empty memory this is 0 / 1
        # a reshape would be the same, but `torch.export` gets lost in the strides when several heads share a memory
        return values.flatten().view(*queries.shape[:-1], values.shape[-1])


def local_share(gates: Tensor, written: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the share of the local attention, sigmoid(gates). It is 1 where nothing was ever written.

    Args:
        gates: broadcastable to (..., b, h, n).
        written: whether anything was ever written, (..., b, h, 1) bool.
        dtype: dtype of the result.
    """
    return torch.where(written, gates.to(dtype).sigmoid(), 1)


def mix(local: Tensor, recalled: Tensor, share: Tensor) -> Tensor:
    """Returns share * local + (1 - share) * recalled (equation 6), (..., b, h, n, e), in the dtype of `local`.

    Args:
        local: output of the local attention, (..., b, h, n, e).
        recalled: what `recall` returned, (..., b, h, n, e).
        share: the share of the local attention, broadcastable to (..., b, h, n).
    """
    return torch.lerp(recalled, local.to(recalled.dtype), share.unsqueeze(-1)).to(local.dtype)


def _prepared(writes: Writes, rule: str) -> Writes:
    """Returns the writes with feature-mapped keys, in float32 at least. Padded tokens get key 0 and log decay 0."""
    keys, values, strength, log_decay, mask, scale = writes
    if mask is not None:  # of everything, since 0 times NaN is NaN, in a gradient too
        hidden = ~mask[:, :, None]
        keys, values = (t.masked_fill(hidden[..., None], 0) for t in (keys, values))
        strength, log_decay = (None if t is None else t.masked_fill(hidden, 0) for t in (strength, log_decay))
    keys = phi(keys, rule)
    strength, log_decay, scale = (None if t is None else t.to(keys.dtype) for t in (strength, log_decay, scale))
    if mask is not None:
        keys = keys.masked_fill(hidden[..., None], 0)
    return Writes(keys, values.to(keys.dtype), strength, log_decay, mask, scale)


def _normalisers(
    updates: Tensor, start: Tensor, decay: Tensor | None, chain: Chain | None, cuts: tuple[int, ...], backend: str
) -> Tensor:
    """Returns the normalisers before the first segment and after each segment, (s + 1, b, g, d)."""
    if decay is None and chain is None:
        return torch.cat((start[None], updates)).cumsum(0)
    both = updates[..., None], start[..., None]
    return affine_scan(*both, decay=decay, chain=chain, cuts=cuts, backend=backend)[..., 0]


def _write_deltanet(
    writes: Writes, past: Memories, chain: Chain | None, cuts: tuple[int, ...], backend: str
) -> tuple[Memories, Memories]:
    """Writes with the rule deltanet. The tokens of a chunk are solved together (WY form).

    With u_t = beta_t (v_t - gamma_t k_t M_{t-1}), where M is the memory that enters the chunk,

        (I + T) u = beta v - beta G_t k M,   T_ti = beta_t (G_t / G_i) k_t k_i  for i < t,   G_t = gamma_1 ... gamma_t

    A chunk of n tokens turns M into G_n M + sum (G_n / G_i) k_i^T u_i. Since u is affine in M, so is this.
    """
    keys, values, strength, log_decay, mask, _ = writes
    strength = keys.new_ones(keys.shape[:-1]) if strength is None else strength
    segments, n = keys.shape[0], keys.shape[3]
    # `torch.export` would fix the number of chunks: one
    size = n if torch.compiler.is_exporting() else min(n, DELTANET_CHUNK)
    chunks = -(-n // size)
    strength = strength[..., None]
    # the keys that fill up the last chunk are 0, so they write nothing
    k, v, beta = (
        rearrange(F.pad(t, (0, 0, 0, chunks * size - n)), 's b g (c n) d -> (s c) b g n d', c=chunks)
        for t in (keys, values, strength)
    )
    beta_k = beta * k
    T = beta_k @ k.mT
    decayed, k_to_end, G_n = beta_k, k, None  # beta_t G_t k_t and (G_n / G_t) k_t, with G = 1 if nothing decays
    if log_decay is not None:
        padded = F.pad(log_decay, (0, chunks * size - n))
        log_G = rearrange(padded, 's b g (c n) -> (s c) b g n', c=chunks).cumsum(-1)[..., None]
        # these matrices are the largest here, so they are changed in place: log(G_t / G_i), of which only i < t is kept
        above = T.new_full((size, size), float('-inf')).triu()
        T = T * (log_G + (-log_G).mT).add_(above).exp_()
        decayed, k_to_end = beta_k * log_G.exp(), k * (log_G[..., -1:, :] - log_G).exp()
        G_n = log_G[..., -1, 0].exp()
    # u = u_v - u_k M. With unitriangular=True, only the part of T below the diagonal is used, as I + T needs. It is
    # solved transposed, which is how the solver wants its matrices: it would copy others
    u = torch.linalg.solve_triangular(
        T.mT, torch.cat((beta * v, decayed), dim=-1).mT, upper=True, left=False, unitriangular=True
    ).mT
    u_v, u_k = u.split((v.shape[-1], k.shape[-1]), dim=-1)
    # two products: what is erased is kept for backward, and with one product it would keep what is written, too
    states = affine_scan(
        k_to_end.mT @ u_v,
        past.kv_mem,
        erase=k_to_end.mT @ u_k,
        decay=G_n,
        chain=chain,
        cuts=tuple(chunks * cut for cut in cuts),
        backend=backend,
    )

    valid = keys.new_ones(segments, keys.shape[1]) if mask is None else mask.any(-1).to(keys.dtype)
    valid = valid[..., None, None].expand(-1, -1, *past.k_norm.shape[1:])
    if chain is None:
        written = torch.cat((past.k_norm[None], valid)).cummax(0).values
    else:  # the mark is the same in all heads and features, so one number a row is sent
        with torch.no_grad():
            firsts = valid[..., :1, :1, None], past.k_norm[:, :1, :1, None]
            counts = affine_scan(*firsts, chain=chain, backend=backend)
        written = counts[..., 0].clamp(max=1).expand(-1, *past.k_norm.shape)
    entering = Memories(states[:-1:chunks], written[:-1])
    return entering, Memories(states[-1].clone(), written[-1].clone())


def affine_scan(
    write: Tensor,
    start: Tensor,
    *,
    erase: Tensor | None = None,
    decay: Tensor | None = None,
    chain: Chain | None = None,
    cuts: tuple[int, ...] = (),
    backend: str = 'auto',
) -> Tensor:
    """Computes M_i = decay_i M_{i-1} - erase_i M_{i-1} + write_i for segments i = 1 .. s, one after the other.

    All of `write`, `erase` and `decay` are known when the scan starts, so a step is only two small operations. They run
    inside one custom operator with a backward of its own. Autograd and `torch.compile` do not see the single steps:
    recording each of them would cost more than the arithmetic. `benchmarks/scan.py` compares this loop with a chunked
    and an associative scan. On a GPU, one Triton kernel can do the whole loop (`scan_triton`).

    Args:
        write: what each segment writes, (s, b, g, d, e).
        start: the memory M_0 before the first segment, (b, g, d, e).
        erase: what each segment erases, (s, b, g, d, d). Default: None, 0.
        decay: the share of the memory that each segment keeps, (s, b, g). Default: None, 1.
        chain: the ranks over which the segments of a sequence are spread, in order. Each rank gives its own segments,
            and takes M_0 from the rank before it, except the first rank. Default: None, this process has all segments.
        cuts: numbers i, at most s. M_i then gets no gradient, neither from the segment after it nor from the rank after
            this one. They need a chain. Default: none.
        backend: what runs the loop. 'torch' is PyTorch. 'triton' is the Triton kernel, or an error. 'auto' is the
            kernel on a GPU, if Triton works there, all tensors are float32, and a key has at most 256 features or
            nothing is erased; else PyTorch. Sums without erasing and decay are one kernel in PyTorch as well, so
            'auto' leaves them to PyTorch. Default: 'auto'.

    Returns:
        M_0 to M_s, (s + 1, b, g, d, e). It can be differentiated once.

    Raises:
        ValueError: if `backend` is no name of a backend, or is 'triton' and the kernel cannot compute this scan.
    """
    if backend not in SCAN_BACKENDS:
        raise ValueError(f'backend is {backend!r}: give one of {", ".join(SCAN_BACKENDS)}')
    if chain is None:
        if write.shape[0] == 1 and torch.compiler.is_exporting():
            return _one_step(write, start, erase, decay)
        if erase is None and decay is None and write.device.type != 'cpu' and backend != 'triton':
            # a sum of all segments before: one kernel, not one for each segment. On a CPU the loop is ten times faster
            return torch.cat((start[None], write)).cumsum(0)
        return _scan(write, start, erase, decay, backend)
    if torch.is_grad_enabled() and not start.requires_grad:
        # all ranks must run backward, even if only another one has something to learn
        start = start.detach().requires_grad_()
    return _ChainedScan.apply(write, start, erase, decay, chain, cuts, backend)


def _one_step(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    """Returns the scan over a single segment, in plain operations: the custom operator exists in this library
    only."""
    after = write[0] + (start if decay is None else start * decay[0, ..., None, None])
    if erase is not None:
        after = after - erase[0] @ start
    return torch.stack((start, after))


@functools.cache
def _scan_triton() -> ModuleType | str:
    """Returns the module of the kernel, or why it cannot be imported."""
    try:
        from infini_transformer_pytorch import scan_triton
    except ImportError as error:
        return f'Triton cannot be imported ({error}): pip install triton'
    return scan_triton


def _kernels(backend: str, *tensors: Tensor | None, erases: bool) -> ModuleType | None:
    """Returns the module of the kernel if it computes a scan of these tensors, or None if PyTorch does."""
    first = tensors[0]
    assert first is not None
    if backend == 'torch' or not first.numel() or (backend == 'auto' and not first.is_cuda):
        return None
    module = _scan_triton()
    wrong = module if isinstance(module, str) else module.why_not(*tensors, erases=erases)
    if wrong is not None and backend == 'triton':
        raise ValueError(f"the scan cannot run with backend='triton': {wrong}. backend='auto' takes PyTorch then")
    return module if isinstance(module, ModuleType) and wrong is None else None


@torch.library.custom_op('infini_transformer_pytorch::affine_scan', mutates_args=())
def _scan(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None, backend: str = 'auto') -> Tensor:
    kernels = _kernels(backend, write, start, erase, decay, erases=erase is not None)
    if kernels is not None:
        return kernels.scan(write, start, erase, decay)
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
def _(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None, backend: str = 'auto') -> Tensor:
    return write.new_empty(write.shape[0] + 1, *start.shape)


@torch.library.custom_op('infini_transformer_pytorch::affine_scan_backward', mutates_args=())
def _scan_backward(grad_states: Tensor, erase: Tensor | None, decay: Tensor | None, backend: str = 'auto') -> Tensor:
    kernels = _kernels(backend, grad_states, erase, decay, erases=erase is not None)
    if kernels is not None:
        return kernels.scan_backward(grad_states, erase, decay)
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
def _(grad_states: Tensor, erase: Tensor | None, decay: Tensor | None, backend: str = 'auto') -> Tensor:
    return torch.empty_like(grad_states, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, _, erase, decay, ctx.backend = inputs
    ctx.save_for_backward(output, erase, decay)


def _backward(ctx, grad_states: Tensor):
    states, erase, decay = ctx.saved_tensors
    grads = _scan_backward(grad_states, erase, decay, ctx.backend)
    grad_erase, grad_decay = _grads_of_factors(grads[1:], states[:-1], erase, decay)
    return grads[1:], grads[0], grad_erase, grad_decay, None


def _grads_of_factors(
    after: Tensor, before: Tensor, erase: Tensor | None, decay: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of what the segments erase and keep.

    Args:
        after: the whole gradient of the memory after each segment, (s, b, g, d, e).
        before: the memory before each segment, (s, b, g, d, e).
        erase: see `affine_scan`.
        decay: see `affine_scan`.
    """
    grad_erase = None if erase is None else -(after @ before.mT)
    grad_decay = None if decay is None else (after * before).sum((-1, -2))
    return grad_erase, grad_decay


torch.library.register_autograd('infini_transformer_pytorch::affine_scan', _backward, setup_context=_setup_context)


class _ChainedScan(torch.autograd.Function):
    """The scan over the segments of all ranks: each takes its start from the rank before and hands its last state on.
    The gradient goes the other way.

    Receiving and sending are one function, so that backward always does both. If they were two, backward would leave
    one out on a rank where nothing depends on it, and the other rank would wait for ever.
    """

    @staticmethod
    def forward(
        ctx,
        write: Tensor,
        start: Tensor,
        erase: Tensor | None,
        decay: Tensor | None,
        chain: Chain,
        cuts: tuple[int, ...],
        backend: str,
    ) -> Tensor:
        if chain.rank > 0:
            start = chain.receive(start, chain.rank - 1)
        states = _scan(write, start, erase, decay, backend)
        if chain.rank + 1 < chain.size:
            chain.send(states[-1], chain.rank + 1)
        ctx.save_for_backward(states, erase, decay)
        ctx.chain, ctx.cuts, ctx.backend = chain, cuts, backend
        return states

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        states, erase, decay = ctx.saved_tensors
        chain, cuts, grad_states = ctx.chain, ctx.cuts, grad_outputs[0]
        segments = len(states) - 1
        last = grad_states[-1]
        if chain.rank + 1 < chain.size and segments not in cuts:
            last = last + chain.receive(last, chain.rank + 1)
        # from cut to cut, the last part first. A state that is cut is the end of a part, where it gets no gradient
        borders = [0, *(cut for cut in cuts if 0 < cut < segments), segments]
        after: list[Tensor] = []
        for begin, end in reversed(list(pairwise(borders))):
            part = slice(begin, end)
            ends = torch.zeros_like(last) if end in cuts else last
            grads = _scan_backward(
                torch.cat((grad_states[part], ends[None])),
                None if erase is None else erase[part],
                None if decay is None else decay[part],
                ctx.backend,
            )
            after.insert(0, grads[1:])
        grad_start = None
        if 0 not in cuts:
            if chain.rank > 0:
                chain.send(grads[0], chain.rank - 1)
            else:
                grad_start = grads[0]
        grad_write = torch.cat(after)
        return grad_write, grad_start, *_grads_of_factors(grad_write, states[:-1], erase, decay), None, None, None
