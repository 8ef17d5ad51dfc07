"""What a researcher may want to replace is one method.

Each change here is a subclass of at most 20 lines, and training, memory replay and exact decoding go with it.
"""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import nn

from infini_transformer_pytorch import FastweightMemory, InfiniTransformer
from infini_transformer_pytorch.attention import InfiniAttention
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from recurrent_memory_transformer_pytorch.attention import Attention, Positions
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.cache import RereadSegment
from segment_recurrence_pytorch.layers import ResidualBlock, rotate
from tests.conftest import RMT_OPTIONS, close, ids, make_infini, make_rmt, random_weights, same_gradients
from tests.generating import recorded
from tests.reference import infini_row, rmt_row

LENGTH = 5


class GatedMemory(RecurrentMemoryTransformer):
    """The next memory is a mix of what was written and what was read, as a gated recurrent unit has it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.to_gate = nn.Linear(2 * self.dim, self.dim)

    def next_memory(self, written, memory):
        gate = self.to_gate(torch.cat((written, memory), dim=-1)).sigmoid()
        return gate * written + (1 - gate) * memory


class TokenGates(InfiniAttention):
    """A gate for each head and token, computed from the token."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.to_gates = nn.Linear(dim, self.heads)

    def gates(self, x):
        return self.to_gates(x).transpose(-1, -2)


class GatedByTokens(InfiniTransformer):
    def make_attention(self, index, **options):
        return TokenGates(self.dim, **options)


class SurpriseStrength(InfiniAttention):
    """A strength of each token that no parameter of its own makes: how far the token is from the mean of its row."""

    def strength_and_decay(self, x):
        strength = x.pow(2).mean(-1, keepdim=True).sigmoid().expand(*x.shape[:-1], self.kv_heads)
        return strength.transpose(-1, -2), None


class StrongBySurprise(InfiniTransformer):
    def make_attention(self, index, **options):
        return SurpriseStrength(self.dim, **options)


class InterpolatedPositions(InfiniTransformer):
    """Rotary positions pressed together, as in arXiv 2306.15595."""

    def rotations(self, length, like):
        whole = super().rotations(2 * length, like)
        return whole[::2]


class Reversed(Positions):
    """Text positions that count down."""

    def text(self, start, stop, like):
        return super().text(-stop + 1, -start + 1, like).flip(0)


class ReversedPositions(RecurrentMemoryTransformer):
    def __init__(self, **options):
        super().__init__(**options, rotary_pos_emb=True)
        self.positions = Reversed(*self.positions)


class ParallelBlock(ResidualBlock):
    """Attention and feed-forward beside each other, as in GPT-J."""

    def forward(self, x, surroundings):
        normed = self.attn_norm(x)
        out = self.attn(normed, surroundings)
        return (x + self.ff(normed))[..., x.shape[-2] - out.shape[-2] :, :] + out


class ParallelBlocks(RecurrentMemoryTransformer):
    def make_block(self, index, attention, **options):
        return ParallelBlock(self.dim, attention, **options)


class SigmoidValues(Attention):
    """Values in (0, 1)."""

    def project(self, x, first_row=0):
        q, k, v = super().project(x, first_row)
        return q, k, v.sigmoid()


class BoundedValues(RecurrentMemoryTransformer):
    def make_attention(self, index, **options):
        return SigmoidValues(self.dim, **options)


class SigmoidRecalled(InfiniAttention):
    def split(self, heads):
        q, k, v = super().split(heads)
        return q, k, v.sigmoid()


class BoundedRecall(InfiniTransformer):
    def make_attention(self, index, **options):
        return SigmoidRecalled(self.dim, **options)


class NormedKeys(InfiniTransformer):
    """Only keys are normalised."""

    def make_attention(self, index, **options):
        attn = super().make_attention(index, **options)
        attn.k_norm = nn.LayerNorm(attn.dim_head)
        return attn


class Change(NamedTuple):
    """A change to a model: the model's maker, the class with the change, all its classes, and options of both."""

    make: object
    changed: type
    parts: tuple = ()
    options: dict | None = None

    def wrapper(self, **options):
        sizes = dict(num_tokens=20, dim=16, depth=2, heads=2)
        own = dict(num_memory_tokens=3, seq_len=6, dim_head=8) if self.make is make_rmt else dict(dim_head=4)
        model = random_weights(self.changed(**{**sizes, **own, **(self.options or {})}).double())
        return SegmentWrapper(model, segment_length=LENGTH, **options)


CHANGES = {
    'gated memory': Change(make_rmt, GatedMemory),
    'gated memory, xl, axial': Change(
        make_rmt, GatedMemory, options={'use_xl_memories': True, 'axial_mem_len': 2, 'rotary_pos_emb': True}
    ),
    'gates of the token': Change(make_infini, GatedByTokens, (TokenGates,)),
    'gates of the token, grouped': Change(
        make_infini, GatedByTokens, (TokenGates,), {'heads': 4, 'kv_heads': 2, 'memory_rule': 'deltanet'}
    ),
    'strength by surprise': Change(make_infini, StrongBySurprise, (SurpriseStrength,), {'memory_rule': 'delta'}),
    'interpolated positions': Change(make_infini, InterpolatedPositions),
    'reversed positions': Change(make_rmt, ReversedPositions, (Reversed,), {'use_xl_memories': True}),
    'parallel blocks': Change(make_rmt, ParallelBlocks, (ParallelBlock,)),
    'bounded recall': Change(make_infini, BoundedRecall, (SigmoidRecalled,)),
    'bounded recall, norms': Change(make_infini, BoundedRecall, (SigmoidRecalled,), {'qk_norm': True}),
    'normed keys': Change(make_infini, NormedKeys),
    'bounded values': Change(make_rmt, BoundedValues, (SigmoidValues,), {'use_xl_memories': True}),
}
ALL = pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())


@ALL
def test_a_change_is_short(change):
    assert sum(len(inspect.getsource(each).splitlines()) for each in (change.changed, *change.parts)) <= 20


@ALL
def test_a_change_has_an_effect(change):
    """It is no other name for the model as it was."""
    wrapper = change.wrapper()
    plain = change.make(**wrapper.model.arguments)
    plain.load_state_dict(wrapper.model.state_dict(), strict=False)
    x = ids(1, 3 * LENGTH)
    others, _ = SegmentWrapper(plain, segment_length=LENGTH).logits(x)
    assert not torch.allclose(wrapper.logits(x)[0], others)


@ALL
@pytest.mark.parametrize('k', [None, 2])
def test_a_change_trains_by_every_kind_of_back_propagation(change, k):
    wrapper, x = change.wrapper(backprop_segments=k), ids(3, 4 * LENGTH + 3)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 13:], mask[2, [0, 7, 8]] = False, False
    found = []
    for way in ('one graph', 'recompute', 'replay'):
        wrapper.recompute = way == 'recompute'
        wrapper.zero_grad()
        loss, _, _ = wrapper.loss(x, mask=mask, backward=way == 'replay')
        if way != 'replay':
            loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in wrapper.model.named_parameters()}))
    for loss, gradients in found[1:]:
        close(loss, found[0][0])
        same_gradients(gradients, found[0][1])
    added = set(found[0][1]) - set(dict(change.make().named_parameters()))
    assert all(found[0][1][name].any() for name in added)


@ALL
def test_a_change_decodes_exactly(change):
    """Aligned and ragged, through several borders, and from a cursor."""
    wrapper, prompts = change.wrapper(), [ids(n) for n in (3, 5, 12)]
    for given in (prompts, ids(2, 8)):
        new, logits, _ = recorded(wrapper, given, 3 * LENGTH + 1)
        for row, prompt in enumerate(given):
            expected, _ = wrapper.logits(torch.cat((prompt, new[row]))[None])
            close(logits[row], expected[0, len(prompt) - 1 : -1])
    _, cursor = wrapper.generate_tokens(given, 4, temperature=0, return_cursor=True)
    close(recorded(wrapper, None, 9, state=cursor)[1], logits[:, 4:13])


def test_the_memory_made_by_the_seam_is_the_memory():
    """By hand: the plain model's memory where the gate is open, and the memory that was read where it is shut."""
    for value, wanted in ((40.0, 'written'), (-40.0, 'read')):
        model = CHANGES['gated memory'].wrapper().model
        with torch.no_grad():
            model.to_gate.weight.zero_()
            model.to_gate.bias.fill_(value)
        plain = make_rmt()
        plain.load_state_dict(model.state_dict(), strict=False)
        memory = torch.randn(2, 3, 16, dtype=torch.float64)
        x = ids(2, LENGTH)
        close(model(x, memory)[1], plain(x, memory)[1] if wanted == 'written' else memory)


@pytest.mark.parametrize('options', [{}, {'use_xl_memories': True, 'xl_mem_len': 9}], ids=['plain', 'xl'])
def test_the_positions_of_the_rmt_are_arguments(options):
    x, found = ids(1, 14), []
    for positions in ({}, {'rotary_theta': 100.0}, {'first_text_position': 40}):
        torch.manual_seed(3)
        model = make_rmt(**{**RMT_OPTIONS['rotary'], **options, **positions})
        hidden, _, _ = rmt_row(model, x[0])
        logits, _ = SegmentWrapper(model).logits(x)
        close(logits[0], model.to_logits(hidden))
        found.append(logits)
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_the_positions_of_the_infini_transformer_are_arguments():
    x, found = ids(1, 14), []
    for theta in (10000.0, 50.0):
        torch.manual_seed(3)
        model = make_infini(rotary_theta=theta)
        hidden, _ = infini_row(model, x[0], LENGTH)
        logits, _ = SegmentWrapper(model, segment_length=LENGTH).logits(x)
        close(logits[0], model.to_logits(hidden))
        found.append(logits)
    assert not torch.allclose(*found)


@pytest.mark.parametrize('name', ['rotary_theta', 'first_text_position'])
def test_positions_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f'{name} is -1'):
        make_rmt(rotary_pos_emb=True, **{name: -1})
    with pytest.raises(ValueError, match='rotary_theta is 0'):
        make_infini(rotary_theta=0)


def test_gates_that_differ_by_token_mix_each_token_by_its_own():
    memory = FastweightMemory(2).double()
    keys, values, queries = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    past = memory.create_new_memories(keys, values)
    out = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    gates = torch.randn(1, 2, 4, dtype=torch.float64)
    mixed = memory.retrieve_and_add_to_output(out, queries, past, gates)
    recalled = memory.retrieve_and_add_to_output(out, queries, past, torch.full_like(gates, -torch.inf))
    share = gates.sigmoid()[..., None]
    close(mixed, share * out + (1 - share) * recalled)


@ALL
def test_a_change_comes_back_from_a_folder(change, tmp_path):
    """Also where the class gives its base class an argument itself."""
    wrapper, x = change.wrapper(), ids(2, 11)
    wrapper.model.save_pretrained(tmp_path)
    again = change.changed.from_pretrained(tmp_path)
    assert again.arguments == wrapper.model.arguments
    with torch.no_grad():
        want = wrapper.eval().logits(x)[0]
        close(SegmentWrapper(again, segment_length=wrapper.segment_length).logits(x)[0], want)


def test_a_class_that_fixes_another_value_than_when_it_was_saved_is_refused(tmp_path):
    rule = 'linear'

    class Fixed(InfiniTransformer):
        def __init__(self, **options):
            super().__init__(memory_rule=rule, **options)

    Fixed(num_tokens=20, dim=16, depth=1, heads=1, dim_head=8).save_pretrained(tmp_path)
    assert Fixed.from_pretrained(tmp_path).memory_rule == 'linear'
    rule = 'delta'
    with pytest.raises(ValueError, match="it was saved with memory_rule='linear', and now fixes 'delta'"):
        Fixed.from_pretrained(tmp_path)


def test_rotations_of_half_precision_are_taken():
    t, rotations = torch.randn(2, 5, 8), torch.randn(5, 4, 2)
    close(rotate(t, rotations.bfloat16()), rotate(t, rotations.bfloat16().float()))


@pytest.mark.parametrize('passes', [1, 3])
def test_every_segment_is_told_how_long_a_full_one_is(passes):
    """Whether it is read alone, in a window, or again and again in generation."""
    told = set()

    class Told(RecurrentMemoryTransformer):
        def advance(self, tokens, state=None, *, segment_length=None, **options):
            told.add(segment_length)
            return super().advance(tokens, state, segment_length=segment_length, **options)

        def open_segment(self, state, segment_length):
            return RereadSegment(self, state, segment_length)

    model = Told(num_tokens=20, dim=16, depth=1, heads=1, dim_head=8, seq_len=8, num_memory_tokens=2)
    wrapper = SegmentWrapper(model, segment_length=4, segments_per_pass=passes)
    wrapper.loss(ids(2, 11), backward=True)
    wrapper.logits(ids(2, 11))
    wrapper.generate_tokens([ids(1, 6)[0], ids(1, 3)[0]], 6)
    assert told == {4}


def test_further_arguments_may_be_taken_as_options():
    class Options(InfiniTransformer):
        def advance(self, tokens, state=None, **options):
            return super().advance(tokens, state, **options)

    model = make_infini(memory_rule='linear')
    other = Options(**model.arguments).double()
    other.load_state_dict(model.state_dict())
    x, scale = ids(2, 13), {'write_scale': torch.rand(2, 3).double()}
    close(*(SegmentWrapper(each, segment_length=4).loss(x, per_segment=scale).loss for each in (model, other)))
