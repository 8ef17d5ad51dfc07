"""The transformer with full attention that the benchmark compares with: it has to be right before it is timed."""

import json
import os
from typing import ClassVar

import pytest
import torch

from benchmarks import full_attention
from benchmarks.crossings import FULL, QUESTIONS, Line, crossing, square
from benchmarks.full_transformer import FullTransformer, KVCache


def made():
    return FullTransformer(num_tokens=11, dim=16, depth=2, heads=2, dim_head=8).double()


def naive(model, tokens):
    """The hidden states by explicit softmax, and by explicit rotation of the pairs of features."""
    n, h, d = tokens.shape[1], model.heads, model.dim_head
    angles = torch.arange(n).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angles), angles)
    hidden = model.token_emb(tokens)
    for block in model.layers:
        q, k, v = (
            part.unflatten(-1, (h, d)).transpose(1, 2)
            for part in block.attn.to_qkv(block.attn_norm(hidden)).chunk(3, dim=-1)
        )
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for t in (q, k)
        )
        scores = torch.einsum('bhid,bhjd->bhij', q, k) / d**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        out = torch.einsum('bhij,bhjd->bhid', scores.softmax(-1), v)
        hidden = hidden + block.attn.to_out(out.transpose(1, 2).flatten(-2))
        hidden = hidden + block.ff(block.ff_norm(hidden))
    return model.norm(hidden)


def test_it_is_softmax_attention():
    model, tokens = made(), torch.randint(11, (2, 9))
    torch.testing.assert_close(model(tokens), naive(model, tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize('prompt', [1, 4])
def test_cached_decoding_is_the_parallel_forward_token_by_token(prompt):
    model, tokens = made(), torch.randint(11, (2, 9))
    hidden, cache = model(tokens), KVCache(model, 9, batch=2)
    found = [model.extend(tokens[:, :prompt], cache)]
    found += [model.extend(tokens[:, i : i + 1], cache) for i in range(prompt, 9)]
    torch.testing.assert_close(torch.cat(found, 1), hidden[:, prompt - 1 :], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match='make it larger'):
        model.extend(tokens[:, :1], cache)


def test_recomputing_changes_no_gradient():
    model, tokens = made(), torch.randint(11, (2, 9))
    model.loss(tokens).backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.loss(tokens, recompute=True).backward()
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def test_crossings_and_the_square():
    full = {n: 1e-4 * n + 1e-7 * n * n for n in (1024, 4096, 16384)}
    more = square(full)
    assert more[65536] == pytest.approx(1e-4 * 65536 + 1e-7 * 65536**2)
    full |= more
    ours = {n: 1e-3 * n for n in full}
    found = crossing(ours, full, measured_to=16384)
    assert found is not None
    assert found['tokens'] == pytest.approx(9000, rel=0.1)  # 1e-4 + 1e-7 n = 1e-3, between two lengths
    assert not found['extrapolated']
    assert crossing({n: 1e3 * value for n, value in full.items()}, full, measured_to=16384) is None
    assert crossing({n: value / 2 for n, value in full.items()}, full, measured_to=16384)['from_the_first_length_on']
    once = crossing({16384: full[16384] / 2}, full, measured_to=16384)  # a line that was measured at one length
    assert once == {'tokens': 16384, 'extrapolated': False, 'from_the_first_length_on': True}


class Pretended:
    """A worker whose times are known: full attention takes n + n^2 / 2,048, all else 3 n, a decoded token the like."""

    asked: ClassVar[list] = []

    def __init__(self, question, line, length):
        self.asked.append((question, line, length))
        per_token = 1 + length / 2048 if line.model == FULL else 3.0
        self.seconds = 1e-6 * per_token * (1 if question == 'decoding' else length)
        self.about = {'seconds': self.seconds, 'megabytes': length / 1024}
        if question == 'decoding':
            self.about |= {'bytes': 10 * length, 'state_bytes': 10 * length, 'drawn': 1}

    def step(self):
        return self.seconds

    def close(self):
        pass


@pytest.mark.parametrize(('device', 'part'), [('cpu', 'short'), ('cpu', 'long'), ('cuda', 'short')])
def test_a_run_measures_its_plan_once_and_says_where_curves_cross(device, part, tmp_path):
    path, points = tmp_path / 'made.json', full_attention.plan(device, part)
    results = {'device': device, **{question: [] for question in QUESTIONS}}
    Pretended.asked.clear()
    full_attention.measure(results, points, path, Pretended, steps=1)
    wanted = sorted((question, str(line), n) for question, line, lengths in points for n in lengths)
    assert sorted((question, str(line), n) for question, line, n in Pretended.asked) == wanted

    Pretended.asked.clear()  # a run that was stopped goes on with what is missing
    stopped = json.loads(path.read_text())
    left_out = stopped['decoding'].pop()
    full_attention.measure(stopped, points, path, Pretended, steps=1)
    assert [(question, length) for question, _, length in Pretended.asked] == [('decoding', left_out['tokens'])]

    found = json.loads(path.read_text())
    ours = f'RMT, one graph, {"bfloat16" if device == "cuda" else "float32"}, seconds'
    if part == 'short':  # 1 + n / 2,048 = 3
        assert found['crossings']['training'][ours]['tokens'] == 4096
    else:
        assert found['crossings']['training'][ours]['from_the_first_length_on']
        assert found['slopes']['reading']['RMT, eager, float32'] == {'from': 16384, 'to': 1048576, 'times': 1.0}
    if part == 'long':
        made = full_attention.plot([path, tmp_path / 'missing.json'], tmp_path)
        assert [each.name for each in made] == [f'made_{question}.png' for question in QUESTIONS]


def test_a_point_is_measured_in_a_process_of_its_own(tmp_path):
    point = full_attention.Point(1, 'reading', Line('no memory', 'eager', 'float32'), 64, tmp_path)
    assert point.process.pid != os.getpid()
    assert point.about.keys() == {'seconds', 'megabytes'}
    assert point.step() > 0
    point.close()
    assert point.process.exitcode == 0
    assert (tmp_path / 'no_memory_float32_64.safetensors').exists()  # for decoding
