"""CPU seconds to evaluate 16 sequences of a million tokens, with two models of docs/results.md that were not trained.

    python -m benchmarks.million_evaluation

It uses one thread. Tokens are made piece by piece. Logits are computed only where something is asked, and in other
pieces the last layer computes only what the memory needs.
"""

from __future__ import annotations

import time

import torch

from benchmarks.evidence.rows import MILLION, ROWS, TaskRow
from benchmarks.interleave import quick_parser, write_results
from segment_recurrence_pytorch.tasks import accuracy

SEQUENCES = 16


def main(quick: bool) -> None:
    """Times both models and writes the JSON.

    Args:
        quick: whether short sequences are enough, and nothing is written.
    """
    segments = MILLION // 100 if quick else MILLION
    torch.set_num_threads(1)
    seconds = {}
    for name in ('rmt_memorize', 'infini_passkey'):
        row = ROWS[name]
        assert isinstance(row, TaskRow)
        task = row.task()
        start = time.process_time()
        accuracy(row.wrapper(), task, segments, batch_size=SEQUENCES, generator=torch.Generator().manual_seed(0))
        seconds[row.model] = round(time.process_time() - start, 1)
        tokens = segments * task.segment_length
        print(f'{name}: {SEQUENCES} sequences of {tokens:,} tokens, {seconds[row.model]} CPU seconds', flush=True)
    about = {'sequences': SEQUENCES, 'segments': segments, 'threads': 1}
    write_results(__file__, {**about, 'cpu_seconds': seconds}, quick)


if __name__ == '__main__':
    main(quick_parser(__doc__).parse_args().quick)
