"""Every attention backend against einsum, and what each refuses."""

import itertools
import sys
from functools import partial

import pytest
import torch

from recurrent_memory_transformer_pytorch.attention import Layout, attention_calls, attention_mask
from segment_recurrence_pytorch import attend, choose_backend, layers, record_attention
from tests.conftest import RMT_OPTIONS, close, make_rmt
from tests.reference import rmt_may_attend


def inputs(heads=4, kv_heads=4, queries=5, keys=9, dtype=torch.float64, device='cpu', dim_head=8):
    def make(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)

    return make(2, heads, queries, dim_head), make(2, kv_heads, keys, dim_head), make(2, kv_heads, keys, dim_head)


def softmax_attention(q, k, v, allowed):
    """One query at a time."""
    group, out = q.shape[1] // k.shape[1], torch.zeros_like(q)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if allowed(b, i, j)]
        weights = (k[b, h // group, keys] @ q[b, h, i] / q.shape[-1] ** 0.5).softmax(0)
        out[b, h, i] = weights @ v[b, h // group, keys]
    return out


@pytest.mark.parametrize('backend', ['sdpa', 'naive', 'auto'])
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('queries', [1, 5, 9])
def test_backends_equal_the_definition(backend, kv_heads, queries):
    q, k, v = inputs(kv_heads=kv_heads, queries=queries)
    mask = torch.rand(2, 1, queries, 9) < 0.6
    mask[..., 0] = True
    close(attend(q, k, v, backend=backend), softmax_attention(q, k, v, lambda b, i, j: True))
    # causal is aligned to the lower right
    expected = softmax_attention(q, k, v, lambda b, i, j: j <= i + 9 - queries)
    out = attend(q, k, v, causal=True, backend=backend)
    close(out, expected)
    close(
        attend(q, k, v, mask=mask, backend=backend), softmax_attention(q, k, v, lambda b, i, j: bool(mask[b, 0, i, j]))
    )
    weight = torch.randn_like(out)
    for have, want in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        close(have, want)


def test_backends_refuse_what_they_cannot_compute():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="'flash2' needs a CUDA device"):
        attend(q, k, v, backend='flash2')
    with pytest.raises(ValueError, match="'flash3' is unknown"):
        attend(q, k, v, backend='flash3')
    with pytest.raises(ValueError, match='not both'):
        attend(q, k, v, causal=True, mask=torch.ones(5, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match='needs as many keys'):
        attend(k, q, q, causal=True)
    cuda = torch.device('cuda')
    with pytest.raises(ValueError, match='not torch'):
        choose_backend('flash2', device=cuda, dtype=torch.float32)
    with pytest.raises(ValueError, match='no mask tensor'):
        choose_backend('flash2', device=cuda, dtype=torch.float16, masked=True)
    with pytest.raises(ValueError, match='at most 256'):
        choose_backend('flash2', device=cuda, dtype=torch.float16, dim_head=512)
    assert choose_backend('auto', device=cuda, dtype=torch.float16, masked=True) == 'sdpa'


def test_recording_tells_what_ran():
    q, k, v = inputs()
    with record_attention() as calls:
        attend(q, k, v, causal=True)
        with record_attention() as inner:
            attend(q, k, v, backend='naive', mask=torch.ones(5, 9, dtype=torch.bool))
    attend(q, k, v)
    assert [tuple(call) for call in calls] == [('sdpa', 5, 9, True, False), ('naive', 5, 9, False, True)]
    assert inner == calls[1:]


def test_a_model_tells_and_takes_its_backend():
    model, x = make_rmt(use_flash_attn=True), torch.randint(0, 20, (1, 6))
    assert model.attention_backend == 'sdpa'  # the fastest that computes the same thing on a CPU
    expected = model(x)[0]
    model.attention_backend = 'naive'
    with record_attention() as calls:
        close(model(x)[0], expected)
    assert {call.backend for call in calls} == {'naive'}
    with pytest.raises(ValueError, match='needs a CUDA device'):
        model.attention_backend = 'flash2'
    assert model.attention_backend == 'naive'


@pytest.mark.parametrize('pattern', ['causal', 'block', 'mixed', 'encoder'])
@pytest.mark.parametrize('layout', [(0, 2, 5, 2), (4, 2, 5, 2), (4, 0, 5, 0), (0, 0, 1, 0)])
def test_the_calls_of_each_memory_mask_see_what_the_table_says(pattern, layout):
    causal = pattern != 'encoder'
    memory_mask = pattern if causal else 'block'
    model = make_rmt(causal=causal, memory_mask=memory_mask)
    layout = Layout(*layout, pattern)
    rows = [(kind, i) for kind in ('read', 'text', 'write') for i in range(getattr(layout, kind))]
    keys = [('xl', i) for i in range(layout.xl)] + rows
    expected = torch.tensor([[rmt_may_attend(model, row, key) for key in keys] for row in rows])
    seen = torch.zeros_like(expected)
    for start, stop, key_start, key_stop, is_causal in attention_calls(layout):
        for row in range(start, stop):
            last = key_stop - (stop - 1 - row) if is_causal else key_stop
            seen[row, key_start:last] = True
    assert torch.equal(seen, expected)
    text_valid, xl_valid = torch.rand(3, layout.text) < 0.5, torch.rand(3, layout.xl) < 0.5
    mask = attention_mask(layout, xl_valid=xl_valid, text_valid=text_valid)
    for b, (i, row), (j, key) in itertools.product(range(3), enumerate(rows), enumerate(keys)):
        valid = {'xl': xl_valid, 'text': text_valid}.get(key[0])
        hidden = valid is not None and not valid[b, key[1]]
        assert mask[b, 0, i, j] == ((expected[i, j] and not hidden) or row == key)


def flash_attn_func(q, k, v, dropout_p=0.0, causal=False):
    """What flash-attn says of its function: (b, n, h, d), grouped heads, causal to the lower right."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum('bihd,bjhd->bhij', q, k) / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(hidden, float('-inf'))
    weights = torch.dropout(scores.softmax(-1), dropout_p, train=True)
    return torch.einsum('bhij,bjhd->bihd', weights, v)


@pytest.fixture
def flash_attn(monkeypatch):
    monkeypatch.setattr(layers, '_flash_attn_func', lambda: flash_attn_func)
    refuse = layers._flash2_refusal
    cuda = torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(
        layers, '_flash2_refusal', lambda device, dtype, masked, dim: refuse(cuda, torch.bfloat16, masked, dim)
    )


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('queries', [1, 5, 9])
def test_flash2_calls_the_package_as_it_asks(flash_attn, causal, kv_heads, queries):
    q, k, v = inputs(kv_heads=kv_heads, queries=queries)
    close(attend(q, k, v, causal=causal, backend='flash2'), attend(q, k, v, causal=causal, backend='naive'))
    dropped = attend(q, k, v, causal=causal, backend='flash2', dropout=0.999)
    assert (dropped == 0).float().mean() > 0.5


@pytest.mark.parametrize('options', RMT_OPTIONS.values(), ids=RMT_OPTIONS)
def test_a_model_on_flash2_is_the_model(flash_attn, options):
    model, x = make_rmt(**options), torch.randint(0, 20, (2, 6))
    found = {}
    for backend in ('naive', 'auto'):
        model.attention_backend = backend
        with record_attention() as calls:
            _, state = model(x)
            found[backend] = model(x, state)[0]
        ran = {call.backend for call in calls if not call.masked}
        assert ran == {'flash2' if backend == 'auto' else backend}
    close(found['auto'], found['naive'])


@pytest.mark.cuda
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('kv_heads', [4, 2])
def test_flash2_equals_sdpa(causal, kv_heads):
    pytest.importorskip('flash_attn', reason='needs the package flash-attn')
    q, k, v = inputs(kv_heads=kv_heads, dtype=torch.bfloat16, device='cuda', dim_head=64)
    exact = attend(q.double(), k.double(), v.double(), causal=causal, backend='naive')
    for backend in ('flash2', 'sdpa', 'auto'):
        error = (attend(q, k, v, causal=causal, backend=backend) - exact).norm() / exact.norm()
        assert error < 1e-2


@pytest.mark.cuda
def test_a_model_on_cuda_needs_no_mask_and_equals_the_cpu():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randint(0, 20, (2, 6))
    for options in ({}, {'use_xl_memories': True}, {'memory_mask': 'mixed', 'kv_heads': 1}):
        model = make_rmt(dim_head=16, **options).float()
        _, state = model(x)
        expected, _ = model(x, state)
        model.cuda()
        on_device = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, state)
        torch.testing.assert_close(model(x.cuda(), on_device)[0].cpu(), expected, rtol=1e-3, atol=1e-3)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast('cuda', torch.bfloat16):
            half = model(x.cuda(), on_device)[0].float().cpu()
        assert (half - expected).norm() / expected.norm() < 0.05


def test_a_compiler_takes_the_package_flash_attn_as_there_or_not(monkeypatch):
    """It cannot follow an import that fails; on a GPU the package is asked for with bfloat16."""
    monkeypatch.setitem(sys.modules, 'flash_attn', None)
    layers._flash_attn_func.cache_clear()
    refusal = partial(layers._flash2_refusal, torch.device('cuda'), torch.bfloat16, False, 64)
    compiled = torch.compile(lambda x: x + len(refusal()), fullgraph=True, backend='eager')
    assert compiled(torch.zeros(1)).item() == len(refusal())
    layers._flash_attn_func.cache_clear()
