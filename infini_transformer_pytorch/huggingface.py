"""The compressive memory of the Infini-Transformer in the attention of a pretrained language model (extra `hf`).

    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B')
    model = add_infini_attention(lm)
    wrapper = SegmentWrapper(model, segment_length=1024)

No line of the model's code is copied. The memory needs queries and keys as they are before rotation, but after the
norms, biases and fused projections of the family. So a hook gives each attention module the rotation by nothing (cosine
1, sine 0), and keeps the true one. The module then calls an attention function that is registered here. This function
rotates with the family's own function, calls the attention that the model had before, and mixes in what the memory
recalls. States travel as an argument of the decoder: nothing is stored on a module. Without this argument, the model is
what it was.

Letters: s segments, b rows of the batch, h query heads, g key/value heads, n tokens of a segment, d features of a head.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infini_transformer_pytorch.attention import DECAY_BIAS, GATE_START, LayerMemory
from infini_transformer_pytorch.decoding import MemoryCache
from infini_transformer_pytorch.infini import GatedMemories
from infini_transformer_pytorch.memory import Memories, Writes, chosen_rule
from segment_recurrence_pytorch.cache import Slots
from segment_recurrence_pytorch.checks import is_whole, typed
from segment_recurrence_pytorch.huggingface.decoder import (
    BACKENDS,
    WITH_MEMORY_TOKENS,
    PretrainedLM,
    check_same_logits,
    check_same_when_cached,
    next_rows,
)
from segment_recurrence_pytorch.layers import causal_mask
from segment_recurrence_pytorch.state import copied

# isort: split
# after what says which extra to install if transformers is missing
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Initial bias of the strength with the rule deltanet: a token writes sigmoid(-2) = 0.12 of itself, with which
# docs/pretrained.md was measured. Models of the library start at one half
STRENGTH_BIAS = -2.0


def add_infini_attention(
    lm: Any,
    *,
    memory_rule: str | None = None,
    learned_delta_update: bool = False,
    memory_decay: bool | None = None,
    head_gate_init_value: int | float = GATE_START,
    layers: Any = None,
) -> InfiniLM:
    """Adds a memory to the attention of a pretrained language model, and returns it as an `InfiniLM`.

    The language model is changed in place: its attention modules get parameters. It still generates and trains by
    itself as before, without the memory.

    Args:
        lm: see `InfiniLM`.
        memory_rule: see `InfiniLM`. Default: None, 'deltanet'.
        learned_delta_update: see `InfiniLM`. Default: False.
        memory_decay: see `InfiniLM`. Default: None, True with 'deltanet'.
        head_gate_init_value: see `InfiniLM`. Default: 3.
        layers: see `InfiniLM`. Default: None, all layers.

    Raises:
        ValueError: see `InfiniLM`.
    """
    return InfiniLM(
        lm,
        memory_rule=memory_rule,
        learned_delta_update=learned_delta_update,
        memory_decay=memory_decay,
        head_gate_init_value=head_gate_init_value,
        layers=layers,
    )


class InfiniLM(PretrainedLM, GatedMemories):
    """A causal language model with a compressive memory in its attention. It reads segments in parallel.

    The state is a `Memories` for each layer that has a memory. Positions count from the start of each segment. Tested
    with the families with rotary positions: GPT-NeoX, Llama, Mistral, Phi, Qwen2, Qwen3 and Gemma 1 to 3. Others are
    accepted if a trial at construction finds the same logits.

    If adapters are trained, apply `peft` to the language model first: applied later, it freezes the memory.
    `checkpoint.save_weights(model, path, trained_only=True)` then writes adapters and memory into one file.

    Args:
        lm: what `AutoModelForCausalLM.from_pretrained` returned, or its PEFT model. See `PretrainedLM`.
        memory_rule: 'linear', 'delta' or 'deltanet'. See `InfiniTransformer`. Default: None, 'deltanet'.
        learned_delta_update: whether the strength of each token is learned; always with 'deltanet'. Default: False.
        memory_decay: whether the decay of each token is learned. Default: None, True with 'deltanet', else False.
        head_gate_init_value: initial value of the gates. sigmoid(gate) is the share of the local attention. Default: 3,
            a share of 0.95, as in the library's own model.
        layers: numbers of the layers that get a memory, from 0. Default: None, all layers.

    Raises:
        ValueError: if the language model is of a family that does not work, or has a memory already, or if an argument
            is outside its range. It is unchanged then.
    """

    parallel_segments = True

    @typed
    def __init__(
        self,
        lm: Any,
        *,
        memory_rule: str | None = None,
        learned_delta_update: bool = False,
        memory_decay: bool | None = None,
        head_gate_init_value: int | float = GATE_START,
        layers: Any = None,
    ):
        super().__init__(lm)
        if id(self.decoder) in WITH_MEMORY_TOKENS:
            raise ValueError(
                f'{type(lm).__name__} is inside a RecurrentMemoryLM, whose attention would change too: give the model '
                'as it was loaded'
            )
        self.max_segment_length = self.longest_segment(None, 0)
        self._adapters_first = hasattr(self.lm, 'peft_config')
        self.memory_rule, self.memory_decay = chosen_rule(memory_rule, memory_decay)
        found = attention_modules(self.lm)
        chosen = self._layers = _checked_layers(layers, len(found))
        self.kv_heads, self.dim_head = _heads_of(found[0], self.config)
        self._memories = [
            PretrainedMemory(
                self.dim,
                backend=self.attention,
                index=index,
                heads=self.config.num_attention_heads,
                kv_heads=self.kv_heads,
                learned_strength=learned_delta_update,
                memory_decay=self.memory_decay,
                memory_rule=self.memory_rule,
                head_gate_init_value=head_gate_init_value,
            ).to(self.device, torch.promote_types(self.dtype, torch.float32))
            for index in range(len(chosen))
        ]
        hooks, backend = [], self.attention
        _give_own_config(self.lm)
        try:
            for memory, layer in zip(self._memories, chosen, strict=True):
                found[layer].infini = memory
                hooks.append(found[layer].register_forward_pre_hook(_before_attention, with_kwargs=True))
            self.lm.set_attn_implementation(f'infini_{backend}')
            check_same_logits(self, lambda ids: self.advance(ids)[0])
            check_same_when_cached(self)
        except Exception as error:  # the family's own code may fail in any way: the model is given back as it was
            for hook in hooks:
                hook.remove()
            for layer in chosen:
                if hasattr(found[layer], 'infini'):
                    del found[layer].infini
            self.lm.set_attn_implementation(backend)
            if isinstance(error, ValueError):
                raise
            name = type(self.lm).__name__
            raise ValueError(f'{name} is not supported: with a memory, its attention failed with {error!r}') from error

    @property
    def memory_layers(self) -> list[LayerMemory]:
        """See `GatedMemories.memory_layers`."""
        return list(self._memories)

    def recorded_argument(self, name: str, value: Any) -> Any:
        """See `SegmentModel.recorded_argument`. The chosen layers are recorded as a list."""
        return list(self._layers) if name == 'layers' and value is not None else super().recorded_argument(name, value)

    def decode(self, x: Tensor, *rows: Any, **options: Any) -> Tensor:
        """See `PretrainedLM.decode`.

        Raises:
            ValueError: if the attention of the language model was changed, so that it would not see the memory.
        """
        if not self.attention.startswith('infini_'):
            raise ValueError(
                f'the attention was changed to {self.attention!r}, which does not see the memory: call '
                f"lm.set_attn_implementation('infini_{self._memories[0].backend}')"
            )
        return super().decode(x, *rows, **options)

    def check_training(self) -> None:
        """See `PretrainedLM.check_training`. It also finds a memory that `peft` has frozen."""
        super().check_training()
        trained = any(parameter.requires_grad for memory in self._memories for parameter in memory.parameters())
        if not trained and hasattr(self.lm, 'peft_config') and not self._adapters_first:
            raise ValueError(
                'peft was applied after add_infini_attention, which froze the memory: apply peft to the language model '
                'first, or call requires_grad_(True) on each of model.memory_layers'
            )

    def advance(
        self,
        tokens: Tensor,
        state: tuple[Memories, ...] | None = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
    ) -> tuple[Any, tuple[Memories, ...]]:
        """Reads any number of segments. See `SegmentModel.advance`. All segments are folded into the batch."""
        batch, n = tokens.shape[:2]
        state = self.initial_state(batch) if state is None else state
        if not n:
            return (self.embed(tokens) if need_hidden else None), copied(state)
        length = min(segment_length or n, n)
        self.check_length(length)
        segments = -(-n // length)
        missing = segments * length - n
        valid, sees = mask, None
        if missing:
            # the last segment is padded at its end. The padding is not written, and no token before it can see it
            tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing))
            valid = tokens.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
            valid = F.pad(valid, (0, missing))
        if valid is not None:
            valid = rearrange(valid, 'b (s n) -> s b n', s=segments)
            if mask is not None:
                sees = causal_mask(valid.flatten(0, 1))
        x = self.embed(rearrange(tokens, 'b (s n) ... -> (s b) n ...', s=segments))
        window = Segments(state, segments, valid)
        x = self.decode(x, torch.arange(length, device=x.device)[None], sees, infini=window)
        hidden = rearrange(x, '(s b) n d -> b (s n) d', s=segments)[:, :n] if need_hidden else None
        if len(window.after) < len(state):
            raise ValueError('its layers do not hand on what their attention is given, so no memory can be in it')
        return hidden, tuple(window.after[index] for index in range(len(state)))

    def open_segment(self, state: tuple[Memories, ...], segment_length: int) -> InfiniLMCache:
        """See `SegmentModel.open_segment`."""
        return InfiniLMCache(self, state, segment_length)


class PretrainedMemory(LayerMemory):
    """The memory of one layer of a pretrained language model.

    Args:
        dim: features of a token.
        backend: the name of the attention that the model had before.
        index: the number of this memory in the state.
        memory: see `LayerMemory.add_memory`.
    """

    def __init__(self, dim: int, *, backend: str, index: int, **memory: Any):
        super().__init__()
        self.backend = backend
        self.index = index
        self.add_memory(dim, **memory)
        if self.to_strength is not None:
            nn.init.normal_(self.to_strength.weight, std=dim**-0.5)
            if self.to_strength.bias is not None:
                nn.init.constant_(self.to_strength.bias, STRENGTH_BIAS)
        if self.to_decay is not None:
            nn.init.normal_(self.to_decay.weight, std=dim**-0.5)
            nn.init.constant_(self.to_decay.bias, DECAY_BIAS)

    def strength_and_decay(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See `LayerMemory.strength_and_decay`. The memory has float32 parameters in a half model."""
        return super().strength_and_decay(x.to(self.fastweight_mem.head_gates.dtype))


class PerToken(NamedTuple):
    """What an attention module hands on to the attention function, beside queries, keys and values.

    Attributes:
        surroundings: what the tokens may attend to and recall from: `Segments` or `NextTokens`.
        rotation: cosine and sine of the true rotation.
        strength: the strength of each token, or None.
        log_decay: the log decay of each token, or None.
        gates: a gate for each token, or None.
    """

    surroundings: Any
    rotation: tuple[Tensor, Tensor]
    strength: Tensor | None
    log_decay: Tensor | None
    gates: Tensor | None


class Segments:
    """The surroundings of the tokens of a window: its segments, one after the other in the batch.

    Args:
        state: the memories that enter the first segment.
        segments: number s of segments.
        valid: which tokens are written, (s, b, n) bool. None: all tokens.

    Attributes:
        after: the memories after the last segment, by the number of the layer.
    """

    def __init__(self, state: tuple[Memories, ...], segments: int, valid: Tensor | None):
        self.state = state
        self.segments = segments
        self.valid = valid
        self.after: dict[int, Memories] = {}

    def attend_with_memory(
        self, memory: PretrainedMemory, token: PerToken, q: Tensor, k: Tensor, v: Tensor, *,
        rotate: Callable, local: Callable,
    ) -> Tensor:  # fmt: skip
        """Returns the mix of local attention and what the memory recalls, (s b, h, n, d).

        Args:
            memory: the memory of the layer.
            token: what the attention module handed on.
            q: queries before rotation, (s b, h, n, d).
            k: keys before rotation, (s b, g, n, d).
            v: values (s b, g, n, d).
            rotate: the rotation of queries and keys of the family.
            local: the attention that the model had before.
        """
        out = local(*rotate(q, k), v)
        gates = None if token.gates is None else token.gates.expand(*q.shape[:-1])  # one for all tokens will do
        gates, strength, log_decay = (
            None if t is None else t.unflatten(0, (self.segments, -1)) for t in (gates, token.strength, token.log_decay)
        )
        out, q, k, v = (t.unflatten(0, (self.segments, -1)) for t in (out, q, k, v))
        writes = Writes(k, v, strength, log_decay, self.valid)
        entering, self.after[memory.index] = memory.fastweight_mem.write(writes, self.state[memory.index])
        recallable = memory.fastweight_mem.recallable(entering)
        return memory.fastweight_mem.recall(out, q, recallable, gates).flatten(0, 1)

    def attend_locally(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, local: Callable) -> Tensor:
        """Returns the local attention of a layer without a memory, (s b, h, n, d).

        Args:
            layer: number of the layer.
            q: queries after rotation, (s b, h, n, d).
            k: keys after rotation, (s b, g, n, d).
            v: values (s b, g, n, d).
            local: the attention that the model had before.
        """
        return local(q, k, v)


class InfiniLMCache(MemoryCache):
    """The open segment of an `InfiniLM`.

    Args:
        model: the model.
        state: the memories that enter the segment.
        segment_length: the largest number of tokens that the segment can hold.

    Attributes:
        local: keys after rotation and values, side by side, (b, 2 g, length + 1, d), of each layer without a memory.
    """

    def __init__(self, model: InfiniLM, state: tuple[Memories, ...], segment_length: int):
        super().__init__(model, state, segment_length)
        self.local: dict[int, Tensor] = {}

    def read(self, model: InfiniLM, tokens: Tensor, slots: Slots, lengths: Tensor | None) -> Tensor:
        """See `OpenSegment.read`."""
        return model.decode(model.embed(tokens), *next_rows(self, slots), infini=NextTokens(self, slots))


class NextTokens:
    """The surroundings of the next tokens of open segments: their cache.

    Args:
        cache: the cache.
        slots: where the tokens go.
    """

    def __init__(self, cache: InfiniLMCache, slots: Slots):
        self.cache = cache
        self.slots = slots

    def attend_with_memory(
        self, memory: PretrainedMemory, token: PerToken, q: Tensor, k: Tensor, v: Tensor, *,
        rotate: Callable, local: Callable,
    ) -> Tensor:  # fmt: skip
        """See `Segments.attend_with_memory`, with s = 1."""
        cache, index = self.cache, memory.index
        turned_q, turned_k = rotate(q, k)
        cache.store(index, turned_k, torch.cat((k, v), dim=1), token.strength, token.log_decay, self.slots)
        out = local(turned_q, self._seen(cache.keys[index]), self._seen(cache.written[index][:, k.shape[1] :]))
        return memory.fastweight_mem.recall(out, q, cache.recallable[index], token.gates)

    def attend_locally(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, local: Callable) -> Tensor:
        """See `Segments.attend_locally`. The keys and values are stored here too."""
        new, buffers = torch.cat((k, v), dim=1), self.cache.local
        if layer not in buffers:
            buffers[layer] = new.new_zeros(*new.shape[:2], self.cache.length + 1, new.shape[3])
        self.cache.put(buffers[layer], new, self.slots)
        return local(q, *self._seen(buffers[layer]).chunk(2, dim=1))

    def _seen(self, buffer: Tensor) -> Tensor:
        """Returns the part of a buffer that the mask of the tokens covers."""
        return buffer if self.slots.start is None else buffer[:, :, : self.slots.start + self.slots.tokens]


def attention_modules(lm: nn.Module) -> list[nn.Module]:
    """Returns the attention modules of a language model, in the order of its layers.

    Raises:
        ValueError: if they do not rotate queries and keys and call the attention interface of transformers.
    """
    found = [
        module
        for module in lm.modules()
        if type(module).__name__.endswith('Attention')
        and all(hasattr(module, name) for name in ('layer_idx', 'scaling'))
        and hasattr(sys.modules[type(module).__module__], 'apply_rotary_pos_emb')
    ]
    if not found:
        raise ValueError(
            f'{type(lm).__name__} has no attention with rotary positions: Infini-attention works with GPT-NeoX, Llama, '
            'Mistral, Phi, Qwen2, Qwen3 and Gemma 1 to 3; RecurrentMemoryLM works with others too'
        )
    return found


def _give_own_config(lm: nn.Module) -> None:
    """Gives a model a copy of its config, since the config names the attention, and other models may share it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(lm.config, copies)  # by the identity of each config inside it
    for module in lm.modules():
        config = getattr(module, 'config', None)
        if id(config) in copies:
            module.config = copies[id(config)]


def _heads_of(module: Any, config: Any) -> tuple[int, int]:
    """Returns the number of key/value heads of an attention module, and the features of a head."""
    kv_heads = getattr(config, 'num_key_value_heads', None) or config.num_attention_heads
    dim_head = getattr(module, 'head_dim', None) or getattr(module, 'head_size', None)
    if dim_head is None:
        raise ValueError(f'{type(module).__name__} has no head_dim: heads whose keys and values differ have no memory')
    return kv_heads, dim_head


def _checked_layers(layers: Any, count: int) -> list[int]:
    """Returns the numbers of the layers that get a memory."""
    if layers is None:
        return list(range(count))
    layers = list(layers) if isinstance(layers, (list, tuple, range, set)) else [layers]
    if not layers or not all(is_whole(layer) and 0 <= layer < count for layer in layers):
        raise ValueError(f'layers are {layers}: give one or more numbers from 0 to {count - 1}, or None for all layers')
    return sorted(set(layers))


def _before_attention(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook: keeps the rotation, so that queries and keys reach the attention function as they are before it."""
    surroundings = kwargs.get('infini')
    if surroundings is None:  # the model as it was, with its own cache and `generate`
        return None
    if kwargs.get('position_embeddings') is None:
        raise ValueError(f'{type(module).__name__} is not given its rotation as position_embeddings')
    x = args[0] if args else kwargs['hidden_states']
    rotation, memory = kwargs['position_embeddings'], module.infini
    cos, sin = rotation
    strength, log_decay = memory.strength_and_decay(x)
    token = PerToken(surroundings, rotation, strength, log_decay, memory.gates(x))
    nothing = torch.ones_like(cos), torch.zeros_like(sin)
    return args, {**kwargs, 'position_embeddings': nothing, 'infini': token}


def _attention(
    backend: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    infini: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The attention function. If no state was given, it is that of the backend."""
    family = sys.modules[type(module).__module__]
    attend = family.eager_attention_forward if backend == 'eager' else ALL_ATTENTION_FUNCTIONS[backend]
    if infini is None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        rotated = infini.rotation[0].shape[-1]
        if rotated == q.shape[-1]:
            return family.apply_rotary_pos_emb(q, k, *infini.rotation)
        # Phi and StableLM hand only those features to their rotation that they turn; GPT-NeoX's leaves out the others
        turned_q, turned_k = family.apply_rotary_pos_emb(q[..., :rotated], k[..., :rotated], *infini.rotation)
        return torch.cat((turned_q, q[..., rotated:]), dim=-1), torch.cat((turned_k, k[..., rotated:]), dim=-1)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(module, q, k, v, attention_mask, *args, **kwargs)[0].transpose(1, 2)

    if isinstance(infini, PerToken):
        out = infini.surroundings.attend_with_memory(
            module.infini, infini, query, key, value, rotate=rotate, local=local
        )
    else:
        out = infini.attend_locally(module.layer_idx, query, key, value, local=local)
    return out.transpose(1, 2).contiguous(), None


for _backend in BACKENDS:
    AttentionInterface.register(f'infini_{_backend}', partial(_attention, _backend))
    AttentionMaskInterface.register(f'infini_{_backend}', ALL_MASK_ATTENTION_FUNCTIONS[_backend])
