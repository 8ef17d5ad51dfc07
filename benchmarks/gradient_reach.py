"""How far a gradient reaches back through the memory, for each `write_init` of RMT.

    python -m benchmarks.gradient_reach

For 1 to 32 segments it computes the norm of d(loss of the last segment) / d(memory that enters the first one). The
weights are random, those that write to the residual stream of about the size of trained ones: at the start of a
training blocks do little, and the residual stream alone carries a gradient. dim 64, depth 4, heads 4 x 16, segments of
16 tokens, 4 memory tokens, batch 4. Each number is the median over 16 seeds.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from benchmarks.interleave import quick_parser, write_results
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

SEGMENTS, SEEDS = (1, 2, 4, 8, 16, 32), 16
SIZES: dict = dict(num_tokens=16, dim=64, depth=4, heads=4, dim_head=16, seq_len=16, num_memory_tokens=4)


def gradient_norm(write_init: str, segments: int, seed: int) -> float:
    """Returns the norm for one seed. The memory that enters the first segment was written by the model.

    Args:
        write_init: an option of `RecurrentMemoryTransformer`.
        segments: number of segments.
        seed: of the weights and the tokens.
    """
    torch.manual_seed(seed)
    model = RecurrentMemoryTransformer(**{**SIZES, 'write_init': write_init})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(('to_out.weight', 'proj_out.weight')):
                weight.normal_(std=(2 * len(model.layers) * weight.shape[1]) ** -0.5)
    tokens, targets = torch.randint(0, 16, (4, 16 * (segments + 1))), torch.randint(0, 16, (4, 16))
    first, *rest = tokens.split(16, dim=1)
    entering = memory = model(first)[1].detach().requires_grad_()
    for segment in rest:
        logits, memory = model(segment, memory)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return torch.autograd.grad(loss, entering)[0].norm().item()


def main(quick: bool) -> None:
    """Prints the table and writes the JSON.

    Args:
        quick: whether one seed and few segments are enough, and nothing is written.
    """
    torch.set_num_threads(1)  # the model is tiny
    seeds, lengths = (1, SEGMENTS[:4]) if quick else (SEEDS, SEGMENTS)
    norms = {
        write_init: {
            segments: round(statistics.median(gradient_norm(write_init, segments, seed) for seed in range(seeds)), 5)
            for segments in lengths
        }
        for write_init in ('scaled', 'learned', 'previous', 'sum')
    }
    print('write_init', *(f'{segments:9}' for segments in lengths))
    for write_init, by_segments in norms.items():
        print(f'{write_init:10}', *(f'{norm:9.5f}' for norm in by_segments.values()))
    write_results(__file__, {'sizes': SIZES, 'seeds': SEEDS, 'gradient_norm': norms}, quick)


if __name__ == '__main__':
    main(quick_parser(__doc__).parse_args().quick)
