"""Generation inside a segment: the text rows come one after the other, the read and write rows only at the borders.

Text rows see neither write rows nor later text, and read rows see only read rows. The read rows are therefore computed
once, when a segment opens, and the write rows once, when it closes. A new text token costs the work of one position.
All rows go through the model's own blocks, with the cache as their surroundings.

Letters: b rows of the batch, h query heads, g key/value heads, l XL positions, m memory tokens, n tokens, d features of
a head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurrent_memory_transformer_pytorch.attention import Attention, Surroundings
from recurrent_memory_transformer_pytorch.state import RMTState
from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.layers import rotate

if TYPE_CHECKING:
    from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer


class RMTCache(SegmentCache):
    """The open segment of a Recurrent Memory Transformer: keys and values of [XL | read | text] in each layer.

    Args:
        model: the model.
        state: the state that enters the segment.
        segment_length: the largest number of tokens that the segment can hold.

    Attributes:
        keys: a buffer for each layer, (b, g, l + m + length + 1, d), with keys after rotation.
        values: a buffer for each layer, (b, g, l + m + length + 1, d).
        raw_keys: a buffer for each layer with the keys of the text before rotation, which become XL memories. An empty
            list if the model has no XL memories, or no rotation.
        rotations: the rotations of the XL positions and those of the text positions. None without rotary positions.
    """

    state: RMTState
    per_row = 'positions', 'prefix_valid', 'keys', 'values', 'raw_keys'

    def __init__(self, model: RecurrentMemoryTransformer, state: RMTState, segment_length: int):
        self.xl_mem_len = model.xl_mem_len
        batch, prefix = state.memory.shape[0], model.xl_mem_len + model.num_memory_tokens
        super().__init__(state, batch=batch, prefix=prefix, length=segment_length, device=model.device)
        layers, shape = len(model.layers), (model.kv_heads, prefix + segment_length + 1, model.dim_head)
        self.keys = self.buffers(layers, *shape, dtype=model.compute_dtype)
        self.values = self.buffers(layers, *shape, dtype=model.compute_dtype)
        self.raw_keys: list[Tensor] = []
        if model.xl_mem_len and model.positions is not None:
            self.raw_keys = [torch.zeros_like(keys[:, :, prefix:]) for keys in self.keys]
        self.rotations: tuple[Tensor, Tensor] | None = None
        if model.positions is not None:
            like = state.memory.to(model.dtype)
            self.rotations = (
                model.positions.text(-model.xl_mem_len, 0, like),
                model.positions.text(0, segment_length, like),
            )
        if state.xl is not None and state.xl.counts is not None:
            self.make_ragged()
        with torch.no_grad():
            self.enter(model)

    def make_ragged(self) -> None:
        """See `OpenSegment.make_ragged`. XL memories are padded to their largest number, and get counts."""
        xl = self.state.xl
        aligned = self.aligned is not None
        super().make_ragged()
        if aligned and xl is not None:
            self.state = self.state._replace(xl=xl.counted().padded(self.xl_mem_len))
            self._set_valid()

    def _set_valid(self) -> None:
        xl = self.state.xl
        if xl is None:
            return
        if self.aligned is not None:
            self.first_key = self.xl_mem_len - xl.length()
        else:
            self.prefix_valid[:, : xl.length()] = xl.valid()

    def enter(self, model: RecurrentMemoryTransformer) -> None:
        """See `OpenSegment.enter`. It fills in the keys and values of XL and of the read rows, from the state."""
        xl = self.state.xl
        if xl is not None:
            self._set_valid()
            at = slice(self.xl_mem_len - xl.length(), self.xl_mem_len)
            for index, pair in enumerate(model.xl_of_layers(xl)):
                if pair is not None:
                    keys = pair[0].to(model.compute_dtype)
                    self.keys[index][:, :, at] = keys if self.rotations is None else rotate(keys, self.rotations[0][at])
                    self.values[index][:, :, at] = pair[1]
        if not model.num_memory_tokens:
            return
        x = model.read_rows(model.memory_to_read(self.state))
        last = len(model.layers) - 1
        for index, block in enumerate(model.layers):
            # the outputs of the read rows in the last layer are never used: only their keys and values are stored
            first_row = x.shape[1] if index == last else 0
            x = block(x, Surroundings(partial(self._attend_read, model, index), first_row))

    def read(self, model: RecurrentMemoryTransformer, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`. It runs the text rows."""
        x = model.embed(tokens)
        if model.pos_emb is not None:
            x = x + self.positions_of(model.pos_emb.weight, slots)
        mask = self.mask(slots)
        rotations = None if self.rotations is None else self.rotations_of(self.rotations[1], slots)
        for index, block in enumerate(model.layers):
            x = block(x, Surroundings(partial(self._attend_text, model, index, slots, mask, rotations)))
        return model.norm(x)

    def state_after(self, model: RecurrentMemoryTransformer, rows: Tensor | None) -> RMTState:
        """See `OpenSegment.state_after`. It runs the write rows, and appends the text to the XL memories."""
        memory = model.memory_to_read(self.state)
        x = memory
        if model.num_memory_tokens:
            mask = self._mask_of_write_rows(model)
            x = model.write_rows(memory)
            for index, block in enumerate(model.layers):
                x = block(x, Surroundings(partial(self._attend_write, model, index, mask)))
            x = model.norm(x)
        state = self.state
        xl, past = state.xl, None if state.past is None else state.past.append(state.memory)
        if xl is not None:
            end = self.length if self.aligned is None else self.aligned
            text = slice(self.prefix, self.prefix + end)
            raw_keys = self.raw_keys or [keys[:, :, self.prefix :] for keys in self.keys]
            keys = torch.stack([keys[:, :, :end] for keys in raw_keys], dim=1)
            values = torch.stack([values[:, :, text] for values in self.values], dim=1)
            text_mask = self.text_valid() if self.aligned is None else None
            xl = xl.append(keys.to(xl.keys.dtype), values.to(xl.values.dtype), text_mask, model.xl_mem_len)
        after = RMTState(model.next_memory(x, memory).to(state.memory.dtype), xl, past)
        return after if rows is None else model.where(rows, after, state)

    def _attend_read(
        self, model: RecurrentMemoryTransformer, index: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """The attention of the read rows: they see read rows. Their keys and values are stored in front of the text."""
        at = slice(self.xl_mem_len, self.prefix)
        self.keys[index][:, :, at] = k
        self.values[index][:, :, at] = v
        if not q.shape[2]:
            return q
        return attention.attend(q, k, v, causal=model.memory_mask == 'causal', backend=model.backend)

    def _attend_text(
        self,
        model: RecurrentMemoryTransformer,
        index: int,
        slots: Slots,
        mask: Tensor | None,
        rotations: Tensor | None,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """The attention of text rows: they see XL, read rows, and the text up to themselves. Their keys and values are
        stored."""
        if self.raw_keys:
            self.put(self.raw_keys[index], k, slots)
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        keys, values = self.keys[index], self.values[index]
        self.put(keys, k, slots, self.prefix)
        self.put(values, v, slots, self.prefix)
        return self.attend(attention, q, keys, values, slots, mask, backend=model.backend)

    def _attend_write(
        self,
        model: RecurrentMemoryTransformer,
        index: int,
        mask: Tensor | None,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """The attention of the write rows: they see the whole segment and each other. Their keys and values are not
        stored."""
        if self.aligned is not None:
            seen = slice(self.first_key, self.prefix + self.aligned)
        else:
            seen = slice(0, self.prefix + self.length)
        keys, values = self.keys[index][:, :, seen], self.values[index][:, :, seen]
        keys, values = torch.cat((keys, k.to(keys.dtype)), dim=2), torch.cat((values, v.to(values.dtype)), dim=2)
        causal = model.memory_mask != 'block' and mask is None
        return attention.attend(q, keys, values, causal=causal, mask=mask, backend=model.backend)

    def _mask_of_write_rows(self, model: RecurrentMemoryTransformer) -> Tensor | None:
        """Returns which keys of [XL | read | text | write] the write rows see, (b, 1, m, keys) bool. None for aligned
        rows."""
        if self.aligned is not None:
            return None
        m = model.num_memory_tokens
        valid = torch.cat((self.prefix_valid, self.text_valid()), dim=1)
        itself = valid.new_ones(m, m)
        itself = itself if model.memory_mask == 'block' else itself.tril()
        parts = valid[:, None].expand(-1, m, -1), itself.expand(self.batch, -1, -1)
        return torch.cat(parts, dim=-1)[:, None]
