"""The processes that make the steps of a training script together: those that torchrun started, or one process alone.

A rank is one of these processes. Each reads its own rows of every batch or, with context parallel, its own segments of
some rows. The first rank prints, and writes all files. What only one rank can know, such as a signal, the clock or an
error while writing, is told to all before anyone acts on it: a rank that stops alone would leave the others waiting.

    data ranks       groups of ranks that read different rows
    context ranks    the ranks of such a group, which read different segments of the same rows
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from segment_recurrence_pytorch.data import Piece
from segment_recurrence_pytorch.distributed import context_parallel, shard
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, leaves, map_state
from segment_recurrence_pytorch.wrapper import SegmentWrapper

TIMEOUT = 10.0  # minutes that a rank waits for another one
LOST = r'connect|closed|timed out|timeout|broken pipe|reset'  # in what gloo says when a rank is gone
T = TypeVar('T')


class Ranks:
    """The processes that torchrun started, or this one alone.

    Args:
        device: the kind of device, as 'cpu' or 'cuda'. With several processes, each uses the GPU of its own number on
            its machine.
        timeout: minutes that a rank waits for another one before it gives up with an error. Default: 10.

    Attributes:
        rank: the number of this process.
        size: number of processes.
        is_first: whether this is the process that prints and writes.
        device: the device of this process.
        group: the process group of all ranks. None for one process alone.
        owns_group: whether this object has made the group.
        context: number of ranks that read the segments of the same rows. `divide` sets it.
        data_rank: the number of the rows that this process reads, of `data_size`.
        data_size: number of parts into which the rows of a batch are divided.
        shown_elsewhere: the last error that was raised here although another rank met it, which shows it.

    Raises:
        ValueError: if there are more processes on this machine than GPUs.
    """

    def __init__(self, device: str = 'cpu', *, timeout: float = TIMEOUT):
        self.device = torch.device(device)
        self.group: Any = None
        self.rank, self.size = 0, 1
        self.owns_group = False
        self.shown_elsewhere: Exception | None = None
        if rank_of_environment() is not None or dist.is_initialized():
            self._join(timeout)
        self.is_first = self.rank == 0
        self.divide(1)

    def _join(self, timeout: float) -> None:
        if self.device.type == 'cuda':
            number, count = int(os.environ.get('LOCAL_RANK', '0')), torch.cuda.device_count()
            if number >= count:
                raise ValueError(f'process {number + 1} of this machine has no GPU, there are {count}: start fewer')
            self.device = torch.device('cuda', number)
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # numbers and words are exchanged on the CPU, so that no rank waits for its GPU because of them
            backend = 'cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo'
            dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
            self.owns_group = True
        self.group = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def divide(self, context: int) -> None:
        """Sets how many ranks read the segments of the same rows (context parallel). All ranks have to make the call.

        Args:
            context: the number, which must divide `size`.
        """
        self.context = context
        self.data_size, self.data_rank = self.size // context, self.rank // context
        self._mesh: Any = None
        if context > 1:
            shape = self.data_size, context
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=('data', 'context'))

    def close(self) -> None:
        """Ends the work together. Call it when all ranks have done all they do."""
        if self.owns_group:
            dist.destroy_process_group()

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls a function on the first rank, and returns on all ranks what it returned.

        Args:
            function: a function without arguments. What it returns must be possible to pickle.

        Raises:
            ValueError | OSError: on all ranks, the one that the function raised on the first rank.
        """
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except (ValueError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, device=torch.device('cpu'))
        if told[1] is not None:
            raise self._as_shown_by(0, told[1])
        return told[0]

    def together(self, function: Callable[[], T]) -> T:
        """Calls a function on all ranks, and returns on each what it returned there.

        Args:
            function: a function without arguments. It must not exchange anything with other ranks.

        Raises:
            ValueError | OSError: on all ranks, if the function raised one on any. It is that of the first such rank.
        """
        if self.size == 1:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except (ValueError, OSError) as caught:
            error = caught
        for rank, met in enumerate(self.gather(error)):
            if met is not None:
                raise self._as_shown_by(rank, error if rank == self.rank and error is not None else met)
        return result

    def _as_shown_by(self, rank: int, error: Exception) -> Exception:
        self.shown_elsewhere = None if rank == self.rank else error
        return error

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in their order, on all ranks.

        Args:
            value: the value of this rank, which must be possible to pickle.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, *numbers: float) -> list[float]:
        """Returns for each number the largest one of all ranks, the same on all ranks."""
        if self.size == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def rows(self, batch_size: int) -> slice:
        """Returns the rows of a batch that this rank reads. If the batch cannot be divided, all ranks read all rows.

        Args:
            batch_size: number of rows of all ranks together.
        """
        if batch_size % self.data_size:
            return slice(0, batch_size)
        share = batch_size // self.data_size
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def piece(self, piece: Piece) -> Piece:
        """Returns the rows of a piece that this rank reads."""
        at = self.rows(len(piece.starts))
        return Piece(piece.tokens[at], piece.starts[at])

    def states_of_all(self, state: State) -> list[State]:
        """Returns the states of all data ranks, in their order, on the CPU. All ranks have to make the call.

        Args:
            state: the state of the rows of this rank.
        """
        return self.gather(map_state(lambda t: t.detach().cpu(), state))[:: self.context]

    def own_state(self, model: SegmentModel, states: list[State]) -> State:
        """Returns the state of the rows of this rank, on its device. It makes no call to other ranks.

        Args:
            model: the model whose states they are.
            states: what `states_of_all` returned, perhaps with another number of ranks. Then they are joined, and
                divided anew.
        """
        if len(states) == self.data_size:
            return map_state(lambda t: t.to(self.device), states[self.data_rank])
        share = len(leaves(states[0])[0])
        row = torch.arange(share * len(states))
        joined = None
        for i, state in enumerate(states):
            # a state of all rows, in which those of one rank are right; ranks may hold histories of different lengths
            spread = rows_of(state, (row - i * share).clamp(0, share - 1))
            joined = spread if joined is None else model.where(row >= i * share, spread, joined)
        return map_state(lambda t: t.to(self.device), rows_of(joined, row[self.rows(len(row))]))

    def parallel(self, wrapper: SegmentWrapper, how: str) -> Callable[..., Any]:
        """Divides the work of a wrapper over the ranks. Make the optimizer afterwards.

        Args:
            wrapper: the model in its wrapper, with its weights. Its process_group must be `group`.
            how: 'ddp', each rank has a copy of the parameters, or 'fsdp', each rank has a part of them.

        Returns:
            The function that computes the loss of a step, as `SegmentWrapper.loss` does.
        """
        if self.size == 1:
            return wrapper.loss
        if how == 'ddp':
            return DistributedDataParallel(wrapper)
        shard(wrapper.model, init_device_mesh(self.device.type, (self.size,)))
        return wrapper.loss

    def in_context(self, model: SegmentModel) -> AbstractContextManager[None]:
        """Returns a `with` block for forward and backward of a step, in which segments are divided over the ranks."""
        return context_parallel(model, self._mesh.get_group('context')) if self.context > 1 else nullcontext()

    def seed(self, seed: int) -> int:
        """Returns a seed of this rank, made from a seed of all ranks. That of the first rank is the given one.

        Args:
            seed: the seed of all ranks, from -2^63 on.
        """
        return (seed + self.rank * 0x9E3779B97F4A7C15) % 2**64 if self.rank or seed >= 2**64 else seed


def rows_of(state: State, rows: torch.Tensor) -> State:
    """Returns some rows of a state, in the order of their numbers (n,), which may repeat."""
    return map_state(lambda t: t[rows], state)


def rank_of_environment() -> int | None:
    """Returns the number of this process among several that were started together, as torchrun tells it. None: it was
    started alone."""
    return int(os.environ['RANK']) if int(os.environ.get('WORLD_SIZE') or 1) > 1 and 'RANK' in os.environ else None


def lost_rank(error: BaseException) -> str | None:
    """Returns how an error says that another rank has ended or has not answered in time. None: it says something else.

    Args:
        error: the error.
    """
    text = re.sub(r'\[\S+/gloo/\S+\]', 'gloo:', str(error))
    is_lost = isinstance(error, dist.DistError) or ('gloo' in text.lower() and re.search(LOST, text.lower()))
    return text.splitlines()[0].split('. ')[0] if is_lost else None
