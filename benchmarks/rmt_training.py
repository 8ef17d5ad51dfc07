"""The time of a training step with memory replay, against recurrent-memory-transformer-pytorch 0.7.0.

    make bench, or: python -m benchmarks.rmt_training

dim 256, depth 4, heads 4 x 64, segments of 256 tokens, 32 memory tokens, batch 2, 4 segments, float32, one thread, no
XL memories. With its defaults, the published package has four residual streams; with one it is nearly the network that
ours is (value residuals and null keys remain). It is timed with both, each as it is and with use_flash_attn=True, which
is faster there and also works on a CPU.
"""

from __future__ import annotations

import argparse
import sys

SIZES: dict = dict(num_tokens=256, dim=256, depth=4, heads=4, dim_head=64, seq_len=256, num_memory_tokens=32)
BATCH, SEGMENTS = 2, 4
# options of the published package
PUBLISHED: dict[str, dict] = {
    'published, 4 streams (its default)': {},
    'published, 4 streams, use_flash_attn': {'use_flash_attn': True},
    'published, 1 stream': {'num_residual_streams': 1},
    'published, 1 stream, use_flash_attn': {'num_residual_streams': 1, 'use_flash_attn': True},
}


def worker(name: str) -> None:
    """Serves training steps of one package.

    Args:
        name: 'ours', or a name in `PUBLISHED`.
    """
    import torch
    from interleave import serve

    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {} if name == 'ours' else {'use_xl_memories': False, **PUBLISHED[name]}
    wrapper = RecurrentMemoryTransformerWrapper(RecurrentMemoryTransformer(**SIZES, **options))
    tokens = torch.randint(0, SIZES['num_tokens'], (BATCH, SEGMENTS * SIZES['seq_len'] + 1))

    def step():
        wrapper.zero_grad()
        wrapper(tokens, memory_replay_backprop=True)

    serve(step, parameters=sum(p.numel() for p in wrapper.parameters()))


def main(repetitions: int, quick: bool) -> None:
    """Times all configurations and writes the JSON.

    Args:
        repetitions: number of steps of each configuration that count.
        quick: whether one step is enough, and nothing is written.
    """
    from benchmarks.interleave import PEER_PYTHON, Worker, interleaved_medians, write_results

    workers = {'ours': Worker(sys.executable, __file__, 'ours', ours=True)}
    for name in PUBLISHED:
        workers[name] = Worker(PEER_PYTHON, __file__, name, ours=False)
    about = {name: worker.about for name, worker in workers.items()}
    medians = interleaved_medians(workers, *(1, 0) if quick else (repetitions,))
    ratios = {name: round(seconds / medians['ours'], 2) for name, seconds in medians.items()}
    for name, ratio in ratios.items():
        print(f'{name:40} {ratio:5.2f} times our time')
    write_results(
        __file__,
        {'sizes': SIZES, 'batch': BATCH, 'segments': SEGMENTS, 'about': about, 'times_ours': ratios},
        quick,
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repetitions', type=int, default=15)
    parser.add_argument('--quick', action='store_true', help='does it all run? In a minute, and no file is written')
    parser.add_argument('--worker')
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    else:
        main(arguments.repetitions, arguments.quick)
