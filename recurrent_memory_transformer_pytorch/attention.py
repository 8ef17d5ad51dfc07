"""Attention over [XL | read | text | write] without a mask tensor.

Each kind of row sees a prefix of the keys, so the queries are split by kind and every call is either
full or causal: that runs on kernels that take no mask. Only padding needs a mask, then one masked call.

Who sees what (text always sees XL, read and the text up to itself):

    memory_mask   read rows see       write rows see
    'causal'      read up to itself   XL, read, text, write up to itself    (authors' Hugging Face code)
    'block'       all of read         everything                            (authors' LM-RMT code)
    'mixed'       all of read         XL, read, text, write up to itself

Letters: b batch, n positions, h query heads, g key/value heads, d features of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.attention import attend
from segment_recurrence_pytorch.layers import NORM_EPS, ResidualBlock, rotary_turns, rotate

FIRST_TEXT_POSITION = 10000  # far from the memory tokens, which stand at 0
ROTARY_THETA = 32768.0


class Layout(NamedTuple):
    """How many keys of each kind there are, the rows of a segment being [read | text | write], and who sees whom:
    the memory_mask of a causal model, or 'encoder'."""

    xl: int
    read: int
    text: int
    write: int
    arm: str


class Call(NamedTuple):
    """Rows [start, stop) attend to keys [key_start, key_stop) of [XL | read | text | write]."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    causal: bool


def attention_calls(layout: Layout, first_row: int = 0) -> list[Call]:
    """The mask-free calls that together compute the rows from `first_row` on."""
    xl, read, text, write, arm = layout
    rows = read + text + write
    keys = xl + rows
    if arm == 'encoder':
        calls = [Call(0, rows, 0, keys, False)]
    elif arm == 'block':
        calls = [
            Call(0, read, xl, xl + read, False),
            Call(read, read + text, 0, keys - write, True),
            Call(read + text, rows, 0, keys, False),
        ]
    elif arm == 'causal' and not xl:
        calls = [Call(0, rows, 0, keys, True)]
    else:
        calls = [Call(0, read, xl, xl + read, arm == 'causal'), Call(read, rows, 0, keys, True)]
    calls = [call._replace(start=max(call.start, first_row)) for call in calls]
    return [call for call in calls if call.start < call.stop]


def attention_mask(layout: Layout, *, xl_valid: Tensor, text_valid: Tensor) -> Tensor:
    """The same as one mask (b, 1, rows, keys) that also hides what is not valid.

    xl_valid (b, xl), text_valid (b, text). A padded position sees itself, so that no row is without a key.
    """
    xl, read, text, write, _ = layout
    rows = read + text + write
    allowed = torch.zeros(rows, xl + rows, dtype=torch.bool, device=text_valid.device)
    for start, stop, key_start, key_stop, is_causal in attention_calls(layout):
        block = allowed.new_ones(stop - start, key_stop - key_start)
        allowed[start:stop, key_start:key_stop] = block.tril(block.shape[1] - block.shape[0]) if is_causal else block
    memory_valid = text_valid.new_ones(text_valid.shape[0], max(read, write))
    key_valid = torch.cat((xl_valid, memory_valid[:, :read], text_valid, memory_valid[:, :write]), dim=1)
    itself = allowed.new_ones(allowed.shape).triu(xl).tril(xl)
    return (allowed & key_valid[:, None, None, :]) | itself


def text_turns(first: int, stop: int, dim_head: int, like: Tensor) -> Tensor:
    """Rotations (stop - first, d / 2, 2) of the text positions first to stop; XL memories stand at negative ones."""
    positions = torch.arange(first, stop, device=like.device) + FIRST_TEXT_POSITION
    return rotary_turns(positions, dim_head, theta=ROTARY_THETA, dtype=like.dtype)


def layout_turns(layout: Layout, dim_head: int, like: Tensor) -> Tensor:
    """Rotations (xl + rows, d / 2, 2): memory at 0, where nothing turns."""
    text = text_turns(-layout.xl, layout.text, dim_head, like)
    memory = text.new_tensor((1.0, 0.0)).expand(layout.read, *text.shape[1:])
    return torch.cat((text[: layout.xl], memory, text[layout.xl :], memory))


class Attention(nn.Module):
    """Multi-head attention of one segment, with grouped keys and values and optional query/key norm."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        dim_head: int,
        dropout: float,
        qk_norm: bool,
    ):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        backend: str,
        first_row: int = 0,
        xl: tuple[Tensor, Tensor] | None = None,
        turns: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, n, dim), the rows [read | text | write].

        first_row: the first row whose output is needed. xl: keys (not rotated) and values, each (b, g, xl, d).
        turns (xl + n, d / 2, 2) of all keys. mask (b, 1, n, xl + n), see `attention_mask`.
        Returns the output of the rows from first_row on, and the text's keys (not rotated) and values (b, g, text, d).
        """
        q, k, v = self.project(x, first_row)
        text = slice(layout.read, layout.read + layout.text)
        text_k, text_v = k[:, :, text], v[:, :, text]
        if xl is not None:
            k = torch.cat((xl[0].to(k.dtype), k), dim=2)
            v = torch.cat((xl[1].to(v.dtype), v), dim=2)
        if turns is not None:
            q, k = rotate(q, turns[layout.xl + first_row :]), rotate(k, turns)
        dropout = self.dropout if self.training else 0.0
        if mask is not None:
            out = attend(q, k, v, mask=mask[:, :, first_row:], dropout=dropout, backend=backend)
        else:
            outs = [
                attend(
                    q[:, :, start - first_row : stop - first_row],
                    k[:, :, key_start:key_stop],
                    v[:, :, key_start:key_stop],
                    causal=causal,
                    dropout=dropout,
                    backend=backend,
                )
                for start, stop, key_start, key_stop, causal in attention_calls(layout, first_row)
            ]
            # no row may be needed: with no memory tokens, when only the state is asked for
            out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0] if outs else q
        return self.merge(out), text_k, text_v

    def project(self, x: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, n, dim) -> queries (b, h, n - first_row, d), keys and values (b, g, n, d), not rotated."""
        q = self.to_q(x[:, first_row:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2, -1, q.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, out: Tensor) -> Tensor:
        """(b, h, n, d) -> (b, n, dim)."""
        return self.to_out(out.transpose(1, 2).flatten(-2))


class Block(ResidualBlock):
    """One layer; arguments as in `Attention`."""

    def __init__(self, dim: int, *, ff_mult: float, ff_dropout: float, **attention):
        attn = Attention(dim, **attention)
        super().__init__(dim, attn, ff_mult=ff_mult, ff_dropout=ff_dropout, norm_eps=NORM_EPS)

    def forward(self, x: Tensor, layout: Layout, *, first_row: int, **attention) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, rows, dim) -> the rows from first_row on, and the text's keys and values, see `Attention`."""
        out, keys, values = self.attn(self.attn_norm(x), layout, first_row=first_row, **attention)
        return self.add(x[:, first_row:], out), keys, values
