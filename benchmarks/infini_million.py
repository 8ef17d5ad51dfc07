"""Exact gradients through a million tokens on a CPU: the peak of memory, compared with that for 65,536 tokens.

    python -m benchmarks.infini_million

It runs `wrapper(seq, backward=True)` on one sequence, with dim 64, depth 2, heads 2 x 32, the delta rule, segments of
512 tokens, and float32. Each length has a process of its own, since the peak of a process never goes down.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from benchmarks.interleave import quick_parser, write_results

LENGTHS = (65_536, 1_048_576)


def worker(length: int) -> None:
    """Prints the peak of resident megabytes, the megabytes of the input, and the seconds."""
    import torch

    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    torch.manual_seed(0)
    model = InfiniTransformer(num_tokens=256, dim=64, depth=2, heads=2, dim_head=32, use_mem_delta_rule=True)
    wrapper = InfiniTransformerWrapper(model)
    tokens = torch.randint(0, 256, (1, length + 1))
    start = time.perf_counter()
    loss = wrapper(tokens, backward=True)
    assert loss.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(peak, tokens.nbytes / 2**20, time.perf_counter() - start)


def main(quick: bool) -> None:
    """Runs both lengths and writes the JSON.

    Args:
        quick: whether short texts are enough, and nothing is written.
    """
    rows = {}
    for length in (length // 64 if quick else length for length in LENGTHS):
        command = [sys.executable, '-m', 'benchmarks.infini_million', '--length', str(length)]
        peak, inputs, _ = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        rows[length] = {'peak_megabytes': round(peak), 'inputs_megabytes': round(inputs, 1)}
        print(f'{length:9,} tokens: peak {peak:.0f} MB, of which inputs {inputs:.1f} MB', flush=True)
    short, long = (row['peak_megabytes'] - row['inputs_megabytes'] for row in rows.values())
    ratio = round(long / short, 2)
    print(f'{ratio} times the peak for 16 times the length')
    write_results(__file__, {'rows': rows, 'peak_ratio_without_inputs': ratio}, quick)


if __name__ == '__main__':
    parser = quick_parser(__doc__)
    parser.add_argument('--length', type=int, help='only print what one length takes: megabytes, of the input, seconds')
    arguments = parser.parse_args()
    worker(arguments.length) if arguments.length else main(arguments.quick)
