"""A causal transformer with full attention, of the blocks of this library: what the benchmarks compare with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segment_recurrence_pytorch.layers import NORM_EPS, Blocks, ResidualBlock, rotate, rotations_between
from segment_recurrence_pytorch.loss import hidden_nll


class KVCache:
    """The keys and values of all tokens so far, (depth, b, h, capacity, d) each, of which `length` are filled."""

    def __init__(self, model: FullTransformer, capacity: int, batch: int = 1):
        like = model.token_emb.weight
        shape = len(model.layers), batch, model.heads, capacity, model.dim_head
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.rotations = rotations_between(0, capacity, model.dim_head, theta=10000.0, like=like)
        self.length = 0


class Surroundings(NamedTuple):
    """What the tokens of a layer attend to.

    Attributes:
        rotations: the rotations of the positions of the tokens.
        cache: the keys and values of this layer, (b, h, capacity, d) each. None: the tokens are the whole text.
        start: number of tokens that the cache held before.
        last_only: whether only the output of the last token is needed.
    """

    rotations: Tensor
    cache: tuple[Tensor, Tensor] | None = None
    start: int = 0
    last_only: bool = False


class FullAttention(nn.Module):
    """Causal attention to all tokens before, with rotary positions."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        rotations, cache, start, last_only = surroundings
        q, k, v = rearrange(self.to_qkv(x), 'b n (three h d) -> three b h n d', three=3, h=self.heads)
        q, k = rotate(q, rotations), rotate(k, rotations)
        if cache is not None:
            stop = start + k.shape[2]
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start:stop] = new
            k, v = (kept[:, :, :stop] for kept in cache)
        q = q[:, :, -1:] if last_only else q
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)  # a single query sees all keys
        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))


class FullTransformer(nn.Module):
    """A causal transformer of this library's blocks with full attention."""

    def __init__(self, *, num_tokens: int, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.num_tokens, self.heads, self.dim_head = num_tokens, heads, dim_head
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = Blocks(ResidualBlock(dim, FullAttention(dim, heads, dim_head)) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.logits = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """Returns the hidden states (b, n, dim) of a whole text (b, n).

        Args:
            tokens: token ids (b, n).
            recompute: whether backward computes the activations of each block again. Default: False.
        """
        x = self.token_emb(tokens)
        surroundings = Surroundings(rotations_between(0, tokens.shape[1], self.dim_head, theta=10000.0, like=x))
        for block in self.layers:
            if recompute:
                x = checkpoint(block, x, surroundings, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, surroundings)
        return self.norm(x)

    def loss(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """Returns the mean loss of the next tokens."""
        hidden = self(tokens[:, :-1], recompute=recompute)
        return hidden_nll(self.logits, hidden, tokens[:, 1:], self.num_tokens).mean()

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Reads tokens after those of the cache, and returns the hidden state of the last one, (b, 1, dim).

        Raises:
            ValueError: if the cache is neither empty nor followed by a single token, or if it is full.
        """
        start, stop = cache.length, cache.length + tokens.shape[1]
        if start and tokens.shape[1] > 1:
            raise ValueError(f'{tokens.shape[1]} tokens after {start}: give one token after a prompt')
        if stop > cache.keys.shape[3]:
            raise ValueError(f'{stop} tokens in a cache of {cache.keys.shape[3]}: make it larger')
        x, last = self.token_emb(tokens), len(self.layers) - 1
        for index, block in enumerate(self.layers):
            kept = cache.keys[index], cache.values[index]
            x = block(x, Surroundings(cache.rotations[start:stop], kept, start, last_only=index == last))
        cache.length = stop
        return self.norm(x)
