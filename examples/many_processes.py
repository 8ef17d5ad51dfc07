"""Two processes train one model, read one long text together, and get what one process would get.

    torchrun --nproc-per-node=2 -m examples.many_processes       # on the CPUs of this machine
    python -m examples.many_processes                            # the same numbers in one process

First each process reads its own rows of a batch, and gradients are averaged once a step (data parallel, with memory
replay). Then all processes read the same text, each its own segments of it (context parallel). docs/distributed.md has
all ways, and what is refused.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from segment_recurrence_pytorch.distributed import context_parallel, sync_gradients
from segment_recurrence_pytorch.tasks import Memorize


def say(rank: int, words: str) -> None:
    """Prints a line, rank after rank."""
    for turn in range(dist.get_world_size() if dist.is_initialized() else 1):
        if turn == rank:
            print(words, flush=True)
        if dist.is_initialized():
            dist.barrier()


def main(steps: int = 20, segments: int = 8) -> list[float]:
    """Trains and reads, and returns the losses of all steps, and then that of the text that is read together."""
    many = 'RANK' in os.environ  # torchrun says it
    if many and not dist.is_initialized():
        dist.init_process_group('gloo')
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    group = dist.group.WORLD if many else None

    torch.manual_seed(0)  # the same weights on all ranks
    task, draw = Memorize(), torch.Generator().manual_seed(0)
    model = InfiniTransformer(num_tokens=task.num_tokens, dim=64, depth=2, heads=4, dim_head=16)
    wrapper = InfiniTransformerWrapper(model, segment_length=task.segment_length, process_group=group)
    optimizer = torch.optim.AdamW(model.param_groups(3e-3, 0.01))

    tokens, _ = task.batch(segments, 32, draw)  # the same on all ranks
    rows = torch.arange(32).tensor_split(ranks)[rank]
    say(rank, f'rank {rank} of {ranks}: reads rows {rows[0]} to {rows[-1]} of the batch')
    losses = []
    for _ in range(steps):
        loss = wrapper(tokens[rows], backward=True)  # of all ranks together; every token is a target
        sync_gradients(wrapper)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = sum(parameter.double().sum().item() for parameter in model.parameters())
    say(rank, f'rank {rank} of {ranks}: loss {losses[0]:.6f}, after {steps} steps {losses[-1]:.6f}, '
              f'sum of all weights {weights:.6f}')  # fmt: skip

    text = tokens[:1]
    if many:
        with context_parallel(model, group), torch.no_grad():
            loss = wrapper(text)
    else:
        with torch.no_grad():
            loss = wrapper(text)
    share = text.shape[1] // ranks
    say(rank, f'rank {rank} of {ranks}: read about {share} of {text.shape[1]} tokens of one text, loss {loss:.6f}')
    losses.append(loss.item())
    return losses


if __name__ == '__main__':
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
