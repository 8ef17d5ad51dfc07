"""Decoding inside a segment: each token attends to cached keys and reads the memories that entered the segment.

Those memories do not change before the border, so they are put in the form of one product a token when the segment
opens; what the segment's tokens write is written once, when it closes.

Letters: b batch, h query heads, g key/value heads, n text positions, d key and e value features of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infini_transformer_pytorch.memory import Memories, Writes, phi
from segment_recurrence_pytorch.cache import SegmentCache
from segment_recurrence_pytorch.layers import rotate

if TYPE_CHECKING:
    from infini_transformer_pytorch.attention import FastweightMemory
    from infini_transformer_pytorch.infini import InfiniTransformer


class InfiniCache(SegmentCache):
    """Keys (rotated) and values of the text. raw_keys: the keys before rotation, strength and log_decay (b, g, n): what
    is written at the border. matrices and shares: what each layer reads, see `_as_read`."""

    state: tuple[Memories, ...]

    def __init__(self, model: InfiniTransformer, state: tuple[Memories, ...], segment_length: int):
        batch, layers = state[0].k_norm.shape[0], len(model.layers)
        super().__init__(
            tuple(state), layers=layers, batch=batch, heads=model.kv_heads, prefix=0, length=segment_length,
            dim_head=model.dim_head, dtype=model.compute_dtype, device=model.device,
        )  # fmt: skip
        wide = state[0].kv_mem.new_zeros(batch, model.kv_heads, segment_length + 1)
        attn = model.layers[0].attn
        self.raw_keys = [torch.zeros_like(keys) for keys in self.keys]
        self.strength = [None if attn.to_strength is None else wide.clone() for _ in self.keys]
        self.log_decay = [None if attn.to_decay is None else wide.clone() for _ in self.keys]
        self.turns = attn.turns(segment_length)
        d = model.dim_head
        columns = d if model.memory_rule == 'deltanet' else d + 1
        self.matrices = [wide.new_zeros(batch, model.kv_heads, d, columns) for _ in self.keys]
        self.shares = [wide.new_zeros(batch, attn.heads, 1, 1) for _ in self.keys]
        self._enter(model)

    def extend(self, model: InfiniTransformer, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """See `SegmentModel.extend`."""
        slots = self.slots(tokens.shape[1], lengths)
        x = tokens.to(model.dtype) if tokens.is_floating_point() else model.token_emb(tokens)
        turns = self.of(self.turns, slots)
        turns = turns if slots.columns is None else turns[:, None]
        for index, block in enumerate(model.layers):
            normed = block.attn_norm(x)
            query, k, v, strength, log_decay = block.attn.project(normed)
            self.put(self.raw_keys[index], k, slots)
            for buffer, new in ((self.strength[index], strength), (self.log_decay[index], log_decay)):
                if buffer is not None and new is not None:
                    self.put(buffer, new, slots)
            local = self.attend(index, rotate(query, turns), rotate(k, turns), v, slots, model.backend)
            x = block.add(x, block.attn.merge(self._recall(index, local, query, block.attn.fastweight_mem)))
        self.move(slots, lengths)
        return model.norm(x)

    def close(self, model: InfiniTransformer, rows: Tensor | None) -> None:
        """See `SegmentModel.close_segment`."""
        rows = self.rows_to_close(rows)
        if self.aligned == 0:
            return
        end, mask = self.aligned, None
        if rows is not None:
            # what does not close writes nothing, and keeps its memories bit for bit
            end, mask = self.length, (self.text_valid() & rows[:, None])[None]
        after = []
        for index, (block, past) in enumerate(zip(model.layers, self.state, strict=True)):
            keys, values = self.raw_keys[index][None, :, :, :end], self.values[index][None, :, :, :end]
            strength, log_decay = (
                part if part is None else part[None, :, :, :end]
                for part in (self.strength[index], self.log_decay[index])
            )
            writes = Writes(keys, values, strength, log_decay, mask)
            after.append(block.attn.fastweight_mem.write(writes, past)[1])
        self.set_state(tuple(after))
        self.start_again(rows)
        self._enter(model)

    def _enter(self, model: InfiniTransformer) -> None:
        """Takes what the layers read from the state."""
        for index, block in enumerate(model.layers):
            matrix, share = _as_read(block.attn.fastweight_mem, self.state[model.layer_read(index)])
            self.matrices[index].copy_(matrix)
            self.shares[index].copy_(share)

    def _recall(self, index: int, local: Tensor, query: Tensor, memory: FastweightMemory) -> Tensor:
        """local (b, h, n, e) mixed with what query (b, h, n, d), before rotation, reads (equations 3 and 6)."""
        with torch.autocast(local.device.type, enabled=False):
            b, _, n, d = query.shape
            features = phi(query, memory.memory_rule).view(b, memory.kv_heads, -1, d)
            recalled = features @ self.matrices[index]
            if recalled.shape[-1] > d:
                # 0 / tiny = 0 where nothing was written
                normaliser = recalled[..., d:].clamp_min(torch.finfo(recalled.dtype).tiny)
                recalled = recalled[..., :d] / normaliser
            recalled = recalled.view(b, -1, n, d)
            return torch.lerp(recalled, local.to(recalled.dtype), self.shares[index]).to(local.dtype)


def _as_read(memory: FastweightMemory, memories: Memories) -> tuple[Tensor, Tensor]:
    """Memories (b, g, ...) as one matrix, z beside M where there is a normaliser, and the local attention's share
    (b, h, 1, 1): all of it where nothing was ever written."""
    kv_mem, k_norm = (part[0] for part in memory.transformed(Memories(*(part[None] for part in memories))))
    matrix = kv_mem if memory.memory_rule == 'deltanet' else torch.cat((kv_mem, k_norm[..., None]), dim=-1)
    written = (k_norm > 0).any(-1).repeat_interleave(len(memory.head_gates) // memory.kv_heads, dim=-1)
    share = torch.where(written, memory.head_gates.to(matrix.dtype).sigmoid(), 1)
    return matrix, share[..., None, None]
