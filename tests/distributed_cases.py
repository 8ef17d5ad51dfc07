"""What several processes do together, compared with one process that has the whole batch and the whole sequence.

`tests/ranks.py` runs these cases, `tests/test_distributed.py` reports them. Everything is in float64.
"""

# ruff: noqa: B023, PT017  what is refused is called at once, and there is no pytest inside the ranks

from __future__ import annotations

import contextlib
import importlib.util
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from infini_transformer_pytorch import InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import SegmentWrapper, loss
from segment_recurrence_pytorch.distributed import context_parallel, gathered, shard, sync_gradients
from segment_recurrence_pytorch.state import detach, leaves
from tests.conftest import LONG as LONG_TESTS
from tests.conftest import close, make_infini, make_rmt, same_gradients
from tests.ranks import case

EXACT = 1e-12
LENGTH = 6
WAYS = {
    'one graph': {},
    'recompute': {'recompute': True},
    'truncated': {'backprop_segments': 2},
    'truncated, recompute': {'backprop_segments': 2, 'recompute': True},
    'replay': {'backward': True},
    'truncated replay': {'backprop_segments': 2, 'backward': True},
}
FEW_WAYS = 'one graph', 'replay'
RMT = {
    'rmt': {},
    'rmt xl axial': {'use_xl_memories': True, 'axial_mem_len': 2, 'rotary_pos_emb': True, 'tie_embeddings': True},
}
INFINI = {
    'linear, strength, decay': {'learned_delta_update': True, 'memory_decay': True},
    'delta, published strength': {
        'memory_rule': 'delta', 'learned_delta_update': True, 'strength_in_normaliser': False, 'tie_embeddings': True,
    },
    'delta, decay, gqa': {'memory_rule': 'delta', 'memory_decay': True, 'heads': 4, 'kv_heads': 2, 'qk_norm': True},
    'deltanet, decay': {'memory_rule': 'deltanet', 'memory_decay': True, 'mem_transform': 'kv_proj'},
}  # fmt: skip
ABOVE = {'mem_read_from': 'above'}


def seeded(make, **options):
    torch.manual_seed(1)
    return make(**options)


MODELS = {name: partial(seeded, make_rmt, **options) for name, options in RMT.items()}
MODELS |= {f'infini {name}': partial(seeded, make_infini, **options) for name, options in INFINI.items()}
MODELS |= {'infini above': partial(seeded, make_infini, **ABOVE)}


def batch(rows=4, length=32):
    """Rows whose numbers of targets differ, so that the ranks have different numbers, too."""
    x = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(2))
    for row, valid in enumerate([length, length - 3, 9, 5][:rows]):
        x[row, valid:] = -100
    return x


def wrapped(model, way=None, group=None, passes=None):
    options = {name: value for name, value in WAYS[way or 'one graph'].items() if name != 'backward'}
    if model.parallel_segments:
        passes = passes or 2
    length = min(LENGTH, model.max_segment_length or LENGTH)
    return SegmentWrapper(model, segment_length=length, segments_per_pass=passes, process_group=group, **options)


def alone(make, way, x, state=None, **given):
    """Loss, gradients and state after, of one process and one graph. Of the way only the truncation counts."""
    wrapper = wrapped(make(), 'truncated' if 'truncated' in way else 'one graph')
    loss, _, after = wrapper.loss(x, state, **given)
    loss.backward()
    return loss.detach(), gradients(wrapper.model), detach(after)


def gradients(model):
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, 'full_tensor') else gradient
    return found


def train(wrapper, call, way, x, state=None, **given):
    """A call and its backward, by any way; gradients are averaged where nothing else does it."""
    if 'backward' in WAYS[way]:
        returned = wrapper.loss(x, state, backward=True, **given)
        if wrapper.model.mesh is None:
            sync_gradients(wrapper)
    else:
        returned = call(x, state, **given)
        returned.loss.backward()
    return returned


def same(wrapper, returned, want):
    loss, wanted, _ = want
    close(returned.loss.detach(), loss, EXACT)
    same_gradients(gradients(wrapper.model), wanted, EXACT)


def refused(function, words, kind=ValueError):
    """The call raises an error with these words, on this rank."""
    try:
        function()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f'not refused: {words}')


def rows_of(x, rank, ranks):
    return x.chunk(ranks)[rank]


@case(2, 4)
def data_parallel(rank, ranks):
    x = batch()
    mine = rows_of(x, rank, ranks)
    counts = [(rows_of(x, each, ranks)[:, 1:] != -100).sum().item() for each in range(ranks)]
    assert len(set(counts)) == ranks
    others = WAYS if LONG_TESTS else FEW_WAYS
    for name, ways in (('rmt', WAYS), ('infini delta, decay, gqa', others), ('rmt xl axial', FEW_WAYS)):
        for way in ways if ranks == 2 or name == 'rmt' else ():
            want = alone(MODELS[name], way, x)
            wrapper = wrapped(MODELS[name](), way, dist.group.WORLD)
            call = DistributedDataParallel(wrapper)
            for _ in range(2 if way in ('one graph', 'replay') else 1):  # the second step is another one for DDP
                wrapper.zero_grad()
                returned = train(wrapper, call, way, mine)
                same(wrapper, returned, want)
            assert returned.num_targets == sum(counts)


@case(2)
def a_rank_without_targets(rank, ranks):
    x = batch(2)
    x[1] = -100
    for way in WAYS:
        want = alone(MODELS['rmt'], way, x)
        wrapper = wrapped(MODELS['rmt'](), way, dist.group.WORLD)
        same(wrapper, train(wrapper, DistributedDataParallel(wrapper), way, x[rank : rank + 1]), want)
    wrapper = wrapped(MODELS['rmt'](), None, dist.group.WORLD)
    returned = wrapper.loss(x[1:])
    returned.loss.backward()
    assert returned.loss == returned.num_targets == 0
    assert not any(gradient.any() for gradient in gradients(wrapper.model).values())


@case(2)
def sums_and_values_of_each_target(rank, ranks):
    x = batch()
    mine, model = rows_of(x, rank, ranks), MODELS['rmt']()
    want = wrapped(model).loss(x, reduction='sum')
    wrapper = wrapped(model, None, dist.group.WORLD)
    found = wrapper.loss(mine, reduction='sum')
    close(found.loss, want.loss, EXACT)
    assert found.num_targets == want.num_targets
    close(wrapper.loss(mine, reduction='none').loss, wrapped(model).loss(mine, reduction='none').loss, EXACT)
    with torch.no_grad():
        close(wrapper.loss(mine).loss, wrapped(model).loss(x).loss, EXACT)


@case(2)
def the_published_wrappers(rank, ranks):
    x = batch()
    mine = rows_of(x, rank, ranks)
    rmt = MODELS['rmt']()
    x[x == -100], mine[mine == -100] = -1, -1
    for make, model, call, replay in (
        (RecurrentMemoryTransformerWrapper, rmt, {'return_loss': True}, {'memory_replay_backprop': True}),
        (InfiniTransformerWrapper, MODELS['infini linear, strength, decay'](), {}, {'backward': True}),
    ):
        options = {} if model is rmt else {'segment_length': LENGTH}
        reference = make(model, **options)
        loss = reference.loss(x).loss
        loss.backward()
        want = gradients(model)
        wrapper = make(model, **options, process_group=dist.group.WORLD)
        model.zero_grad()
        ddp = DistributedDataParallel(wrapper)  # backward needs it, too
        found = ddp(mine, **call)
        found = found[0] if isinstance(found, tuple) else found
        found.backward()
        close(found.detach(), loss.detach(), EXACT)
        same_gradients(gradients(model), want, EXACT)
        model.zero_grad()
        close(wrapper(mine, **replay), loss.detach(), EXACT)
        sync_gradients(wrapper)
        same_gradients(gradients(model), want, EXACT)


@case(2)
def micro_batches(rank, ranks):
    """Sums over several calls, and one division at the end: one process with all rows."""
    x = batch()
    want = alone(MODELS['rmt'], 'one graph', x)
    wrapper = wrapped(MODELS['rmt'](), 'replay', dist.group.WORLD)
    targets = 0
    for row in rows_of(x, rank, ranks).split(1):
        targets += wrapper.loss(row, reduction='sum', backward=True).num_targets
    sync_gradients(wrapper, targets)
    same_gradients(gradients(wrapper.model), want[1], EXACT)
    # the same with DDP, which is told to wait
    wrapper = wrapped(MODELS['rmt'](), None, dist.group.WORLD)
    ddp = DistributedDataParallel(wrapper)
    for i, row in enumerate(rows_of(x, rank, ranks).split(1)):
        with ddp.no_sync() if i == 0 else contextlib.nullcontext():
            ddp(row, reduction='sum').loss.backward()
    for parameter in wrapper.parameters():
        parameter.grad /= targets
    same_gradients(gradients(wrapper.model), want[1], EXACT)


@case(2)
def few_collectives_for_all_gradients(rank, ranks):
    from segment_recurrence_pytorch import distributed

    wrapper, calls = wrapped(MODELS['rmt'](), None, dist.group.WORLD), []
    x = batch()
    wrapper.loss(rows_of(x, rank, ranks), backward=True)
    before = [parameter.grad.clone() for parameter in wrapper.parameters()]
    of_torch = dist.all_reduce
    size, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 2**13
    dist.all_reduce = lambda tensor, **options: calls.append(tensor.numel()) or of_torch(tensor, **options)
    try:
        sync_gradients(wrapper)
    finally:
        dist.all_reduce, distributed.BUCKET_BYTES = of_torch, size
    numbers = sum(gradient.numel() for gradient in before)
    assert sum(calls) == numbers
    assert 1 < len(calls) <= 2 + 2 * numbers * 8 // 2**13
    for gradient, parameter in zip(before, wrapper.parameters(), strict=True):
        of_torch(gradient)
        close(parameter.grad, gradient / ranks, EXACT)


@case(2)
def wrong_data_parallel_is_refused(rank, ranks):
    mine = rows_of(batch(), rank, ranks)
    for name in ('rmt', 'infini linear, strength, decay'):
        wrapper = wrapped(MODELS[name](), None, dist.group.WORLD)
        ddp = DistributedDataParallel(wrapper)
        ways = [contextlib.nullcontext, ddp.no_sync]
        for context in [*ways, *ways]:
            with context():
                refused(lambda: ddp(mine, backward=True), 'runs backward itself, inside the forward of Distributed')
        assert all(parameter.grad is None for parameter in wrapper.parameters())
        wrapper = wrapped(MODELS[name](), None, dist.group.WORLD)
        without = DistributedDataParallel(wrapped(wrapper.model))
        refused(lambda: without(mine), 'the wrapper has no process_group')
        without(mine, reduction='sum').loss.backward()
        refused(lambda: sync_gradients(without.module), 'the wrapper has no process_group, but there are 2 processes')
        for each in range(ranks):
            group = dist.new_group([each])
            if rank == each:
                half = wrapped(wrapper.model, None, group)
        refused(lambda: DistributedDataParallel(half)(mine), f'a process_group of the ranks [{rank}]')
        # another module's DDP, whose forward calls the wrapper without owning it
        wrapper = wrapped(MODELS[name](), None, dist.group.WORLD)
        outer = DistributedDataParallel(Calls(wrapper, mine))
        outer(torch.zeros(1, 2).double())
        assert wrapper.model.token_emb.weight.grad.any()


class Calls(torch.nn.Module):
    """A module that calls a wrapper that is not its own."""

    def __init__(self, wrapper, x):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2).double()
        self.call = lambda: wrapper.loss(x, backward=True)

    def forward(self, x):
        self.call()
        return self.linear(x)


@contextlib.contextmanager
def counted():
    """Counts the all-gathers and reduce-scatters of FSDP2."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as of_torch

    counts, originals = {}, {}

    def counting(name):
        def call(*args, **options):
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **options)

        return call

    for name in ('foreach_all_gather', 'foreach_reduce'):
        originals[name] = getattr(of_torch, name)
        setattr(of_torch, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(of_torch, name, original)


def sharded(make, way=None, mesh=None, passes=None, **options):
    model = make()
    shard(model, mesh or init_device_mesh('cpu', (dist.get_world_size(),)), **options)
    return wrapped(model, way, dist.group.WORLD, passes)


@case(2, 4)
def fsdp(rank, ranks):
    x = batch()
    mine = rows_of(x, rank, ranks)
    tried = [('rmt', way) for way in WAYS]
    tried += [('infini delta, decay, gqa', way) for way in (WAYS if LONG_TESTS else FEW_WAYS)]
    tried += [] if ranks == 4 else [(name, 'replay') for name in MODELS]
    for name, way in dict.fromkeys(tried):
        make, passes = MODELS[name], 1 if name == 'infini above' else None
        want = alone(make, way, x)
        wrapper = sharded(make, way, passes=passes)
        for _ in range(2 if way in ('one graph', 'replay') else 1):
            wrapper.zero_grad()
            returned = train(wrapper, wrapper, way, mine)
            same(wrapper, returned, want)
        shards = [parameter.to_local().numel() for parameter in wrapper.parameters()]
        assert sum(shards) < 1.3 * sum(p.numel() for p in make().parameters()) / ranks


@case(4, long=True)
def fsdp_on_a_mesh_of_two_dimensions(rank, ranks):
    """Parameters are copied along the first dimension and spread along the second one."""
    x, mesh = batch(), init_device_mesh('cpu', (2, 2), mesh_dim_names=('copy', 'spread'))
    for way in WAYS:
        want = alone(MODELS['rmt'], way, x)
        wrapper = sharded(MODELS['rmt'], way, mesh)
        returned = train(wrapper, wrapper, way, rows_of(x, rank, ranks))
        same(wrapper, returned, want)
    mine = rows_of(x, rank, ranks)[:, : 32 if rank < 3 else 19].clamp(min=0)
    refused(lambda: wrapper.loss(mine), 'read 6, 6, 6, 3 segments')


@case(2)
def fsdp_carries_and_resets_states(rank, ranks):
    """Two pieces of a text with an optimizer step between them, a row of one rank that starts again, and logits."""
    x, new = batch()[:, :26].clamp(min=0), torch.tensor([True, False, False, False])
    mine = rows_of(x, rank, ranks)
    for name in ('rmt', 'rmt xl axial', 'infini delta, published strength', 'infini above'):
        make, passes = MODELS[name], 1 if name == 'infini above' else None
        found = []
        for wrapper, rows, starts in (
            (wrapped(make(), passes=passes), x, new),
            (sharded(make, passes=passes), mine, rows_of(new, rank, ranks)),
        ):
            state, losses = None, []
            optimizer = torch.optim.AdamW(wrapper.model.param_groups(1e-2, 0.1))
            for piece in (rows[:, :13], rows[:, 12:]):
                state = wrapper.reset(state, starts)
                loss, _, state = wrapper.loss(piece, state)
                loss.backward()
                state = detach(state)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            with torch.no_grad():
                logits, after = wrapper.logits(rows)
                empty, start = wrapper.logits(rows[:, :0])
                nothing = wrapper.loss(rows[:, :1], backward=False)
            assert empty.shape[1] == 0
            assert nothing.loss == 0
            found.append((losses, logits, leaves(state), leaves(after), leaves(start), leaves(nothing.state)))
        want, have = found
        at = slice(rank * len(mine), (rank + 1) * len(mine))
        close(torch.tensor(have[0]), torch.tensor(want[0]), EXACT)
        close(have[1], want[1][at], EXACT)
        for part in (2, 3, 4, 5):
            if len(have[part]) != len(want[part]):  # an empty XL memory with a count of 0 for each row, and without
                assert part > 3
                have[part][1:], want[part][1:] = [], []
            for one, whole in zip(have[part], want[part], strict=True):
                close(one, whole[at], EXACT)


@case(2)
def fsdp_of_a_large_vocabulary(rank, ranks):
    """Each part of the logits gathers the parameters, so all ranks need as many, also with other numbers of rows."""
    x, at_once = batch(rows=3), loss.LOGITS_AT_ONCE
    mine = x[:2] if rank == 0 else x[2:]
    want = {way: alone(MODELS['rmt'], way, x) for way in ('one graph', 'replay')}
    loss.LOGITS_AT_ONCE = 20 * LENGTH  # one part for a row and segment
    try:
        for way, wanted in want.items():
            wrapper = sharded(MODELS['rmt'], way)
            same(wrapper, train(wrapper, wrapper, way, mine), wanted)
    finally:
        loss.LOGITS_AT_ONCE = at_once


@case(2)
def fsdp_learns_the_first_state_of_an_empty_call(rank, ranks):
    """A call that reads nothing returns the learned initial state, and replay fills the gradients of all."""
    x = batch()
    for way in ('one graph', 'replay'):
        wrapper = sharded(MODELS['rmt'], way)
        returned = train(wrapper, wrapper, way, x[:2, :1])
        assert not any(gradient.any() for gradient in gradients(wrapper.model).values())
        wanted = wrapped(MODELS['rmt']()).loss(x[:2, :1]).state
        close(returned.state.memory.detach(), wanted.memory.detach(), EXACT)


@case(2)
def fsdp_replay_reduces_once(rank, ranks):
    x = batch()
    mine, counts = rows_of(x, rank, ranks), {}
    for name in ('rmt', 'infini linear, strength, decay'):
        for way in ('one graph', 'replay', 'truncated replay'):
            wrapper = sharded(MODELS[name], way)
            train(wrapper, wrapper, way, mine)
            with counted() as found:
                train(wrapper, wrapper, way, mine)
            counts[name, way] = found['foreach_all_gather'], found['foreach_reduce']
        # one a block, and two of the model itself: the logits of the last window come first
        for way in ('replay', 'truncated replay'):
            assert counts[name, way][1] == len(wrapper.model.layers) + 2, counts
    # what docs/distributed.md says
    assert counts['rmt', 'replay'] == (46, 4)
    assert counts['rmt', 'one graph'] == (36, 4)


@case(2)
def fsdp_generates_in_gathered(rank, ranks):
    x = batch()
    mine, prompt = rows_of(x, rank, ranks), x[:2, :9].clamp(min=0)
    for name in ('rmt xl axial', 'infini deltanet, decay', 'infini above'):
        make, passes = MODELS[name], 1 if name == 'infini above' else None
        want = alone(make, 'one graph', x)
        reference, wrapper = wrapped(make(), passes=passes), sharded(make, passes=passes)
        expected = reference.generate_tokens(prompt, 16, temperature=0.0)
        refused(lambda: wrapper.generate_tokens(prompt, 2), 'with segment_recurrence_pytorch.distributed.gathered')
        refused(lambda: wrapper.stream(prompt), 'generation needs all of them')
        with gathered(wrapper.model):  # before anything else, a prompt of less than a segment
            found = wrapper.generate_tokens(prompt[:, :2], 3, temperature=0.0)
        assert torch.equal(found, reference.generate_tokens(prompt[:, :2], 3, temperature=0.0))
        for _ in range(2):  # before any step, and between steps
            cursor = wrapper.read(prompt)
            assert torch.equal(cursor.tokens, reference.read(prompt).tokens)
            with gathered(wrapper.model):
                if rank == 0:  # alone, and without waiting for the other
                    found = wrapper.generate_tokens(prompt, 16, temperature=0.0)
                    assert torch.equal(found, expected)
                    short = wrapper.generate_tokens(prompt[:, :2], 3, temperature=0.0)
                    assert torch.equal(short, reference.generate_tokens(prompt[:, :2], 3, temperature=0.0))
                    going_on = wrapper.generate_tokens(None, 4, state=cursor, temperature=0.0)
                    assert torch.equal(going_on, expected[:, :4])
            assert not any(hasattr(p, 'full_tensor') is False for p in wrapper.parameters())
            wrapper.zero_grad()
            returned = wrapper.loss(mine)
            returned.loss.backward()
            same(wrapper, returned, want)
        with contextlib.suppress(RuntimeError), gathered(wrapper.model):
            raise RuntimeError
        wrapper.zero_grad()
        returned = wrapper.loss(mine)
        returned.loss.backward()
        same(wrapper, returned, want)


@case(2)
def fsdp_saves_what_one_process_saves(rank, ranks):
    import tempfile
    from pathlib import Path

    from safetensors import safe_open

    from segment_recurrence_pytorch.checkpoint import load_cursor, load_weights, save_cursor, save_weights

    for name in ('rmt xl axial', 'infini delta, published strength'):
        make = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            wrapper, model = sharded(make), make()
            wrapper.loss(rows_of(batch(), rank, ranks)).loss.backward()
            assert wrapper.model.fingerprint() == model.fingerprint()
            path = Path(folder) / 'weights'
            save_weights(wrapper.model, path)
            assert path.exists() is (rank == 0)
            refused(lambda: load_weights(wrapper.model, path), 'load the weights first, then call `shard`')
            cursor = wrapper.read(batch()[:1, :9])
            save_cursor(cursor, Path(folder) / 'cursor', wrapper.model)
            load_cursor(Path(folder) / 'cursor', model)
            assert load_cursor(Path(folder) / 'cursor', wrapper.model).lengths == cursor.lengths
            if rank == 0:
                save_weights(model, Path(folder) / 'plain')
                again = make()
                torch.nn.init.zeros_(again.token_emb.weight)
                load_weights(again, path)
                assert again.fingerprint() == model.fingerprint()
                with safe_open(path, 'pt') as one, safe_open(Path(folder) / 'plain', 'pt') as other:
                    assert one.metadata() == other.metadata()
                    assert sorted(one.keys()) == sorted(other.keys())

            def frozen():
                model = make()
                for parameter_name, parameter in model.named_parameters():
                    parameter.requires_grad_('norm' in parameter_name)
                return model

            wrapper = sharded(frozen)
            save_weights(wrapper.model, path, trained_only=True)
            if rank == 0:
                again = frozen()
                torch.nn.init.zeros_(again.norm.weight)
                load_weights(again, path)
                assert again.fingerprint() == model.fingerprint()


@case(2)
def fsdp_refuses_what_would_hang(rank, ranks):
    x = batch()
    for name, numbers in (('rmt', '6, 3 segments'), ('infini linear, strength, decay', '3, 2 windows')):
        wrapper = sharded(MODELS[name])
        mine = rows_of(x, rank, ranks)[:, : 32 if rank == 0 else 19].clamp(min=0)
        for call in (
            lambda: wrapper.loss(mine),
            lambda: wrapper.loss(mine, backward=True),
            lambda: wrapper.logits(mine[:, :-1]),
            lambda: wrapper.read(mine),
        ):
            if call.__code__.co_names[0] == 'read':
                numbers = numbers.replace('6', '5')
            refused(call, f'read {numbers}')
        wrapper.loss(rows_of(x, rank, ranks)).loss.backward()
    refused(lambda: wrapped(wrapper.model).loss(x), 'the wrapper has no process_group')
    refused(lambda: sync_gradients(wrapper), 'the parameters are sharded')


@case(2)
def fsdp_refuses_wrong_modules(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    from tests.test_contract import SegmentGRU

    mesh = init_device_mesh('cpu', (ranks,))
    model = MODELS['rmt']()
    refused(lambda: shard(wrapped(model), mesh), 'shard takes a SegmentModel, not a SegmentWrapper')
    refused(lambda: shard(model, mesh, blocks=[torch.nn.Linear(1, 1)]), 'is not inside the model')
    refused(lambda: shard(SegmentGRU(20, 16), mesh), 'does not say which modules are its blocks')
    assert not model.draws_random
    shard(model, mesh)
    assert not model.draws_random  # it is a subclass now, but none of a user
    refused(lambda: shard(model, mesh), 'sharded already')
    wrapper = wrapped(MODELS['rmt'](), None, dist.group.WORLD)
    fully_shard(wrapper, mesh=mesh)
    refused(lambda: wrapper.loss(batch(), backward=True), 'fully_shard was applied to the wrapper')


@case(2)
def fsdp_of_models_on_the_contract(rank, ranks):
    from tests.conftest import random_weights
    from tests.test_contract import MODELS as THREE

    x = batch()
    mine = rows_of(x, rank, ranks)
    for name, make in THREE.items():
        make = partial(seeded, lambda make=make: random_weights(make().double()))
        want = alone(make, 'one graph', x)
        for way in ('one graph', 'recompute', 'replay'):
            model = make()
            blocks = {'recurrent network': lambda m: [m.cell], 'associative': lambda m: m.blocks}.get(name)
            shard(model, init_device_mesh('cpu', (ranks,)), blocks=blocks(model) if blocks else [])
            wrapper = wrapped(model, way, dist.group.WORLD)
            returned = train(wrapper, wrapper, way, mine)
            same(wrapper, returned, want)
            after = wrapper.reset(detach(returned.state), torch.tensor([True] + [False] * (len(mine) - 1)))
            wrapper.loss(mine, after).loss.backward()
            with gathered(model):
                found = wrapper.generate_tokens(x[:2, :9].clamp(min=0), 8, temperature=0.0)
            expected = wrapped(make()).generate_tokens(x[:2, :9].clamp(min=0), 8, temperature=0.0)
            assert torch.equal(found, expected)


@case(2)
def memories_of_pretrained_models(rank, ranks):
    """Data parallel and FSDP2 of `RecurrentMemoryLM` and `InfiniLM`, if transformers is installed."""
    if importlib.util.find_spec('transformers') is None:
        return
    from infini_transformer_pytorch.huggingface import add_infini_attention
    from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
    from tests.pretrained import tiny_lm

    x = batch()
    mine = rows_of(x, rank, ranks)
    for make in (
        lambda: RecurrentMemoryLM(tiny_lm(), num_memory_tokens=3),
        lambda: add_infini_attention(tiny_lm(), memory_rule='delta', learned_delta_update=True),
    ):
        make = partial(seeded, make)
        want = alone(make, 'one graph', x)
        for way in ('one graph', 'replay'):
            wrapper = wrapped(make(), way, dist.group.WORLD)
            call = wrapper if way == 'replay' else DistributedDataParallel(wrapper)
            same(wrapper, train(wrapper, call, way, mine), want)
            model = make()
            shard(model, init_device_mesh('cpu', (ranks,)), blocks=model.decoder.layers)
            wrapper = wrapped(model, way, dist.group.WORLD)
            same(wrapper, train(wrapper, wrapper, way, mine), want)
        with gathered(model):
            found = wrapper.generate_tokens(x[:2, :9].clamp(min=0), 8, temperature=0.0)
        assert torch.equal(found, wrapped(make()).generate_tokens(x[:2, :9].clamp(min=0), 8, temperature=0.0))


@case(2)
def fsdp_in_bfloat16_keeps_the_state(rank, ranks):
    """Parameters are used in bfloat16, memories stay in float32, and the loss is near that of float32."""
    x = batch()
    mine = rows_of(x, rank, ranks)
    for name in ('rmt', 'rmt xl axial', 'infini delta, decay, gqa', 'infini deltanet, decay'):

        def make(name=name):
            return MODELS[name]().float()

        want = alone(make, 'one graph', x)
        for way in ('one graph', 'replay'):
            seen = set()
            wrapper = sharded(make, way, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for block in wrapper.model.layers:
                block.ff.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
            if name.startswith('infini'):
                for block in wrapper.model.layers:
                    write = block.attn.fastweight_mem.write
                    block.attn.fastweight_mem.write = lambda writes, past, w=write: (
                        seen.add(('past', past.kv_mem.dtype)) or w(writes, past)
                    )
            returned = train(wrapper, wrapper, way, mine)
            assert abs(returned.loss.item() - want[0].item()) < 0.03 * want[0].item()
            assert torch.bfloat16 in seen
            assert ('past', torch.bfloat16) not in seen
            assert ('past', torch.float32) in seen or not name.startswith('infini')
            assert all(leaf.dtype in (torch.float32, torch.long) for leaf in leaves(returned.state))
            assert all(parameter.grad.dtype == torch.float32 for parameter in wrapper.parameters())
            state = wrapper.reset(detach(returned.state), torch.tensor([True, False]))
            train(wrapper, wrapper, way, mine, state)
            with gathered(wrapper.model):
                _, cursor = wrapper.generate_tokens(mine[:, :9].clamp(min=0), 8, state=state, return_cursor=True)
            assert all(leaf.dtype in (torch.float32, torch.long) for leaf in leaves(cursor.state))
            train(wrapper, wrapper, way, mine, cursor.state)


LONG = 64  # inputs: 11 segments, the last one shorter, so that ranks have different numbers of segments
CHAINED = {name: make for name, make in MODELS.items() if name.startswith('infini') and name != 'infini above'}


def long_batch(ragged):
    x = torch.randint(0, 20, (2, LONG + 1), generator=torch.Generator().manual_seed(3))
    if ragged:
        x[0, 40:], x[1, 61:] = -100, -100
    return x


def read_before(make):
    return detach(wrapped(make()).logits(torch.arange(26).view(2, 13) % 20)[1])


@case(2, 4)
def context(rank, ranks):
    world = dist.group.WORLD
    for number, make in enumerate(CHAINED.values()):
        for way in WAYS if number == 0 else ('one graph', 'recompute', 'truncated replay')[: 3 if ranks == 2 else 1]:
            for ragged in (True,) if number or way != 'one graph' else (False, True):
                x, state = long_batch(ragged), read_before(make) if ragged else None
                want = alone(make, way, x, state)
                wrapper = wrapped(make(), way, world, passes=LONG)
                call = wrapper if 'replay' in way else DistributedDataParallel(wrapper)
                with context_parallel(wrapper.model, world):
                    returned = train(wrapper, call, way, x, state)
                same(wrapper, returned, want)
                assert returned.num_targets == (x[:, 1:] != -100).sum()
                for one, whole in zip(leaves(returned.state), leaves(want[2]), strict=True):
                    close(one, whole, EXACT)
                    assert not one.requires_grad
            with torch.no_grad(), context_parallel(wrapper.model, world):
                close(wrapper.loss(x, state).loss, want[0], EXACT)


@case(2, 4)
def context_cuts_at_every_border(rank, ranks):
    """Truncation after any number of segments, where borders of ranks are cut and where they are not."""
    world = dist.group.WORLD
    for name in ('infini linear, strength, decay', 'infini delta, decay, gqa', 'infini deltanet, decay'):
        for k in (1, 3, 4, 6, 20) if name == 'infini delta, decay, gqa' else (2,):
            x, found = long_batch(True), []
            for spread in (False, True):
                wrapper = wrapped(MODELS[name](), None, world if spread else None, passes=LONG)
                with context_parallel(wrapper.model, world) if spread else contextlib.nullcontext():
                    loss = wrapper.loss(x, backprop_segments=k, backward=True).loss
                if spread:
                    sync_gradients(wrapper)
                found.append((loss, gradients(wrapper.model)))
            close(found[1][0], found[0][0], EXACT)
            same_gradients(found[1][1], found[0][1], EXACT)
    for recompute in (False, True):  # a loss of one's own, of the columns of this rank
        found = []
        for spread in (False, True):
            wrapper = wrapped(
                MODELS[name](), 'recompute' if recompute else None, world if spread else None, passes=LONG
            )
            with context_parallel(wrapper.model, world) if spread else contextlib.nullcontext():
                logits, _ = wrapper.logits(long_batch(False), backprop_segments=2)
                (logits.square().sum() * (ranks if spread else 1)).backward()
            if spread:
                sync_gradients(wrapper)
            found.append(gradients(wrapper.model))
        same_gradients(found[1], found[0], EXACT)


@case(2, 4)
def context_of_more_than_a_loss(rank, ranks):
    """Logits, values of each target, labels, write_scale, and reading on from a state; CPU_ROWS does not cut."""
    from infini_transformer_pytorch import infini

    world, make = dist.group.WORLD, MODELS['infini delta, published strength']
    x = long_batch(True)
    tokens, labels, mask = x[:, :-1].clamp(min=0), x[:, 1:], x[:, :-1] != -100
    scale = torch.rand(2, 11).double() * 3
    rows, infini.CPU_ROWS = infini.CPU_ROWS, 12
    try:
        reference, wrapper = wrapped(make()), wrapped(make(), None, world, passes=LONG)
        wanted = reference.logits(tokens, mask=mask)
        per_token = reference.loss(tokens, labels=labels, mask=mask, reduction='none').loss
        scaled = reference.loss(tokens, labels=labels, mask=mask, per_segment={'write_scale': scale})
        scaled.loss.backward()
        first, stop = (11 * each // ranks * LENGTH for each in (rank, rank + 1))
        with context_parallel(wrapper.model, world):
            found = wrapper.logits(tokens, mask=mask)
            close(found[0], wanted[0][:, first:stop], EXACT)
            for one, whole in zip(leaves(found[1]), leaves(wanted[1]), strict=True):
                close(one, whole.detach(), EXACT)
            values = wrapper.loss(tokens, labels=labels, mask=mask, reduction='none')
            close(values.loss, per_token[:, first:stop], EXACT)
            found = wrapper.loss(tokens, labels=labels, mask=mask, per_segment={'write_scale': scale})
            found.loss.backward()
            close(found.loss, scaled.loss, EXACT)
        sync_gradients(wrapper)
        same_gradients(gradients(wrapper.model), gradients(reference.model), EXACT)
        # nothing learns but the embeddings that the first rank was given: the others run backward all the same
        embeddings = torch.randn(2, LONG, 16).double()
        whole, given = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_(rank == 0)
        reference.model.requires_grad_(False)
        wrapper.model.requires_grad_(False)
        reference.loss(whole, labels=labels).loss.backward()
        with context_parallel(wrapper.model, world):
            wrapper.loss(given, labels=labels).loss.backward()
        if rank == 0:
            close(given.grad[:, :stop] / ranks, whole.grad[:, :stop], EXACT)
            assert not given.grad[:, stop:].any()
    finally:
        infini.CPU_ROWS = rows


@case(2, 4)
def context_reads_a_document(rank, ranks):
    """All ranks get the cursor after it, and each can go on alone."""
    world = dist.group.WORLD
    for make in list(CHAINED.values())[:: 1 if ranks == 2 else 3]:
        reference, wrapper = wrapped(make()), wrapped(make(), None, world)
        document = long_batch(False)
        for prompt, lengths in ((document, None), (document[:, :60], torch.tensor([41, 60]))):
            want = reference.read(prompt, prompt_lengths=lengths)
            with context_parallel(wrapper.model, world):
                found = wrapper.read(prompt, prompt_lengths=lengths)
            for one, whole in zip(leaves(found), leaves(want), strict=True):
                close(one, whole, EXACT)
            answer = wrapper.generate_tokens(None, 9, state=found.fork(2), temperature=0.0)
            assert torch.equal(answer, reference.generate_tokens(None, 9, state=want.fork(2), temperature=0.0))
        with context_parallel(wrapper.model, world):
            answer = wrapper.generate_tokens(document, 9, temperature=0.0)
            refused(lambda: wrapper.read(document[:, :LENGTH]), 'too few for the')
        assert torch.equal(answer, reference.generate_tokens(document, 9, temperature=0.0))


@case(2)
def context_of_one_rank(rank, ranks):
    """A mesh of two rows of one rank each: context parallel has nothing to hand on, and data parallel is all."""
    mesh = init_device_mesh('cpu', (ranks, 1), mesh_dim_names=('data', 'context'))
    make, x = MODELS['infini delta, decay, gqa'], long_batch(True)
    want = alone(make, 'truncated', x)
    wrapper = wrapped(make(), 'truncated replay', dist.group.WORLD, passes=LONG)
    with context_parallel(wrapper.model, mesh.get_group('context')):
        returned = train(wrapper, wrapper, 'truncated replay', rows_of(x, rank, ranks))
    same(wrapper, returned, want)


@case(2)
def wrong_context_parallel_is_refused(rank, ranks):
    world, x = dist.group.WORLD, long_batch(False)
    model = MODELS['infini delta, decay, gqa']()

    def inside(wrapper, call, words):
        with context_parallel(wrapper.model, world):
            refused(lambda: call(wrapper), words)
        assert wrapper.model.chain is None

    inside(wrapped(model, None, world, passes=5), lambda w: w.loss(x), 'segments_per_pass=5, but each rank')
    inside(
        wrapped(model, None, world, passes=9), lambda w: w.loss(x[:, :7]), '1 segments of 6, too few for the 2 ranks'
    )
    inside(
        wrapped(model, None, world, passes=9), lambda w: w.loss(x[:, :1]), '0 segments of 6, too few for the 2 ranks'
    )
    inside(wrapped(model, passes=9), lambda w: w.loss(x), 'the wrapper has no process_group')
    other = x.clone()
    other[-1, -1] += 1 - 2 * other[-1, -1].clamp_max(1)  # another id, the last one read as a target only
    labels, embeddings = x.roll(-1, dims=1), torch.rand(*x.shape, model.dim)
    for given in (
        (other, x), (x[:, :-1], x), (x[:1], x), (x.flip(0), x),
    ):  # fmt: skip
        words = 'the ranks of context_parallel were given different'
        inside(wrapped(model, None, world, passes=9), lambda w, own=given[rank]: w.loss(own), words)
        inside(wrapped(model, None, world, passes=9), lambda w, own=given[rank]: w.read(own), words)
    mask = torch.ones_like(x, dtype=torch.bool)
    for own in (
        {'labels': labels if rank else labels.flip(0)},
        {'labels': labels, 'mask': mask if rank else mask.index_fill(1, torch.tensor([0]), False)},
    ):
        inside(wrapped(model, None, world, passes=9), lambda w, own=own: w.loss(x, **own), words)
    scaled = embeddings * (1 + 1e-6 * rank)
    inside(wrapped(model, None, world, passes=9), lambda w: w.loss(scaled, labels=labels), words)
    right = SegmentWrapper(model, segment_length=LENGTH, align='right', process_group=world)
    inside(right, lambda w: w.loss(x), "align='right' inside context_parallel")
    inside(wrapped(model), lambda w: context_parallel(w.model, world).__enter__(), 'inside context_parallel')
    for name, words in (('rmt', 'the memory of a Recurrent'), ('infini above', "mem_read_from='above'")):
        refused(lambda: context_parallel(MODELS[name](), world).__enter__(), words)
    refused(lambda: context_parallel(right, world).__enter__(), 'takes a SegmentModel, not a SegmentWrapper')
    with contextlib.suppress(KeyError), context_parallel(model, world):
        raise KeyError
    assert model.chain is None
    wrapper = wrapped(model, None, world, passes=9)
    assert wrapper.loss(x).loss.requires_grad
    with context_parallel(model, world):
        loss = wrapper.loss(x).loss
    refused(loss.backward, 'run backward inside it', RuntimeError)


@case(2)
def context_sends_what_the_table_says(rank, ranks):
    from benchmarks.context_parallel import numbers_a_hop

    world, x = dist.group.WORLD, long_batch(False)
    for name, make in CHAINED.items():
        wrapper = wrapped(make(), None, world, passes=LONG)
        model = wrapper.model
        with context_parallel(model, world):
            wrapper.loss(x, backward=True)
            sent = model.chain.bytes_sent
        numbers = numbers_a_hop(
            kv_heads=model.kv_heads, dim_head=model.dim_head, memory_rule=model.memory_rule, backward=rank > 0
        )
        assert sent == 2 * len(model.layers) * 8 * numbers, name  # 2 rows, float64


@case(4)
def data_and_context(rank, ranks):
    """A mesh of 2 x 2: rows over its first dimension, segments over its second one."""
    mesh, world = init_device_mesh('cpu', (2, 2), mesh_dim_names=('data', 'context')), dist.group.WORLD
    x = torch.cat((long_batch(True), long_batch(False)))
    mine, group = x.chunk(2)[mesh.get_local_rank('data')], mesh.get_group('context')
    for name in ('infini delta, decay, gqa', 'infini linear, strength, decay', 'infini deltanet, decay'):
        make = MODELS[name]
        for way in WAYS if name == 'infini delta, decay, gqa' else ('truncated replay',):
            want = alone(make, way, x)
            for parameters in ('whole', 'sharded'):
                model = make()
                if parameters == 'sharded':
                    shard(model, init_device_mesh('cpu', (ranks,)))
                wrapper = wrapped(model, way, world, passes=LONG)
                call = wrapper
                if parameters == 'whole' and 'replay' not in way:
                    call = DistributedDataParallel(wrapper)
                with context_parallel(model, group):
                    returned = train(wrapper, call, way, mine)
                same(wrapper, returned, want)
    half = wrapped(model, None, group, passes=LONG)  # the model is sharded over all four
    with context_parallel(model, group):
        refused(lambda: half.loss(mine), 'gradients are averaged over the ranks [0, 1, 2, 3], but the wrapper has a')


SMALLER = {
    'dist.init_process_group()\n': '',  # the ranks are there already
    'dim = 512': 'dim = 16',
    'depth = 6': 'depth = 2',
    'depth = 8': 'depth = 2',
    'dim_head = 128': 'dim_head = 8',
    'heads = 8': 'heads = 2',
    'seq_len = 1024': 'seq_len = 16',
    'segment_length = 512': 'segment_length = 16',
    'num_memory_tokens = 128': 'num_memory_tokens = 4',
    '10000': '100',
    ':1000]': ':20]',
    'max_new_tokens = 100': 'max_new_tokens = 5',
}


@case(2)
def the_page_runs(rank, ranks):
    """The blocks of docs/distributed.md, one after the other, with smaller sizes."""
    import os
    import re
    import tempfile
    from pathlib import Path

    page = (Path(__file__).parents[1] / 'docs' / 'distributed.md').read_text()
    script = '\n'.join(re.findall(r'```python\n(.*?)```', page, re.DOTALL))
    for large, small in SMALLER.items():
        assert large in script, large
        script = script.replace(large, small)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(script, 'docs/distributed.md', 'exec'), {'__name__': 'page'})
        finally:
            os.chdir(before)


@case(2)
def accelerate_averages_once_in_four_calls(rank, ranks):
    """Gradient accumulation of `accelerate` with replay: the optimizer steps, and gradients are averaged, every fourth
    time."""
    import os

    # what torchrun says; the process group is there already, and nobody listens at this address
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(ranks), 'LOCAL_RANK': str(rank)}
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    assert accelerator.num_processes == ranks
    pieces = [batch()[:, i : i + 20] for i in range(0, 8, 2)]
    reference, wrapper = wrapped(MODELS['rmt']()), wrapped(MODELS['rmt'](), None, dist.group.WORLD)
    for x in pieces:
        (reference.loss(x).loss / 4).backward()
    want = gradients(reference.model)
    optimizer = accelerator.prepare(torch.optim.SGD(wrapper.model.parameters(), lr=0.1))
    before = [parameter.detach().clone() for parameter in wrapper.parameters()]
    for number, x in enumerate(pieces):
        with accelerator.accumulate(wrapper):
            wrapper.loss(rows_of(x, rank, ranks), backward=True, backward_fn=accelerator.backward)
            if accelerator.sync_gradients:
                sync_gradients(wrapper)
                same_gradients(gradients(wrapper.model), want, EXACT)
            optimizer.step()
        assert all(map(torch.equal, before, wrapper.parameters())) is (number < 3)
    for old, new, gradient in zip(before, wrapper.parameters(), want.values(), strict=True):
        close(new.detach(), old - 0.1 * gradient, EXACT)


@case(2)
def the_example_gives_the_numbers_of_one_process(rank, ranks):
    """examples/many_processes.py: rows that are divided, and one text that is read together."""
    import os

    from examples import many_processes

    os.environ.pop('RANK', None)
    said: list[str] = []
    many_processes.say = lambda rank, words: said.append(words)  # no barriers in one process
    many_processes.sync_gradients = lambda wrapper: None  # the library refuses it where there are others
    want = many_processes.main(steps=3, segments=4)
    many_processes.sync_gradients = sync_gradients
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(ranks)}
    have = many_processes.main(steps=3, segments=4)
    assert f'rank {rank} of {ranks}: reads rows {16 * rank} to {16 * rank + 15} of the batch' in said
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
