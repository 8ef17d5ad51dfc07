"""The scan over segments in three forms: sequential (which the library uses), chunked and associative.

    python -m benchmarks.scan

It computes M_i = M_{i-1} - erase_i M_{i-1} + write_i, forward and backward, for 16, 64 and 256 segments of 8 matrices
(batch 2 x 4 heads) of 64 x 64, in float32 on one thread. The three forms take turns. It reports the median time of each
and the number of operations that each dispatches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.interleave import write_results
from infini_transformer_pytorch.memory import affine_scan

SEGMENTS, BATCH, HEADS, FEATURES, REPETITIONS = (16, 64, 256), 2, 4, 64, 9


def sequential(erase: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """Returns M_1 to M_s by the library's scan: two small operations for each segment, inside one custom operator."""
    return affine_scan(write, start, erase=erase)[1:]


def chunked(erase: Tensor, write: Tensor, start: Tensor, size: int = 8) -> Tensor:
    """Returns M_1 to M_s. The prefixes inside all chunks are computed at once, then the memories at the starts of the
    chunks one after the other."""
    keep = torch.eye(FEATURES) - erase
    keeps, writes = (t.unflatten(0, (-1, size)).unbind(1) for t in (keep, write))
    prefix_keep, prefix_write = [keeps[0]], [writes[0]]
    for a, b in zip(keeps[1:], writes[1:], strict=True):
        prefix_keep.append(a @ prefix_keep[-1])
        prefix_write.append(a @ prefix_write[-1] + b)
    starts = [start]
    for a, b in zip(prefix_keep[-1].unbind(0)[:-1], prefix_write[-1].unbind(0)[:-1], strict=True):
        starts.append(a @ starts[-1] + b)
    states = torch.stack(prefix_keep, 1) @ torch.stack(starts)[:, None] + torch.stack(prefix_write, 1)
    return states.flatten(0, 1)


def associative(erase: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """Returns M_1 to M_s by doubling: after r rounds, each prefix goes over up to 2 ** r segments."""
    keep, step = torch.eye(FEATURES) - erase, 1
    while step < len(keep):
        head_keep, head_write = keep[:step], write[:step]
        write = torch.cat((head_write, keep[step:] @ write[:-step] + write[step:]))
        keep = torch.cat((head_keep, keep[step:] @ keep[:-step]))
        step *= 2
    return keep @ start + write


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched inside its `with` block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts one operation, and runs it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Prints the table and writes the JSON."""
    torch.set_num_threads(1)
    forms: tuple[Callable[..., Tensor], ...] = (sequential, chunked, associative)
    rows = []
    for segments in SEGMENTS:
        torch.manual_seed(0)
        shape = (segments, BATCH, HEADS, FEATURES, FEATURES)
        keys = torch.nn.functional.normalize(torch.rand(shape), dim=-1)
        inputs = [keys.mT @ keys / FEATURES, torch.randn(shape), torch.randn(shape[1:])]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        weight, expected = torch.randn(shape), None
        seconds: dict[str, list[float]] = {form.__name__: [] for form in forms}
        operations = {}
        for repetition in tqdm(range(REPETITIONS + 1), disable=None, desc=f'{segments} segments'):
            for form in forms:
                counter = Counter()
                with counter if repetition == 0 else torch.enable_grad():
                    began = time.perf_counter()
                    states = form(*inputs)
                    torch.autograd.grad(states, inputs, weight)
                    seconds[form.__name__].append(time.perf_counter() - began)
                if repetition == 0:
                    expected = states if expected is None else expected
                    torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
                    operations[form.__name__] = counter.count
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        times = {name: round(median / medians['sequential'], 2) for name, median in medians.items()}
        rows.append({'segments': segments, 'times_sequential': times, 'operations': operations})
        print(segments, 'segments: time over sequential', times, 'operations', operations, flush=True)
    write_results(__file__, {'batch': BATCH, 'heads': HEADS, 'features': FEATURES, 'rows': rows})


if __name__ == '__main__':
    main()
