"""The open segment of a model that decodes: what was read of it so far, and where each row of the batch stands in it.

    OpenSegment     what generation asks of an open segment, and where each row stands in it
    RereadSegment   keeps the tokens and reads them again for every new one: what every model has by default
    SegmentCache    keeps the keys and values of a transformer's layers: one position of work for a new token

An open segment is not a value: `extend` and `close` change it in place.

While all rows stand at the same position, known to the host, the rows are aligned: what is attended to is a slice, and
no mask is needed. Rows that stand at different positions, and compiled steps, whose shapes must not change, use the
whole buffers and a mask.

Letters: b batch, g key/value heads, p keys in front of the text, n text positions, d features of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from segment_recurrence_pytorch.state import State, leaves, map_state

if TYPE_CHECKING:
    from segment_recurrence_pytorch.model import SegmentModel


class Slots(NamedTuple):
    """Where the next tokens go in a segment.

    Attributes:
        tokens: how many columns of tokens there are.
        start: the position of the first one, the same in all rows; None if rows differ.
        columns: the position of each token, (b, n), if rows differ. A token that its row does not append has the
            position after the last one, where nobody looks.
    """

    tokens: int
    start: int | None
    columns: Tensor | None


class OpenSegment(ABC):
    """What generation asks of the segment that a model has open in each row.

    Attributes:
        state: the state at the border where the segment of each row began.
        length: the most tokens that a segment holds.
        aligned: how many tokens the segment holds, if that is the same in every row; else None, and `positions` (b,)
            says it for each row.
        static: whether shapes and addresses never change, which compiled steps need.
    """

    aligned: int | None = 0
    static = False

    def __init__(self, state: State, *, batch: int, length: int, device: torch.device):
        self.state, self.batch, self.length = state, batch, length
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)

    @torch.no_grad()
    def extend(self, model: Any, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads the next tokens of the open segments, without a graph.

        Args:
            model: the model that opened the segment.
            tokens: ids (b, n).
            lengths: (b,), row i appends its first lengths[i] tokens, at most n. Default: None, all n.

        Returns:
            The hidden states (b, n, dim) that `advance` gives at these positions.

        Raises:
            ValueError: if aligned rows would hold more than `length` tokens. Where rows differ, no value is looked at.
        """
        slots = self.slots(tokens.shape[1], lengths)
        hidden = self.read(model, tokens, slots, lengths)
        if self.aligned is not None:
            self.aligned += slots.tokens
        else:
            self.positions.add_(slots.tokens if lengths is None else lengths)
        return hidden

    @torch.no_grad()
    def close(self, model: Any, rows: Tensor | None = None) -> None:
        """Ends the segments of some rows, which go over to the state that `advance` returns, and to a new segment.

        A segment without a token is not closed.

        Args:
            model: the model that opened the segment.
            rows: (b,) bool. Default: None, all rows.
        """
        if rows is not None:
            self.make_ragged()
        if self.aligned == 0:
            return
        if self.aligned is None:
            rows = self.positions > 0 if rows is None else rows & (self.positions > 0)
        self.set_state(self.state_after(model, rows))
        if rows is None:
            self.aligned = 0
        else:
            self.positions.masked_fill_(rows, 0)
        self.enter(model)

    @abstractmethod
    def read(self, model: Any, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """Reads tokens (b, n), puts what later ones need into `slots`, and returns the hidden states (b, n, dim)."""

    @abstractmethod
    def state_after(self, model: Any, rows: Tensor | None) -> State:
        """Returns the state after the open segment in those rows (b,) (None: in all), and as it is in the others."""

    def enter(self, model: Any) -> None:  # noqa: B027  nothing to prepare is the usual case
        """Prepares what is read of the state, after each border. By default: nothing."""

    def slots(self, count: int, lengths: Tensor | None) -> Slots:
        """Returns where `count` columns of tokens go, of which row i appends lengths[i] (None: all)."""
        if self.aligned is not None and lengths is None:
            if self.aligned + count > self.length:
                raise ValueError(
                    f'{count} tokens after {self.aligned} in a segment of {self.length}: close the segment first'
                )
            return Slots(count, self.aligned, None)
        self.make_ragged()
        columns = torch.arange(count, device=self.positions.device)
        index = self.positions[:, None] + columns
        if lengths is not None:
            index = torch.where(columns < lengths[:, None], index, self.length)
        return Slots(count, None, index.clamp_max(self.length))

    def text_valid(self) -> Tensor:
        """Returns which text positions hold a token, (b, length) bool. For rows that are not aligned."""
        return torch.arange(self.length, device=self.positions.device) < self.positions[:, None]

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
        """Takes the state at a new border: as it is, or copied into place where addresses must stay."""
        if not self.static:
            self.state = state
            return
        for old, new in zip(leaves(self.state), leaves(state), strict=True):
            old.copy_(new)

    def state_now(self) -> State:
        """Returns the state at each row's border, as a value that later steps do not change."""
        return map_state(torch.clone, self.state) if self.static else self.state


class RereadSegment(OpenSegment):
    """Keeps the tokens of the open segment and reads them again for every new one, and once more to close it.

    It needs nothing of a model but `advance`, so it is exact for every causal model. A new token costs as much as
    reading the segment.
    """

    def __init__(self, model: SegmentModel, state: State, segment_length: int):
        batch = leaves(state)[0].shape[0]
        super().__init__(state, batch=batch, length=segment_length, device=model.device)
        # the last column takes what a row does not append
        self.tokens = torch.zeros(batch, segment_length + 1, dtype=torch.long, device=model.device)

    def read(self, model: SegmentModel, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`."""
        if slots.start is not None:
            stop = slots.start + slots.tokens
            self.tokens[:, slots.start : stop] = tokens
            hidden, _ = model.advance(self.tokens[:, :stop], self.state)
            return hidden[:, slots.start :]
        assert slots.columns is not None
        self.tokens.scatter_(1, slots.columns, tokens)
        counts = self.positions + (slots.tokens if lengths is None else lengths)
        valid = torch.arange(self.length, device=counts.device) < counts[:, None]
        hidden, _ = model.advance(self.tokens[:, : self.length], self.state, mask=valid)
        index = slots.columns.clamp_max(self.length - 1)[..., None]
        return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))

    def state_after(self, model: SegmentModel, rows: Tensor | None) -> State:
        """See `OpenSegment.state_after`. A row that does not close has no valid token, and so keeps its state."""
        if rows is None:
            return model.advance(self.tokens[:, : self.aligned], self.state, need_hidden=False)[1]
        mask = self.text_valid() & rows[:, None]
        return model.advance(self.tokens[:, : self.length], self.state, mask=mask, need_hidden=False)[1]


class SegmentCache(OpenSegment):
    """Keys and values of a transformer's layers, in buffers of one segment; a model's own cache adds what it needs.

    Each buffer has p + length + 1 slots: p keys in front of the text, the text, and a last slot that takes what a row
    does not append.
    """

    first_key = 0  # while rows are aligned, the keys before it are empty

    def __init__(self, state: State, *, batch: int, prefix: int, length: int, device: torch.device):
        super().__init__(state, batch=batch, length=length, device=device)
        self.prefix = prefix
        self.rows = torch.arange(batch, device=device)[:, None]
        self.prefix_valid = torch.ones(batch, prefix, dtype=torch.bool, device=device)

    def buffers(self, layers: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Returns one buffer (b, *shape) for each layer. Zeros, since what a mask hides must be finite."""
        return [torch.zeros(self.batch, *shape, dtype=dtype, device=self.positions.device) for _ in range(layers)]

    def mask(self, slots: Slots) -> Tensor | None:
        """Returns which keys the next tokens may attend to, (b, 1, n, p + length + 1) bool; None for aligned rows."""
        if slots.columns is None:
            return None
        text = torch.arange(self.length + 1, device=slots.columns.device)
        seen = text <= slots.columns[..., None]
        return torch.cat((self.prefix_valid[:, None].expand(-1, slots.tokens, -1), seen), dim=-1)[:, None]

    def attend(self, attention: Any, q: Tensor, keys: Tensor, values: Tensor, slots: Slots, mask: Tensor | None, *,
               backend: str) -> Tensor:  # fmt: skip
        """Returns what new queries see, (b, h, n, d).

        Args:
            attention: the layer's attention, whose `attend` computes it.
            q: queries of the next tokens (b, h, n, d).
            keys, values: buffers (b, g, p + length + 1, d) that hold the keys and values of these tokens too.
            slots: where the tokens went.
            mask: what `mask` returned.
            backend: the name of an attention backend.
        """
        if slots.start is not None:
            seen = slice(self.first_key, self.prefix + slots.start + slots.tokens)
            keys, values = keys[:, :, seen], values[:, :, seen]
        causal = mask is None and slots.tokens > 1
        return attention.attend(q, keys, values, causal=causal, mask=mask, backend=backend)

    def put(self, buffer: Tensor, new: Tensor, slots: Slots, prefix: int = 0) -> None:
        """Stores `new` (b, g, n, ...) in the slots of a buffer (b, g, prefix + length + 1, ...)."""
        if slots.start is not None:
            start = prefix + slots.start
            buffer[:, :, start : start + slots.tokens] = new
        elif slots.columns is not None:
            # of the ways to say it, the one that a compiler does in place
            buffer[self.rows, :, slots.columns + prefix] = new.transpose(1, 2).to(buffer.dtype)

    def positions_of(self, table: Tensor, slots: Slots) -> Tensor:
        """Returns rows of a table (positions, ...) for the next tokens, (n, ...); where rows differ, (b, n, ...)."""
        if slots.start is not None:
            return table[slots.start : slots.start + slots.tokens]
        assert slots.columns is not None
        return table[slots.columns.clamp_max(self.length - 1)]

    def rotations_of(self, rotations: Tensor, slots: Slots) -> Tensor:
        """Returns the rotations (positions, d / 2, 2) of the next tokens, as `layers.rotate` takes them."""
        chosen = self.positions_of(rotations, slots)
        return chosen if slots.columns is None else chosen[:, None]
