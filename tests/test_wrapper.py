"""The wrapper: losses over valid targets, states in and out, rows that do not disturb each other, generation."""

import pytest
import torch

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper, RMTState
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.state import leaves
from tests.conftest import RMT_OPTIONS, close, ids, make_rmt
from tests.reference import mean_nll, rmt_row

CAUSAL = {name: options for name, options in RMT_OPTIONS.items() if options.get('causal', True)}


def wrapped(**options):
    return RecurrentMemoryTransformerWrapper(make_rmt(**options))


@pytest.mark.parametrize('options', CAUSAL.values(), ids=CAUSAL.keys())
def test_loss_and_logits_equal_the_definition(options):
    wrapper, x = wrapped(**options), ids(2, 20)
    logits, memories = wrapper(x)
    loss, _ = wrapper(x, return_loss=True)
    rows = [rmt_row(wrapper.model, row) for row in x]
    expected = wrapper.model.to_logits(torch.stack([hidden for hidden, _, _ in rows]))
    close(logits, expected)
    close(memories.memory if isinstance(memories, RMTState) else memories, torch.stack([row[1] for row in rows]))
    close(loss, mean_nll(expected[:, :-1], x[:, 1:]))


@pytest.mark.parametrize('options', [CAUSAL['plain'], CAUSAL['xl long']], ids=['plain', 'xl'])
def test_one_call_is_two_calls_with_the_state_between(options):
    wrapper, x = wrapped(**options), ids(2, 31)
    whole = wrapper.loss(x, reduction='sum')
    # the last token of a piece is the first of the next
    first = wrapper.loss(x[:, :13], reduction='sum')
    second = wrapper.loss(x[:, 12:], first.state, reduction='sum')
    close(first.loss + second.loss, whole.loss)
    assert first.num_targets + second.num_targets == whole.num_targets == 60
    for a, b in zip(leaves(second.state), leaves(whole.state), strict=True):
        close(a, b)
    logits, state = wrapper.logits(x[:, :12])
    close(torch.cat((logits, wrapper.logits(x[:, 12:], state)[0]), 1), wrapper.logits(x)[0])


def test_reductions_and_labels():
    wrapper, x, labels = wrapped(), ids(3, 14), ids(3, 14)
    labels[0, :9], labels[1, 3], labels[2] = -100, wrapper.ignore_index, -1
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[1, 10:] = False
    logits, _ = wrapper(x, mask=mask)
    targets = labels.masked_fill((labels < 0) | ~mask, -100)
    none, count, _ = wrapper.loss(x, labels=labels, mask=mask, reduction='none')
    assert none.shape == (3, 14)
    assert count == (targets >= 0).sum() == 14
    assert not none[targets < 0].any()
    close(none.sum(), wrapper.loss(x, labels=labels, mask=mask, reduction='sum').loss)
    close(none.sum() / 14, wrapper.loss(x, labels=labels, mask=mask).loss)
    close(wrapper(x, labels=labels, mask=mask)[0], mean_nll(logits, targets))


def test_the_mean_is_over_tokens_not_over_segments():
    wrapper, x = wrapped(), ids(1, 12)
    labels = x.clone()
    labels[:, 2:6] = -100
    logits, _ = wrapper(x)
    close(wrapper(x, labels=labels)[0], mean_nll(logits, labels))
    halves = [mean_nll(logits[:, at], labels[:, at]) for at in (slice(0, 6), slice(6, 12))]
    assert not torch.isclose(sum(halves) / 2, wrapper(x, labels=labels)[0])


def test_padding_ids_without_labels():
    wrapper, x = wrapped(), ids(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 9:], mask[2, [4, 12]] = False, False
    expected = wrapper.loss(x, mask=mask)
    assert expected.num_targets == 19 + 8 + 15
    for padding in (-100, wrapper.ignore_index):
        padded = wrapper.loss(x.masked_fill(~mask, padding))
        close(padded.loss, expected.loss)
        close(wrapper.logits(x.masked_fill(~mask, padding))[0][mask], wrapper.logits(x, mask=mask)[0][mask])
        assert padded.num_targets == expected.num_targets
    alone = [wrapper.loss(x[:1], reduction='sum'), wrapper.loss(x[1:2, :9], reduction='sum')]
    rows = wrapper.loss(x, mask=mask, reduction='none').loss.sum(1)
    close(rows[0], alone[0].loss)
    close(rows[1], alone[1].loss)
    # only the last column is a target and not read: a row that is padded there has been read whole
    close(expected.state.memory[1:2], wrapper.logits(x[1:2, :9])[1].memory)


def test_nothing_to_learn_is_a_zero_loss():
    wrapper = wrapped()
    for x, labels in ((ids(2, 1), None), (ids(2, 8), torch.full((2, 8), -100)), (torch.full((2, 9), -100), None)):
        loss, num_targets, state = wrapper.loss(x, labels=labels)
        assert loss == 0
        assert num_targets == 0
        loss.backward()
        assert not any(parameter.grad.any() for parameter in wrapper.parameters())
        assert wrapper.loss(x, labels=labels, backward=True).loss == 0
    assert torch.equal(wrapper.loss(torch.full((2, 9), -100)).state.memory, wrapper.model.initial_state(2).memory)
    state = wrapper.logits(ids(2, 9))[1]
    assert torch.equal(wrapper.loss(torch.full((2, 9), -100), state).state.memory, state.memory)
    assert wrapper.loss(ids(2, 1), reduction='none').loss.shape == (2, 0)
    for length in (0, 1):
        loss, memories = wrapper(ids(2, length), return_loss=True)
        assert loss == 0
        assert torch.equal(memories, wrapper.model.initial_state(2).memory)
        assert wrapper(ids(2, length), memory_replay_backprop=True, return_memories=True)[0] == 0
    assert wrapper.logits(ids(2, 0))[0].shape == (2, 0, 20)


def test_alignment_of_a_short_segment():
    model, x = make_rmt(), ids(2, 14)
    logits, state = SegmentWrapper(model, align='right').logits(x)
    expected, after = [], None
    for piece in (x[:, :2], x[:, 2:8], x[:, 8:]):
        part, after = model(piece, after)
        expected.append(part)
    close(logits, torch.cat(expected, 1))
    close(state.memory, after)
    assert not torch.allclose(logits, SegmentWrapper(model).logits(x)[0])


def test_shorter_segments_than_the_model_reads():
    model, x = make_rmt(), ids(1, 9)
    logits, _ = RecurrentMemoryTransformerWrapper(model, segment_length=3)(x)
    first, memory = model(x[:, :3])
    second, memory = model(x[:, 3:6], memory)
    close(logits, torch.cat((first, second, model(x[:, 6:], memory)[0]), 1))


def test_reset_starts_some_rows_again():
    for options in (CAUSAL['plain'], CAUSAL['xl']):
        wrapper, x, y = wrapped(**options), ids(3, 12), ids(3, 12)
        _, state = wrapper.logits(x)
        rows = torch.tensor([False, True, False])
        logits, _ = wrapper.logits(y, wrapper.reset(state, rows))
        close(logits[1:2], wrapper.logits(y[1:2])[0])
        close(logits[:1], wrapper.logits(y, state)[0][:1])
        assert wrapper.reset(None, rows) is None
        assert all(map(torch.equal, leaves(wrapper.reset(state, ~rows & rows)), leaves(state)))
    wrapper = wrapped()
    _, memories = wrapper(x, return_loss=True)
    close(wrapper.reset(memories, rows)[1], wrapper.model.initial_memory)
    close(wrapper.loss(y, memories).loss, wrapper(y, memories, return_loss=True)[0])


def test_an_encoder_needs_labels():
    wrapper, x = wrapped(causal=False), ids(2, 14)
    with pytest.raises(ValueError, match='sees the next token'):
        wrapper(x, return_loss=True)
    loss, _ = wrapper(x, labels=x)
    close(loss, mean_nll(wrapper(x)[0], x))


def bad_calls():
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.bool)
    yield dict(x=x, labels=x[:, :8], backward=True), 'labels have shape'
    yield dict(x=x + 15, backward=True), 'outside'
    yield dict(x=x, mask=mask[:, :8], backward=True), 'mask has shape'
    yield dict(x=x, mask=mask.float(), backward=True), 'mask is torch.float32'
    yield dict(x=x, state=RMTState(torch.zeros(3, 3, 16, dtype=torch.float64)), backward=True), 'shape'
    yield dict(x=x, state=RMTState(torch.zeros(2, 3, 16)), backward=True), 'float32'
    yield dict(x=x, state=[torch.zeros(2, 3, 16, dtype=torch.float64)], backward=True), 'list'
    yield dict(x=x, backward=True, reduction='none'), 'needs a scalar'
    yield dict(x=x, backward_fn=print), 'only called with backward=True'
    yield dict(x=torch.randn(2, 9, 16, dtype=torch.float64), backward=True), 'give labels'
    yield dict(x=x, backprop_segments=0), 'backprop_segments is 0'


@pytest.mark.parametrize(('call', 'message'), list(bad_calls()))
def test_a_refused_call_changes_nothing(call, message):
    wrapper = SegmentWrapper(make_rmt())
    wrapper.train()
    given = call['x'].clone()
    with pytest.raises(ValueError, match=message):
        wrapper.loss(**call)
    assert wrapper.training
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    assert torch.equal(call['x'], given)


def test_other_refusals():
    wrapper = wrapped()
    with pytest.raises(ValueError, match='segment_length is 7: give 1 to 6'):
        SegmentWrapper(wrapper.model, segment_length=7)
    with pytest.raises(ValueError, match='segment_length is 0'):
        SegmentWrapper(wrapper.model, segment_length=0)
    with pytest.raises(ValueError, match='rows is'):
        wrapper.reset(wrapper.logits(ids(2, 6))[1], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='need memory_replay_backprop'):
        wrapper(ids(2, 6), return_loss=True, mrbp_loss_weight=0.5)
    with torch.no_grad(), pytest.raises(ValueError, match='no_grad'):
        wrapper(ids(2, 6), memory_replay_backprop=True)
