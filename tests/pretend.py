"""A CUDA device that is not there: tensors say that they are on it, and are computed on the CPU.

Library code takes the way that it takes on a GPU, and what a GPU would do is recorded: where the host waits for the
device, where it sends it something, which kernels are launched, and which attention is asked for.

`tests/cuda_cases.py` has the cases. They run in a process of their own, once for all of them, since PyTorch has to be
told of the device before it starts (`cuda_guard.cpp`, which needs a C++ compiler).

    python -m tests.pretend GUARD RESULTS [WORD]     what that process runs: the cases whose names contain the word
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TORCH = Path(importlib.util.find_spec('torch').origin).parent
if __name__ == '__main__':  # before torch is imported
    for library in (TORCH / 'lib' / 'libtorch_cpu.so', sys.argv[1]):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import collections  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from segment_recurrence_pytorch.layers import _naive  # noqa: E402
from tests.once import made_once  # noqa: E402

DEVICE = torch.device('cuda', 0)
ROOT = FOLDER.parent
SECONDS = 300  # of all cases together
# they change no number and launch no kernel
VIEWS = {
    '_has_compatible_shallow_copy_type', '_local_scalar_dense', '_reshape_alias', '_unsafe_view', 'alias', 'as_strided',
    'chunk', 'detach', 'detach_', 'diagonal', 'empty', 'empty_like', 'empty_strided', 'expand', 'is_same_size', 'item',
    'lift_fresh', 'narrow', 'new_empty', 'new_empty_strided', 'permute', 'reshape', 'resize_', 'select', 'set_',
    'slice', 'split', 'split_with_sizes', 'squeeze', 'stride', 'sym_size', 't', 'tensor_split', 'transpose', 'unbind',
    'unfold', 'unsqueeze', 'view', 'view_as', 'view_as_complex', 'view_as_real',
}  # fmt: skip
WAITS = {'_local_scalar_dense', 'equal', 'is_nonzero', 'masked_select', 'nonzero', 'unique_dim', '_unique2'}


class Pretended(Tensor):
    """A tensor that says it is on the device, with the tensor on the CPU that holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    def __repr__(self):
        return f'Pretended({self.inner})'

    def tolist(self):
        _seen().waits[f'tolist: {_line()}'] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return (_Device.active or _Device()).run(func, args, kwargs or {})


class Attention(NamedTuple):
    """A call of `scaled_dot_product_attention`."""

    dtype: torch.dtype
    masked: bool
    grouped: bool


class Seen:
    """What happened on the device.

    Attributes:
        waits: how often the host waited for the device, by the line of the library that made it.
        sent: how often the host sent a tensor to the device, by line.
        kernels: how often each kernel was launched.
        attention: the calls of attention.
        random: how often the random state of the device was read or set.
    """

    def __init__(self):
        self.waits, self.sent, self.kernels, self.random = (collections.Counter() for _ in range(4))
        self.attention: list[Attention] = []


class _Device(TorchDispatchMode):
    active: _Device | None = None  # None outside `watched`, where nothing is recorded

    def __init__(self):
        super().__init__()
        self.seen = Seen()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.split('::')[1]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, Pretended)]
        here = [each for each in tensors if not isinstance(each, Pretended)]
        device = kwargs.get('device')
        asked = None if device is None else torch.device(device).type == 'cuda'
        if name in ('_to_copy', 'copy_', 'to'):
            source = isinstance(args[1 if name == 'copy_' else 0], Pretended)
            target = isinstance(args[0], Pretended) if name == 'copy_' else source if asked is None else asked
            if source != target:
                (self.seen.waits if source else self.seen.sent)[f'{name}: {_line()}'] += 1
        elif there and any(each.ndim for each in here):
            raise RuntimeError(f'{name}: tensors on two devices, {_line()}')
        if there and (name in WAITS or _is_masked_index(name, args)):
            self.seen.waits[f'{name}: {_line()}'] += 1
        if (there or asked) and name not in VIEWS:
            self.seen.kernels[name] += 1
        # a lazy conjugate would be lost: its mark is read above the level at which this method runs
        func = torch.ops.aten.conj_physical.default if name == '_conj' else func
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        written = [i for i, each in enumerate(func._schema.arguments) if each.alias_info and each.alias_info.is_write]
        if written and not func._schema.returns:
            return None
        if written and name.endswith('_'):
            return args[0]
        if 'out' in kwargs:
            return kwargs['out']
        is_there = bool(there) if asked is None else asked
        return tree_map(_outer, result) if is_there else result


def _seen() -> Seen:
    return (_Device.active or _Device()).seen


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False, **_: Any):
    heads = q.shape[1], k.shape[1]
    _seen().attention.append(Attention(q.dtype, attn_mask is not None, enable_gqa))
    assert q.dtype == k.dtype == v.dtype, f'attention of {q.dtype}, {k.dtype}, {v.dtype}: {_line()}'
    assert enable_gqa or heads[0] == heads[1], f'attention of {heads} heads without enable_gqa: {_line()}'
    assert not is_causal or q.shape[2] == k.shape[2], f'is_causal begins at the first key, not at the last: {_line()}'
    return _naive(q, k, v, is_causal, attn_mask, dropout_p)


def _is_masked_index(name: str, args) -> bool:
    if name not in ('index', 'index_put', 'index_put_', '_unsafe_index'):
        return False
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def _inner(value):
    if isinstance(value, torch.device):
        return torch.device('cpu') if value.type == 'cuda' else value
    return value.inner if isinstance(value, Pretended) else value


def _outer(value):
    return Pretended(value) if isinstance(value, Tensor) and not isinstance(value, Pretended) else value


def _line() -> str:
    """The line of the library that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and 'tests' not in path.parts and '.venv' not in path.parts:
            return f'{path.relative_to(ROOT)}:{frame.lineno} {frame.line}'
    return 'outside the library'


@contextmanager
def watched():
    """A `with` block that gives a `Seen` of what happens inside it."""
    device = _Device.active = _Device()
    patched = {'get_rng_state': _counted(device.seen, 'read'), 'set_rng_state': _counted(device.seen, 'set')}
    old = {name: getattr(torch.cuda, name) for name in patched}
    vars(torch.cuda).update(patched)
    try:
        with device:
            yield device.seen
    finally:
        vars(torch.cuda).update(old)
        _Device.active = None


def _counted(seen: Seen, what: str):
    def counted(*args, **kwargs):
        seen.random[what] += 1
        return torch.get_rng_state()

    return counted


def on_device(value):
    """A tensor, a tree of tensors or a module, on the device. A module is changed in place."""
    if not isinstance(value, nn.Module):
        return tree_map(_outer, value)
    made: dict[int, nn.Parameter] = {}
    for module in value.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = made.setdefault(id(parameter), nn.Parameter(Pretended(parameter.detach().clone())))
                module._parameters[name] = moved
    return value


def values(value):
    """The values of a tensor or a tree of tensors, on the CPU."""
    return tree_map(_inner, value)


def once(tmp_path_factory, config) -> dict[str, str]:
    """What went wrong in each case, by name: nothing, or the error. The process is started once, by whichever worker of
    pytest-xdist comes first. A key 'skip' says why nothing was run."""
    return made_once(tmp_path_factory, config, 'pretend', _run)


def _run(folder: Path) -> dict[str, str]:
    if torch.version.cuda is not None:
        return {'skip': f'needs a PyTorch that was built for CPUs: {torch.__version__} has a CUDA of its own'}
    guard, results = folder / 'cuda_guard.so', folder / 'pretend-results'
    compiler = os.environ.get('CXX') or (sysconfig.get_config_var('CXX') or 'g++').split()[0]
    command = [compiler, '-std=c++20', '-shared', '-fPIC', f'-I{TORCH}/include', str(FOLDER / 'cuda_guard.cpp')]
    command += [f'-L{TORCH}/lib', '-lc10', '-ltorch_cpu', '-o', str(guard)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        return {'skip': f'needs a C++ compiler, there is no {compiler}'}
    except subprocess.CalledProcessError as error:
        return {'skip': f'this PyTorch cannot be told of a device: {error.stderr[-500:]}'}
    with (folder / 'output').open('w') as output:
        try:
            subprocess.run(
                [sys.executable, '-W', 'error', '-m', 'tests.pretend', str(guard), str(results)],
                cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=output, stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )  # fmt: skip
            ended = ''
        except subprocess.TimeoutExpired:
            ended = f'stopped after {SECONDS} seconds. '
    found = dict(map(json.loads, results.read_text().splitlines())) if results.exists() else {}
    return {**found, 'ended': ended + (folder / 'output').read_text()[-4000:]}


def _main(results: Path, word: str = '') -> None:
    # cases import this module by its name, and must find this one, whose tensors they use
    sys.modules['tests.pretend'] = sys.modules[__name__]
    F.scaled_dot_product_attention = _attention  # its kernels are not there
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda **options: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.device = _NoDevice
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.utils.checkpoint.DefaultDeviceType.set_device_type('cuda')
    torch._C._set_only_lift_cpu_tensors(True)
    from tests import cuda_cases

    with results.open('w') as file:
        for name in (each for each in cuda_cases.NAMES if word in each):
            torch.manual_seed(0)
            try:
                cuda_cases.run(name)
                wrong = ''
            except Exception:
                wrong = traceback.format_exc()
            file.write(json.dumps([name, wrong]) + '\n')
            file.flush()


class _NoDevice:
    def __init__(self, *args):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


if __name__ == '__main__':
    _main(Path(sys.argv[2]), *sys.argv[3:])
