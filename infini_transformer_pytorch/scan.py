"""The one sequential part of the Infini-Transformer: a scan over small matrices, one a segment.

    M_i = decay_i M_{i-1} - erase_i M_{i-1} + write_i

All of erase, write and decay are there when the scan starts, so it is two small operations a segment, out of sight of
autograd and of `torch.compile` (a custom operator with its own backward): a loop that either of them records costs
more than the arithmetic. `benchmarks/scan.py` measures it against the chunked and the associative form.

Letters: s segments, b batch, g key/value heads, d key features, e value features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_scan(write: Tensor, start: Tensor, *, erase: Tensor | None = None, decay: Tensor | None = None) -> Tensor:
    """States (s + 1, b, g, d, e): start, then the state after each segment.

    write (s, b, g, d, e), start (b, g, d, e), erase (s, b, g, d, d), decay (s, b, g). Differentiable once.
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
