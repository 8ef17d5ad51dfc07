"""`add_infini_attention`: a compressive memory in the attention of a pretrained language model of each family."""

import pytest
import torch

pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')

from infini_transformer_pytorch.huggingface import add_infini_attention
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.testing import check_model
from tests.conftest import close, same_gradients
from tests.pretrained import (  # noqa: F401  softmax_in_float64 acts on every test
    LENGTH,
    ROTARY,
    decoded,
    families,
    gradients_of,
    softmax_in_float64,
    tiny_lm,
    tokens,
)

CASES = [(name, '') for name in ROTARY] + [('llama', 'eager')]
every_family = families(CASES)
OPTIONS = {
    'linear': {},
    'delta, strength': {'memory_rule': 'delta', 'learned_delta_update': True},
    'delta, decay': {'memory_rule': 'delta', 'memory_decay': True},
    'deltanet': {'memory_rule': 'deltanet'},
    'one layer': {'memory_rule': 'delta', 'layers': [1]},
}
every_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())


def wrapped(name='llama', attention='', memory_rule='delta', segments_per_pass=None, gate=0.0, **options):
    model = add_infini_attention(
        tiny_lm(name, attention), memory_rule=memory_rule, head_gate_init_value=gate, **options
    )
    if not gate:
        with torch.no_grad():
            for memory in model.memory_layers:
                memory.fastweight_mem.head_gates.normal_(std=0.5)
    return SegmentWrapper(model, segment_length=LENGTH, segments_per_pass=segments_per_pass)


def check_all_paths(wrapper):
    """Windows of segments, replay and recomputing are the loop over segments; decoding is the parallel pass."""
    model, x = wrapper.model, tokens(3, 21)
    found = []
    for options in ({'segments_per_pass': 1}, {}, {'segments_per_pass': 2, 'recompute': True}):
        each = SegmentWrapper(model, segment_length=LENGTH, **options)
        loss, _, state = each.loss(x)
        loss.backward()
        found.append((loss.detach(), [part.detach() for layer in state for part in layer], gradients_of(model)))
    loss, _, state = SegmentWrapper(model, segment_length=LENGTH, segments_per_pass=1).loss(x, backward=True)
    found.append((loss, [part for layer in state for part in layer], gradients_of(model)))
    assert all(found[0][2][name].any() for name in found[0][2] if 'infini' in name)
    for have in found[1:]:
        close(have[:2], found[0][:2])
        same_gradients(have[2], found[0][2])
    with torch.no_grad():
        logits = wrapper.logits(x)[0]
        for ragged in (False, True):
            close(decoded(model, x, LENGTH, ragged), logits)


@every_family
def test_all_paths_are_the_loop_over_segments(name, attention, monkeypatch):
    # the norms of Gemma compute in float32, whatever the model is: sums of gradients would differ by 1e-8
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    check_all_paths(wrapped(name, attention))


@every_option
def test_all_paths_are_the_loop_over_segments_with_every_option(options):
    check_all_paths(wrapped('llama', **options))


@every_family
@torch.no_grad()
def test_without_the_memory_argument_the_model_is_the_original(name, attention):
    lm, x = tiny_lm(name, attention), tokens(2, 11)
    changed = wrapped(name, attention).model.lm
    assert torch.equal(changed(x).logits, lm(x).logits)
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(changed.generate(x, **options), lm.generate(x, **options))


@every_family
@torch.no_grad()
def test_with_closed_gates_each_segment_has_the_logits_of_the_original(name, attention):
    lm, x = tiny_lm(name, attention), tokens(3, 21)
    logits = wrapped(name, attention, gate=60.0).logits(x)[0]
    close(logits, torch.cat([lm(piece).logits for piece in x.split(LENGTH, dim=1)], dim=1))
    assert (wrapped(name, attention).logits(x)[0] - logits).abs().max() > 1e-3


@every_family
def test_the_contract_holds(name, attention):
    check_model(wrapped(name, attention).model)


def test_gates_that_are_one_for_all_tokens():
    wrapper = wrapped()
    for memory in wrapper.model.memory_layers:
        gates = torch.randn(memory.fastweight_mem.heads, 1)
        memory.gates = lambda x, gates=gates: gates.to(x.dtype)
    x = tokens(3, 21)
    logits = wrapper.logits(x)[0].detach()
    close(SegmentWrapper(wrapper.model, segment_length=LENGTH, segments_per_pass=1).logits(x)[0].detach(), logits)
    with torch.no_grad():
        close(decoded(wrapper.model, x, LENGTH, False), logits)


def test_what_states_are_compared_with_takes_no_memory():
    state = wrapped().model.largest_state(1000)
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for each in state for part in each}
    assert sum(storages.values()) < 1e5
