"""Layers that both models use: GEGLU feed-forward (arXiv 2002.05202) and rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class FeedForward(nn.Module):
    """GEGLU: (b, n, dim) -> (b, n, dim), with int(dim * mult * 2 / 3) inner features."""

    def __init__(self, dim: int, *, mult: float = 4, dropout: float = 0.0):
        super().__init__()
        inner = int(dim * mult * 2 / 3)
        self.proj_in = nn.Linear(dim, inner * 2)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        x, gates = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(self.dropout(F.gelu(gates) * x))


class ResidualBlock(nn.Module):
    """Pre-norm attention and GEGLU feed-forward, each with a residual; a model's block says what attention takes."""

    def __init__(self, dim: int, attn: nn.Module, *, ff_mult: float, ff_dropout: float, norm_eps: float):
        super().__init__()
        self.attn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attn: Any = attn
        self.ff_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ff = FeedForward(dim, mult=ff_mult, dropout=ff_dropout)

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x (..., n, dim) after the attention's output and the feed-forward."""
        x = x + out
        return x + self.ff(self.ff_norm(x))


def no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off inside the `with` block; costs nothing where it is off already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def rotary_turns(positions: Tensor, dim_head: int, *, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosine and sine (n, dim_head / 2, 2) for positions (n,), in float32 at least: at position 10000 half types
    cannot tell neighbours apart. Nothing is stored on the module, so `.half()` cannot round the frequencies."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim_head, 2, device=positions.device, dtype=dtype) / dim_head
    angles = positions.to(dtype)[:, None] * theta**-exponents
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(t: Tensor, turns: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i + 1) of t (..., n, d) by turns (..., n, d / 2, 2); computed in the turns' dtype."""
    with no_autocast(t.device.type):
        pairs = t.to(turns.dtype).unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # compilers fuse real operations, and have no complex ones
            x, y = pairs.unbind(-1)
            cos, sin = turns.unbind(-1)
            turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1)
        else:  # eager, one complex product is four times faster
            turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(turns))
        return turned.flatten(-2).to(t.dtype)
