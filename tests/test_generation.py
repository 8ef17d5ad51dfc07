"""Generation goes on from anywhere: cursors, forks, streams, rows that end."""

import threading
from contextlib import ExitStack

import pytest
import torch
import torch._dynamo.testing

from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, save_cursor
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.generation import Stream
from segment_recurrence_pytorch.sampling import Sampler
from segment_recurrence_pytorch.state import leaves
from tests.conftest import DROPOUT, close, ids, make_rmt
from tests.generating import LENGTH, MANY, SOME, recorded, wrapped


@MANY
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
@pytest.mark.parametrize(('ragged', 'several'), [(False, False), (True, False), (True, True)])
def test_rows_end_with_their_token_and_their_cursor_stays_there(case, ragged, several):
    wrapper = wrapped(case)
    prompts = [ids(n) for n in ((3, 9, 8) if ragged else (3, 3, 3))]
    free, _ = wrapper.generate_tokens(prompts, 40, temperature=0, return_cursor=True)
    # a token that comes early in one row, or one of two tokens
    eos = [int(free[0, 3]), int(free[1, 5])][: 1 + several]
    last = torch.isin(free, torch.tensor(eos))
    ends = [row.nonzero()[0].item() if row.any() else 39 for row in last]
    given = eos if several else eos[0]
    new, cursor = wrapper.generate_tokens(prompts, 40, temperature=0, eos_token_id=given, return_cursor=True)
    assert new.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(new[row, : end + 1], free[row, : end + 1])
        assert (new[row, end + 1 :] == eos[0]).all()
        # as if the row had been alone, and had stopped there
        _, alone = wrapper.generate_tokens(prompts[row][None], end + 1, temperature=0, return_cursor=True)
        question = ids(1, 2)
        index = torch.tensor([row])
        close(
            recorded(wrapper, question, 9, state=cursor.rows(index))[1], recorded(wrapper, question, 9, state=alone)[1]
        )
    late = Stream(
        wrapper.model, wrapper.read(prompts), segment_length=LENGTH, sampler=Sampler(temperature=0),
        max_new_tokens=40, eos_token_id=tuple(eos), check_every=7,
    )  # fmt: skip
    tokens = torch.stack(list(late), 1)
    assert torch.equal(tokens[:, : new.shape[1]], new)
    assert torch.equal(late.cursor.tokens, cursor.tokens)
    question = ids(3, 2)
    close(recorded(wrapper, question, 9, state=late.cursor)[1], recorded(wrapper, question, 9, state=cursor)[1])
    assert late.finished.tolist() == last.any(1).tolist()


def test_a_row_that_is_finished_may_have_no_token_that_is_allowed():
    """A filter that follows a grammar allows nothing after its end, where nothing is drawn any more."""
    wrapper, calls = wrapped('rmt, plain'), []

    def grammar(logits):
        calls.append(logits)
        allowed = torch.full_like(logits, float('-inf'))
        allowed[1, 5] = 0
        if len(calls) == 1:
            allowed[0, 7] = 0
        elif len(calls) == 3:
            allowed[0] = float('nan')
        return allowed

    new = wrapper.generate_tokens(ids(2, 3), 5, filter_fn=grammar, eos_token_id=7)
    assert new.tolist() == [[7] * 5, [5] * 5]
    calls.clear()
    with pytest.raises(ValueError, match='the logits of row 0 after 4 tokens'):
        wrapper.generate_tokens(ids(2, 3), 5, filter_fn=grammar)


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


@MANY
def test_a_float64_model_generates_under_autocast_as_without(case):
    """Autocast leaves float64 alone."""
    wrapper, prompts = wrapped(case), [ids(3), ids(13)]
    expected, expected_logits, _ = recorded(wrapper, prompts, 14)
    with torch.autocast('cpu', torch.bfloat16):
        new, logits, cursor = recorded(wrapper, prompts, 14)
        again = recorded(wrapper, ids(2, 2), 9, state=cursor)[1]
    assert torch.equal(new, expected)
    close(logits, expected_logits)
    assert again.dtype == torch.float64


def test_two_generations_of_one_model_at_once_are_as_each_alone():
    """The first to finish does not put the model back into training mode under the other."""
    wrapper = wrapped('rmt, xl', **DROPOUT)
    wrapper.train()
    wrapper.model.layers[1].eval()
    modes = [module.training for module in wrapper.modules()]
    prompts = ids(2, 9), ids(2, 4)
    expected, found = recorded(wrapper, prompts[1], 12)[1], []
    second_is_inside, first_is_done = threading.Event(), threading.Event()

    def waits_for_the_end_of_the_first(logits):
        found.append(logits)
        second_is_inside.set()
        assert first_is_done.wait(60)
        return logits

    options = {'temperature': 0, 'filter_fn': waits_for_the_end_of_the_first}
    second = threading.Thread(target=wrapper.generate_tokens, args=(prompts[1], 12), kwargs=options)

    def starts_the_second(logits):
        second.start()
        assert second_is_inside.wait(60)
        return logits

    wrapper.generate_tokens(prompts[0], 1, filter_fn=starts_the_second)
    first_is_done.set()
    second.join(60)
    close(torch.stack(found, 1), expected, 1e-12)
    assert [module.training for module in wrapper.modules()] == modes


@pytest.mark.parametrize('first_to_leave', [0, 1])
def test_a_module_goes_back_into_its_mode_after_the_last_block_that_evaluates_it(first_to_leave):
    module = wrapped('rmt, plain')
    module.train()
    module.model.layers[1].eval()
    modes = [each.training for each in module.modules()]
    blocks = ExitStack(), ExitStack()
    for block in blocks:
        block.enter_context(evaluating(module))
    # one over a part of it, entered and left inside
    with evaluating(module.model.layers[0]):
        assert not any(each.training for each in module.modules())
    blocks[first_to_leave].close()
    assert not any(each.training for each in module.modules())
    blocks[1 - first_to_leave].close()
    assert [each.training for each in module.modules()] == modes


def test_a_bar_shows_only_on_request(capsys):
    wrapper, prompt = wrapped('rmt, plain'), ids(1, 3)
    wrapper.generate_tokens(prompt, 4)
    assert capsys.readouterr().err == ''
    wrapper.generate_tokens(prompt, 4, progress=True)
    assert '4/4' in capsys.readouterr().err


def test_rows_of_a_list_may_have_different_dtypes():
    wrapper = SegmentWrapper(make_rmt(num_tokens=1000), segment_length=4)
    rows = [torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([500, 600, 700, 800])]
    cursor = wrapper.read(rows)
    same = wrapper.read([row.long() for row in rows])
    assert all(torch.equal(a, b) for a, b in zip(leaves(cursor), leaves(same), strict=True))
    more = [torch.tensor([9, 8]), torch.tensor([7], dtype=torch.uint8)]
    assert torch.equal(wrapper.read(more, cursor).tokens, wrapper.read([row.long() for row in more], cursor).tokens)
