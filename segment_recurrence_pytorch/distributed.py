"""Many processes: data parallel, sharded parameters (FSDP2), and one sequence over many ranks.

A rank is one of the processes that work together. There are three ways to divide the work, which can be combined.
docs/distributed.md says which one to choose, and shows the lines to write.

    data parallel      Each rank has a copy of the model and reads its own rows. `DistributedDataParallel(wrapper)` is
                       all that is needed if the caller runs backward. If backward runs inside the call (replay),
                       `sync_gradients` adds the gradients of the ranks afterwards.
    FSDP2              Each rank has a part of every parameter and reads its own rows: `shard`. The parameters of a
                       block are gathered while it is used. Generation gathers all of them at once: `gathered`.
    context parallel   The ranks read one sequence together, each its own segments: `context_parallel`.

In all of them the wrapper needs a process group: `SegmentWrapper(model, process_group=dist.group.WORLD)`. Its losses
are then divided by the number of targets of all ranks, and the average of the gradients over the ranks, which
DistributedDataParallel, FSDP2 and `sync_gradients` compute, is the gradient that one process would have.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segment_recurrence_pytorch.backprop import Window, fill_gradients
from segment_recurrence_pytorch.layers import SegmentTransformer
from segment_recurrence_pytorch.loss import parts_of_logits
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, leaves, map_state

if TYPE_CHECKING:
    from segment_recurrence_pytorch.wrapper import SegmentWrapper

BUCKET_BYTES = 25 * 2**20  # bytes that one collective sends at most, unless a single tensor is larger


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: Any) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return grad_outputs[0] * ctx.ranks, None


def sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    """Returns the sum of the values of all ranks. All ranks have to make the call.

    Its gradient is the number of ranks times that of an ordinary sum, since gradients are averaged over the ranks
    later. The average is then the gradient of the sum.

    Args:
        value: the value of this rank, a tensor of any shape.
        group: the process group. None: the value is returned unchanged.
    """
    return value if group is None else _SumOverRanks.apply(value, group)


def ranks_of(group: Any) -> int:
    """Returns the number of ranks in a process group. It is 1 if there is no group."""
    return 1 if group is None else dist.get_world_size(group)


@torch.no_grad()
def sync_gradients(wrapper: SegmentWrapper, num_targets: Tensor | float | None = None) -> None:
    """Averages the gradients over the ranks, where nothing else does so: after calls with backward=True.

    Call it once before the optimizer step, on all ranks, after one or more calls:

        loss, num_targets, state = wrapper.loss(x, backward=True)
        sync_gradients(wrapper)

    If the losses of several calls shall count by their number of targets, add up sums and divide at the end:

        targets = 0
        for x in batches:
            targets += wrapper.loss(x, reduction='sum', backward=True).num_targets
        sync_gradients(wrapper, targets)

    Args:
        wrapper: the wrapper, whose process_group says which ranks work together. Without a group and with one process,
            there is nothing to average.
        num_targets: number of targets by which the gradients are divided, those of all ranks together, as
            `LossReturn.num_targets` counts them. Default: None, they are not divided, since the losses are means.

    Raises:
        ValueError: if the wrapper has no process_group although there are several processes, or if the parameters are
            sharded. FSDP2 averages the gradients itself.
    """
    group = wrapper.process_group
    if wrapper.model.mesh is not None:
        raise ValueError('sync_gradients: the parameters are sharded, and FSDP2 averages gradients: leave the call out')
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f'sync_gradients: the wrapper has no process_group, but there are {dist.get_world_size()} processes: give '
            'SegmentWrapper(..., process_group=dist.group.WORLD)'
        )
    fill_gradients(wrapper)
    gradients = [parameter.grad for parameter in wrapper.parameters() if parameter.grad is not None]
    if group is not None:
        in_buckets(gradients, lambda flat: dist.all_reduce(flat, group=group))
    divisor: Any = ranks_of(group)
    if num_targets is not None:
        divisor = divisor * torch.as_tensor(num_targets).clamp(min=1)
    for gradient in gradients:
        gradient.div_(divisor)


def in_buckets(tensors: Iterable[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Calls a collective that changes a tensor in place, for several tensors at once.

    Args:
        tensors: the tensors, which get the results.
        collective: a function that is called with flat tensors of about `BUCKET_BYTES` bytes.
    """
    buckets: list[list[Tensor]] = []
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}  # bytes in the newest bucket of a kind of tensors
    newest: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if kind not in newest or sizes[kind] + size > BUCKET_BYTES:
            newest[kind], sizes[kind] = [], 0
            buckets.append(newest[kind])
        newest[kind].append(tensor)
        sizes[kind] += size
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        collective(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def check_call(wrapper: SegmentWrapper, *, backward: bool, mean: bool) -> None:
    """Raises ValueError if a call of `SegmentWrapper.loss` would give wrong gradients, because of the way in which the
    work is divided over the ranks.

    Args:
        wrapper: the wrapper.
        backward: whether the call runs backward itself.
        mean: whether the loss is a mean over targets.
    """
    model, group = wrapper.model, wrapper.process_group
    if hasattr(wrapper, 'set_requires_gradient_sync'):
        raise ValueError(
            'fully_shard was applied to the wrapper: its calls then read parameters that are not gathered. Shard the '
            'model instead: `segment_recurrence_pytorch.distributed.shard(wrapper.model, mesh)`'
        )
    ddp = _enclosing_ddp(model)
    if ddp is not None and backward:
        raise ValueError(
            'this call runs backward itself, inside the forward of DistributedDataParallel, which would not reduce the '
            'gradients (nor would it after no_sync). Call the wrapper itself, `ddp.module`, and then '
            '`segment_recurrence_pytorch.distributed.sync_gradients(ddp.module)` once before the optimizer step; or '
            'leave backward out and run `loss.backward()`, for which recompute=True saves as much memory'
        )
    given = set() if group is None else set(dist.get_process_group_ranks(group))
    averaged: set[int] = set()  # and not set[int](), which torch.compile cannot trace
    read: set[int] = set()
    if ddp is not None:
        averaged = set(dist.get_process_group_ranks(ddp.process_group))
    if model.mesh is not None:
        averaged = set(model.mesh.mesh.flatten().tolist())
    if model.chain is not None:
        read = set(dist.get_process_group_ranks(model.chain.group))
    if (group is None and not mean) or ((not averaged or given == averaged) and read <= given):
        return
    has = 'no process_group' if group is None else f'a process_group of the ranks {sorted(given)}'
    raise ValueError(
        f'gradients are averaged over the ranks {sorted(averaged | read)}, but the wrapper has {has}: its loss would '
        'not be that of all targets. Give SegmentWrapper(..., process_group=) these ranks, as dist.group.WORLD is'
    )


def _enclosing_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """Returns the DistributedDataParallel module that holds the model and whose forward is running, or None."""
    if torch.compiler.is_compiling():
        return None
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None or not any(module is model for module in active.modules()):
        return None
    return active


def shard(
    model: SegmentModel,
    mesh: Any,
    *,
    blocks: Iterable[nn.Module] | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Spreads the parameters of a model over ranks (FSDP2), in place. Make the optimizer afterwards.

    Each rank keeps a part of every parameter, of its gradient and of its optimizer state. The parameters of a block are
    gathered when the block runs, in forward and again in backward. Replay reduces gradients only in its last window;
    until then each rank holds the whole gradients.

    Shard the model, not its wrapper, and load weights before. All ranks have to make the same calls, with the same
    number of segments. Generation needs all parameters: `with gathered(model)`.

    Args:
        model: the model.
        mesh: a DeviceMesh. With one dimension, parameters are spread over all of its ranks. With two
            dimensions, which need names, they are copied along the first one and spread along the second one.
        blocks: the modules of the model that are gathered one at a time. An empty list: the model is gathered as a
            whole. Default: None, the layers of a `SegmentTransformer`, as the models of this library are. Other models
            have to name their blocks.
        param_dtype: dtype in which the parameters are gathered and used, for example torch.bfloat16. Inputs are not
            cast, and states keep the dtype that they have without it, so memories in float32 stay in float32.
            Default: None, the dtype of the parameters.
        reduce_dtype: dtype in which gradients are reduced. Default: None, param_dtype.

    Raises:
        ValueError: if the model is sharded already or is no `SegmentModel`, or if its blocks are not given or are not
            its own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not isinstance(model, SegmentModel):
        raise ValueError(f'shard takes a SegmentModel, not a {type(model).__name__}: a wrapper has it as .model')
    if model.mesh is not None:
        raise ValueError(f'the model is sharded already, over {model.mesh}: call shard once')
    if blocks is None:
        if not isinstance(model, SegmentTransformer):
            raise ValueError(
                f'a {type(model).__name__} does not say which modules are its blocks: give blocks=, the modules to '
                'gather one at a time, or blocks=[] to gather the model as a whole'
            )
        blocks = model.layers
    blocks = list(blocks)
    own = set(model.modules()) - {model}
    for block in blocks:
        if block not in own:
            raise ValueError(f'blocks has a {type(block).__name__} that is not inside the model: give its own modules')
    # the default would cast the state, and so round memories in float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for block in blocks:
        block.register_forward_pre_hook(_gather_again)
    model.mesh = mesh
    stored = model.dtype

    def as_stored(state: State) -> State:
        """Returns a state in the dtype that it has outside of the calls, where the parameters are not cast."""
        return map_state(lambda t: t.to(stored) if t.dtype == param_dtype else t, state)

    largest = model.largest_state
    # parameters may be gathered, and so cast, when a state is checked
    model.largest_state = lambda batch_size: as_stored(largest(batch_size))  # type: ignore[method-assign]
    # what the wrapper calls, and no more: a method that is called inside another one would free parameters early
    for name in ('advance', 'to_logits', 'reset'):
        _gather_in(model, name, as_stored)


def _gather_again(module: Any, *_: Any) -> None:
    """Gathers the parameters of a sharded module, unless they are. A forward that is recomputed in the backward finds
    them freed by the backward of a later segment, and FSDP2 of PyTorch 2.9 and 2.10 leaves them so.

    Args:
        module: a module that `fully_shard` was called with, while it computes.
    """
    module.unshard()


def _gather_in(model: SegmentModel, name: str, as_stored: Callable[[State], State]) -> None:
    """Lets FSDP2 gather the parameters of the model itself when a method is called, as it does for `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    computed = getattr(model, name)

    @functools.wraps(computed)
    def computing(*args: Any, **kwargs: Any) -> Any:
        _gather_again(model)  # inside of what FSDP2 does, which makes the model its root at the first call
        return computed(*args, **kwargs)

    setattr(model, name, computing)
    register_fsdp_forward_method(model, name)
    method = getattr(model, name)

    @functools.wraps(method)
    def gathering(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # FSDP2 warns of changing a result in place, which nothing here does
            warnings.filterwarnings('ignore', '.*returned a view tensor')
            found = method(*args, **kwargs)
        if name == 'advance':
            return found[0], as_stored(found[1])
        return as_stored(found) if name == 'reset' else found

    setattr(model, name, gathering)


@contextmanager
def gathered(model: SegmentModel) -> Iterator[None]:
    """Holds all parameters of a sharded model whole on each rank inside the `with` block, for generation.

    All ranks have to enter and leave the block. Inside, no rank waits for another, so one rank alone may generate.
    Train and save outside of it. A model that is not sharded stays as it is.

        with gathered(wrapper.model):
            tokens = wrapper.generate_tokens(prompt, 100)

    Args:
        model: the model.
    """
    if model.mesh is None:
        yield
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh, parts = model.mesh, [module for module in model.modules() if isinstance(module, FSDPModule)]
    # the first module that runs becomes the root of FSDP2: in generation this would be a block
    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        model.mesh = None
        yield
    finally:
        model.mesh = mesh
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def agree_on_reads(model: SegmentModel, windows: list[Window], rows: int = 0) -> int:
    """Tells the ranks of a sharded model what each of them is going to read: all have to gather parameters as often.

    It is a small all-gather for each dimension of the mesh, and nothing without a mesh.

    Args:
        model: the model.
        windows: the windows that this rank is going to read.
        rows: number of rows whose logits this rank is going to compute. Default: 0, no logits are computed.

    Returns:
        The number of parts in which every rank has to compute the logits of a window, since each part gathers the
        parameters: the largest number that a rank needs. 1 without a mesh.

    Raises:
        ValueError: if they read different numbers of windows, since they would wait for each other for ever.
    """
    if model.mesh is None:
        return 1
    # each is one call of `advance`
    count = sum(1 if model.parallel_segments else len(range(w.segments.start, w.segments.stop)) for w in windows)
    columns = max((window.stop - window.start for window in windows), default=0)
    counts = torch.tensor([[count, parts_of_logits(rows * columns, model.num_tokens)]], device=model.device)
    for dim in range(model.mesh.ndim):
        counts = of_all_ranks(counts, model.mesh.get_group(dim))
    numbers, parts = counts.T.tolist()
    if len(set(numbers)) > 1:
        what = 'windows of segments' if model.parallel_segments else 'segments'
        raise ValueError(
            f'the ranks of a sharded model read {", ".join(map(str, numbers))} {what} in this call, and would wait for '
            'each other for ever: give all ranks texts of one length, filled up with padding (mask) if need be'
        )
    return max(parts)


def of_all_ranks(values: Tensor, group: Any) -> Tensor:
    """Returns the values (n, ...) of all ranks of a group one after the other, (ranks n, ...). It is an all-gather."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def digest_of(values: Tensor | None) -> Tensor | int:
    """Returns a number, as int64 of shape (), that is nearly always another one for other values. 0 for None."""
    if values is None:
        return 0
    numbers = values.detach().double().view(torch.int64) if values.is_floating_point() else values.long()
    places = 2 * torch.arange(numbers.numel(), device=values.device) + 1  # odd, so that no bit is lost
    return (numbers.flatten() * places).sum()


class Chain:
    """The ranks that read one sequence together, each its own segments, in the order of the ranks.

    Nothing waits for a message to arrive except the rank that needs it: a rank sends the last state of a layer and goes
    on with the next layer.

    Args:
        group: the process group.

    Attributes:
        rank: the number of this rank in the group.
        size: number of ranks in the group.
        is_open: whether the `with` block of `context_parallel` is still running.
        bytes_sent: number of bytes that this rank has sent to its neighbours.
    """

    def __init__(self, group: Any):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.is_open = True
        self.bytes_sent = 0
        self._sending: list[tuple[Any, Tensor]] = []  # what is on its way: the tensors must stay alive

    def check_same(self, tokens: Tensor, *others: Tensor | None) -> None:
        """Checks that all ranks were given the same. It is an all-gather of a few numbers, and waits for the device.

        Args:
            tokens: the sequences (b, n, ...) that the ranks are to read together.
            others: what else belongs to them, for example targets and a mask.

        Raises:
            ValueError: on all ranks, if it is not the same on all of them.
        """
        own = torch.empty(1, 3 + len(others), dtype=torch.int64, device=tokens.device)
        for i, number in enumerate((*tokens.shape[:2], *map(digest_of, (tokens, *others)))):
            own[0, i] = number
        rows, columns, *_ = found = of_all_ranks(own, self.group).T.tolist()
        if any(len(set(each)) > 1 for each in found):
            shapes = ', '.join(f'({b}, {n})' for b, n in zip(rows, columns, strict=True))
            raise ValueError(
                f'the ranks of context_parallel were given different sequences, of the shapes {shapes}, or different '
                'labels or masks: give every rank the whole of the same sequences, each reads its own segments'
            )

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends a tensor to a rank of the group, and does not wait for it to arrive.

        Args:
            tensor: the tensor. It is copied.
            rank: the number of the rank in the group.

        Raises:
            RuntimeError: if the `with` block has ended.
        """
        self._check_open()
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        work = dist.isend(tensor, dst=dist.get_global_rank(self.group, rank), group=self.group)
        self._sending.append((work, tensor))

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """Returns the next tensor from a rank of the group, for which it waits.

        Args:
            like: a tensor of the same shape, dtype and device.
            rank: the number of the rank in the group.

        Raises:
            RuntimeError: if the `with` block has ended.
        """
        self._check_open()
        tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(tensor, src=dist.get_global_rank(self.group, rank), group=self.group)
        return tensor

    def last(self, state: State) -> State:
        """Returns the state of the last rank on all ranks, without a graph.

        Args:
            state: the state after the segments of this rank.
        """
        state = map_state(lambda t: t.detach().clone(memory_format=torch.contiguous_format), state)
        last = dist.get_global_rank(self.group, self.size - 1)
        in_buckets(leaves(state), lambda flat: dist.broadcast(flat, src=last, group=self.group))
        return state

    def finish(self) -> None:
        """Waits until everything that this rank has sent has arrived."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError(
                'the segments before or after belong to another rank, but the block `with context_parallel(...)` has '
                'ended: run backward inside it, too'
            )


@contextmanager
def context_parallel(model: SegmentModel, group: Any) -> Iterator[None]:
    """Spreads one sequence over the ranks of a group inside the `with` block, each rank reading its own segments.

    Put forward and backward into the block. Every rank gives the whole sequence to each call of the wrapper, and reads
    only its share of the segments, all of them at once. The results are those of one process: the gradients after the
    average over the ranks, the loss, and the state after the last segment, which all ranks get, without a graph.
    With reduction='none', and from `SegmentWrapper.logits`, a rank gets the values of its own segments.

        wrapper = InfiniTransformerWrapper(model, segment_length=512, process_group=dist.group.WORLD)
        with context_parallel(model, dist.group.WORLD):
            loss = wrapper(sequence, backward=True)
        sync_gradients(wrapper)

    Each layer receives its memory from the rank before, goes through its own segments, and sends the memory to the rank
    after. Backward goes the other way. What is sent does not grow with the length of the sequence. Ranks that are given
    different sequences get a ValueError from the call, unless the wrapper has check_values=False.

    Args:
        model: a model with `can_chain`, such as an `InfiniTransformer`.
        group: the process group whose ranks read one sequence together.

    Raises:
        ValueError: if the model cannot be spread in this way, or is spread already.
    """
    if not isinstance(model, SegmentModel):
        raise ValueError(f'context_parallel takes a SegmentModel, not a {type(model).__name__}: a wrapper has .model')
    if not model.can_chain:
        raise ValueError(
            f'a {type(model).__name__} that reads one segment after the other cannot be spread over ranks: the first '
            'layer of a segment needs what the last layers made of the segment before (the memory of a Recurrent '
            "Memory Transformer, or mem_read_from='above'), so no rank could start before the rank before it has ended"
            if not model.parallel_segments
            else f'{type(model).__name__} has no can_chain: its `advance` does not hand the state on from rank to rank'
        )
    if model.chain is not None:
        raise ValueError('context_parallel inside context_parallel: leave one of them out')
    model.chain = chain = Chain(group)
    try:
        yield
        chain.finish()
    finally:
        model.chain = None
        chain.is_open = False
