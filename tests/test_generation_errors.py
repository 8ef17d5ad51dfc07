"""What generation refuses, and that nothing is changed by it."""

import inspect
import math

import pytest
import torch
import torch._dynamo.testing

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.generation import Stream, StreamOptions, open_stream
from segment_recurrence_pytorch.sampling import Sampler, min_p, top_k, top_p
from segment_recurrence_pytorch.state import leaves
from tests.conftest import DROPOUT, ids, make_infini, make_rmt


def bad_calls():
    prompt = ids(2, 7)
    state = make_rmt().initial_state(3)
    yield dict(prompt=None), 'the prompt is empty'
    yield dict(prompt=prompt[:, :0]), 'batch_size='
    yield dict(prompt=[ids(3), ids(0)]), 'at least one token in every row'
    yield dict(prompt=[]), 'the prompt is empty'
    yield dict(prompt=prompt, max_new_tokens=-1), 'max_new_tokens is -1'
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
    yield dict(prompt=prompt, temperature='hot'), "temperature is 'hot': give 0 .* or more"
    yield dict(prompt=prompt, temperature=None), 'temperature is None: give 0'
    yield dict(prompt=prompt, top_p='most'), "top_p is 'most': give a share"
    yield dict(prompt=prompt, repetition_penalty='x'), "repetition_penalty is 'x': give a number above 0"
    yield dict(prompt=prompt, filter_fn=3), 'filter_fn is a int: give a function'
    yield dict(prompt=prompt, eos_token_id='x'), r"eos_token_id is 'x': give a token id in \[0, 20\)"
    yield dict(prompt=prompt, eos_token_id=1.5), r'eos_token_id is 1\.5: give a token id in \[0, 20\)'
    yield dict(prompt=prompt, eos_token_id=True), r'eos_token_id is True: give a token id in \[0, 20\)'
    yield dict(prompt=prompt, eos_token_id=-1), r'eos_token_id is -1: give a token id in \[0, 20\)'
    yield dict(prompt=prompt, eos_token_id=[3, 20]), r'eos_token_id is 20: give a token id in \[0, 20\)'
    yield dict(prompt=prompt, eos_token_id=[]), 'eos_token_id is an empty list'
    yield dict(prompt=prompt, start_token=3), 'start_token=3 begins new rows: give batch_size, and no prompt'
    yield dict(prompt=None, state=cursor, start_token=3), 'start_token=3 begins new rows: .* no prompt or cursor'
    yield dict(prompt=None, state=cursor, batch_size=2), 'batch_size=2 begins new rows .* give no prompt or cursor'
    yield dict(prompt=None, batch_size=2, start_token=20), r'start_token is 20: give a token id in \[0, 20\)'
    yield dict(prompt=None, batch_size=2, start_token='x'), "start_token is 'x': give a token id"
    yield dict(prompt=None, batch_size=1.5), r'batch_size is 1\.5: give a whole number of rows from 1 on'
    yield dict(prompt=prompt, segment_length=2.5), r'segment_length is 2\.5: give 1 to 6'
    yield dict(prompt=prompt, segment_length='x'), "segment_length is 'x': give 1 to 6"
    yield dict(prompt=prompt, segment_length=True), 'segment_length is True: give 1 to 6'
    yield dict(prompt=prompt, compile='x'), "compile is 'x': give True or False"
    yield dict(prompt=prompt, prompt_lengths='x'), "prompt_lengths is 'x': give 2 whole numbers from 0 to 7"
    yield dict(prompt=prompt, prompt_lengths=[3, None]), r'prompt_lengths is \[3, None\]: give 2 whole numbers'
    yield dict(prompt=prompt > 9), r'the prompt is torch\.bool of shape \(2, 7\): give token ids'
    yield dict(prompt=[ids(3) > 9]), 'one tensor of token ids'
    for tokens in (None, [1, 2], prompt[0], prompt.float(), prompt > 9):
        for more in (None, prompt):
            yield dict(prompt=more, state=cursor._replace(tokens=tokens)), 'the cursor holds no token ids'
    for lengths in (None, 'x', 3, torch.tensor([[7, 1]])):
        yield dict(prompt=None, state=cursor._replace(lengths=lengths)), 'lengths of the cursor is .* 2 whole numbers'
    for given in (lambda logits: logits.long(), lambda logits: logits > 0):
        yield dict(prompt=prompt, filter_fn=given), 'filter_fn made torch.* it must return floating point on cpu'
    yield dict(prompt=prompt, filter_fn=lambda logits: logits.to('meta')), 'filter_fn made .* on meta'
    yield dict(prompt=prompt, filter_fn=lambda logits: None), 'filter_fn made a NoneType'
    yield dict(prompt=prompt, filter_fn=lambda logits: logits[:1]), 'it must return logits of the same shape'
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
    with pytest.raises(ValueError, match='give max_new_tokens'):
        wrapper.generate(ids(3), length=9)
    with pytest.raises(ValueError, match='start_token=3 begins new rows'):
        wrapper.generate(ids(1, 3), length=9, start_token=3)
    cache = wrapper.model.open_segment(wrapper.model.initial_state(1), 4)
    with pytest.raises(ValueError, match='5 tokens after 0 in a segment of 4: close the segment first'):
        cache.extend(wrapper.model, ids(1, 5))


@pytest.mark.parametrize('prompt', [ids(2, 3).to('meta'), [ids(3), ids(3).to('meta')]], ids=['tensor', 'list'])
def test_a_prompt_on_meta_holds_no_ids(prompt):
    wrapper = SegmentWrapper(make_rmt())
    for call in (wrapper.read, lambda prompt: wrapper.generate_tokens(prompt, 3)):
        with pytest.raises(ValueError, match='on the meta device, where it has no values: give token ids'):
            call(prompt)


@pytest.mark.parametrize('count', [True, -2])
def test_a_number_of_new_tokens_is_a_whole_number_from_0_on(count):
    wrapper = SegmentWrapper(make_rmt())
    with pytest.raises(ValueError, match=f'max_new_tokens is {count}: give 0 or more'):
        wrapper.generate_tokens(ids(1, 3), count)
    with pytest.raises(ValueError, match=f'max_new_tokens is {count}: give 0 or more'):
        wrapper.stream(ids(1, 3), max_new_tokens=count)


@pytest.mark.parametrize('share', [-0.1, 1.1, math.nan, 'x'])
@pytest.mark.parametrize('filter_logits', [top_k, top_p, min_p])
def test_a_filter_takes_a_share(filter_logits, share):
    with pytest.raises(ValueError, match=rf'thres is {share!r}: give a share in \[0, 1\]'):
        filter_logits(torch.randn(2, 20), share)


def bad_published_calls():
    wrapper = InfiniTransformerWrapper(make_infini(), 6)
    prompt, cursor = ids(2, 7), wrapper.read(ids(2, 7))
    yield dict(prompt=prompt, batch_size=2), 'batch_size=2 begins new rows: give no prompt and no cursor'
    yield dict(prompt=prompt, start_token=3), 'start_token=3 begins new rows'
    yield dict(past_memories=cursor, batch_size=2), 'batch_size=2 begins new rows: give no prompt and no cursor'
    yield dict(past_memories=cursor, start_token=3), 'start_token=3 begins new rows'
    yield dict(batch_size=0), 'batch_size is 0: give a whole number from 1 on, or None'
    yield dict(batch_size=True), 'batch_size is True: give a whole number from 1 on, or None'
    yield dict(start_token=20), r'start_token is 20: give a token id in \[0, 20\)'
    yield dict(start_token=1.5), r'start_token is 1\.5: give a token id in \[0, 20\)'
    yield dict(prompt=prompt, eos_token_id='x'), "eos_token_id is 'x': give a token id"
    yield dict(prompt=prompt, temperature='hot'), "temperature is 'hot': give 0"
    yield dict(prompt=prompt, filter_kwargs={'thres': 3}), r'thres is 3: give a share in \[0, 1\]'
    yield dict(prompt=prompt, filter_kwargs={'thres': 0.5}, top_k=3), r'filter_kwargs=.* are of filter_fn: give it too'
    yield dict(prompt=prompt, seq_len=True, max_new_tokens=None), 'seq_len is True: give a whole number of tokens'
    yield dict(prompt=ids(1, 9), seq_len=5, max_new_tokens=None), 'seq_len is 5, and the prompt has 9 tokens, which it'
    yield dict(prompt=[ids(3)], exclude_prompt=False), r'needs a prompt of shape \(batch, length\)'
    yield (
        dict(prompt=prompt, prompt_lengths=[1] * len(prompt), exclude_prompt=False),
        r'needs a prompt of shape \(batch, length\), without prompt_lengths',
    )


@pytest.mark.parametrize(('call', 'message'), list(bad_published_calls()))
def test_bad_published_calls_are_refused(call, message):
    wrapper = InfiniTransformerWrapper(make_infini(), 6)
    with pytest.raises(ValueError, match=message):
        wrapper.generate(**{'max_new_tokens': 3, **call})
    assert wrapper.training


def test_a_cursor_has_the_rows_that_are_asked_for_or_says_which_it_has():
    cursor = SegmentWrapper(make_rmt(), segment_length=6).read(ids(3, 9))
    for copies in (0, -1, 1.5, True, 'x'):
        with pytest.raises(ValueError, match=rf'copies is {copies!r}: give a whole number from 1 on'):
            cursor.fork(copies)
    for index, message in (
        (torch.tensor([3]), r'the index is \[3\]: give row numbers in \[0, 3\)'),
        (torch.tensor([-1, 0]), r'the index is \[-1, 0\]: give row numbers in \[0, 3\)'),
        (torch.tensor([True]), 'the index has 1 bools, the cursor 3 rows'),
        (torch.tensor([0.0]), r'the index is \(1,\): give row numbers \(k,\), or bool \(batch,\)'),
        (torch.tensor(0), r'the index is \(\): give row numbers'),
        ([0], r'the index is \[0\]: give row numbers'),
        (0, 'the index is 0: give row numbers'),
    ):
        with pytest.raises(ValueError, match=message):
            cursor.rows(index)
    assert torch.equal(cursor.rows(torch.tensor([2, 0])).tokens, cursor.tokens[[2, 0]])
    assert len(cursor.rows(torch.zeros(3, dtype=torch.bool)).tokens) == 0


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


def test_editors_know_every_option_of_generation():
    taken = {*inspect.signature(open_stream).parameters, *inspect.signature(Sampler).parameters, 'segment_length'}
    of_the_wrapper = {'model', 'segments_per_pass', 'check_values', 'sampling'}
    given_by_name = {'prompt', 'max_new_tokens', 'state'}
    assert set(StreamOptions.__annotations__) == taken - of_the_wrapper - given_by_name
    assert SegmentWrapper.stream.__doc__ is not None
    for name in StreamOptions.__annotations__:
        assert f' {name}: ' in SegmentWrapper.stream.__doc__, name
