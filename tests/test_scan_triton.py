"""The Triton kernel of the scan against the loop in PyTorch: interpreted on the CPU, and as it is on a GPU.

Triton decides when it is imported whether kernels are interpreted, and `torch.compile` imports it too. So the
interpreted cases run in a process of their own, once for all of them:

    TRITON_INTERPRET=1 python -m tests.test_scan_triton RESULTS [WORD]    the cases whose names contain the word
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from infini_transformer_pytorch import FastweightMemory, InfiniTransformer, InfiniTransformerWrapper, memory
from infini_transformer_pytorch.memory import affine_scan
from tests.conftest import random_weights
from tests.once import made_once

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # of all interpreted cases together
TOLERANCE = 1e-5  # of the norm: float32, and sums in another order
# segments, d, e: padded rows, padded columns, several tiles of columns, several parts of rows
SIZES = [(1, 3, 5), (2, 3, 40), (7, 24, 5), (1, 24, 24), (2, 64, 24), (7, 64, 5)]
FACTORS = [(False, False), (False, True), (True, False), (True, True)]
RULES = {
    'linear, decay': {'memory_rule': 'linear', 'memory_decay': True},
    'delta': {'memory_rule': 'delta'},
    'deltanet': {'memory_rule': 'deltanet'},
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs the package triton')


def inputs(segments, d, e, *, erases=True, decays=True, b=2, g=1, **options):
    """Memories that neither grow nor vanish: write, start, erase, decay."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(segments, b, g, d, 2, **options), dim=-2)
    made = [
        torch.randn(segments, b, g, d, e, **options),
        torch.randn(b, g, d, e, **options),
        # not symmetric: a transposed matrix would be noticed
        keys @ torch.randn(segments, b, g, 2, d, **options) / d**0.5 if erases else None,
        torch.rand(segments, b, g, **options) if decays else None,
    ]
    return [None if part is None else part.requires_grad_() for part in made]


def results(given, weight, backend, run=affine_scan):
    """The memories, and the gradients of all inputs."""
    write, start, erase, decay = given
    states = run(write, start, erase=erase, decay=decay, backend=backend)
    return [states, *torch.autograd.grad(states, [part for part in given if part is not None], weight)]


def near(have, want):
    for i, (one, other) in enumerate(zip(have, want, strict=True)):
        assert one.shape == other.shape
        error = (one.double() - other).norm() / other.norm()
        assert error < TOLERANCE, f'result {i}: {error}'


def exact(given, weight):
    """`results` of the loop in PyTorch, in float64."""
    given = [None if part is None else part.detach().double().requires_grad_() for part in given]
    return results(given, weight.double(), 'torch')


def scan(segments, d, e, erases, decays):
    given = inputs(segments, d, e, erases=erases, decays=decays)
    weight = torch.randn(segments + 1, 2, 1, d, e)
    near(results(given, weight, 'triton'), exact(given, weight))


def strides():
    """Inputs and gradients that are expanded or transposed."""
    write, start, erase, decay = inputs(3, 4, 5, b=2, g=3)
    given = [
        write.detach().mT.contiguous().mT.requires_grad_(),
        start.detach()[:1].expand(2, -1, -1, -1).requires_grad_(),
        erase.detach().mT.requires_grad_(),
        decay.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
    ]
    for weight in (torch.ones(()).expand(4, 2, 3, 4, 5), torch.randn(4, 2, 3, 5, 4).mT):
        near(results(given, weight, 'triton'), exact(given, weight))


def bits():
    """What writes nothing keeps every bit: zero updates, zero erasures, decay 1. Also without anything to compute."""
    write, start, erase, decay = inputs(3, 20, 5)
    zero, one = torch.zeros_like, torch.ones_like(decay)
    for factors in ({}, {'erase': zero(erase)}, {'decay': one}, {'erase': zero(erase), 'decay': one}):
        states = affine_scan(zero(write), start, **factors, backend='triton')
        assert all(torch.equal(state, start) for state in states)
    for empty in (write[:0], write[:, :0]):
        states = affine_scan(empty, start[: empty.shape[1]], backend='triton')
        assert torch.equal(states, start[None, : empty.shape[1]].expand_as(states))


def chained():
    """A chain of ranks, here of one, cuts the gradient."""
    given, chain = inputs(4, 6, 5), SimpleNamespace(rank=0, size=1)
    weight, run = torch.randn(5, 2, 1, 6, 5), functools.partial(affine_scan, chain=chain, cuts=(1, 3))
    double = [part.detach().double().requires_grad_() for part in given]
    want = results(double, weight.double(), 'torch', run)
    from infini_transformer_pytorch import scan_triton

    with patch.object(scan_triton, 'scan_backward', wraps=scan_triton.scan_backward) as backward:
        near(results(given, weight, 'triton', run), want)
    assert backward.call_count == 3


def opaque():
    """PyTorch sees one operator."""
    scan_op = torch.ops.infini_transformer_pytorch.affine_scan.default
    given = inputs(2, 3, 4)
    torch.library.opcheck(scan_op, (*given, 'triton'))
    torch.library.opcheck(scan_op, (*given[:2], None, None, 'triton'))
    compiled = torch.compile(affine_scan, backend='aot_eager', fullgraph=True)
    weight = torch.randn(3, 2, 1, 3, 4)
    want = results(given, weight, 'triton')
    assert all(map(torch.equal, results(given, weight, 'triton', compiled), want))


def model(rule, device='cpu', backends=('triton', 'torch')):
    """A whole model: loss, logits and gradients."""
    torch.manual_seed(0)
    sizes = dict(num_tokens=20, dim=16, depth=1, heads=2, dim_head=8)
    transformer = random_weights(InfiniTransformer(**sizes, **RULES[rule])).to(device)
    wrapper = InfiniTransformerWrapper(transformer, segment_length=4)
    x, found = torch.randint(0, 20, (2, 13), device=device), []
    for backend in backends:
        for layer in transformer.memory_layers:
            layer.fastweight_mem.scan_backend = backend
        wrapper.zero_grad()
        loss = wrapper.loss(x, backward=True).loss
        gradients = [parameter.grad.clone() for parameter in wrapper.parameters()]
        found.append([loss, wrapper.logits(x)[0].detach(), *(gradient for gradient in gradients if gradient.any())])
    near(found[0], [part.double() for part in found[1]])


def refused(message, *given, **factors):
    with pytest.raises(ValueError, match=message):
        affine_scan(*given, **factors, backend='triton')


def refusals():
    """Sizes and types; a memory of any size where nothing is erased."""
    write, start, erase, decay = (part.detach() for part in inputs(1, 257, 2))
    refused('have 257 features of a key: the kernel holds at most 256', write, start, erase=erase)
    affine_scan(write, start, decay=decay, backend='triton')
    refused(r'computes in float32, not in torch\.float64', write.double(), start.double())
    refused(r'computes in float32, not in torch\.float64', write, start, decay=decay.double())
    with pytest.raises(RuntimeError, match='expand'):
        affine_scan(write, start, decay=decay[:, :, :0], backend='triton')


CASES = {f'scan {case}': (scan, *case) for case in ((*size, *factors) for size in SIZES for factors in FACTORS)}
CASES |= {each.__name__: (each,) for each in (strides, bits, chained, opaque, refusals)}
CASES |= {f'model {rule}': (model, rule) for rule in RULES}


@pytest.fixture(scope='module')
def interpreted(tmp_path_factory, pytestconfig):
    """What went wrong in each case, '' for nothing."""

    def run(folder):
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-m', 'tests.test_scan_triton', str(folder / 'results')],
            cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True,
            text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(map(json.loads, (folder / 'results').read_text().splitlines()))

    return made_once(tmp_path_factory, pytestconfig, 'scan_triton', run)


@needs_triton
@pytest.mark.parametrize('name', CASES)
def test_interpreted(name, interpreted):
    assert not interpreted[name], interpreted[name]


@needs_triton
def test_a_cpu_is_refused():
    from infini_transformer_pytorch import scan_triton

    if os.environ.get('TRITON_INTERPRET') == '1':
        pytest.skip('kernels are interpreted')
    message = r"with backend='triton': the tensors are on cpu: move them to a GPU, or set TRITON_INTERPRET=1"
    refused(message, *inputs(1, 3, 2)[:2])
    layer = FastweightMemory(2)
    layer.scan_backend = 'triton'
    keys = torch.randn(2, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        layer.create_new_memories(keys, keys)
    for backend in ('auto', 'torch'):
        layer.scan_backend = backend
        layer.create_new_memories(keys, keys)
    assert scan_triton.why_not(torch.ones(1, 1, 1, 3, 2), erases=True)


@needs_triton
def test_a_device_where_triton_does_not_work_is_refused(monkeypatch, tmp_path):
    from infini_transformer_pytorch import scan_triton

    why = scan_triton._why_no_device.__wrapped__
    device = torch.device('cuda', 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Old')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert why(device) == 'Triton needs a GPU of compute capability 8.0, which Old has not'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(scan_triton.shutil, 'which', lambda name: None)
    assert why(device) == 'Triton needs a C compiler to start kernels: install gcc'
    monkeypatch.setenv('CC', 'cc')
    monkeypatch.setattr(scan_triton.sysconfig, 'get_path', lambda name: str(tmp_path))
    assert why(device) == f'Triton needs the headers of Python, which {tmp_path} lacks'
    (tmp_path / 'Python.h').touch()
    assert why(device) is None


def test_without_triton(monkeypatch):
    """Also a broken one: 'triton' says what is wrong with it, and 'auto' does without."""
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'infini_transformer_pytorch.scan_triton', raising=False)
    monkeypatch.delattr(sys.modules['infini_transformer_pytorch'], 'scan_triton', raising=False)
    memory._scan_triton.cache_clear()
    try:
        given = inputs(1, 3, 2)[:2]
        refused(r"with backend='triton': Triton cannot be imported \(.*triton.*\): pip install triton", *given)
        affine_scan(*given)
    finally:
        memory._scan_triton.cache_clear()


def test_a_backend_that_is_none_is_refused():
    with pytest.raises(ValueError, match="backend is 'cuda': give one of auto, torch, triton"):
        affine_scan(*inputs(1, 3, 2)[:2], backend='cuda')


@pytest.fixture
def launched(monkeypatch):
    """A list that grows by a name with each launch of the kernel."""
    from infini_transformer_pytorch import scan_triton

    found = []
    for name in ('scan', 'scan_backward'):
        true = getattr(scan_triton, name)
        monkeypatch.setattr(scan_triton, name, lambda *args, n=name, t=true: found.append(n) or t(*args))
    return found


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize(('erases', 'decays'), FACTORS)
@pytest.mark.parametrize('size', [*SIZES, (5, 64, 64), (5, 128, 128), (5, 200, 40), (5, 256, 256), (64, 128, 128)])
def test_the_kernel_on_a_device(size, erases, decays):
    """Against float64, and the same bits each time: no thread reads what another one has not written yet."""
    given = inputs(*size, erases=erases, decays=decays, b=2, g=3, device='cuda')
    weight = torch.randn(size[0] + 1, 2, 3, *size[1:], device='cuda')
    first = results(given, weight, 'triton')
    near(first, exact(given, weight))
    for _ in range(3):
        for one, other in zip(results(given, weight, 'triton'), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.cuda
@needs_triton
def test_zero_updates_on_a_device():
    write, start, erase, decay = (part.detach() for part in inputs(3, 20, 5, device='cuda'))
    states = affine_scan(write * 0, start, erase=erase * 0, decay=decay * 0 + 1, backend='triton')
    assert all(torch.equal(state, start) for state in states)


@pytest.mark.cuda
@needs_triton
def test_auto_on_a_device(launched):
    """The kernel where it can, PyTorch where it cannot, or where it is asked for."""
    given = [part.detach() for part in inputs(2, 20, 5, device='cuda')]
    write, start, erase, decay = given
    for factors in ({'erase': erase}, {'decay': decay}, {'erase': erase, 'decay': decay}):
        affine_scan(write, start, **factors)
        assert launched == ['scan']
        launched.clear()
        affine_scan(write, start, **factors, backend='torch')
    affine_scan(write, start)  # one sum
    affine_scan(write.double(), start.double(), erase=erase.double())
    large = [part.detach() for part in inputs(1, 257, 2, device='cuda')]
    affine_scan(*large[:2], erase=large[2])
    assert not launched
    refused('have 257 features', *large[:2], erase=large[2])
    refused(r'not in torch\.float64', write.double(), start.double())


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize('rule', RULES)
def test_a_model_on_a_device(rule, launched):
    for chosen in ('triton', 'auto'):
        launched.clear()
        model(rule, 'cuda', (chosen, 'torch'))
        assert {'scan', 'scan_backward'} == set(launched)


# the compiler says what it does by warnings, also of its own modules
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.cuda
@needs_triton
def test_compiled_on_a_device():
    given, weight = inputs(3, 24, 24, device='cuda'), torch.randn(4, 2, 1, 24, 24, device='cuda')
    compiled = torch.compile(affine_scan, fullgraph=True)
    near(results(given, weight, 'auto', compiled), exact(given, weight))


def _main(path: Path, word: str = '') -> None:
    torch.set_num_threads(1)
    with path.open('w') as file:
        for name, (case, *arguments) in CASES.items():
            if word in name:
                try:
                    case(*arguments)
                    wrong = ''
                except (Exception, pytest.fail.Exception):
                    wrong = traceback.format_exc()
                file.write(json.dumps([name, wrong]) + '\n')


if __name__ == '__main__':
    _main(Path(sys.argv[1]), *sys.argv[2:])
