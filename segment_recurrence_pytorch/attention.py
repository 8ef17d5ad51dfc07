"""attend(): softmax attention with named backends, and no silent fallback.

    sdpa     torch's scaled_dot_product_attention; takes everything
    flash2   the `flash-attn` package (FlashAttention-2): CUDA, half types, no mask tensor
    naive    einsum and softmax: what the others are tested against
    auto     flash2 where it can compute this call, else sdpa

FlashAttention-3 and 4 come through sdpa, by the user's own process-wide act
(`torch.nn.attention.activate_flash_attention_impl`).

Letters: b batch, h query heads, g key/value heads, i queries, j keys, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ('auto', 'sdpa', 'flash2', 'naive')


class AttentionCall(NamedTuple):
    """One call of `attend`: which backend ran, with which lengths."""

    backend: str
    num_queries: int
    num_keys: int
    causal: bool
    masked: bool


_recorders: list[list[AttentionCall]] = []


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = 'auto',
) -> Tensor:
    """Attention of q (b, h, i, d) over k, v (b, g, j, d), h a multiple of g. Returns (b, h, i, d).

    causal: the queries are the last i of the j positions, and see no later one (aligned to the lower right).
    mask: bool, broadcastable to (b, h, i, j), True = may attend; it says everything, so not with `causal`.
    backend: a name of `BACKENDS`. ValueError if the one named cannot compute this call.
    """
    if causal and mask is not None:
        raise ValueError('attend takes causal=True or a mask, not both: put the causal rule into the mask')
    if causal and q.shape[-2] > k.shape[-2]:
        raise ValueError(f'causal attention of {q.shape[-2]} queries needs as many keys, got {k.shape[-2]}')
    masked = mask is not None
    name = choose_backend(backend, device=q.device, dtype=q.dtype, masked=masked, dim_head=q.shape[-1])
    if _recorders:
        for calls in _recorders:
            calls.append(AttentionCall(name, q.shape[-2], k.shape[-2], causal, masked))
    return _RUN[name](q, k, v, causal, mask, dropout)


def choose_backend(
    backend: str, *, device: torch.device, dtype: torch.dtype, masked: bool = False, dim_head: int = 64
) -> str:
    """The backend that `attend` runs for such inputs. ValueError, with the reason, if the one named cannot."""
    if backend == 'auto':
        return 'sdpa' if _flash2_refusal(device, dtype, masked, dim_head) else 'flash2'
    if backend == 'flash2':
        reason = _flash2_refusal(device, dtype, masked, dim_head)
        if reason:
            raise ValueError(f"attention backend 'flash2' {reason}; use 'auto' or 'sdpa'")
    elif backend not in BACKENDS:
        raise ValueError(f'attention backend {backend!r} is unknown: choose one of {", ".join(BACKENDS)}')
    return backend


@contextmanager
def record_attention() -> Iterator[list[AttentionCall]]:
    """Lists the attention calls made inside the `with` block: which backend ran, on what."""
    calls: list[AttentionCall] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders[:] = [kept for kept in _recorders if kept is not calls]


def _flash2_refusal(device: torch.device, dtype: torch.dtype, masked: bool, dim_head: int) -> str | None:
    if device.type != 'cuda':
        return f'needs a CUDA device, not {device.type}'
    if dtype not in (torch.float16, torch.bfloat16):
        return f'takes float16 and bfloat16, not {dtype}'
    if masked:
        return 'takes no mask tensor'
    if dim_head > 256:
        return f'takes heads of at most 256 features, not {dim_head}'
    if _flash_attn_func() is None:
        return "needs the package flash-attn: pip install 'segment-recurrence-pytorch[flash]'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less'
    return None


@cache
def _flash_attn_func() -> Callable | None:
    # find_spec would also find flash-attn-4, which lacks this function
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    # is_causal is aligned to the upper left. The CPU's kernel takes a mask at no cost; elsewhere queries in front,
    # computed and dropped, make the problem square, and it stays on the kernels that take no mask
    prefix = k.shape[-2] - q.shape[-2] if causal else 0
    if prefix and q.device.type == 'cpu':
        mask, causal = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(prefix), False
        prefix = 0
    if prefix:
        q = F.pad(q, (0, 0, prefix, 0))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[:, :, prefix:] if prefix else out


def _flash2(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    flash_attn_func = _flash_attn_func()
    assert flash_attn_func is not None  # choose_backend saw to it
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(q, k, v, dropout_p=dropout, causal=causal).transpose(1, 2)


def _naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum('bhid,bhjd->bhij', q, k) * q.shape[-1] ** -0.5
    if causal:
        i, j = scores.shape[-2:]
        mask = torch.ones(i, j, dtype=torch.bool, device=q.device).tril(j - i)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum('bhij,bhjd->bhid', weights, v)


_RUN: dict[str, Callable] = {'sdpa': _sdpa, 'flash2': _flash2, 'naive': _naive}
