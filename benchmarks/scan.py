"""The scan over segments in three forms: sequential (which the library uses), chunked and associative.

    python -m benchmarks.scan
    python -m benchmarks.scan --device cuda     # with a fourth form, the Triton kernel that the library uses there
    python -m benchmarks.scan --quick           # few segments, twice, and no file

It computes M_i = M_{i-1} - erase_i M_{i-1} + write_i, forward and backward, for 16, 64 and 256 segments of 8 matrices
(batch 2 x 4 heads) of 64 x 64, in float32 on one thread. The forms take turns. It reports the median time of each and
the number of operations that each dispatches. On a GPU it does so for 128 matrices (batch 8 x 16 heads) of 128 x 128
too, also reports milliseconds, and waits for the device before and after each form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.interleave import quick_parser, write_results
from infini_transformer_pytorch.memory import affine_scan

SEGMENTS, BATCH, HEADS, FEATURES, REPETITIONS = (16, 64, 256), 2, 4, 64, 9
LARGE = (8, 16, 128)  # batch, heads and features of a model of a realistic size, on a GPU


def sequential(erase: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """Returns M_1 to M_s by the library's scan: two small operations for each segment, inside one custom operator."""
    return affine_scan(write, start, erase=erase, backend='torch')[1:]


def triton(erase: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """Returns M_1 to M_s by the Triton kernel: one launch forward and one backward."""
    return affine_scan(write, start, erase=erase, backend='triton')[1:]


def kept(erase: Tensor) -> Tensor:
    """Returns what the segments keep, 1 - erase."""
    return torch.eye(erase.shape[-1], device=erase.device) - erase


def chunked(erase: Tensor, write: Tensor, start: Tensor, size: int = 8) -> Tensor:
    """Returns M_1 to M_s. The prefixes inside all chunks are computed at once, then the memories at the starts of the
    chunks one after the other."""
    keep = kept(erase)
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
    keep, step = kept(erase), 1
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


def measured(
    forms: tuple[Callable[..., Tensor], ...], shape: tuple[int, ...], repetitions: int, device: torch.device
) -> dict:
    """Returns the row of the results for one size.

    Args:
        forms: the forms, which take turns. The results of the others are compared with those of the first.
        shape: (segments, batch, heads, features, features).
        repetitions: how often each form is timed, after a first time that does not count.
        device: where it runs.
    """
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.rand(shape, device=device), dim=-1)
    inputs = [keys.mT @ keys / shape[-1], torch.randn(shape, device=device), torch.randn(shape[1:], device=device)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    weight, expected = torch.randn(shape, device=device), None
    seconds: dict[str, list[float]] = {form.__name__: [] for form in forms}
    operations = {}
    on_gpu = device.type == 'cuda'
    for repetition in tqdm(range(repetitions + 1), disable=None, desc=f'{shape[0]} segments'):
        for form in forms:
            counter = Counter()
            with counter if repetition == 0 else torch.enable_grad():
                if on_gpu:
                    torch.cuda.synchronize(device)
                began = time.perf_counter()
                states = form(*inputs)
                torch.autograd.grad(states, inputs, weight)
                if on_gpu:
                    torch.cuda.synchronize(device)
                seconds[form.__name__].append(time.perf_counter() - began)
            if repetition == 0:
                expected = states if expected is None else expected
                torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
                operations[form.__name__] = counter.count
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    times = {name: round(median / medians['sequential'], 2) for name, median in medians.items()}
    row: dict = {'segments': shape[0], 'times_sequential': times, 'operations': operations}
    if on_gpu:
        sizes = dict(zip(('batch', 'heads', 'features'), shape[1:4], strict=True))
        row = {**sizes, **row, 'milliseconds': {name: round(1000 * median, 3) for name, median in medians.items()}}
    return row


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = quick_parser(__doc__)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='where it runs. Default: cpu')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    forms: tuple[Callable[..., Tensor], ...] = (sequential, chunked, associative)
    small = (BATCH, HEADS, FEATURES)
    sizes = [(segments, *small) for segments in SEGMENTS]
    if arguments.device == 'cuda':
        forms = (sequential, triton, chunked, associative)
        sizes += [(segments, *LARGE) for segments in SEGMENTS[:2]]
    if arguments.quick:
        sizes = [(8, *size) for size in dict.fromkeys(size[1:] for size in sizes)]
    rows = []
    for size in sizes:
        row = measured(forms, (*size, size[-1]), 2 if arguments.quick else REPETITIONS, device)
        rows.append(row)
        print(size[0], 'segments: time over sequential', row['times_sequential'], end=' ')
        if 'milliseconds' in row:
            print('milliseconds', row['milliseconds'], 'of', size[1:], end=' ')
        print('operations', row['operations'], flush=True)
    if arguments.quick:
        return
    if arguments.device == 'cuda':
        about = {'command': 'python -m benchmarks.scan --device cuda', 'device': torch.cuda.get_device_name(device)}
        write_results('scan_cuda.py', {**about, 'torch': torch.__version__, 'rows': rows})
    else:
        write_results(__file__, {'batch': BATCH, 'heads': HEADS, 'features': FEATURES, 'rows': rows})


if __name__ == '__main__':
    main()
