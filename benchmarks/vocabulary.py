"""The memory of a loss over a large vocabulary: logits of all tokens of a window at once, or of a part after the other.

    python -m benchmarks.vocabulary

One backward over 32,768 tokens of 4 rows in one graph, 50,000 tokens in the vocabulary, dim 64, depth 1, float32, two
threads. Each arm has a process of its own, since the peak of a process never goes down. 'whole' holds the logits of all
tokens of a segment, as they were held before; 'parts' is what the library does.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from benchmarks.interleave import quick_parser, write_results

ROWS, SEGMENT, SEGMENTS, VOCABULARY = 4, 1024, 8, 50_000
ARMS = ('parts', 'whole')


def worker(arm: str, vocabulary: int) -> None:
    """Prints the peak of resident megabytes above what stood before the call, the loss, and the seconds."""
    import torch

    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
    from segment_recurrence_pytorch import SegmentWrapper, loss

    torch.set_num_threads(2)
    torch.manual_seed(0)
    if arm == 'whole':
        loss.LOGITS_AT_ONCE = ROWS * SEGMENT * vocabulary
    model = RecurrentMemoryTransformer(
        num_tokens=vocabulary, dim=64, depth=1, heads=2, dim_head=32, num_memory_tokens=8, seq_len=SEGMENT
    )
    tokens = torch.randint(0, vocabulary, (ROWS, SEGMENT * SEGMENTS + 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    found = SegmentWrapper(model).loss(tokens).loss
    found.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, found.item(), time.perf_counter() - start)


def main(quick: bool) -> None:
    """Runs both arms and writes the JSON.

    Args:
        quick: whether a small vocabulary is enough, and nothing is written.
    """
    rows = {}
    for arm in ARMS:
        command = [sys.executable, '-m', 'benchmarks.vocabulary', '--arm', arm, *(['--quick'] if quick else [])]
        peak, loss, seconds = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        rows[arm] = {'peak_megabytes': round(peak), 'loss': loss, 'seconds': round(seconds, 1)}
        print(f'{arm}: peak {peak:,.0f} MB, loss {loss:.6f}, {seconds:.1f} s', flush=True)
    share = round(rows['parts']['peak_megabytes'] / rows['whole']['peak_megabytes'], 3)
    print(f'{share} times the memory')
    write_results(
        __file__,
        {'tokens': ROWS * SEGMENT * SEGMENTS, 'vocabulary': VOCABULARY, 'rows': rows, 'share_of_the_memory': share},
        quick,
    )


if __name__ == '__main__':
    parser = quick_parser(__doc__)
    parser.add_argument('--arm', choices=ARMS, help='only print what one arm takes: megabytes, loss, seconds')
    arguments = parser.parse_args()
    vocabulary = VOCABULARY // 50 if arguments.quick else VOCABULARY
    worker(arguments.arm, vocabulary) if arguments.arm else main(arguments.quick)
