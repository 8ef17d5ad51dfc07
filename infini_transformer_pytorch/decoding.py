"""Generation inside a segment: each token attends to cached keys, and recalls from the memories that entered the
segment.

These memories do not change before the border. They are therefore brought into the form in which queries recall from
them only once, when a segment opens. The tokens of a segment are written to the memories only once, when it closes. The
tokens go through the model's own blocks, with the cache as their surroundings.

Letters: b rows of the batch, h query heads, g key/value heads, n tokens, d features of a head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infini_transformer_pytorch.attention import InfiniAttention, Surroundings
from infini_transformer_pytorch.memory import Memories, Recallable, Writes
from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.layers import rotate

if TYPE_CHECKING:
    from infini_transformer_pytorch.infini import GatedMemories, InfiniTransformer


class MemoryCache(SegmentCache):
    """The open segment of a model with memories (`GatedMemories`). Each attribute is a list with an entry for each
    layer that has a memory.

    Args:
        model: the model.
        state: the memories that enter the segment.
        segment_length: the largest number of tokens that the segment can hold.

    Attributes:
        keys: keys after rotation, (b, g, length + 1, d), which later tokens attend to.
        written: keys before rotation and values, side by side, (b, 2 g, length + 1, d). They are written to the memory
            when the segment closes.
        strength: the strength of each token, (b, g, length + 1). None if the layer does not learn it.
        log_decay: the log decay of each token, (b, g, length + 1). None if the layer does not learn it.
        recallable: the memories from which the layer recalls.
    """

    state: tuple[Memories, ...]

    def __init__(self, model: GatedMemories, state: tuple[Memories, ...], segment_length: int):
        batch, layers = state[0].k_norm.shape[0], len(state)
        super().__init__(tuple(state), batch=batch, prefix=0, length=segment_length, device=model.device)
        d, g, slots = model.dim_head, model.kv_heads, segment_length + 1
        self.keys = self.buffers(layers, g, slots, d, dtype=model.compute_dtype)
        self.written = self.buffers(layers, 2 * g, slots, d, dtype=model.compute_dtype)
        self.recalled_layers = [model.layer_recalled(index) for index in range(layers)]
        nothing = torch.zeros(batch, 0, model.dim, dtype=model.dtype, device=model.device)
        with torch.no_grad():
            per_token = [layer.strength_and_decay(nothing) for layer in model.memory_layers]
            self.recallable = self._recallable(model)
        self.strength, self.log_decay = (
            [None if part is None else part.new_zeros(batch, g, slots) for part in parts]
            for parts in zip(*per_token, strict=True)
        )

    def enter(self, model: GatedMemories) -> None:
        """See `OpenSegment.enter`. It prepares the memories from which the layers recall."""
        if not self.static:
            self.recallable = self._recallable(model)
            return
        for old, new in zip(self.recallable, self._recallable(model), strict=True):
            for old_part, new_part in zip(old, new, strict=True):
                old_part.copy_(new_part)

    def _close_some(self, model: GatedMemories, rows: Tensor, count: int) -> None:
        """See `OpenSegment._close_some`. The memories to recall from are those of the new state."""
        super()._close_some(model, rows, count)
        self.enter(model)

    def _recallable(self, model: GatedMemories) -> list[Recallable]:
        """Returns, for each layer, the memories from which it recalls."""
        return [
            layer.fastweight_mem.recallable(self.state[source])
            for layer, source in zip(model.memory_layers, self.recalled_layers, strict=True)
        ]

    def store(
        self,
        index: int,
        keys: Tensor,
        written: Tensor,
        strength: Tensor | None,
        log_decay: Tensor | None,
        slots: Slots,
    ) -> None:
        """Stores what the next tokens leave behind in a layer.

        Args:
            index: number of the layer.
            keys: keys after rotation, (b, g, n, d).
            written: keys before rotation and values, side by side, (b, 2 g, n, d).
            strength: the strength of each token, (b, g, n), or None.
            log_decay: the log decay of each token, (b, g, n), or None.
            slots: where the tokens go.
        """
        self.put(self.keys[index], keys, slots)
        self.put(self.written[index], written, slots)
        for buffer, new in ((self.strength[index], strength), (self.log_decay[index], log_decay)):
            if buffer is not None and new is not None:
                self.put(buffer, new, slots)

    def state_after(self, model: GatedMemories, rows: Tensor | None) -> tuple[Memories, ...]:
        """See `OpenSegment.state_after`. It writes the tokens of the segment to the memories."""
        end, mask = self.aligned, None
        if rows is not None:
            # a row that does not close writes nothing, and keeps its memories bit for bit
            end, mask = self.length, (self.text_valid() & rows[:, None])[None]
        after = []
        for index, (layer, past) in enumerate(zip(model.memory_layers, self.state, strict=True)):
            keys, values = self.written[index][None, :, :, :end].chunk(2, dim=2)
            strength, log_decay = (
                None if buffer is None else buffer[None, :, :, :end]
                for buffer in (self.strength[index], self.log_decay[index])
            )
            writes = Writes(keys, values, strength, log_decay, mask)
            after.append(layer.fastweight_mem.write(writes, past)[1])
        return tuple(after)


class InfiniCache(MemoryCache):
    """The open segment of an Infini-Transformer.

    Args:
        model: the model.
        state: the memories that enter the segment.
        segment_length: the largest number of tokens that the segment can hold.
    """

    per_row = 'positions', 'prefix_valid', 'written', 'strength', 'log_decay'

    def __init__(self, model: InfiniTransformer, state: tuple[Memories, ...], segment_length: int):
        super().__init__(model, state, segment_length)
        with torch.no_grad():
            self.rotations = model.rotations(segment_length, model.token_emb.weight)

    def read(self, model: InfiniTransformer, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`."""
        x = model.embed(tokens)
        mask, rotations = self.mask(slots), self.rotations_of(self.rotations, slots)
        for index, block in enumerate(model.layers):
            x = block(x, Surroundings(partial(self._attend, model, index, slots, mask, rotations)))
        return model.norm(x)

    def _attend(
        self,
        model: InfiniTransformer,
        index: int,
        slots: Slots,
        mask: Tensor | None,
        rotations: Tensor,
        attention: InfiniAttention,
        heads: Tensor,
        strength: Tensor | None,
        log_decay: Tensor | None,
    ) -> tuple[Tensor, Tensor, Recallable]:
        """See `attention.Surroundings.attend`."""
        h, g = attention.heads, attention.kv_heads
        heads = attention.normed(heads)
        rotated = rotate(heads[:, : h + g], rotations)
        self.store(index, rotated[:, h:], heads[:, h:], strength, log_decay, slots)
        values = self.written[index][:, g:]
        local = self.attend(attention, rotated[:, :h], self.keys[index], values, slots, mask, backend=model.backend)
        return local, heads[:, :h], self.recallable[index]
