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
from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.layers import no_autocast, rotate

if TYPE_CHECKING:
    from infini_transformer_pytorch.attention import FastweightMemory
    from infini_transformer_pytorch.infini import InfiniTransformer


class InfiniCache(SegmentCache):
    """keys: those of the text, rotated. written: its keys before rotation and its values, with strength and log_decay
    (b, g, n): what is written at the border. matrices and shares: what each layer reads, see `_as_read`."""

    state: tuple[Memories, ...]

    def __init__(self, model: InfiniTransformer, state: tuple[Memories, ...], segment_length: int):
        batch, layers = state[0].k_norm.shape[0], len(model.layers)
        super().__init__(tuple(state), batch=batch, prefix=0, length=segment_length, device=model.device)
        attn, d, g = model.layers[0].attn, model.dim_head, model.kv_heads
        slots, wide = segment_length + 1, state[0].kv_mem.dtype
        self.keys = self.buffers(layers, g, slots, d, dtype=model.compute_dtype)
        self.written = self.buffers(layers, 2 * g, slots, d, dtype=model.compute_dtype)
        self.strength = self.buffers(layers if attn.to_strength else 0, g, slots, dtype=wide)
        self.log_decay = self.buffers(layers if attn.to_decay else 0, g, slots, dtype=wide)
        self.turns = attn.turns(segment_length)
        columns = d if model.memory_rule == 'deltanet' else d + 1
        self.matrices = [matrix.flatten(0, 1) for matrix in self.buffers(layers, g, d, columns, dtype=wide)]
        self.shares = self.buffers(layers, attn.heads, 1, 1, dtype=wide)
        self.enter(model)

    def read(self, model: InfiniTransformer, x: Tensor, slots: Slots) -> Tensor:
        """See `SegmentCache.read`."""
        g, turns = model.kv_heads, self.turns_of(self.turns, slots)
        for index, block in enumerate(model.layers):
            normed = block.attn_norm(x)
            attn = block.attn
            heads = attn.normed(attn.heads_of(normed))
            turned = rotate(heads[:, : attn.heads + g], turns)
            self.put(self.keys[index], turned[:, attn.heads :], slots)
            self.put(self.written[index], heads[:, attn.heads :], slots)
            strength, log_decay = attn.strength_and_decay(normed)
            if strength is not None:
                self.put(self.strength[index], strength, slots)
            if log_decay is not None:
                self.put(self.log_decay[index], log_decay, slots)
            values = self.written[index][:, g:]
            local = self.attend(turned[:, : attn.heads], self.keys[index], values, slots, model.backend)
            out = self._recall(index, local, heads[:, : attn.heads], attn.fastweight_mem)
            x = block.add(x, attn.merge(out))
        return x

    def written_state(self, model: InfiniTransformer, rows: Tensor | None) -> tuple[Memories, ...]:
        """See `SegmentCache.written_state`."""
        end, mask = self.aligned, None
        if rows is not None:
            # what does not close writes nothing, and keeps its memories bit for bit
            end, mask = self.length, (self.text_valid() & rows[:, None])[None]
        after = []
        for index, (block, past) in enumerate(zip(model.layers, self.state, strict=True)):
            keys, values = self.written[index][None, :, :, :end].chunk(2, dim=2)
            strength, log_decay = (
                buffers[index][None, :, :, :end] if buffers else None for buffers in (self.strength, self.log_decay)
            )
            writes = Writes(keys, values, strength, log_decay, mask)
            after.append(block.attn.fastweight_mem.write(writes, past)[1])
        return tuple(after)

    def enter(self, model: InfiniTransformer) -> None:
        """Takes what the layers read from the state."""
        for index, block in enumerate(model.layers):
            matrix, share = _as_read(block.attn.fastweight_mem, self.state[model.layer_read(index)])
            self.matrices[index].copy_(matrix.flatten(0, 1))
            self.shares[index].copy_(share)

    def _recall(self, index: int, local: Tensor, query: Tensor, memory: FastweightMemory) -> Tensor:
        """local (b, h, n, e) mixed with what query (b, h, n, d), before rotation, reads (equations 3 and 6)."""
        with no_autocast(local.device.type):
            features = phi(query, memory.memory_rule)
            recalled = torch.bmm(features.reshape(len(self.matrices[index]), -1, query.shape[-1]), self.matrices[index])
            recalled = recalled.view(*query.shape[:-1], -1)
            if memory.memory_rule != 'deltanet':
                recalled, normaliser = recalled.tensor_split((-1,), dim=-1)
                # 0 / tiny = 0 where nothing was written
                recalled = recalled / normaliser.clamp_min(torch.finfo(recalled.dtype).tiny)
            return torch.lerp(recalled, local.to(recalled.dtype), self.shares[index]).to(local.dtype)


def _as_read(memory: FastweightMemory, memories: Memories) -> tuple[Tensor, Tensor]:
    """Memories (b, g, ...) as one matrix, z beside M where there is a normaliser, and the local attention's share
    (b, h, 1, 1): all of it where nothing was ever written."""
    kv_mem, k_norm = (part[0] for part in memory.transformed(Memories(*(part[None] for part in memories))))
    matrix = kv_mem if memory.memory_rule == 'deltanet' else torch.cat((kv_mem, k_norm[..., None]), dim=-1)
    written = (k_norm > 0).any(-1).repeat_interleave(len(memory.head_gates) // memory.kv_heads, dim=-1)
    share = torch.where(written, memory.head_gates.to(matrix.dtype).sigmoid(), 1)
    return matrix, share[..., None, None]
