"""The contract: three methods make a model, and everything else works on it.

The models here are a sum over segments, as the contract's docstring writes it, a recurrent network and the example
`examples/associative_rmt.py`. None of them has a cache, or anything else beyond the three methods.
"""

import pytest
import torch
from torch import nn

from examples.associative_rmt import AssociativeRMT
from examples.associative_rmt import main as train_associative_rmt
from segment_recurrence_pytorch import Cursor, SegmentModel, SegmentWrapper, model
from segment_recurrence_pytorch.cache import RereadSegment
from segment_recurrence_pytorch.checkpoint import load_cursor, load_weights, save_cursor, save_weights
from segment_recurrence_pytorch.state import detach, leaves, map_state
from tests.conftest import close, ids, random_weights, same_gradients
from tests.generating import recorded
from tests.reference import generate_by_rereading

LENGTH = 4


def names_of_the_docstring():
    """What the code in the docstring of the contract defines, run as it stands there."""
    code = [line[4:] for line in model.__doc__.splitlines() if line.startswith('    ') or not line]
    names = {'__name__': __name__}
    exec('\n'.join(code), names)
    return names


class SegmentGRU(SegmentModel):
    """A recurrent network, its state the last hidden one, with a learned start."""

    def __init__(self, num_tokens, dim):
        super().__init__()
        self.num_tokens = num_tokens
        self.dim = dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.cell = nn.GRUCell(dim, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.head = nn.Linear(dim, num_tokens)

    def initial_state(self, batch_size):
        return {'hidden': self.start.expand(batch_size, -1).clone()}

    def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
        x = tokens if tokens.is_floating_point() else self.token_emb(tokens)
        hidden = (self.initial_state(len(tokens)) if state is None else state)['hidden']
        hiddens = []
        for i in range(tokens.shape[1]):
            new = self.cell(x[:, i], hidden)
            hidden = new if mask is None else torch.where(mask[:, i, None], new, hidden)
            hiddens.append(hidden)
        return (torch.stack(hiddens, dim=1) if need_hidden else None), {'hidden': hidden}

    def to_logits(self, hidden):
        return self.head(hidden)


class ComplexDecay(SegmentGRU):
    """Its state is complex: features that turn and decay from token to token."""

    def __init__(self, num_tokens, dim):
        super().__init__(num_tokens, dim)
        self.start, self.cell = nn.Parameter(torch.zeros(dim, 2)), nn.Linear(2 * dim, dim)
        self.turn = nn.Parameter(torch.rand(dim))

    def initial_state(self, batch_size):
        return torch.view_as_complex(self.start).expand(batch_size, -1).clone()

    def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
        x = tokens if tokens.is_floating_point() else self.token_emb(tokens)
        now, hiddens = self.initial_state(len(tokens)) if state is None else state, []
        for i in range(tokens.shape[1]):
            new = torch.polar(torch.full_like(self.turn, 0.8), self.turn) * now + x[:, i]
            now = new if mask is None else torch.where(mask[:, i, None], new, now)
            hiddens.append(self.cell(torch.view_as_real(now).flatten(1)))
        return (torch.stack(hiddens, dim=1) if need_hidden else None), now


class LearnsWhileItReads(SegmentGRU):
    """Its state is a matrix, which a step of gradient descent changes in each segment."""

    def __init__(self, num_tokens, dim):
        super().__init__(num_tokens, dim)
        self.start, self.cell = nn.Parameter(torch.zeros(dim, dim)), nn.Linear(dim, dim)

    def initial_state(self, batch_size):
        return self.start.expand(batch_size, -1, -1).clone()

    def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
        x = tokens if tokens.is_floating_point() else self.token_emb(tokens)
        now = self.initial_state(len(tokens)) if state is None else state
        needs_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            learned = now if now.requires_grad else now.detach().requires_grad_()
            error = (x @ learned - self.cell(x)).square().sum(-1)
            loss = (error if mask is None else error * mask).sum()
            (step,) = torch.autograd.grad(loss, learned, create_graph=needs_graph)
        after = now - 0.01 * (step if needs_graph else step.detach())
        return (x + x @ now if need_hidden else None), after


MODELS = {
    'complex': lambda: ComplexDecay(20, 16),
    'learns while it reads': lambda: LearnsWhileItReads(20, 16),
    'of the docstring': lambda: names_of_the_docstring()['DecayingMean'](20, 16),
    'recurrent network': lambda: SegmentGRU(20, 16),
    'associative': lambda: AssociativeRMT(num_tokens=20, dim=16, depth=2, seq_len=LENGTH, heads=2, dim_key=4),
}
ALL = pytest.mark.parametrize('make', MODELS.values(), ids=MODELS.keys())


def wrapped(make, **options):
    return SegmentWrapper(random_weights(make().double()), segment_length=LENGTH, **options)


def ragged(rows=4, length=15):
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, [0, 5, 6, 7, 13]] = False
    mask[3] = False
    return mask


@ALL
def test_a_model_of_three_methods_has_no_others(make):
    """What is tested here is the contract, and not what a model did for itself."""
    own = {name for name in vars(type(make())) if not name.startswith('__')}
    assert own <= {'initial_state', 'advance', 'to_logits', '_abc_impl'}


@ALL
@pytest.mark.parametrize('k', [None, 1, 2])
def test_it_trains_by_every_kind_of_back_propagation(make, k):
    wrapper, x, mask = wrapped(make, backprop_segments=k), ids(4, 15), ragged()
    _, state = wrapper.logits(ids(4, 6))
    state = detach(state)
    found = []
    for recompute, backward in ((False, False), (True, False), (False, True)):
        other = SegmentWrapper(
            wrapper.model, segment_length=LENGTH, backprop_segments=k, recompute=recompute, segments_per_pass=2
        )
        for each in (wrapper, other):
            each.zero_grad()
            loss, count, after = each.loss(x, state, mask=mask, backward=backward)
            if not backward:
                loss.backward()
            gradients = {name: parameter.grad.clone() for name, parameter in wrapper.model.named_parameters()}
            found.append((loss.detach(), count, [leaf.detach() for leaf in leaves(after)], gradients))
    assert found[0][0] > 1
    for loss, count, after, gradients in found[1:]:
        close(loss, found[0][0])
        assert count == found[0][1]
        for have, want in zip(after, found[0][2], strict=True):
            close(have, want)
        same_gradients(gradients, found[0][3])
    assert found[0][3]['token_emb.weight'].any()


@ALL
def test_the_gradient_comes_back_through_the_state(make):
    """The first segment's embeddings learn from the last segment's loss, and do not where the state is cut."""
    for k, learns in ((None, True), (1, False)):
        wrapper = wrapped(make, backprop_segments=k)
        x = torch.randn(1, 3 * LENGTH, 16, dtype=torch.float64, requires_grad=True)
        labels = torch.full((1, 3 * LENGTH), -100)
        labels[0, -1] = 3
        wrapper.loss(x, labels=labels).loss.backward()
        assert bool(x.grad[0, :LENGTH].any()) is learns


@ALL
def test_a_row_is_as_if_alone_and_keeps_its_state_without_a_valid_token(make):
    wrapper, x, mask = wrapped(make), ids(4, 15), ragged()
    _, before = wrapper.logits(ids(4, 6))
    logits, after = wrapper.logits(x, before, mask=mask)
    alone = Cursor(before, x, x[:, 0]).rows(torch.tensor([1])).state
    alone_logits, alone_after = wrapper.logits(x[1:2, :9], alone)
    close(logits[1:2, :9], alone_logits)
    for have, want, old in zip(leaves(after), leaves(alone_after), leaves(before), strict=True):
        close(have[1:2], want)
        assert torch.equal(have[3], old[3])


@ALL
def test_it_generates_what_one_pass_over_the_text_would_choose(make):
    wrapper, prompts = wrapped(make), [ids(n) for n in (3, 4, 9, 1)]
    assert type(wrapper.model.open_segment(wrapper.model.initial_state(1), LENGTH)) is RereadSegment
    for given in (prompts, ids(2, 6)):
        new, logits, _ = recorded(wrapper, given, 3 * LENGTH)
        for row, prompt in enumerate(given):
            expected, _ = wrapper.logits(torch.cat((prompt, new[row]))[None])
            close(logits[row], expected[0, len(prompt) - 1 : -1])
    twin = generate_by_rereading(wrapper.model, given, 3 * LENGTH, LENGTH)
    assert torch.equal(new, twin)


@ALL
def test_it_streams_forks_saves_and_loads(make, tmp_path):
    wrapper, prompt = wrapped(make), ids(2, 6)
    whole, whole_logits, _ = recorded(wrapper, prompt, 14)
    for first in (0, 1, 2, 3, 9):
        stream = wrapper.stream(prompt, temperature=0)
        assert all(torch.equal(next(stream), whole[:, i]) for i in range(first))
        save_cursor(stream.cursor, tmp_path / 'place', wrapper.model)
        loaded = load_cursor(tmp_path / 'place', wrapper.model)
        close(recorded(wrapper, None, 14 - first, state=loaded)[1], whole_logits[:, first:])
        forked = recorded(wrapper, None, 14 - first, state=stream.cursor.fork(2))[0]
        assert torch.equal(forked, whole[:, first:].repeat_interleave(2, 0))
        close(recorded(wrapper, None, 14 - first, state=stream.cursor.rows(torch.tensor([1])))[1],
              whole_logits[1:, first:])  # fmt: skip
    eos = int(whole[0, 3])
    ended, cursor = wrapper.generate_tokens(prompt, 14, temperature=0, eos_token_id=eos, return_cursor=True)
    end = int((whole[0] == eos).nonzero()[0])
    assert (ended[0, end:] == eos).all()
    _, alone = wrapper.generate_tokens(prompt[:1], end + 1, temperature=0, return_cursor=True)
    question = ids(1, 3)
    close(
        recorded(wrapper, question, 5, state=cursor.rows(torch.tensor([0])))[1],
        recorded(wrapper, question, 5, state=alone)[1],
    )


# PyTorch compiles no call of torch.autograd.grad, unless a switch of its own is set
@pytest.mark.parametrize('name', [name for name in MODELS if name != 'learns while it reads'])
def test_compiled_steps_of_it_are_the_same(name, monkeypatch):
    make = MODELS[name]
    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, *, mode, **options: compiled(fn, backend='eager', **options))
    torch._dynamo.reset()
    wrapper, prompts = wrapped(make), [ids(6), ids(3)]
    expected = wrapper.generate_tokens(prompts, 11, temperature=0)
    assert torch.equal(wrapper.generate_tokens(prompts, 11, temperature=0, compile=True), expected)
    torch._dynamo.reset()


@ALL
def test_its_weights_and_cursors_go_back_only_into_such_a_model(make, tmp_path):
    wrapper = wrapped(make)
    save_weights(wrapper.model, tmp_path / 'weights')
    save_cursor(wrapper.read(ids(1, 6)), tmp_path / 'cursor', wrapper.model)
    again = make().double()
    load_weights(again, tmp_path / 'weights')
    assert all(map(torch.equal, again.parameters(), wrapper.model.parameters()))
    load_cursor(tmp_path / 'cursor', again)
    other = random_weights(make().double())
    with pytest.raises(ValueError, match='other weights'):
        load_cursor(tmp_path / 'cursor', other)


@ALL
def test_a_state_that_is_not_its_own_is_refused(make):
    wrapper = wrapped(make)
    state = wrapper.model.initial_state(2)
    for bad, message in (
        (wrapper.model.initial_state(3), r'shape \(3, '),
        ([state, state, state], 'state is a list: give a tensor|state is list, this model has|state has 3 entries'),
        (
            map_state(lambda t: t.to(torch.complex64 if t.is_complex() else torch.float32), state),
            r'torch.(float32|complex64) on cpu, the model needs torch.(float64|complex128) on cpu',
        ),
        (map_state(lambda t: t + torch.nan, state), 'holds NaN'),
        (map_state(lambda t: 'text', state), 'is a str: give a tensor'),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.loss(ids(2, 9), bad, backward=True)
    assert all(parameter.grad is None for parameter in wrapper.parameters())


def test_a_model_in_which_a_method_is_missing_says_which():
    class Unfinished(SegmentModel):
        def initial_state(self, batch_size):
            return torch.zeros(batch_size, 1)

    with pytest.raises(TypeError, match=r'advance.*to_logits'):
        Unfinished()


def test_the_associative_model_trains_on_its_task(capsys):
    """At reduced size: better than guessing one of the values that were shown with one pair is the least."""
    found = train_associative_rmt(steps=20, seed=0, sequences=32)
    assert list(found) == [2, 3, 4, 5, 9, 17]
    assert all(0 <= share <= 1 for share in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[-1].endswith('(more than in training)')
