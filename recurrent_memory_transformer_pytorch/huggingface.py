"""The Recurrent Memory Transformer around a pretrained language model of Hugging Face `transformers` (extra `hf`).

Each segment is read as in arXiv 2207.06881 and in its published code for language models: the decoder gets

    [read memory | text | write memory]

as embeddings, with causal attention. What it makes of the write rows, after its final norm, is the memory that the next
segment reads. The language model itself is not changed. If its positions are learned, as GPT-2's are, the text keeps
those that it was pretrained with, which begin at 0, and the read rows all stand at 0; rotary positions tell distances
alone.

    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B')
    model = RecurrentMemoryLM(lm, num_memory_tokens=16)
    wrapper = SegmentWrapper(model, segment_length=1024)

Letters: b rows of the batch, g key/value heads, n tokens, m memory tokens, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.checks import check_not_negative, is_whole, typed
from segment_recurrence_pytorch.huggingface.decoder import (
    WITH_MEMORY_TOKENS,
    PretrainedLM,
    check_backend,
    check_same_logits,
    check_same_when_cached,
    next_rows,
)
from segment_recurrence_pytorch.layers import causal_mask
from segment_recurrence_pytorch.state import copied, where_rows

# isort: split
# after what says which extra to install if transformers is missing
from transformers.cache_utils import Cache, CacheLayerMixin


class RecurrentMemoryLM(PretrainedLM):
    """A causal language model that reads segments and carries memory tokens from each to the next.

    The state is the memory, a tensor (b, m, dim), in float32 at least. Tested with GPT-2, GPT-NeoX, Llama, Mistral,
    Phi, Qwen2, Qwen3 and Gemma 1 to 3; other decoders are accepted if a trial at construction finds the same logits.

    To train the memory tokens alone, call `lm.requires_grad_(False)`. To train adapters, apply `peft` to the language
    model first. `checkpoint.save_weights(model, path, trained_only=True)` then writes only what was trained.

    Args:
        lm: what `AutoModelForCausalLM.from_pretrained` returned, or its PEFT model. See `PretrainedLM`.
        num_memory_tokens: number m of memory tokens. With 0 each segment is read for itself.
        max_segment_length: the longest segment, in tokens. Default: None, what the positions and the sliding window of
            the language model hold beside 2 m memory rows.
        write_init: what the write rows start from: the 'previous' memory, as in the paper, 'learned' tokens, or the
            'sum' of both. Default: 'previous'.
        read_emb: whether a learned embedding, at first 0, is added to the read rows. Default: False.

    Raises:
        ValueError: if the language model is of a kind that does not work, or if a number does not fit it. It is
            unchanged then.
    """

    @typed
    def __init__(
        self,
        lm: Any,
        *,
        num_memory_tokens: int,
        max_segment_length: int | None = None,
        write_init: Literal['previous', 'learned', 'sum'] = 'previous',
        read_emb: bool = False,
    ):
        super().__init__(lm)
        check_not_negative(num_memory_tokens=num_memory_tokens)
        self.num_memory_tokens = num_memory_tokens
        self.write_init = write_init
        self.max_segment_length = self.longest_segment(max_segment_length, 2 * num_memory_tokens)
        tokens = set(self.lm.get_input_embeddings().modules())
        tables = (module for module in self.decoder.modules() if isinstance(module, nn.Embedding))
        rotates = getattr(self.config, 'rope_parameters', None) or getattr(self.config, 'rope_theta', None)
        has_table = not rotates and any(table not in tokens for table in tables)
        self._has_learned_positions = has_table and num_memory_tokens > 0
        check_same_logits(self, lambda ids: self.decode(self.embed(ids), torch.arange(ids.shape[1], device=ids.device)))
        # transformers 4.57 scales the embeddings of Gemma 1 and 2 inside the decoder, 5 in the embedding. The memory is
        # kept at the scale of 5, so that a file of weights means the same in both
        inside = self.config.model_type in ('gemma', 'gemma2')
        inside = inside and not hasattr(self.lm.get_input_embeddings(), 'embed_scale')
        self.embed_scale = self.dim**0.5 if inside else 1.0
        dtype = torch.promote_types(self.dtype, torch.float32)
        with torch.no_grad():
            ids = torch.arange(0, self.num_tokens, max(1, self.num_tokens // 4096), device=self.device)
            std = self.embed(ids).to(dtype).std() * self.embed_scale

        def noise() -> nn.Parameter:
            shape = num_memory_tokens, self.dim
            return nn.Parameter(torch.randn(shape, dtype=dtype, device=self.device) * std)

        self.initial_memory = noise()
        self.memory_tokens = None if write_init == 'previous' else noise()
        self.read_memory_emb = nn.Parameter(torch.zeros_like(self.initial_memory)) if read_emb else None
        check_same_when_cached(self)
        WITH_MEMORY_TOKENS[id(self.decoder)] = self

    def decode(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """See `PretrainedLM.decode`.

        Raises:
            ValueError: if the attention was changed to one that takes no masks of rows.
        """
        check_backend(self.lm)
        return super().decode(x, positions, mask, **options)

    def initial_state(self, batch_size: int) -> Tensor:
        """See `SegmentModel.initial_state`. It is the learned first memory."""
        return self.initial_memory.expand(batch_size, -1, -1).clone()

    def read_rows(self, memory: Tensor) -> Tensor:
        """Returns what goes into the read rows, (b, m, dim). The default follows the option `read_emb`.

        Args:
            memory: the memory that enters the segment, (b, m, dim).
        """
        return memory if self.read_memory_emb is None else memory + self.read_memory_emb

    def write_rows(self, memory: Tensor) -> Tensor:
        """Returns what goes into the write rows, (b, m, dim). The default follows the option `write_init`.

        Args:
            memory: the memory that enters the segment, (b, m, dim).
        """
        if self.memory_tokens is None:
            return memory
        tokens = self.memory_tokens.expand(len(memory), -1, -1)
        return tokens if self.write_init == 'learned' else tokens + memory

    def placed(self, rows: Tensor) -> Tensor:
        """Returns the positions of rows of [read | text | write], as the decoder is told them.

        Args:
            rows: the numbers of the rows, from 0 on, of any shape.
        """
        return (rows - self.num_memory_tokens).clamp_min(0) if self._has_learned_positions else rows

    def as_rows(self, memory: Tensor) -> Tensor:
        """Returns memory rows (b, m, dim) as the decoder takes embeddings."""
        return (memory / self.embed_scale).to(self.dtype)

    def advance(
        self,
        tokens: Tensor,
        state: Tensor | None = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
    ) -> tuple[Any, Tensor]:
        """Reads one segment. See `SegmentModel.advance`."""
        batch, n = tokens.shape[:2]
        m = self.num_memory_tokens
        if segment_length is not None and n > segment_length:
            raise ValueError(f'{n} tokens in segments of {segment_length}: this model advances one segment at a time')
        self.check_length(n)
        state = self.initial_state(batch) if state is None else state
        if not n:
            return (self.embed(tokens) if need_hidden else None), copied(state)
        rows = self.as_rows(self.read_rows(state)), self.embed(tokens), self.as_rows(self.write_rows(state))
        numbers, sees = torch.arange(m + n + m, device=tokens.device)[None], None
        if mask is not None:
            valid = F.pad(mask, (m, m), value=True)
            numbers = (valid.cumsum(1) - 1).clamp_min(0)  # a row is what it is without its padding
            sees = causal_mask(valid)
        elif self._has_learned_positions:  # without a mask, transformers takes a position that comes twice for a border
            sees = torch.ones(1, 1, m + n + m, m + n + m, dtype=torch.bool, device=tokens.device).tril()
        x = self.decode(torch.cat(rows, dim=1), self.placed(numbers), sees)
        # a copy, since a slice would keep the hidden states of the text alive as long as the memory
        memory = x[:, n + m :].to(state.dtype, copy=True)
        if mask is not None:
            memory = where_rows(mask.any(dim=1), memory, state)
        return (x[:, m : m + n] if need_hidden else None), memory

    def open_segment(self, state: Tensor, segment_length: int) -> RecurrentMemoryLMCache:
        """See `SegmentModel.open_segment`."""
        return RecurrentMemoryLMCache(self, state, segment_length)


class RecurrentMemoryLMCache(SegmentCache):
    """The open segment of a `RecurrentMemoryLM`: keys and values of [read | text] in each layer of the decoder.

    The decoder's own code gives its keys and values to a cache of transformers, whose layers (`Layer`) put them into
    the buffers here and return those to attend to. Masks and positions are given in every call, so that nothing depends
    on what transformers would make of the length of its cache.

    Args:
        model: the model.
        state: the memory that enters the segment.
        segment_length: the largest number of tokens that the segment can hold.

    Attributes:
        keys: a buffer for each layer, (b, g, m + length + 1, d). It is empty before the first call of the decoder.
        values: a buffer for each layer, of the same shape.
    """

    state: Tensor

    def __init__(self, model: RecurrentMemoryLM, state: Tensor, segment_length: int):
        m = model.num_memory_tokens
        super().__init__(state, batch=len(state), prefix=m, length=segment_length, device=model.device)
        layers = model.config.num_hidden_layers
        self.keys: list[Tensor] = [state.new_zeros(0)] * layers
        self.values: list[Tensor] = [state.new_zeros(0)] * layers
        self.cache = Cache(layers=[Layer(index) for index in range(layers)])
        self.join: Callable | None = None
        with torch.no_grad():
            self.enter(model)

    def enter(self, model: RecurrentMemoryLM) -> None:
        """See `OpenSegment.enter`. It runs the read rows."""
        m = model.num_memory_tokens
        if m:
            itself = torch.ones(1, 1, m, m, dtype=torch.bool, device=model.device).tril()
            rows = model.as_rows(model.read_rows(self.state))
            self._run(model, rows, torch.arange(m, device=model.device)[None], itself, self._join_read)

    def read(self, model: RecurrentMemoryLM, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`. It runs the text rows."""
        return self._run(model, model.embed(tokens), *next_rows(self, slots), partial(self._join_text, slots))

    def state_after(self, model: RecurrentMemoryLM, rows: Tensor | None) -> Tensor:
        """See `OpenSegment.state_after`. It runs the write rows."""
        m = model.num_memory_tokens
        if not m:
            return self.state
        columns = torch.arange(m, device=model.device)
        itself = torch.ones(m, m, dtype=torch.bool, device=model.device).tril()
        if self.aligned is not None:
            positions = m + self.aligned + columns[None]
            mask = F.pad(itself, (m + self.aligned, 0), value=True)[None, None]
        else:
            positions = m + self.positions[:, None] + columns
            valid = torch.cat((self.prefix_valid, self.text_valid()), dim=1)[:, None].expand(-1, m, -1)
            mask = torch.cat((valid, itself.expand(self.batch, -1, -1)), dim=-1)[:, None]
        x = model.as_rows(model.write_rows(self.state))
        memory = self._run(model, x, positions, mask, self._join_write).to(self.state.dtype)
        return memory if rows is None else where_rows(rows, memory, self.state)

    def _run(
        self, model: RecurrentMemoryLM, x: Tensor, positions: Tensor, mask: Tensor | None, join: Callable
    ) -> Tensor:
        """Runs the decoder over rows. `join` stores keys or values in a buffer, and returns those to attend to."""
        cache_layers: list[Any] = self.cache.layers
        try:
            self.join = join
            for layer in cache_layers:
                layer.owner = self
            return model.decode(x, model.placed(positions), mask, cache=self.cache)
        finally:  # no cycle of references stays, which would keep the buffers until Python looks for such cycles
            self.join = None
            for layer in cache_layers:
                layer.owner = None

    def joined(self, index: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Stores the keys and values of a layer, (b, g, i, d) each, and returns those to attend to."""
        seen = []
        for buffers, each in zip((self.keys, self.values), new, strict=True):
            if not buffers[index].numel():
                shape = *each.shape[:2], self.prefix + self.length + 1, each.shape[3]
                buffers[index] = each.new_zeros(shape)
            assert self.join is not None
            seen.append(self.join(buffers[index], each))
        return tuple(seen)

    def _join_read(self, buffer: Tensor, new: Tensor) -> Tensor:
        buffer[:, :, : self.prefix] = new
        return new

    def _join_text(self, slots: Slots, buffer: Tensor, new: Tensor) -> Tensor:
        self.put(buffer, new, slots, self.prefix)
        return buffer if slots.start is None else buffer[:, :, : self.prefix + slots.start + slots.tokens]

    def _join_write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write rows see the whole segment and each other. Their keys and values are not stored."""
        end = self.length if self.aligned is None else self.aligned
        return torch.cat((buffer[:, :, : self.prefix + end], new.to(buffer.dtype)), dim=2)


class Layer(CacheLayerMixin):
    """The layer of a transformers cache that hands keys and values on to a `RecurrentMemoryLMCache`.

    Args:
        index: number of the layer.

    Attributes:
        owner: the cache whose tokens the decoder reads now.
    """

    is_sliding = False

    def __init__(self, index: int):
        super().__init__()
        self.owner: RecurrentMemoryLMCache | None = None
        self.index = index
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Stores keys and values, and returns those to attend to."""
        assert self.owner is not None
        return self.owner.joined(self.index, key_states, value_states)

    def lazy_initialization(self, *args: Any) -> None:
        """Does nothing: the owner makes the buffers."""

    def get_seq_length(self) -> int:
        """Returns 0. Positions and masks are given in every call, so nothing asks for a length."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns the sizes of a mask that is never made, since one is given in every call."""
        return (query_length if is_whole(query_length) else len(query_length)), 0

    def get_max_length(self) -> int:
        """Returns -1: there is no limit that transformers has to know."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4
