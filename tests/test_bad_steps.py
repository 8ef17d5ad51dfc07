"""After a step with NaN or infinite values, the first bad tensor is named."""

import pytest
import torch

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.bad_steps import all_finite, bad_weight, first_bad_tensor
from segment_recurrence_pytorch.data import Piece
from segment_recurrence_pytorch.state import leaves, map_state
from segment_recurrence_pytorch.training import train_loss
from tests.conftest import ids, make_infini, make_rmt

NAN, INF = float('nan'), float('inf')
MAKERS = pytest.mark.parametrize('make', [make_rmt, make_infini])
MEMORY = pytest.mark.parametrize('memory', [True, False])


def wrapped(make):
    return SegmentWrapper(make(), segment_length=4)


def piece(rows=2, segments=3):
    return Piece(ids(rows, 4 * segments + 1), torch.tensor([True, False]))


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad):
        return grad[0] * NAN


def in_segment(wrapper, module, at, change):
    """Changes what a module returns when the model reads a segment that holds the token 19, which `at` has alone."""
    module.register_forward_hook(lambda module, inputs, output: change(output) if wrapper.bad else output)
    advance = wrapper.model.advance

    def advancing(tokens, *arguments, **options):
        wrapper.bad = bool((tokens == 19).any())
        return advance(tokens, *arguments, **options)

    wrapper.model.advance = advancing
    tokens = ids(2, 13).clamp(max=18)
    tokens[1, 4 * at + 1] = 19
    return Piece(tokens, torch.tensor([True, False]))


def test_finite():
    assert all_finite()
    assert all_finite(torch.zeros(3), torch.tensor(1), torch.empty(0))
    for bad in (NAN, INF, -INF):
        assert not all_finite(torch.zeros(3), torch.tensor([[0.0, bad]]))


@MAKERS
def test_weights_come_first(make):
    wrapper = wrapped(make)
    assert bad_weight(wrapper.model) is None
    weight = wrapper.model.layers[1].ff.proj_in.weight
    with torch.no_grad():
        weight[0, 0] = INF
    assert bad_weight(wrapper.model) == 'layers.1.ff.proj_in.weight'
    assert first_bad_tensor(wrapper, piece(), None, True) == 'the weight layers.1.ff.proj_in.weight'


@MAKERS
def test_then_the_state(make):
    wrapper = wrapped(make)
    state = train_loss(wrapper, piece(), None, True).state
    state = map_state(lambda t: t * NAN if t.is_floating_point() else t, state)
    assert first_bad_tensor(wrapper, piece(), state, True) == 'the state that enters the step'


@MAKERS
@MEMORY
@pytest.mark.parametrize('segment', [0, 2])
def test_then_the_modules_in_the_order_in_which_they_run(make, memory, segment):
    wrapper = wrapped(make)
    bad = in_segment(wrapper, wrapper.model.layers[1].ff.proj_out, segment, lambda output: output * NAN)
    found = first_bad_tensor(wrapper, bad, None, memory)
    assert found == f'segment {segment + 1} of 3: the output of layers.1.ff.proj_out'


@MEMORY
def test_then_the_loss_and_the_state_of_a_segment(memory):
    wrapper = wrapped(make_rmt)
    to_logits = wrapper.model.to_logits
    wrapper.model.to_logits = lambda hidden: to_logits(hidden) * NAN
    assert first_bad_tensor(wrapper, piece(), None, memory) == 'segment 1 of 3: the loss'
    wrapper.model.to_logits = to_logits
    advance = wrapper.model.advance

    def advancing(*arguments, **options):
        hidden, state = advance(*arguments, **options)
        return hidden, map_state(lambda t: t * NAN, state)

    wrapper.model.advance = advancing
    expected = 'segment 1 of 3: the state after it' if memory else 'nothing in a segment by itself'
    assert first_bad_tensor(wrapper, piece(), None, memory).startswith(expected)


@MAKERS
@MEMORY
def test_then_the_gradients_in_the_order_of_backward(make, memory):
    wrapper = wrapped(make)
    bad = in_segment(wrapper, wrapper.model.layers[1].ff.proj_out, 1, BadGradient.apply)
    found = first_bad_tensor(wrapper, bad, None, memory)
    assert found == 'segment 2 of 3: the gradient of the output of layers.1.ff.dropout, which comes from the loss there'


def test_then_the_gradients_of_the_parameters():
    wrapper = wrapped(make_rmt)
    wrapper.model.logits.bias.register_hook(lambda grad: grad * INF)
    found = first_bad_tensor(wrapper, piece(), None, True)
    assert found == 'segment 1 of 3: the gradient of logits.bias, which comes from the loss there'


@MAKERS
def test_a_good_piece_and_what_is_left_behind(make):
    """No hook stays, and the state that entered is as it was."""
    wrapper = wrapped(make)
    state = train_loss(wrapper, piece(), None, True).state
    before = [leaf.clone() for leaf in leaves(state)]
    assert first_bad_tensor(wrapper, piece(), state, True).startswith('nothing in a segment by itself')
    assert all(torch.equal(leaf, was) for leaf, was in zip(leaves(state), before, strict=True))
    assert not any(module._forward_hooks for module in wrapper.modules())
