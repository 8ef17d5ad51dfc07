"""The time of a training step of the Infini-Transformer, against infini-transformer-pytorch 0.2.1.

    make bench, or: python -m benchmarks.infini_training

dim 256, depth 4, heads 4 x 64, delta rule, batch 2, 2048 tokens, float32, one thread, and backward=True, as users of
the published package call it. Ours sends exact gradients through all segments, the published package through two
segments. It also counts the operations that a step dispatches, with those of the backward pass.
"""

from __future__ import annotations

import argparse
import sys

SIZES: dict = dict(num_tokens=256, dim=256, depth=4, heads=4, dim_head=64)
BATCH, TOKENS = 2, 2048
SEGMENT_LENGTHS = (512, 128, 32)


def worker(name: str) -> None:
    """Serves training steps of one package.

    Args:
        name: three words: the tokens of a segment, the memory rule ('delta' or 'linear'), and the tokens of a text.
    """
    import torch
    from interleave import serve
    from torch.utils._python_dispatch import TorchDispatchMode

    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    torch.manual_seed(0)
    length, rule, total = name.split()
    model = InfiniTransformer(**SIZES, use_mem_delta_rule=rule == 'delta')
    wrapper = InfiniTransformerWrapper(model, segment_length=int(length))
    tokens = torch.randint(0, SIZES['num_tokens'], (BATCH, int(total) + 1))

    def step():
        wrapper.zero_grad()
        wrapper(tokens, backward=True)

    step()
    with Counter() as counter:
        step()
    serve(step, parameters=sum(p.numel() for p in wrapper.parameters()), operations=counter.count)


def main(repetitions: int, quick: bool) -> None:
    """Times the two packages for each segment length, and writes the JSON.

    Args:
        repetitions: number of steps of each package that count.
        quick: whether one step with an eighth of the tokens is enough, and nothing is written.
    """
    from benchmarks.interleave import PEER_PYTHON, Worker, interleaved_medians, write_results

    rows = []
    for length, rule in [*((length, 'delta') for length in SEGMENT_LENGTHS), (32, 'linear')]:
        name = f'{length} {rule} {TOKENS // 8 if quick else TOKENS}'
        workers = {
            'ours': Worker(sys.executable, __file__, name, ours=True),
            'published': Worker(PEER_PYTHON, __file__, name, ours=False),
        }
        operations = {who: worker.about['operations'] for who, worker in workers.items()}
        medians = interleaved_medians(workers, *(1, 0) if quick else (repetitions,))
        times = round(medians['published'] / medians['ours'], 2)
        rows.append({'segment_length': length, 'rule': rule, 'times_faster': times, 'operations': operations})
        print(f'{name:15} {times:5.2f} times faster; operations dispatched {operations}', flush=True)
    write_results(__file__, {'sizes': SIZES, 'batch': BATCH, 'tokens': TOKENS, 'rows': rows}, quick)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='does it all run? In a minute, and no file is written')
    parser.add_argument('--worker')
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    else:
        main(arguments.repetitions, arguments.quick)
