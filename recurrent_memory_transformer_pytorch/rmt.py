"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062).

A segment goes through the layers as the rows [read rows | text | write rows]. The memory goes into the read rows. What
the last layer returns for the write rows is the next memory: it goes into the read rows of the next segment. The state
is this memory (b, m, dim). On request it also holds the keys and values of the last text positions, without a graph
(XL, arXiv 1901.02860), and the memories that entered earlier segments (see `axial`).

    model = RecurrentMemoryTransformer(num_tokens=256, num_memory_tokens=16, dim=256, depth=4, seq_len=128)
    logits, memory = model(x)            # x (b, n <= 128)
    logits, memory = model(x, memory)

A researcher can change one thing by overriding one method, which training and generation share. `memory_to_read`,
`read_rows` and `write_rows` make what goes into the read and write rows, `next_memory` makes the memory that is carried
on, and `make_attention` and `make_block` make the layers.

Letters: b rows of the batch, n text positions, m memory tokens, l XL positions, g key/value heads, d features of a
head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch.attention import (
    Attention,
    Layout,
    Positions,
    SegmentRows,
    Surroundings,
    attention_mask,
)
from recurrent_memory_transformer_pytorch.axial import AxialAttention
from recurrent_memory_transformer_pytorch.decoding import RMTCache
from recurrent_memory_transformer_pytorch.state import PastMemories, RMTState, XLMemory
from segment_recurrence_pytorch.checks import (
    check_input,
    check_like,
    check_not_negative,
    check_positive,
    check_probability,
    typed,
)
from segment_recurrence_pytorch.layers import (
    NORM_EPS,
    POSITION_STD,
    Blocks,
    ResidualBlock,
    SegmentTransformer,
    init_linear,
    may_draw_random,
)
from segment_recurrence_pytorch.loss import IGNORE, hidden_nll, mean_loss, valid_targets
from segment_recurrence_pytorch.state import copied, where_rows


class RecurrentMemoryTransformer(SegmentTransformer):
    """A transformer that carries memory tokens (b, m, dim) from segment to segment.

    Args:
        dim: features of a token and of a memory token.
        num_tokens: size of the vocabulary.
        depth: number of layers.
        num_memory_tokens: number m of memory tokens. With 0 it is a plain transformer that carries nothing, except XL
            memories if they are on.
        seq_len: the longest segment, in tokens.
        causal: whether no position sees a later position. With False it is an encoder, in which every row sees every
            row. Default: True.
        dim_head: features of a head. Default: 64.
        heads: number of query heads. Default: 8.
        kv_heads: number of key/value heads, a divisor of `heads` (grouped queries, arXiv 2305.13245). Default: None,
            `heads`.
        ff_mult: the feed-forward has int(dim * ff_mult * 2 / 3) inner features. Default: 4.
        attn_dropout: probability that an attention weight is dropped during training. Default: 0.
        ff_dropout: probability that an inner feature of the feed-forward is dropped during training. Default: 0.
        use_flash_attn: whether the attention backend is 'auto', which is the fastest one that can compute the call,
            instead of 'sdpa'. The property `attention_backend` tells which one runs. Default: False.
        ignore_index: a label that does not count in the loss, besides -100. Default: -1.
        abs_pos_emb: whether text tokens get a learned embedding of their position in the segment. Default: True.
        rotary_pos_emb: whether queries and keys are rotated by their position. Read and write rows are at position 0,
            the i-th text token is at first_text_position + i, and XL memories are just before the text. The angles are
            computed in float32 at least. Default: False.
        rotary_theta: base of the frequencies of the rotary positions. Default: 32768, as published.
        first_text_position: rotary position of the first text token. Default: 10000, as published, far from the memory.
        use_xl_memories: whether text and write rows also attend to earlier text positions, through which no gradient
            passes. Default: False.
        xl_mem_len: number of these positions, the last ones before the segment. It may be more than a segment; 0 turns
            them off. Default: None, `seq_len`.
        enhanced_xl_recurrence: whether layer i attends to the XL memories of layer i + 1 (arXiv 2012.15688). The last
            layer attends to its own. Default: False.
        memory_mask: who sees whom among the read rows and among the write rows: 'block', 'causal' or 'mixed'. See the
            table in `attention`. Default: None, 'causal' if memory_not_causal is False, else 'block'.
        memory_not_causal: the published name: True means 'block', False means 'causal'. Default: None.
        write_init: what goes into the write rows: 'learned', learned tokens; 'previous', the memory that goes into the
            read rows (as in the paper); 'sum', the sum of both; 'scaled', the sum with dim ** -0.5 times the memory. A
            memory comes from a norm, so it is far larger than embeddings, and what is written can hardly change it;
            scaled, it is as large as they are. Default: 'scaled', which learns text as well as 'learned' does and
            copies lengths of the training as well as 'sum', but not longer ones.
        qk_norm: whether queries and keys go through an RMS norm with a learned gain. Default: False.
        tie_embeddings: whether the logits use the weight of the token embedding. Default: False.
        axial_mem_len: number of its last values to which each memory token attends before the memory goes into the read
            rows. See `axial`. Default: 0, no axial attention.
        memory_noise: standard deviation of Gaussian noise that is added, during training, to the memory of each given
            state. Default: 0.

    Raises:
        ValueError: if a value is outside its range, or if options contradict each other.
    """

    parallel_segments = False
    free_arguments = frozenset({'attn_dropout', 'ff_dropout', 'memory_noise', 'use_flash_attn'})

    @typed
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
        rotary_theta: int | float = 32768.0,
        first_text_position: int = 10000,
        use_xl_memories: bool = False,
        xl_mem_len: int | None = None,
        enhanced_xl_recurrence: bool = False,
        memory_mask: Literal['causal', 'block', 'mixed'] | None = None,
        memory_not_causal: bool | None = None,
        write_init: Literal['scaled', 'learned', 'previous', 'sum'] = 'scaled',
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        axial_mem_len: int = 0,
        memory_noise: int | float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(dim=dim, num_tokens=num_tokens, depth=depth, seq_len=seq_len, dim_head=dim_head, heads=heads)
        check_positive(kv_heads=kv_heads, ff_mult=ff_mult, rotary_theta=rotary_theta)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        check_not_negative(num_memory_tokens=num_memory_tokens, axial_mem_len=axial_mem_len, memory_noise=memory_noise)
        check_not_negative(first_text_position=first_text_position)
        if axial_mem_len and not num_memory_tokens:
            raise ValueError(f'axial_mem_len is {axial_mem_len}, num_memory_tokens 0: there is no memory to attend to')
        if heads % kv_heads:
            raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
        if rotary_pos_emb and dim_head % 2:
            raise ValueError(f'rotary_pos_emb turns pairs of features: dim_head={dim_head} must be even')
        if xl_mem_len is not None:
            check_not_negative(xl_mem_len=xl_mem_len)
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

        self.dim = dim
        self.num_tokens = num_tokens
        self.causal = causal
        self.ignore_index = ignore_index
        self.seq_len = seq_len
        self.max_segment_length = seq_len
        self.num_memory_tokens = num_memory_tokens
        self.write_init = write_init
        self.memory_mask = memory_mask
        self.dim_head = dim_head
        self.kv_heads = kv_heads
        self.memory_noise = memory_noise
        self.axial_mem_len = axial_mem_len
        self.positions = Positions(dim_head, rotary_theta, first_text_position) if rotary_pos_emb else None
        self.enhanced_xl_recurrence = enhanced_xl_recurrence
        self.xl_mem_len = 0
        if use_xl_memories:
            self.xl_mem_len = seq_len if xl_mem_len is None else xl_mem_len
        self.backend = 'auto' if use_flash_attn else 'sdpa'

        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(seq_len, dim) if abs_pos_emb else None
        if num_memory_tokens:
            self.initial_memory = nn.Parameter(torch.empty(num_memory_tokens, dim))
            self.read_memory_emb = nn.Parameter(torch.empty(num_memory_tokens, dim))
            if write_init != 'previous':
                self.memory_tokens = nn.Parameter(torch.empty(num_memory_tokens, dim))
        of_attention = dict(heads=heads, kv_heads=kv_heads, dim_head=dim_head, dropout=attn_dropout, qk_norm=qk_norm)
        self.layers = Blocks(
            self.make_block(
                index, self.make_attention(index, **of_attention), ff_mult=ff_mult, ff_dropout=ff_dropout
            )
            for index in range(depth)
        )  # fmt: skip
        self.axial = None
        if axial_mem_len:
            self.axial = AxialAttention(dim, heads=heads, dim_head=dim_head, length=axial_mem_len)
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)
        if tie_embeddings:
            self.logits.weight = self.token_emb.weight
        self.init_weights()

    def make_attention(self, index: int, **options: Any) -> Attention:
        """Returns the attention of a layer. The constructor calls it. Override it to use another attention.

        Args:
            index: number of the layer, from 0.
            options: heads, kv_heads, dim_head, dropout and qk_norm, see `Attention`.
        """
        return Attention(self.dim, **options)

    def make_block(self, index: int, attention: Attention, **options: Any) -> ResidualBlock:
        """Returns a layer. The constructor calls it. Override it to use another block, which calls its
        attention exactly once.

        Args:
            index: number of the layer, from 0.
            attention: the attention of the layer.
            options: ff_mult and ff_dropout, see `ResidualBlock`.
        """
        return ResidualBlock(self.dim, attention, **options)

    @torch.no_grad()
    def init_weights(self) -> None:
        """See `SegmentTransformer.init_weights`.

        Memory tokens start as token embeddings do; equal ones would stay equal. Axial attention starts as the identity,
        and what it has beside its linear layers as position embeddings do.
        """
        super().init_weights()
        for name, parameter in self.named_parameters():
            if name in ('initial_memory', 'read_memory_emb', 'memory_tokens'):
                nn.init.normal_(parameter, std=self.dim**-0.5)
            elif name in ('axial.positions', 'axial.null_kv'):
                nn.init.normal_(parameter, std=POSITION_STD)
            elif name == 'axial.to_out.weight':
                nn.init.zeros_(parameter)
            elif name.startswith('axial.to_'):
                init_linear(name, parameter, value_features=parameter.shape[0] // 2)

    @property
    def draws_random(self) -> bool:
        """See `SegmentModel.draws_random`."""
        return (self.training and self.memory_noise > 0) or self.blocks_draw_random

    @property
    def blocks_draw_random(self) -> bool:
        """Whether a block may draw random numbers now. See `layers.may_draw_random`."""
        return may_draw_random(self, RecurrentMemoryTransformer)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """See `SegmentModel.decays`. Weight decay applies to the matrices of the blocks and of axial attention."""
        return super().decays(name, parameter) or (parameter.ndim == 2 and name.startswith('axial.'))

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

        Args:
            x: token ids (b, n) or embeddings (b, n, dim), n at most seq_len.
            read_memories: the memories that the last call returned. A tensor may also be (m, dim), the same for all
                rows. Default: None, a text starts.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            labels: target ids (b, n). labels[:, i] is the target of logits[:, i]. Default: None.
            mask_out_read_memories: whether to ignore read_memories and to read the segment as the first one of a text.
                Default: False.
            return_embeddings: whether to return hidden states instead of logits. Default: False.

        Returns:
            Two values. The first one is the logits (b, n, num_tokens); or the hidden states (b, n, dim) if
            return_embeddings is True; or the mean loss () in nats if labels are given. The second one is the memories
            to give to the next call: a tensor (b, m, dim) if this is the whole state, else an `RMTState`.

        Raises:
            ValueError: if an argument does not fit the model or another argument.
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
        if labels is None:
            return self.to_logits(hidden), memories
        targets = valid_targets(labels, self.ignore_index, mask)
        nll = hidden_nll(self.to_logits, hidden, targets, self.num_tokens, draws_random=self.draws_random)
        return mean_loss(nll.sum(), (targets != IGNORE).sum()), memories

    def initial_state(self, batch_size: int) -> RMTState:
        """See `SegmentModel.initial_state`. The state holds the learned first memory, and no XL memories or past
        memories."""
        if self.num_memory_tokens:
            memory = self.initial_memory.expand(batch_size, -1, -1).clone()
        else:
            memory = self.token_emb.weight.new_zeros(batch_size, 0, self.dim)
        xl = past = None
        if self.xl_mem_len:
            shape = batch_size, len(self.layers), self.kv_heads, 0, self.dim_head
            xl = XLMemory(memory.new_zeros(shape), memory.new_zeros(shape), None)
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
        """Reads one segment. See `SegmentModel.advance`."""
        batch, n = tokens.shape[:2]
        m = self.num_memory_tokens
        if segment_length is not None and n > segment_length:
            raise ValueError(f'{n} tokens in segments of {segment_length}: this model advances one segment at a time')
        noise = self.memory_noise if self.training and state is not None else 0.0
        state = self.initial_state(batch) if state is None else state
        if not n:
            return (state.memory.new_zeros(batch, 0, self.dim) if need_hidden else None), copied(state)
        entering = state._replace(memory=state.memory + noise * torch.randn_like(state.memory)) if noise else state

        # the rows [read | text | write]
        x = self.embed(tokens)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:n]
        memory = self.memory_to_read(entering)
        if m:
            x = torch.cat((self.read_rows(memory), x, self.write_rows(memory)), dim=1)

        # what the rows attend to
        xl = state.xl
        layout = Layout(0 if xl is None else xl.length(), m, n, m, self.memory_mask if self.causal else 'encoder')
        rotations = None if self.positions is None else self.positions.all(layout, x)
        attn_mask = self._attention_mask(layout, xl, mask, x)

        # In the last layer, the outputs of the read rows are never used, and those of the text rows are only
        # used as hidden states. If blocks draw random numbers, the text rows are always computed, since both values of
        # need_hidden must draw the same ones.
        skip_text = not need_hidden and not self.blocks_draw_random
        last = len(self.layers) - 1
        kept = []
        for index, (block, layer_xl) in enumerate(zip(self.layers, self.xl_of_layers(xl), strict=True)):
            first_row = 0 if index < last else m + n if skip_text else m
            rows = SegmentRows(layout, xl=layer_xl, rotations=rotations, mask=attn_mask, backend=self.backend)
            x = block(x, Surroundings(rows.attend, first_row))
            kept.append((rows.keys, rows.values))
        x = self.norm(x)

        # a clone, since a slice would keep the hidden states of the text alive as long as the memory
        written = x[:, x.shape[1] - m :].clone()
        after = RMTState(
            self.next_memory(written, memory).to(state.memory.dtype),
            None,
            None if entering.past is None else entering.past.append(entering.memory),
        )
        if mask is not None:
            after = where_rows(mask.any(dim=1), after, state._replace(xl=None))
        if xl is not None:
            keys, values = (torch.stack(parts, dim=1).to(xl.keys.dtype) for parts in zip(*kept, strict=True))
            after = after._replace(xl=xl.append(keys, values, mask, self.xl_mem_len))
        return (x[:, :n] if need_hidden else None), after

    def memory_to_read(self, state: RMTState) -> Tensor:
        """Returns the memory that goes into the read rows, (b, m, dim). Axial attention, if the model has it, is
        applied here.

        Args:
            state: the state that enters the segment.
        """
        memory = state.memory.to(self.dtype)
        if self.axial is None:
            return memory
        return self.axial(memory, state.past, backend='naive' if self.backend == 'naive' else 'sdpa')

    def read_rows(self, memory: Tensor) -> Tensor:
        """Returns what goes into the read rows, (b, m, dim). The default adds a learned embedding to the memory.

        Args:
            memory: what `memory_to_read` returned, (b, m, dim).
        """
        return memory + self.read_memory_emb

    def write_rows(self, memory: Tensor) -> Tensor:
        """Returns what goes into the write rows, (b, m, dim). The default follows the option `write_init`.

        Args:
            memory: what `memory_to_read` returned, (b, m, dim).
        """
        if self.write_init == 'previous':
            return memory
        tokens = self.memory_tokens.expand(memory.shape[0], -1, -1)  # `len` would fix the batch in `torch.export`
        if self.write_init == 'learned':
            return tokens
        return tokens + (memory if self.write_init == 'sum' else self.dim**-0.5 * memory)

    def next_memory(self, written: Tensor, memory: Tensor) -> Tensor:
        """Returns the memory that is carried to the next segment, (b, m, dim): a new tensor, or `written`, which is the
        default, but never `memory` itself.

        Args:
            written: the write rows after the last layer and the final norm, (b, m, dim).
            memory: what `memory_to_read` returned for this segment, (b, m, dim).
        """
        return written

    def open_segment(self, state: RMTState, segment_length: int) -> RMTCache:
        """See `SegmentModel.open_segment`."""
        return RMTCache(self, state, segment_length)

    def where(self, rows: Tensor, chosen: RMTState, other: RMTState) -> RMTState:
        """See `SegmentModel.where`. In the result, each row can have its own number of XL memories."""
        if chosen.xl is not None and other.xl is not None:
            chosen, other = (state._replace(xl=state.xl.counted()) for state in (chosen, other) if state.xl is not None)
        return where_rows(rows, chosen, other)

    def largest_state(self, batch_size: int) -> RMTState:
        """See `SegmentModel.largest_state`. It has xl_mem_len XL memories."""
        state = self.initial_state(batch_size)
        if state.xl is None:
            return state
        shape = batch_size, len(self.layers), self.kv_heads, self.xl_mem_len, self.dim_head
        entries = state.xl.keys.new_empty(()).expand(shape)  # takes no memory
        return state._replace(xl=XLMemory(entries, entries, None))

    def check_state(self, state: Any, batch_size: int) -> None:
        """See `SegmentModel.check_state`. Counts of XL memories may be None, and there must be as many XL keys as
        values."""
        xl = state.xl if isinstance(state, RMTState) else None
        if isinstance(xl, XLMemory):
            if xl.counts is not None:
                check_like('state.xl.counts', xl.counts, torch.empty(batch_size, dtype=torch.long, device=self.device))
            state = state._replace(xl=xl._replace(counts=None))
        super().check_state(state, batch_size)
        if isinstance(xl, XLMemory) and xl.keys.shape != xl.values.shape:
            raise ValueError(f'the state has XL keys {tuple(xl.keys.shape)} and values {tuple(xl.values.shape)}')

    def state_faults(self, state: RMTState) -> list[tuple[str, Tensor]]:
        """See `SegmentModel.state_faults`. It also finds counts that are out of range."""
        faults = super().state_faults(state)
        lengths = {'xl': 0 if state.xl is None else state.xl.length(), 'past': max(0, self.axial_mem_len - 1)}
        for name, part in (('xl', state.xl), ('past', state.past)):
            if part is not None and part.counts is not None:
                wrong = ((part.counts < 0) | (part.counts > lengths[name])).any()
                faults.append((f'state.{name}.counts holds numbers outside 0 to {lengths[name]}', wrong))
        return faults

    def as_state(self, memories: Any, batch_size: int) -> Any:
        """See `SegmentModel.as_state`. A tensor (b, m, dim) or (m, dim) becomes a state with this memory, without XL
        memories or past memories."""
        if not isinstance(memories, Tensor):
            return memories
        if memories.ndim == 2:
            memories = memories.expand(batch_size, -1, -1)
        return self.initial_state(batch_size)._replace(memory=memories)

    def as_memories(self, state: RMTState) -> Any:
        """Returns a state in the form in which `forward` returns it: the memory (b, m, dim) alone if this is the whole
        state."""
        return state.memory if state.xl is None and state.past is None else state

    def xl_of_layers(self, xl: XLMemory | None) -> list[tuple[Tensor, Tensor] | None]:
        """Returns, for each layer, the keys and values (b, g, l, d) of the XL memories to which it attends, or None."""
        if xl is None or not xl.length():
            return [None] * len(self.layers)
        pairs: list[tuple[Tensor, Tensor] | None] = list(zip(xl.keys.unbind(1), xl.values.unbind(1), strict=True))
        return pairs[1:] + pairs[-1:] if self.enhanced_xl_recurrence else pairs

    def _attention_mask(self, layout: Layout, xl: XLMemory | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is None and (xl is None or xl.counts is None):
            return None
        text_valid = x.new_ones(x.shape[0], layout.text, dtype=torch.bool) if mask is None else mask
        xl_valid = text_valid[:, :0] if xl is None else xl.valid()
        return attention_mask(layout, xl_valid=xl_valid, text_valid=text_valid)
