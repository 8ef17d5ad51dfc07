"""What back-propagation holds at once: one window, and the states."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from segment_recurrence_pytorch import SegmentWrapper, backprop
from tests.conftest import make_infini, make_rmt
from tests.test_backprop import CASES


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(model, segments, way):
    """Most bytes held for backward at a time (replay), or held by the returned loss (recompute), parameters aside."""
    held, most, parameters = weakref.WeakSet(), 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def total():
        # the targets are slices of the caller's own tokens: floating point only
        tensors = [each.tensor for each in held if each.tensor.is_floating_point()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in parameters)

    def pack(tensor):
        nonlocal most
        each = _Held(tensor)
        held.add(each)
        most = max(most, total())
        return each

    wrapper = SegmentWrapper(model, segment_length=6, segments_per_pass=1, recompute=way == 'recompute')
    x = torch.randint(0, 20, (1, 6 * segments + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each.tensor):
        returned = wrapper.loss(x, backward=way == 'replay')
        gc.collect()
        kept = total()
    assert returned.num_targets == 6 * segments
    return most if way == 'replay' else kept


@pytest.mark.parametrize('name', ['rmt plain', 'rmt xl', 'infini delta'])
def test_what_is_saved_for_backward_does_not_grow_with_the_segments(name):
    model = CASES[name]()
    one_graph = [saved_bytes(model, segments, 'full') for segments in (2, 8, 32)]
    assert one_graph[2] > 3.5 * one_graph[1] > 10 * one_graph[0]
    # with two segments there is none in the middle, which holds the gradient of a state as well
    replay = [saved_bytes(model, segments, 'replay') for segments in (2, 3, 8, 32)]
    assert replay[0] <= replay[1] == replay[2] == replay[3] < one_graph[0]
    recompute = [saved_bytes(model, segments, 'recompute') for segments in (2, 8, 32)]
    assert recompute[0] == recompute[1] == recompute[2]


@pytest.mark.parametrize('rule', ['linear', 'delta', 'deltanet'])
def test_between_windows_replay_keeps_the_gradient_of_one_state(rule, monkeypatch):
    """Not those of all states of the window, of which it is a part."""
    kept, joined = [], backprop._joined
    monkeypatch.setattr(
        backprop, '_joined', lambda loss, state, gradients: kept.append(gradients) or joined(loss, state, gradients)
    )
    wrapper = SegmentWrapper(make_infini(memory_rule=rule), segment_length=6, segments_per_pass=4)
    wrapper.loss(torch.randint(0, 20, (2, 73)), backward=True)
    first, *others = kept
    assert first is None
    for gradient in (each for gradients in others for each in gradients if each is not None):
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


def test_recomputing_keeps_the_states_and_nothing_else():
    """All tensors alive after the forward pass, not only those that autograd tells of."""
    model = make_rmt()
    state_bytes = 3 * 16 * 8

    def alive(segments):
        x = torch.randint(0, 20, (1, 6 * segments + 1))
        before = {id(t) for t in gc.get_objects() if type(t) is Tensor}
        loss = SegmentWrapper(model, recompute=True).loss(x)
        gc.collect()
        new = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before and t.is_floating_point()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
        assert loss.loss.requires_grad
        return sum(storages.values())

    growth = (alive(32) - alive(8)) / 24
    assert growth == state_bytes
