"""The Recurrent Memory Transformer against its definition in `reference`, and what its options promise."""

import pytest
import torch
from torch import nn

from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper, RMTState
from segment_recurrence_pytorch import SegmentWrapper, record_attention
from segment_recurrence_pytorch.layers import rotations_between
from segment_recurrence_pytorch.state import detach, leaves
from tests.conftest import DROPOUT, RMT_OPTIONS, close, ids, make_rmt, random_weights
from tests.reference import rmt_row


def segments(model, x, mask=None, state=None):
    """Hidden states and state of the segment loop of `advance`."""
    hiddens = []
    for start in range(0, x.shape[1], model.seq_len):
        at = slice(start, start + model.seq_len)
        hidden, state = model.advance(x[:, at], state, mask=None if mask is None else mask[:, at])
        hiddens.append(hidden)
    return torch.cat(hiddens, 1), state


def xl_entries(state, row):
    """The valid XL entries of one row, as the reference lists them."""
    if state.xl is None:
        return None
    count = state.xl.length() if state.xl.counts is None else int(state.xl.counts[row])
    first = state.xl.length() - count
    return [
        [(state.xl.keys[row, layer, :, i], state.xl.values[row, layer, :, i]) for i in range(first, state.xl.length())]
        for layer in range(state.xl.keys.shape[1])
    ]


def same_xl(state, row, expected):
    entries = xl_entries(state, row)
    if entries is None:
        assert not any(expected)
        return
    for have, want in zip(entries, expected, strict=True):
        assert len(have) == len(want)
        for (k, v), (want_k, want_v) in zip(have, want, strict=True):
            close(k, want_k)
            close(v, want_v)


@pytest.mark.parametrize('options', RMT_OPTIONS.values(), ids=RMT_OPTIONS.keys())
def test_equals_the_definition(options):
    model, x = make_rmt(**options), ids(2, 20)
    hidden, state = segments(model, x)
    for row in range(2):
        expected, memory, xl = rmt_row(model, x[row])
        close(hidden[row], expected)
        close(state.memory[row], memory)
        same_xl(state, row, xl)


@pytest.mark.parametrize('options', RMT_OPTIONS.values(), ids=RMT_OPTIONS.keys())
def test_padded_rows_equal_the_row_alone(options):
    """Prefixes, holes, and rows that are over before the others; the state goes on from there."""
    model, x = make_rmt(**options), ids(5, 20)
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[1, 15:] = False
    mask[2, 4:] = False
    mask[3, [2, 7, 8, 13]] = False
    mask[4] = False
    hidden, state = segments(model, x, mask)
    for row in range(5):
        expected, memory, xl = rmt_row(model, x[row], mask[row])
        close(hidden[row, mask[row]], expected)
        close(state.memory[row], memory)
        same_xl(state, row, xl)
    y = ids(5, 6)
    hidden, after = segments(model, y, state=state)
    for row in range(5):
        gap = 24 - 20  # the rest of the last segment
        text = torch.cat((x[row], y[row, :gap], y[row]))
        expected, memory, xl = rmt_row(model, text, torch.cat((mask[row], mask.new_tensor([False] * gap + [True] * 6))))
        close(hidden[row], expected[-6:])
        close(after.memory[row], memory)
        same_xl(after, row, xl)


@pytest.mark.parametrize('options', [RMT_OPTIONS[name] for name in ('plain', 'xl', 'axial')], ids=str)
def test_a_row_without_a_valid_token_keeps_its_state_bit_for_bit(options):
    model = make_rmt(**options)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    _, state = model.advance(ids(3, 6), None, mask=mask)
    assert torch.equal(state.memory[1], model.initial_memory)
    if state.xl is not None:
        assert state.xl.counts.tolist() == [6, 0, 6]
        assert not state.xl.keys[1].any()
    _, state = model.advance(ids(3, 6), state)
    _, after = model.advance(ids(3, 6), state, mask=mask)
    for old, new in zip(leaves(state), leaves(after), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0]) or old.ndim == 1


@pytest.mark.parametrize('options', RMT_OPTIONS.values(), ids=RMT_OPTIONS.keys())
def test_only_the_state_needs_less_work_and_is_the_same(options):
    model, x = make_rmt(**options), ids(2, 6)
    hidden, state = model.advance(x)
    nothing, same = model.advance(x, need_hidden=False)
    assert hidden is not None
    assert nothing is None
    for a, b in zip(leaves(state), leaves(same), strict=True):
        close(a, b, 1e-12)


def test_changing_a_token_changes_no_earlier_logit():
    for options in RMT_OPTIONS.values():
        model = make_rmt(**options)
        if not model.causal:
            continue
        wrapper, x = RecurrentMemoryTransformerWrapper(model), ids(1, 20)
        before = wrapper(x)[0]
        for at in (0, 3, 6, 11, 12, 19):
            changed = x.clone()
            changed[0, at] = (changed[0, at] + 1) % 20
            after = wrapper(changed)[0]
            assert torch.equal(before[:, :at], after[:, :at])
            assert not torch.equal(before[:, at], after[:, at])
            if model.num_memory_tokens and at < 12:
                assert not torch.allclose(before[:, 12:], after[:, 12:])  # it is remembered


def test_padding_changes_no_neighbour():
    for options in RMT_OPTIONS.values():
        model = make_rmt(**options)
        x, mask = ids(2, 18), torch.ones(2, 18, dtype=torch.bool)
        mask[1, 8:] = False
        alone, state = segments(model, x[:1])
        together, both = segments(model, x, mask)
        close(together[:1], alone)
        close(both.memory[:1], state.memory)
        other = x.clone()
        other[1, 8:] = ids(10)
        assert torch.equal(segments(model, other, mask)[0][mask], together[mask])


def test_attention_takes_no_mask_tensor_without_padding():
    for options in RMT_OPTIONS.values():
        model, x = make_rmt(**options), ids(2, 20)
        with record_attention() as calls:
            segments(model, x)
        # axial attention, one query a slot, says by a mask which past memories there are
        assert calls
        assert not any(call.masked for call in calls if call.num_queries > 1)
        with record_attention() as calls:
            model.advance(x[:, :6], mask=torch.rand(2, 6) < 0.7)
        assert len(calls) == len(model.layers) + (model.axial is not None)
        assert all(call.masked for call in calls)


def test_xl_memories_hold_text_only_and_as_much_as_asked_for():
    for length in (1, 4, 6, 14, 40):
        model = make_rmt(use_xl_memories=True, xl_mem_len=length)
        _, state = segments(model, ids(1, 20))
        assert state.xl.length() == min(length, 20)
        assert state.xl.keys.untyped_storage().nbytes() == state.xl.keys.numel() * 8
        assert not state.xl.keys.requires_grad
    off = make_rmt(use_xl_memories=True, xl_mem_len=0)
    assert off.advance(ids(1, 6))[1].xl is None


def test_xl_memories_and_enhanced_recurrence_have_an_effect():
    x, logits = ids(1, 18), []
    for options in ({}, {'use_xl_memories': True}, {'use_xl_memories': True, 'enhanced_xl_recurrence': True}):
        torch.manual_seed(1)
        logits.append(RecurrentMemoryTransformerWrapper(make_rmt(**options))(x)[0])
    assert torch.equal(logits[0][:, :6], logits[1][:, :6])
    assert not torch.allclose(logits[0][:, 6:], logits[1][:, 6:])
    assert not torch.allclose(logits[1][:, 6:], logits[2][:, 6:])


def test_forward_returns_two_values_and_takes_them_back():
    model, x = make_rmt(), ids(2, 6)
    logits, memory = model(x)
    assert logits.shape == (2, 6, 20)
    assert memory.shape == (2, 3, 16)
    close(model(x, memory)[0], model.to_logits(model.advance(x, RMTState(memory))[0]))
    close(model(x[:1], memory[0])[0], model(x[:1], memory[:1])[0])
    xl_model = make_rmt(use_xl_memories=True)
    _, state = xl_model(x)
    assert isinstance(state, RMTState)
    assert xl_model(x, state)[1].xl.length() == 6
    assert xl_model(x, memory)[0].shape == (2, 6, 20)  # a tensor: no XL memories yet
    assert make_rmt(num_memory_tokens=0)(x)[1].shape == (2, 0, 16)


def test_embeddings_in_and_out_and_labels():
    model, x = make_rmt(), ids(2, 6)
    logits, memory = model(x)
    embeddings, same = model(model.token_emb(x), return_embeddings=True)
    close(model.to_logits(embeddings), logits)
    close(same, memory)
    labels = ids(2, 6)
    labels[0, :2], labels[1, 3] = -100, model.ignore_index
    loss, _ = model(x, labels=labels)
    kept = (labels >= 0).flatten()
    close(loss, nn.functional.cross_entropy(logits.flatten(0, 1)[kept], labels.flatten()[kept]))
    assert model(x, labels=torch.full_like(x, -100))[0] == 0


def test_masked_out_memories_are_those_of_a_first_segment():
    for options in RMT_OPTIONS.values():
        model, x = make_rmt(**options), ids(2, 6)
        memory = torch.randn(2, model.num_memory_tokens, 16, dtype=torch.float64)
        close(model(x, memory, mask_out_read_memories=True)[0], model(x)[0])
        if model.num_memory_tokens:
            assert not torch.allclose(model(x, memory)[0], model(x)[0])


def test_an_empty_segment_changes_nothing():
    for options in RMT_OPTIONS.values():
        model = make_rmt(**options)
        _, state = model.advance(ids(2, 6))
        hidden, same = model.advance(ids(2, 0), state)
        assert all(map(torch.equal, leaves(same), leaves(state)))
        assert hidden.shape == (2, 0, 16)


def test_padded_embeddings_may_hold_anything():
    model, embeddings = make_rmt(), torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    expected, memory = model(embeddings, mask=mask)
    embeddings[1, 3:] = torch.nan
    logits, same = model(embeddings, mask=mask)
    close(logits[mask], expected[mask])
    close(same, memory)


def test_published_name_of_the_memory_mask():
    assert make_rmt().memory_mask == 'block'
    assert make_rmt(memory_not_causal=True).memory_mask == 'block'
    assert make_rmt(memory_not_causal=False).memory_mask == 'causal'
    with pytest.raises(ValueError, match='give only memory_mask'):
        make_rmt(memory_not_causal=True, memory_mask='block')


def test_reset_rows_start_again():
    for options in (RMT_OPTIONS['plain'], RMT_OPTIONS['xl long'], RMT_OPTIONS['no memory']):
        model, x, y = make_rmt(**options), ids(3, 12), ids(3, 12)
        _, state = segments(model, x)
        before = [leaf.clone() for leaf in leaves(state)]
        reset = model.reset(state, torch.tensor([True, False, True]))
        assert all(map(torch.equal, leaves(state), before))
        after, _ = segments(model, y, state=reset)
        close(after[[0, 2]], segments(model, y[[0, 2]])[0])
        close(after[1:2], segments(model, y[1:2], state=segments(model, x[1:2])[1])[0])


def test_half_types_keep_their_positions():
    turns = rotations_between(10000, 10008, 16, theta=32768.0, like=torch.empty(0, dtype=torch.bfloat16))
    assert turns.dtype == torch.float32
    assert turns[:, 0, 0].unique().numel() == 8
    torch.manual_seed(1)
    model = random_weights(RecurrentMemoryTransformer(
        32, num_tokens=20, depth=2, num_memory_tokens=3, seq_len=8, heads=2, dim_head=16,
        rotary_pos_emb=True, abs_pos_emb=False, use_xl_memories=True,
    ))  # fmt: skip
    x = ids(2, 24)
    exact, state = segments(model, x)
    half, half_state = segments(model.bfloat16(), x)
    assert half_state.memory.dtype == torch.bfloat16
    assert half.dtype == torch.bfloat16
    error = (half - exact).norm() / exact.norm()
    assert error < 0.05
    assert (half_state.memory - state.memory).norm() / state.memory.norm() < 0.05


@pytest.mark.filterwarnings('ignore:.*should not be instantiated:DeprecationWarning')  # of the compiler's own
@pytest.mark.parametrize('options', [{}, RMT_OPTIONS['xl mixed']], ids=['plain', 'xl mixed'])
def test_compiles_without_a_graph_break(options):
    model, x = make_rmt(**options), ids(2, 6)
    _, state = model.advance(x)
    state = detach(state)
    compiled = torch.compile(model.advance, fullgraph=True, backend='aot_eager')
    hidden, after = model.advance(x, state)
    compiled_hidden, compiled_after = compiled(x, state)
    close(compiled_hidden, hidden)
    close(compiled_after.memory, after.memory)
    close(torch.compile(model, fullgraph=True, backend='aot_eager')(x)[0], model(x)[0])
    wrapper = SegmentWrapper(model, segment_length=x.shape[1])
    compiled = torch.compile(wrapper, fullgraph=True, backend='eager')
    close(compiled(x).loss, wrapper(x).loss)


def test_initial_weights():
    model = RecurrentMemoryTransformer(64, num_tokens=256, depth=4, num_memory_tokens=8, seq_len=32)
    assert model.initial_memory.unique(dim=0).shape[0] == 8
    for name in ('initial_memory', 'memory_tokens', 'read_memory_emb', 'token_emb.weight'):
        assert 0.9 < 8 * model.get_parameter(name).std() < 1.1
    logits, _ = model(torch.randint(0, 256, (2, 32)))
    assert abs(nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 256, (64,))) - 5.55) < 0.4


def test_embeddings_learn_faster_unless_the_logits_use_them_too():
    for tied in (False, True):
        model = make_rmt(tie_embeddings=tied)
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        rates = {named[id(p)]: group['lr'] for group in model.param_groups(1.0, 0.1) for p in group['params']}
        assert rates.keys() == set(named.values())
        fast = {'token_emb.weight', 'pos_emb.weight'} if not tied else set()
        assert {name for name, rate in rates.items() if rate == 5} == fast
        assert set(rates.values()) == ({1} if tied else {1, 5})
        model.token_emb.weight.requires_grad_(False)  # what is frozen is in no group
        assert sum(len(group['params']) for group in model.param_groups(1.0, 0.1)) == len(named) - 1


def test_dropout_is_drawn_with_and_without_hidden_states():
    model, x = make_rmt(**DROPOUT), ids(2, 6)
    states = []
    for need_hidden in (True, False):
        torch.manual_seed(3)
        states.append((model.advance(x, need_hidden=need_hidden)[1].memory, torch.rand(1)))
    close(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_second_derivatives_and_functional_gradients():
    """As docs/research.md says: with the naive backend, and `torch.func.grad` with any."""
    model, x = make_rmt(), ids(2, 9)
    weights = dict(model.named_parameters())
    wrapper = SegmentWrapper(model, segment_length=5)
    gradients = torch.autograd.grad(wrapper.loss(x).loss, list(weights.values()))

    def functional(parameters):
        return torch.func.functional_call(wrapper, {f'model.{n}': p for n, p in parameters.items()}, (x,)).loss

    found = torch.func.grad(functional)({name: weight.detach() for name, weight in weights.items()})
    for name, gradient in zip(weights, gradients, strict=True):
        close(found[name], gradient)

    model.attention_backend = 'naive'
    step = {name: torch.randn_like(weight) for name, weight in weights.items()}
    first = torch.autograd.grad(wrapper.loss(x).loss, list(weights.values()), create_graph=True)
    along = sum((g * s).sum() for g, s in zip(first, step.values(), strict=True))
    second = torch.autograd.grad(along, list(weights.values()), allow_unused=True)
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in weights.items():
                weight += sign * 1e-5 * step[name]
        moved.append(torch.autograd.grad(wrapper.loss(x).loss, list(weights.values())))
        with torch.no_grad():
            for name, weight in weights.items():
                weight -= sign * 1e-5 * step[name]
    for have, plus, minus in zip(second, *moved, strict=True):
        want = (plus - minus) / 2e-5
        close(torch.zeros_like(want) if have is None else have, want, 1e-6)
