"""The Infini-Transformer (arXiv 2404.07143). It reads many segments at once, layer by layer.

What a layer writes to its memory depends only on the layer's input, and not on the memory. All segments of a window can
therefore go through norm, projections, attention and feed-forward together, as if they were more rows of the batch.
Only the memories depend on each other from segment to segment: one scan for each layer computes them (see `memory`).

    transformer = InfiniTransformer(num_tokens=256, dim=512, depth=8, dim_head=128, heads=8, use_mem_delta_rule=True)
    logits, cached_kvs, memories = transformer(x, return_new_memories=True)
    logits, cached_kvs, memories = transformer(x, past_memories=memories, return_new_memories=True)

Letters: s segments, b rows of the batch, n tokens of a segment, g key/value heads, d features of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from infini_transformer_pytorch.attention import (
    DECAY_BIAS,
    GATE_START,
    PUBLISHED_NORM_EPS,
    CachedKV,
    InfiniAttention,
    LayerMemory,
    Segments,
    Surroundings,
    empty_memories,
)
from infini_transformer_pytorch.decoding import InfiniCache
from infini_transformer_pytorch.memory import DELTANET_CHUNK, Memories, Writes, chosen_rule
from segment_recurrence_pytorch.checks import (
    check_finite,
    check_input,
    check_like,
    check_positive,
    check_probability,
    typed,
)
from segment_recurrence_pytorch.layers import (
    Blocks,
    ResidualBlock,
    SegmentTransformer,
    causal_mask,
    may_draw_random,
    rotations_between,
)
from segment_recurrence_pytorch.model import SegmentModel, whole, with_own_rate
from segment_recurrence_pytorch.state import State, copied, detach

CPU_ROWS = 2048  # on a CPU, so many tokens (of all rows together) at once are fastest: benchmarks/infini_training.py
# Factor of the gates' learning rate. Few numbers decide whether a memory is used: with 1 text is modelled worse, with
# 10 and 30 better, after 300 steps at segments of 16 bytes. All of them learn a fact: benchmarks.evidence, `gate`
GATE_LR = 3.0
VALID_ONLY = 'a cache that goes on holds valid tokens only; read padded rows in one call, or with the wrapper'


class TransformerReturn(NamedTuple):
    """What `InfiniTransformer.forward` returns.

    Attributes:
        logits: (b, n, num_tokens).
        cached_kvs: a `CachedKV` for each layer, to go on inside the segment. None if the segment was closed.
        past_memories: a `Memories` for each layer, which holds all segments that were closed. None if no segment was
            closed.
    """

    logits: Tensor
    cached_kvs: list[CachedKV] | None
    past_memories: Any


class GatedMemories(SegmentModel):
    """A model whose state is a `Memories` for each layer that has a memory: what all such models have in common.

    Attributes:
        kv_heads: number of memories of a layer.
        dim_head: features of a key and of a value.
        memory_rule: a name in `memory.MEMORY_RULES`.
        memory_decay: whether the decay of each token is learned.
    """

    kv_heads: int
    dim_head: int
    memory_rule: str
    memory_decay: bool

    @property
    @abstractmethod
    def memory_layers(self) -> list[LayerMemory]:
        """The layers that have a memory, in the order of the state."""

    def initial_state(self, batch_size: int) -> tuple[Memories, ...]:
        """See `SegmentModel.initial_state`. The state is an empty memory for each layer that has one."""
        like = torch.empty(batch_size, self.kv_heads, 0, self.dim_head, dtype=self.dtype, device=self.device)
        return tuple(empty_memories(like) for _ in self.memory_layers)

    def largest_state(self, batch_size: int) -> tuple[Memories, ...]:
        """See `SegmentModel.largest_state`. It has the shapes of the initial state, but takes up no memory for each
        row and layer."""
        one = empty_memories(torch.empty(1, self.kv_heads, 0, self.dim_head, dtype=self.dtype, device=self.device))
        every = Memories(*(part.expand(batch_size, *part.shape[1:]) for part in one))
        return (every,) * len(self.memory_layers)

    def segment_bytes(self, segment_length: int) -> int:
        """See `SegmentModel.segment_bytes`. Beside each memory 'delta' keeps a matrix of what it erases, and one more
        with decay; 'deltanet' keeps a memory and a matrix for each of its chunks."""
        chunks = -(-segment_length // DELTANET_CHUNK)
        matrices = {'linear': 1, 'delta': 2 + self.memory_decay, 'deltanet': 2 * chunks}[self.memory_rule]
        return super().segment_bytes(segment_length) * matrices

    def recorded_argument(self, name: str, value: Any) -> Any:
        """See `SegmentModel.recorded_argument`. What was chosen for None is recorded: files then keep their meaning."""
        value = getattr(self, name) if name in ('memory_rule', 'memory_decay') else value
        return super().recorded_argument(name, value)

    def layer_recalled(self, index: int) -> int:
        """Returns the number of the memory from which a layer recalls. The default returns its own.

        Args:
            index: number of the layer in `memory_layers`.
        """
        return index

    def param_groups(
        self, lr: float, weight_decay: float, *, gate_lr: float = GATE_LR, **rates: Any
    ) -> list[dict[str, Any]]:
        """Returns groups of parameters for an optimizer: those of a model without gates, and last the gates.

        Args:
            lr: the learning rate.
            weight_decay: weight decay of the matrices of the blocks.
            gate_lr: the learning rate of the gates, as a factor of lr. Default: 3.
            rates: what the model without gates takes: an `InfiniTransformer` takes `emb_lr`, see
                `SegmentTransformer.param_groups`.

        Raises:
            ValueError: if gate_lr is not a positive number.
        """
        check_positive(gate_lr=gate_lr)
        gates = [gate for name, gate in self.named_parameters() if name.endswith('.head_gates')]
        return with_own_rate(super().param_groups(lr, weight_decay, **rates), gates, lr * gate_lr)

    @torch.no_grad()
    def memory_shares(self) -> Tensor:
        """Returns the share that the memory has in the output of each head, 1 - sigmoid(gate), (layers, heads).

        If the parameters are sharded, all ranks have to make the call.

        Raises:
            ValueError: if a layer computes its gates in another way (`LayerMemory.gates`): a head has no share then.
        """
        for index, layer in enumerate(self.memory_layers):
            if getattr(layer.gates, '__func__', None) is not LayerMemory.gates:  # of a subclass, or of this module
                raise ValueError(
                    f'{type(layer).__name__}, the memory of layer {index}, computes its gates from the tokens, so its '
                    'heads have no share of their own: record what its method `gates` returns'
                )
        gates = [whole(gate).sigmoid() for name, gate in self.named_parameters() if name.endswith('.head_gates')]
        return 1 - torch.stack(gates)

    def as_state(self, state: Any, batch_size: int) -> Any:
        """See `SegmentModel.as_state`. The memories may also be in a list, and those of a layer may be a plain pair."""
        if not isinstance(state, (tuple, list)):
            return state
        return tuple(
            Memories(*layer) if isinstance(layer, (tuple, list)) and len(layer) == 2 else layer for layer in state
        )

    def state_faults(self, state: State) -> list[tuple[str, Tensor]]:
        """See `SegmentModel.state_faults`. It also finds normalisers below 0, which cannot result from any keys."""
        negative = torch.stack([(layer.k_norm < 0).any() for layer in state]).any()
        return [*super().state_faults(state), ('state holds a k_norm below 0', negative)]


class InfiniTransformer(GatedMemories, SegmentTransformer):
    """A causal transformer with a compressive memory in every head of every layer.

    The state is a `Memories` for each layer: `kv_heads` matrices (dim_head, dim_head), and `k_norm`, their normalisers
    (dim_head,) or, with 'deltanet', 1 once anything was written and else 0. They are float32 at least. Numbers of
    equations are those of the paper's first version (arXiv 2404.07143v1); the second one adds 4 to each.

    Args:
        num_tokens: size of the vocabulary.
        dim: features of a token.
        depth: number of layers.
        dim_head: features of a head, an even number. Default: 128.
        heads: number of query heads. Default: 8.
        kv_heads: number of key/value heads and memories of a layer, a divisor of `heads`. Default: None, `heads`.
        attn_dropout: probability that a weight of the local attention is dropped during training. Default: 0.
        ff_mult: the feed-forward has int(dim * ff_mult * 2 / 3) inner features. Default: 4.
        ff_dropout: probability that an inner feature of the feed-forward is dropped during training. Default: 0.
        use_mem_delta_rule: the published option: True is memory_rule='delta', False is memory_rule='linear' unless
            memory_rule names another one. Default: None, memory_rule decides.
        memory_rule: how the memory is written: 'linear' (equation 4), 'delta' (equation 5), or 'deltanet' (token after
            token, without a normaliser, and always with a learned strength). See `memory`. Default: None, 'deltanet'
            unless use_mem_delta_rule is given.
        learned_delta_update: whether the strength of each token is learned: how much of it is written. Default: False.
        strength_in_normaliser: whether the strength of a token also scales what it adds to the normaliser. Checkpoints
            of infini-transformer-pytorch need False. Default: True.
        memory_decay: whether the decay of each token is learned: the share of the memory that it keeps. Default: None,
            True with 'deltanet', False with the other rules.
        head_gate_init_value: initial value of the gates. sigmoid(gate) is the share of the local attention. Default: 3,
            a share of 0.95, with which the memory costs nothing on text until it is of use.
        mem_transform: a learned map of the memory before it is recalled from, 'talking_heads' or 'kv_proj'. See
            `FastweightMemory`. Default: None, no map.
        mem_read_from: from which memory a layer recalls: 'same', its own, or 'above', that of the next layer (the last
            layer then recalls from its own). With 'above', segments cannot be read in parallel, since layer l then
            needs what layer l + 1 wrote in the segment before. Default: 'same'.
        rotary_theta: base of the frequencies of the rotary positions inside a segment. Default: 10000.
        qk_norm: whether queries and keys go through an RMS norm with a learned gain. Default: False.
        tie_embeddings: whether the logits use the weight of the token embedding. Default: False.

    Raises:
        ValueError: if a value is outside its range, or if options contradict each other.
    """

    free_arguments = frozenset({'attn_dropout', 'ff_dropout'})

    @typed
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
        use_mem_delta_rule: bool | None = None,
        memory_rule: Literal['linear', 'delta', 'deltanet'] | None = None,
        learned_delta_update: bool = False,
        strength_in_normaliser: bool = True,
        memory_decay: bool | None = None,
        head_gate_init_value: int | float = GATE_START,
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
        rule, memory_decay = chosen_rule(memory_rule, memory_decay, use_mem_delta_rule)

        self.num_tokens = num_tokens
        self.dim = dim
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.memory_rule = rule
        self.memory_decay = memory_decay
        self.mem_read_from = mem_read_from
        self.rotary_theta = rotary_theta
        self.parallel_segments = self.can_chain = mem_read_from == 'same'

        self.token_emb = nn.Embedding(num_tokens, dim)
        of_attention = dict(
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim_head,
            dropout=attn_dropout,
            qk_norm=qk_norm,
            learned_strength=learned_delta_update,
            memory_decay=memory_decay,
            memory_rule=rule,
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
        self.norm = nn.RMSNorm(dim, eps=PUBLISHED_NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)
        if tie_embeddings:
            self.logits.weight = self.token_emb.weight
        self.init_weights()

    def as_arguments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """See `SegmentModel.as_arguments`. Older versions recorded no rule where use_mem_delta_rule decided."""
        if saved.get('memory_rule') is None and 'use_mem_delta_rule' in saved:
            saved = {**saved, 'memory_rule': 'delta' if saved['use_mem_delta_rule'] else 'linear'}
        return saved

    def make_attention(self, index: int, **options: Any) -> InfiniAttention:
        """Returns the attention of a layer. The constructor calls it. Override it to use another attention.

        Args:
            index: number of the layer, from 0.
            options: see `InfiniAttention`.
        """
        return InfiniAttention(self.dim, **options)

    def make_block(self, index: int, attention: InfiniAttention, **options: Any) -> ResidualBlock:
        """Returns a layer. The constructor calls it. Override it to use another block, which calls its
        attention exactly once.

        Args:
            index: number of the layer, from 0.
            attention: the attention of the layer.
            options: ff_mult and ff_dropout, see `ResidualBlock`.
        """
        return ResidualBlock(self.dim, attention, **options, norm_eps=PUBLISHED_NORM_EPS)

    @property
    def memory_layers(self) -> list[LayerMemory]:
        """See `GatedMemories.memory_layers`. Every layer has a memory."""
        return [block.attn for block in self.layers]

    @property
    def draws_random(self) -> bool:
        """See `SegmentModel.draws_random` and `layers.may_draw_random`."""
        return may_draw_random(self, InfiniTransformer)

    @torch.no_grad()
    def init_weights(self) -> None:
        """See `SegmentTransformer.init_weights`. Biases of decays are `DECAY_BIAS`."""
        super().init_weights()
        for name, parameter in self.named_parameters():
            if name.endswith('to_decay.bias'):
                nn.init.constant_(parameter, DECAY_BIAS)

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
        """Reads one segment, or the next part of a segment that was left open.

        Args:
            x: token ids (b, n) or embeddings (b, n, dim). All of them are new tokens.
            past_memories: a `Memories` for each layer, which holds the segments that were closed. Default: None, a text
                starts.
            cached_kv: the cache that the last call returned. x then goes on in the same segment. Default: None, x
                begins a segment.
            return_new_memories: whether to close the segment. If True, its tokens are written to the memories. If
                False, nothing is written yet: the memories are returned as they were given, with a cache to go on
                inside the segment. Default: False.
            detach_memories: whether the memories and the cache are returned without a graph. Default: False.
            mask: (b, n) bool, True = valid. It cannot be combined with a cache. Default: None, all positions are valid.

        Returns:
            A `TransformerReturn`: (logits, cached_kvs, past_memories).

        Raises:
            ValueError: if an argument does not fit the model or another argument.
        """
        further = [] if cached_kv is None or x.ndim < 2 else self._cache_faults(cached_kv, x, mask)
        x, state, mask = check_input(self, x, past_memories, mask=mask, further=further)
        if not x.shape[1]:
            raise ValueError('x holds no token: give at least one, or use the wrapper, which takes any number')
        state = self.initial_state(x.shape[0]) if state is None else state
        hidden, after, writes = self._read(x, state, x.shape[1], mask, cached=cached_kv, closes=return_new_memories)
        logits = self.to_logits(hidden)
        if return_new_memories:
            return TransformerReturn(logits, None, detach(after) if detach_memories else after)
        cache = [CachedKV.of_last_segment(layer) for layer in writes]
        if detach_memories:
            cache, past_memories = detach((cache, past_memories))
        return TransformerReturn(logits, cache, past_memories)

    @classmethod
    def from_peer_state_dict(cls, state_dict: dict[str, Tensor], **arguments: Any) -> InfiniTransformer:
        """Returns a model with the weights of a checkpoint of infini-transformer-pytorch 0.2.1, in their dtype.

        The shapes of the weights tell num_tokens, dim, depth, heads, dim_head, ff_mult and learned_delta_update.
        Nothing in a checkpoint tells whether it was trained with use_mem_delta_rule: give that argument. Without it the
        rule is linear. The other options are those of that package: no decay, a gate for each head, no norm.

        Args:
            state_dict: the weights.
            arguments: further arguments of this class.

        Raises:
            ValueError: if the weights do not fit, or an argument asks for what that package does not have.
        """
        from infini_transformer_pytorch.peer import arguments_of, translated

        published: dict[str, Any] = {
            'memory_decay': False, 'strength_in_normaliser': False, 'tie_embeddings': False, 'mem_read_from': 'same',
        }  # fmt: skip
        for name, value in published.items():
            if arguments.get(name) not in (None, value):
                raise ValueError(f'{name} is {arguments[name]!r}, but that package has {value}: leave it out')
        if arguments.get('memory_rule') is None and arguments.get('use_mem_delta_rule') is None:
            published['use_mem_delta_rule'] = False
        weights = translated(state_dict)
        model = cls(**{**arguments_of(state_dict), **arguments, **published})
        try:
            model.to(weights['token_emb.weight'].dtype).load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f'the checkpoint does not fit the arguments {arguments}: {error}') from error
        return model

    def advance(
        self,
        tokens: Tensor,
        state: tuple[Memories, ...] | None = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
        write_scale: Tensor | None = None,
        cuts: tuple[int, ...] = (),
    ) -> tuple[Any, tuple[Memories, ...]]:
        """Reads any number of segments, or one segment with mem_read_from='above'. See `SegmentModel.advance`.

        Args:
            tokens: token ids (b, n) or embeddings (b, n, dim).
            state: the state at the border before the tokens. Default: None, the initial state.
            segment_length: number of tokens of a segment; the last segment may be shorter. Default: None, all tokens
                are one segment.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            need_hidden: whether hidden states are needed. Default: True.
            write_scale: how many times each segment is written to the memories, (b, segments), finite and not negative.
                In training, one segment that is read once can thus stand for many ("virtual length"). Default: None,
                once.
            cuts: numbers of the segments whose entering memories get no gradient, inside
                `distributed.context_parallel`. See `memory.affine_scan`. Default: none.

        Returns:
            The hidden states (b, n, dim), or None if need_hidden is False, and the state at the border after the
            tokens.

        Raises:
            ValueError: if there are several segments with mem_read_from='above', or if write_scale has a wrong shape or
                does not work with the memory rule or the decay of the model.
        """
        length = min(segment_length or tokens.shape[1], tokens.shape[1])
        if not self.parallel_segments and tokens.shape[1] > length:
            raise ValueError("mem_read_from='above' reads one segment at a time")
        if write_scale is not None and (self.memory_rule == 'deltanet' or self.memory_decay):
            raise ValueError("write_scale needs memory_rule 'linear' or 'delta', and memory_decay=False")
        if write_scale is not None:
            shape = tokens.shape[0], -(-tokens.shape[1] // max(1, length))
            if write_scale.shape != shape:
                raise ValueError(f'write_scale has shape {tuple(write_scale.shape)}: give (batch, segments) = {shape}')
        state = self.initial_state(tokens.shape[0]) if state is None else state
        if not tokens.shape[1]:
            return (self.token_emb.weight.new_zeros(tokens.shape[0], 0, self.dim) if need_hidden else None), copied(
                state
            )
        ranks = None if self.chain is None else {'chain': self.chain, 'cuts': cuts}
        # A GPU is fastest with all segments at once, a CPU with so few that their activations stay in its cache. With a
        # chain of ranks, a part of the segments would have to wait for the rank before, which has to end first. A
        # single segment needs no arithmetic with sizes, which `torch.export` could not keep dynamic
        if tokens.shape[1] == length or tokens.device.type != 'cpu' or self.chain is not None:
            scale = None if write_scale is None else write_scale.mT
            return self._read(tokens, state, length, mask, need_hidden=need_hidden, scale=scale, ranks=ranks)[:2]
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
        ranks: dict[str, Any] | None = None,
        closes: bool = True,
    ) -> tuple[Any, tuple[Memories, ...], list[Writes]]:
        """Runs the layers over tokens (b, n), in segments of `length` tokens.

        Returns:
            The hidden states (b, n, dim), or None if need_hidden is False, the memories after the last segment, or
            those before it if it stays open (closes=False), and what the tokens write in each layer.
        """
        batch, n = tokens.shape[:2]
        segments = -(-n // length)
        missing = segments * length - n
        key_mask = mask
        if missing:
            # the last segment is padded at its end. The padding is not written, and no token before it can see it
            tokens = nn.functional.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing))
            valid = tokens.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
            key_mask = nn.functional.pad(valid, (0, missing))
        tokens = rearrange(tokens, 'b (s n) ... -> s b n ...', s=segments)
        x = self.embed(tokens)
        attn_mask = None
        if key_mask is not None:
            key_mask = rearrange(key_mask, 'b (s n) -> s b n', s=segments)
            if mask is not None:
                attn_mask = causal_mask(key_mask.flatten(0, 1))
        rotations = self.rotations(length if cached is None else length + cached[0].kv.shape[3], x)
        # both values of need_hidden must draw the same random numbers: if any are drawn, nothing is skipped
        skip = not need_hidden and not self.draws_random
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
                ranks=ranks,
                closes=closes,
            )
            x = block(x, Surroundings(segments_of_layer.attend, need_output=index < last or not skip))
            after.append(segments_of_layer.after)
            written.append(segments_of_layer.writes)
        hidden = None
        if need_hidden:
            hidden = self.norm(rearrange(x, 's b n d -> b (s n) d')[:, :n])
        return hidden, tuple(after), written

    def rotations(self, length: int, like: Tensor) -> Tensor:
        """Returns the rotations of the positions of a segment, which count from its start, (length, dim_head / 2, 2).

        Args:
            length: number of tokens of the segment. The rotation of a position must not depend on it: a shorter
                segment is read together with longer ones.
            like: a tensor with the device and dtype of the model.
        """
        return rotations_between(0, length, self.dim_head, theta=self.rotary_theta, like=like)

    def open_segment(self, state: tuple[Memories, ...], segment_length: int) -> InfiniCache:
        """See `SegmentModel.open_segment`."""
        return InfiniCache(self, state, segment_length)

    def layer_recalled(self, index: int) -> int:
        """See `GatedMemories.layer_recalled`. With mem_read_from='above' it is the next layer."""
        return min(index + 1, len(self.layers) - 1) if self.mem_read_from == 'above' else index

    def per_segment_faults(self, values: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See `SegmentModel.per_segment_faults`. A write_scale must be a number that is not negative."""
        for name, value in values.items():
            if value.dtype == torch.bool or value.is_complex():
                raise ValueError(f'{name} is {value.dtype}: give numbers, of an integer or floating point type')
        negative = [(f'{name} holds negative numbers', (value < 0).any()) for name, value in values.items()]
        return super().per_segment_faults(values) + negative

    def _cache_faults(self, cached_kv: list[CachedKV], x: Tensor, mask: Tensor | None) -> list[tuple[str, Tensor]]:
        """Returns the checks of the values of a cache, as `state_faults` does for a state. Raises ValueError if it does
        not fit the model and the batch."""
        if mask is not None:
            raise ValueError(f'mask with cached_kv: {VALID_ONLY}')
        if not isinstance(cached_kv, (list, tuple)):
            raise ValueError(f'cached_kv is a {type(cached_kv).__name__}: give the list that a call returned')
        if len(cached_kv) != len(self.layers):
            raise ValueError(f'cached_kv has {len(cached_kv)} entries: give one a layer, {len(self.layers)}')
        faults = []
        for layer, cached in enumerate(cached_kv):
            if not isinstance(cached, CachedKV):
                raise ValueError(f'cached_kv of layer {layer} is a {type(cached).__name__}: give what a call returned')
            if not isinstance(cached.kv, Tensor) or cached.kv.ndim != 5 or not cached.kv.is_floating_point():
                found = cached.kv.dtype if isinstance(cached.kv, Tensor) else type(cached.kv).__name__
                raise ValueError(f'cached_kv of layer {layer}: kv is {found}: give what a call returned')
            if cached.mask is not None:
                faults.append((f'cached_kv comes from a call with padded rows: {VALID_ONLY}', ~cached.mask.all()))
        n = cached_kv[0].kv.shape[3]
        nothing = torch.empty(x.shape[0], 0, self.dim, dtype=self.dtype, device=self.device)
        for layer, (cached, block) in enumerate(zip(cached_kv, self.layers, strict=True)):
            kv = torch.empty((), dtype=cached.kv.dtype, device=self.device)
            kv = kv.expand(2, x.shape[0], self.kv_heads, n, self.dim_head)
            with torch.no_grad():  # what this layer computes for no token, to compare shapes and dtypes
                strength, log_decay = (
                    None if part is None else part.new_zeros(()).expand(*part.shape[:-1], n)
                    for part in block.attn.strength_and_decay(nothing)
                )
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
        return faults
