"""Tasks and their curriculum: what is asked is there, no shortcut is, and a model of any kind learns them unchanged."""

import math

import pytest
import torch

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.tasks import (
    PIECE_SEGMENTS,
    AssociativeRetrieval,
    Copy,
    Memorize,
    SegmentCurriculum,
    accuracy,
    virtual_lengths,
)
from tests.conftest import close, make_infini, make_rmt


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('options', [{}, {'anywhere': True}, {'repeated': True}, {'key_length': 3}])
def test_memorize_asks_for_what_was_marked(options):
    task = Memorize(values=5, noise=9, segment_length=8, **options)
    tokens, labels = task.batch(4, 300, seeded())
    assert tokens.shape == labels.shape == (300, 32)
    k, segments = task.key_length, set()
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row.count(task.mark) == 1
        place = row.index(task.mark)
        segments.add(place // 8)
        answer = row[place + 1 : place + 1 + k]
        assert wanted[-k:] == answer
        assert set(wanted[:-k]) == {IGNORE}
        assert row[-k] == task.query
        assert row[len(row) - k + 1 :] == answer[:-1]  # teacher forcing
        assert place // 8 == (place + k) // 8
    assert segments == ({0, 1, 2} if task.anywhere else {0})
    # a value says nothing where it is not marked
    if not options:
        noise = tokens[:, 8:24].flatten().bincount(minlength=9).double()
        assert ((noise / noise.sum() - 1 / 9).abs() < 0.02).all()
    assert tokens.max() < task.num_tokens
    assert task.without_memory == 1 / 5


def test_long_sequences_come_in_pieces_and_the_mark_is_in_one_of_them():
    task = Memorize(segment_length=4, anywhere=True)
    pieces = list(task.pieces(2 * PIECE_SEGMENTS + 3, 50, seeded()))
    assert [tokens.shape[1] // 4 for tokens, _ in pieces] == [PIECE_SEGMENTS, PIECE_SEGMENTS, 2, 1]
    whole = torch.cat([tokens for tokens, _ in pieces], 1)
    assert ((whole == task.mark).sum(1) == 1).all()
    marked = whole.gather(1, (whole == task.mark).int().argmax(1, keepdim=True) + 1)
    assert torch.equal(marked[:, 0], pieces[-1].labels[:, -1])


@pytest.mark.parametrize('key_length', [1, 3])
def test_in_one_segment_mark_and_question_stand_together(key_length):
    task = Memorize(segment_length=8, key_length=key_length, anywhere=True)
    tokens, labels = task.batch(1, 200, seeded())
    assert tokens.shape == (200, 8)
    place = (tokens == task.mark).int().argmax(1, keepdim=True) + 1
    marked = tokens.gather(1, place + torch.arange(key_length))
    assert torch.equal(marked, labels[:, -key_length:])
    assert (tokens[:, -key_length] == task.query).all()
    assert place.unique().tolist() == list(range(1, 9 - 2 * key_length))


@pytest.mark.parametrize('rewritten', [False, True])
def test_associative_retrieval_asks_for_the_last_value_of_a_key(rewritten):
    task = AssociativeRetrieval(keys=7, values=4, pairs_per_segment=2, rewritten=rewritten)
    tokens, labels = task.batch(4, 200, seeded())
    assert tokens.shape == (200, 16)
    repeats = 0
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = list(zip(row[0:12:2], row[1:12:2], strict=True))
        assert row[-2] == task.go
        assert dict(pairs)[row[-1]] == wanted[-1]  # a dict keeps the last
        assert set(wanted[:-1]) == {IGNORE}
        repeats += len(dict(pairs)) < len(pairs)
    assert bool(repeats) == rewritten
    assert tokens.max() < task.num_tokens


def test_copy_and_reverse():
    tokens, labels = Copy(alphabet=5, segment_length=4).batch(6, 50, seeded())
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert wanted[:8] == [IGNORE] * 8
        assert wanted[8:] == row[:8] * 2
        assert row[8:] == [5, *wanted[8:-1]]
    tokens, labels = Copy(alphabet=5, segment_length=4, reverse=True).batch(4, 50, seeded())
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert wanted[8:] == row[:8][::-1]


@pytest.mark.parametrize('task', [Memorize(), AssociativeRetrieval(), Copy()], ids=lambda task: type(task).__name__)
def test_tasks_are_seeded(task):
    a, b, c = (task.batch(3, 4, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])


def test_bad_tasks_are_refused():
    for task, segments, message in [
        (Memorize(), 0, 'at least 1'),
        (Memorize(segment_length=4, key_length=2), 1, 'of at least 5 tokens'),
        (AssociativeRetrieval(keys=4), 6, 'give 2 to 5, or rewritten'),
        (Copy(), 4, 'a multiple of 3'),
        (Copy(reverse=True), 0, 'a multiple of 2'),
    ]:
        with pytest.raises(ValueError, match=message):
            task.batch(segments, 2, seeded())
    with pytest.raises(ValueError, match='give 1 to noise=64'):
        Memorize(values=65)
    with pytest.raises(ValueError, match='for mark and value'):
        Memorize(segment_length=3, key_length=3)
    with pytest.raises(ValueError, match='growing'):
        SegmentCurriculum([2, 2])
    with pytest.raises(ValueError, match='growing'):
        SegmentCurriculum([])


BAD_TASKS = [
    (Memorize, {'key_length': 0}, 'key_length is 0: give a whole number from 1 on'),
    (Memorize, {'key_length': -1}, 'key_length is -1: give a whole number from 1 on'),
    (Memorize, {'key_length': 1.5}, r'key_length is 1\.5: give a whole number from 1 on'),
    (Memorize, {'values': 0}, 'values is 0: give a whole number from 1 on'),
    (Memorize, {'values': 2.5}, r'values is 2\.5: give a whole number from 1 on'),
    (Memorize, {'noise': 'x'}, "noise is 'x': give a whole number from 1 on"),
    (Memorize, {'segment_length': True}, 'segment_length is True: give a whole number from 1 on'),
    (AssociativeRetrieval, {'pairs_per_segment': 0}, 'pairs_per_segment is 0: give a whole number from 1 on'),
    (AssociativeRetrieval, {'pairs_per_segment': 1.5}, r'pairs_per_segment is 1\.5: give a whole number from 1 on'),
    (AssociativeRetrieval, {'keys': 0}, 'keys is 0: give a whole number from 1 on'),
    (AssociativeRetrieval, {'values': -3}, 'values is -3: give a whole number from 1 on'),
    (Copy, {'alphabet': 0}, 'alphabet is 0: give a whole number from 1 on'),
    (Copy, {'alphabet': 2.5}, r'alphabet is 2\.5: give a whole number from 1 on'),
    (Copy, {'segment_length': 0}, 'segment_length is 0: give a whole number from 1 on'),
    (Copy, {'copies': 0}, 'copies is 0: give a whole number from 1 on'),
    (SegmentCurriculum, {'stages': [2], 'patience': 0}, 'patience is 0: give a whole number from 1 on'),
    (SegmentCurriculum, {'stages': [2], 'patience': 2.5}, r'patience is 2\.5: give a whole number from 1 on'),
    (SegmentCurriculum, {'stages': [2], 'mix': math.nan}, r'mix is nan: give a share of steps in \[0, 1\)'),
    (SegmentCurriculum, {'stages': [2], 'mix': 1}, r'mix is 1: give a share of steps in \[0, 1\)'),
    (SegmentCurriculum, {'stages': [2], 'threshold': math.nan}, 'threshold is nan: give a finite number'),
    (SegmentCurriculum, {'stages': [0, 1]}, r'stages=\[0, 1\]: give growing numbers of segments, from 1 on'),
    (SegmentCurriculum, {'stages': [1.5, 2]}, r'stages=\[1\.5, 2\]: give growing numbers of segments, from 1 on'),
    (SegmentCurriculum, {'stages': 'ab'}, r"stages=\['a', 'b'\]: give growing numbers of segments, from 1 on"),
]


@pytest.mark.parametrize(('make', 'options', 'message'), BAD_TASKS)
def test_values_outside_their_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize('task', [Memorize(), AssociativeRetrieval(), Copy()], ids=lambda task: type(task).__name__)
def test_a_batch_has_whole_numbers_of_rows_and_segments(task):
    for batch_size in (0, -1, 2.5, True, 'x'):
        with pytest.raises(ValueError, match=f'batch_size is {batch_size!r}: give a whole number from 1 on'):
            task.batch(6, batch_size, seeded())
    for segments in (2.5, math.nan, 'x', True):
        with pytest.raises(ValueError, match=f'{segments!r} segments: give a whole number'):
            task.batch(segments, 2, seeded())


def bad_scores():
    yield {'batch_size': 0}, 'batch_size is 0: give a whole number from 1 on'
    yield {'batch_size': 1.5}, r'batch_size is 1\.5: give a whole number from 1 on'
    yield {'wrapper': SegmentWrapper(make_rmt(num_tokens=3))}, 'the model has num_tokens=3, the task needs 4'
    yield {'wrapper': SegmentWrapper(make_rmt(), segment_length=5)}, 'the wrapper has segment_length=5, the task 6'
    yield {'wrapper': SegmentWrapper(make_rmt().to('meta'))}, 'the model is on the meta device'
    yield {'segments': 4}, '4 segments: give a multiple of 3'


@pytest.mark.parametrize(('call', 'message'), list(bad_scores()))
def test_an_accuracy_that_cannot_be_is_refused(call, message):
    options = dict(
        wrapper=SegmentWrapper(make_rmt()), task=Copy(alphabet=3, segment_length=6), segments=6, batch_size=2
    )
    wrapper = {**options, **call}['wrapper'].train()
    with pytest.raises(ValueError, match=message):
        accuracy(**{**options, **call}, generator=seeded())
    assert all(module.training for module in wrapper.modules())


@pytest.mark.parametrize('metric', [math.nan, math.inf, 'high', None])
def test_a_metric_that_is_no_number_does_not_spoil_the_average(metric):
    curriculum = SegmentCurriculum([2, 3])
    curriculum.update(0.5, 2)
    with pytest.raises(ValueError, match=f'metric is {metric!r}: give a finite number'):
        curriculum.update(metric, 2)
    assert (curriculum.average, curriculum.steps) == (0.5, 1)


def test_the_curriculum_moves_when_the_metric_stays_high():
    curriculum = SegmentCurriculum([2, 3, 5], threshold=0.9, mix=0.5, patience=4)
    generator = seeded()
    assert {curriculum.draw(generator) for _ in range(20)} == {2}
    for metric in (1.0, 1.0, 1.0, 0.5):
        curriculum.update(metric, 2)
    assert curriculum.stage == 0  # high on average, but not enough
    for _ in range(20):
        curriculum.update(1.0, 3)  # a step of another stage says nothing
    assert curriculum.stage == 0
    for _ in range(5):
        curriculum.update(1.0, 2)
    assert curriculum.stage == 1
    drawn = [curriculum.draw(generator) for _ in range(400)]
    assert set(drawn) == {2, 3}
    assert 0.4 < drawn.count(2) / 400 < 0.6
    for _ in range(40):
        curriculum.update(1.0, curriculum.stages[curriculum.stage])
    assert curriculum.stage == 2


@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_accuracy_by_pieces_is_that_of_one_forward_pass(make, monkeypatch):
    monkeypatch.setattr('segment_recurrence_pytorch.tasks.PIECE_SEGMENTS', 2)
    for task in (Memorize(values=3, noise=6, segment_length=6), Copy(alphabet=3, segment_length=6)):
        options = {'seq_len': 6} if make is make_rmt else {}
        wrapper = SegmentWrapper(make(num_tokens=task.num_tokens, **options), segment_length=6)
        wrapper.train()
        share = accuracy(wrapper, task, 6, batch_size=40, generator=seeded(3))
        assert wrapper.training
        tokens, labels = task.batch(6, 40, seeded(3))
        right = wrapper.logits(tokens)[0].argmax(-1) == labels
        assert share == pytest.approx((right.sum() / (labels != IGNORE).sum()).item())
    with pytest.raises(ValueError, match='segment_length=6, the task 32'):
        accuracy(wrapper, Memorize(), 4, batch_size=2, generator=seeded())


def test_virtual_lengths_repeat_one_middle_segment_in_most_rows():
    scale = virtual_lengths(4000, 5, most=100.0, generator=seeded())
    assert (scale[:, [0, 4]] == 1).all()
    repeated = scale != 1
    assert (repeated.sum(1) <= 1).all()
    assert 0.67 < repeated.any(1).float().mean() < 0.73
    assert scale.max() <= 100
    logs = scale[repeated].log() / math.log(100)  # uniform in [0, 1]
    assert abs(logs.mean() - 0.5) < 0.02
    assert abs(logs.std() - 12**-0.5) < 0.02
    assert all(repeated[:, i].sum() > 800 for i in (1, 2, 3))
    assert (virtual_lengths(8, 2, most=100.0, generator=seeded()) == 1).all()  # no segment is in the middle


def test_virtual_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r'most is 0\.5: give at least 1'):
        virtual_lengths(2, 3, most=0.5, generator=seeded())
    with pytest.raises(ValueError, match='segments'):
        virtual_lengths(2, 0, most=2.0, generator=seeded())


def test_write_scale_is_showing_a_segment_so_often():
    """Of the linear rule's first layer, whose writes depend on the segment alone."""
    model, x = make_infini(depth=1, memory_rule='linear'), torch.randint(0, 20, (2, 15))
    scale = torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 2.0]]).double()
    wrapper = SegmentWrapper(model, segment_length=5)
    _, state = model.advance(x, segment_length=5, write_scale=scale)
    repeated = [torch.cat((x[0, :5], x[0, 5:10].repeat(3), x[0, 10:])), torch.cat((x[1, :10], x[1, 10:].repeat(2)))]
    for row, text in enumerate(repeated):
        _, expected = wrapper.logits(text[None])
        for have, want in zip(state[0], expected[0], strict=True):
            close(have[row], want[0])
    # through the wrapper: windows of any size, one graph or replay
    labels = torch.randint(0, 20, (2, 15))
    losses, gradients = [], []
    for segments_per_pass in (1, 2, 3):
        for backward in (False, True):
            delta = make_infini(memory_rule='delta')
            wrapper = SegmentWrapper(delta, segment_length=5, segments_per_pass=segments_per_pass)
            if losses:
                wrapper.load_state_dict(losses[0][1])
            loss = wrapper.loss(x, labels=labels, per_segment={'write_scale': scale}, backward=backward).loss
            if not backward:
                loss.backward()
            losses.append((loss.detach(), wrapper.state_dict()))
            gradients.append([parameter.grad for parameter in wrapper.parameters()])
    plain = wrapper.loss(x, labels=labels).loss
    assert not math.isclose(plain.item(), losses[0][0].item(), rel_tol=1e-6)
    for (loss, _), found in zip(losses[1:], gradients[1:], strict=True):
        close(loss, losses[0][0])
        for have, want in zip(found, gradients[0], strict=True):
            close(have, want)
    with pytest.raises(ValueError, match='give one value a segment'):
        wrapper.loss(x, labels=labels, per_segment={'write_scale': scale[:, :2]})
    for options in ({'memory_rule': 'deltanet'}, {'memory_decay': True}):
        with pytest.raises(ValueError, match='write_scale needs'):
            make_infini(**options).advance(x, segment_length=5, write_scale=scale)


def test_memory_noise_is_drawn_while_training_and_replayed():
    model, x = make_rmt(memory_noise=0.3), torch.randint(0, 20, (2, 19))
    wrapper = SegmentWrapper(model)
    close(wrapper.eval().loss(x).loss, wrapper.loss(x).loss)
    wrapper.train()
    torch.manual_seed(1)
    noisy = wrapper.loss(x).loss
    noisy.backward()
    assert not torch.equal(noisy, wrapper.eval().loss(x).loss)
    want = [parameter.grad.clone() for parameter in model.parameters()]
    wrapper.train().zero_grad()
    torch.manual_seed(1)
    close(wrapper.loss(x, backward=True).loss, noisy.detach())
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        close(parameter.grad, gradient)
    # the first segment's memory is nobody's: no noise
    assert torch.equal(wrapper.loss(x[:, :7]).loss, wrapper.eval().loss(x[:, :7]).loss)
    with pytest.raises(ValueError, match='memory_noise is -1'):
        make_rmt(memory_noise=-1.0)


@pytest.mark.parametrize(('pairs', 'values', 'segments'), [(1, 10, 3), (1, 10, 5), (2, 10, 6), (3, 4, 2), (1, 1, 4)])
def test_what_values_without_their_keys_are_worth(pairs, values, segments):
    """By all sequences of values where they are few, else by drawing many."""
    task = AssociativeRetrieval(values=values, pairs_per_segment=pairs)
    count = (segments - 1) * pairs
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(values, (200_000, count), generator=draw)
    if values**count <= 100_000:
        drawn = torch.cartesian_prod(*[torch.arange(values)] * count).view(-1, count)
    counts = torch.nn.functional.one_hot(drawn, values).sum(1)
    want = counts.amax(1).double().mean().item() / count
    exact = values**count <= 100_000
    assert task.without_keys(segments) == pytest.approx(want, abs=1e-12 if exact else 3e-3)
    assert task.without_keys(2) >= task.without_keys(segments) >= task.without_memory
    with pytest.raises(ValueError, match='rewritten=True: give 2 segments or more, and keys that differ'):
        AssociativeRetrieval(rewritten=True).without_keys(3)


def test_accuracy_reads_as_many_segments_at_once_as_the_wrapper_says(monkeypatch):
    task, read = Memorize(values=3, noise=6, segment_length=6), []
    wrapper = SegmentWrapper(make_infini(num_tokens=task.num_tokens), segment_length=6, segments_per_pass=2)
    advance = wrapper.model.advance
    monkeypatch.setattr(wrapper.model, 'advance', lambda x, *a, **o: read.append(x.shape[1]) or advance(x, *a, **o))
    accuracy(wrapper, task, 5, batch_size=4, generator=seeded())
    assert read == [12, 12, 6]
