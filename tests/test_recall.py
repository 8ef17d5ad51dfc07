"""A task that only the memory can solve: which value was marked, two segments ago."""

import pytest
import torch

from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

LENGTH, SEGMENTS, VALUES, NOISE = 8, 3, 8, 8
MARK, QUERY = VALUES + NOISE, VALUES + NOISE + 1


def draw(rows):
    """MARK and a value somewhere in the first segment of noise, QUERY at the end; chance is 1 / 8."""
    x = torch.randint(VALUES, MARK, (rows, LENGTH * SEGMENTS))
    value, at = torch.randint(0, VALUES, (rows,)), torch.randint(0, LENGTH - 1, (rows,))
    x[torch.arange(rows), at], x[torch.arange(rows), at + 1], x[:, -1] = MARK, value, QUERY
    return x, torch.full_like(x, -100).index_copy(1, torch.tensor([x.shape[1] - 1]), value[:, None])


def accuracy_after(steps, *, published, **options):
    """Accuracy after training; published: its gate start, and one learning rate for everything."""
    model = InfiniTransformer(num_tokens=QUERY + 1, dim=32, depth=2, heads=2, dim_head=16, **options)
    wrapper = InfiniTransformerWrapper(model, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters() if published else model.param_groups(3e-3, 0.01), lr=3e-3)
    for _ in range(steps):
        x, labels = draw(32)
        optimizer.zero_grad()
        wrapper(x, labels=labels).backward()
        optimizer.step()
    x, labels = draw(512)
    with torch.no_grad():
        return (wrapper.logits(x)[0][:, -1].argmax(-1) == labels[:, -1]).double().mean()


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('options', [{}, {'memory_rule': 'linear'}, {'memory_rule': 'delta'}], ids=str)
def test_the_memory_learns(options, seed):
    """At the default settings; with the rules of the paper from equal shares, which learn so short a text sooner."""
    torch.manual_seed(seed)
    assert accuracy_after(200, published=False, **(options and {'head_gate_init_value': 0.0}), **options) > 0.95


def test_it_does_not_at_the_published_gate_start():
    torch.manual_seed(0)
    assert accuracy_after(600, published=True, use_mem_delta_rule=False, head_gate_init_value=10.0) < 0.5
