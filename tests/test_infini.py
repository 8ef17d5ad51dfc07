"""The Infini-Transformer against its definition in `reference`, and what its options promise."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from infini_transformer_pytorch import (
    FastweightMemory,
    InfiniTransformer,
    InfiniTransformerWrapper,
    Memories,
    TransformerReturn,
    infini,
)
from infini_transformer_pytorch.attention import InfiniAttention
from segment_recurrence_pytorch import SegmentWrapper, backprop, record_attention
from segment_recurrence_pytorch.state import detach, leaves
from segment_recurrence_pytorch.testing import check_model
from tests.conftest import INFINI_OPTIONS, close, ids, long_unless, make_infini, random_weights
from tests.reference import infini_row, mean_nll

PARALLEL = {name: options for name, options in INFINI_OPTIONS.items() if options.get('mem_read_from') != 'above'}
LENGTH = 5


def same_memories(state, row, expected):
    for layer, heads in zip(state, expected, strict=True):
        for g, (M, z) in enumerate(heads):
            close(layer.kv_mem[row, g], M)
            close(layer.k_norm[row, g], z)


def ragged(rows=5, length=23):
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, 17:] = False
    mask[2, 3:] = False
    mask[3, [2, 7, 8, 11]] = False
    mask[4] = False
    return mask


@pytest.mark.parametrize('segments_per_pass', long_unless([3], [1, 2, 3, 9]))
@pytest.mark.parametrize('options', INFINI_OPTIONS.values(), ids=INFINI_OPTIONS.keys())
def test_windows_equal_the_definition(options, segments_per_pass):
    """Ragged rows (prefixes, holes, nothing), outputs, memories, and gradients of the loss."""
    model, x, mask = make_infini(**options), ids(5, 23), ragged()
    if not model.parallel_segments:
        if segments_per_pass != 3:
            return
        segments_per_pass = None
    wrapper = InfiniTransformerWrapper(model, LENGTH, segments_per_pass=segments_per_pass)
    logits, state = wrapper.logits(x, mask=mask)
    rows = [infini_row(model, x[row], LENGTH, mask[row]) for row in range(5)]
    for row, (hidden, memories) in enumerate(rows):
        close(logits[row, mask[row]], model.to_logits(hidden))
        same_memories(state, row, memories)
    full, labels = mask[:1].expand(2, -1), ids(2, 23)
    expected = torch.stack([model.to_logits(infini_row(model, row, LENGTH)[0]) for row in x[:2]])
    mean_nll(expected, labels).backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    for options in ({}, {'backward': True}):
        model.zero_grad()
        loss = wrapper.loss(x[:2], labels=labels, mask=full, **options).loss
        if not options:
            loss.backward()
        for name, parameter in model.named_parameters():
            if want[name] is None:
                assert not parameter.grad.any()
            else:
                close(parameter.grad, want[name])


def test_a_window_holds_no_more_states_than_its_limit(monkeypatch):
    """Large heads, short segments and many rows: the states would be most of the memory."""
    wrapper, x = SegmentWrapper(make_infini(), segment_length=6), ids(3, 60)
    want, read = wrapper.loss(x).loss, []
    advance = wrapper.model.advance
    monkeypatch.setattr(
        wrapper.model,
        'advance',
        lambda tokens, *args, **more: read.append(tokens.shape[1]) or advance(tokens, *args, **more),
    )
    close(wrapper.loss(x).loss, want)
    assert read == [59], 'ten segments are one window'
    read.clear()
    # a row holds 2 layers of 2 heads, each with a matrix of 4 x 4 and 4 marks, in 8 bytes; and what is erased, as much
    monkeypatch.setattr(backprop, 'WINDOW_STATE_BYTES', 4 * 3 * 2 * 2 * (4 * 4 + 4) * 8 * 2)
    close(wrapper.loss(x).loss, want)
    assert read == [24, 24, 11]


@pytest.mark.parametrize('decay', [False, True], ids=['', 'decay'])
@pytest.mark.parametrize('rule', ['linear', 'delta', 'deltanet'])
def test_a_window_holds_what_its_size_is_chosen_by(rule, decay):
    """The memories, and what the rules that erase keep beside them, of segments of more than one chunk of deltanet."""
    rows, segments, length, d = 2, 5, 130, 16
    model = make_infini(dim=8, dim_head=d, memory_rule=rule, memory_decay=decay).float()
    storages = {}

    def keep(tensor):
        if tensor.ndim == 5 and tensor.shape[-2:] == (d, d):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = model.advance(ids(rows, segments * length), segment_length=length)
    held = sum(storages.values())
    del kept
    told = model.segment_bytes(length) * rows * segments
    assert 0.9 < held / told < 1.3, (held, told)


def test_a_replaced_method_of_one_layer_counts_in_decoding_too():
    model = random_weights(make_infini().double())
    attention = model.layers[0].attn
    split = attention.split
    before = model(ids(2, 6))[0]

    def doubled(heads):
        query, *others = split(heads)
        return (query if query is None else 2 * query, *others)

    attention.split = doubled
    assert not torch.allclose(model(ids(2, 6))[0], before)
    check_model(model)
    attention.gates = lambda x: torch.zeros(attention.heads, 1, dtype=x.dtype)
    with pytest.raises(ValueError, match='computes its gates from the tokens'):
        model.memory_shares()


def test_evaluating_fewer_segments_at_once_changes_no_number(monkeypatch):
    for options in PARALLEL.values():
        model, x, mask = make_infini(**options), ids(5, 23), ragged()
        hidden, state = model.advance(x, segment_length=LENGTH, mask=mask)
        for rows in (1, 5 * LENGTH * 2):
            monkeypatch.setattr(infini, 'CPU_ROWS', rows)
            other, same = model.advance(x, segment_length=LENGTH, mask=mask)
            close(other, hidden, 1e-12)
            for a, b in zip(leaves(same), leaves(state), strict=True):
                close(a, b, 1e-12)
            monkeypatch.undo()
    empty, same = model.advance(ids(5, 0), state)
    assert empty.shape == (5, 0, 16)
    assert all(map(torch.equal, leaves(same), leaves(state)))


@pytest.mark.parametrize('options', INFINI_OPTIONS.values(), ids=INFINI_OPTIONS.keys())
def test_state_goes_on_and_only_the_state_needs_less_work(options):
    model, x, mask = make_infini(**options), ids(5, 23), ragged()
    wrapper = InfiniTransformerWrapper(model, LENGTH)
    _, state = wrapper.logits(x, mask=mask)
    y = ids(5, LENGTH)
    hidden, after = model.advance(y, state)
    nothing, same = model.advance(y, state, need_hidden=False)
    assert nothing is None
    for a, b in zip(leaves(after), leaves(same), strict=True):
        close(a, b, 1e-12)
    for row in range(5):
        _, memories = infini_row(model, x[row], LENGTH, mask[row])
        expected, memories = infini_row(model, y[row], LENGTH, memories=memories)
        close(hidden[row], expected)
        same_memories(after, row, memories)


@pytest.mark.parametrize('options', INFINI_OPTIONS.values(), ids=INFINI_OPTIONS.keys())
def test_a_row_without_a_valid_token_keeps_its_state_bit_for_bit(options):
    model = make_infini(**options)
    _, state = model.advance(ids(3, LENGTH))
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1] = False
    for given in (state, model.initial_state(3)):
        _, after = model.advance(ids(3, LENGTH), given, mask=mask)
        for old, new in zip(leaves(given), leaves(after), strict=True):
            assert torch.equal(old[1], new[1])


def test_changing_a_token_changes_no_earlier_logit():
    for options in INFINI_OPTIONS.values():
        wrapper, x = InfiniTransformerWrapper(make_infini(**options), LENGTH), ids(1, 20)
        before, _ = wrapper.logits(x)
        for at in (0, 4, 5, 11, 19):
            changed = x.clone()
            changed[0, at] = (changed[0, at] + 1) % 20
            after, _ = wrapper.logits(changed)
            close(before[:, :at], after[:, :at], 1e-12)
            assert not torch.allclose(before[:, at], after[:, at])
            if at < 10:
                assert not torch.allclose(before[:, 15:], after[:, 15:], rtol=1e-9)  # it is remembered


@pytest.mark.parametrize('options', INFINI_OPTIONS.values(), ids=INFINI_OPTIONS.keys())
def test_published_forward_with_cache_equals_one_call(options):
    model, x = make_infini(**options), ids(2, 9)
    _, _, memories = model(ids(2, LENGTH), return_new_memories=True)
    whole = model(x, past_memories=memories, return_new_memories=True)
    assert isinstance(whole, TransformerReturn)
    assert whole.cached_kvs is None
    cache, parts = None, []
    for piece in (x[:, :4], x[:, 4:5], x[:, 5:8]):
        logits, cache, same = model(piece, memories, cache)
        assert same is memories
        parts.append(logits)
    logits, none, after = model(x[:, 8:], memories, cache, return_new_memories=True)
    close(torch.cat((*parts, logits), 1), whole.logits)
    assert none is None
    for a, b in zip(leaves(after), leaves(whole.past_memories), strict=True):
        close(a, b)
    detached = model(x, memories, return_new_memories=True, detach_memories=True).past_memories
    assert not any(leaf.requires_grad for leaf in leaves(detached))
    assert not any(leaf.requires_grad for leaf in leaves(model(x, detach_memories=True).cached_kvs))


def test_the_published_calls_with_an_open_and_a_closed_segment():
    """False returns the memories as they were given, and a cache; True closes the segment."""
    model, x = make_infini(use_mem_delta_rule=True), ids(1, 16)
    logits, cache, memories = model(x, return_new_memories=False)
    assert memories is None
    assert logits.shape == (1, 16, 20)
    assert [layer.kv.shape for layer in cache] == [(2, 1, 2, 16, 4)] * 2
    same, none, memories = model(x, past_memories=memories, return_new_memories=True)
    assert torch.equal(same, logits)  # the open segment left nothing behind
    assert none is None
    assert all(layer.k_norm.all() for layer in memories)
    given = [leaf.clone() for leaf in leaves(memories)]
    second, cache, same = model(x, past_memories=memories, return_new_memories=False)
    assert same is memories
    assert all(map(torch.equal, leaves(same), given))
    assert not torch.allclose(second, logits)
    # the same tokens, now as the rest of the open segment
    third, none, after = model(x, memories, cache, return_new_memories=True)
    whole = model(torch.cat((x, x), 1), memories, return_new_memories=True)
    close(torch.cat((second, third), 1), whole.logits)
    for have, want in zip(leaves(after), leaves(whole.past_memories), strict=True):
        close(have, want)


def test_what_is_detached_carries_no_graph_whether_the_segment_is_closed_or_not():
    model, x = make_infini(memory_rule='delta'), ids(1, 16)
    _, _, memories = model(x, return_new_memories=True)
    assert all(leaf.requires_grad for leaf in leaves(memories))
    for closed in (False, True):
        returned = model(x, memories, return_new_memories=closed, detach_memories=True)
        assert not any(leaf.requires_grad for leaf in leaves(returned[1:]))
    assert all(map(torch.equal, leaves(model(x, memories, detach_memories=True).past_memories), leaves(memories)))


def test_an_empty_memory_leaves_the_local_output_ungated():
    wrapper, x, logits = InfiniTransformerWrapper(make_infini(), LENGTH), ids(2, 10), []
    for gate in (-4.0, 4.0):
        with torch.no_grad():
            for block in wrapper.model.layers:
                block.attn.fastweight_mem.head_gates.fill_(gate)
        logits.append(wrapper.logits(x)[0])
    assert torch.equal(logits[0][:, :LENGTH], logits[1][:, :LENGTH])
    assert not torch.allclose(logits[0][:, LENGTH:], logits[1][:, LENGTH:])


@pytest.mark.parametrize('transform', ['talking_heads', 'kv_proj'])
def test_memory_transforms_start_near_the_identity_and_have_an_effect(transform):
    torch.manual_seed(5)
    plain = InfiniTransformer(num_tokens=20, dim=16, depth=2, heads=2, dim_head=4).double()
    torch.manual_seed(5)
    model = InfiniTransformer(num_tokens=20, dim=16, depth=2, heads=2, dim_head=4, mem_transform=transform).double()
    weights = {name: torch.randn_like(parameter) for name, parameter in plain.named_parameters()}
    model.load_state_dict(weights, strict=False)
    plain.load_state_dict(weights)
    x = ids(1, 15)
    logits = [InfiniTransformerWrapper(each, LENGTH).logits(x)[0] for each in (plain, model)]
    assert not torch.equal(*logits)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < 0.05
    with torch.no_grad():
        for block in model.layers:
            for name in ('talking_heads', 'key_proj'):
                if hasattr(block.attn.fastweight_mem, name):
                    getattr(block.attn.fastweight_mem, name).fill_(-torch.inf)  # the exact identity
    close(InfiniTransformerWrapper(model, LENGTH).logits(x)[0], logits[0])


def test_reading_from_above_has_an_effect_and_selects_the_segment_loop():
    x, logits = ids(1, 15), []
    for source in ('same', 'above'):
        torch.manual_seed(6)
        model = make_infini(mem_read_from=source)
        assert model.parallel_segments == (source == 'same')
        logits.append(InfiniTransformerWrapper(model, LENGTH).logits(x)[0])
    close(logits[0][:, :LENGTH], logits[1][:, :LENGTH])
    assert not torch.allclose(logits[0][:, LENGTH:], logits[1][:, LENGTH:])
    close(InfiniTransformerWrapper(model, LENGTH, segments_per_pass=2).logits(x)[0], logits[1])
    with pytest.raises(ValueError, match='one segment at a time'):
        model.advance(x, segment_length=LENGTH)


def test_no_attention_mask_without_padding():
    for options in PARALLEL.values():
        wrapper = InfiniTransformerWrapper(make_infini(**options), LENGTH)
        with record_attention() as calls:
            wrapper.logits(ids(2, 23))  # the last segment is short
        assert len(calls) == len(wrapper.model.layers)
        assert not any(call.masked for call in calls)


PEER = Path(__file__).parent / 'data' / 'infini_peer.safetensors'


@pytest.mark.parametrize('case', ['linear', 'delta', 'linear_learned', 'delta_learned'])
def test_published_checkpoints_give_their_logits_and_gradients(case):
    """Made by `data/make_infini_peer.py` with infini-transformer-pytorch 0.2.1, in float64, over four segments."""
    file = {name.removeprefix(f'{case}/'): t for name, t in load_file(PEER).items() if name.startswith(f'{case}/')}
    weights = {name.removeprefix('weights/'): t for name, t in file.items() if name.startswith('weights/')}
    model = InfiniTransformer.from_peer_state_dict(weights, use_mem_delta_rule='delta' in case)
    x = file['x']
    wrapper = InfiniTransformerWrapper(model, 6)
    close(wrapper.logits(x)[0], file['logits'], 1e-10)
    for k in (2, 3):
        model.zero_grad()
        loss = InfiniTransformerWrapper(model, 6, detach_mems_every_num_segments=k)(x, backward=True)
        close(loss, file[f'loss_{k}'], 1e-10)
        for name in ('token_emb.weight', 'layers.0.attn.to_qkv.weight', 'layers.1.attn.fastweight_mem.head_gates'):
            close(model.get_parameter(name).grad, file[f'gradient_{k}/{name}'], 1e-10)
    unnamed = InfiniTransformer.from_peer_state_dict(weights)  # the rule of that package, if nothing is said
    assert (unnamed.memory_rule, unnamed.memory_decay) == ('linear', False)
    assert InfiniTransformer.from_peer_state_dict(weights, memory_rule='delta').memory_rule == 'delta'
    with pytest.raises(ValueError, match='is missing'):
        InfiniTransformer.from_peer_state_dict({})
    with pytest.raises(ValueError, match='is no weight of'):
        InfiniTransformer.from_peer_state_dict(weights | {'other': x})
    with pytest.raises(ValueError, match='does not fit'):
        InfiniTransformer.from_peer_state_dict(weights, dim=8)


@pytest.mark.parametrize(
    'options', [PARALLEL['delta, gqa'], PARALLEL['deltanet, decay, gqa']], ids=['delta', 'deltanet']
)
def test_compiles_without_a_graph_break(options):
    model, x = make_infini(**options), ids(2, 20)
    state = detach(model.advance(x, segment_length=LENGTH)[1])
    compiled = torch.compile(model.advance, fullgraph=True, backend='aot_eager')
    close(compiled(x, state, segment_length=LENGTH)[0], model.advance(x, state, segment_length=LENGTH)[0])


def test_parameter_groups_and_shares():
    model = make_infini(learned_delta_update=True, memory_decay=True)
    groups = model.param_groups(1e-3, 0.1)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(named[id(p)] for group in groups for p in group['params']) == sorted(named.values())
    *_, embeddings, gates = groups
    assert [named[id(p)] for p in embeddings['params']] == ['token_emb.weight']
    assert (embeddings['lr'], embeddings['weight_decay']) == (pytest.approx(5e-3), 0)
    assert {named[id(p)].split('.')[-1] for p in gates['params']} == {'head_gates'}
    assert gates['weight_decay'] == 0
    assert gates['lr'] == pytest.approx(1e-3 * infini.GATE_LR)
    assert model.param_groups(1e-3, 0.1, gate_lr=2.0)[-1]['lr'] == pytest.approx(2e-3)
    with pytest.raises(ValueError, match='gate_lr is 0'):
        model.param_groups(1e-3, 0.1, gate_lr=0.0)
    assert (
        InfiniTransformer(num_tokens=9, dim=8, depth=3, heads=2, dim_head=4, head_gate_init_value=0)
        .memory_shares()
        .tolist()
        == [[0.5] * 2] * 3
    )


def test_published_wrapper_calls():
    model, seq = make_infini(use_mem_delta_rule=True), ids(2, 23)
    wrapper = InfiniTransformerWrapper(model, segment_length=LENGTH, detach_mems_every_num_segments=1)
    assert wrapper.backprop_segments == 1
    wrapper = InfiniTransformerWrapper(model, segment_length=LENGTH)
    wrapper.eval()
    plain = wrapper(seq)
    loss = wrapper(seq, backward=True)
    close(loss, plain.detach())
    assert not loss.requires_grad
    assert not wrapper.training
    assert not model.training
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    close(wrapper(seq, backward=True, grad_accum_scale=1 / 4), loss)  # its users print it
    for name, parameter in model.named_parameters():
        close(parameter.grad, want[name] / 4)
    first, memories = wrapper(seq[:, :11], return_memories=True)
    second = wrapper(seq[:, 10:], past_memories=memories)
    close((first * 10 + second * 12) / 22, plain)
    close(wrapper(seq, segment_length=7), InfiniTransformerWrapper(model, 7)(seq))
    padded = seq.clone()
    padded[1, 9:] = -1
    assert wrapper(padded).isfinite()
    output = wrapper.generate(seq_len=30, prompt=seq[:, :12])
    assert output.shape == (2, 18)
    assert wrapper.generate(seq_len=9, batch_size=3, exclude_prompt=False).shape == (3, 9)
    greedy = wrapper.generate(seq_len=30, prompt=seq[:, :12], temperature=0)
    logits, _ = wrapper.logits(torch.cat((seq[:, :12], greedy), 1))
    assert torch.equal(logits[:, 11:-1].argmax(-1), greedy)


def test_the_scale_of_accumulation_acts_on_the_gradients_of_this_call_alone():
    wrapper, seq, labels = InfiniTransformerWrapper(make_infini(), LENGTH), ids(2, 23), ids(2, 23)
    plain = wrapper(seq, labels=labels)
    plain.backward()
    want = {name: parameter.grad for name, parameter in wrapper.named_parameters()}
    for scale in (1, 0.25, 0, -2.0):
        wrapper.zero_grad()
        scalars = []
        loss = wrapper(
            seq, labels=labels, backward=True, grad_accum_scale=scale,
            backward_fn=lambda scalar, scalars=scalars: (scalars.append(scalar.detach()), scalar.backward()),
        )  # fmt: skip
        close(loss, plain.detach())
        close(torch.stack(scalars).sum(), loss * scale)
        for name, parameter in wrapper.named_parameters():
            close(parameter.grad, want[name] * scale)


def bad_training_calls():
    yield (
        {'grad_accum_scale': 0.25},
        r'grad_accum_scale=0\.25 scales the gradients of backward=True: without it, multiply',
    )
    yield {'grad_accum_scale': math.nan}, 'grad_accum_scale is nan: give a finite number'
    yield {'grad_accum_scale': math.inf, 'backward': True}, 'grad_accum_scale is inf: give a finite number'
    yield {'backward_fn': print}, 'backward_fn is only called with backward=True'
    yield {'segment_length': True, 'backward': True}, 'segment_length is True: give a whole number from 1 on'
    yield {'past_memories': 3, 'backward': True}, 'state is int'


@pytest.mark.parametrize(('call', 'message'), list(bad_training_calls()))
def test_a_refused_training_call_changes_nothing(call, message):
    wrapper = InfiniTransformerWrapper(make_infini(), LENGTH)
    wrapper.eval()
    with pytest.raises(ValueError, match=message):
        wrapper(ids(2, 23), **call)
    assert not any(module.training for module in wrapper.modules())
    assert all(parameter.grad is None for parameter in wrapper.parameters())


def test_a_prompt_longer_than_a_segment_is_remembered():
    wrapper, prompt = InfiniTransformerWrapper(make_infini(), LENGTH), ids(1, 12)
    other = prompt.clone()
    other[:, :LENGTH] = ids(1, LENGTH)
    assert not torch.allclose(wrapper.logits(prompt)[0][:, -1], wrapper.logits(other)[0][:, -1])


LEARNED = {'learned_delta_update': True, 'memory_decay': True}
BAD_CACHES = [
    (lambda layer: layer._replace(kv=None), 'cached_kv of layer 1: kv is NoneType: give what a call returned'),
    (lambda layer: layer._replace(kv=layer.kv.long()), r'cached_kv of layer 1: kv is torch\.int64: give what a call'),
    (lambda layer: layer._replace(kv=layer.kv * math.nan), 'cached_kv of layer 1: kv holds NaN or infinite values'),
    (lambda layer: layer._replace(kv=layer.kv / 0), 'cached_kv of layer 1: kv holds NaN or infinite values'),
    (lambda layer: layer._replace(kv=layer.kv[:, :, :, :2]), r'cached_kv of layer 1: kv: shape \(2, 2, 2, 2, 4\)'),
    (lambda layer: layer._replace(kv=layer.kv.to('meta')), r'layer 1: kv: torch\.float64 on meta, the model needs'),
    (lambda layer: layer._replace(strength=layer.kv[0, ..., 0]), 'layer 1: strength is not for this model'),
]


def bad_calls():
    state = make_infini().initial_state(2)
    yield {'past_memories': state[:1]}, '1 entries'
    yield {'past_memories': make_infini().initial_state(3)}, 'shape'
    yield {'past_memories': make_infini(dim_head=8).initial_state(2)}, 'shape'
    yield {'past_memories': tuple(Memories(*(part.float() for part in layer)) for layer in state)}, 'float32'
    yield {'past_memories': [1, 2]}, r'state\[0\] is int, this model has Memories there'
    yield {'past_memories': 3}, 'state is int, this model has tuple there'
    yield {'x': ids(2, 5) + 18}, 'outside'
    yield {'x': ids(2, 0)}, 'x holds no token: give at least one'
    yield {'mask': torch.ones(2, 4, dtype=torch.bool)}, 'mask has shape'
    yield {'cached_kv': []}, 'cached_kv has 0 entries'
    cache = make_infini(memory_rule='linear')(ids(2, 3)).cached_kvs
    yield {'cached_kv': make_infini()(ids(3, 2)).cached_kvs}, 'cached_kv of layer 0: kv: shape'
    yield {'cached_kv': 3}, 'cached_kv is a int: give the list that a call returned'
    yield {'cached_kv': [None, None]}, 'cached_kv of layer 0 is a NoneType: give what a call returned'
    yield {'cached_kv': [layer.kv for layer in cache]}, 'cached_kv of layer 0 is a Tensor: give what a call returned'
    for part, message in BAD_CACHES:
        yield {'cached_kv': [cache[0], part(cache[1])]}, message
    padded = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    yield {'cached_kv': cache, 'mask': padded}, 'mask with cached_kv: a cache that goes on holds valid tokens only'
    cache = make_infini(memory_rule='linear')(ids(2, 5), mask=padded).cached_kvs
    yield {'cached_kv': cache}, 'cached_kv comes from a call with padded rows: a cache that goes on holds valid'


def bad_learned_caches():
    cache = make_infini(**LEARNED)(ids(2, 3)).cached_kvs
    yield (
        make_infini(memory_rule='linear')(ids(2, 3)).cached_kvs,
        'cached_kv of layer 0: strength is missing: .* with other options',
    )
    for part in ('strength', 'log_decay'):
        good, name = getattr(cache[1], part), f'cached_kv of layer 1: {part}'
        yield [cache[0], cache[1]._replace(**{part: None})], f'{name} is missing: it comes from a model with other'
        yield [cache[0], cache[1]._replace(**{part: 'x'})], f'{name} is a str: give a tensor'
        yield [cache[0], cache[1]._replace(**{part: good[..., :2]})], rf'{name}: shape \(2, 2, 2\), .* need \(2, 2, 3\)'
        yield [cache[0], cache[1]._replace(**{part: good * math.nan})], f'{name} holds NaN or infinite values'
    for value in (1.5, -0.5):
        strength = torch.full_like(cache[1].strength, value)
        yield [cache[0], cache[1]._replace(strength=strength)], r'layer 1: strength holds numbers outside \[0, 1\]'
    above = cache[1]._replace(log_decay=-cache[1].log_decay)
    yield [cache[0], above], 'layer 1: log_decay holds numbers above 0'


@pytest.mark.parametrize(('cache', 'message'), list(bad_learned_caches()))
def test_a_cache_without_what_the_model_learns_is_refused(cache, message):
    model = make_infini(**LEARNED)
    with pytest.raises(ValueError, match=message):
        model(ids(2, 5), None, cache)


@pytest.mark.parametrize(('call', 'message'), list(bad_calls()))
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        make_infini(memory_rule='linear')(**{'x': ids(2, 5), **call})


RULES = [
    ({}, 'deltanet', True),
    ({'memory_decay': False}, 'deltanet', False),
    ({'use_mem_delta_rule': True}, 'delta', False),
    ({'use_mem_delta_rule': False}, 'linear', False),  # equation 4, as published
    ({'use_mem_delta_rule': False, 'memory_rule': 'deltanet'}, 'deltanet', True),
    ({'memory_rule': 'linear'}, 'linear', False),
    ({'memory_rule': 'delta', 'memory_decay': True}, 'delta', True),
]


@pytest.mark.parametrize(('options', 'rule', 'decays'), RULES)
def test_a_rule_that_is_not_named_is_deltanet_with_decay(options, rule, decays):
    model = make_infini(**options)
    assert (model.memory_rule, model.memory_decay) == (rule, decays)
    assert (model.layers[0].attn.to_decay is not None) == decays
    assert model.layers[0].attn.fastweight_mem.memory_rule == rule
    assert (model.arguments['memory_rule'], model.arguments['memory_decay']) == (rule, decays)


def test_arguments_that_older_versions_recorded_mean_what_they_meant():
    """They recorded no rule, unless it was named, and False for the rule and the decay that were not."""
    older = {**make_infini().arguments, 'memory_rule': None, 'memory_decay': False}
    for delta, rule in ((False, 'linear'), (True, 'delta')):
        arguments = make_infini().as_arguments({**older, 'use_mem_delta_rule': delta})
        assert arguments['memory_rule'] == rule
        assert InfiniTransformer(**arguments).memory_rule == rule
    named = {**older, 'use_mem_delta_rule': False, 'memory_rule': 'deltanet'}
    assert make_infini().as_arguments(named) == named


def test_initial_weights():
    model = InfiniTransformer(num_tokens=256, dim=128, depth=2, heads=4, kv_heads=2, dim_head=32)
    queries, keys, values = model.layers[0].attn.to_qkv.weight.split((128, 64, 64))
    ff, unit = model.layers[1].ff, 128**0.5
    soft = [queries, keys, model.layers[0].attn.to_strength.weight, model.layers[0].attn.to_decay.weight]
    for weight in [*soft, ff.proj_in.weight, model.logits.weight]:
        assert weight.std().item() * unit == pytest.approx(3**-0.5, rel=0.15)
    for weight in (values, model.token_emb.weight):
        assert weight.std().item() * unit == pytest.approx(1, rel=0.05)
    for weight in (model.layers[0].attn.to_out.weight, ff.proj_out.weight):
        assert weight.std().item() * weight.shape[1] ** 0.5 == pytest.approx(0.1, rel=0.05)
    assert not ff.proj_in.bias.any()
    assert model.layers[0].attn.to_decay.bias.tolist() == [8.0, 8.0]
    assert model.layers[0].attn.to_strength.bias.tolist() == [0.0, 0.0]
    assert model.layers[0].attn.fastweight_mem.head_gates.tolist() == [3.0] * 4
    assert model(ids(2, 32)).logits.std() < 1  # no token is preferred: the first loss is that of guessing


BAD_CONSTRUCTION = [
    ({'use_mem_delta_rule': True, 'memory_rule': 'deltanet'}, 'give one of them'),
    ({'heads': 4, 'kv_heads': 3}, 'does not divide'),
    ({'dim_head': 5}, 'must be even'),
    ({'head_gate_init_value': math.nan}, 'head_gate_init_value is nan: give a finite number'),
    ({'head_gate_init_value': -math.inf}, 'head_gate_init_value is -inf: give a finite number'),
    ({'ff_mult': math.inf}, 'ff_mult is inf: give a finite number above 0'),
    ({'ff_mult': math.nan}, 'ff_mult is nan: give a finite number above 0'),
    ({'ff_mult': 0.09}, r'ff_mult is 0\.09: with dim=16 no inner feature is left, give 0\.0938 or more'),
    ({'rotary_theta': math.nan}, 'rotary_theta is nan: give a finite number above 0'),
    ({'attn_dropout': math.nan}, r'attn_dropout is nan: a dropout probability must be in \[0, 1\)'),
    ({'dim': True}, 'dim is True: give a finite number above 0'),
    ({'depth': True}, 'depth is True: give a finite number above 0'),
]


@pytest.mark.parametrize(('options', 'message'), BAD_CONSTRUCTION)
def test_bad_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_infini(**options)


def test_other_refusals():
    with pytest.raises(Exception, match='memory_rule'):
        make_infini(memory_rule='other')
    for length in (0, -3):
        with pytest.raises(ValueError, match=f'segment_length is {length}'):
            InfiniTransformerWrapper(make_infini(), length)
        with pytest.raises(ValueError, match=f'segment_length is {length}'):
            InfiniTransformerWrapper(make_infini(), LENGTH)(ids(2, 9), segment_length=length)
    wrapper = InfiniTransformerWrapper(make_infini(), LENGTH)
    with pytest.raises(ValueError, match='outside'):
        wrapper.generate(seq_len=20, prompt=ids(2, 9) + 20)


class Adapted(nn.Linear):
    """A linear layer that an adapter was added to."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def adapted_by_class(layer):
    layer.__class__ = Adapted


def adapted_by_hook(layer):
    layer.register_forward_hook(lambda _, given, out: out + given[0].sum(-1, keepdim=True))


def adapted_by_method(layer):
    layer.forward = lambda x: x @ layer.weight.mT + x.sum(-1, keepdim=True)


def with_bias(layer):
    layer.bias = nn.Parameter(torch.randn(layer.out_features, dtype=torch.float64))


@pytest.mark.parametrize('adapt', [adapted_by_class, adapted_by_hook, adapted_by_method, with_bias])
def test_a_projection_that_was_adapted_is_used_for_the_state_too(adapt):
    """Where no hidden states are needed, the last layer projects keys and values only."""
    model, x = make_infini(), ids(2, 4 * LENGTH + 1)  # the last token opens a segment
    plain = SegmentWrapper(model, segment_length=LENGTH).read(x).state
    for block in model.layers:
        adapt(block.attn.to_qkv)
    wrapper = SegmentWrapper(model, segment_length=LENGTH)
    want, have = wrapper.logits(x[:, :-1])[1], wrapper.read(x).state
    assert not torch.equal(plain[-1].kv_mem, have[-1].kv_mem)
    for a, b in zip(leaves(have), leaves(want), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    'option',
    [{'memory_decay': True}, {'strength_in_normaliser': True}, {'tie_embeddings': True}, {'mem_read_from': 'above'}],
)
def test_a_published_checkpoint_takes_no_option_that_its_package_lacks(option):
    [(name, value)] = option.items()
    with pytest.raises(ValueError, match=f'{name} is {value!r}, but that package has (False|same)'):
        InfiniTransformer.from_peer_state_dict({}, **option)


def test_an_open_segment_is_not_written(monkeypatch):
    """Token by token, the segment would else be written again for every one of them."""
    model, x = make_infini(), ids(2, 9)
    whole, _, written = model(x, return_new_memories=True)
    open_logits, cache, _ = model(x[:, :5])
    writes = []
    write = FastweightMemory.write
    monkeypatch.setattr(FastweightMemory, 'write', lambda *args, **more: writes.append(1) or write(*args, **more))
    close(model(x)[0], whole)
    middle, cache, memories = model(x[:, 5:8], cached_kv=cache)
    assert not writes
    assert memories is None
    last, _, memories = model(x[:, 8:], cached_kv=cache, return_new_memories=True)
    assert len(writes) == len(model.layers)
    close(torch.cat((open_logits, middle, last), dim=1), whole)
    for have, want in zip(leaves(memories), leaves(written), strict=True):
        close(have, want)


def test_a_call_with_a_cache_looks_at_values_once(monkeypatch):
    model, x = make_infini(memory_rule='deltanet', memory_decay=True), ids(2, 9)
    _, cache, _ = model(x[:, :5])
    looks, read = [], []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda self: looks.append(1) or to_list(self))
    for layer in model.memory_layers:
        layer.to_decay.register_forward_hook(lambda module, inputs, out: read.append(inputs[0].shape[-2]))
    model(x[:, 5:6], cached_kv=cache)
    assert len(looks) == 1
    assert sum(read) == len(model.layers)  # the new token alone


def test_shares_of_gates_that_tokens_decide_are_refused():
    class Gated(InfiniAttention):
        def gates(self, x):
            return x.mean(-1)[..., None, :]

    model = make_infini()
    assert model.memory_shares().shape == (2, 2)
    model.layers[1].attn.__class__ = Gated
    with pytest.raises(ValueError, match='Gated, the memory of layer 1, computes its gates from the tokens'):
        model.memory_shares()
