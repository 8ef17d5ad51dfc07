"""The open segment of a model that decodes: keys and values of each layer in buffers of one segment.

While all rows stand at the same position, known to the host, what is attended to is a slice and no mask is needed. Rows
of different lengths, and compiled steps, whose shapes must not change, attend to the whole buffers through a mask.

Letters: b batch, g key/value heads, p keys in front of the text, n text positions, d features of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segment_recurrence_pytorch.attention import attend
from segment_recurrence_pytorch.state import State, leaves, map_state


class Slots(NamedTuple):
    """Where the next tokens of each row go: from `start` on in all rows, or to `columns` (b, n) of the text."""

    tokens: int
    start: int | None
    columns: Tensor | None
    mask: Tensor | None  # (b, 1, n, p + length + 1), True = may attend


class SegmentCache(ABC):
    """Not a value: `extend` and `close_segment` change it in place. A model's own cache adds what it needs.

    state: the state at the border where each row's segment began.
    Its buffers have p + length + 1 slots: the last one takes what a row does not append.
    aligned: the number of tokens in the open segment, in every row; None: `positions` (b,) says it for each row.
    static: shapes and addresses never change, for compiled steps.
    """

    aligned: int | None = 0
    static = False
    first_key = 0  # while aligned, keys before it are empty

    def __init__(self, state: State, *, batch: int, prefix: int, length: int, device: torch.device):
        self.state, self.batch, self.prefix, self.length = state, batch, prefix, length
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.prefix_valid = torch.ones(batch, prefix, dtype=torch.bool, device=device)

    def buffers(self, layers: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Buffers (b, heads, slots, ...), one a layer. Zeros: what a mask hides must be finite."""
        return [torch.zeros(self.batch, *shape, dtype=dtype, device=self.positions.device) for _ in range(layers)]

    def extend(self, model: Any, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """See `SegmentModel.extend`: hidden states (b, n, d) of the next tokens (b, n)."""
        slots = self.slots(tokens.shape[1], lengths)
        x = self.read(model, model.embed(tokens), slots)
        self.move(slots, lengths)
        return model.norm(x)

    def close(self, model: Any, rows: Tensor | None) -> None:
        """See `SegmentModel.close_segment`. An empty segment is not closed."""
        rows = self.rows_to_close(rows)
        if self.aligned == 0:
            return
        self.set_state(self.written_state(model, rows))
        self.start_again(rows)
        self.enter(model)

    @abstractmethod
    def read(self, model: Any, x: Tensor, slots: Slots) -> Tensor:
        """What the layers make of the embeddings x (b, n, d) of the next tokens, which are put into the buffers."""

    @abstractmethod
    def written_state(self, model: Any, rows: Tensor | None) -> State:
        """The state after the open segment in those rows (None: all), and as it is in the others."""

    @abstractmethod
    def enter(self, model: Any) -> None:
        """Prepares what is read of the state, at the start and after each border."""

    def slots(self, count: int, lengths: Tensor | None) -> Slots:
        """Where `count` columns of tokens go, of which row i has lengths[i]. ValueError if the segment is too short for
        aligned rows; where each row has its own position, no value is looked at."""
        if self.aligned is not None and lengths is None:
            if self.aligned + count > self.length:
                raise ValueError(
                    f'{count} tokens after {self.aligned} in a segment of {self.length}: close the segment first'
                )
            return Slots(count, self.aligned, None, None)
        self.make_ragged()
        columns = torch.arange(count, device=self.positions.device)
        index = self.positions[:, None] + columns
        if lengths is not None:
            index = torch.where(columns < lengths[:, None], index, self.length)
        index = index.clamp_max(self.length)
        text = torch.arange(self.length + 1, device=index.device)
        mask = text <= index[..., None]
        mask = torch.cat((self.prefix_valid[:, None].expand(-1, count, -1), mask), dim=-1)
        return Slots(count, None, index, mask[:, None])

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, slots: Slots, backend: str) -> Tensor:
        """What new queries (b, h, n, d) see in buffers (b, g, p + length + 1, d) that hold their keys and values."""
        if slots.start is not None:
            seen = slice(self.first_key, self.prefix + slots.start + slots.tokens)
            keys, values = keys[:, :, seen], values[:, :, seen]
        causal = slots.mask is None and slots.tokens > 1
        return attend(q, keys, values, causal=causal, mask=slots.mask, backend=backend)

    def put(self, buffer: Tensor, new: Tensor, slots: Slots, prefix: int = 0) -> None:
        """Stores `new` (b, g, n, ...) in the slots of a buffer (b, g, prefix + length + 1, ...)."""
        if slots.start is not None:
            start = prefix + slots.start
            buffer[:, :, start : start + slots.tokens] = new
        elif slots.columns is not None:
            # of the ways to say it, the one that a compiler does in place
            buffer[self.rows, :, slots.columns + prefix] = new.transpose(1, 2).to(buffer.dtype)

    def of(self, table: Tensor, slots: Slots) -> Tensor:
        """Rows of a table (positions, ...) for the new tokens: (n, ...), or (b, n, ...) where rows differ."""
        if slots.start is not None:
            return table[slots.start : slots.start + slots.tokens]
        assert slots.columns is not None
        return table[slots.columns.clamp_max(self.length - 1)]

    def turns_of(self, turns: Tensor, slots: Slots) -> Tensor:
        """Rotations (positions, d / 2, 2) for the new tokens, as (b, h, n, d) takes them."""
        chosen = self.of(turns, slots)
        return chosen if slots.columns is None else chosen[:, None]

    def move(self, slots: Slots, lengths: Tensor | None) -> None:
        """Counts the tokens that were appended."""
        if self.aligned is not None:
            self.aligned += slots.tokens
        else:
            self.positions.add_(slots.tokens if lengths is None else lengths)

    def text_valid(self) -> Tensor:
        """(b, length) bool: which text positions hold a token."""
        return torch.arange(self.length, device=self.positions.device) < self.positions[:, None]

    def rows_to_close(self, rows: Tensor | None) -> Tensor | None:
        """Of `rows` (b,), those with a token in their segment; None if that is all rows and they are aligned."""
        if rows is not None:
            self.make_ragged()
        if self.aligned is not None:
            return None
        return self.positions > 0 if rows is None else rows & (self.positions > 0)

    def start_again(self, rows: Tensor | None) -> None:
        """Those rows (None: all, aligned) are at the start of a segment."""
        if rows is None:
            self.aligned = 0
        else:
            self.positions.masked_fill_(rows, 0)

    def make_ragged(self) -> None:
        """From now on each row has a position of its own."""
        if self.aligned is not None:
            self.positions.fill_(self.aligned)
            self.aligned = None

    def make_static(self) -> None:
        """From now on no shape changes and every tensor stays where it is: steps can be compiled, and replayed."""
        self.make_ragged()
        self.state = map_state(torch.clone, self.state)
        self.static = True
        if self.positions.is_cuda:  # graphs that are replayed may change what does not move
            for tensor in leaves(vars(self)):
                torch._dynamo.mark_static_address(tensor)

    def set_state(self, state: State) -> None:
        """The state at a new border: a new value, but copied into place where addresses must stay."""
        if not self.static:
            self.state = state
            return
        for old, new in zip(leaves(self.state), leaves(state), strict=True):
            old.copy_(new)

    def state_now(self) -> State:
        """The state at each row's border, as a value that later steps do not change."""
        return map_state(torch.clone, self.state) if self.static else self.state
