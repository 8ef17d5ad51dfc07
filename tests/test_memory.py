"""The compressive memory alone: writing, reading, the scan, and half types."""

import itertools
import math

import pytest
import torch

from infini_transformer_pytorch import FastweightMemory, InfiniTransformer, InfiniTransformerWrapper, Memories
from infini_transformer_pytorch.memory import MEMORY_RULES, Writes, affine_scan, recall, write
from segment_recurrence_pytorch.state import leaves
from tests.conftest import close
from tests.reference import infini_read, infini_write


@pytest.mark.parametrize('rule', MEMORY_RULES)
@pytest.mark.parametrize('n', [3, 70])
def test_writing_equals_the_token_loop(rule, n):
    """Segments longer than a chunk of the triangular form too, with strength, decay and holes."""
    s, b, g, d, e = 3, 2, 2, 4, 6
    keys, values = torch.randn(s, b, g, n, d).double(), torch.randn(s, b, g, n, e).double()
    strength, decay = torch.rand(s, b, g, n).double(), torch.rand(s, b, g, n).double() * 0.2 + 0.8
    mask = torch.rand(s, b, n) < 0.7
    past = Memories(torch.zeros(b, g, d, e).double(), torch.zeros(b, g, d).double())
    entering, after = write(Writes(keys, values, strength, decay.log(), mask), past, rule)
    for row, head in itertools.product(range(b), range(g)):
        M, z = past.kv_mem[row, head], past.k_norm[row, head]
        for i in range(s):
            close(entering.kv_mem[i, row, head], M)
            close(entering.k_norm[i, row, head], z)
            at = mask[i, row]
            M, z = infini_write(rule, *(t[i, row, head, at] for t in (keys, values, strength, decay)), M, z)
        close(after.kv_mem[row, head], M)
        query = torch.randn(d).double()
        recallable = FastweightMemory(g, memory_rule=rule).double().recallable(after)
        close(recall(query.expand(b, g, 1, d), recallable, rule)[row, head, 0], infini_read(rule, query, M, z))
        assert recallable.written.all()


def test_scan_gradients():
    write_, start = torch.randn(3, 2, 2, 4, 3).double(), torch.randn(2, 2, 4, 3).double()
    erase, decay = torch.randn(3, 2, 2, 4, 4).double(), torch.rand(3, 2, 2).double()
    inputs = [t.requires_grad_() for t in (write_, start, erase, decay)]
    assert torch.autograd.gradcheck(lambda w, m, e, d: affine_scan(w, m, erase=e, decay=d), inputs)
    assert torch.autograd.gradcheck(lambda w, m, e: affine_scan(w, m, erase=e), inputs[:3])
    assert torch.autograd.gradcheck(lambda w, m, d: affine_scan(w, m, decay=d), (*inputs[:2], inputs[3]))
    torch.library.opcheck(
        torch.ops.infini_transformer_pytorch.affine_scan.default,
        tuple(t.detach().requires_grad_() for t in inputs),
    )


@pytest.mark.parametrize('rule', MEMORY_RULES)
@pytest.mark.parametrize('precision', ['float16', 'bfloat16', 'autocast'])
def test_memories_are_exact_in_half_types(rule, precision):
    """65,536 tokens: the memory of a half model against that of the same weights in float32."""
    torch.manual_seed(1)
    sizes = dict(num_tokens=64, dim=32, depth=1, heads=2, dim_head=16, memory_rule=rule)
    model = InfiniTransformer(**sizes)
    x = torch.randint(0, 64, (1, 65_536))
    half = torch.float16 if precision == 'float16' else torch.bfloat16
    if precision != 'autocast':
        model = model.to(half)
    exact = InfiniTransformer(**sizes)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = InfiniTransformerWrapper(exact, 512).logits(x)[1]
        with torch.autocast('cpu', half, enabled=precision == 'autocast'):
            _, state = InfiniTransformerWrapper(model, 512).logits(x)
    for have, want in zip(leaves(state), leaves(expected), strict=True):
        assert have.dtype == torch.float32
        assert (have - want).norm() / want.norm() < 1e-2


def test_no_overflow_after_a_million_tokens():
    """What 1,048,576 tokens write, sixteen times over: finite in a float16 model, and so is what it recalls."""
    for rule in MEMORY_RULES:
        torch.manual_seed(1)
        model = InfiniTransformer(num_tokens=64, dim=16, depth=1, heads=1, dim_head=16, memory_rule=rule).half()
        with torch.no_grad():
            _, state = InfiniTransformerWrapper(model, 512).logits(torch.randint(0, 64, (1, 65_536)))
            state = tuple(Memories(*(part * 16 if rule != 'deltanet' else part for part in layer)) for layer in state)
            logits, after = InfiniTransformerWrapper(model, 512).logits(torch.randint(0, 64, (1, 2048)), state)
        assert all(leaf.isfinite().all() for leaf in leaves((logits, after)))
        assert rule == 'deltanet' or after[0].k_norm.max() > 1e6


def test_fastweight_memory_alone():
    for rule in MEMORY_RULES[:2]:
        memory = FastweightMemory(4, 0.0, kv_heads=2, memory_rule=rule).double()
        keys, values = torch.randn(2, 2, 2, 7, 4).double()
        out, queries = torch.randn(2, 2, 4, 7, 4).double()
        mask = torch.arange(7) < torch.tensor([[7], [4]])
        weights = torch.rand(2, 2, 7, 1).double()
        first = memory.create_new_memories(keys, values, mask=mask)
        second = memory.create_new_memories(keys.flip(2), values, first, weights)
        assert torch.equal(memory.retrieve_and_add_to_output(out, queries), out)
        mixed = memory.retrieve_and_add_to_output(out, queries, second)
        ones = torch.ones(7).double()
        M, z = infini_write(rule, keys[1, 1, :4], values[1, 1, :4], ones[:4], ones[:4], torch.zeros(4, 4).double(),
                            torch.zeros(4).double())  # fmt: skip
        M, z = infini_write(rule, keys[1, 1].flip(0), values[1, 1], 1 - weights[1, 1, :, 0], ones, M, z)
        close(second.kv_mem[1, 1], M)
        close(mixed[1, 3, 2], (out[1, 3, 2] + infini_read(rule, queries[1, 3, 2], M, z)) / 2)


@pytest.mark.parametrize('rule', MEMORY_RULES)
def test_what_stands_at_padded_positions_is_nothing(rule):
    """NaN, too, and in gradients: a softmax over masked positions alone makes some."""
    memory, mask = FastweightMemory(2, memory_rule=rule).double(), torch.tensor([[True, True, False]])
    tensors = [torch.randn(1, 2, 3, 4).double() for _ in range(2)] + [torch.rand(1, 2, 3).double() for _ in range(2)]
    found = []
    for filler in (0.0, torch.nan):
        keys, values, strength, decay = leaves = [t.clone() for t in tensors]
        for leaf in leaves:
            leaf[:, :, 2] = filler
            leaf.requires_grad_()
        after = memory.create_new_memories(keys, values, mask=mask, strength=strength, log_decay=-decay)
        (after.kv_mem.square().sum() + after.k_norm.sum()).backward()
        found.append([after.kv_mem.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for plain, with_nan in zip(*found, strict=True):
        close(with_nan, plain)


@pytest.mark.parametrize('rule', MEMORY_RULES)
def test_with_decay_the_old_goes(rule):
    """One value, then many segments of another one for the same key: it is all that is recalled."""
    memory, past = FastweightMemory(1, memory_rule=rule).double(), None
    keys, decay = torch.ones(1, 1, 16, 4).double(), torch.full((1, 1, 16), 0.5).double().log()
    out = torch.zeros(1, 1, 1, 4).double()
    for value in (1.0, *[0.25] * 20):
        values = torch.full((1, 1, 16, 4), value).double()
        past = memory.create_new_memories(keys, values, past, strength=torch.ones(1, 1, 16).double(), log_decay=decay)
    mixed = memory.retrieve_and_add_to_output(out, keys[:, :, :1], past)
    share = memory.head_gates.sigmoid().view(-1)
    close(mixed, torch.full_like(out, 0.25) * (1 - share), 1e-4)


def reference_memories(rule, keys, values, strength, decay, mask, past):
    """The memories (b, g, ...) that the loop over the tokens of a segment makes of those before it."""
    heads = itertools.product(range(keys.shape[0]), range(keys.shape[1]))
    after = [
        infini_write(
            rule, *(t[row, g, mask[row]] for t in (keys, values, strength, decay)), past[0][row, g], past[1][row, g]
        )
        for row, g in heads
    ]
    return Memories(*(torch.stack(parts).unflatten(0, keys.shape[:2]) for parts in zip(*after, strict=True)))


@pytest.mark.parametrize('rule', MEMORY_RULES)
@pytest.mark.parametrize('given', ['strength', 'weights', 'log_decay', 'strength, log_decay', 'nothing'])
def test_fastweight_memory_alone_writes_with_strength_and_decay(rule, given):
    """They mean what they mean in `memory.write`; weights are the published 1 - strength. Values may be wider."""
    memory = FastweightMemory(4, 0.0, kv_heads=2, memory_rule=rule).double()
    keys, values = torch.randn(2, 2, 7, 4).double(), torch.randn(2, 2, 7, 6).double()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    strength, decay, options = torch.ones(2, 2, 7).double(), torch.ones(2, 2, 7).double(), {}
    if 'strength' in given or given == 'weights':
        strength = torch.rand(2, 2, 7).double()
        options = {'weights': (1 - strength)[..., None]} if given == 'weights' else {'strength': strength}
    if 'log_decay' in given:
        decay = torch.rand(2, 2, 7).double() * 0.5 + 0.5
        options['log_decay'] = decay.log()
    past = expected = Memories(torch.zeros(2, 2, 4, 6).double(), torch.zeros(2, 2, 4).double())
    writes = Writes(keys[None], values[None], strength[None], decay.log()[None], mask[None])
    found = None
    for _ in range(2):
        found = memory.create_new_memories(keys, values, found, mask=mask, **options)
        expected = reference_memories(rule, keys, values, strength, decay, mask, expected)
        _, past = write(writes, past, rule)
        for have, want, written in zip(found, expected, past, strict=True):
            close(have, want)
            close(have, written)
    out, queries = torch.randn(2, 4, 3, 6).double(), torch.randn(2, 4, 3, 4).double()
    mixed = memory.retrieve_and_add_to_output(out, queries, found)
    recalled = infini_read(rule, queries[1, 3, 2], found.kv_mem[1, 1], found.k_norm[1, 1])
    close(mixed[1, 3, 2], (out[1, 3, 2] + recalled) / 2)
    close(memory.retrieve_and_add_to_output(out, queries, tuple(found)), mixed)


@pytest.mark.parametrize('rule', MEMORY_RULES)
def test_a_segment_without_a_token_writes_nothing(rule):
    memory, keys = FastweightMemory(4, memory_rule=rule), torch.randn(2, 4, 7, 8)
    past = memory.create_new_memories(keys, keys)
    after = memory.create_new_memories(keys[:, :, :0], keys[:, :, :0], past)
    for have, want in zip(after, past, strict=True):
        assert torch.equal(have, want)
        assert have.data_ptr() != want.data_ptr()
    assert not any(leaf.any() for leaf in memory.create_new_memories(keys[:, :, :0], keys[:, :, :0]))


BAD_MEMORIES = [
    ({'memory_rule': 'detla'}, "memory_rule is 'detla': give one of linear, delta, deltanet"),
    ({'memory_rule': ''}, "memory_rule is '': give one of linear, delta, deltanet"),
    (
        {'use_mem_delta_rule': True, 'memory_rule': 'linear'},
        "means memory_rule='delta', not 'linear': give one of them",
    ),
    ({'heads': 0}, 'heads is 0: give a finite number above 0'),
    ({'heads': True}, 'heads is True: give a finite number above 0'),
    ({'kv_heads': 3}, 'kv_heads=3 does not divide heads=4'),
    ({'kv_heads': 0}, 'kv_heads is 0: give a finite number above 0'),
    ({'head_gate_init_value': math.nan}, 'head_gate_init_value is nan: give a finite number'),
    ({'head_gate_init_value': math.inf}, 'head_gate_init_value is inf: give a finite number'),
    ({'mem_transform': 'other'}, "mem_transform is 'other': give 'talking_heads', 'kv_proj' or None"),
    ({'mem_transform': 'kv_proj'}, "mem_transform='kv_proj' projects the features of a head: give dim_head"),
    ({'mem_transform': 'kv_proj', 'dim_head': 0}, 'dim_head is 0: give a finite number above 0'),
]


@pytest.mark.parametrize(('options', 'message'), BAD_MEMORIES)
def test_a_memory_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FastweightMemory(**{'heads': 4, **options})


def bad_writes():
    keys = torch.randn(2, 2, 7, 8)
    values, per_token = torch.randn(2, 2, 7, 8), torch.rand(2, 2, 7)
    past = FastweightMemory(4, kv_heads=2).create_new_memories(keys, values)
    yield {'weights': per_token[..., None], 'strength': per_token}, 'weights are 1 - strength: give only strength'
    yield {'keys': keys[0]}, r'keys has shape \(2, 7, 8\): give \(batch, heads, tokens, features\)'
    yield {'keys': 'k'}, r'keys has shape str: give \(batch, heads, tokens, features\)'
    yield {'keys': keys[:, :1]}, r'keys has shape \(2, 1, 7, 8\): this memory needs \(2, 2, 7, 8\)'
    yield {'keys': keys.repeat(1, 2, 1, 1)}, r'keys has shape \(2, 4, 7, 8\): this memory needs \(2, 2, 7, 8\)'
    yield {'values': values[0]}, r'values has shape \(2, 7, 8\): give \(batch, heads, tokens, features\)'
    yield {'values': values[:1]}, r'values has shape \(1, 2, 7, 8\): this memory needs \(2, 2, 7, 8\)'
    yield {'values': values[:, :, :3]}, r'values has shape \(2, 2, 3, 8\): this memory needs \(2, 2, 7, 8\)'
    yield {'weights': per_token}, r'weights has shape \(2, 2, 7\): this memory needs \(2, 2, 7, 1\)'
    yield {'strength': per_token[..., None]}, r'strength has shape \(2, 2, 7, 1\): this memory needs \(2, 2, 7\)'
    yield {'strength': per_token[:, :, :1]}, r'strength has shape \(2, 2, 1\): this memory needs \(2, 2, 7\)'
    yield {'strength': 0.5}, r'strength has shape float: this memory needs \(2, 2, 7\)'
    yield {'log_decay': -per_token[0]}, r'log_decay has shape \(2, 7\): this memory needs \(2, 2, 7\)'
    yield {'mask': torch.ones(2, 6, dtype=torch.bool)}, r'mask has shape \(2, 6\): this memory needs \(2, 7\)'
    yield {'mask': torch.ones(2, 7)}, r'mask is torch\.float32: give torch\.bool, True = valid'
    yield {'past_memories': 3}, 'the past memories are a int: give what create_new_memories returned'
    yield {'past_memories': (past, past, past)}, 'the past memories are a tuple: give what'
    yield {'past_memories': (None, None)}, r'past_memories\.kv_mem is a NoneType: give a tensor'
    yield {'past_memories': Memories(past.kv_mem[:1], past.k_norm)}, r'past_memories\.kv_mem: shape \(1, 2, 8, 8\)'
    yield {'past_memories': Memories(past.kv_mem, past.k_norm[..., :4])}, r'past_memories\.k_norm: shape \(2, 2, 4\)'
    yield {'past_memories': Memories(past.kv_mem.double(), past.k_norm)}, r'past_memories\.kv_mem: torch\.float64'


@pytest.mark.parametrize('rule', MEMORY_RULES)
@pytest.mark.parametrize(('call', 'message'), list(bad_writes()))
def test_writes_that_do_not_fit_are_refused(call, message, rule):
    memory, keys, values = FastweightMemory(4, kv_heads=2, memory_rule=rule), *torch.randn(2, 2, 2, 7, 8)
    with pytest.raises(ValueError, match=message):
        memory.create_new_memories(**{'keys': keys, 'values': values, **call})


def bad_reads():
    out = torch.randn(2, 4, 7, 8)
    past = FastweightMemory(4, kv_heads=2).create_new_memories(*torch.randn(2, 2, 2, 7, 8))
    yield {'out': out[0]}, r'out has shape \(4, 7, 8\): give \(batch, heads, tokens, features\)'
    yield {'out': out[:, :2]}, r'out has shape \(2, 2, 7, 8\): this memory needs \(2, 4, 7, 8\)'
    yield {'queries': out[0]}, r'queries has shape \(4, 7, 8\): give \(batch, heads, tokens, features\)'
    yield {'queries': out[:, :2]}, r'queries has shape \(2, 2, 7, 8\): this memory needs \(2, 4, 7, 8\)'
    yield {'queries': out[:, :, :3]}, r'out has shape \(2, 4, 7, 8\): this memory needs \(2, 4, 3, 8\)'
    yield {'queries': out[..., :4]}, r'past_memories\.kv_mem: shape \(2, 2, 8, 8\), .* need \(2, 2, 4, 8\)'
    yield {'out': out[..., :4]}, r'past_memories\.kv_mem: shape \(2, 2, 8, 8\), .* need \(2, 2, 8, 4\)'
    yield {'gates': torch.zeros(4)}, r'gates has shape \(4,\): give a tensor that is broadcast to \(2, 4, 7\)'
    yield {'gates': torch.zeros(1, 2, 4, 7)}, r'gates has shape \(1, 2, 4, 7\): give a tensor that is broadcast to'
    yield {'gates': 3.0}, r'gates has shape float: give a tensor that is broadcast to \(2, 4, 7\)'
    yield {'past_memories': 'ab'}, 'the past memories are a str: give what create_new_memories returned'
    yield {'past_memories': Memories(past.kv_mem[:1], past.k_norm[:1])}, r'past_memories\.kv_mem: shape \(1, 2, 8, 8\)'


@pytest.mark.parametrize(('call', 'message'), list(bad_reads()))
def test_reads_that_do_not_fit_are_refused(call, message):
    memory = FastweightMemory(4, kv_heads=2)
    out, queries = torch.randn(2, 2, 4, 7, 8)
    past = memory.create_new_memories(*torch.randn(2, 2, 2, 7, 8))
    with pytest.raises(ValueError, match=message):
        memory.retrieve_and_add_to_output(**{'out': out, 'queries': queries, 'past_memories': past, **call})


def test_gates_are_broadcast_over_rows_heads_and_tokens():
    memory, (out, queries) = FastweightMemory(4, kv_heads=2), torch.randn(2, 2, 4, 7, 8)
    past = memory.create_new_memories(*torch.randn(2, 2, 2, 7, 8))
    expected = memory.retrieve_and_add_to_output(out, queries, past, torch.ones(2, 4, 7))
    for shape in ((), (1,), (7,), (4, 1), (1, 7), (2, 1, 1), (1, 4, 7)):
        close(memory.retrieve_and_add_to_output(out, queries, past, torch.ones(shape)), expected, 1e-6)


def test_projected_memories_have_the_features_that_they_were_made_for():
    memory, keys = FastweightMemory(4, mem_transform='kv_proj', dim_head=5), torch.randn(2, 4, 7, 8)
    with pytest.raises(ValueError, match=r'keys has shape \(2, 4, 7, 8\): this memory needs \(2, 4, 7, 5\)'):
        memory.create_new_memories(keys, keys)
    with pytest.raises(ValueError, match=r'queries has shape \(2, 4, 7, 8\): this memory needs \(2, 4, 7, 5\)'):
        memory.retrieve_and_add_to_output(keys, keys)
