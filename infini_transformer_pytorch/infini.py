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

from infini_transformer_pytorch.attention import DECAY_BIAS, NORM_EPS, Block, CachedKV, empty_memories
from infini_transformer_pytorch.decoding import InfiniCache
from infini_transformer_pytorch.memory import Memories, Writes
from segment_recurrence_pytorch.checks import check_input, check_like, check_positive, check_probability
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import detach

CPU_ROWS = 2048  # tokens times rows that a CPU evaluates at once, in benchmarks/infini_training.py
GATE_LR = 30.0  # times the learning rate: 0.01 against 3e-4 in the Hugging Face replication


class TransformerReturn(NamedTuple):
    """What `InfiniTransformer.forward` returns."""

    logits: Tensor
    cached_kvs: list[CachedKV] | None
    past_memories: Any


class InfiniTransformer(SegmentModel):
    """A causal transformer with a compressive memory in every layer: `kv_heads` matrices (dim_head, dim_head) a layer.

    memory_rule: 'linear' (eq 4), 'delta' (eq 5; use_mem_delta_rule=True means it) or 'deltanet' (token after token,
        no normaliser, learned strength always), see `memory`. learned_delta_update: learned strength for each token.
    memory_decay: a learned decay in (0, 1) for each token. strength_in_normaliser=False: as in published checkpoints.
    head_gate_init_value: sigmoid(gate) is the share of the local attention; 0 is where the memory learns.
    kv_heads: key/value heads and memories (default `heads`). qk_norm: RMS norm on queries and keys.
    mem_transform: None, 'talking_heads' or 'kv_proj', on what is read (`FastweightMemory`).
    mem_read_from: 'same' layer's memory, or that of the layer 'above' (the last layer: its own), which selects the
        segment loop: layer l of a segment then needs layer l + 1 of the segment before, so segments cannot be parallel.
    """

    causal = True
    max_segment_length = None
    layers: Any  # nn.ModuleList of Block

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
        qk_norm: bool = False,
        tie_embeddings: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        super().__init__()
        self.arguments = arguments
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(num_tokens=num_tokens, dim=dim, depth=depth, dim_head=dim_head, heads=heads, kv_heads=kv_heads)
        check_positive(ff_mult=ff_mult)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if heads % kv_heads:
            raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
        if dim_head % 2:
            raise ValueError(f'rotary positions turn pairs of features: dim_head={dim_head} must be even')
        if use_mem_delta_rule and memory_rule not in (None, 'delta'):
            raise ValueError(
                f"use_mem_delta_rule=True means memory_rule='delta', not {memory_rule!r}: give one of them"
            )
        rule = memory_rule or ('delta' if use_mem_delta_rule else 'linear')

        self.num_tokens, self.dim, self.kv_heads, self.dim_head = num_tokens, dim, kv_heads, dim_head
        self.memory_rule, self.mem_read_from, self.memory_decay = rule, mem_read_from, memory_decay
        self.parallel_segments = mem_read_from == 'same'
        self.has_dropout = attn_dropout > 0 or ff_dropout > 0
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            Block(
                dim,
                ff_mult=ff_mult,
                ff_dropout=ff_dropout,
                heads=heads,
                kv_heads=kv_heads,
                dim_head=dim_head,
                dropout=attn_dropout,
                qk_norm=qk_norm,
                learned_strength=learned_delta_update or rule == 'deltanet',
                memory_decay=memory_decay,
                memory_rule=rule,
                strength_in_normaliser=strength_in_normaliser,
                head_gate_init_value=head_gate_init_value,
                mem_transform=mem_transform,
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)
        if tie_embeddings:
            self.logits.weight = self.token_emb.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings and logits: normal, std 0.02. Linear layers: normal, std fan_in ** -0.5, but 0 where they write
        to the residual stream, so that a block starts as the identity. Biases 0, decay biases `DECAY_BIAS`. Gates,
        gains and memory transforms keep the start that their constructors give them."""
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
        """Optimizer groups as in `SegmentModel`, and the gates: `GATE_LR` times the learning rate, no decay."""
        gates = [parameter for name, parameter in self.named_parameters() if name.endswith('.head_gates')]
        known = {id(gate) for gate in gates}
        groups = super().param_groups(lr, weight_decay)
        for group in groups:
            group['params'] = [parameter for parameter in group['params'] if id(parameter) not in known]
        return [*groups, {'params': gates, 'lr': lr * GATE_LR, 'weight_decay': 0.0}]

    @torch.no_grad()
    def memory_shares(self) -> Tensor:
        """(depth, heads): the share 1 - sigmoid(gate) that the memory has in each head's output."""
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
        """Reads x (b, n), ids or embeddings (b, n, dim), as one segment, or as its next part.

        past_memories: one `Memories` a layer. mask (b, n): True = valid.
        cached_kv: what the last call returned: x goes on in the same segment (all of x is new).
        return_new_memories=False: returns the cache, and past_memories as they came: the segment is still open.
        return_new_memories=True: closes the segment: no cache, and memories that hold all of it.
        detach_memories: what is returned beside the logits carries no graph.
        """
        x, state, mask = check_input(self, x, past_memories, mask=mask)
        if cached_kv is not None:
            self._check_cache(cached_kv, x, mask)
        state = self.initial_state(x.shape[0]) if state is None else state
        hidden, after, writes = self._read(x, state, x.shape[1], mask, cached=cached_kv)
        logits = self.to_logits(hidden)
        if return_new_memories:
            return TransformerReturn(logits, None, detach(after) if detach_memories else after)
        cache = [CachedKV.of_last_segment(layer) for layer in writes]
        return TransformerReturn(logits, detach(cache) if detach_memories else cache, past_memories)

    @classmethod
    def from_peer_state_dict(cls, state_dict: dict[str, Tensor], **arguments: Any) -> InfiniTransformer:
        """The model of a checkpoint of infini-transformer-pytorch 0.2.1, with its weights, in their dtype.

        What the shapes tell need not be given (num_tokens, dim, depth, heads, dim_head, ff_mult, learned_delta_update);
        use_mem_delta_rule leaves no trace in a checkpoint: give it. ValueError for what does not fit.
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
        """Empty memories, one a layer."""
        like = torch.empty(batch_size, self.kv_heads, 0, self.dim_head, dtype=self.dtype, device=self.device)
        return tuple(empty_memories(like) for _ in self.layers)

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

        write_scale (b, segments): what a segment writes counts so often: virtual length, for training.
        """
        length = min(segment_length or tokens.shape[1], tokens.shape[1])
        if not self.parallel_segments and tokens.shape[1] > length:
            raise ValueError("mem_read_from='above' reads one segment at a time")
        if write_scale is not None and (self.memory_rule == 'deltanet' or self.memory_decay):
            raise ValueError("write_scale needs memory_rule 'linear' or 'delta', and memory_decay=False")
        state = self.initial_state(tokens.shape[0]) if state is None else state
        # all at once fills a GPU; a CPU is full with fewer segments, whose activations stay in its cache
        at_once = max(1, tokens.shape[1])
        if tokens.device.type == 'cpu':
            at_once = max(1, CPU_ROWS // max(1, tokens.shape[0] * length)) * max(1, length)
        hiddens = [torch.zeros(tokens.shape[0], 0, self.dim, dtype=self.dtype, device=tokens.device)]
        for start in range(0, tokens.shape[1], at_once):
            part = slice(start, start + at_once)
            part_mask = None if mask is None else mask[:, part]
            scale = None if write_scale is None else write_scale[:, start // length : -(-part.stop // length)].mT
            hidden, state, _ = self._read(
                tokens[:, part], state, length, part_mask, need_hidden=need_hidden, scale=scale
            )
            hiddens.append(hidden)
        if not need_hidden:
            return None, state
        return (torch.cat(hiddens[1:], dim=1) if hiddens[1:] else hiddens[0]), state

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
        """Hidden states (b, n, dim), the memories after the last segment, and what each layer wrote."""
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
        # with dropout, a pass with and one without hidden states must draw the same random numbers
        skip = not need_hidden and not (self.training and self.has_dropout)
        last = len(self.layers) - 1
        after, written = [], []
        for index, (block, past) in enumerate(zip(self.layers, state, strict=True)):
            x, memories, writes = block(
                x,
                past,
                mask=key_mask,
                attn_mask=attn_mask,
                backend=self.backend,
                need_output=index < last or not skip,
                read_from=state[self.layer_read(index)] if self.mem_read_from == 'above' else None,
                cached=None if cached is None else cached[index],
                write_scale=scale,
            )
            after.append(memories)
            written.append(writes)
        hidden = None
        if need_hidden:
            hidden = self.norm(rearrange(x, 's b n d -> b (s n) d')[:, :n])
        return hidden, tuple(after), written

    def to_logits(self, hidden: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, num_tokens)."""
        return self.logits(hidden)

    @torch.no_grad()
    def open_segment(self, state: tuple[Memories, ...], segment_length: int) -> InfiniCache:
        """See `SegmentModel.open_segment`."""
        return InfiniCache(self, state, segment_length)

    def layer_read(self, index: int) -> int:
        """The layer whose memories layer `index` reads."""
        return min(index + 1, len(self.layers) - 1) if self.mem_read_from == 'above' else index

    def as_state(self, state: Any, batch_size: int) -> Any:
        """See `SegmentModel.as_state`: lists and plain pairs are memories too."""
        if not isinstance(state, (tuple, list)):
            return state
        pairs = (isinstance(layer, (tuple, list)) and len(layer) == 2 for layer in state)
        return tuple(Memories(*layer) if pair else layer for layer, pair in zip(state, pairs, strict=True))

    def check_state(self, state: Any, batch_size: int) -> None:
        """Raises ValueError if `state` is not one `Memories` a layer, of this model and batch size."""
        expected = self.initial_state(batch_size)
        if not isinstance(state, (tuple, list)) or len(state) != len(expected):
            found = f'{len(state)} entries' if isinstance(state, (tuple, list)) else f'a {type(state).__name__}'
            raise ValueError(f'the memories are {found}: give one Memories a layer, {len(expected)}')
        for layer, (have, want) in enumerate(zip(state, expected, strict=True)):
            if not isinstance(have, tuple) or len(have) != 2:
                raise ValueError(f'the memories of layer {layer} are a {type(have).__name__}: give Memories')
            check_like(f'kv_mem of layer {layer}', have[0], want.kv_mem)
            check_like(f'k_norm of layer {layer}', have[1], want.k_norm)

    def _check_cache(self, cached_kv: list[CachedKV], x: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError('mask with cached_kv: a cache holds valid tokens only; read padded rows in one call')
        if len(cached_kv) != len(self.layers):
            raise ValueError(f'cached_kv has {len(cached_kv)} entries: give one a layer, {len(self.layers)}')
        shape = (2, x.shape[0], self.kv_heads, cached_kv[0].kv.shape[3], self.dim_head)
        for cached in cached_kv:
            check_like('cached_kv', cached.kv, cached.kv.new_empty(()).expand(shape))
