"""On a real device, what `tests/cuda_cases.py` shows on one that is not there. Skipped where there is none."""

import pytest
import torch

from segment_recurrence_pytorch.layers import record_attention
from tests.conftest import close, make_infini, make_rmt, same_gradients
from tests.cuda_cases import MODELS, WAYS, tokens, wrapped

pytestmark = pytest.mark.cuda


def gradients(wrapper):
    return {name: parameter.grad.cpu() for name, parameter in wrapper.named_parameters()}


def trained(wrapper, x, call):
    loss = wrapper.loss(x, labels=None if wrapper.model.causal else x, **call).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach().cpu()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', MODELS)
def test_training_equals_the_cpu(name, way):
    """Loss and gradients in float64, by each way of back-propagation."""
    options, call = WAYS[way]
    x, want, have = tokens(2, 3), wrapped(name, **options), wrapped(name, **options).cuda()
    close(trained(have, x.cuda(), call), trained(want, x, call))
    same_gradients(gradients(have), gradients(want))


@pytest.mark.filterwarnings('ignore:Synchronization debug mode is a prototype')
@pytest.mark.parametrize('name', MODELS)
def test_nothing_waits(name):
    """Training, reading and decoding without a look at values: PyTorch raises at any wait for the device."""
    wrapper, x = wrapped(name, check_values=False).cuda(), tokens(2, 3).cuda()
    call = {'labels': None if wrapper.model.causal else x}
    wrapper.loss(x, backward=True, **call)  # makes the constants of this length
    try:
        torch.cuda.set_sync_debug_mode('error')
        wrapper.loss(x, backward=True, **call)
        wrapper.loss(x, **call).loss.backward()
        with torch.no_grad():
            wrapper.logits(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', [name for name in MODELS if 'encoder' not in name])
def test_decoding_equals_the_cpu(name):
    wrapper, x = wrapped(name), tokens(2, 2)
    want = wrapper.generate_tokens(x, 20, temperature=0)
    assert torch.equal(wrapper.cuda().generate_tokens(x.cuda(), 20, temperature=0).cpu(), want)


@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_half_precision_is_near(make):
    """Autocast to bfloat16 runs PyTorch's attention, and stays near float32."""
    model, x = make(dim_head=16).float().cuda(), torch.randint(0, 20, (2, 6), device='cuda')
    want = model(x)[0]
    with torch.autocast('cuda', torch.bfloat16), record_attention() as calls:
        have = model(x)[0].float()
    assert {call.backend for call in calls} <= {'sdpa', 'flash2'}
    assert (have - want).norm() / want.norm() < 0.05
