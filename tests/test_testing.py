"""`check_model` accepts every model of the library, and tells what is wrong with one that breaks the contract."""

import pytest
import torch

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.cache import RereadSegment
from segment_recurrence_pytorch.testing import check_model
from tests.conftest import INFINI_OPTIONS, RMT_OPTIONS, ids, make_infini, make_rmt, random_weights
from tests.test_contract import MODELS, LearnsWhileItReads, SegmentGRU

MAKERS = {f'rmt, {name}': lambda o=options: make_rmt(**o) for name, options in RMT_OPTIONS.items()}
MAKERS |= {f'infini, {name}': lambda o=options: make_infini(**o) for name, options in INFINI_OPTIONS.items()}
MAKERS |= {name: lambda m=make: random_weights(m().double()) for name, make in MODELS.items()}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())
def test_a_model_that_keeps_the_contract_passes(make):
    model = make()
    model.train()
    check_model(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_and_single_precision_pass():
    check_model(make_rmt(use_xl_memories=True).float())
    check_model(make_infini().bfloat16())


class LayersFirst(SegmentGRU):
    def initial_state(self, batch_size):
        return {'hidden': torch.stack([self.start.expand(batch_size, -1)] * 2)}


class NoTensor(SegmentGRU):
    def initial_state(self, batch_size):
        return {}


class HiddenAlone(SegmentGRU):
    def advance(self, *args, **options):
        return super().advance(*args, **options)[0]


class ShortHidden(SegmentGRU):
    def advance(self, *args, **options):
        hidden, state = super().advance(*args, **options)
        return (None if hidden is None else hidden[:, 1:]), state


class WrongVocabulary(SegmentGRU):
    def to_logits(self, hidden):
        return super().to_logits(hidden)[..., 1:]


class HalfState(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, {'hidden': after['hidden'].half()}


class InPlace(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, after if state is None else {'hidden': state['hidden'].copy_(after['hidden'])}


class OnTheModule(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        self.seen = getattr(self, 'seen', 0) + 1
        return hidden, {'hidden': after['hidden'] + self.seen}


class ViewOfTheStart(SegmentGRU):
    def initial_state(self, batch_size):
        return {'hidden': self.start.expand(batch_size, -1)}


class ViewOfTheState(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, _ = super().advance(tokens, state, **options)
        return hidden, self.initial_state(len(tokens)) if state is None else state


class OtherStateWithoutHidden(SegmentGRU):
    def advance(self, tokens, state=None, *, need_hidden=True, **options):
        hidden, after = super().advance(tokens, state, need_hidden=need_hidden, **options)
        return hidden, after if need_hidden else {'hidden': 2 * after['hidden']}


class NoMask(SegmentGRU):
    def advance(self, tokens, state=None, *, mask=None, **options):
        return super().advance(tokens, state, **options)


class EmptyRowsForget(SegmentGRU):
    def advance(self, tokens, state=None, *, mask=None, **options):
        hidden, after = super().advance(tokens, state, mask=mask, **options)
        forgets = 0 if mask is None else ~mask.any(1, keepdim=True)
        return hidden, {'hidden': after['hidden'] * (1 + 1e-6 * forgets)}


class MaskedOtherwise(SegmentGRU):
    def advance(self, tokens, state=None, *, mask=None, **options):
        hidden, after = super().advance(tokens, state, mask=mask, **options)
        return hidden, {'hidden': after['hidden'] + (mask is not None)}


class RowsMeet(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, {'hidden': after['hidden'] + after['hidden'].mean(0, keepdim=True)}


class SeesTheEnd(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return (None if hidden is None else hidden + hidden[:, -1:]), after


class AtOnce(SegmentGRU):
    parallel_segments = True

    def advance(self, tokens, state=None, *, segment_length=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, {'hidden': after['hidden'] + (tokens.shape[1] > (segment_length or tokens.shape[1]))}


class NeedsAGraph(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, {'hidden': after['hidden'] + torch.is_grad_enabled()}


class WrongCache(SegmentGRU):
    def open_segment(self, state, segment_length):
        return RereadSegment(self, {'hidden': state['hidden'] * 1.01}, segment_length)


class RandomWithHidden(SegmentGRU):
    def advance(self, tokens, state=None, *, need_hidden=True, **options):
        hidden, after = super().advance(tokens, state, need_hidden=need_hidden, **options)
        return (torch.dropout(hidden, 0.1, self.training) if need_hidden else None), after


class AtOnceWithoutMask(SegmentGRU):
    parallel_segments = True

    def advance(self, tokens, state=None, *, segment_length=None, mask=None, **options):
        hidden, after = super().advance(tokens, state, mask=mask, **options)
        several = mask is not None and tokens.shape[1] > (segment_length or tokens.shape[1])
        return hidden, {'hidden': after['hidden'] + several}


class AtOnceWithHidden(SegmentGRU):
    parallel_segments = True

    def advance(self, tokens, state=None, *, segment_length=None, need_hidden=True, **options):
        hidden, after = super().advance(tokens, state, need_hidden=need_hidden, **options)
        several = not need_hidden and tokens.shape[1] > (segment_length or tokens.shape[1])
        return hidden, {'hidden': after['hidden'] + several}


class NoneIsOther(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return hidden, {'hidden': after['hidden'] + (state is None)}


class SameInitialState(SegmentGRU):
    def initial_state(self, batch_size):
        self.kept = getattr(self, 'kept', {})
        return self.kept.setdefault(batch_size, super().initial_state(batch_size))


class RandomInitialState(SegmentGRU):
    def initial_state(self, batch_size):
        return {'hidden': torch.randn(batch_size, self.dim, dtype=self.dtype)}


class InfiniteState(SegmentGRU):
    def initial_state(self, batch_size):
        return {'hidden': torch.full((batch_size, self.dim), -torch.inf, dtype=self.dtype)}

    def advance(self, tokens, state=None, **options):
        before = self.initial_state(len(tokens)) if state is None else state
        hidden, after = super().advance(tokens, {'hidden': before['hidden'].clamp_min(-1)}, **options)
        return hidden, {'hidden': before['hidden'].maximum(after['hidden'])}


class RandomHidden(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        return (None if hidden is None else hidden + torch.rand_like(hidden)), after


class InPlaceWithMask(SegmentGRU):
    def advance(self, tokens, state=None, *, mask=None, **options):
        hidden, after = super().advance(tokens, state, mask=mask, **options)
        in_place = state is not None and mask is not None
        return hidden, {'hidden': state['hidden'].copy_(after['hidden'])} if in_place else after


class OtherDtypeWithoutHidden(SegmentGRU):
    def advance(self, tokens, state=None, *, need_hidden=True, **options):
        hidden, after = super().advance(tokens, state, need_hidden=need_hidden, **options)
        return hidden, after if need_hidden else {'hidden': after['hidden'].float()}


class OtherOrder(SegmentGRU):
    def initial_state(self, batch_size):
        start = super().initial_state(batch_size)
        return {**start, 'count': torch.zeros(batch_size, dtype=torch.long)}

    def advance(self, tokens, state=None, **options):
        state = self.initial_state(len(tokens)) if state is None else state
        hidden, after = super().advance(tokens, {'hidden': state['hidden']}, **options)
        return hidden, {'count': state['count'], **after}


class IdsAlone(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        return super().advance(self.token_emb(tokens), state, **options)


class LearnsByFunctions(LearnsWhileItReads):
    def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
        x = tokens if tokens.is_floating_point() else self.token_emb(tokens)
        now, ok = self.initial_state(len(tokens)) if state is None else state, 1 if mask is None else mask
        step = torch.func.grad(lambda w: ((x @ w - self.cell(x)).square().sum(-1) * ok).sum())(now)
        return (x + x @ now if need_hidden else None), now - 0.01 * step


BROKEN = {
    RandomWithHidden: 'in training mode, advance draws other random numbers',
    AtOnceWithoutMask: 'segments that are read at once differ from one by one, with a mask$',
    AtOnceWithHidden: 'segments that are read at once differ from one by one, with a mask and need_hidden=False',
    NoneIsOther: 'advance with state=None is not the same as with initial_state',
    SameInitialState: 'a state that initial_state returned shares memory with a parameter or with another state',
    RandomInitialState: 'initial_state returned other values in another call, row or batch',
    InfiniteState: 'holds NaN or infinite values, which wrappers refuse: override state_faults',
    RandomHidden: 'gave another result the second time',
    InPlaceWithMask: 'changed its tokens or the given state in place',
    OtherDtypeWithoutHidden: 'another state with need_hidden=False',
    OtherOrder: r"has the entries \['count', 'hidden'\]: this model needs \['hidden', 'count'\], in this order",
    IdsAlone: 'for ids and for embeddings. Trying this, RuntimeError was raised',
    LearnsByFunctions: 'Trying this, RuntimeError was raised: torch.func.* saved tensor hooks',
    LayersFirst: 'the first dimension has to be the batch, here 3',
    NoTensor: 'returned no tensor',
    HiddenAlone: r'advance returned a Tensor: it has to return \(hidden, state\)',
    ShortHidden: r'the hidden states of advance are \(3, 3, 16\)',
    WrongVocabulary: 'the last dimension has to be num_tokens=20',
    HalfState: 'a state that is not like initial_state.*torch.float16',
    InPlace: 'changed its tokens or the given state in place',
    OnTheModule: 'keeps something on the module',
    ViewOfTheStart: 'a state that initial_state returned shares memory',
    ViewOfTheState: 'a state that advance returned shares memory',
    OtherStateWithoutHidden: 'another state with need_hidden=False',
    NoMask: 'the token at a padded position',
    EmptyRowsForget: 'a row whose mask is False everywhere',
    MaskedOtherwise: 'a mask that is True everywhere is not the same as no mask',
    RowsMeet: 'must not influence each other',
    SeesTheEnd: 'a hidden state depends on a later token',
    AtOnce: 'segments that are read at once differ',
    NeedsAGraph: 'replay or recomputing gives other gradients',
    WrongCache: 'generation has other logits than one pass',
}


@pytest.mark.parametrize('broken', BROKEN, ids=lambda each: each.__name__)
def test_a_broken_rule_is_named(broken):
    model = random_weights(broken(20, 16).double())
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_model(model)


def test_the_wrapper_refuses_a_state_without_the_batch_in_front():
    """With as many layers as rows it would be taken for a state, and the wrong axis would be reset."""
    with pytest.raises(ValueError, match='the first dimension has to be the batch'):
        SegmentWrapper(LayersFirst(20, 16), segment_length=4)
    with pytest.raises(ValueError, match='returned no tensor'):
        SegmentWrapper(NoTensor(20, 16), segment_length=4)
    with pytest.raises(ValueError, match='the model has no max_segment_length: give segment_length='):
        SegmentWrapper(SegmentGRU(20, 16))


def test_a_cursor_is_no_state():
    wrapper = SegmentWrapper(SegmentGRU(20, 16), segment_length=4)
    cursor = wrapper.read(torch.zeros(1, 6, dtype=torch.long))
    for call in (wrapper.loss, wrapper.logits):
        with pytest.raises(ValueError, match='the state is a Cursor: give it to generate_tokens'):
            call(torch.zeros(1, 6, dtype=torch.long), cursor)
    with pytest.raises(ValueError, match='the state is a Cursor'):
        wrapper.reset(cursor, torch.tensor([True]))


class HalfUnderAutocast(SegmentGRU):
    def advance(self, tokens, state=None, **options):
        hidden, after = super().advance(tokens, state, **options)
        half = torch.is_autocast_enabled('cpu')
        return hidden, {'hidden': after['hidden'].bfloat16() if half else after['hidden']}


def test_a_state_that_autocast_changes_is_named():
    with pytest.raises(AssertionError, match='under autocast, advance returned a state that is not like initial_state'):
        check_model(random_weights(HalfUnderAutocast(20, 16)))


class Short(SegmentGRU):
    max_segment_length = 2


class WithoutParameters(SegmentGRU):
    def parameters(self, recurse=True):
        return iter(())


def test_the_length_of_the_trials_is_one_that_the_model_can_read():
    check_model(random_weights(Short(20, 16).double()))
    with pytest.raises(AssertionError, match='the model has no parameters, which tell its device and dtype'):
        check_model(WithoutParameters(20, 16))
    with pytest.raises(ValueError, match='the model has no parameters, which tell its device and dtype'):
        SegmentWrapper(WithoutParameters(20, 16), segment_length=4).loss(ids(1, 9))


@pytest.mark.parametrize('name', ['num_tokens', 'dim'])
def test_a_model_without_a_size_is_told_of_it(name):
    model = random_weights(SegmentGRU(20, 16).double())
    delattr(model, name)
    with pytest.raises(AssertionError, match=rf'SegmentGRU\.{name} is None: a model sets num_tokens and dim'):
        check_model(model)
