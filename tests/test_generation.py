"""Generation: cached decoding is the parallel forward, token by token, and goes on from anywhere."""

import math
import shutil
from functools import partial

import pytest
import torch
import torch._dynamo.testing

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import Cursor, SegmentWrapper, record_attention
from segment_recurrence_pytorch.checkpoint import load_cursor, save_cursor
from segment_recurrence_pytorch.generation import Stream, _compiled
from segment_recurrence_pytorch.sampling import Sampler, min_p, top_k, top_p
from segment_recurrence_pytorch.state import leaves
from tests.conftest import DROPOUT, INFINI_OPTIONS, RMT_OPTIONS, close, make_infini, make_rmt
from tests.reference import generate_by_rereading

LENGTH = 6
CASES = {f'rmt, {name}': (make_rmt, options) for name, options in RMT_OPTIONS.items() if options.get('causal', True)}
CASES |= {f'infini, {name}': (make_infini, options) for name, options in INFINI_OPTIONS.items()}
FEW = ['rmt, plain', 'rmt, xl mixed', 'rmt, xl long', 'rmt, no memory', 'infini, delta, gqa']
FEW += ['infini, deltanet, decay, gqa']
ALL = pytest.mark.parametrize('case', CASES)
SOME = pytest.mark.parametrize('case', FEW)


def ids(*shape):
    return torch.randint(0, 20, shape)


def wrapped(case, **more):
    make, options = CASES[case]
    return SegmentWrapper(make(**{**options, **more}), segment_length=LENGTH)


def recorded(wrapper, prompt, count, **options):
    """New tokens (b, n), the logits (b, n, v) that they were chosen from, and the cursor."""
    logits = []

    def keep(given):
        logits.append(given)
        return given

    new, cursor = wrapper.generate_tokens(prompt, count, temperature=0, filter_fn=keep, return_cursor=True, **options)
    return new, torch.stack(logits, 1), cursor


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
    hidden, cache = model.extend(cache, x, lengths)
    more, cache = model.extend(cache, x[:, :2])
    for row, length in enumerate(lengths.tolist()):
        text = torch.cat((x[row, :length], x[row, :2]))[None]
        expected, state = model.advance(text)
        close(torch.cat((hidden[row, :length], more[row]))[None], expected)
        rows = torch.arange(3) == row
        cache = model.close_segment(cache, rows)
        for have, want in zip(leaves(cache.state_now()), leaves(state), strict=False):
            if have.ndim != 5 and have.dtype.is_floating_point:  # XL memories are padded to one length
                close(have[row], want[0])
    again, cache = model.extend(cache, x[:, :1])
    expected, _ = model.advance(x[:1, :1], model.advance(torch.cat((x[0], x[0, :2]))[None])[1])
    close(again[:1], expected)
    before = cache.state_now()
    untouched = model.close_segment(model.open_segment(before, LENGTH)).state_now()
    for have, want in zip(leaves(untouched), leaves(before), strict=True):
        assert torch.equal(have, want)  # a segment without a token does not happen


@ALL
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
    wrapper = wrapped('rmt, plain')
    for batch in range(1, 12):
        prompt = ids(batch, 4)
        new = wrapper.generate_tokens(prompt, 4, temperature=0, compile=True)
        assert torch.equal(new, wrapper.generate_tokens(prompt, 4, temperature=0))
    assert compile_counter.frame_count == 22


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
@pytest.mark.parametrize('case', ['rmt, xl mixed', 'infini, delta, gqa'])
def test_compiled_for_real(case):
    """Through the compiler's own code generation, once a model."""
    torch._dynamo.reset()
    wrapper, prompt = wrapped(case, depth=1), ids(1, 9)
    expected = wrapper.generate_tokens(prompt, 8, temperature=0)
    assert torch.equal(wrapper.generate_tokens(prompt, 8, temperature=0, compile=True), expected)


@ALL
def test_continuing_from_a_cursor_is_one_long_generation(case, tmp_path):
    wrapper, prompt = wrapped(case), ids(2, 9)
    whole, whole_logits, _ = recorded(wrapper, prompt, 26)
    for first in (0, 2, 3, 4, 10, 25):  # at a border, one before and one after it, too
        new, cursor = wrapper.generate_tokens(prompt, first, temperature=0, return_cursor=True)
        path = tmp_path / f'{first}.safetensors'
        save_cursor(cursor, path, wrapper.model)
        loaded = load_cursor(path, wrapper.model)
        for have, want in zip(leaves(loaded), leaves(cursor), strict=True):
            assert torch.equal(have, want)
        for place in (cursor, loaded):
            more, logits, _ = recorded(wrapper, None, 26 - first, state=place)
            assert torch.equal(torch.cat((new, more), 1), whole)
            close(logits, whole_logits[:, first:])
    # a prompt of its own after the cursor: a conversation
    answer = ids(2, 8)
    _, expected, _ = recorded(wrapper, torch.cat((prompt, new, answer), 1), 8)
    close(recorded(wrapper, answer, 8, state=cursor)[1], expected)


@SOME
def test_reading_is_a_prompt_without_generation_and_a_plain_state_an_empty_cursor(case):
    wrapper, text, question = wrapped(case), ids(2, 2 * LENGTH), ids(2, 3)
    _, expected, _ = recorded(wrapper, torch.cat((text, question), 1), 9)
    cursor = wrapper.read(text)
    assert int(cursor.lengths.max()) <= LENGTH
    close(recorded(wrapper, question, 9, state=cursor)[1], expected)
    _, state = wrapper.logits(text)
    before = [leaf.clone() for leaf in leaves(state)]
    close(recorded(wrapper, question, 9, state=state)[1], expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), before, strict=True))
    again = wrapper.read(question, cursor)
    close(recorded(wrapper, None, 9, state=again)[1], expected)


@SOME
def test_a_fork_goes_on_as_its_row_would(case):
    wrapper = wrapped(case)
    cursor = wrapper.read([ids(9), ids(20)])
    forked = cursor.fork(3)
    questions = ids(6, 2)
    new, logits, _ = recorded(wrapper, questions, 8, state=forked)
    for row in range(6):
        alone = recorded(wrapper, questions[row : row + 1], 8, state=cursor.rows(torch.tensor([row // 3])))
        assert torch.equal(new[row], alone[0][0])
        close(logits[row], alone[1][0])
    mask = torch.tensor([False, True])
    assert torch.equal(cursor.rows(mask).tokens, cursor.tokens[1:])


@SOME
@pytest.mark.parametrize('ragged', [False, True])
def test_rows_end_with_their_token_and_their_cursor_stays_there(case, ragged):
    wrapper = wrapped(case)
    prompts = [ids(n) for n in ((3, 9, 8) if ragged else (3, 3, 3))]
    free, _ = wrapper.generate_tokens(prompts, 40, temperature=0, return_cursor=True)
    # a token that comes early in one row
    eos = int(free[0, 3])
    ends = [(row == eos).nonzero()[0].item() if (row == eos).any() else 39 for row in free]
    new, cursor = wrapper.generate_tokens(prompts, 40, temperature=0, eos_token_id=eos, return_cursor=True)
    assert new.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(new[row, : end + 1], free[row, : end + 1])
        assert (new[row, end + 1 :] == eos).all()
        # as if the row had been alone, and had stopped there
        _, alone = wrapper.generate_tokens(prompts[row][None], end + 1, temperature=0, return_cursor=True)
        question = ids(1, 2)
        index = torch.tensor([row])
        close(
            recorded(wrapper, question, 9, state=cursor.rows(index))[1], recorded(wrapper, question, 9, state=alone)[1]
        )
    late = Stream(
        wrapper.model, wrapper.read(prompts), segment_length=LENGTH, sampler=Sampler(temperature=0),
        max_new_tokens=40, eos_token_id=eos, check_every=7,
    )  # fmt: skip
    tokens = torch.stack(list(late), 1)
    assert torch.equal(tokens[:, : new.shape[1]], new)
    assert torch.equal(late.cursor.tokens, cursor.tokens)
    question = ids(3, 2)
    close(recorded(wrapper, question, 9, state=late.cursor)[1], recorded(wrapper, question, 9, state=cursor)[1])
    assert late.finished.tolist() == [bool((row == eos).any()) for row in free]


def test_a_stream_yields_what_generate_returns_and_can_be_left_at_any_time():
    wrapper = wrapped('rmt, xl')
    wrapper.train()
    prompt = ids(2, 9)
    whole = wrapper.generate_tokens(prompt, 30, generator=torch.Generator().manual_seed(3))
    stream = wrapper.stream(prompt, generator=torch.Generator().manual_seed(3))
    for count, token in enumerate(stream, start=1):
        assert torch.equal(token, whole[:, count - 1])
        assert wrapper.training
        if count == 11:
            break
    kept = stream.cursor
    before = [leaf.clone() for leaf in leaves(kept)]
    following = [next(stream) for _ in range(8)]
    assert torch.equal(torch.stack(following, 1), whole[:, 11:19])
    assert all(torch.equal(a, b) for a, b in zip(leaves(kept), before, strict=True))
    more = wrapper.generate_tokens(None, 8, state=kept, temperature=0)
    assert torch.equal(more, wrapper.generate_tokens(torch.cat((prompt, whole[:, :11]), 1), 8, temperature=0))


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


def chi_squared(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected)[expected > 0].sum().item()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_sampled_frequencies_are_the_softmax(dtype):
    torch.manual_seed(1)
    logits, count = torch.randn(12).to(dtype) * 1.5, 60_000
    batch = logits.expand(count, 12)
    for options, expected in [
        ({}, logits.float().softmax(0)),
        ({'temperature': 0.5}, (logits.float() / 0.5).softmax(0)),
        ({'top_k': 4}, top_k(logits.float()[None], 1 - 4 / 12)[0].softmax(0)),
        ({'top_p': 0.7, 'temperature': 2.0}, top_p(logits.float()[None] / 2, 0.7)[0].softmax(0)),
        ({'min_p': 0.2}, min_p(logits.float()[None], 0.2)[0].softmax(0)),
    ]:
        drawn, _ = Sampler(**options)(batch)
        counts = torch.bincount(drawn, minlength=12).double()
        assert not counts[expected == 0].any()
        # of 11 degrees of freedom: exceeded once in 100,000
        assert chi_squared(counts, expected.double()) < 42.0


def test_filters_keep_what_they_say():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]])
    probabilities = logits.softmax(-1)[0]
    assert top_k(logits, 0.7).isfinite().sum() == 3
    kept = top_p(logits, 0.9).isfinite()[0]
    assert probabilities[kept].sum() >= 0.9 > probabilities[kept].sum() - probabilities[kept].min()
    assert min_p(logits, 0.1).isfinite().sum() == (probabilities >= 0.1 * probabilities.max()).sum()
    penalised, _ = Sampler(repetition_penalty=2.0, temperature=0)(
        torch.tensor([[3.0, 2.0, -1.0], [-1.0, -3.0, -1.5]]), torch.tensor([[True, False, False], [True, False, False]])
    )
    assert penalised.tolist() == [1, 2]
    for temperature in (0, 1e-50):
        assert Sampler(temperature=temperature)(torch.tensor([[1.0, 3.0, 2.0]]))[0].tolist() == [1]


@SOME
def test_a_repetition_counts_from_the_prompt_on(case):
    wrapper, prompt = wrapped(case), ids(2, 9)
    # above 0 the penalty makes a logit that occurred the smallest
    new = wrapper.generate_tokens(
        prompt, 8, temperature=0, repetition_penalty=1e9, filter_fn=lambda logits: logits + 99
    )
    text = torch.cat((prompt, new), 1)
    for row in text:
        for position in range(9, 17):
            if len(set(row[:position].tolist())) < 20:
                assert row[position] not in row[:position]


def test_the_same_generator_draws_the_same_tokens():
    wrapper, prompt = wrapped('rmt, plain'), ids(2, 5)
    draw = partial(wrapper.generate_tokens, prompt, 20)
    assert torch.equal(
        draw(generator=torch.Generator().manual_seed(5)), draw(generator=torch.Generator().manual_seed(5))
    )
    assert not torch.equal(
        draw(generator=torch.Generator().manual_seed(5)), draw(generator=torch.Generator().manual_seed(6))
    )


def test_published_calls_choose_as_published():
    rmt, infini = make_rmt(), make_infini()
    prompt = ids(2, 8)

    def seeded(**options):
        return dict(generator=torch.Generator().manual_seed(2), **options)

    wrapper = RecurrentMemoryTransformerWrapper(rmt)
    generic = SegmentWrapper(rmt)
    expected = generic.generate_tokens(prompt, 12, **seeded(filter_fn=partial(top_k, thres=0.9), temperature=0.7))
    assert torch.equal(wrapper.generate(prompt, length=20, **seeded(temperature=0.7)), expected)
    # one's own filter instead of the published one
    expected = generic.generate_tokens(prompt, 12, **seeded(top_k=3))
    assert torch.equal(wrapper.generate(prompt, max_new_tokens=12, **seeded(top_k=3)), expected)
    _, memories = wrapper(prompt)
    state = generic.logits(prompt)[1]
    assert torch.equal(
        wrapper.generate(prompt, length=14, memories=memories, temperature=0),
        generic.generate_tokens(prompt, 6, state=state, temperature=0),
    )
    wrapper = InfiniTransformerWrapper(infini, LENGTH)
    generic = SegmentWrapper(infini, segment_length=LENGTH)
    expected = generic.generate_tokens(prompt, 12, **seeded(filter_fn=partial(top_p, thres=0.5)))
    assert torch.equal(wrapper.generate(prompt=prompt, seq_len=20, filter_kwargs={'thres': 0.5}, **seeded()), expected)
    start = wrapper.generate(seq_len=9, batch_size=3, exclude_prompt=False, temperature=0)
    assert start.shape == (3, 9)
    assert not start[:, 0].any()
    new, cursor = wrapper.generate(prompt=prompt, max_new_tokens=4, temperature=0, return_cursor=True)
    more = wrapper.generate(past_memories=cursor, max_new_tokens=4, temperature=0)
    assert torch.equal(torch.cat((new, more), 1), wrapper.generate(prompt=prompt, seq_len=16, temperature=0))


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


def bad_calls():
    prompt = ids(2, 7)
    state = make_rmt().initial_state(3)
    yield dict(prompt=None), 'the prompt is empty'
    yield dict(prompt=prompt[:, :0]), 'batch_size='
    yield dict(prompt=[ids(3), ids(0)]), 'at least one token in every row'
    yield dict(prompt=[]), 'the prompt is empty'
    yield dict(prompt=prompt, max_new_tokens=-1), '-1 new tokens'
    yield dict(prompt=prompt, top_p=0.0), 'top_p is 0.0'
    yield dict(prompt=prompt, top_p=1.5), 'top_p is 1.5'
    yield dict(prompt=prompt, min_p=-0.5), 'min_p is -0.5'
    yield dict(prompt=prompt, top_k=0), 'top_k is 0'
    yield dict(prompt=prompt, temperature=-1.0), 'temperature is -1.0'
    yield dict(prompt=prompt, temperature=math.nan), 'temperature is nan'
    yield dict(prompt=prompt, repetition_penalty=0), 'repetition_penalty is 0'
    yield dict(prompt=prompt, state=state), 'shape'
    yield dict(prompt=prompt, state=Cursor(state, ids(3, 2), torch.tensor([2, 2, 2]))), '2 prompts for a cursor of 3'
    yield dict(prompt=prompt, eos_token_id=20), 'eos_token_id is 20'
    yield dict(prompt=prompt, prompt_lengths=[3, 8]), r'prompt_lengths is \[3, 8\]'
    yield dict(prompt=prompt, prompt_lengths=[3]), 'give 2 whole numbers from 0 to 7'
    yield dict(prompt=[ids(2)], prompt_lengths=[2]), 'leave it out'
    yield dict(prompt=[ids(2, 2)]), 'one tensor of token ids'
    yield dict(prompt=torch.randn(2, 7, 16)), 'give token ids'
    yield dict(prompt=prompt + 20), 'outside'
    yield dict(prompt=prompt, segment_length=7), 'segment_length is 7'
    yield dict(prompt=None, batch_size=0), 'batch_size is 0'
    yield dict(prompt=prompt, batch_size=2), 'give no prompt or cursor'
    yield dict(prompt=5), 'the prompt is a int'
    yield dict(prompt=prompt, prompt_lengths=[1.5, 2.0]), 'whole numbers'
    cursor = Cursor(None, prompt, torch.tensor([7, 1]))
    yield dict(prompt=None, state=cursor, prompt_lengths=[1, 1]), 'prompt_lengths without a prompt'
    yield dict(prompt=None, state=Cursor(None, prompt, torch.tensor([9, 1]))), 'the lengths of the cursor'
    yield dict(prompt=None, state=Cursor(None, prompt, torch.tensor([1]))), 'the lengths of the cursor'
    yield dict(prompt=prompt, top_k=2.5), 'top_k is 2.5'
    yield dict(prompt=prompt, generator=7), 'generator is a int'
    yield dict(prompt=prompt, filter_fn=lambda logits: logits[:1]), 'it must keep the shape'
    yield dict(prompt=prompt, filter_fn=lambda logits: logits - math.inf), r'row 0 after 7 tokens \(new token 0\)'
    yield dict(prompt=prompt, filter_fn=lambda logits: logits * math.nan), 'are NaN'


@pytest.mark.parametrize(('call', 'message'), list(bad_calls()))
def test_bad_calls_are_refused_and_change_nothing(call, message):
    wrapper = SegmentWrapper(make_rmt())
    wrapper.train()
    wrapper.model.layers[1].eval()
    given = [leaf.clone() for leaf in leaves(call)]
    for run in (wrapper.generate_tokens, lambda **options: next(wrapper.stream(**options))):
        options = call if 'max_new_tokens' in call else {**call, 'max_new_tokens': 3}
        if run != wrapper.generate_tokens and 'max_new_tokens' in call:
            message = 'max_new_tokens is -1'
        with pytest.raises(ValueError, match=message):
            run(**options)
    assert wrapper.training
    assert not wrapper.model.layers[1].training
    assert all(torch.equal(a, b) for a, b in zip(leaves(call), given, strict=True))


def test_other_refusals():
    wrapper = SegmentWrapper(make_rmt(causal=False))
    with pytest.raises(ValueError, match='cannot generate'):
        wrapper.generate_tokens(ids(1, 3), 3)
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    with pytest.raises(ValueError, match='give one of them'):
        wrapper.generate(ids(1, 3))
    with pytest.raises(ValueError, match='give one of them'):
        wrapper.generate(ids(1, 3), length=5, filter_thres=0.5, filter_fn=top_p)
    with pytest.raises(ValueError, match=r'filter_thres is 1\.5'):
        wrapper.generate(ids(1, 3), length=5, filter_thres=1.5)
    with pytest.raises(ValueError, match='give max_new_tokens'):
        wrapper.generate([ids(3), ids(4)], length=9)
    cache = wrapper.model.open_segment(wrapper.model.initial_state(1), 4)
    with pytest.raises(ValueError, match='5 tokens after 0 in a segment of 4: close the segment first'):
        wrapper.model.extend(cache, ids(1, 5))


@pytest.mark.parametrize('check_every', [1, 4, 32])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_place(check_every):
    model = make_rmt()
    prompt, calls = ids(2, 7), 0
    to_logits = model.to_logits

    def broken(hidden):
        nonlocal calls
        calls += 1
        logits = to_logits(hidden)
        if calls == 6:
            logits[1, 3] = math.nan
        return logits

    model.to_logits = broken
    model.train()
    wrapper = SegmentWrapper(model)
    stream = Stream(
        model, wrapper.read(prompt), segment_length=6, sampler=Sampler(), max_new_tokens=9, check_every=check_every
    )
    calls = 0
    stream._logits = model.to_logits(torch.zeros(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'row 1 after 6 tokens \(new token 5\) are NaN'):
        list(stream)
    assert model.training


def test_an_exception_in_a_callback_changes_nothing():
    wrapper = SegmentWrapper(make_rmt(**DROPOUT))
    wrapper.train()
    wrapper.model.layers[1].eval()
    _, cursor = wrapper.generate_tokens(ids(2, 8), 3, return_cursor=True)
    before = [leaf.clone() for leaf in leaves(cursor)]
    calls = 0

    def explode(logits):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError('stop')
        return logits

    with pytest.raises(RuntimeError, match='stop'):
        wrapper.generate_tokens(None, 20, state=cursor, filter_fn=explode)
    assert wrapper.training
    assert wrapper.model.layers[0].ff.training
    assert not wrapper.model.layers[1].ff.training
    assert all(torch.equal(a, b) for a, b in zip(leaves(cursor), before, strict=True))


def test_a_cursor_file_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    wrapper = wrapped('rmt, xl')
    cursor, path = wrapper.read(ids(2, 9)), tmp_path / 'book.safetensors'
    save_cursor(cursor, path, wrapper.model)
    with pytest.raises(ValueError, match='made with memory_mask'):
        load_cursor(path, make_rmt(use_xl_memories=True, memory_mask='causal'))
    with pytest.raises(ValueError, match='other weights'):
        load_cursor(path, make_rmt(use_xl_memories=True))
    with pytest.raises(ValueError, match='RecurrentMemoryTransformer, not InfiniTransformer'):
        load_cursor(path, make_infini())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match='no cursor'):
        load_cursor(path, wrapper.model)
    with pytest.raises(ValueError, match='no cursor'):
        load_cursor(tmp_path / 'missing.safetensors', wrapper.model)


@SOME
def test_a_cursor_is_a_value_of_its_own(case, tmp_path):
    wrapper, prompt = wrapped(case), ids(2, 40)
    _, state = wrapper.logits(prompt[:, :6])
    for cursor in (wrapper.read(prompt[:, :3]), wrapper.read(prompt), wrapper.read(prompt[:, 6:], state)):
        owned = {parameter.untyped_storage().data_ptr() for parameter in wrapper.parameters()}
        for leaf in leaves(cursor):
            assert not leaf.requires_grad
            assert leaf.untyped_storage().data_ptr() not in owned
            assert leaf.untyped_storage().nbytes() <= leaf.nbytes + 64
    stream = wrapper.stream(prompt, temperature=0)
    expected = wrapper.generate_tokens(prompt, 20, temperature=0)
    for at in range(20):
        token = next(stream)
        assert torch.equal(token, expected[:, at])
        token.zero_()
        for leaf in leaves(stream.cursor):
            leaf.zero_()
    # a state in any form that a model takes
    save_cursor(Cursor(None, prompt, torch.tensor([40, 40])), tmp_path / 'a', wrapper.model)
    cursor = load_cursor(tmp_path / 'a', wrapper.model)
    assert torch.equal(wrapper.generate_tokens(None, 5, state=cursor, temperature=0), expected[:, :5])


def test_a_stream_keeps_the_autocast_that_it_began_with():
    wrapper, prompt = wrapped('rmt, xl mixed').float(), ids(2, 9)
    with torch.autocast('cpu', torch.bfloat16):
        expected = wrapper.generate_tokens(prompt, 20, temperature=0)
        stream = wrapper.stream(prompt, max_new_tokens=20, temperature=0)
    assert torch.equal(torch.stack(list(stream), 1), expected)
    stream = wrapper.stream(prompt, max_new_tokens=20, temperature=0)
    with torch.autocast('cpu', torch.bfloat16):
        tokens = torch.stack(list(stream), 1)
    assert torch.equal(tokens, wrapper.generate_tokens(prompt, 20, temperature=0))
    with torch.inference_mode():
        stream = wrapper.stream(prompt, max_new_tokens=20, temperature=0)
    assert torch.equal(torch.stack(list(stream), 1), tokens)


def test_a_filter_may_work_in_place_and_forbid_tokens():
    wrapper, prompt = wrapped('rmt, plain'), ids(2, 9)
    free = wrapper.generate_tokens(prompt, 1, temperature=0)
    forbidden = int(free[0, 0])

    def forbid(logits):
        logits[:, forbidden] = -math.inf
        return logits

    for options in ({'temperature': 0}, {}):
        assert not (wrapper.generate_tokens(prompt, 40, filter_fn=forbid, **options) == forbidden).any()


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


def test_a_bar_shows_only_on_request(capsys):
    wrapper, prompt = wrapped('rmt, plain'), ids(1, 3)
    wrapper.generate_tokens(prompt, 4)
    assert capsys.readouterr().err == ''
    wrapper.generate_tokens(prompt, 4, progress=True)
    assert '4/4' in capsys.readouterr().err
