"""Every way through the segments gives the gradients of one graph, and holds what it says it holds."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import SegmentWrapper, loss
from segment_recurrence_pytorch.backprop import plan_windows
from segment_recurrence_pytorch.state import detach, leaves
from tests.conftest import (
    DROPOUT,
    INFINI_OPTIONS,
    RMT_OPTIONS,
    close,
    make_infini,
    make_rmt,
    random_weights,
    same_gradients,
)
from tests.reference import truncated_loss

TOKENS = 20  # segments of 6, 6, 6 and 1 inputs

RMT = {name: options for name, options in RMT_OPTIONS.items() if options.get('causal', True)}
RMT |= {f'{name}, dropout': RMT[name] | DROPOUT for name in ('plain', 'causal', 'mixed', 'xl long', 'no memory')}
INFINI = INFINI_OPTIONS | {
    f'{name}, dropout': INFINI_OPTIONS[name] | DROPOUT for name in ('linear', 'deltanet', 'above')
}
CASES = {f'rmt {name}': partial(make_rmt, **options) for name, options in RMT.items()}
CASES |= {f'infini {name}': partial(make_infini, **options) for name, options in INFINI.items()}


def batch(ragged: bool) -> tuple[Tensor, Tensor | None]:
    x = torch.randint(0, 20, (4, TOKENS))
    mask = torch.ones(4, TOKENS, dtype=torch.bool)
    if ragged:
        mask[1, 9:] = False
        mask[2, 3:] = False
        mask[3, [0, 4, 8, 14]] = False
    return x, mask


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    model.zero_grad()
    return found


def run(model, way, x, mask, k=None, segments_per_pass=None):
    """Loss, state, gradients and the next random number, one way through the segments."""
    torch.manual_seed(7)
    wrapper = SegmentWrapper(
        model,
        segment_length=6,
        backprop_segments=k,
        recompute=way == 'recompute',
        segments_per_pass=segments_per_pass if model.parallel_segments or way != 'full' else None,
    )
    loss, _, state = wrapper.loss(x, mask=mask, backward=way == 'replay')
    drawn = torch.rand(())
    if way != 'replay':
        loss.backward()
    return loss.detach(), state, gradients(model), drawn


def has_dropout(model):
    rates = (getattr(module, name, 0) for module in model.modules() for name in ('p', 'dropout'))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@pytest.mark.parametrize('ragged', [False, True], ids=['full', 'ragged'])
@pytest.mark.parametrize('make', CASES.values(), ids=CASES.keys())
def test_replay_and_recomputing_are_one_graph(make, ragged):
    """With dropout at the same number of segments a pass, without it at any."""
    model, (x, mask) = make(), batch(ragged)
    exact = None if has_dropout(model) else run(model, 'full', x, mask, segments_per_pass=1)
    for segments_per_pass in (1, 2, 9):
        if has_dropout(model) and segments_per_pass > 1 and not model.parallel_segments:
            continue  # one segment after the other: nothing else to compare with
        loss, state, want, drawn = exact or run(model, 'full', x, mask, segments_per_pass=segments_per_pass)
        for way in ('full', 'recompute', 'replay'):
            other, other_state, have, other_drawn = run(model, way, x, mask, segments_per_pass=segments_per_pass)
            close(other, loss)
            same_gradients(have, want)
            assert torch.equal(other_drawn, drawn)
            for a, b in zip(leaves(other_state), leaves(state), strict=True):
                close(a, b)


def with_random_blocks(model):
    """A subclass, whose blocks have dropout that no argument tells of."""

    class Random(type(model)):
        def make_block(self, index, attention, **options):
            block = super().make_block(index, attention, **options)
            block.ff = torch.nn.Sequential(block.ff, torch.nn.Dropout(0.3))
            return block

    return random_weights(Random(**model.arguments).double())


def dropout_later(name):
    """Dropout that a model gets after it was built, in its feed-forwards or in its attention."""

    def change(model):
        for module in model.modules():
            if name == 'feed-forward' and isinstance(module, torch.nn.Dropout):
                module.p = 0.3
            elif name == 'attention' and isinstance(getattr(module, 'dropout', None), float):
                module.dropout = 0.3
        return model

    return change


class DropPath(torch.nn.Module):
    """Leaves out what another module adds, at random: a module that the library does not know."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        return out * torch.rand(()) if self.training else out


def drop_path_later(model):
    model.layers[-1].ff = DropPath(model.layers[-1].ff)
    return model


def noise_by_a_hook(model):
    model.layers[-1].ff.register_forward_hook(
        lambda module, inputs, out: out * torch.rand(()) if module.training else out
    )
    return model


def another_forward(model):
    ff = model.layers[-1].ff
    plain = ff.forward
    ff.forward = lambda x: plain(x) * torch.rand(()) if ff.training else plain(x)
    return model


def another_method(model):
    """Of the attention: what makes queries, keys and values of tokens."""
    attn = model.layers[-1].attn
    name = 'project' if hasattr(attn, 'project') else 'heads_of'
    plain = getattr(attn, name)

    def noisy(x, *args, **kwargs):
        return plain(x * torch.rand(()) if attn.training else x, *args, **kwargs)

    setattr(attn, name, noisy)
    return model


def random_activation(model):
    model.layers[-1].ff = torch.nn.Sequential(model.layers[-1].ff, torch.nn.RReLU())
    return model


CHANGES = {
    'subclass': with_random_blocks,
    'feed-forward later': dropout_later('feed-forward'),
    'attention later': dropout_later('attention'),
    'an unknown module': drop_path_later,
    'a hook': noise_by_a_hook,
    'another forward': another_forward,
    'another method': another_method,
    'a random activation': random_activation,
}


@pytest.mark.parametrize('part', ['all', 'last block'])
@pytest.mark.parametrize('make', [make_rmt, make_infini], ids=['rmt', 'infini'])
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_random_numbers_that_no_argument_told_of_are_replayed_too(make, change, part):
    """Also where only a part of the model is in training mode."""
    model, (x, mask) = change(make()), batch(True)
    loss, _, want, drawn = run(model, 'full', x, mask, segments_per_pass=1)
    assert loss != run(model.eval(), 'full', x, mask, segments_per_pass=1)[0]
    (model if part == 'all' else model.layers[-1]).train()
    loss, _, want, drawn = run(model, 'full', x, mask, segments_per_pass=1)
    for way in ('recompute', 'replay'):
        other, _, have, other_drawn = run(model, way, x, mask, segments_per_pass=1)
        close(other, loss)
        same_gradients(have, want)
        assert torch.equal(other_drawn, drawn)


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize(
    'name', ['rmt plain', 'rmt xl', 'rmt learned', 'infini linear', 'infini delta', 'infini above']
)
def test_truncation_is_the_loop_with_detach(name, k):
    model, x = CASES[name](), torch.randint(0, 20, (2, TOKENS))

    def forward(segment, state):
        hidden, state = model.advance(segment, state)
        return model.to_logits(hidden), state

    expected = truncated_loss(x, 6, k, forward)
    expected.backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    want = gradients(model)
    for way in ('full', 'recompute', 'replay'):
        for segments_per_pass in (1, 2, 9):
            loss, _, have, _ = run(model, way, x, None, k, segments_per_pass)
            close(loss, expected.detach())
            same_gradients(have, want)
    exact = run(model, 'full', x, None)[2]
    assert any((exact[name] - want[name]).abs().max() > 1e-6 for name in want)


class LargestLogits(TorchDispatchMode):
    """The most numbers of a tensor whose last dimension is the vocabulary, but for what is as large as its weights."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == 20:
                self.most = max(self.most, each.numel())
        return out


@pytest.mark.parametrize('make', [make_rmt, make_infini])
@pytest.mark.parametrize('way', [{}, {'recompute': True}, {'backward': True}])
def test_logits_are_held_in_parts(make, way, monkeypatch):
    found = []
    for limit in (2**26, 20 * 4):
        monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', limit)
        torch.manual_seed(1)
        wrapper = SegmentWrapper(make(**DROPOUT), segment_length=6, recompute='recompute' in way)
        x = torch.arange(3 * 25).view(3, 25).remainder(20)
        labels = x.masked_fill(x % 3 == 0, -100)
        torch.manual_seed(2)
        with LargestLogits() as seen:
            each = wrapper.loss(x, labels=labels, backward='backward' in way).loss
            if each.requires_grad:
                each.backward()
        found.append((each.detach(), {name: p.grad for name, p in wrapper.named_parameters()}))
        # the weight of the last layer and its gradient are (20, 16)
        assert seen.most <= max(limit, 16 * 20) if limit < 2**26 else seen.most > 16 * 20
    close(found[1][0], found[0][0])
    same_gradients(found[1][1], found[0][1])
    monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', 1)
    with torch.no_grad():
        one_by_one = wrapper.eval().loss(x, labels=labels, reduction='none').loss
    monkeypatch.setattr(loss, 'LOGITS_AT_ONCE', 2**26)
    close(wrapper.loss(x, labels=labels, reduction='none').loss.detach(), one_by_one)


def test_windows():
    def cut(*args, **options):
        return [(window.start, window.stop, window.truncate) for window in plan_windows(*args, **options)]

    assert cut(0, 4) == []
    assert cut(10, 4) == [(0, 4, False), (4, 8, False), (8, 10, False)]
    assert cut(10, 4, align='right') == [(0, 2, False), (2, 6, False), (6, 10, False)]
    assert cut(3, 4, align='right') == [(0, 3, False)]
    assert cut(8, 4, align='right', segments_per_pass=None) == [(0, 8, False)]
    assert cut(10, 4, align='right', segments_per_pass=None) == [(0, 2, False), (2, 10, False)]
    assert cut(22, 4, segments_per_pass=None) == [(0, 22, False)]
    assert cut(22, 4, segments_per_pass=2, backprop_segments=3) == [
        (0, 8, False), (8, 12, False), (12, 20, True), (20, 22, False),
    ]  # fmt: skip
    assert cut(10, 4, backprop_segments=1) == [(0, 4, False), (4, 8, True), (8, 10, True)]


def test_the_published_call_runs_backward_and_returns_a_plain_loss():
    model, x = make_rmt(), torch.randint(0, 20, (2, TOKENS))
    wrapper = RecurrentMemoryTransformerWrapper(model)
    memory = torch.randn(2, 3, 16, dtype=torch.float64)
    given = memory.clone()
    loss, memories = wrapper(x, memory, return_loss=True)
    loss.backward()
    want = gradients(model)
    replayed, after = wrapper(x, memory, memory_replay_backprop=True, return_memories=True)
    same_gradients(gradients(model), want)
    close(replayed, loss.detach())
    close(after, memories.detach())
    assert not replayed.requires_grad
    assert not after.requires_grad
    assert torch.equal(memory, given)
    assert memory.grad is None
    assert not memory.requires_grad
    halved = wrapper(x, memory, memory_replay_backprop=True, mrbp_loss_weight=0.5)
    close(halved, replayed / 2)
    same_gradients({name: gradient * 2 for name, gradient in gradients(model).items()}, want)


def test_the_callers_state_gets_a_gradient_from_an_ordinary_backward_only():
    wrapper, x = RecurrentMemoryTransformerWrapper(make_rmt()), torch.randint(0, 20, (2, TOKENS))
    memory = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    wrapper(x, memory, memory_replay_backprop=True)
    assert memory.grad is None
    gradient = torch.autograd.grad(wrapper(x, memory, return_loss=True)[0], memory)[0]
    assert gradient.abs().max() > 0
    recomputing = RecurrentMemoryTransformerWrapper(wrapper.model, recompute=True)
    close(torch.autograd.grad(recomputing(x, memory, return_loss=True)[0], memory)[0], gradient)


def test_backward_fn_takes_part_once_a_segment():
    """A gradient scaler multiplies each loss; gradients between segments are scaled already."""
    model, x = make_rmt(), torch.randint(0, 20, (2, TOKENS))
    wrapper = RecurrentMemoryTransformerWrapper(model)
    wrapper(x, memory_replay_backprop=True)
    want = gradients(model)
    calls = []

    def scaled(loss):
        calls.append(loss)
        (loss * 1024).backward()

    loss = wrapper(x, memory_replay_backprop=True, backward_fn=scaled, mrbp_loss_weight=0.25)
    assert len(calls) == 4
    same_gradients({name: gradient / 256 for name, gradient in gradients(model).items()}, want)
    close(loss * 4, wrapper(x, return_loss=True)[0].detach())


def test_every_parameter_gets_a_gradient_from_every_call():
    embeddings = torch.randn(2, 5, 16, dtype=torch.float64)
    labels = torch.randint(0, 20, (2, 5))
    for options in ({}, {'use_xl_memories': True}, {'num_memory_tokens': 0}):
        for way in ({'backward': True}, {}):
            wrapper = RecurrentMemoryTransformerWrapper(make_rmt(**options))
            for x, given in (
                (labels, None),
                (labels[:, :1], None),
                (embeddings, labels),
                (embeddings, torch.full_like(labels, -100)),
            ):
                loss = wrapper.loss(x, labels=given, **way).loss
                if not way:
                    loss.backward()
                found = gradients(wrapper)
                if given is not None and (given == -100).all():
                    assert loss == 0
                    assert not any(gradient.any() for gradient in found.values())


def test_replay_walks_the_graph_of_embeddings_once():
    """Embeddings that another module computed get the gradient of one graph."""
    wrapper, encoder = RecurrentMemoryTransformerWrapper(make_rmt()), torch.nn.Embedding(20, 16).double()
    x, labels = torch.randint(0, 20, (2, TOKENS)), torch.randint(0, 20, (2, TOKENS))
    wrapper(encoder(x), labels=labels)[0].backward()
    want, wanted = encoder.weight.grad.clone(), gradients(wrapper)
    encoder.zero_grad()
    wrapper(encoder(x), labels=labels, memory_replay_backprop=True)
    close(encoder.weight.grad, want)
    same_gradients(gradients(wrapper), wanted)


def test_replay_walks_the_graph_of_values_of_segments_once():
    """Also together with embeddings whose graph shares a part with theirs."""
    wrapper = SegmentWrapper(make_infini(memory_rule='linear'), segment_length=6, segments_per_pass=1)
    labels, raw = torch.randint(0, 20, (2, TOKENS)), torch.randn(2, TOKENS, 16, dtype=torch.float64).requires_grad_()

    def loss(**options):
        shared = raw.sin()
        return wrapper.loss(shared, labels=labels, per_segment={'write_scale': shared[:, :4, 0].exp()}, **options).loss

    (want,) = torch.autograd.grad(loss(), raw)
    wrapper.zero_grad()
    loss().backward()
    raw.grad, wanted = None, gradients(wrapper)
    loss(backward=True)
    close(raw.grad, want)
    same_gradients(gradients(wrapper), wanted)


def test_an_exception_in_backward_fn_leaves_the_random_numbers_of_one_forward_pass():
    wrapper, x, calls = RecurrentMemoryTransformerWrapper(make_rmt(**DROPOUT)), torch.randint(0, 20, (2, TOKENS)), []

    def fails_later(loss):
        calls.append(loss)
        loss.backward()
        if len(calls) == 3:
            raise RuntimeError('stop')

    torch.manual_seed(3)
    wrapper(x, return_loss=True)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match='stop'):
        wrapper(x, memory_replay_backprop=True, backward_fn=fails_later)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('align', ['left', 'right'])
def test_labels_states_and_encoders_are_replayed_too(align):
    x, labels = torch.randint(0, 20, (2, 2, TOKENS))
    labels[0, 3:9] = -100
    for model in (make_rmt(causal=False), make_rmt(use_xl_memories=True), make_infini(use_mem_delta_rule=True)):
        state = SegmentWrapper(model, segment_length=6).logits(x)[1]
        found = []
        for way in ('full', 'recompute', 'replay'):
            wrapper = SegmentWrapper(model, segment_length=6, align=align, recompute=way == 'recompute')
            loss = wrapper.loss(x, detach(state), labels=labels, backward=way == 'replay').loss
            if way != 'replay':
                loss.backward()
            found.append((loss.detach(), gradients(model)))
        for loss, have in found[1:]:
            close(loss, found[0][0])
            same_gradients(have, found[0][1])


def test_torch_func_differentiates_the_loss():
    """Of RMT: operators that are registered with `torch.library`, as the scan of Infini is, cannot be differentiated by
    it."""
    wrapper, x = RecurrentMemoryTransformerWrapper(make_rmt()), torch.randint(0, 20, (2, TOKENS))

    def loss(weights):
        return torch.func.functional_call(wrapper, weights, (x,), {'return_loss': True})[0]

    found = torch.func.grad(loss)(dict(wrapper.named_parameters()))
    wrapper.loss(x).loss.backward()
    same_gradients(found, {name: weight.grad for name, weight in wrapper.named_parameters()})


def test_frozen_parameters_stay_without_gradient():
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    wrapper.model.token_emb.weight.requires_grad_(False)
    x = torch.randint(0, 20, (2, TOKENS))
    wrapper(x, memory_replay_backprop=True)
    wrapper(x, return_loss=True)[0].backward()
    assert wrapper.model.token_emb.weight.grad is None


def test_replay_under_autocast_is_one_graph_under_autocast():
    torch.manual_seed(1)
    sizes = dict(dim=32, num_tokens=20, depth=2, num_memory_tokens=3, seq_len=6, heads=2, dim_head=16)
    model = random_weights(RecurrentMemoryTransformer(**sizes))
    x, found = torch.randint(0, 20, (4, TOKENS)), {}
    for way in ('full', 'recompute', 'replay'):
        with torch.autocast('cpu', torch.bfloat16):
            loss, _, state = SegmentWrapper(model, recompute=way == 'recompute').loss(x, backward=way == 'replay')
        assert state.memory.dtype == torch.float32
        if way != 'replay':
            loss.backward()
        found[way] = gradients(model)
    for way in ('recompute', 'replay'):
        for name, want in found['full'].items():
            # sums of bfloat16 gradients in another order
            assert (found[way][name] - want).norm() <= 0.02 * want.norm() + 1e-6, name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'truncate_at_step': 0}, 'truncate_at_step is 0'),
        ({'backprop_segments': 0}, 'backprop_segments is 0'),
        ({'backprop_segments': 2, 'truncate_at_step': 3}, 'mean the same'),
        ({'segments_per_pass': 0}, 'segments_per_pass is 0'),
    ],
)
def test_bad_lengths_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentMemoryTransformerWrapper(make_rmt(), **options)


def test_published_truncation():
    model, x = make_rmt(), torch.randint(0, 20, (2, TOKENS))
    assert RecurrentMemoryTransformerWrapper(model, 2).backprop_segments == 2
    assert RecurrentMemoryTransformerWrapper(model, 2, backprop_segments=2).backprop_segments == 2
    want = run(model, 'full', x, None, 2)[2]
    for replay in (True, False):
        wrapper = RecurrentMemoryTransformerWrapper(model)
        if replay:
            wrapper(x, memory_replay_backprop=True, truncate_at_step=2)
        else:
            wrapper(x, return_loss=True, truncate_at_step=2)[0].backward()
        same_gradients(gradients(model), want)
    for call in ({}, {'return_loss': True}, {'memory_replay_backprop': True}):
        with pytest.raises(ValueError, match='truncate_at_step is 0'):
            RecurrentMemoryTransformerWrapper(model)(x, truncate_at_step=0, **call)
