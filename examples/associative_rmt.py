"""The Associative Recurrent Memory Transformer (arXiv 2407.04841) on the contract of `SegmentModel`: a third model.

A segment is read as [text | memory tokens], causally. In every layer each row first recalls from an associative matrix
M of that layer; after the layer, the memory tokens, which have seen the whole segment, write to it by the delta rule:

    read     x <- x + phi(W_q x) M                                      before the layer, every row
    write    M <- M + beta phi(k)^T (v - phi(k) M)                      after it, memory token after memory token
             with k = W_k x, v = W_v x, beta = sigmoid(W_beta x), and phi of length 1

The matrices are the state. Unlike in the Recurrent Memory Transformer nothing is carried from the top of one segment to
the bottom of the next, and what a layer holds is addressed by key. The paper's phi is DPFP with a normaliser; here phi
is elu + 1 scaled to length 1, and `memory.write` does the delta rule for all memory tokens at once.

The class below is all that there is to write. Training, memory replay, exact generation, streams and cursors come from
the contract.

    python examples/associative_rmt.py          # trains on associative retrieval, about two minutes on one CPU thread

Letters: b batch, n tokens of a segment, m memory tokens, h heads, d features of a head or of a key.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from infini_transformer_pytorch import Memories
from infini_transformer_pytorch.memory import Writes, phi, write
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.layers import ResidualBlock
from segment_recurrence_pytorch.tasks import AssociativeRetrieval, SegmentCurriculum, accuracy


class CausalAttention(nn.Module):
    """Multi-head attention in which no row sees a later one, for rows of `dim` features."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the outputs for normed rows x (b, n, dim). mask: who sees whom, (b, 1, n, n) bool; None: causal."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class AssociativeBlock(nn.Module):
    """One layer of a transformer, which recalls from its memory before it and writes to it after it.

    Args:
        dim: features of a row.
        heads: attention heads.
        dim_key: features of the keys of the memory, a matrix (dim_key, dim).
    """

    def __init__(self, dim: int, heads: int, dim_key: int):
        super().__init__()
        self.block = ResidualBlock(dim, CausalAttention(dim, heads))
        self.read_norm = nn.RMSNorm(dim)
        self.to_query = nn.Linear(dim, dim_key, bias=False)
        self.write_norm = nn.RMSNorm(dim)
        self.to_key = nn.Linear(dim, dim_key, bias=False)
        self.to_value = nn.Linear(dim, dim, bias=False)
        self.to_strength = nn.Linear(dim, 1)

    def forward(
        self, x: Tensor, memory: Memories, num_writers: int, mask: Tensor | None, writes: Tensor | None
    ) -> tuple[Tensor, Memories]:
        """Returns the rows after the layer, and its memory after the segment.

        Args:
            x: rows (b, n + m, dim), the last `num_writers` of which write.
            memory: M as (b, 1, dim_key, dim), and whether anything was written.
            num_writers: m.
            mask: see `CausalAttention`.
            writes: which rows of the batch write at all, (b,) bool; None: all.
        """
        queries = phi(self.to_query(self.read_norm(x)), 'deltanet')
        x = x + (queries @ memory.kv_mem[:, 0]).to(x.dtype)
        x = self.block(x, mask)
        writers = self.write_norm(x[:, -num_writers:])
        keys, values = self.to_key(writers)[None, :, None], self.to_value(writers)[None, :, None]
        strength = self.to_strength(writers)[None, :, None, :, 0].sigmoid()
        may_write = None if writes is None else writes[None, :, None].expand(-1, -1, num_writers)
        _, after = write(Writes(keys, values, strength, mask=may_write), memory, 'deltanet')
        return x, after


class AssociativeRMT(SegmentModel):
    """A causal transformer with an associative memory in each layer, which memory tokens write.

    Args:
        num_tokens: size of the vocabulary.
        dim: features of a token.
        depth: number of layers.
        seq_len: the longest segment, in tokens.
        num_memory_tokens: how many memory tokens stand at the end of a segment. Default: 4.
        heads: attention heads, a divisor of `dim`. Default: 4.
        dim_key: features of the keys of a memory. Default: 32.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, seq_len: int,
        num_memory_tokens: int = 4, heads: int = 4, dim_key: int = 32,
    ):  # fmt: skip
        super().__init__()
        self.num_tokens = num_tokens
        self.dim = dim
        self.max_segment_length = seq_len
        self.dim_key = dim_key
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(seq_len, dim)
        self.memory_tokens = nn.Parameter(torch.empty(num_memory_tokens, dim))
        for embedding in (self.token_emb.weight, self.pos_emb.weight, self.memory_tokens):
            nn.init.normal_(embedding, std=0.5)
        self.blocks = nn.ModuleList(AssociativeBlock(dim, heads, dim_key) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, num_tokens)

    def initial_state(self, batch_size: int) -> tuple[Memories, ...]:
        """See `SegmentModel.initial_state`: an empty memory for each layer."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        empty = torch.zeros(batch_size, 1, self.dim_key, self.dim, dtype=dtype, device=self.device)
        return tuple(Memories(empty.clone(), empty[..., 0].clone()) for _ in self.blocks)

    def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
        """See `SegmentModel.advance`."""
        batch, n = tokens.shape[:2]
        m = len(self.memory_tokens)
        state = self.initial_state(batch) if state is None else state
        x = tokens.to(self.dtype) if tokens.is_floating_point() else self.token_emb(tokens)
        x = torch.cat((x + self.pos_emb.weight[:n], self.memory_tokens.expand(batch, -1, -1)), dim=1)
        attn_mask = writes = None
        if mask is not None:
            writes = mask.any(1)
            valid = F.pad(mask, (0, m), value=True)
            causal = mask.new_ones(n + m, n + m).tril()
            attn_mask = (causal & valid[:, None, None]) | torch.eye(n + m, dtype=torch.bool, device=x.device)
        after = []
        for block, memory in zip(self.blocks, state, strict=True):
            x, memory = block(x, memory, m, attn_mask, writes)
            after.append(memory)
        return (self.norm(x[:, :n]) if need_hidden else None), tuple(after)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """See `SegmentModel.to_logits`."""
        return self.head(hidden)


def main(steps: int = 3000, seed: int = 0, sequences: int = 1024) -> dict[int, float]:
    """Trains on associative retrieval, one pair a segment, and returns the accuracy by number of segments."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task, curriculum = AssociativeRetrieval(), SegmentCurriculum([3, 4, 5], threshold=0.9)
    model = AssociativeRMT(num_tokens=task.num_tokens, dim=64, depth=2, seq_len=task.segment_length)
    wrapper = SegmentWrapper(model)
    optimizer = torch.optim.AdamW(model.param_groups(lr=3e-3, weight_decay=0.01), betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * max(0.03, 1 - step / steps))
    for _ in (bar := tqdm(range(steps), disable=None)):
        segments = curriculum.draw(generator)
        tokens, labels = task.batch(segments, 32, generator)
        loss = wrapper.loss(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curriculum.update(math.exp(-loss.item()), segments)
        bar.set_postfix_str(f'{curriculum.stages[curriculum.stage]} segments')
    print('pairs shown, then a key: share of the values that are right, beside guessing one of those shown')
    found = {}
    for segments in (2, 3, 4, 5, 9, 17):
        found[segments] = accuracy(wrapper, task, segments, batch_size=sequences, generator=generator)
        longer = '' if segments <= curriculum.stages[-1] else '   (more than in training)'
        print(f'{segments - 1:11}: {found[segments]:.3f}  {1 / (segments - 1):.3f}{longer}', flush=True)
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=3000, help='of the training (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and data (default: %(default)s)')
    arguments = parser.parse_args()
    main(arguments.steps, arguments.seed)
