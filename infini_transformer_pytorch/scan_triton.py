"""The scan over segments as one Triton kernel, forward and backward. `memory.affine_scan` imports it when it is used.

The columns of a memory M (d, e) do not depend on each other, so each program of the kernel owns some columns of one
matrix and goes through all segments. A whole scan is one launch, where PyTorch launches two kernels for each segment.
The gradient G of the memories follows the same recurrence backwards, with the transposed erasures:

    M_i = decay_i M_{i-1} - erase_i M_{i-1} + write_i           G_{i-1} = decay_i G_i - erase_i^T G_i + grad_{i-1}

Products are float32 and sums too, whatever `torch.backends.cuda.matmul.fp32_precision` says.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FEATURES = 256  # rows d of a memory that a program can hold, if something is erased
PART = 32  # rows of the memory, at most, that one product goes over: both factors wait in shared memory
FLAT = 512  # numbers of a memory that a program owns if nothing is erased, and rows do not depend on each other either
PRECISION = 'ieee'  # of the products of the kernel: float32 as it is


def why_not(*tensors: Tensor | None, erases: bool) -> str | None:
    """Returns why the kernel cannot compute a scan, as an end of a sentence, or None if it can.

    Args:
        tensors: what goes into the scan. The first is (s, b, g, d, e).
        erases: whether something is erased.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    wrong = next((tensor.dtype for tensor in given if tensor.dtype != torch.float32), None)
    if wrong is not None:
        return f'the kernel computes in float32, not in {wrong}'
    features = given[0].shape[-2]
    if erases and features > MAX_FEATURES:
        return f'the memories have {features} features of a key: the kernel holds at most {MAX_FEATURES}'
    if not isinstance(_scan_columns, triton.JITFunction):
        return None
    if not given[0].is_cuda:
        return f'the tensors are on {given[0].device}: move them to a GPU, or set TRITON_INTERPRET=1 to try it slowly'
    return _why_no_device(given[0].device)


@functools.cache
def _why_no_device(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f'Triton needs a GPU of compute capability 8.0, which {torch.cuda.get_device_name(device)} has not'
    if not (os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')):
        return 'Triton needs a C compiler to start kernels: install gcc'
    headers = Path(sysconfig.get_path('include'))
    return None if (headers / 'Python.h').exists() else f'Triton needs the headers of Python, which {headers} lacks'


def scan(write: Tensor, start: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    """Returns M_0 to M_s, (s + 1, b, g, d, e). The arguments are those of `memory.affine_scan`."""
    states = write.new_empty(write.shape[0] + 1, *start.shape)
    _launch(states, start, write, erase, decay)
    return states


def scan_backward(grad_states: Tensor, erase: Tensor | None, decay: Tensor | None) -> Tensor:
    """Returns the whole gradients of M_0 to M_s, (s + 1, b, g, d, e).

    Args:
        grad_states: the gradients that M_0 to M_s get from outside the scan, (s + 1, b, g, d, e).
        erase: see `memory.affine_scan`.
        decay: see `memory.affine_scan`.
    """
    grads = torch.empty_like(grad_states, memory_format=torch.contiguous_format)
    _launch(grads, grad_states[-1], grad_states[:-1], erase, decay, backward=True)
    return grads


def _launch(
    out: Tensor, start: Tensor, update: Tensor, erase: Tensor | None, decay: Tensor | None, *, backward: bool = False
) -> None:
    """Fills `out` with `start` and what follows from it, from the last segment to the first if `backward`."""
    segments, b, g, d, e = update.shape
    # what does not have these shapes would be read past its end
    start = start.expand(b, g, d, e).contiguous()
    update = update.contiguous()
    rows, columns = (d, e) if erase is not None else (1, d * e)
    if erase is not None:
        erase = erase.expand(segments, b, g, d, d).contiguous()
        ROWS = max(16, triton.next_power_of_2(d))
        COLUMNS = 32 if ROWS <= 128 else 16
    else:
        ROWS, COLUMNS = 1, FLAT
    if decay is not None:
        decay = decay.expand(segments, b, g).contiguous()
    if backward:
        first = (out[-1], start, update[-1], None if erase is None else erase[-1], None if decay is None else decay[-1])
    else:
        first = (out, start, update, erase, decay)
    direction = -1 if backward else 1
    with torch.cuda.device_of(out):
        _scan_columns[(b * g, triton.cdiv(columns, COLUMNS))](
            *first,
            segments,
            rows,
            columns,
            direction * b * g,
            *((1, d) if backward else (d, 1)),
            ERASES=erase is not None,
            DECAYS=decay is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            PART=min(PART, ROWS),
            PRECISION=PRECISION,
            num_warps=min(8, max(1, ROWS * COLUMNS // 512)),
            # loads stay where they are: what a product reads was stored by the segment before
            num_stages=1,
        )


@triton.jit(do_not_specialize=['segments'])
def _scan_columns(
    out,
    start,
    update,
    erase,
    decay,
    segments,
    rows,
    columns,
    step,
    erase_row,
    erase_column,
    ERASES: tl.constexpr,
    DECAYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Goes through all segments with COLUMNS columns of one matrix.

    The pointers are those of the first segment; the next one is `step` matrices further, which may be negative. A
    matrix is (rows, columns), and one that erases (rows, rows) with the strides erase_row and erase_column.
    """
    matrix = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = r < rows, c < columns
    inside = is_row[:, None] & is_column[None, :]
    place = matrix * rows * columns + r[:, None] * columns + c[None, :]

    memory = tl.load(start + place, mask=inside, other=0.0)
    tl.store(out + place, memory, mask=inside)
    far = tl.full((), 0, dtype=tl.int64)  # matrices from the first segment
    for _ in range(segments):
        before = out + far * rows * columns
        new = tl.load(update + far * rows * columns + place, mask=inside, other=0.0)
        if DECAYS:
            new += tl.load(decay + far + matrix) * memory
        else:
            new += memory
        if ERASES:
            # rows of a tile cannot be taken out of registers: they are read back, once all threads have stored theirs
            tl.debug_barrier()
            erased = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            factors = erase + (far + matrix) * rows * rows
            for begin in range(0, rows, PART):
                k = begin + tl.arange(0, PART)
                is_k = k < rows
                factor = tl.load(
                    factors + r[:, None] * erase_row + k[None, :] * erase_column,
                    mask=is_row[:, None] & is_k[None, :],
                    other=0.0,
                )
                part = tl.load(
                    before + matrix * rows * columns + k[:, None] * columns + c[None, :],
                    mask=is_k[:, None] & is_column[None, :],
                    other=0.0,
                )
                erased = tl.dot(factor, part, erased, input_precision=PRECISION)
            new -= erased
        memory = new
        far += step
        tl.store(out + far * rows * columns + place, memory, mask=inside)
