"""The transformer with full attention that the benchmark compares with: it has to be right before it is timed."""

import pytest
import torch

from benchmarks.full_attention import FullTransformer, KVCache, crossing, square


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
