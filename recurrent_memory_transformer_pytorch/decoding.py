"""Decoding inside a segment: text rows one after the other over cached keys, memory rows at the borders.

By causality a text row sees neither write rows nor later text, and read rows see read rows only. So the read rows are
computed when a segment opens, the write rows once, when it closes, and each text row costs one position.

Letters: b batch, h query heads, g key/value heads, l XL positions, m memory tokens, n text positions, d features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurrent_memory_transformer_pytorch.attention import text_turns
from recurrent_memory_transformer_pytorch.state import RMTState
from segment_recurrence_pytorch.attention import attend
from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.layers import rotate

if TYPE_CHECKING:
    from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer


class RMTCache(SegmentCache):
    """Keys and values of [XL | read | text], keys rotated. raw_keys: the text's keys before rotation, for XL memories.
    turns: rotations of the XL and of the text positions."""

    state: RMTState

    def __init__(self, model: RecurrentMemoryTransformer, state: RMTState, segment_length: int):
        self.xl_mem_len = model.xl_mem_len
        batch, prefix = state.memory.shape[0], model.xl_mem_len + model.num_memory_tokens
        super().__init__(state, batch=batch, prefix=prefix, length=segment_length, device=model.device)
        shape = len(model.layers), model.kv_heads, prefix + segment_length + 1, model.dim_head
        self.keys, self.values = (self.buffers(*shape, dtype=model.compute_dtype) for _ in range(2))
        self.raw_keys: list[Tensor] = []
        if model.xl_mem_len:
            self.raw_keys = [torch.zeros_like(keys[:, :, prefix:]) for keys in self.keys]
        self.turns: tuple[Tensor, Tensor] | None = None
        if model.rotary_pos_emb:
            like = state.memory.to(model.dtype)
            xl, text = (text_turns(*at, model.dim_head, like) for at in ((-model.xl_mem_len, 0), (0, segment_length)))
            self.turns = xl, text
        if state.xl is not None and state.xl.counts is not None:
            self.make_ragged()
        self.enter(model)

    def make_ragged(self) -> None:
        """See `SegmentCache`; XL memories get their full size and counts."""
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
            self.first_key = self.xl_mem_len - xl.length
        else:
            self.prefix_valid[:, : xl.length] = xl.valid()

    def read(self, model: RecurrentMemoryTransformer, x: Tensor, slots: Slots) -> Tensor:
        """See `SegmentCache.read`."""
        if model.pos_emb is not None:
            x = x + self.of(model.pos_emb.weight, slots)
        turns = None if self.turns is None else self.turns_of(self.turns[1], slots)
        for index, block in enumerate(model.layers):
            q, k, v = block.attn.project(block.attn_norm(x))
            if self.raw_keys:
                self.put(self.raw_keys[index], k, slots)
            if turns is not None:
                q, k = rotate(q, turns), rotate(k, turns)
            self.put(self.keys[index], k, slots, self.prefix)
            self.put(self.values[index], v, slots, self.prefix)
            out = self.attend(q, self.keys[index], self.values[index], slots, model.backend)
            x = block.add(x, block.attn.merge(out))
        return x

    def written_state(self, model: RecurrentMemoryTransformer, rows: Tensor | None) -> RMTState:
        """See `SegmentCache.written_state`."""
        memory = self._memory(model).to(self.state.memory.dtype)
        xl = self.state.xl
        if xl is not None:
            end = self.length if self.aligned is None else self.aligned
            keys = torch.stack([keys[:, :, :end] for keys in self.raw_keys], dim=1)
            text = slice(self.prefix, self.prefix + end)
            values = torch.stack([values[:, :, text] for values in self.values], dim=1)
            mask = self.text_valid() if self.aligned is None else None
            xl = xl.append(keys.to(xl.keys.dtype), values.to(xl.values.dtype), mask, model.xl_mem_len)
        state = RMTState(memory, xl, self.state.past_after())
        return state if rows is None else model.where(rows, state, self.state)

    def enter(self, model: RecurrentMemoryTransformer) -> None:
        """Fills the keys and values of [XL | read] from the state."""
        xl = self.state.xl
        m, l = model.num_memory_tokens, model.xl_mem_len
        if xl is not None:
            self._set_valid()
            at = slice(l - xl.length, l)
            for index, pair in enumerate(model.xl_of_layers(xl)):
                if pair is not None:
                    keys = pair[0].to(model.compute_dtype)
                    self.keys[index][:, :, at] = keys if self.turns is None else rotate(keys, self.turns[0][at])
                    self.values[index][:, :, at] = pair[1]
        if not m:
            return
        x = model.read_rows(model.memory_read(self.state))
        for index, block in enumerate(model.layers):
            q, k, v = block.attn.project(block.attn_norm(x))
            self.keys[index][:, :, l : l + m] = k
            self.values[index][:, :, l : l + m] = v
            if index < len(model.layers) - 1:  # nobody reads the last layer's read rows
                out = attend(q, k, v, causal=model.memory_mask == 'causal', backend=model.backend)
                x = block.add(x, block.attn.merge(out))

    def _memory(self, model: RecurrentMemoryTransformer) -> Tensor:
        """What the write rows (b, m, dim) of the open segment become."""
        m = model.num_memory_tokens
        if not m:
            return self.state.memory
        x = model.write_rows(model.memory_read(self.state))
        causal = model.memory_mask != 'block'
        if self.aligned is not None:
            seen, mask = slice(self.first_key, self.prefix + self.aligned), None
        else:
            seen = slice(0, self.prefix + self.length)
            valid = torch.cat((self.prefix_valid, self.text_valid()), dim=1)
            itself = valid.new_ones(m, m)
            itself = itself.tril() if causal else itself
            parts = valid[:, None].expand(-1, m, -1), itself.expand(self.batch, -1, -1)
            mask = torch.cat(parts, dim=-1)[:, None]
        for index, block in enumerate(model.layers):
            q, k, v = block.attn.project(block.attn_norm(x))
            keys = torch.cat((self.keys[index][:, :, seen], k.to(self.keys[index].dtype)), dim=2)
            values = torch.cat((self.values[index][:, :, seen], v.to(self.values[index].dtype)), dim=2)
            out = attend(q, keys, values, causal=causal and mask is None, mask=mask, backend=model.backend)
            x = block.add(x, block.attn.merge(out))
        return model.norm(x)
