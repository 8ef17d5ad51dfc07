"""`TrainingStep`: on a CPU the step that one would write, on a GPU the same as a CUDA graph."""

import gc
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.data import Piece
from segment_recurrence_pytorch.graphs import Graphed, TrainingStep
from segment_recurrence_pytorch.layers import constants
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.training import train_loss, warmup_cosine
from tests.conftest import ids, make_infini, make_rmt, same_gradients

MODELS = {
    'rmt': make_rmt,
    'rmt, xl': lambda: make_rmt(use_xl_memories=True, rotary_pos_emb=True),
    'infini': make_infini,
    'infini, linear': lambda: make_infini(memory_rule='linear'),
}


def schedule(step):
    return (0.5, 1.0, 0.1, 0.7, 0.2, 0.3, 0.1)[step]


def pieces(count):
    """Texts of two rows, of which some start, and one ends early."""
    made = [Piece(ids(2, 19), torch.tensor([i == 0, i == 1])) for i in range(count)]
    made[2].tokens[1, 15:] = IGNORE
    return made


def by_steps(wrapper, given, memory):
    step = TrainingStep(wrapper, wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95), schedule=schedule)
    state, losses = None, []
    for piece in given:
        loss, state = step.read(piece, state, memory)
        losses.append(loss.item())
    return losses


def as_written(wrapper, given, memory):
    optimizer = torch.optim.AdamW(wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95))
    rates, state, losses = LambdaLR(optimizer, schedule), None, []
    for piece in given:
        loss, _, state = train_loss(wrapper, piece, state, memory)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
    return losses


def made(name):
    torch.manual_seed(3)
    return SegmentWrapper(MODELS[name](), segment_length=6)


@pytest.mark.parametrize('memory', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_it_is_what_one_would_write(name, memory):
    given, have, want = pieces(4), made(name), made(name)
    assert by_steps(have, given, memory) == pytest.approx(as_written(want, given, memory), abs=1e-12)
    same_gradients(dict(have.named_parameters()), dict(want.named_parameters()), 1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize('memory', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_the_graph_of_a_step_is_the_step(name, memory):
    """Played four times after two shapes of states were read, recorded, and padded. Rates are float32 on the device."""
    given, have, want = pieces(6), made(name).cuda(), made(name)
    assert by_steps(have, given, memory) == pytest.approx(as_written(want, given, memory), abs=1e-6)
    weights = {key: weight.cpu() for key, weight in have.named_parameters()}
    same_gradients(weights, dict(want.named_parameters()), 1e-6)


@pytest.mark.cuda
def test_shapes_take_turns():
    """A curriculum: sequences of one, two and three segments, with labels of their own, and a scale for each."""
    found = []
    for device in ('cuda', 'cpu'):
        torch.manual_seed(4)
        wrapper = made('infini, linear').to(device)
        groups = wrapper.model.param_groups(1e-2, 0.01)
        step, losses = TrainingStep(wrapper, groups, betas=(0.9, 0.98), schedule=lambda _: 1.0), []
        draw = torch.Generator().manual_seed(5)
        for segments in (1, 2, 3, 1, 3, 3, 2, 1, 2, 2):
            x = torch.randint(0, 20, (2, 6 * segments), generator=draw)
            labels = torch.where(torch.rand(x.shape, generator=draw) < 0.5, x, IGNORE)
            scale = {'write_scale': 1 + torch.rand(2, segments, generator=draw)}
            losses.append(step(x, labels=labels, per_segment=scale)[0].item())
        found.append((losses, {name: weight.cpu() for name, weight in wrapper.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    same_gradients(found[0][1], found[1][1], 1e-6)


def test_a_step_that_is_refused_changes_nothing():
    wrapper = SegmentWrapper(make_rmt(), segment_length=6)
    step = TrainingStep(wrapper, wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95), schedule=schedule)
    step(ids(2, 13))
    gradient, rate = wrapper.model.logits.weight.grad.clone(), step.optimizer.param_groups[0]['lr']
    with pytest.raises(ValueError, match='id'):
        step(ids(2, 13) + 100)
    assert torch.equal(wrapper.model.logits.weight.grad, gradient)
    assert (step.done, step.optimizer.param_groups[0]['lr']) == (1, rate)


@pytest.mark.parametrize('make', [make_rmt, make_infini])
@pytest.mark.parametrize('tied', [False, True])
def test_the_learning_rate_of_embeddings_is_an_argument(make, tied):
    model = make(tie_embeddings=tied)
    tables = {id(table) for name, table in model.named_parameters() if name in ('token_emb.weight', 'pos_emb.weight')}
    groups = model.param_groups(1.0, 0.1, emb_lr=2.0)
    own = [group for group in groups if tables & {*map(id, group['params'])}]
    assert [(group['lr'], group['weight_decay'], len(group['params'])) for group in own] == [(2, 0, len(tables))]
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match='emb_lr is 0'):
        model.param_groups(1.0, 0.1, emb_lr=0)


@pytest.mark.parametrize('ignore_index', [-100, 0])
def test_what_a_graph_captures_knows_the_padding_of_the_wrapper(ignore_index):
    x = ids(2, 13)
    x[0, 9:] = ignore_index
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        wrapper = SegmentWrapper(make_rmt(), segment_length=6, ignore_index=ignore_index)
        step = TrainingStep(wrapper, wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95), schedule=lambda step: 1)
        if captured:
            wrapper.check_values, step.graphed = False, step._captured
        found.append(step(x)[0])
    assert found[0] == pytest.approx(found[1].item())


@pytest.mark.parametrize('warmup', [0.0, 1e-4, 5e-4, 0.05, 0.5])
def test_the_learning_rate_is_never_above_its_peak(warmup):
    factors = [warmup_cosine(step / 10_000, warmup) for step in range(10_001)]
    assert min(factors) > 0
    assert max(factors) <= 1
    assert factors[-1] == pytest.approx(0.05)


@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_small_types_and_padding_are_those_of_the_wrapper(make):
    """With labels, too, and in the function that is recorded on a GPU. uint8 holds byte 156, but no -100."""
    torch.manual_seed(3)
    wrapper = SegmentWrapper(make(num_tokens=256), segment_length=6)
    x, labels = torch.randint(256, (2, 18)), torch.randint(256, (2, 18))
    x[0, 3] = labels[1, 4] = 156
    mask = torch.arange(18) < torch.tensor([[18], [13]])
    for given, more in ((x.to(torch.uint8), {}), (x.masked_fill(~mask, IGNORE), {'mask': mask})):
        wanted = wrapper.loss(x, labels=labels, **more).loss.item()
        for captured in (False, True):
            step = TrainingStep(
                wrapper, wrapper.model.param_groups(1e-9, 0.0), betas=(0.9, 0.95), schedule=lambda _: 0.0
            )
            if captured:
                step.graphed = step._captured
            found, _ = step(given, labels=labels.to(torch.uint8))
            assert found.item() == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match=r'x is torch\.float.*: give token ids'):
        step(torch.randn(2, 18, 16), labels=labels)
    with pytest.raises(ValueError, match=r'labels is torch\.float64: give token ids'):
        step(x, labels=labels.double())


def test_a_first_call_that_fails_is_no_warm_up(monkeypatch):
    """A graph may only be recorded after a call that has made what the later ones reuse."""
    calls = []

    def function(x):
        calls.append('run')
        if len(calls) == 1:
            raise MemoryError
        return x

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    graphed = Graphed(function)
    monkeypatch.setattr(graphed, '_record', lambda leaves, tree: calls.append('recorded') or 1 / 0)
    with pytest.raises(MemoryError):
        graphed(torch.zeros(2))
    graphed(torch.zeros(2))
    with pytest.raises(ZeroDivisionError):
        graphed(torch.zeros(2))
    assert calls == ['run', 'run', 'recorded']


def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch):
    """Constants go when there are many others; a graph would read what then lies at their addresses."""
    for name in ('Stream', 'stream', 'current_stream', 'graph_pool_handle', 'CUDAGraph', 'graph'):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    read = []

    def function(x):
        read.append(weakref.ref(constants.get('read', x.device, lambda: torch.ones(2))))
        return x

    graphed = Graphed(function)
    graphed(torch.zeros(2)), graphed(torch.zeros(2))
    for number in range(constants.size):
        constants.get(number, torch.device('cpu'), lambda: torch.ones(2))
    gc.collect()
    assert read[-1]() is not None
    graphed.graphs.clear()
    gc.collect()
    assert read[-1]() is None, 'else this test sees nothing'


def test_only_what_is_trained_is_clipped_and_no_gradient_is_left_from_before():
    """Of a model whose other parameters are trainable, too."""
    wrapper, x = made('rmt'), ids(2, 19)
    head = wrapper.model.logits.weight
    step = TrainingStep(wrapper, [{'params': [head], 'lr': 0.0}], betas=(0.9, 0.95), schedule=schedule, max_norm=1e-3)
    for _ in range(3):
        step(x)
    assert head.grad.norm().item() == pytest.approx(1e-3, rel=1e-4)
    other, once = wrapper.model.token_emb.weight, made('rmt')
    once.loss(x).loss.backward()
    torch.testing.assert_close(other.grad, once.model.token_emb.weight.grad)


def test_padding_is_padding_without_checks_of_values():
    x = ids(2, 19)
    x[1, 15:], x[0, 12:] = IGNORE, 7
    losses = []
    for options in ({}, {'check_values': False}):
        torch.manual_seed(3)
        wrapper = SegmentWrapper(make_rmt(), segment_length=6, ignore_index=7, **options)
        step = TrainingStep(wrapper, wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95), schedule=schedule)
        losses.append(step(x)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_group_of_processes_is_refused():
    wrapper = made('rmt')
    wrapper.process_group = 'a group'
    with pytest.raises(ValueError, match='TrainingStep trains in one process, and the wrapper has a process_group'):
        TrainingStep(wrapper, wrapper.model.param_groups(1e-2, 0.01), betas=(0.9, 0.95), schedule=schedule)
