"""Attention over [XL | read | text | write] without a mask tensor.

Each kind of row sees a prefix of the keys, so the queries are split by kind, and every call is either full or causal:
that runs on kernels that take no mask. Only padding needs a mask, and then one masked call.

Who sees what, by the option memory_mask (text always sees XL, read, and the text up to itself):

    memory_mask   read rows see       write rows see
    'causal'      read up to itself   XL, read, text, write up to itself    (authors' Hugging Face code)
    'block'       all of read         everything                            (authors' LM-RMT code)
    'mixed'       all of read         XL, read, text, write up to itself

In an encoder (causal=False) every row sees everything.

Letters: b batch, n rows, h query heads, g key/value heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.layers import HeadNorm, attend, rotate, rotations_at


class Layout(NamedTuple):
    """How many keys of each kind there are; the rows of a segment are [read | text | write].

    Attributes:
        xl, read, text, write: numbers of keys.
        pattern: who sees whom: the memory_mask of a causal model, or 'encoder'.
    """

    xl: int
    read: int
    text: int
    write: int
    pattern: str


class Call(NamedTuple):
    """A call without a mask: rows [start, stop) attend to keys [key_start, key_stop) of [XL | read | text | write]."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    causal: bool


def attention_calls(layout: Layout, first_row: int = 0) -> list[Call]:
    """Returns the calls without a mask that together compute the rows from `first_row` on."""
    xl, read, text, write, pattern = layout
    rows = read + text + write
    keys = xl + rows
    if pattern == 'encoder':
        calls = [Call(0, rows, 0, keys, False)]
    elif pattern == 'block':
        calls = [
            Call(0, read, xl, xl + read, False),
            Call(read, read + text, 0, keys - write, True),
            Call(read + text, rows, 0, keys, False),
        ]
    elif pattern == 'causal' and not xl:
        calls = [Call(0, rows, 0, keys, True)]
    else:
        calls = [Call(0, read, xl, xl + read, pattern == 'causal'), Call(read, rows, 0, keys, True)]
    calls = [call._replace(start=max(call.start, first_row)) for call in calls]
    return [call for call in calls if call.start < call.stop]


def attention_mask(layout: Layout, *, xl_valid: Tensor, text_valid: Tensor) -> Tensor:
    """Returns the same as one mask that also hides what is not valid, (b, 1, rows, keys) bool.

    A padded position sees itself, so that no row is without a key.

    Args:
        layout: the numbers of keys, and who sees whom.
        xl_valid: (b, xl) bool, which XL memories are valid.
        text_valid: (b, text) bool, which text positions are valid.
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


class Positions(NamedTuple):
    """Rotary positions: memory stands at 0, where nothing turns, text at `first` + i, XL memories just before it.

    Attributes:
        dim_head: features of a head.
        theta: the base of the rotations.
        first: the position of the first text token.
    """

    dim_head: int
    theta: float
    first: int

    def text(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Returns the rotations of text positions, (stop - start, d / 2, 2); XL memories stand at negative ones.

        Args:
            start: the first position, counted from the first text token.
            stop: the position after the last.
            like: a tensor of the device, and of the dtype that will be rotated.
        """
        positions = torch.arange(start, stop, device=like.device) + self.first
        return rotations_at(positions, self.dim_head, theta=self.theta, dtype=like.dtype)

    def all(self, layout: Layout, like: Tensor) -> Tensor:
        """Returns the rotations of all keys of a layout, (xl + rows, d / 2, 2)."""
        text = self.text(-layout.xl, layout.text, like)
        memory = text.new_tensor((1.0, 0.0)).expand(layout.read, *text.shape[1:])
        return torch.cat((text[: layout.xl], memory, text[layout.xl :], memory))


class Surroundings(NamedTuple):
    """What the rows that a layer is given attend to: the rest of their segment, or a cache of it.

    Attributes:
        attend: called with the layer's attention, queries (b, h, rows, d) of the rows whose output is needed, and keys
            and values (b, g, n, d) of all rows that the layer was given, none of them rotated. Returns what the queries
            see, (b, h, rows, d).
        first_row: the first row whose output is needed; those after it are needed too. Default: 0.
    """

    attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
    first_row: int = 0


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, and optionally a norm on queries and keys.

    Args:
        dim: features of a row.
        heads: query heads.
        kv_heads: key/value heads, a divisor of `heads`.
        dim_head: features of a head.
        dropout: probability that an attention weight is dropped while training.
        qk_norm: whether queries and keys pass an RMS norm with a learned gain.
    """

    def __init__(self, dim: int, *, heads: int, kv_heads: int, dim_head: int, dropout: float, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = HeadNorm(dim_head, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim_head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Returns the outputs of the rows from `surroundings.first_row` on, for normed rows x (b, n, dim)."""
        q, k, v = self.project(x, surroundings.first_row)
        out = surroundings.attend(self, q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (b, h, n - first_row, d), and keys and values (b, g, n, d), of normed rows x (b, n, dim)."""
        q = self.to_q(x[:, first_row:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2, -1, q.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, backend: str
    ) -> Tensor:
        """One call of `layers.attend`, in training and in decoding alike, with this layer's dropout."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, causal=causal, mask=mask, dropout=dropout, backend=backend)


class SegmentRows:
    """All rows of a segment, [read | text | write]: what they attend to in one layer.

    After `attend` was called it holds the keys and values of the text.

    Args:
        layout: the numbers of keys, and who sees whom.
        xl: keys, not rotated, and values of the XL memories, (b, g, xl, d) each; None: there are none.
        rotations: of all keys, (xl + rows, d / 2, 2); None: nothing is rotated.
        mask: see `attention_mask`; None: everything is valid.
        backend: the name of an attention backend.
    """

    keys: Tensor  # of the text, not rotated, (b, g, text, d)
    values: Tensor  # of the text, (b, g, text, d)

    def __init__(
        self,
        layout: Layout,
        *,
        xl: tuple[Tensor, Tensor] | None,
        rotations: Tensor | None,
        mask: Tensor | None,
        backend: str,
    ):
        self.layout = layout
        self.xl = xl
        self.rotations = rotations
        self.mask = mask
        self.backend = backend

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Surroundings`; the queries are those of the last rows."""
        layout, first_row = self.layout, k.shape[2] - q.shape[2]
        text = slice(layout.read, layout.read + layout.text)
        self.keys, self.values = k[:, :, text], v[:, :, text]
        if self.xl is not None:
            k = torch.cat((self.xl[0].to(k.dtype), k), dim=2)
            v = torch.cat((self.xl[1].to(v.dtype), v), dim=2)
        if self.rotations is not None:
            q, k = rotate(q, self.rotations[layout.xl + first_row :]), rotate(k, self.rotations)
        if self.mask is not None:
            return attention.attend(q, k, v, mask=self.mask[:, :, first_row:], backend=self.backend)
        outs = [
            attention.attend(
                q[:, :, start - first_row : stop - first_row],
                k[:, :, key_start:key_stop],
                v[:, :, key_start:key_stop],
                causal=causal,
                backend=self.backend,
            )
            for start, stop, key_start, key_stop, causal in attention_calls(layout, first_row)
        ]
        # no row may be needed: with no memory tokens, when only the state is asked for
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0] if outs else q
