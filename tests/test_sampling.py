"""Sampling draws what it says, and the published calls choose as published."""

import math
from functools import partial

import pytest
import torch
import torch._dynamo.testing

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import SegmentWrapper, sampling
from segment_recurrence_pytorch.sampling import Sampler, min_p, top_k, top_p
from tests.conftest import ids, make_infini, make_rmt
from tests.generating import LENGTH, SOME, wrapped


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
    many = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0)) * 8
    assert torch.equal(top_p(many, 1.0), many)  # the rounded sum of the probabilities is 1 before the last token
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


def test_a_filter_may_work_in_place_and_forbid_tokens():
    wrapper, prompt = wrapped('rmt, plain'), ids(2, 9)
    free = wrapper.generate_tokens(prompt, 1, temperature=0)
    forbidden = int(free[0, 0])

    def forbid(logits):
        logits[:, forbidden] = -math.inf
        return logits

    for options in ({'temperature': 0}, {}):
        assert not (wrapper.generate_tokens(prompt, 40, filter_fn=forbid, **options) == forbidden).any()


def test_what_a_filter_returns_in_a_half_type_is_drawn_from_in_float32(monkeypatch):
    drawn, draw = [], sampling._draw
    monkeypatch.setattr(sampling, '_draw', lambda logits, generator: drawn.append(logits) or draw(logits, generator))
    _, largest = Sampler(filter_fn=lambda logits: logits.half())(torch.randn(2, 9))
    assert drawn[0].dtype == largest.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_equal_logits_do_not_make_more_candidates(dtype):
    """Logits of half types are often equal."""
    logits = torch.randn(50, 256).to(dtype)
    logits[0] = 0.0
    kept = top_k(logits, 0.97)
    assert kept.isfinite().sum(-1).tolist() == [8] * 50
    assert (kept.sort(-1, descending=True).values[:, :8] == logits.sort(-1, descending=True).values[:, :8]).all()
    drawn = {int(Sampler(top_k=1)(torch.zeros(1, 10))[0]) for _ in range(40)}
    assert len(drawn) == 1


def test_filters_of_half_types_compute_in_float32():
    logits = torch.randn(200, 256).bfloat16()
    for function in (top_p, min_p):
        assert torch.equal(function(logits), function(logits.float()))
