"""Cached decoding is the parallel forward, token by token, eager and compiled, at a cost that stays the same."""

import shutil
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from infini_transformer_pytorch import FastweightMemory, InfiniTransformer
from segment_recurrence_pytorch import SegmentWrapper, record_attention
from segment_recurrence_pytorch.cache import RereadSegment
from segment_recurrence_pytorch.generation import _compiled
from segment_recurrence_pytorch.state import leaves
from tests.conftest import close, ids, long_unless
from tests.generating import ALL, LENGTH, MANY, SOME, recorded, wrapped
from tests.reference import generate_by_rereading
from tests.test_contract import SegmentGRU


@pytest.fixture
def compile_counter(monkeypatch):
    """`torch.compile` with a backend that runs the graphs as they are and counts them."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compile_for_real = torch.compile

    def compile_and_count(fn, *, mode, **options):
        return compile_for_real(fn, backend=counter, **options)

    _compiled.cache_clear()
    monkeypatch.setattr(torch, 'compile', compile_and_count)
    yield counter
    _compiled.cache_clear()
    torch._dynamo.reset()


@SOME
def test_compiled_streams_use_their_caches_again(case, compile_counter):
    """CUDA graphs belong to addresses: a stream after another one of its shape finds those of the first."""
    wrapper, prompt = wrapped(case), ids(2, 8)

    def addresses(stream):
        return [buffer.data_ptr() for buffer in stream._cache.keys]

    want = wrapper.generate_tokens(prompt, 9, temperature=0)
    first = wrapper.stream(prompt.flip(1), temperature=0, compile=True)
    for _ in range(3):
        next(first)
    cursor, at = first.cursor, addresses(first)
    beside = wrapper.stream(prompt, temperature=0, compile=True)
    assert not set(addresses(beside)) & set(at), 'two streams that live have two caches'
    del first
    after = wrapper.stream(prompt, max_new_tokens=9, temperature=0, compile=True)
    assert addresses(after) == at
    assert torch.equal(torch.stack(list(after), 1), want)
    assert torch.equal(torch.stack([next(beside) for _ in range(9)], 1), want)
    again = wrapper.generate_tokens(None, 9, state=cursor, temperature=0, compile=True)
    assert torch.equal(again, wrapper.generate_tokens(None, 9, state=cursor, temperature=0))


def is_compiled_as_it_is(wrapper):
    prompt = ids(2, 8)
    compiled, eager = (wrapper.generate_tokens(prompt, 9, temperature=0, compile=each) for each in (True, False))
    return torch.equal(compiled, eager)


class LearnedRotations(InfiniTransformer):
    """Its rotations are a view of a parameter, which a cache must not keep."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table = nn.Parameter(torch.randn(64, options['dim_head'] // 2, 2))

    def rotations(self, length, like):
        return self.table[:length]


def test_a_compiled_stream_changes_no_model_that_streamed_before(compile_counter):
    sizes = dict(num_tokens=20, dim=16, depth=2, heads=2, dim_head=4)
    wrappers = [SegmentWrapper(LearnedRotations(**sizes), segment_length=5) for _ in range(2)]
    tables = [wrapper.model.table.detach().clone() for wrapper in wrappers]
    for wrapper in [*wrappers, *wrappers]:
        assert is_compiled_as_it_is(wrapper)
    for wrapper, table in zip(wrappers, tables, strict=True):
        assert torch.equal(wrapper.model.table, table)


class KeepsItsModel(RereadSegment):
    """What docstrings ask an open segment not to do: it keeps a module of its model."""

    def __init__(self, model, state, segment_length):
        super().__init__(model, state, segment_length)
        self.head = model.token_emb

    def read(self, model, tokens, slots, lengths):
        return super().read(model, tokens, slots, lengths) + 40 * self.head.weight[3]


def test_a_compiled_stream_takes_no_open_segment_that_keeps_another_model(compile_counter):
    for seed in range(3):
        torch.manual_seed(seed)
        wrapper = wrapped('rmt, plain')
        wrapper.model.open_segment = partial(KeepsItsModel, wrapper.model)
        assert is_compiled_as_it_is(wrapper), seed


def test_a_compiled_stream_takes_no_open_segment_of_an_older_class(compile_counter):
    """A cell of a notebook is run again, after the class in it was changed."""
    for sign in (1, -1):

        class Own(RereadSegment):
            def read(self, *arguments, sign=sign):
                return sign * super().read(*arguments)

        wrapper = wrapped('rmt, plain')
        wrapper.model.open_segment = partial(Own, wrapper.model)
        assert is_compiled_as_it_is(wrapper), sign


@ALL
@pytest.mark.parametrize('start', [3, 6, 9, 18, 43], ids=lambda start: f'{start / LENGTH:.2f} segments')
def test_decoding_is_the_parallel_forward_token_by_token(case, start):
    wrapper, prompt, count = wrapped(case), ids(2, start), 5 * LENGTH + 2
    new, logits, _ = recorded(wrapper, prompt, count)
    expected, _ = wrapper.logits(torch.cat((prompt, new), 1))
    close(logits, expected[:, start - 1 : -1])
    assert torch.equal(new, expected[:, start - 1 : -1].argmax(-1))


@SOME
def test_decoding_is_reading_the_segment_again_for_every_token(case):
    wrapper, prompt = wrapped(case), ids(2, 8)
    expected = generate_by_rereading(wrapper.model, prompt, 20, LENGTH)
    assert torch.equal(wrapper.generate_tokens(prompt, 20, temperature=0), expected)


@ALL
def test_ragged_rows_are_as_if_alone(case):
    wrapper, prompts = wrapped(case), [ids(n) for n in (2, 6, 20, 7)]
    new, logits, cursor = recorded(wrapper, prompts, 17)
    for row, prompt in enumerate(prompts):
        alone = recorded(wrapper, prompt[None], 17)
        assert torch.equal(new[row], alone[0][0])
        close(logits[row], alone[1][0])
        lone_cursor = alone[2]
        assert cursor.lengths[row] == lone_cursor.lengths[0]
        count = int(cursor.lengths[row])
        assert torch.equal(cursor.tokens[row, :count], lone_cursor.tokens[0, :count])
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-7)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    assert torch.equal(wrapper.generate_tokens(padded, 17, temperature=0, prompt_lengths=lengths), new)


@SOME
def test_any_steps_through_the_cache_are_advance(case):
    """Several tokens at once, rows of different lengths, segments closed early."""
    model = wrapped(case).model
    x, lengths = ids(3, 4), torch.tensor([4, 1, 0])
    cache = model.open_segment(model.initial_state(3), LENGTH)
    hidden = cache.extend(model, x, lengths)
    more = cache.extend(model, x[:, :2])
    for row, length in enumerate(lengths.tolist()):
        text = torch.cat((x[row, :length], x[row, :2]))[None]
        expected, state = model.advance(text)
        close(torch.cat((hidden[row, :length], more[row]))[None], expected)
        rows = torch.arange(3) == row
        cache.close(model, rows)
        for have, want in zip(leaves(cache.state_now()), leaves(state), strict=False):
            if have.ndim != 5 and have.dtype.is_floating_point:  # XL memories are padded to one length
                close(have[row], want[0])
    again = cache.extend(model, x[:, :1])
    expected, _ = model.advance(x[:1, :1], model.advance(torch.cat((x[0], x[0, :2]))[None])[1])
    close(again[:1], expected)
    before = cache.state_now()
    untouched = model.open_segment(before, LENGTH)
    untouched.close(model)
    for have, want in zip(leaves(untouched.state_now()), leaves(before), strict=True):
        assert torch.equal(have, want)  # a segment without a token does not happen


@pytest.mark.parametrize('case', ['rmt, plain', 'rmt, xl long', 'infini, deltanet, decay, gqa', 'reread'])
def test_rows_that_close_are_computed_alone(case, monkeypatch):
    """Not the whole batch for each of them."""
    wrapper = SegmentWrapper(SegmentGRU(20, 16).double(), segment_length=LENGTH) if case == 'reread' else wrapped(case)
    model, sizes = wrapper.model, []

    def noting(owner, name, rows_of):
        method = getattr(owner, name)

        def noted(*args, **more):
            sizes.append(rows_of(*args))
            return method(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    cursor = wrapper.read([ids(n) for n in (1, 2, 3, 4)])
    if case == 'reread':
        noting(RereadSegment, 'state_after', lambda segment, *_: len(segment.tokens))
    elif case.startswith('rmt'):
        noting(model, 'write_rows', len)
        noting(model, 'read_rows', len)
    else:
        noting(FastweightMemory, 'write', lambda memory, writes, *_: writes.keys.shape[1])
    stream = wrapper.stream(state=cursor)
    sizes.clear()  # of the first segments
    for _ in range(2 * LENGTH + 1):
        next(stream)
    assert sizes
    assert set(sizes) == {1}


@MANY
def test_compiled_decoding_is_eager_decoding_and_compiles_twice(case, compile_counter):
    wrapper, prompt = wrapped(case), ids(2, 9)
    expected, expected_logits, _ = recorded(wrapper, prompt, 30)
    new, logits, cursor = recorded(wrapper, prompt, 10, compile=True)
    assert compile_counter.frame_count == 2  # a token, a border
    more, more_logits, _ = recorded(wrapper, None, 20, state=cursor, compile=True)
    assert torch.equal(torch.cat((new, more), 1), expected)
    close(torch.cat((logits, more_logits), 1), expected_logits)
    short = prompt[:, :4]  # its first segment's state is the model's own
    expected = wrapper.generate_tokens(short, 20, temperature=0)
    assert torch.equal(wrapper.generate_tokens(short, 20, temperature=0, compile=True), expected)
    assert compile_counter.frame_count == 2


@SOME
def test_compiled_steps_move_nothing(case, compile_counter):
    """Graphs that are replayed write where they were recorded."""
    stream = wrapped(case).stream(ids(2, 4), compile=True)
    addresses = [leaf.data_ptr() for leaf in leaves(vars(stream._cache))]
    for _ in range(3 * LENGTH):
        next(stream)
    assert [leaf.data_ptr() for leaf in leaves(vars(stream._cache))] == addresses


def test_compiled_decoding_takes_any_number_of_shapes(compile_counter):
    wrapper = wrapped('rmt, plain', depth=1)
    for batch in range(1, 10):  # more than the compiler's limit of eight
        prompt = ids(batch, 4)
        new = wrapper.generate_tokens(prompt, 4, temperature=0, compile=True)
        assert torch.equal(new, wrapper.generate_tokens(prompt, 4, temperature=0))
    assert compile_counter.frame_count == 18


# the compiler says what it does by warnings, also of its own modules
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.cuda
@SOME
def test_compiled_decoding_on_a_device(case):
    wrapper, prompt = wrapped(case).cuda(), ids(2, 9).cuda()
    expected = wrapper.generate_tokens(prompt, 40, temperature=0)
    assert torch.equal(wrapper.generate_tokens(prompt, 40, temperature=0, compile=True), expected)
    assert torch.equal(wrapper.cpu().generate_tokens(prompt.cpu(), 40, temperature=0), expected.cpu())


# the compiler's own modules use what torch has deprecated
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')
@pytest.mark.parametrize('case', long_unless(['infini, delta, gqa'], ['rmt, xl mixed', 'infini, delta, gqa']))
def test_compiled_for_real(case):
    """Through the compiler's own code generation, once a model."""
    torch._dynamo.reset()
    wrapper, prompt = wrapped(case, depth=1), ids(1, 9)
    expected = wrapper.generate_tokens(prompt, 8, temperature=0)
    assert torch.equal(wrapper.generate_tokens(prompt, 8, temperature=0, compile=True), expected)


def test_the_cost_of_a_token_does_not_depend_on_the_position():
    """The same attention calls over the same number of keys in every segment, and the same number of bytes kept."""
    for case in ('rmt, xl', 'infini, delta'):
        stream = wrapped(case).stream(ids(1, 1))
        seen = []
        for _ in range(5):
            with record_attention() as calls:
                for _ in range(LENGTH):
                    next(stream)
            seen.append((calls, sum(leaf.numel() for leaf in leaves(vars(stream._cache)))))
        assert seen[2] == seen[3] == seen[4]


def test_write_rows_run_once_a_segment():
    wrapper = wrapped('rmt, plain')
    stream = wrapper.stream(ids(1, 1))
    for _ in range(LENGTH):
        with record_attention() as calls:
            next(stream)
        assert all(call.num_queries == 1 for call in calls)
    with record_attention() as calls:
        next(stream)
    assert [call.num_queries for call in calls] == [3, 3, 3, 1, 1]  # write rows, read rows below the last layer, text


def test_a_half_model_decodes_as_it_reads():
    for case in ('rmt, xl mixed', 'infini, delta'):
        wrapper, prompt = wrapped(case), ids(2, 15)
        wrapper.to(torch.bfloat16)
        new, logits, _ = recorded(wrapper, prompt, 20)
        expected, _ = wrapper.logits(torch.cat((prompt, new), 1))
        error = (logits.float() - expected[:, 14:-1].float()).norm() / expected[:, 14:-1].float().norm()
        assert error < 0.03
        wrapper.float()
        with torch.autocast('cpu', torch.bfloat16):
            _, logits, _ = recorded(wrapper, prompt, 20)
        assert logits.isfinite().all()


@SOME
def test_a_prompt_is_read_in_windows_of_segments_per_pass(case):
    model, prompt = wrapped(case).model, ids(2, 40)
    longest = []
    advance = model.advance

    def watched(tokens, *arguments, **options):
        longest.append(tokens.shape[1])
        return advance(tokens, *arguments, **options)

    model.advance = watched
    SegmentWrapper(model, segment_length=LENGTH, segments_per_pass=1).read(prompt)
    assert max(longest) == LENGTH
    assert SegmentWrapper(model, segment_length=LENGTH).read(prompt, segment_length=4).tokens.shape == (2, 4)
