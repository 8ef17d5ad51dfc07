"""The wrapper: losses over valid targets, states in and out, rows that do not disturb each other, generation."""

import pytest
import torch
import torch.nn.functional as F

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper, RMTState
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.state import leaves, map_state
from tests.conftest import INFINI_OPTIONS, RMT_OPTIONS, close, ids, make_infini, make_rmt
from tests.reference import mean_nll, rmt_row

BOTH = pytest.mark.parametrize('make', [make_rmt, make_infini])
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


@pytest.fixture
def always_warned():
    """PyTorch gives each of its own warnings once a process, so only to the first test that deserves it."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


HOLES = {
    'the last column that the first piece reads': [11],
    'the token that both pieces hold': [12],
    'the first target of the second piece': [13],
    'both sides of the cut': [11, 12],
    'all around the cut': [10, 11, 12, 13, 14],
    'to the end': list(range(12, 25)),
    'from the start': list(range(12)),
    'a segment before the cut': list(range(6, 12)),
    'far away': [3, 20],
}


@pytest.mark.parametrize('as_ids', [False, True])
@pytest.mark.parametrize(
    ('make', 'options'),
    [
        (make_rmt, RMT_OPTIONS['plain']),
        (make_rmt, RMT_OPTIONS['xl long']),
        (make_rmt, RMT_OPTIONS['axial']),
        (make_infini, INFINI_OPTIONS['delta, strength, decay']),
        (make_infini, INFINI_OPTIONS['deltanet']),
    ],
    ids=['rmt', 'rmt, xl', 'rmt, axial', 'infini, delta', 'infini, deltanet'],
)
def test_a_text_may_be_cut_where_it_is_padded(make, options, as_ids):
    """Two pieces, of which the second starts with the last column of the first, are one call in loss and state."""
    wrapper = SegmentWrapper(make(**options), segment_length=6)
    mask = torch.ones(len(HOLES) + 1, 25, dtype=torch.bool)
    for row, columns in enumerate(HOLES.values(), start=1):
        mask[row, columns] = False
    x = ids(*mask.shape)

    def losses(at, state):
        if as_ids:
            return wrapper.loss(x.masked_fill(~mask, -100)[:, at], state, reduction='none')
        return wrapper.loss(x[:, at], state, mask=mask[:, at], reduction='none')

    whole = losses(slice(None), None)
    first = losses(slice(13), None)
    second = losses(slice(12, None), first.state)
    close(torch.cat((first.loss, second.loss), 1), whole.loss)
    assert first.num_targets + second.num_targets == whole.num_targets
    for have, want in zip(leaves(second.state), leaves(whole.state), strict=True):
        close(have, want)


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
    yield dict(x=x, labels=x.to(torch.complex64)), 'labels are torch.complex64: give token ids'


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


@BOTH
def test_backward_without_anything_to_train_is_refused(make):
    wrapper, x = SegmentWrapper(make(), segment_length=6), ids(2, 15)
    wrapper.requires_grad_(False)
    with pytest.raises(ValueError, match=r'backward=True, but every parameter is frozen\. Unfreeze one, or leave'):
        wrapper.loss(x, backward=True)
    assert not wrapper.loss(x).loss.requires_grad
    # embeddings that somebody trains are something to train
    embeddings, labels = wrapper.model.token_emb(x).requires_grad_(), ids(2, 15)
    wrapper.loss(embeddings, labels=labels).loss.backward()
    expected, embeddings.grad = embeddings.grad, None
    wrapper.loss(embeddings, labels=labels, backward=True)
    close(embeddings.grad, expected)
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    # a state is a constant in replay: the message says what trains it
    state = map_state(lambda leaf: leaf.detach().requires_grad_(), wrapper.model.initial_state(2))
    with pytest.raises(ValueError, match='a state that is given is a constant here: recompute=True trains it'):
        wrapper.loss(x, state, backward=True)
    SegmentWrapper(wrapper.model, segment_length=6, recompute=True).loss(x, state).loss.backward()
    assert any(leaf.grad.any() for leaf in leaves(state))


def test_what_is_trained_without_an_influence_gets_zeros():
    """The first memory of a text that goes on from a state."""
    wrapper = SegmentWrapper(make_rmt())
    state = wrapper.logits(ids(2, 6))[1]
    wrapper.requires_grad_(False)
    wrapper.model.initial_memory.requires_grad_()
    wrapper.loss(ids(2, 15), state, backward=True)
    assert torch.equal(wrapper.model.initial_memory.grad, torch.zeros(3, 16, dtype=torch.float64))
    wrapper.loss(ids(2, 15), backward=True)
    assert wrapper.model.initial_memory.grad.any()


@BOTH
@pytest.mark.parametrize('options', [{'qk_norm': True}, {'qk_norm': True, 'heads': 4, 'kv_heads': 2}])
def test_queries_keys_and_values_share_the_dtype_of_autocast(make, options, monkeypatch, always_warned):
    """A norm whose gain has another dtype than its input gives float32, or a warning to be slow."""
    wrapper = SegmentWrapper(make(**options).float(), segment_length=6)
    dtypes, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, *args, **more):
        dtypes.append((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, *args, **more)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    for call in (
        lambda: wrapper.loss(ids(2, 15)).loss.backward(),
        lambda: wrapper.loss(ids(2, 15), backward=True),
        lambda: wrapper.logits(ids(2, 15), mask=torch.arange(15) < torch.tensor([[15], [7]])),
        lambda: wrapper.generate_tokens([ids(3), ids(9)], 9, temperature=0),
    ):
        dtypes.clear()
        with torch.autocast('cpu', torch.bfloat16):
            call()
        assert set(dtypes) == {(torch.bfloat16,) * 3}
        dtypes.clear()
        call()
        assert set(dtypes) == {(torch.float32,) * 3}


def bad_arguments_of_advance():
    good = torch.ones(2, 3, dtype=torch.float64)
    yield make_infini, {'scale': good}, "per_segment has 'scale', but InfiniTransformer.advance takes write_scale"
    yield make_infini, {'mask': good}, "per_segment has 'mask', but InfiniTransformer.advance takes write_scale"
    yield make_infini, {3: good}, 'per_segment has 3, but InfiniTransformer.advance takes write_scale'
    yield make_rmt, {'write_scale': good}, 'RecurrentMemoryTransformer.advance takes no further arguments'
    shape = r'give one value a segment, \(batch, segments\) = \(2, 3\)'
    yield make_infini, {'write_scale': good[:, :2]}, rf'write_scale has shape \(2, 2\): {shape}'
    yield make_infini, {'write_scale': good[:1]}, rf'write_scale has shape \(1, 3\): {shape}'
    yield make_infini, {'write_scale': good[..., None]}, rf'write_scale has shape \(2, 3, 1\): {shape}'
    yield make_infini, {'write_scale': 2.0}, rf'write_scale has shape no shape, but is 2\.0: {shape}'
    yield make_infini, {'write_scale': None}, rf'write_scale has shape no shape, but is None: {shape}'
    yield make_infini, {'write_scale': good * torch.nan}, 'write_scale holds NaN or infinite values'
    yield make_infini, {'write_scale': good / 0}, 'write_scale holds NaN or infinite values'
    yield make_infini, {'write_scale': good - 1.5}, 'write_scale holds negative numbers'
    yield make_infini, {'write_scale': good.to('meta')}, 'write_scale is on meta, the model on cpu'
    yield make_infini, {'write_scale': good > 0}, r'write_scale is torch\.bool: give numbers'
    yield make_infini, {'write_scale': good.to(torch.complex64)}, r'write_scale is torch\.complex64: give numbers'


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize(('make', 'per_segment', 'message'), list(bad_arguments_of_advance()))
def test_bad_arguments_of_advance_are_refused(make, per_segment, message, backward):
    wrapper = SegmentWrapper(make(), segment_length=6)
    with pytest.raises(ValueError, match=message):
        wrapper.loss(ids(2, 16), per_segment=per_segment, backward=backward)
    assert all(parameter.grad is None for parameter in wrapper.parameters())


@pytest.mark.parametrize('backward', [False, True])
def test_numbers_of_any_type_and_from_anywhere_say_how_often_a_segment_is_written(backward):
    wrapper, x = SegmentWrapper(make_infini(memory_rule='delta').float(), segment_length=6), ids(2, 16)
    with torch.inference_mode():
        scale = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, 3.0]])
    expected = wrapper.loss(x, per_segment={'write_scale': scale.clone()})
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
        found = wrapper.loss(x, per_segment={'write_scale': scale.to(dtype)}, backward=backward)
        close(found.loss.detach(), expected.loss.detach(), 1e-6)
        assert {leaf.dtype for leaf in leaves(found.state)} == {torch.float32}
    with pytest.raises(ValueError, match=r'write_scale has shape \(2, 2\): give \(batch, segments\) = \(2, 3\)'):
        wrapper.model.advance(x, segment_length=6, write_scale=scale[:, :2])


def test_rows_on_another_device_are_not_reset():
    wrapper = wrapped()
    with pytest.raises(ValueError, match='rows is on meta, the model on cpu: move one of them'):
        wrapper.reset(wrapper.logits(ids(2, 6))[1], torch.ones(2, dtype=torch.bool, device='meta'))


@pytest.mark.parametrize('option', ['segment_length', 'segments_per_pass', 'backprop_segments'])
def test_a_number_of_segments_or_tokens_is_no_bool(option):
    with pytest.raises(ValueError, match=f'{option} is True: give'):
        SegmentWrapper(make_rmt(), **{option: True})


@pytest.mark.parametrize('weight', [float('nan'), float('inf')])
def test_a_loss_weight_is_finite(weight):
    wrapper = wrapped()
    with pytest.raises(ValueError, match=f'mrbp_loss_weight is {weight}: give a finite number'):
        wrapper(ids(2, 6), memory_replay_backprop=True, mrbp_loss_weight=weight)
    assert all(parameter.grad is None for parameter in wrapper.parameters())


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


@pytest.mark.parametrize(
    'make',
    [
        lambda **options: RecurrentMemoryTransformerWrapper(make_rmt(), **options),
        lambda **options: InfiniTransformerWrapper(make_infini(), 6, **options),
    ],
)
def test_values_are_checked_unless_told_not_to(make):
    x = ids(2, 13)
    state = map_state(lambda t: t * float('nan'), make().loss(x).state)
    with pytest.raises(ValueError, match='NaN'):
        make().loss(x, state)
    assert make(check_values=False).loss(x, state).loss.isnan()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize('num_tokens', [100, 256, 300])
def test_labels_of_a_small_dtype_are_checked_and_counted_as_numbers(dtype, num_tokens):
    wrapper, x = SegmentWrapper(make_rmt(num_tokens=num_tokens), segment_length=4), ids(2, 6) % 10
    labels = (ids(2, 6) % 100).to(dtype)
    assert torch.equal(wrapper.loss(x, labels=labels).loss, wrapper.loss(x, labels=labels.long()).loss)
    assert torch.equal(wrapper.model(x, labels=labels)[0], wrapper.model(x, labels=labels.long())[0])
    if num_tokens == 100 and dtype == torch.uint8:
        labels[0, 3] = 156  # -100, if it is wrapped
        with pytest.raises(ValueError, match=r'a label is outside \[0, 100\)'):
            wrapper.loss(x, labels=labels)


def test_the_published_filter_may_be_named_none():
    wrapper = wrapped()
    assert wrapper.generate(ids(1, 4), length=8, filter_fn=None, temperature=0).shape == (1, 4)


@BOTH
def test_logits_take_the_options_of_a_call(make):
    wrapper, x = SegmentWrapper(make(), segment_length=4), torch.randn(1, 12, 16, requires_grad=True)
    other = SegmentWrapper(wrapper.model, segment_length=3, backprop_segments=1)
    logits = wrapper.logits(x, segment_length=3, backprop_segments=1)[0]
    close(logits, other.logits(x)[0])
    (gradient,) = torch.autograd.grad(logits[:, -1].sum(), x)
    assert gradient[:, 9:].ne(0).any()
    assert not gradient[:, :9].any()
    with pytest.raises(ValueError, match='backprop_segments is 0'):
        wrapper.logits(x, backprop_segments=0)


def test_truncation_counts_for_logits_under_its_published_name():
    wrapper, x = RecurrentMemoryTransformerWrapper(make_rmt()), torch.randn(1, 18, 16, requires_grad=True)
    for k, reached in ((None, True), (1, False)):
        (gradient,) = torch.autograd.grad(wrapper(x, truncate_at_step=k)[0][:, -1].sum(), x)
        assert bool(gradient[:, 0].ne(0).any()) == reached


def test_a_wrong_name_of_a_choice_is_a_value_error():
    with pytest.raises(ValueError, match="write_init='foo'"):
        make_rmt(write_init='foo')
    with pytest.raises(ValueError, match="reduction='max'"):
        SegmentWrapper(make_rmt()).loss(ids(1, 4), reduction='max')


def test_an_unknown_option_of_generation_is_named_with_those_that_exist():
    with pytest.raises(TypeError, match=r"no option 'eos_token': its options are state, .*eos_token_id, .*top_p"):
        SegmentWrapper(make_rmt()).generate_tokens(ids(1, 4), 2, eos_token=3)


def test_a_scale_of_segments_can_be_trained_with_a_frozen_model():
    wrapper, x = SegmentWrapper(make_infini(memory_rule='linear'), segment_length=6), ids(2, 15)
    wrapper.requires_grad_(False)
    scale = torch.rand(2, 3, requires_grad=True)
    wrapper.loss(x, per_segment={'write_scale': scale}).loss.backward()
    expected, scale.grad = scale.grad, None
    wrapper.loss(x, per_segment={'write_scale': scale}, backward=True)
    assert expected.any()
    close(scale.grad, expected)


@BOTH
def test_the_segment_length_of_a_wrapper_can_be_set_anew(make):
    wrapper, x = SegmentWrapper(make(), segment_length=6), ids(2, 15)
    wrapper.segment_length = 4
    close(wrapper.loss(x).loss, wrapper.loss(x, segment_length=4).loss)
    wrapper.segment_length = 0
    for call in (wrapper.loss, wrapper.logits, wrapper.read, lambda x: wrapper.generate_tokens(x, 3)):
        with pytest.raises(ValueError, match='segment_length is 0'):
            call(x)


@BOTH
def test_what_labels_say_at_padded_positions_has_no_effect(make):
    wrapper, x, labels = SegmentWrapper(make(), segment_length=6), ids(2, 15), ids(2, 15)
    mask = torch.arange(15) < torch.tensor([[15], [11]])
    wanted = wrapper.loss(x, labels=labels, mask=mask).loss
    close(wrapper.loss(x, labels=labels.masked_fill(~mask, 9999), mask=mask).loss, wanted)
    with pytest.raises(ValueError, match=r'a label is outside \[0, 20\)'):
        wrapper.loss(x, labels=labels.masked_fill(mask, 9999), mask=mask)


@BOTH
def test_hidden_states_are_those_of_the_segments(make):
    wrapper, x = SegmentWrapper(make(), segment_length=6), ids(2, 15)
    mask = torch.arange(15) < torch.tensor([[15], [11]])
    hidden, state = wrapper.hidden(x, mask=mask)
    want, pieces = None, []
    for piece, valid in zip(x.split(6, dim=1), mask.split(6, dim=1), strict=True):
        one, want = wrapper.model.advance(piece, want, segment_length=6, mask=valid)
        pieces.append(one)
    close(hidden[mask], torch.cat(pieces, dim=1)[mask])
    for have, expected in zip(leaves(state), leaves(want), strict=True):
        close(have, expected)
    close(wrapper.logits(x, mask=mask)[0], wrapper.model.to_logits(hidden))
    nothing, state = wrapper.hidden(x[:, :0])
    assert nothing.shape == (2, 0, 16)
    assert wrapper.logits(x[:, :0])[0].shape == (2, 0, 20)


@BOTH
@pytest.mark.parametrize('backprop_segments', [None, 2])
def test_logits_are_recomputed_if_the_wrapper_says_so(make, backprop_segments):
    """For a loss of one's own: the gradients of one graph, with dropout too, and nothing kept but borders."""
    model, x = make(ff_dropout=0.2), ids(2, 30)
    found, kept = [], []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        wrapper = SegmentWrapper(
            model, segment_length=6, segments_per_pass=1, recompute=recompute, backprop_segments=backprop_segments
        )
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            hidden, _ = wrapper.hidden(x)
        kept.append(sum(saved))
        model.to_logits(hidden).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        if gradient is not None:
            close(found[1][name], gradient)
    assert kept[1] < kept[0] / 20


def test_what_is_no_model_is_refused_with_the_way_out():
    averaged = torch.optim.swa_utils.AveragedModel(make_rmt())
    with pytest.raises(ValueError, match=r'is a AveragedModel: give a SegmentModel.*averaged\.module'):
        SegmentWrapper(averaged)
    SegmentWrapper(averaged.module)
    model = make_rmt()
    del model.dim
    with pytest.raises(ValueError, match=r'RecurrentMemoryTransformer\.dim is None: a model sets num_tokens and dim'):
        SegmentWrapper(model)
