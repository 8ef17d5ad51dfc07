"""What must hold for every model, option and batch: properties, tried on examples that hypothesis makes up.

A fixed set of examples runs by default. More of them, other ones each time:

    HYPOTHESIS_PROFILE=long python -m pytest tests/test_properties.py
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.associative_rmt import AssociativeRMT
from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, save_cursor
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.state import detach, leaves, map_state
from tests.conftest import close, make_infini, make_rmt, random_weights, same_gradients

VOCABULARY, DIM = 20, 16
settings.register_profile(
    'fixed',
    max_examples=120,  # about 90 seconds of one core in all
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# ten properties: 5,000 examples each
settings.register_profile('long', max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'fixed'))

counts = st.integers(1, 3)
seeds = st.integers(0, 2**16)


class Case(NamedTuple):
    """A model in its options, the segments that it reads, and the random numbers of its weights."""

    kind: str
    options: dict[str, Any]
    length: int  # tokens of a segment
    seed: int

    @property
    def stochastic(self) -> bool:
        """Whether training draws random numbers."""
        return any(self.options.get(name, 0) for name in ('attn_dropout', 'ff_dropout', 'memory_noise'))

    def model(self) -> Any:
        """A new model with weights of the size that trained ones have."""
        torch.manual_seed(self.seed)
        return MODELS[self.kind](**self.options)

    def wrapper(self, **options: Any) -> SegmentWrapper:
        """The same in a wrapper."""
        return SegmentWrapper(self.model(), **{'segment_length': self.length, **options})


@st.composite
def rmt_cases(draw, causal: bool | None = True, stochastic: bool = False):
    length, causal = draw(st.integers(1, 5)), draw(st.booleans()) if causal is None else causal
    memory_tokens = draw(st.integers(0, 3))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]))
    options = {
        'seq_len': length + draw(st.integers(0, 1)),
        'num_memory_tokens': memory_tokens,
        'heads': heads,
        'kv_heads': kv_heads,
        'dim_head': draw(st.sampled_from([2, 8])),
        'depth': draw(counts),
        'causal': causal,
        'memory_mask': draw(st.sampled_from(['block', 'causal', 'mixed'])) if causal else None,
        'write_init': draw(st.sampled_from(['scaled', 'sum', 'previous', 'learned'])),
        'use_xl_memories': draw(st.booleans()),
        'axial_mem_len': draw(st.integers(0, 3)) if memory_tokens else 0,
        'ff_mult': draw(st.sampled_from([1, 4])),
    }
    for name in ('abs_pos_emb', 'rotary_pos_emb', 'qk_norm', 'tie_embeddings', 'use_flash_attn'):
        options[name] = draw(st.booleans())
    if options['rotary_pos_emb']:
        options['rotary_theta'] = draw(st.sampled_from([7.0, 32768.0]))
        options['first_text_position'] = draw(st.sampled_from([0, 3, 10000]))
    if options['use_xl_memories']:
        options['xl_mem_len'] = draw(st.sampled_from([None, 0, 1, 4, 11]))
        options['enhanced_xl_recurrence'] = options['xl_mem_len'] != 0 and draw(st.booleans())
    if stochastic:
        options |= {name: draw(st.sampled_from([0.0, 0.3])) for name in ('attn_dropout', 'ff_dropout', 'memory_noise')}
    return Case('rmt', options, length, draw(seeds))


@st.composite
def infini_cases(draw, causal: bool | None = True, stochastic: bool = False):
    rule = draw(st.sampled_from(['linear', 'delta', 'deltanet']))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]))
    options = {
        'heads': heads,
        'kv_heads': kv_heads,
        'dim_head': draw(st.sampled_from([2, 8])),
        'depth': draw(counts),
        'memory_rule': rule,
        'head_gate_init_value': draw(st.sampled_from([-1.0, 0.0, 2.0])),
        'mem_transform': draw(st.sampled_from([None, 'talking_heads', 'kv_proj'])),
        'mem_read_from': draw(st.sampled_from(['same', 'above'])),
        'rotary_theta': draw(st.sampled_from([7.0, 10000.0])),
        'ff_mult': draw(st.sampled_from([1, 4])),
    }
    for name in ('learned_delta_update', 'strength_in_normaliser', 'memory_decay', 'qk_norm', 'tie_embeddings'):
        options[name] = draw(st.booleans())
    if stochastic:
        options |= {name: draw(st.sampled_from([0.0, 0.3])) for name in ('attn_dropout', 'ff_dropout')}
    return Case('infini', options, draw(st.integers(1, 5)), draw(seeds))


@st.composite
def associative_cases(draw, causal: bool | None = True, stochastic: bool = False):
    length = draw(st.integers(1, 5))
    options = {
        'seq_len': length + draw(st.integers(0, 1)),
        'num_memory_tokens': draw(counts),
        'heads': draw(st.sampled_from([1, 2, 4])),
        'dim_key': draw(st.sampled_from([2, 8])),
        'depth': draw(counts),
    }
    return Case('associative', options, length, draw(seeds))


def make_associative(**options: Any) -> AssociativeRMT:
    return random_weights(AssociativeRMT(num_tokens=VOCABULARY, dim=DIM, **options).double())


MODELS = {'rmt': make_rmt, 'infini': make_infini, 'associative': make_associative}


def cases(**options: Any):
    return st.one_of(rmt_cases(**options), infini_cases(**options), associative_cases(**options))


@st.composite
def lengths(draw, segment_length: int, least: int = 0, most: int = 4):
    """Numbers of tokens around the borders of segments."""
    near = draw(st.integers(0, most)) * segment_length + draw(st.integers(-1, 1))
    return max(least, min(near, most * segment_length))


@st.composite
def masks(draw, rows: int, length: int, kinds: tuple[str, ...] = ('whole', 'prefix', 'holes', 'empty')):
    """None, or (rows, length) bool: whole rows, prefixes, rows with holes and rows without a valid token."""
    if draw(st.booleans()):
        return None
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in mask:
        kind = draw(st.sampled_from(kinds))
        if kind == 'prefix':
            row[draw(st.integers(0, length)) :] = False
        elif kind == 'holes' and length:
            row[torch.tensor(draw(st.lists(st.integers(0, length - 1), max_size=length)), dtype=torch.long)] = False
        elif kind == 'empty':
            row[:] = False
    return mask


def drawn_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def state_before(wrapper: SegmentWrapper, kind: str, rows: int, seed: int) -> Any:
    """A state to begin with: None, one that two segments left, or that with a row that starts again."""
    if kind == 'none':
        return None
    with evaluating(wrapper), torch.no_grad():
        state = wrapper.logits(drawn_ids(seed, rows, 2 * wrapper.segment_length - 1))[1]
        if kind == 'reset':
            state = wrapper.reset(state, torch.arange(rows) % 2 == 0)
    return detach(state)


def gradients_of(wrapper: SegmentWrapper) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in wrapper.named_parameters()}
    wrapper.zero_grad(set_to_none=True)
    return found


def same_states(have: Any, want: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(leaves(have), leaves(want), strict=True):
        close(a, b, tolerance)


def row_of(state: Any, row: int, model: Any) -> list[Tensor]:
    """What one row of a state means: histories only as far as they are valid."""
    found = []
    for part in state if model.__class__.__name__ != 'RecurrentMemoryTransformer' else (state.memory,):
        found += [leaf[row] for leaf in leaves(part)]
    if getattr(state, 'past', None) is not None:
        found.append(state.past.memories[row, state.past.memories.shape[1] - int(state.past.counts[row]) :])
    if getattr(state, 'xl', None) is not None:
        valid = state.xl.valid()[row]
        found += [part[row][:, :, valid] for part in (state.xl.keys, state.xl.values)]
    return found


@given(st.data())
def test_every_way_through_the_segments_is_one_graph(data):
    """Replay, recomputing and one graph: loss, gradients, state and the random numbers that follow."""
    case = data.draw(cases(causal=None, stochastic=True))
    rows, n = data.draw(counts), data.draw(lengths(case.length))
    mask = data.draw(masks(rows, n))
    align, k = data.draw(st.sampled_from(['left', 'right'])), data.draw(st.sampled_from([None, 1, 2, 3]))
    passes = data.draw(st.sampled_from([None, 1, 2, 9]))
    before = data.draw(st.sampled_from(['none', 'read', 'reset']))
    x, labels = drawn_ids(case.seed + 1, rows, n), None
    if not case.options.get('causal', True) or data.draw(st.booleans()):
        labels = drawn_ids(case.seed + 2, rows, n).masked_fill(drawn_ids(case.seed + 3, rows, n) < 6, -100)
    reduction = data.draw(st.sampled_from(['mean', 'sum']))
    per_segment = {}
    if case.kind == 'infini' and case.options['memory_rule'] != 'deltanet' and not case.options['memory_decay']:
        read = n if labels is not None else n - 1
        if read > 0 and align == 'left' and data.draw(st.booleans()):
            scale = torch.rand(rows, -(-read // case.length), generator=torch.Generator().manual_seed(case.seed))
            per_segment = {'write_scale': 3 * scale.double()}
    model = case.model()
    if case.kind == 'infini' and not model.parallel_segments and not case.stochastic:
        passes = data.draw(st.sampled_from([None, 1, 2]))
    found = []
    for way in ('one graph', 'recompute', 'replay', 'other windows'):
        other = way == 'other windows'
        if other and (case.stochastic or passes == 1):
            continue
        wrapper = SegmentWrapper(
            model, segment_length=case.length, segments_per_pass=1 if other else passes, backprop_segments=k,
            recompute=way == 'recompute', align=align,
        )  # fmt: skip
        state = state_before(wrapper, before, rows, case.seed)
        wrapper.train()
        torch.manual_seed(7)
        loss, count, after = wrapper.loss(
            x, state, labels=labels, mask=mask, reduction=reduction, backward=way == 'replay', per_segment=per_segment
        )
        following = torch.rand(())
        if way != 'replay':
            loss.backward()
        found.append((loss.detach(), count, detach(after), gradients_of(wrapper), following))
    want = found[0]
    for loss, count, after, gradients, following in found[1:]:
        close(loss, want[0])
        assert count == want[1]
        same_states(after, want[2])
        same_gradients(gradients, want[3])
        assert torch.equal(following, want[4])


@given(st.data())
def test_no_position_sees_a_later_one(data):
    case = data.draw(cases())
    n = data.draw(lengths(case.length, least=2))
    assume(n >= 2)
    at = data.draw(st.integers(1, n - 1))
    wrapper = case.wrapper(align=data.draw(st.sampled_from(['left', 'right'])))
    x = drawn_ids(case.seed + 1, 2, n)
    changed = x.clone()
    changed[:, at:] = drawn_ids(case.seed + 2, 2, n - at)
    with torch.no_grad():
        logits, others = wrapper.logits(x)[0], wrapper.logits(changed)[0]
    close(logits[:, :at], others[:, :at], 1e-12)


@given(st.data())
def test_a_row_is_as_if_alone(data):
    """Where its valid tokens are a prefix: logits, state and gradients of the row alone, without its padding."""
    case = data.draw(cases(causal=None))
    n = data.draw(lengths(case.length, least=1))
    valid = [data.draw(st.integers(0, n)) for _ in range(3)]
    mask = torch.arange(n) < torch.tensor(valid)[:, None]
    x, labels = drawn_ids(case.seed + 1, 3, n), drawn_ids(case.seed + 2, 3, n)
    wrapper = case.wrapper()
    before = data.draw(st.sampled_from(['none', 'read', 'reset']))
    state = state_before(wrapper, before, 3, case.seed)
    row = data.draw(st.integers(0, 2))
    alone = None if state is None else Cursor(state, x, x[:, 0]).rows(torch.tensor([row])).state
    logits, after = wrapper.logits(x, state, mask=mask)
    alone_logits, alone_after = wrapper.logits(x[row : row + 1, : valid[row]], alone)
    close(logits[row, : valid[row]], alone_logits[0])
    for a, b in zip(row_of(after, row, wrapper.model), row_of(alone_after, 0, wrapper.model), strict=True):
        close(a, b)
    # the other rows are there, but nothing is asked of them
    asked = labels.masked_fill(torch.arange(3)[:, None] != row, -100)
    wrapper.loss(x, state, labels=asked, mask=mask, reduction='sum').loss.backward()
    gradients = gradients_of(wrapper)
    only = slice(row, row + 1), slice(0, valid[row])
    wrapper.loss(x[only], alone, labels=labels[only], reduction='sum').loss.backward()
    same_gradients(gradients, gradients_of(wrapper))


@given(st.data())
def test_padding_is_inert(data):
    """Whatever stands at a padded position, NaN too, changes nothing."""
    case = data.draw(cases(causal=None))
    rows, n = data.draw(counts), data.draw(lengths(case.length, least=1))
    mask = data.draw(masks(rows, n))
    assume(mask is not None)
    wrapper = case.wrapper(align=data.draw(st.sampled_from(['left', 'right'])))
    x, labels = drawn_ids(case.seed + 1, rows, n), drawn_ids(case.seed + 2, rows, n)
    other = torch.where(mask, x, drawn_ids(case.seed + 3, rows, n))
    embeddings = wrapper.model.token_emb(x).detach()
    spoilt = embeddings.masked_fill(~mask[..., None], torch.nan)
    with torch.no_grad():
        logits, state = wrapper.logits(x, mask=mask)
        for changed in (other, embeddings, spoilt):
            others, after = wrapper.logits(changed, mask=mask)
            assert torch.equal(others[mask], logits[mask])
            assert all(map(torch.equal, leaves(after), leaves(state)))
        for row in range(rows):
            if not mask[row].any():
                first = wrapper.model.initial_state(rows)
                for a, b in zip(row_of(state, row, wrapper.model), row_of(first, row, wrapper.model), strict=True):
                    assert torch.equal(a, b)
    wrapper.loss(x, labels=labels, mask=mask).loss.backward()
    want = gradients_of(wrapper)
    wrapper.loss(other, labels=labels.masked_fill(~mask, 3), mask=mask).loss.backward()
    same_gradients(gradients_of(wrapper), want, 1e-12)


@given(st.data())
def test_two_calls_are_one(data):
    """Split at a border, the state carried: the pieces overlap by the token that is a target, then an input."""
    case = data.draw(cases())
    rows, n = data.draw(counts), data.draw(lengths(case.length, least=1))
    border = data.draw(st.integers(0, n // case.length)) * case.length
    mask = data.draw(masks(rows, n + 1))
    x = drawn_ids(case.seed + 1, rows, n + 1)
    wrapper = case.wrapper(segments_per_pass=data.draw(st.sampled_from([None, 1, 2])))
    state = state_before(wrapper, data.draw(st.sampled_from(['none', 'read', 'reset'])), rows, case.seed)
    first_mask, second_mask = (None, None) if mask is None else (mask[:, : border + 1], mask[:, border:])
    whole = wrapper.loss(x, state, mask=mask, reduction='sum')
    first = wrapper.loss(x[:, : border + 1], state, mask=first_mask, reduction='sum')
    second = wrapper.loss(x[:, border:], first.state, mask=second_mask, reduction='sum')
    close(first.loss + second.loss, whole.loss)
    assert first.num_targets + second.num_targets == whole.num_targets
    for row in range(rows):
        have, want = (row_of(each.state, row, wrapper.model) for each in (second, whole))
        for a, b in zip(have, want, strict=True):
            close(a, b)
    (first.loss + second.loss).backward()
    gradients = gradients_of(wrapper)
    whole.loss.backward()
    same_gradients(gradients, gradients_of(wrapper))


@given(st.data())
def test_generation_is_the_parallel_forward(data):
    """The logits that each greedy token was chosen from are those of one pass over the text, row by row."""
    case = data.draw(cases())
    prompts = [drawn_ids(case.seed + i, data.draw(lengths(case.length, least=1, most=3))) for i in range(2)]
    if data.draw(st.booleans()):
        prompts[1] = drawn_ids(case.seed + 1, len(prompts[0]))
    count = data.draw(st.integers(1, 2 * case.length + 2))
    wrapper, chosen_from = case.wrapper(), []
    new = wrapper.generate_tokens(
        prompts, count, temperature=0, filter_fn=lambda logits: chosen_from.append(logits) or logits
    )
    chosen_from = torch.stack(chosen_from, dim=1)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = wrapper.logits(torch.cat((prompt, new[row]))[None])[0][0, len(prompt) - 1 : -1]
        close(chosen_from[row], expected)
        assert torch.equal(new[row], chosen_from[row].argmax(-1))


@given(st.data())
def test_a_cursor_goes_on_wherever_it_was_taken(data):
    """Saved and loaded, forked, picked: the tokens and logits of one long generation."""
    case = data.draw(cases())
    prompts = [drawn_ids(case.seed + i, data.draw(lengths(case.length, least=1, most=2))) for i in range(3)]
    first, more = data.draw(st.integers(0, 2 * case.length + 1)), case.length + 1
    wrapper = case.wrapper()

    def generate(prompt, count, **options):
        logits = []
        new, cursor = wrapper.generate_tokens(
            prompt, count, temperature=0, return_cursor=True,
            filter_fn=lambda given: logits.append(given) or given, **options,
        )  # fmt: skip
        return new, torch.stack(logits, 1) if logits else None, cursor

    _, whole, _ = generate(prompts, first + more)
    _, _, cursor = generate(prompts, first)
    with TemporaryDirectory() as folder:
        save_cursor(cursor, f'{folder}/cursor', wrapper.model)
        loaded = load_cursor(f'{folder}/cursor', wrapper.model)
    for place in (cursor, loaded):
        close(generate(None, more, state=place)[1], whole[:, first:])
    close(generate(None, more, state=cursor.fork(2))[1], whole[:, first:].repeat_interleave(2, 0))
    index = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    close(generate(None, more, state=cursor.rows(index))[1], whole[index, first:])
    # a stream that is left and taken up again
    stream = wrapper.stream(prompts, temperature=0)
    for _ in range(first):
        next(stream)
    close(generate(None, more, state=stream.cursor)[1], whole[:, first:])


@given(st.data())
def test_what_is_given_stays_and_what_is_returned_is_new(data):
    """Inputs and random numbers untouched; a state shares memory with nobody: not with the model, the caller's
    state, or what follows."""
    case = data.draw(cases())
    rows, n = data.draw(st.integers(0, 3)), data.draw(lengths(case.length))
    mask = data.draw(masks(rows, n))
    wrapper = case.wrapper()
    x = drawn_ids(case.seed + 1, rows, n)
    state = None
    if rows:
        state = state_before(wrapper, data.draw(st.sampled_from(['none', 'read', 'reset'])), rows, case.seed)
    tensors = [x, *leaves(state), *([] if mask is None else [mask])]
    copies, random_state = [t.clone() for t in tensors], torch.get_rng_state()
    way = data.draw(st.sampled_from(['loss', 'replay', 'logits', 'read', 'generate', 'reset', 'advance']))
    after: Any = None
    if way in ('loss', 'replay'):
        after = wrapper.loss(x, state, mask=mask, backward=way == 'replay').state
    elif way == 'logits':
        after = wrapper.logits(x, state, mask=mask)[1]
    elif way == 'advance':
        length = min(n, case.length)
        assume(length)  # a model of three methods is never given an empty piece
        after = wrapper.model.advance(x[:, :length], state, mask=None if mask is None else mask[:, :length])[1]
    elif way == 'reset':
        after = wrapper.reset(state, torch.zeros(rows, dtype=torch.bool))
    elif n and rows:
        read = wrapper.read(x, state)
        after = read
        if way == 'generate':
            after = wrapper.generate_tokens(None, 3, state=read, temperature=0, return_cursor=True)[1]
    assert all(map(torch.equal, tensors, copies))
    assert torch.equal(torch.get_rng_state(), random_state)
    owned = {t.untyped_storage().data_ptr() for t in [*tensors, *wrapper.parameters()] if t.numel()}
    kept = [leaf for leaf in leaves(after) if leaf.numel()]
    assert not owned & {leaf.untyped_storage().data_ptr() for leaf in kept}
    assert len({leaf.untyped_storage().data_ptr() for leaf in kept}) == len(kept)


@given(st.data())
def test_an_exception_leaves_every_module_in_its_mode(data):
    case = data.draw(cases(stochastic=True))
    wrapper = case.wrapper(segments_per_pass=1)
    modules = list(wrapper.modules())
    generator = torch.Generator().manual_seed(case.seed)
    for module in modules:
        module.training = bool(torch.rand((), generator=generator) < 0.5)
    modes = [module.training for module in modules]
    fails_at, calls = data.draw(st.integers(1, 4)), 0

    def fail(given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError('on purpose')
        return given

    x = drawn_ids(case.seed + 1, 2, 4 * case.length + 1)
    if data.draw(st.booleans()):
        with pytest.raises(RuntimeError, match='on purpose'):
            wrapper.loss(x, backward=True, backward_fn=lambda loss: fail(loss).backward())
    else:
        with pytest.raises(RuntimeError, match='on purpose'):
            wrapper.generate_tokens(x, 9, filter_fn=fail)
    assert [module.training for module in modules] == modes


@given(st.data())
def test_half_types_compute_the_same_three_ways(data):
    """A bfloat16 model, and autocast: near float32, the state in its dtype, and replay near one graph."""
    case = data.draw(cases())
    rows, n = data.draw(counts), data.draw(lengths(case.length, least=2))
    mask = data.draw(masks(rows, n))
    autocast = data.draw(st.booleans())
    x = drawn_ids(case.seed + 1, rows, n)
    model = case.model().float()
    exact = SegmentWrapper(model, segment_length=case.length).loss(x, mask=mask, reduction='sum').loss
    exact = exact.detach()
    expected = [leaf.dtype for leaf in leaves(model.initial_state(1))]
    model = model if autocast else model.bfloat16()
    if not autocast:
        expected = [leaf.dtype for leaf in leaves(model.initial_state(1))]
    found = []
    for way in ('one graph', 'recompute', 'replay'):
        wrapper = SegmentWrapper(model, segment_length=case.length, recompute=way == 'recompute')
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss, _, state = wrapper.loss(x, mask=mask, reduction='sum', backward=way == 'replay')
        assert loss.dtype == torch.float32
        kept = [leaf.dtype for leaf in leaves(state)]
        assert [d for d in kept if d.is_floating_point] == [d for d in expected if d.is_floating_point]
        if way != 'replay':
            loss.backward()
        found.append((loss.detach(), gradients_of(wrapper)))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-2, atol=1e-2)
        total, difference = (
            torch.cat([g.float().flatten() for g in each.values()])
            for each in (found[0][1], {name: gradients[name] - found[0][1][name] for name in gradients})
        )
        assert difference.norm() <= 0.05 * total.norm() + 1e-3
    assert (loss - exact).abs() <= 0.1 * exact.abs() + 0.5
    new = wrapper.generate_tokens(x[:, :1], case.length + 2, temperature=0)
    assert new.shape == (rows, case.length + 2)


def test_maps_of_states_leave_them_alone():
    """A guard of the helpers above: `map_state` makes a new tree."""
    state = make_rmt().initial_state(2)
    assert map_state(torch.clone, state) is not state
