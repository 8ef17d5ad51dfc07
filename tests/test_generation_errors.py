"""What generation refuses, and that nothing is changed by it."""

import math

import pytest
import torch
import torch._dynamo.testing

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, save_cursor
from segment_recurrence_pytorch.generation import Stream
from segment_recurrence_pytorch.sampling import Sampler, top_p
from segment_recurrence_pytorch.state import leaves
from tests.conftest import DROPOUT, ids, make_infini, make_rmt
from tests.generating import wrapped


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
    cache = wrapper.model.open_segment(wrapper.model.initial_state(1), 4)
    with pytest.raises(ValueError, match='5 tokens after 0 in a segment of 4: close the segment first'):
        cache.extend(wrapper.model, ids(1, 5))


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
