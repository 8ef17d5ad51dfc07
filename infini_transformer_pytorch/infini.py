"""The Infini-Transformer (arXiv 2404.07143), all segments of a layer at once.

Keys, values and what they write depend on a layer's input alone, so the segments of a window are folded into the batch
for norm, projections, attention and feed-forward; only the memories are chained, by one scan a layer (`memory`).

    transformer = InfiniTransformer(num_tokens=256, dim=512, depth=8, dim_head=128, heads=8, use_mem_delta_rule=True)
    logits, cached_kvs, memories = transformer(x, return_new_memories=True)
    logits, cached_kvs, memories = transformer(x, past_memories=memories, return_new_memories=True)

Letters: s segments, b batch, n tokens of a segment, g key/value heads, d features of a head.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from infini_transformer_pytorch.attention import (
    DECAY_BIAS,
    NORM_EPS,
    CachedKV,
    InfiniAttention,
    Segments,
    Surroundings,
    empty_memories,
)
from infini_transformer_pytorch.decoding import InfiniCache
from infini_transformer_pytorch.memory import Memories, Writes
from segment_recurrence_pytorch.checks import (
    check_faults,
    check_finite,
    check_input,
    check_like,
    check_positive,
    check_probability,
)
from segment_recurrence_pytorch.layers import Blocks, ResidualBlock, SegmentTransformer, rotations_at
from segment_recurrence_pytorch.state import State, copied, detach

CPU_ROWS = 2048  # tokens times rows that a CPU evaluates at once, in benchmarks/infini_training.py
GATE_LR = 30.0  # times the learning rate: 0.01 against 3e-4 in the Hugging Face replication


class TransformerReturn(NamedTuple):
    """What `InfiniTransformer.forward` returns.

    Attributes:
        logits: (b, n, num_tokens).
        cached_kvs: one `CachedKV` a layer, to go on inside the segment; None if the segment was closed.
        past_memories: one `Memories` a layer that holds all segments that were closed; None if none was.
    """

    logits: Tensor
    cached_kvs: list[CachedKV] | None
    past_memories: Any


class InfiniTransformer(SegmentTransformer):
    """A causal transformer with a compressive memory in every head of every layer.

    The state is one `Memories` a layer: `kv_heads` matrices (dim_head, dim_head) and their normalisers, in float32 at
    least.

    Args:
        num_tokens: size of the vocabulary.
        dim: features of a token.
        depth: number of layers.
        dim_head: features of a head, an even number. Default: 128.
        heads: attention heads. Default: 8.
        kv_heads: key/value heads and memories, a divisor of `heads`. Default: None, `heads`.
        attn_dropout: probability that a local attention weight is dropped while training. Default: 0.
        ff_mult: the feed-forward has int(dim * ff_mult * 2 / 3) inner features. Default: 4.
        ff_dropout: probability that an inner feature of the feed-forward is dropped while training. Default: 0.
        use_mem_delta_rule: the published name of memory_rule='delta'. Default: False.
        memory_rule: 'linear' (equation 4), 'delta' (equation 5) or 'deltanet' (token after token, without a normaliser,
            and always with learned strength), see `memory`. Default: None, 'delta' if use_mem_delta_rule is True, else
            'linear'.
        learned_delta_update: whether each token has a learned strength, the share of it that is stored.
            Default: False.
        strength_in_normaliser: whether the strength of a token also scales what it adds to the normaliser; False as in
            published checkpoints. Default: True.
        memory_decay: whether each token has a learned decay, the share of the memory that it keeps. Default: False.
        head_gate_init_value: the start of the gates: sigmoid(gate) is the share of the local attention. Default: 0,
            where the memory learns.
        mem_transform: what is recalled passes through 'talking_heads' or 'kv_proj', see `FastweightMemory`.
            Default: None, neither.
        mem_read_from: a layer recalls from its own memory, 'same', or from that of the layer 'above' (the last layer
            from its own). 'above' selects the segment loop: layer l of a segment then needs layer l + 1 of the segment
            before, so segments cannot be evaluated in parallel. Default: 'same'.
        rotary_theta: the base of the rotary positions inside a segment. Default: 10000.
        qk_norm: whether queries and keys pass an RMS norm with a learned gain. Default: False.
        tie_embeddings: whether logits use the weight of the token embedding. Default: False.

    Raises:
        ValueError: for values outside their range, and for options that contradict each other.
    """

    @beartype
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 128,
        heads: int = 8,
        kv_heads: int | None = None,
        attn_dropout: int | float = 0.0,
        ff_mult: int | float = 4,
        ff_dropout: int | float = 0.0,
        use_mem_delta_rule: bool = False,
        memory_rule: Literal['linear', 'delta', 'deltanet'] | None = None,
        learned_delta_update: bool = False,
        strength_in_normaliser: bool = True,
        memory_decay: bool = False,
        head_gate_init_value: int | float = 0.0,
        mem_transform: Literal['talking_heads', 'kv_proj'] | None = None,
        mem_read_from: Literal['same', 'above'] = 'same',
        rotary_theta: int | float = 10000.0,
        qk_norm: bool = False,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(num_tokens=num_tokens, dim=dim, depth=depth, dim_head=dim_head, heads=heads, kv_heads=kv_heads)
        check_positive(ff_mult=ff_mult, rotary_theta=rotary_theta)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        check_finite(head_gate_init_value=head_gate_init_value)
        if heads % kv_heads:
            raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
        if dim_head % 2:
            raise ValueError(f'rotary positions turn pairs of features: dim_head={dim_head} must be even')
        if use_mem_delta_rule and memory_rule not in (None, 'delta'):
            raise ValueError(
                f"use_mem_delta_rule=True means memory_rule='delta', not {memory_rule!r}: give one of them"
            )
        memory_rule = memory_rule or ('delta' if use_mem_delta_rule else 'linear')

        self.num_tokens = num_tokens
        self.dim = dim
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.memory_rule = memory_rule
        self.memory_decay = memory_decay
        self.mem_read_from = mem_read_from
        self.rotary_theta = rotary_theta
        self.parallel_segments = mem_read_from == 'same'
        self.has_dropout = attn_dropout > 0 or ff_dropout > 0

        self.token_emb = nn.Embedding(num_tokens, dim)
        of_attention = dict(
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            dropout=attn_dropout,
            qk_norm=qk_norm,
            learned_strength=learned_delta_update or memory_rule == 'deltanet',
            memory_decay=memory_decay,
            memory_rule=memory_rule,
            strength_in_normaliser=strength_in_normaliser,
            head_gate_init_value=head_gate_init_value,
            mem_transform=mem_transform,
        )
        self.layers = Blocks(
            self.make_block(
                index, self.make_attention(index, **of_attention), ff_mult=ff_mult, ff_dropout=ff_dropout
            )
            for index in range(depth)
        )  # fmt: skip
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)
        if tie_embeddings:
            self.logits.weight = self.token_emb.weight
        self.init_weights()

    def make_attention(self, index: int, **options: Any) -> InfiniAttention:
        """Returns the attention of layer `index`, while the model is made. Override it to put another one there.

        Args:
            index: the layer, counted from 0.
            options: see `InfiniAttention`.
        """
        return InfiniAttention(self.dim, **options)

    def make_block(self, index: int, attention: InfiniAttention, **options: Any) -> ResidualBlock:
        """Returns layer `index`, while the model is made. Override it to put another one there.

        Args:
            index: the layer, counted from 0.
            attention: its attention.
            options: ff_mult and ff_dropout, see `ResidualBlock`.
        """
        return ResidualBlock(self.dim, attention, **options, norm_eps=NORM_EPS)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Gives the parameters their start.

        Embeddings and logits: normal, std 0.02. Linear layers: normal, std fan_in ** -0.5, but 0 where they write to
        the residual stream, so that a block starts as the identity. Biases 0, decay biases `DECAY_BIAS`. Gates, gains,
        memory transforms and what a subclass adds keep the start that their constructors give them.
        """
        for name, parameter in self.named_parameters():
            if name.endswith('to_decay.bias'):
                nn.init.constant_(parameter, DECAY_BIAS)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)
            elif name.startswith('layers.') and name.endswith('weight') and parameter.ndim == 2:
                writes = name.endswith(('to_out.weight', 'proj_out.weight'))
                nn.init.normal_(parameter, std=0.0 if writes else parameter.shape[1] ** -0.5)
            elif name.endswith(('token_emb.weight', 'logits.weight')):
                nn.init.normal_(parameter, std=0.02)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `SegmentModel.param_groups`; a third group are the gates: `GATE_LR` times the learning rate, no decay."""
        gates = [parameter for name, parameter in self.named_parameters() if name.endswith('.head_gates')]
        known = {id(gate) for gate in gates}
        groups = super().param_groups(lr, weight_decay)
        for group in groups:
            group['params'] = [parameter for parameter in group['params'] if id(parameter) not in known]
        return [*groups, {'params': gates, 'lr': lr * GATE_LR, 'weight_decay': 0.0}]

    @torch.no_grad()
    def memory_shares(self) -> Tensor:
        """Returns the share 1 - sigmoid(gate) that the memory has in the output of each head, (depth, heads)."""
        gates = [gate.sigmoid() for name, gate in self.named_parameters() if name.endswith('.head_gates')]
        return 1 - torch.stack(gates)

    def forward(
        self,
        x: Tensor,
        past_memories: Any = None,
        cached_kv: list[CachedKV] | None = None,
        return_new_memories: bool = False,
        detach_memories: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> TransformerReturn:
        """Reads one segment, or the next part of a segment that is open.

        Args:
            x: ids (b, n) or embeddings (b, n, dim); all of it is new.
            past_memories: one `Memories` a layer, of the segments that were closed. Default: None, a text starts.
            cached_kv: what the last call returned: x goes on in the same segment. Default: None, x begins one.
            return_new_memories: True closes the segment: its tokens are written into the memories. False leaves it open
                (to read a segment part by part, as in decoding): nothing is written yet, the memories come back as they
                were given, and the cache is what the next part of the segment needs. Default: False.
            detach_memories: whether what is returned beside the logits carries no graph. Default: False.
            mask: (b, n) bool, True = valid; not with a cache. Default: None, all positions are valid.

        Returns:
            A `TransformerReturn`.

        Raises:
            ValueError: for what does not fit.
        """
        x, state, mask = check_input(self, x, past_memories, mask=mask)
        if not x.shape[1]:
            raise ValueError('x holds no token: give at least one, or use the wrapper, which takes any number')
        if cached_kv is not None:
            self._check_cache(cached_kv, x, mask)
        state = self.initial_state(x.shape[0]) if state is None else state
        hidden, after, writes = self._read(x, state, x.shape[1], mask, cached=cached_kv)
        logits = self.to_logits(hidden)
        if return_new_memories:
            return TransformerReturn(logits, None, detach(after) if detach_memories else after)
        cache = [CachedKV.of_last_segment(layer) for layer in writes]
        if detach_memories:
            cache, past_memories = detach((cache, past_memories))
        return TransformerReturn(logits, cache, past_memories)

    @classmethod
    def from_peer_state_dict(cls, state_dict: dict[str, Tensor], **arguments: Any) -> InfiniTransformer:
        """Returns the model of a checkpoint of infini-transformer-pytorch 0.2.1, with its weights, in their dtype.

        Args:
            state_dict: the weights.
            arguments: of this class, as far as the shapes do not tell them. They tell num_tokens, dim, depth, heads,
                dim_head, ff_mult and learned_delta_update. use_mem_delta_rule leaves no trace in a checkpoint: give it.

        Raises:
            ValueError: for what does not fit.
        """
        from infini_transformer_pytorch.peer import arguments_of, translated

        model = cls(**{**arguments_of(state_dict), **arguments, 'strength_in_normaliser': False})
        weights = translated(state_dict)
        try:
            model.to(weights['token_emb.weight'].dtype).load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f'the checkpoint does not fit the arguments {arguments}: {error}') from error
        return model

    def initial_state(self, batch_size: int) -> tuple[Memories, ...]:
        """See `SegmentModel.initial_state`: empty memories, one a layer."""
        like = self.token_emb.weight.new_empty(batch_size, self.kv_heads, 0, self.dim_head)
        return tuple(empty_memories(like) for _ in self.layers)

    def largest_state(self, batch_size: int) -> tuple[Memories, ...]:
        """See `SegmentModel.largest_state`: the shapes of the initial state, without the memory that it takes."""
        one = empty_memories(self.token_emb.weight.new_empty(1, self.kv_heads, 0, self.dim_head))
        return tuple(Memories(*(part.expand(batch_size, *part.shape[1:]) for part in one)) for _ in self.layers)

    def advance(
        self,
        tokens: Tensor,
        state: tuple[Memories, ...] | None = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
        write_scale: Tensor | None = None,
    ) -> tuple[Any, tuple[Memories, ...]]:
        """Reads any number of segments, see `SegmentModel.advance`; with mem_read_from='above' one.

        Args:
            tokens, state, segment_length, mask, need_hidden: see `SegmentModel.advance`.
            write_scale: how many times each segment is written, (b, segments), finite and not negative: a segment that
                is read once can stand for many (virtual length, for training). Default: None, once.

        Raises:
            ValueError: for several segments with mem_read_from='above', and for write_scale of another shape, or with
                a rule or an option that it is not defined for.
        """
        length = min(segment_length or tokens.shape[1], tokens.shape[1])
        if not self.parallel_segments and tokens.shape[1] > length:
            raise ValueError("mem_read_from='above' reads one segment at a time")
        if write_scale is not None and (self.memory_rule == 'deltanet' or self.memory_decay):
            raise ValueError("write_scale needs memory_rule 'linear' or 'delta', and memory_decay=False")
        shape = tokens.shape[0], -(-tokens.shape[1] // max(1, length))
        if write_scale is not None and write_scale.shape != shape:
            raise ValueError(f'write_scale has shape {tuple(write_scale.shape)}: give (batch, segments) = {shape}')
        state = self.initial_state(tokens.shape[0]) if state is None else state
        if not tokens.shape[1]:
            return (self.token_emb.weight.new_zeros(tokens.shape[0], 0, self.dim) if need_hidden else None), copied(
                state
            )
        # all at once fills a GPU; a CPU is full with fewer segments, whose activations stay in its cache
        at_once = tokens.shape[1]
        if tokens.device.type == 'cpu':
            at_once = max(1, CPU_ROWS // max(1, tokens.shape[0] * length)) * length
        hiddens = []
        for start in range(0, tokens.shape[1], at_once):
            part = slice(start, start + at_once)
            part_mask = None if mask is None else mask[:, part]
            scale = None if write_scale is None else write_scale[:, start // length : -(-part.stop // length)].mT
            hidden, state, _ = self._read(
                tokens[:, part], state, length, part_mask, need_hidden=need_hidden, scale=scale
            )
            hiddens.append(hidden)
        return (torch.cat(hiddens, dim=1) if need_hidden else None), state

    def _read(
        self,
        tokens: Tensor,
        state: tuple[Memories, ...],
        length: int,
        mask: Tensor | None,
        *,
        need_hidden: bool = True,
        cached: list[CachedKV] | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Any, tuple[Memories, ...], list[Writes]]:
        """Runs the layers over tokens (b, n), in segments of `length`.

        Returns hidden states (b, n, dim), the memories after the last segment, and what each layer wrote.
        """
        batch, n = tokens.shape[:2]
        segments = -(-n // length)
        missing = segments * length - n
        key_mask = mask
        if missing:
            # the end of the last segment: not written, and by causality not seen
            tokens = nn.functional.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing))
            valid = tokens.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
            key_mask = nn.functional.pad(valid, (0, missing))
        tokens = rearrange(tokens, 'b (s n) ... -> s b n ...', s=segments)
        x = self.embed(tokens)
        attn_mask = None
        if key_mask is not None:
            key_mask = rearrange(key_mask, 'b (s n) -> s b n', s=segments)
            if mask is not None:
                itself = torch.eye(length, dtype=torch.bool, device=x.device)
                attn_mask = (key_mask.flatten(0, 1)[:, None, None] & torch.ones_like(itself).tril()) | itself
        rotations = self.rotations(length if cached is None else length + cached[0].kv.shape[3], x)
        # with dropout, a pass with and one without hidden states must draw the same random numbers
        skip = not need_hidden and not (self.training and self.has_dropout)
        last = len(self.layers) - 1
        after, written = [], []
        for index, (block, past) in enumerate(zip(self.layers, state, strict=True)):
            segments_of_layer = Segments(
                past,
                rotations=rotations,
                mask=key_mask,
                attn_mask=attn_mask,
                backend=self.backend,
                recall_from=state[self.layer_recalled(index)] if self.mem_read_from == 'above' else None,
                cached=None if cached is None else cached[index],
                write_scale=scale,
            )
            x = block(x, Surroundings(segments_of_layer.attend, need_output=index < last or not skip))
            after.append(segments_of_layer.after)
            written.append(segments_of_layer.writes)
        hidden = None
        if need_hidden:
            hidden = self.norm(rearrange(x, 's b n d -> b (s n) d')[:, :n])
        return hidden, tuple(after), written

    def rotations(self, length: int, like: Tensor) -> Tensor:
        """Returns the rotations of the positions of a segment, counted from its start, (length, dim_head / 2, 2).

        Args:
            length: tokens of the segment.
            like: a tensor of the device and dtype of the model.
        """
        positions = torch.arange(length, device=like.device)
        return rotations_at(positions, self.dim_head, theta=self.rotary_theta, dtype=like.dtype)

    def open_segment(self, state: tuple[Memories, ...], segment_length: int) -> InfiniCache:
        """See `SegmentModel.open_segment`."""
        return InfiniCache(self, state, segment_length)

    def layer_recalled(self, index: int) -> int:
        """Returns the layer from whose memories layer `index` recalls."""
        return min(index + 1, len(self.layers) - 1) if self.mem_read_from == 'above' else index

    def as_state(self, state: Any, batch_size: int) -> Any:
        """See `SegmentModel.as_state`: lists, and pairs that are no `Memories`, are memories too."""
        if not isinstance(state, (tuple, list)):
            return state
        return tuple(
            Memories(*layer) if isinstance(layer, (tuple, list)) and len(layer) == 2 else layer for layer in state
        )

    def state_faults(self, state: State) -> list[tuple[str, Tensor]]:
        """See `SegmentModel.state_faults`: also normalisers below 0, which no key can have made."""
        negative = torch.stack([(layer.k_norm < 0).any() for layer in state]).any()
        return [*super().state_faults(state), ('state holds a k_norm below 0', negative)]

    def per_segment_faults(self, values: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See `SegmentModel.per_segment_faults`: a write_scale is a number, and not negative."""
        for name, value in values.items():
            if value.dtype == torch.bool or value.is_complex():
                raise ValueError(f'{name} is {value.dtype}: give numbers, of an integer or floating point type')
        negative = [(f'{name} holds negative numbers', (value < 0).any()) for name, value in values.items()]
        return super().per_segment_faults(values) + negative

    def _check_cache(self, cached_kv: list[CachedKV], x: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError for a cache that does not fit the model and the batch."""
        if mask is not None:
            raise ValueError('mask with cached_kv: a cache holds valid tokens only; read padded rows in one call')
        if not isinstance(cached_kv, (list, tuple)):
            raise ValueError(f'cached_kv is a {type(cached_kv).__name__}: give the list that a call returned')
        if len(cached_kv) != len(self.layers):
            raise ValueError(f'cached_kv has {len(cached_kv)} entries: give one a layer, {len(self.layers)}')
        for layer, cached in enumerate(cached_kv):
            if not isinstance(cached, CachedKV):
                raise ValueError(f'cached_kv of layer {layer} is a {type(cached).__name__}: give what a call returned')
            if not isinstance(cached.kv, Tensor) or cached.kv.ndim != 5 or not cached.kv.is_floating_point():
                found = cached.kv.dtype if isinstance(cached.kv, Tensor) else type(cached.kv).__name__
                raise ValueError(f'cached_kv of layer {layer}: kv is {found}: give what a call returned')
        n = cached_kv[0].kv.shape[3]
        faults = []
        for layer, (cached, block) in enumerate(zip(cached_kv, self.layers, strict=True)):
            kv = torch.empty((), dtype=cached.kv.dtype, device=self.device)
            kv = kv.expand(2, x.shape[0], self.kv_heads, n, self.dim_head)
            # what this layer would make of as many tokens
            strength, log_decay = block.attn.strength_and_decay(kv.new_zeros(x.shape[0], n, self.dim, dtype=self.dtype))
            wanted = {'kv': kv, 'strength': strength, 'log_decay': log_decay}
            for part, want in wanted.items():
                have, name = getattr(cached, part), f'cached_kv of layer {layer}: {part}'
                if (have is None) != (want is None):
                    missing = 'is missing' if have is None else 'is not for this model'
                    raise ValueError(f'{name} {missing}: it comes from a model with other options')
                if want is None:
                    continue
                check_like(name, have, want)
                faults.append((f'{name} holds NaN or infinite values', ~have.isfinite().all()))
                if part == 'strength':
                    faults.append((f'{name} holds numbers outside [0, 1]', ((have < 0) | (have > 1)).any()))
                elif part == 'log_decay':
                    faults.append((f'{name} holds numbers above 0', (have > 0).any()))
        check_faults(faults)
