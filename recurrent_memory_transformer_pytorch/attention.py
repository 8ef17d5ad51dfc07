"""Attention over the keys [XL | read | text | write], without a mask tensor.

The rows of a segment are its positions inside the model: the read rows, the text and the write rows. XL are the keys of
earlier text. Rows of one kind attend to one range of keys. The queries are therefore split by kind, and each call of
attention is either full or causal, so it can run on the fast kernels, which take no mask. Only padding needs a mask
tensor; then there is one call for all rows.

What the rows see depends on the option memory_mask. Text rows always see XL, all read rows, and text rows up to
themselves.

    memory_mask   a read row sees          a write row sees                          source
    'causal'      read rows up to itself   XL, read, text, write rows up to itself   authors' Hugging Face code
    'block'       all read rows            all keys                                  authors' LM-RMT code
    'mixed'       all read rows            XL, read, text, write rows up to itself

In an encoder (causal=False), every row sees everything.

Letters: b rows of the batch, n rows of a segment, h query heads, g key/value heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.layers import NORM_EPS, HeadNorm, attend, constants, rotate, rotations_between


class Layout(NamedTuple):
    """The number of keys of each kind, and who sees whom. The rows of a segment are [read | text | write].

    Attributes:
        xl: number of XL keys.
        read: number of read rows.
        text: number of text rows.
        write: number of write rows.
        pattern: the option memory_mask of a causal model, or 'encoder'.
    """

    xl: int
    read: int
    text: int
    write: int
    pattern: str


class Call(NamedTuple):
    """A call of attention that needs no mask.

    Attributes:
        start: its first query row, counted in [read | text | write].
        stop: the row after its last query row.
        key_start: its first key, counted in [XL | read | text | write].
        key_stop: the key after its last one.
        causal: whether the call is causal.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    causal: bool


def attention_calls(layout: Layout, first_row: int = 0) -> list[Call]:
    """Returns the calls of attention without a mask that together compute the needed rows.

    Args:
        layout: the numbers of keys, and who sees whom.
        first_row: the first row that is needed; all rows after it are needed too. Default: 0.
    """
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
    # a comparison, since `torch.export` takes a maximum for a new size, of which it knows nothing
    calls = [call if call.start >= first_row else call._replace(start=first_row) for call in calls]
    return [call for call in calls if call.start < call.stop]


def attention_mask(layout: Layout, *, xl_valid: Tensor, text_valid: Tensor) -> Tensor:
    """Returns a mask that says the same as `attention_calls` and also hides padding, (b, 1, rows, keys) bool.

    A padded position sees itself, so that every row sees at least one key.

    Args:
        layout: the numbers of keys, and who sees whom.
        xl_valid: which XL memories are valid, (b, xl) bool.
        text_valid: which text positions are valid, (b, text) bool.
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
    """Rotary positions of all keys: read and write rows are at 0, where nothing is rotated, the i-th text position is
    at `first` + i, and XL memories are just before the text.

    Attributes:
        dim_head: features of a head d.
        theta: base of the frequencies.
        first: the position of the first text token.
    """

    dim_head: int
    theta: float
    first: int

    def text(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Returns the rotations of a range of text positions, (stop - start, d / 2, 2).

        Args:
            start: the first position, counted from the first text token of the segment. XL memories have negative
                positions.
            stop: the position after the last one.
            like: a tensor with the device and dtype of what will be rotated.
        """
        first = self.first
        return rotations_between(first + start, first + stop, self.dim_head, theta=self.theta, like=like)

    def all(self, layout: Layout, like: Tensor) -> Tensor:
        """Returns the rotations of all keys of a layout, (xl + rows, d / 2, 2).

        Args:
            layout: the numbers of keys.
            like: a tensor with the device and dtype of what will be rotated.
        """

        def made() -> Tensor:
            text = self.text(-layout.xl, layout.text, like)
            # the rotations of position 0 turn nothing
            memory = rotations_between(0, 1, self.dim_head, theta=self.theta, like=like).expand(layout.read, -1, -1)
            return torch.cat((text[: layout.xl], memory, text[layout.xl :], memory))

        if type(self) is not Positions:  # what another class computes may depend on more than its fields
            return made()
        return constants.get(('all', self, layout, like.dtype, like.device), like.device, made)


class Surroundings(NamedTuple):
    """What the rows of a layer may attend to: the rest of their segment, or a cache of it.

    Attributes:
        attend: a function that is called with the layer's attention, the queries (b, h, rows, d) of the rows whose
            output is needed, and the keys and values (b, g, n, d) of all rows that the layer gets. None of them are
            rotated. It returns the outputs (b, h, rows, d).
        first_row: the first row whose output is needed; the output of all rows after it is needed too. Default: 0.
    """

    attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
    first_row: int = 0


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values.

    Args:
        dim: features of a row.
        heads: number of query heads h.
        kv_heads: number of key/value heads g, a divisor of `heads`.
        dim_head: features of a head d.
        dropout: probability that an attention weight is dropped during training.
        qk_norm: whether queries and keys go through an RMS norm with a learned gain.
    """

    def __init__(self, dim: int, *, heads: int, kv_heads: int, dim_head: int, dropout: float, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = HeadNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim_head, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Returns the outputs of the rows from `surroundings.first_row` on, (b, n - first_row, dim).

        Args:
            x: rows after the norm of the layer, (b, n, dim).
            surroundings: what the rows may attend to.
        """
        q, k, v = self.project(x, surroundings.first_row)
        out = surroundings.attend(self, q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (b, h, n - first_row, d), keys (b, g, n, d) and values (b, g, n, d).

        Args:
            x: rows after the norm of the layer, (b, n, dim).
            first_row: the first row that needs a query. Default: 0.
        """
        q = self.to_q(x[:, first_row:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2, -1, q.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, backend: str
    ) -> Tensor:
        """Calls `layers.attend` with the dropout of this layer. Whole segments and generation both use it."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, causal=causal, mask=mask, dropout=dropout, backend=backend)


class SegmentRows:
    """The surroundings of all rows of a segment, [read | text | write], in one layer.

    After a call of `attend`, the attributes `keys` and `values` are set.

    Args:
        layout: the numbers of keys, and who sees whom.
        xl: keys before rotation and values of the XL memories, (b, g, xl, d) each. None: there are none.
        rotations: the rotations of all keys, (xl + rows, d / 2, 2). None: nothing is rotated.
        mask: the mask from `attention_mask`. None: all positions are valid.
        backend: the name of an attention backend.

    Attributes:
        keys: keys of the text before rotation, (b, g, text, d).
        values: values of the text, (b, g, text, d).
    """

    keys: Tensor
    values: Tensor

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
        """See `Surroundings.attend`. The queries are those of the last rows."""
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
        # `outs` is empty if no row is needed: in the last layer, without memory tokens, if only the state is needed
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0] if outs else q
