"""Open segments: the segment that generation is in the middle of, for all rows of a batch.

    OpenSegment     the base class: what generation calls, and how far the open segment of each row has got
    RereadSegment   keeps the tokens and reads all of them again for every new token; the default of every model
    SegmentCache    keeps the keys and values of a transformer's layers; a new token costs the work of one position

An open segment is not a value: `extend` and `close` change it in place.

As long as the open segments of all rows have the same number of tokens, and the host knows this number, the rows are
called aligned. Attention then uses a slice of the buffers, without a mask. When rows differ, or when steps are compiled
and shapes must not change, attention uses the whole buffers and a mask.

Letters: b rows of the batch, h query heads, g key/value heads, p keys in front of the text, n tokens, d features of a
head.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from segment_recurrence_pytorch.state import State, leaves, map_state

if TYPE_CHECKING:
    from segment_recurrence_pytorch.model import SegmentModel


class Slots(NamedTuple):
    """Where the next tokens go in the open segment.

    Attributes:
        tokens: number n of columns of tokens.
        start: the position of the first column in the segment, the same in all rows. None if the rows are not aligned.
        columns: the position of each token, (b, n), if the rows are not aligned; else None. A token that is only
            padding of its row gets the position after the end of the segment, which nothing ever attends to.
    """

    tokens: int
    start: int | None
    columns: Tensor | None


class OpenSegment(ABC):
    """The base class of open segments, one for each row of the batch.

    A class of its own keeps tensors and plain values. It is given the model in every call, and keeps nothing of it:
    after a compiled stream has ended, its open segment serves the next one, maybe of another model of the same class.

    Args:
        state: the state at the border where the open segment of each row begins.
        batch: number of rows b.
        length: the largest number of tokens that a segment can hold.
        device: the device of the positions.

    Attributes:
        aligned: number of tokens in the open segment, if it is the same in every row. None if rows are not aligned.
        positions: number of tokens in the open segment of each row, (b,). It is only kept while rows are not aligned.
        static: whether all shapes and addresses stay as they are, which compiled steps need.
        per_row: names of the attributes that closing a segment reads or changes and that hold something of each row:
            (b, ...) tensors or trees of them. A class that names them can close some rows without computing the others.
            A subclass does not inherit it, since it may have more. Default: none.
    """

    aligned: int | None = 0
    static = False
    per_row: tuple[str, ...] = ()

    def __init__(self, state: State, *, batch: int, length: int, device: torch.device):
        self.state = state
        self.batch = batch
        self.length = length
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)

    @torch.no_grad()
    def extend(self, model: Any, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads tokens and appends them to the open segments, without a graph.

        Args:
            model: the model that opened the segment.
            tokens: token ids (b, n).
            lengths: number of tokens that each row appends, (b,), at most n. The other columns of a row are padding.
                Default: None, all n.

        Returns:
            The hidden states (b, n, dim), as `advance` computes them for the same positions.

        Raises:
            ValueError: if aligned rows would hold more than `length` tokens. Rows that are not aligned are not checked,
                since that would wait for the device.
        """
        slots = self.slots(tokens.shape[1], lengths)
        hidden = self.read(model, tokens, slots, lengths)
        if self.aligned is not None:
            self.aligned += slots.tokens
        else:
            self.positions.add_(slots.tokens if lengths is None else lengths)
        return hidden

    @torch.no_grad()
    def close(self, model: Any, rows: Tensor | None = None, count: int | None = None) -> None:
        """Closes the open segments of some rows: their state moves to the next border, and a new segment opens.

        A row whose open segment holds no token stays as it is.

        Args:
            model: the model that opened the segment.
            rows: (b,) bool, True for the rows to close. Default: None, all rows.
            count: number of these rows, if the host knows it. Only they are computed then, if the class allows it
                (`per_row`). Default: None, all rows are computed.
        """
        if rows is not None:
            self.make_ragged()
            if count is not None and count < self.batch and not self.static and 'per_row' in vars(type(self)):
                self._close_some(model, rows, count)
                return
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

    def _close_some(self, model: Any, rows: Tensor, count: int) -> None:
        """Closes `count` rows, as an open segment of these rows alone."""
        index = rows.long().argsort(descending=True, stable=True)[:count]  # in their order, without asking the device
        some = copy.copy(self)
        some.batch, some.state = count, map_state(lambda part: part[index], self.state)
        for name in self.per_row:
            setattr(some, name, map_state(lambda part: part[index], getattr(self, name)))
        some.close(model)
        for name in self.per_row:
            for own, new in zip(leaves(getattr(self, name)), leaves(getattr(some, name)), strict=True):
                own.index_copy_(0, index, new)
        place = (rows.long().cumsum(0) - 1).clamp_min(0)
        self.set_state(model.where(rows, map_state(lambda part: part[place], some.state), self.state))

    @abstractmethod
    def read(self, model: Any, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """Reads tokens, and stores what later tokens need from them.

        Args:
            model: the model that opened the segment.
            tokens: token ids (b, n).
            slots: where the tokens go.
            lengths: number of tokens that each row appends, (b,). None: all n.

        Returns:
            The hidden states (b, n, dim).
        """

    @abstractmethod
    def state_after(self, model: Any, rows: Tensor | None) -> State:
        """Returns the state after the open segment.

        Args:
            model: the model that opened the segment.
            rows: (b,) bool, True for the rows that close. The others keep the state that they have. None: all rows
                close.
        """

    def enter(self, model: Any) -> None:  # noqa: B027  most segments have nothing to prepare
        """Prepares what depends only on the state. It is called after each border, of any row: other rows may be in the
        middle of a segment, so their positions must stay. The default does nothing.

        Args:
            model: the model that opened the segment.
        """

    def slots(self, count: int, lengths: Tensor | None) -> Slots:
        """Returns where the next tokens go.

        Args:
            count: number n of columns of tokens.
            lengths: number of tokens that each row appends, (b,). None: all n.

        Raises:
            ValueError: if aligned rows would hold more than `length` tokens.
        """
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
        """Returns which text positions hold a token, (b, length) bool. Only for rows that are not aligned."""
        return torch.arange(self.length, device=self.positions.device) < self.positions[:, None]

    def make_ragged(self) -> None:
        """Ends the alignment of the rows: from now on, each row has a position of its own."""
        if self.aligned is not None:
            self.positions.fill_(self.aligned)
            self.aligned = None

    def make_static(self) -> None:
        """Fixes all shapes and addresses from now on, so that steps can be compiled and replayed as CUDA graphs.

        From now on it shares no tensor with anything: a later stream writes its values into these tensors.
        """
        self.make_ragged()
        for name, value in vars(self).items():
            setattr(self, name, map_state(torch.clone, value))
        self.static = True
        if self.positions.is_cuda:  # a replayed CUDA graph may change these tensors in place, since they do not move
            for tensor in leaves(vars(self)):
                torch._dynamo.mark_static_address(tensor)

    def set_state(self, state: State) -> None:
        """Sets the state at a new border. It is copied into the tensors of the old one if addresses must stay.

        Args:
            state: the new state.
        """
        if not self.static:
            self.state = state
            return
        for old, new in zip(leaves(self.state), leaves(state), strict=True):
            old.copy_(new)

    def state_now(self) -> State:
        """Returns the state at the last border of each row, as a value that later steps do not change."""
        return map_state(torch.clone, self.state) if self.static else self.state


class RereadSegment(OpenSegment):
    """An open segment that keeps its tokens, and reads all of them again for every new token and to close the segment.

    It needs only `advance` of the model, so it is exact for every causal model. A new token costs as much as reading
    the whole segment.

    Args:
        model: a causal model.
        state: the state at the border where the segment begins.
        segment_length: the largest number of tokens that the segment can hold.
    """

    per_row = 'positions', 'tokens'

    def __init__(self, model: SegmentModel, state: State, segment_length: int):
        batch = leaves(state)[0].shape[0]
        super().__init__(state, batch=batch, length=segment_length, device=model.device)
        # the last column takes the padding of rows that append fewer tokens than others
        self.tokens = torch.zeros(batch, segment_length + 1, dtype=torch.long, device=model.device)

    def read(self, model: SegmentModel, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`."""
        if slots.start is not None:
            stop = slots.start + slots.tokens
            self.tokens[:, slots.start : stop] = tokens
            hidden, _ = model.advance(self.tokens[:, :stop], self.state, segment_length=self.length)
            return hidden[:, slots.start :]
        assert slots.columns is not None
        self.tokens.scatter_(1, slots.columns, tokens)
        counts = self.positions + (slots.tokens if lengths is None else lengths)
        valid = torch.arange(self.length, device=counts.device) < counts[:, None]
        hidden, _ = model.advance(self.tokens[:, : self.length], self.state, segment_length=self.length, mask=valid)
        index = slots.columns.clamp_max(self.length - 1)[..., None]
        return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))

    def state_after(self, model: SegmentModel, rows: Tensor | None) -> State:
        """See `OpenSegment.state_after`. A row that does not close is given no valid token, so `advance` keeps its
        state."""
        options: dict[str, Any] = {'segment_length': self.length, 'need_hidden': False}
        if rows is None:
            return model.advance(self.tokens[:, : self.aligned], self.state, **options)[1]
        mask = self.text_valid() & rows[:, None]
        return model.advance(self.tokens[:, : self.length], self.state, mask=mask, **options)[1]


class SegmentCache(OpenSegment):
    """An open segment that keeps the keys and values of a transformer's layers. A model's own cache extends it.

    Each buffer has p + length + 1 slots: p for keys in front of the text, `length` for the text, and a last one, which
    takes the padding of rows that append fewer tokens than others.

    Args:
        state: the state at the border where the segment begins.
        batch: number of rows b.
        prefix: number p of keys in front of the text.
        length: the largest number of tokens that the segment can hold.
        device: the device of the buffers.

    Attributes:
        first_key: the first slot that holds a key, while rows are aligned. The slots before it are empty.
        prefix_valid: which of the keys in front of the text may be attended to, (b, p) bool. Used while rows are not
            aligned.
    """

    first_key = 0

    def __init__(self, state: State, *, batch: int, prefix: int, length: int, device: torch.device):
        super().__init__(state, batch=batch, length=length, device=device)
        self.prefix = prefix
        self.rows = torch.arange(batch, device=device)[:, None]
        self.prefix_valid = torch.ones(batch, prefix, dtype=torch.bool, device=device)

    def buffers(self, layers: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Returns one buffer (b, *shape) for each layer.

        It is filled with zeros: a slot that the mask hides must still be finite.

        Args:
            layers: number of layers.
            shape: shape of a buffer after the batch.
            dtype: dtype of the buffers.
        """
        return [torch.zeros(self.batch, *shape, dtype=dtype, device=self.positions.device) for _ in range(layers)]

    def mask(self, slots: Slots) -> Tensor | None:
        """Returns which keys the next tokens may attend to, (b, 1, n, p + length + 1) bool. None for aligned rows.

        Args:
            slots: where the tokens went.
        """
        if slots.columns is None:
            return None
        text = torch.arange(self.length + 1, device=slots.columns.device)
        seen = text <= slots.columns[..., None]
        return torch.cat((self.prefix_valid[:, None].expand(-1, slots.tokens, -1), seen), dim=-1)[:, None]

    def attend(self, attention: Any, q: Tensor, keys: Tensor, values: Tensor, slots: Slots, mask: Tensor | None, *,
               backend: str) -> Tensor:  # fmt: skip
        """Computes the attention of the next tokens to the cached keys and values.

        Args:
            attention: the layer's attention, whose method `attend` is called.
            q: queries of the next tokens (b, h, n, d).
            keys: buffer (b, g, p + length + 1, d), which already holds the keys of the next tokens.
            values: buffer (b, g, p + length + 1, d), which already holds the values of the next tokens.
            slots: where the tokens went.
            mask: what the method `mask` returned.
            backend: the name of an attention backend.

        Returns:
            The outputs (b, h, n, d).
        """
        if slots.start is not None:
            seen = slice(self.first_key, self.prefix + slots.start + slots.tokens)
            keys, values = keys[:, :, seen], values[:, :, seen]
        causal = mask is None and slots.tokens > 1
        return attention.attend(q, keys, values, causal=causal, mask=mask, backend=backend)

    def put(self, buffer: Tensor, new: Tensor, slots: Slots, prefix: int = 0) -> None:
        """Stores something of the next tokens in a buffer.

        Args:
            buffer: (b, g, prefix + length + 1, ...).
            new: what to store, (b, g, n, ...).
            slots: where the tokens go.
            prefix: number of slots of this buffer in front of the text. Default: 0.
        """
        if slots.start is not None:
            start = prefix + slots.start
            buffer[:, :, start : start + slots.tokens] = new
        elif slots.columns is not None:
            # written in this way, since a compiler then stores it in place
            buffer[self.rows, :, slots.columns + prefix] = new.transpose(1, 2).to(buffer.dtype)

    def positions_of(self, table: Tensor, slots: Slots) -> Tensor:
        """Returns the rows of a table that belong to the next tokens: (n, ...), or (b, n, ...) if rows are not aligned.

        Args:
            table: one row for each position in a segment, (length, ...).
            slots: where the tokens go.
        """
        if slots.start is not None:
            return table[slots.start : slots.start + slots.tokens]
        assert slots.columns is not None
        return table[slots.columns.clamp_max(self.length - 1)]

    def rotations_of(self, rotations: Tensor, slots: Slots) -> Tensor:
        """Returns the rotations of the next tokens, in a shape that `layers.rotate` takes.

        Args:
            rotations: of all positions of a segment, (length, d / 2, 2).
            slots: where the tokens go.
        """
        chosen = self.positions_of(rotations, slots)
        return chosen if slots.columns is None else chosen[:, None]
