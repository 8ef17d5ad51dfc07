"""States as values: whose memory they are, what they may hold, and where they may come from."""

import pytest
import torch

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper, RMTState
from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.state import detach, leaves, map_state
from tests.conftest import INFINI_OPTIONS, RMT_OPTIONS, close, ids, make_infini, make_rmt, same_gradients

LENGTH = 6
MODELS = {f'rmt, {name}': (make_rmt, options) for name, options in RMT_OPTIONS.items()}
MODELS |= {f'infini, {name}': (make_infini, options) for name, options in INFINI_OPTIONS.items()}
EVERY = pytest.mark.parametrize('case', MODELS)
FEW = pytest.mark.parametrize('case', ['rmt, plain', 'rmt, xl', 'rmt, axial', 'infini, delta, strength, decay'])


def wrapped(case, **more):
    make, options = MODELS[case]
    return SegmentWrapper(make(**options), segment_length=LENGTH, **more)


def storages(*trees):
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(trees) if leaf.numel()}


def states_after_nothing(wrapper, state):
    """Every way to a state along which no token is read, after `state` (None: at the start), by name."""
    model, x, labels = wrapper.model, ids(2, 1), ids(2, 1)
    yield 'logits', wrapper.logits(x[:, :0], state)[1]
    yield 'loss', wrapper.loss(x[:, :0], state, labels=labels[:, :0]).state
    yield 'replay', wrapper.loss(x[:, :0], state, labels=labels[:, :0], backward=True).state
    yield 'loss without a sum', wrapper.loss(x[:, :0], state, labels=labels[:, :0], reduction='none').state
    yield 'advance', model.advance(x[:, :0], state)[1]
    yield 'advance without hidden states', model.advance(x[:, :0], state, need_hidden=False)[1]
    if model.causal:
        yield 'loss of one token, which is only a target', wrapper.loss(x, state).state
        yield 'replay of one token', wrapper.loss(x, state, backward=True).state
    if state is not None:
        yield 'reset of no row', wrapper.reset(state, torch.zeros(2, dtype=torch.bool))


@EVERY
def test_a_state_after_nothing_is_a_copy_of_the_one_before(case):
    wrapper = wrapped(case)
    given = detach(wrapper.logits(ids(2, 15))[1])
    others = storages(*wrapper.parameters(), given)
    for state in (None, given):
        expected = wrapper.model.initial_state(2) if state is None else given
        shared = []
        for way, after in states_after_nothing(wrapper, state):
            for have, want in zip(leaves(after), leaves(expected), strict=True):
                assert torch.equal(have, want), way
            parts = sum(leaf.numel() > 0 for leaf in leaves(after))
            if storages(after) & others or len(storages(after)) < parts:
                shared.append(way)
        assert not shared


@pytest.mark.parametrize('length', [0, 1])
@pytest.mark.parametrize('replay', [False, True])
def test_memories_of_an_empty_piece_stay_when_the_model_learns(length, replay):
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    options = {'memory_replay_backprop': True, 'return_memories': True} if replay else {'return_loss': True}
    _, memories = wrapper(ids(2, length), **options)
    _, of_logits = wrapper(ids(2, 0))
    kept = memories.detach().clone()
    wrapper(ids(2, 13), memory_replay_backprop=True)
    torch.optim.SGD(wrapper.parameters(), lr=1.0).step()
    assert not torch.equal(wrapper.model.initial_state(2).memory, kept)
    assert torch.equal(memories, kept)
    assert torch.equal(of_logits, kept)


def test_memories_that_are_reset_nowhere_are_a_copy():
    wrapper, nowhere = RecurrentMemoryTransformerWrapper(make_rmt()), torch.zeros(2, dtype=torch.bool)
    _, memories = wrapper(ids(2, 9))
    again = wrapper.reset(memories, nowhere)
    assert torch.equal(again, memories)
    assert not storages(again) & storages(memories)
    infini = InfiniTransformerWrapper(make_infini(), LENGTH)
    _, memories = infini(ids(2, 9), return_memories=True)
    assert not storages(infini.reset(memories, nowhere)) & storages(memories)


@EVERY
@pytest.mark.parametrize('way', ['one graph', 'recompute', 'replay'])
def test_a_state_made_in_inference_mode_is_trained_on_as_its_copy_is(case, way):
    wrapper, x, labels = wrapped(case, recompute=way == 'recompute'), ids(2, 15), ids(2, 15)
    with torch.inference_mode():
        _, made = wrapper.logits(x)
    copy = map_state(torch.clone, made)
    assert all(leaf.is_inference() for leaf in leaves(made))
    found = []
    for state in (made, copy):
        wrapper.zero_grad()
        returned = wrapper.loss(x, state, labels=labels, backward=way == 'replay')
        if way != 'replay':
            returned.loss.backward()
        found.append((returned.loss.detach(), {name: p.grad for name, p in wrapper.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    same_gradients(found[0][1], found[1][1], 0)


@FEW
def test_everything_that_a_call_takes_may_be_made_in_inference_mode(case):
    wrapper = wrapped(case)
    with torch.inference_mode():
        x, labels, rows = ids(2, 15), ids(2, 15), torch.tensor([True, False])
        mask = torch.arange(15) < torch.tensor([[15], [9]])
        cursor = wrapper.read(x)
        _, state = wrapper.logits(x)
    for backward in (False, True):
        expected = wrapper.loss(x.clone(), wrapper.reset(map_state(torch.clone, state), rows.clone())).loss
        close(wrapper.loss(x, wrapper.reset(state, rows), backward=backward).loss, expected.detach(), 1e-12)
        attached = wrapper.logits(x)[1]
        loss = wrapper.loss(x, wrapper.reset(attached, rows), labels=labels, mask=mask, backward=backward).loss
        if not backward:
            loss.backward()
        assert wrapper.loss(x, cursor.state, backward=backward).loss.isfinite()
    new = wrapper.generate_tokens(x, 9, temperature=0)
    assert torch.equal(wrapper.generate_tokens(None, 9, state=cursor, temperature=0), new)


def test_a_segment_goes_on_from_a_cache_made_in_inference_mode():
    model, x = make_infini(learned_delta_update=True, memory_decay=True), ids(2, 6)
    with torch.inference_mode():
        _, cache, _ = model(x[:, :4])
    gradients = []
    for given in (cache, map_state(torch.clone, cache)):
        model.zero_grad()
        logits, _, memories = model(x[:, 4:], None, given, return_new_memories=True)
        (logits.sum() + sum(leaf.sum() for leaf in leaves(memories))).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    same_gradients(*gradients, 0)


@EVERY
def test_a_batch_without_rows_is_read(case):
    wrapper, x = wrapped(case), ids(0, 15)
    logits, state = wrapper.logits(x)
    assert logits.shape == (0, 15, 20)
    wrapper.logits(x, state, mask=torch.ones(0, 15, dtype=torch.bool))
    assert wrapper.loss(x, state, labels=x).loss == 0
    assert wrapper.loss(x, labels=x, backward=True).loss == 0
    for leaf in leaves(wrapper.reset(state, torch.zeros(0, dtype=torch.bool))):
        assert leaf.shape[0] == 0
    for parameter in wrapper.parameters():
        assert not parameter.grad.any()


def replaced(state, **parts):
    """The state with other parts, by their path: memory, or xl_counts for the counts of xl."""
    for path, value in parts.items():
        part, _, field = path.partition('_')
        inner = getattr(state, part)
        state = state._replace(**{part: inner._replace(**{field: value}) if field else value})
    return state


def bad_states():
    xl, axial = wrapped('rmt, xl').logits(ids(2, 9))[1], wrapped('rmt, axial').logits(ids(2, 9))[1]
    infini = wrapped('infini, linear').logits(ids(2, 9))[1]
    yield 'rmt, xl', replaced(xl, xl_counts=torch.tensor([7, 3])), r'state\.xl\.counts holds numbers outside 0 to 6'
    yield 'rmt, xl', replaced(xl, xl_counts=torch.tensor([0, -1])), r'state\.xl\.counts holds numbers outside 0 to 6'
    yield 'rmt, xl', replaced(xl, xl_counts=torch.tensor([1.0, 2.0])), r'state\.xl\.counts: torch\.float32'
    yield 'rmt, xl', replaced(xl, xl_counts=torch.tensor([1])), r'state\.xl\.counts: shape \(1,\)'
    yield 'rmt, xl', replaced(xl, xl_counts=3), r'state\.xl\.counts is a int: give a tensor'
    yield 'rmt, xl', replaced(xl, xl_keys=None), r'state\.xl\.keys is a NoneType: give a tensor'
    yield 'rmt, xl', replaced(xl, xl_values=xl.xl.values[:, :, :, 1:]), 'XL keys .* and values'
    yield 'rmt, xl', replaced(xl, xl='xl'), r'state\.xl is str, this model has XLMemory there'
    yield 'rmt, axial', replaced(axial, past_counts=torch.tensor([3, 0])), r'past\.counts holds numbers outside 0 to 2'
    yield 'rmt, axial', replaced(axial, past_counts=torch.tensor([-1, 0])), r'past\.counts holds numbers outside 0 to 2'
    yield 'rmt, axial', replaced(axial, past_counts=None), r'state\.past\.counts is a NoneType: give a tensor'
    yield 'rmt, axial', replaced(axial, past_memories='past'), r'state\.past\.memories is a str: give a tensor'
    yield 'rmt, axial', replaced(axial, past=None), r'state\.past is None, this model has PastMemories there'
    yield 'rmt, plain', RMTState(None), r'state\.memory is a NoneType: give a tensor, as the last call returned it'
    yield 'rmt, plain', RMTState('memory'), r'state\.memory is a str: give a tensor'
    yield 'rmt, plain', 'memory', 'state is str, this model has RMTState there'
    yield 'infini, linear', [None, None], r'state\[0\] is None, this model has Memories there'
    yield 'infini, linear', ['m', 'm'], r'state\[0\] is str, this model has Memories there'
    yield 'infini, linear', [(None, None), (None, None)], r'state\[0\]\.kv_mem is a NoneType: give a tensor'
    yield 'infini, linear', [('M', 'z'), ('M', 'z')], r'state\[0\]\.kv_mem is a str: give a tensor'
    yield 'infini, linear', [infini[0], infini[1]._replace(k_norm=None)], r'state\[1\]\.k_norm is a NoneType'
    yield 'infini, linear', [infini[0], infini[1]._replace(k_norm=-infini[1].k_norm)], 'state holds a k_norm below 0'


@pytest.mark.parametrize(('case', 'state', 'message'), list(bad_states()))
def test_a_state_that_no_call_returned_is_refused_wherever_it_is_given(case, state, message):
    wrapper, x = wrapped(case), ids(2, 9)
    for call in (
        lambda: wrapper.logits(x, state),
        lambda: wrapper.loss(x, state),
        lambda: wrapper.loss(x, state, backward=True),
        lambda: wrapper.model(x[:, :LENGTH], state),
        lambda: wrapper.read(x, state),
        lambda: wrapper.generate_tokens(x, 3, state=state),
        lambda: wrapper.generate_tokens(None, 3, state=Cursor(state, x, torch.tensor([9, 9]))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(parameter.grad is None for parameter in wrapper.parameters())


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_a_model_on_meta_says_that_it_has_no_weights(make, device):
    model, x = make().to('meta'), ids(2, 5).to(device)
    wrapper = SegmentWrapper(model, segment_length=6)
    for call in (
        lambda: model(x),
        lambda: wrapper.logits(x),
        lambda: wrapper.loss(x, backward=True),
        lambda: wrapper.read(x),
        lambda: wrapper.generate_tokens(x, 3),
        lambda: wrapper.generate_tokens(None, 3, batch_size=2),
        lambda: wrapper.reset(model.initial_state(2), torch.ones(2, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match='the model is on the meta device, where it has no weights: make it on'):
            call()
