"""Four extras of recurrent-memory-transformer-pytorch 0.7.0 as variants of our model, to find out if any of them helps.

Only the experiment `extras` uses them. Each variant makes its own parameters after those of the model, so the model's
parameters start with the same values as without the extra.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from recurrent_memory_transformer_pytorch.attention import Attention, Surroundings
from segment_recurrence_pytorch.layers import ResidualBlock

GRADIENT_SHARE, STREAMS = 0.1, 4  # as in the published package


class MixedValues(Attention):
    """Attention whose values are a mix of its own values and those of the first layer.

    Attributes:
        first: a dict, the same in every layer, in which the first layer leaves its values.
        to_share: the linear layer that makes the share of the first layer's values, for each token and head. The first
            layer has none.
    """

    first: dict[str, Tensor]
    to_share: nn.Linear

    def project(self, x: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.project`."""
        q, k, v = super().project(x, first_row)
        if not hasattr(self, 'to_share'):
            self.first['v'] = v
            return q, k, v
        share = self.to_share(x).sigmoid().transpose(1, 2)[..., None]
        return q, k, torch.lerp(v, self.first['v'], share)


class ValueResidual(RecurrentMemoryTransformer):
    """Value residual (arXiv 2410.17897): the values of every layer contain a learned share of the first layer's
    values."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        first: dict[str, Tensor] = {}
        for index, block in enumerate(self.layers):
            block.attn.first = first
            if index:
                block.attn.to_share = nn.Linear(self.dim, self.kv_heads)

    def make_attention(self, index: int, **options: Any) -> Attention:
        """See `RecurrentMemoryTransformer.make_attention`."""
        return MixedValues(self.dim, **options)


class NullKeyAttention(Attention):
    """Attention with a learned key and value that every row sees.

    Attributes:
        null: the key and the value, (2, 1, g, 1, d).
    """

    null: Tensor

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, backend: str
    ) -> Tensor:
        """See `Attention.attend`."""
        null_k, null_v = self.null.to(k.dtype).expand(-1, len(k), -1, -1, -1)
        # causal calls align the last query with the last key, so every row sees the key in front
        mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
        return super().attend(q, k, v, causal=causal, mask=mask, backend=backend)


class NullKey(RecurrentMemoryTransformer):
    """A model in which each key/value head has a learned key and value that every row sees."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for block in self.layers:
            block.attn.null = nn.Parameter(torch.randn(2, 1, self.kv_heads, 1, self.dim_head))

    def make_attention(self, index: int, **options: Any) -> Attention:
        """See `RecurrentMemoryTransformer.make_attention`."""
        return NullKeyAttention(self.dim, **options)


class EmbeddingGradient(RecurrentMemoryTransformer):
    """The embeddings get only a share of their gradient (arXiv 2105.13290).

    AdamW is nearly independent of the size of a gradient, so under AdamW it changes little but the clipping.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        for embedding in (self.token_emb, self.pos_emb):
            if embedding is not None:
                embedding.weight.register_hook(lambda gradient: gradient * GRADIENT_SHARE)


class StreamsBlock(ResidualBlock):
    """A block whose residual has several streams.

    Attributes:
        over_attn: mixes the streams around the attention.
        over_ff: mixes the streams around the feed-forward.
        enter: makes the streams out of one, in the first block.
        leave: adds the streams up to one, in the last block.
    """

    over_attn: Any
    over_ff: Any
    enter: Any
    leave: Any

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """See `ResidualBlock.forward`."""
        x, add = self.over_attn(self.enter(x))
        x, add_again = self.over_ff(add(self.attn(self.attn_norm(x), surroundings._replace(first_row=0))))
        x = add_again(self.ff(self.ff_norm(x)))
        return self.leave(x)[:, surroundings.first_row :]


class Streams(RecurrentMemoryTransformer):
    """Hyper-connections (arXiv 2409.19606) with four residual streams."""

    def __init__(self, **options: Any):
        from hyper_connections import get_init_and_expand_reduce_stream_functions

        super().__init__(**options)
        connect, expand, reduce = get_init_and_expand_reduce_stream_functions(STREAMS)
        last = len(self.layers) - 1
        for index, block in enumerate(self.layers):
            block.over_attn = connect(dim=self.dim, layer_index=2 * index)  # else it is drawn from Python's random
            block.over_ff = connect(dim=self.dim, layer_index=2 * index + 1)
            block.enter = expand if index == 0 else nn.Identity()
            block.leave = reduce if index == last else nn.Identity()

    def make_block(self, index: int, attention: Attention, **options: Any) -> ResidualBlock:
        """See `RecurrentMemoryTransformer.make_block`."""
        return StreamsBlock(self.dim, attention, **options)


EXTRAS: dict[str, type[RecurrentMemoryTransformer]] = {
    'value residual': ValueResidual,
    'null key': NullKey,
    'embedding gradient 0.1': EmbeddingGradient,
    '4 streams': Streams,
}
