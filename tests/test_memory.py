"""The compressive memory alone: writing, reading, the scan, and half types."""

import itertools

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
        memory = FastweightMemory(4, kv_heads=2, memory_rule=rule).double()
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
