"""CPU seconds to evaluate 16 sequences of a million tokens, with two models of docs/results.md that were not trained.

    python -m benchmarks.million_evaluation

It uses one thread. Tokens are made piece by piece. Logits are computed only where something is asked, and in other
pieces the last layer computes only what the memory needs.
"""

from __future__ import annotations

import time

import torch

from benchmarks.evidence.rows import MILLION, ROWS, TaskRow
from benchmarks.interleave import write_results
from segment_recurrence_pytorch.tasks import accuracy

SEQUENCES = 16


def main() -> None:
    """Times both models and writes the JSON."""
    torch.set_num_threads(1)
    seconds = {}
    for name in ('rmt_memorize', 'infini_passkey'):
        row = ROWS[name]
        assert isinstance(row, TaskRow)
        task = row.task()
        start = time.process_time()
        accuracy(row.wrapper(), task, MILLION, batch_size=SEQUENCES, generator=torch.Generator().manual_seed(0))
        seconds[row.model] = round(time.process_time() - start, 1)
        tokens = MILLION * task.segment_length
        print(f'{name}: {SEQUENCES} sequences of {tokens:,} tokens, {seconds[row.model]} CPU seconds', flush=True)
    write_results(__file__, {'sequences': SEQUENCES, 'segments': MILLION, 'threads': 1, 'cpu_seconds': seconds})


if __name__ == '__main__':
    main()
