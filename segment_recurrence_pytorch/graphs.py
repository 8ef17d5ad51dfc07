"""Training steps as CUDA graphs.

A step of a small model is thousands of short operations, and Python takes longer to ask for them than the GPU to do
them: the more so with segments that are read one after the other. A CUDA graph records the operations of a whole step
once, from reading to the optimizer, and then plays them as one call.

    step = TrainingStep(wrapper, model.param_groups(1e-3, 0.01), betas=(0.9, 0.95), schedule=warmup)
    loss, state = step(x, state)      # on a GPU recorded at the second call with these shapes, then played

The numbers are those of the same steps without a graph. On a CPU there are no such graphs, and `TrainingStep` makes the
step as it is written.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from segment_recurrence_pytorch.checks import can_hold_ids
from segment_recurrence_pytorch.data import Piece, segments_as_rows
from segment_recurrence_pytorch.layers import constants
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.state import State, detach
from segment_recurrence_pytorch.wrapper import SegmentWrapper


class Graphed:
    """A function of tensors whose calls are recorded as CUDA graphs, one for each set of shapes.

    The first call with new shapes runs as it is written, the second one is recorded, and all from there on are played.
    The tensors that are returned belong to the graph: the next call may overwrite them.

    Args:
        function: takes and returns tensors on a GPU, or trees of them. It may not look at values, and what it changes,
            such as weights, has to be changed in place.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Any, list[Tensor]] | None] = {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *arguments: Any) -> Any:
        leaves, tree = tree_flatten(arguments)
        shapes = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = f'{tree} {shapes}'
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if key not in self.graphs:
                found = self.function(*arguments)
                self.graphs[key] = None  # only now: if it failed, the next call runs as it is written, too
            else:
                if self.graphs[key] is None:
                    self.graphs[key] = self._record(leaves, tree)
                graph, given, found, _ = self.graphs[key]  # type: ignore[misc]
                for have, new in zip(given, leaves, strict=True):
                    if isinstance(new, Tensor):
                        have.copy_(new, non_blocking=True)
                graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def _record(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Any], Any, list[Tensor]]:
        """Returns the graph, the tensors that it reads, those that it writes, and all constants: it reads some of them
        at their addresses, so they must live as long as it."""
        given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            found = self.function(*tree_unflatten(given, tree))
        return graph, given, found, list(constants.kept.values())


class TrainingStep:
    """A step of training: loss, gradients, their norm, AdamW, and its schedule. On a GPU it is one CUDA graph.

    It trains in one process: with several, make the steps by hand, as docs/distributed.md shows.

    Args:
        wrapper: the model in its wrapper. On a GPU values are not checked: ids have to be in their range.
        groups: the parameters to train, with their learning rates, as `model.param_groups` returns them.
        betas: of AdamW.
        schedule: returns the factor of the learning rates, from the number of steps done.
        max_norm: the gradients of the parameters in `groups` are scaled down to this norm. Default: 1.

    Raises:
        ValueError: if the wrapper has a process_group.
    """

    def __init__(
        self,
        wrapper: SegmentWrapper,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        schedule: Callable[[int], float],
        max_norm: float = 1.0,
    ):
        if wrapper.process_group is not None:
            raise ValueError(
                'TrainingStep trains in one process, and the wrapper has a process_group: make the steps by hand, with '
                'DistributedDataParallel or `distributed.sync_gradients`'
            )
        self.wrapper, self.schedule, self.max_norm, self.done = wrapper, schedule, max_norm, 0
        self.rates = [group['lr'] for group in groups]
        self.graphed: Graphed | None = None
        device = wrapper.model.device
        if device.type == 'cuda':
            self.wrapper = copy.copy(wrapper)  # the same model
            self.wrapper.check_values = False
            self.graphed = Graphed(self._captured)
            groups = [group | {'lr': torch.tensor(group['lr'], device=device)} for group in groups]  # read by the graph
        self.trained = [parameter for group in groups for parameter in group['params']]
        known = set(map(id, self.trained))
        self.others = [parameter for parameter in wrapper.model.parameters() if id(parameter) not in known]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, capturable=self.graphed is not None)

    def __call__(
        self,
        x: Tensor,
        state: State = None,
        *,
        labels: Tensor | None = None,
        starts: Tensor | None = None,
        per_segment: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Makes one step. See `SegmentWrapper.loss`.

        Args:
            x: ids (b, n) on any device. `IGNORE` is padding, as `data.Streams` has it at the end of a document. If
                there are no labels, one more column, which is only a target; the wrapper's `ignore_index` is padding
                then, too.
            state: the state that the last call returned. Default: None, new texts start.
            labels: targets (b, n). Default: None, the next tokens.
            starts: (b,) bool, True where a new text starts in a row. Default: None, nowhere.
            per_segment: further tensors for each segment, see `SegmentWrapper.loss`. Default: None.

        Returns:
            The loss before the step, and the state after it, both detached. On a GPU the next call overwrites both.

        Raises:
            ValueError: if an argument does not fit, as far as it can be seen without waiting for a GPU.
        """
        for name, ids in (('x', x), ('labels', labels)):
            if ids is not None and not can_hold_ids(ids.dtype):
                raise ValueError(f'{name} is {ids.dtype}: give token ids')
        device = self.wrapper.model.device
        x, labels = x.long(), None if labels is None else labels.long()  # smaller types cannot hold IGNORE
        more = {name: values.to(device, non_blocking=True) for name, values in (per_segment or {}).items()}
        if labels is None and not self.wrapper.check_values:  # ids that mean padding, which else the wrapper finds
            x = x.masked_fill(x == self.wrapper.ignore_index, IGNORE)
            labels, x = x[:, 1:], x[:, :-1]
        if self.graphed is not None:
            tensors = [None if t is None else t.to(device, non_blocking=True) for t in (x, labels, starts)]
            self._set_rates()  # the graph reads them
            found = self.graphed(*tensors, state, more)
        else:
            if starts is not None:
                state = self.wrapper.reset(state, starts)
            x = x.to(device)
            if labels is None:
                found = self._made(x, state, {'per_segment': more})
            else:
                found = self._masked(x, labels.to(device), state, more)
        self.done += 1
        return found

    def read(self, piece: Piece, state: State, memory: bool) -> tuple[Tensor, State]:
        """Makes a step on one piece of the streams, as `training.train_loss` reads it.

        Args:
            piece: the piece, from `data.Streams`.
            state: the state that the last call returned. None at the start.
            memory: whether the state is carried from segment to segment. If False, every segment is a text of its own,
                so a piece has to consist of whole segments.

        Raises:
            ValueError: if a piece does not consist of whole segments, without memory.
        """
        if memory:
            return self(piece.tokens, state, starts=piece.starts)
        return self(segments_as_rows(piece.tokens, self.wrapper.segment_length))[0], None

    def _captured(
        self, x: Tensor, labels: Tensor, starts: Tensor | None, state: State, more: dict[str, Tensor]
    ) -> tuple[Tensor, State]:
        # a graph has one way: rows are set back in every step, and padding is a mask, whether there is any or not
        if state is not None and starts is not None:
            state = self.wrapper.model.reset(state, starts)
        return self._masked(x, labels, state, more)

    def _masked(self, x: Tensor, labels: Tensor, state: State, more: dict[str, Tensor]) -> tuple[Tensor, State]:
        mask = x != IGNORE
        given = {'labels': labels.masked_fill(~mask, IGNORE), 'mask': mask, 'per_segment': more}
        return self._made(x.masked_fill(~mask, 0), state, given)

    def _made(self, x: Tensor, state: State, given: dict[str, Any]) -> tuple[Tensor, State]:
        returned = self.wrapper.loss(x, state, **given)  # first of all: it may refuse its input
        self.optimizer.zero_grad(set_to_none=self.graphed is None)  # the graph has the addresses of the gradients
        for parameter in self.others:  # which are not trained here, and may get gradients all the same
            if self.graphed is None:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
        returned.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_norm)
        if self.graphed is None:
            self._set_rates()
        self.optimizer.step()
        return returned.loss.detach(), detach(returned.state)

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group['lr'], Tensor):
                group['lr'].fill_(rate * self.schedule(self.done))
            else:
                group['lr'] = rate * self.schedule(self.done)
