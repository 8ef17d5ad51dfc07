"""Four extras of recurrent-memory-transformer-pytorch 0.7.0, built on our model: does any of them pay?

Each function changes a model that was just made. Only the experiment `extras` uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, attention
from recurrent_memory_transformer_pytorch.attention import Attention, Block

GRADIENT_SHARE, STREAMS = 0.1, 4  # as the package has them


def mix_first_values(model: RecurrentMemoryTransformer) -> None:
    """Value residual (arXiv 2410.17897): a learned share of the first layer's values in those of every other."""
    shared: dict[str, Tensor] = {}
    for index, block in enumerate(model.layers):
        block.attn.__class__ = _ValueResidual
        block.attn.shared = shared
        if index:
            block.attn.to_share = nn.Linear(model.dim, model.kv_heads)


def add_null_key(model: RecurrentMemoryTransformer) -> None:
    """A learned key and value a head, which every row sees."""
    for block in model.layers:
        block.attn.__class__ = _NullKey
        block.attn.null = nn.Parameter(torch.randn(2, 1, model.kv_heads, 1, model.dim_head))


def scale_embedding_gradient(model: RecurrentMemoryTransformer) -> None:
    """The embeddings get a share of their gradient (arXiv 2105.13290). Under AdamW little but the clipping changes."""
    for embedding in (model.token_emb, model.pos_emb):
        if embedding is not None:
            embedding.weight.register_hook(lambda gradient: gradient * GRADIENT_SHARE)


def add_streams(model: RecurrentMemoryTransformer) -> None:
    """Hyper-connections (arXiv 2409.19606) over four residual streams."""
    from hyper_connections import get_init_and_expand_reduce_stream_functions

    connect, expand, reduce = get_init_and_expand_reduce_stream_functions(STREAMS)
    last = len(model.layers) - 1
    for index, block in enumerate(model.layers):
        block.__class__ = _StreamsBlock
        block.over_attn = connect(dim=model.dim, layer_index=2 * index)  # without it, Python's own random numbers
        block.over_ff = connect(dim=model.dim, layer_index=2 * index + 1)
        block.enter = expand if index == 0 else nn.Identity()
        block.leave = reduce if index == last else nn.Identity()


EXTRAS: dict[str, Callable[[RecurrentMemoryTransformer], None]] = {
    'value residual': mix_first_values,
    'null key': add_null_key,
    'embedding gradient 0.1': scale_embedding_gradient,
    '4 streams': add_streams,
}


class _ValueResidual(Attention):
    shared: dict[str, Tensor]
    to_share: Any

    def project(self, x: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, first_row)
        if not hasattr(self, 'to_share'):
            self.shared['v'] = v
            return q, k, v
        share = self.to_share(x).sigmoid().transpose(1, 2)[..., None]
        return q, k, torch.lerp(v, self.shared['v'], share)


class _NullKey(Attention):
    null: Tensor

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        def attend_with_null(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
            null_k, null_v = self.null.expand(-1, len(k), -1, -1, -1)
            # causal calls are aligned at their end, so every row sees the key in front
            mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
            return plain(q, torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2), mask=mask, **more)

        plain = attention.attend
        with patch.object(attention, 'attend', attend_with_null):
            return super().forward(*arguments, **options)


class _StreamsBlock(Block):
    over_attn: Any
    over_ff: Any
    enter: Any
    leave: Any

    def forward(self, x: Tensor, layout: Any, *, first_row: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, add = self.over_attn(self.enter(x))
        out, keys, values = self.attn(self.attn_norm(x), layout, **options)
        x, add_again = self.over_ff(add(out))
        x = add_again(self.ff(self.ff_norm(x)))
        return self.leave(x)[:, first_row:], keys, values
