"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062).

A segment is read as [read memory | text | write memory]; what the last layer writes at the end is read
at the start of the next segment. The state is that memory (b, m, dim), and optionally the detached keys
and values of the last text positions (XL, arXiv 1901.02860) and the memories before it (`axial`).

    model = RecurrentMemoryTransformer(num_tokens=256, num_memory_tokens=16, dim=256, depth=4, seq_len=128)
    logits, memory = model(x)            # x (b, n <= 128)
    logits, memory = model(x, memory)

Letters: b batch, n text positions, m memory tokens, l XL positions, g key/value heads, d features of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from beartype import beartype
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch.attention import Block, Layout, attention_mask, layout_turns
from recurrent_memory_transformer_pytorch.axial import AxialAttention
from recurrent_memory_transformer_pytorch.decoding import RMTCache
from recurrent_memory_transformer_pytorch.state import PastMemories, RMTState, XLMemory
from segment_recurrence_pytorch.checks import check_input, check_like, check_positive, check_probability
from segment_recurrence_pytorch.layers import NORM_EPS
from segment_recurrence_pytorch.loss import IGNORE, mean_loss, target_nll, valid_targets
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import where_rows


class RecurrentMemoryTransformer(SegmentModel):
    """A transformer with `num_memory_tokens` memory tokens (b, m, dim) carried between segments of at most `seq_len`.

    num_memory_tokens=0: the plain segment transformer. causal=False: an encoder, every row sees every row.
    kv_heads: key/value heads (default `heads`; fewer: grouped queries, arXiv 2305.13245).
    qk_norm: RMS norm with learned gain on queries and keys. tie_embeddings: logits from the token embedding.
    abs_pos_emb: learned position inside the segment, for text. rotary_pos_emb: memory at 0, text at 10000 + i,
        XL keys at 10000 + j - l; angles in float32 whatever the model's dtype.
    use_xl_memories, xl_mem_len: attend to the last xl_mem_len (default seq_len, may be more) earlier text positions.
    enhanced_xl_recurrence: layer i attends to what layer i + 1 kept (arXiv 2012.15688); the last one to its own.
    memory_mask: 'block' (default), 'causal' or 'mixed', see `attention`. memory_not_causal=True / False is the
        published name for 'block' / 'causal'.
    write_init: what enters the write rows: 'learned' tokens, the 'previous' memory (as the paper has it), or
        their 'sum' (default: of the three it keeps the gradient through many segments, see README).
    axial_mem_len: each memory slot attends to its last axial_mem_len values before it is read, see `axial`; 0: off.
    memory_noise: while training, Gaussian noise of this size is added to the memory of every state that is given.
    use_flash_attn: the fastest backend that computes the same thing here (`attention_backend` tells which).
    ignore_index: labels with this value, and with -100, are not counted.
    """

    parallel_segments = False
    layers: Any  # nn.ModuleList of Block

    @beartype
    def __init__(
        self,
        dim: int,
        *,
        num_tokens: int,
        depth: int,
        num_memory_tokens: int,
        seq_len: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        ff_mult: int | float = 4,
        attn_dropout: int | float = 0.0,
        ff_dropout: int | float = 0.0,
        use_flash_attn: bool = False,
        ignore_index: int = -1,
        abs_pos_emb: bool = True,
        rotary_pos_emb: bool = False,
        use_xl_memories: bool = False,
        xl_mem_len: int | None = None,
        enhanced_xl_recurrence: bool = False,
        memory_mask: Literal['causal', 'block', 'mixed'] | None = None,
        memory_not_causal: bool | None = None,
        write_init: Literal['learned', 'previous', 'sum'] = 'sum',
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        axial_mem_len: int = 0,
        memory_noise: int | float = 0.0,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        super().__init__()
        self.arguments = arguments
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(dim=dim, num_tokens=num_tokens, depth=depth, seq_len=seq_len, dim_head=dim_head, heads=heads)
        check_positive(kv_heads=kv_heads, ff_mult=ff_mult)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if num_memory_tokens < 0:
            raise ValueError(f'num_memory_tokens is {num_memory_tokens}: give 0 (no memory) or more')
        if axial_mem_len < 0 or (axial_mem_len and not num_memory_tokens):
            raise ValueError(
                f'axial_mem_len is {axial_mem_len}, num_memory_tokens {num_memory_tokens}: give 0 (off), or 1 and more '
                'with memory tokens'
            )
        if memory_noise < 0:
            raise ValueError(f'memory_noise is {memory_noise}: give 0 (none) or more')
        if heads % kv_heads:
            raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
        if rotary_pos_emb and dim_head % 2:
            raise ValueError(f'rotary_pos_emb turns pairs of features: dim_head={dim_head} must be even')
        if xl_mem_len is not None and xl_mem_len < 0:
            raise ValueError(f'xl_mem_len is {xl_mem_len}: give 0 (off) or more')
        if not use_xl_memories and xl_mem_len:
            raise ValueError(f'xl_mem_len={xl_mem_len} needs use_xl_memories=True')
        if enhanced_xl_recurrence and (not use_xl_memories or xl_mem_len == 0):
            raise ValueError('enhanced_xl_recurrence needs use_xl_memories=True and xl_mem_len above 0')
        if memory_mask is not None and memory_not_causal is not None:
            raise ValueError('memory_mask and memory_not_causal say the same thing: give only memory_mask')
        if memory_mask is None:
            memory_mask = 'causal' if memory_not_causal is False else 'block'
        if not causal and memory_mask != 'block':
            raise ValueError(f'memory_mask={memory_mask!r} needs causal=True: in an encoder every row sees every row')

        self.dim, self.num_tokens, self.causal, self.ignore_index = dim, num_tokens, causal, ignore_index
        self.seq_len = self.max_segment_length = seq_len
        self.num_memory_tokens, self.write_init = num_memory_tokens, write_init
        self.memory_mask, self.dim_head, self.kv_heads = memory_mask, dim_head, kv_heads
        self.memory_noise, self.axial_mem_len = memory_noise, axial_mem_len
        self.rotary_pos_emb, self.enhanced_xl_recurrence = rotary_pos_emb, enhanced_xl_recurrence
        self.xl_mem_len = (seq_len if xl_mem_len is None else xl_mem_len) if use_xl_memories else 0
        self.backend = 'auto' if use_flash_attn else 'sdpa'
        self.has_dropout = attn_dropout > 0 or ff_dropout > 0

        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(seq_len, dim) if abs_pos_emb else None
        if num_memory_tokens:
            self.initial_memory = nn.Parameter(torch.empty(num_memory_tokens, dim))
            self.read_memory_emb = nn.Parameter(torch.empty(num_memory_tokens, dim))
            if write_init != 'previous':
                self.memory_tokens = nn.Parameter(torch.empty(num_memory_tokens, dim))
        of_attention = dict(heads=heads, kv_heads=kv_heads, dim_head=dim_head, dropout=attn_dropout, qk_norm=qk_norm)
        self.layers = nn.ModuleList(
            Block(dim, ff_mult=ff_mult, ff_dropout=ff_dropout, **of_attention) for _ in range(depth)
        )
        self.axial = None
        if axial_mem_len:
            self.axial = AxialAttention(dim, heads=heads, dim_head=dim_head, length=axial_mem_len)
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)
        if tie_embeddings:
            self.logits.weight = self.token_emb.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings, memory tokens (distinct rows: equal ones would stay equal) and logits: normal, std 0.02.
        Linear layers: normal, std fan_in ** -0.5, but 0 where they write to the residual stream: a block starts as the
        identity, so that the small embeddings are not drowned. Biases 0, norm gains 1."""
        for name, parameter in self.named_parameters():
            if name.endswith('norm.weight'):
                nn.init.ones_(parameter)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)
            elif name.startswith(('layers.', 'axial.to_')):
                writes = name.endswith(('to_out.weight', 'proj_out.weight'))
                nn.init.normal_(parameter, std=0.0 if writes else parameter.shape[1] ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        x: Tensor,
        read_memories: Any = None,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        mask_out_read_memories: bool = False,
        return_embeddings: bool = False,
    ) -> tuple[Tensor, Any]:
        """Reads one segment.

        x: ids (b, n) or embeddings (b, n, dim), n <= seq_len. mask: (b, n) bool, True = valid.
        read_memories: what the last call returned; None at the start of a text. A tensor may be (m, dim).
        labels: (b, n), aligned: labels[:, i] is the target of logits[:, i].
        mask_out_read_memories: as if there were no memory yet, whatever is given.
        Returns (logits (b, n, num_tokens), or embeddings (b, n, dim), or the mean loss if labels are given; memories).
        The memories are a tensor (b, m, dim), with XL or past memories an `RMTState`. ValueError for what does not fit.
        """
        if labels is not None and return_embeddings:
            raise ValueError('labels give a loss, return_embeddings=True embeddings: ask for one of them')
        x, state, mask = check_input(
            self, x, read_memories, mask=mask, labels=labels, ignore_index=self.ignore_index, max_length=self.seq_len
        )
        if mask_out_read_memories:
            state = None
        hidden, state = self.advance(x, state, mask=mask)
        memories = self.as_memories(state)
        if return_embeddings:
            return hidden, memories
        logits = self.to_logits(hidden)
        if labels is None:
            return logits, memories
        targets = valid_targets(labels, self.ignore_index, mask)
        return mean_loss(target_nll(logits, targets).sum(), (targets != IGNORE).sum()), memories

    def initial_state(self, batch_size: int) -> RMTState:
        """The learned first memory, no XL memories, no past ones."""
        if self.num_memory_tokens:
            memory = self.initial_memory.expand(batch_size, -1, -1)
        else:
            memory = self.token_emb.weight.new_zeros(batch_size, 0, self.dim)
        xl = past = None
        if self.xl_mem_len:
            empty = memory.new_zeros(batch_size, len(self.layers), self.kv_heads, 0, self.dim_head)
            xl = XLMemory(empty, empty, None)
        if self.axial_mem_len:
            memories = memory.new_zeros(batch_size, self.axial_mem_len - 1, *memory.shape[1:])
            past = PastMemories(memories, torch.zeros(batch_size, dtype=torch.long, device=memory.device))
        return RMTState(memory, xl, past)

    def advance(
        self,
        tokens: Tensor,
        state: RMTState | None = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
    ) -> tuple[Any, RMTState]:
        """Reads one segment, see `SegmentModel.advance`."""
        batch, n = tokens.shape[:2]
        m = self.num_memory_tokens
        if segment_length is not None and n > segment_length:
            raise ValueError(f'{n} tokens in segments of {segment_length}: this model advances one segment at a time')
        noise = self.memory_noise if self.training and state is not None else 0.0
        state = self.initial_state(batch) if state is None else state
        if not n:
            return (state.memory.new_zeros(batch, 0, self.dim) if need_hidden else None), state
        read = state._replace(memory=state.memory + noise * torch.randn_like(state.memory)) if noise else state
        x = self.embed(tokens)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:n]
        if m:
            memory = self.memory_read(read)
            x = torch.cat((self.read_rows(memory), x, self.write_rows(memory)), dim=1)

        xl = state.xl
        arm = self.memory_mask if self.causal else 'encoder'
        layout = Layout(0 if xl is None else xl.length, m, n, m, arm)
        turns = layout_turns(layout, self.dim_head, x) if self.rotary_pos_emb else None
        attn_mask = self._attention_mask(layout, xl, mask, x)

        # Nobody reads the last layer's read rows, nor, when only the state is needed, its text rows. With dropout those
        # are computed all the same: a pass with and one without hidden states must draw the same random numbers.
        skip_text = not need_hidden and not (self.training and self.has_dropout)
        last = len(self.layers) - 1
        kept_keys, kept_values = [], []
        for index, (block, layer_xl) in enumerate(zip(self.layers, self.xl_of_layers(xl), strict=True)):
            first_row = 0 if index < last else m + n if skip_text else m
            x, keys, values = block(
                x, layout, first_row=first_row, xl=layer_xl, turns=turns, mask=attn_mask, backend=self.backend
            )
            kept_keys.append(keys)
            kept_values.append(values)
        x = self.norm(x)

        # a copy: a slice would keep the text's hidden states alive as long as the memory
        memory = x[:, x.shape[1] - m :].to(state.memory.dtype, copy=True)
        past = read.past_after()
        if mask is not None:
            memory, past = where_rows(mask.any(dim=1), (memory, past), (state.memory, state.past))
        if xl is not None:
            keys, values = (torch.stack(kept, dim=1).to(xl.keys.dtype) for kept in (kept_keys, kept_values))
            xl = xl.append(keys, values, mask, self.xl_mem_len)
        return (x[:, :n] if need_hidden else None), RMTState(memory, xl, past)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, num_tokens)."""
        return self.logits(hidden)

    @torch.no_grad()
    def open_segment(self, state: RMTState, segment_length: int) -> RMTCache:
        """See `SegmentModel.open_segment`."""
        return RMTCache(self, state, segment_length)

    def where(self, rows: Tensor, chosen: RMTState, other: RMTState) -> RMTState:
        """See `SegmentModel.where`. From then on the rows differ in the number of their XL memories."""
        if chosen.xl is not None and other.xl is not None:
            chosen, other = (state._replace(xl=state.xl.counted()) for state in (chosen, other) if state.xl is not None)
        return where_rows(rows, chosen, other)

    def check_state(self, state: Any, batch_size: int) -> None:
        """Raises ValueError if `state` does not fit this model and batch size."""
        if not isinstance(state, RMTState):
            raise ValueError(f'the state is a {type(state).__name__}: give what the last call returned')
        expected = self.initial_state(batch_size)
        check_like('memories', state.memory, expected.memory)
        if (state.xl is None) != (expected.xl is None):
            raise ValueError('either the state or the model has no XL memories (use_xl_memories): start from None')
        if state.xl is not None and expected.xl is not None:
            XLMemory.check(state.xl, expected.xl, self.xl_mem_len)
        if (state.past is None) != (expected.past is None):
            raise ValueError('either the state or the model has no past memories (axial_mem_len): start from None')
        if state.past is not None and expected.past is not None:
            PastMemories.check(state.past, expected.past)

    def as_state(self, memories: Any, batch_size: int) -> Any:
        """See `SegmentModel.as_state`: a tensor (b, m, dim) or (m, dim) is a memory, without a past."""
        if not isinstance(memories, Tensor):
            return memories
        if memories.ndim == 2:
            memories = memories.expand(batch_size, -1, -1)
        return self.initial_state(batch_size)._replace(memory=memories)

    def as_memories(self, state: RMTState) -> Any:
        """What `forward` returns of a state: the tensor (b, m, dim) where that is all of it."""
        return state.memory if state.xl is None and state.past is None else state

    def memory_read(self, state: RMTState) -> Tensor:
        """The memory (b, m, dim) that a segment reads of a state: after axial attention."""
        memory = state.memory.to(self.dtype)
        return memory if self.axial is None else self.axial(memory, state.past)

    def read_rows(self, memory: Tensor) -> Tensor:
        """What enters the read rows (b, m, dim)."""
        return memory + self.read_memory_emb

    def write_rows(self, memory: Tensor) -> Tensor:
        """What enters the write rows (b, m, dim)."""
        if self.write_init == 'previous':
            return memory
        tokens = self.memory_tokens.expand(len(memory), -1, -1)
        return tokens if self.write_init == 'learned' else tokens + memory

    def _attention_mask(self, layout: Layout, xl: XLMemory | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is None and (xl is None or xl.counts is None):
            return None
        text_valid = x.new_ones(x.shape[0], layout.text, dtype=torch.bool) if mask is None else mask
        xl_valid = text_valid[:, :0] if xl is None else xl.valid()
        return attention_mask(layout, xl_valid=xl_valid, text_valid=text_valid)

    def xl_of_layers(self, xl: XLMemory | None) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values (b, g, l, d) that each layer attends to."""
        if xl is None or not xl.length:
            return [None] * len(self.layers)
        pairs: list[tuple[Tensor, Tensor] | None] = list(zip(xl.keys.unbind(1), xl.values.unbind(1), strict=True))
        return pairs[1:] + pairs[-1:] if self.enhanced_xl_recurrence else pairs
