"""CPU seconds to evaluate 16 sequences of a million tokens, with two models of docs/results.md that were not trained.

    python -m benchmarks.million_evaluation

It uses one thread. Tokens are made piece by piece. Logits are computed only where something is asked, and in other
pieces the last layer computes only what the memory needs. Three times are taken:

    eager       as written
    compiled    with a compiled `advance`; compiling it takes minutes, which do not count. Not with --quick
    products    the matrix products and the attention alone, with the same tensors: no program that computes the same
                with these kernels is faster. It is measured on a shorter text, and scaled
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.evidence.rows import MILLION, ROWS, TaskRow
from benchmarks.interleave import quick_parser, write_results
from segment_recurrence_pytorch.tasks import accuracy
from segment_recurrence_pytorch.trainer import compiled_advance, reading_by

SEQUENCES = 16
SHORT = 512  # segments of the shorter text
PRODUCTS = ('linear', 'matmul', 'mm', 'addmm', 'bmm', 'baddbmm', 'scaled_dot_product_attention')


class Products(TorchDispatchMode):
    """A `with` block that keeps the matrix products and the attention of what runs in it, with their tensors.

    Attributes:
        calls: the operations with their arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Runs an operation, and keeps it if it is one of `PRODUCTS`."""
        if function.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def cpu_seconds(call: Callable[[], object]) -> float:
    """Returns the CPU seconds that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.inference_mode()
def products_seconds(evaluate: Callable[[int], object], segments: int) -> float:
    """Returns the CPU seconds that the matrix products and the attention of an evaluation take.

    Args:
        evaluate: evaluates texts of so many segments.
        segments: number of segments.
    """
    short = min(SHORT, segments)
    with Products() as products:
        evaluate(short)

    def again() -> None:
        for function, args, kwargs in products.calls:
            function(*args, **kwargs)

    again()
    return cpu_seconds(again) * segments / short


def times(row: TaskRow, segments: int, quick: bool) -> dict[str, float]:
    """Returns the CPU seconds of an evaluation, by the names that stand above.

    Args:
        row: the row, whose task and model are taken.
        segments: number of segments of each sequence.
        quick: whether nothing is compiled.
    """
    task, wrapper = row.task(), row.wrapper()

    def evaluate(segments: int) -> float:
        return accuracy(wrapper, task, segments, batch_size=SEQUENCES, generator=torch.Generator().manual_seed(0))

    evaluate(SHORT)
    found = {'products': products_seconds(evaluate, segments), 'eager': cpu_seconds(lambda: evaluate(segments))}
    if not quick:
        with reading_by(wrapper.model, compiled_advance(wrapper.model)):
            evaluate(SHORT), evaluate(segments % SHORT + SHORT)  # each shape is compiled once
            found['compiled'] = cpu_seconds(lambda: evaluate(segments))
    return {name: round(seconds, 1) for name, seconds in found.items()}


def main(quick: bool) -> None:
    """Times both models and writes the JSON.

    Args:
        quick: whether short sequences are enough, and nothing is written.
    """
    segments = MILLION // 100 if quick else MILLION
    torch.set_num_threads(1)
    found = {}
    for name in ('rmt_memorize', 'infini_passkey'):
        row = ROWS[name]
        assert isinstance(row, TaskRow)
        found[row.model] = times(row, segments, quick)
        tokens = segments * row.task().segment_length
        print(f'{name}: {SEQUENCES} sequences of {tokens:,} tokens, CPU seconds: {found[row.model]}', flush=True)
    write_results(__file__, {'sequences': SEQUENCES, 'segments': segments, 'threads': 1, 'cpu_seconds': found}, quick)


if __name__ == '__main__':
    main(quick_parser(__doc__).parse_args().quick)
