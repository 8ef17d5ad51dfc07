"""What context parallel sends, beside ring attention, and how far its results are from those of one process.

    python -m benchmarks.context_parallel     both tables of docs/distributed.md, and the second one as JSON

What is sent is counted from shapes; `tests/distributed_cases.py` compares the count with what ranks really send. The
results are compared in float64, four processes on one machine against one.

Letters: g key/value heads, d features of a head.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.interleave import write_results
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from segment_recurrence_pytorch.distributed import context_parallel, sync_gradients

BYTES_OF_A_MEMORY = 4  # float32, in any model
BYTES_OF_A_KEY = 2  # bfloat16
KV_HEADS, DIM_HEAD = 8, 128  # of the table
RANKS, SEGMENT, SEGMENTS = 4, 32, 30  # of the comparison: 7 or 8 segments a rank, the last one shorter
RULES: dict[str, dict[str, Any]] = {
    'linear': {'learned_delta_update': True},
    'delta': {'memory_rule': 'delta', 'learned_delta_update': True},
    'deltanet': {'memory_rule': 'deltanet'},
}


def numbers_a_hop(*, kv_heads: int, dim_head: int, memory_rule: str = 'linear', backward: bool = False) -> int:
    """Returns how many numbers a rank sends to its neighbour, for each layer and row of the batch, whatever the length.

    Args:
        kv_heads: number g of memories of a layer.
        dim_head: features d of a head.
        memory_rule: 'linear', 'delta' or 'deltanet'. Default: 'linear'.
        backward: whether to count what goes back to the rank before, instead of what goes on to the rank after.
            Default: False.
    """
    matrices = kv_heads * dim_head * dim_head
    if memory_rule == 'deltanet':  # no normaliser, but a mark that something was written, which needs no gradient
        return matrices + (0 if backward else 1)
    return matrices + kv_heads * dim_head


def bytes_a_token(*, ranks: int, tokens: int, kv_heads: int, dim_head: int, memory_rule: str = 'linear') -> float:
    """Returns how many bytes all ranks together send for each token and layer in a training step of context parallel.

    Args:
        ranks: number of ranks that read the sequence.
        tokens: number of tokens of the sequence.
        kv_heads: number g of memories of a layer.
        dim_head: features d of a head.
        memory_rule: 'linear', 'delta' or 'deltanet'. Default: 'linear'.
    """
    both_ways = sum(
        numbers_a_hop(kv_heads=kv_heads, dim_head=dim_head, memory_rule=memory_rule, backward=backward)
        for backward in (False, True)
    )
    return (ranks - 1) * both_ways * BYTES_OF_A_MEMORY / tokens


def ring_bytes_a_token(*, ranks: int, kv_heads: int, dim_head: int) -> float:
    """Returns how many bytes all ranks together send for each token and layer in a training step of ring attention
    (arXiv 2310.01889).

    In forward the keys and values of each token go to all other ranks, from neighbour to neighbour. In backward they go
    round again, and their gradients with them, which then have one more hop to go, to the rank that owns them.

    Args:
        ranks: number of ranks that read the sequence.
        kv_heads: number g of key/value heads.
        dim_head: features d of a head.
    """
    keys_and_values = 2 * kv_heads * dim_head * BYTES_OF_A_KEY
    return ((ranks - 1) + (ranks - 1) + ranks) * keys_and_values


def table() -> str:
    """Returns the table of docs/distributed.md."""
    lines = ['| ranks | tokens | context parallel | ring attention |', '|---|---|---|---|']
    for ranks, tokens in ((2, 2**15), (8, 2**17), (8, 2**20), (64, 2**20)):
        ours = bytes_a_token(ranks=ranks, tokens=tokens, kv_heads=KV_HEADS, dim_head=DIM_HEAD)
        ring = ring_bytes_a_token(ranks=ranks, kv_heads=KV_HEADS, dim_head=DIM_HEAD)
        lines.append(f'| {ranks} | {tokens:,} | {ours:,.1f} | {ring:,.0f} |')
    return '\n'.join(lines)


def step(rule: str, recompute: bool, group: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss and the gradients of one step, of all ranks of a group together or of one process."""
    torch.manual_seed(0)
    model = InfiniTransformer(
        num_tokens=256, dim=64, depth=4, heads=4, dim_head=16, memory_decay=True, tie_embeddings=True, **RULES[rule]
    ).double()
    for parameter in model.parameters():
        if not parameter.any():  # blocks start as the identity, which would hide what they compute
            torch.nn.init.normal_(parameter, std=0.1)
    wrapper = InfiniTransformerWrapper(model, SEGMENT, recompute=recompute, process_group=group)
    x = torch.randint(0, 256, (2, SEGMENT * SEGMENTS - 5))
    if group is None:
        loss = wrapper(x)
        loss.backward()
    else:
        with context_parallel(model, group):
            loss = wrapper(x)
            loss.backward()
        sync_gradients(wrapper)
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def compare(rank: int, folder: str) -> None:
    """Runs one of the processes. The first one writes the largest differences of loss and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=RANKS)
    rows = []
    for rule in RULES:
        for recompute in (False, True):
            (loss, gradients), (wanted, want) = step(rule, recompute, dist.group.WORLD), step(rule, recompute)
            largest = max((have - need).abs().max().item() for have, need in zip(gradients, want, strict=True))
            size = max(need.abs().max().item() for need in want)
            way = 'recompute' if recompute else 'one graph'
            rows.append({'rule': rule, 'way': way, 'loss': abs((loss - wanted).item()), 'gradients': largest / size})
    if rank == 0:
        write_results(__file__, {'ranks': RANKS, 'tokens': SEGMENT * SEGMENTS - 6, 'segment': SEGMENT, 'rows': rows})
    dist.barrier()
    dist.destroy_process_group()


def equality(rows: list[dict[str, Any]]) -> str:
    """Returns the second table of docs/distributed.md.

    Args:
        rows: the rows of the JSON.
    """
    lines = ['| memory rule | backward | loss | gradients |', '|---|---|---|---|']
    lines += [f'| {row["rule"]} | {row["way"]} | {row["loss"]:.0e} | {row["gradients"]:.0e} |' for row in rows]
    return '\n'.join(lines)


def main() -> None:
    """Prints the tables and writes the JSON."""
    print(table(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(compare, (folder,), nprocs=RANKS)
    path = Path(__file__).parent / 'results' / 'context_parallel.json'
    print(equality(json.loads(path.read_text())['rows']))


if __name__ == '__main__':
    main()
