"""Axial attention down the past memories: what `tests/test_rmt.py` and the generation tests do not say of it."""

import pytest
import torch

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RMTState
from recurrent_memory_transformer_pytorch.axial import AxialAttention
from recurrent_memory_transformer_pytorch.state import PastMemories
from segment_recurrence_pytorch import record_attention
from tests.conftest import close, ids, make_rmt, random_weights


def past_of(*shape, valid):
    memories = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return PastMemories(memories, torch.full((shape[0],), valid))


def test_at_the_start_nothing_changes():
    model = RecurrentMemoryTransformer(
        dim=16, num_tokens=20, depth=1, num_memory_tokens=3, seq_len=6, heads=2, dim_head=8, axial_mem_len=4
    )
    _, state = model.advance(ids(2, 6))
    _, state = model.advance(ids(2, 6), state)
    assert torch.equal(model.memory_to_read(state), state.memory)


def test_a_slot_sees_its_own_past_all_of_it_and_no_other_slot():
    axial = random_weights(AxialAttention(16, heads=2, dim_head=8, length=5).double())
    memory = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    past = past_of(1, 4, 3, 16, valid=3)
    of_past, of_memory = torch.autograd.grad(axial(memory, past)[0, 1].sum(), (past.memories, memory))
    seen = of_past[0].abs().sum(-1) > 0  # (t, m)
    assert seen.tolist() == [[False] * 3] + [[False, True, False]] * 3
    assert (of_memory[0].abs().sum(-1) > 0).tolist() == [False, True, False]


def test_what_is_not_valid_may_hold_anything():
    axial = random_weights(AxialAttention(16, heads=2, dim_head=8, length=5).double())
    memory, past = torch.randn(2, 3, 16, dtype=torch.float64), past_of(2, 4, 3, 16, valid=2)
    with torch.no_grad():
        expected = axial(memory, past)
        past.memories[:, :2] = 1e9
        close(axial(memory, past), expected)


def test_the_state_keeps_the_last_memories_newest_last():
    model = make_rmt(axial_mem_len=3)
    state, read = model.initial_state(2), []
    for _ in range(4):
        read.append(state.memory)
        _, state = model.advance(ids(2, 6), state)
    assert state.past.counts.tolist() == [2, 2]
    assert torch.equal(state.past.memories, torch.stack(read[-2:], dim=1))


def test_a_dropped_memory_is_not_kept_alive():
    past = PastMemories(torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.long)).append(torch.ones(2, 4, 5))
    assert past.memories.untyped_storage().nbytes() == past.memories.numel() * 4
    empty = PastMemories(torch.zeros(2, 0, 4, 5), torch.zeros(2, dtype=torch.long))
    after = empty.append(torch.ones(2, 4, 5))
    assert after.memories.shape == (2, 0, 4, 5)
    assert after.counts is not empty.counts


def test_a_padded_row_keeps_memory_and_past_bit_for_bit_while_noise_is_added():
    model = make_rmt(axial_mem_len=3, memory_noise=0.5).train()
    _, state = model.advance(ids(2, 6))
    mask = torch.tensor([[True] * 6, [False] * 6])
    _, after = model.advance(ids(2, 6), state, mask=mask)
    assert torch.equal(after.memory[1], state.memory[1])
    assert torch.equal(after.past.memories[1], state.past.memories[1])
    assert after.past.counts.tolist() == [2, 1]


def test_past_memories_are_as_noisy_as_they_were_read():
    """Else a model could read the same memory without noise a segment later."""
    model = make_rmt(axial_mem_len=3, memory_noise=0.5).train()
    _, state = model.advance(ids(2, 6))
    assert torch.equal(state.past.memories[:, -1], model.initial_state(2).memory)  # a first memory has no noise
    tokens = ids(2, 6)
    torch.manual_seed(1)
    _, after = model.advance(tokens, state)
    torch.manual_seed(1)
    close(after.past.memories[:, -1], state.memory + 0.5 * torch.randn_like(state.memory))


def test_the_attention_is_on_record():
    model = make_rmt(axial_mem_len=3)
    with record_attention() as calls:
        model.memory_to_read(model.initial_state(2))
    assert [call.backend for call in calls] == ['sdpa']


def test_past_memories_carry_a_gradient():
    """Of the first memory, straight from the third segment: not through the second."""
    model = make_rmt(axial_mem_len=3)
    state = model.initial_state(1)
    first = state.memory.detach().requires_grad_()
    past = PastMemories(torch.stack((torch.zeros_like(first), first), dim=1), torch.tensor([1]))
    hidden, _ = model.advance(ids(1, 6), RMTState(state.memory.detach(), None, past))
    assert torch.autograd.grad(hidden.sum(), first)[0].abs().sum() > 0


def test_forward_takes_back_what_it_returns_and_refuses_other_states():
    model, plain = make_rmt(axial_mem_len=3), make_rmt()
    _, state = model(ids(2, 6))
    assert isinstance(state, RMTState)
    model(ids(2, 6), state)
    model(ids(2, 6), state.memory)
    with pytest.raises(ValueError, match=r'state\.past is PastMemories, this model has None there'):
        plain(ids(2, 6), state)
    with pytest.raises(ValueError, match=r'state\.past is None, this model has PastMemories there'):
        model(ids(2, 6), RMTState(state.memory))
    for past in (state.memory, tuple(state.past)):
        with pytest.raises(ValueError, match=r'state\.past is (Tensor|tuple), this model has PastMemories there'):
            model(ids(2, 6), RMTState(state.memory, None, past))
    with pytest.raises(ValueError, match=r'state\.past\.counts: shape'):
        model(ids(2, 6), RMTState(state.memory, None, state.past._replace(counts=state.past.counts[:1])))
    with pytest.raises(ValueError, match=r'state\.past\.memories: shape'):
        make_rmt(axial_mem_len=4)(ids(2, 6), state)
    with pytest.raises(ValueError, match='axial_mem_len is 2, num_memory_tokens 0'):
        make_rmt(axial_mem_len=2, num_memory_tokens=0)
