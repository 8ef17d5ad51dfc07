"""The contract between a segment-recurrent model and everything around it, and how to write a model on it.

A model reads a long sequence segment by segment and carries a small state from each segment to the next. Nothing
outside a model knows which model it is: the wrapper, back-propagation, generation, cursors, tasks and checkpoints work
on `SegmentModel` alone.

What you write: a subclass of `SegmentModel` that sets `num_tokens` and `dim` and has three methods.

    class DecayingMean(SegmentModel):
        def __init__(self, num_tokens, dim):
            super().__init__()
            self.num_tokens, self.dim = num_tokens, dim
            self.token_emb = nn.Embedding(num_tokens, dim)
            self.head = nn.Linear(dim, num_tokens)

        def initial_state(self, batch_size):
            return self.head.weight.new_zeros(batch_size, self.dim)

        def advance(self, tokens, state=None, *, segment_length=None, mask=None, need_hidden=True):
            state = self.initial_state(len(tokens)) if state is None else state
            x = tokens if tokens.is_floating_point() else self.token_emb(tokens)
            valid = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
            mean = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
            after = torch.where(valid.any(1, keepdim=True), 0.5 * state + 0.5 * mean, state)
            return (x + state[:, None] if need_hidden else None), after

        def to_logits(self, hidden):
            return self.head(hidden)

What you get: `SegmentWrapper(model, segment_length=...)` trains it on sequences of any length, with gradients through
all segments, by one graph, by recomputing or by memory replay; it scores texts, generates and streams tokens, and
forks, saves and loads cursors. All of it is exact from the start. Generation reads the open segment again for every
token; to make it fast, override `open_segment` with a cache of your own (`segment_recurrence_pytorch.cache`).

What has to hold inside the three methods:

- A state is a value: a tree of tensors with the batch first (at least one tensor), in tuples, NamedTuples, lists or
  dicts. `advance` takes one and returns a new one. It does not change the given one, keeps none on the module, and
  returns no view of a parameter or of its input. A state keeps its shapes from segment to segment, or says otherwise
  in `largest_state`.
- A row whose `mask` is False everywhere keeps its state, and a padded position changes nothing in its row.
- A causal model's hidden state at position i depends on positions up to i and on the state alone.
- No value is looked at (no `.item()`, no `if` on a tensor), so that a GPU never waits for its host.
- `advance` also runs without a graph, in replay's first pass and in generation. A model that takes gradients inside
  itself therefore uses `torch.func.grad`, which works under `torch.no_grad()`, and not `torch.autograd.grad`.
- Random numbers are drawn only where training draws them, and the same ones whether hidden states are needed or not.
  Replay sets the random state back and reads a segment again, so such a model is replayed exactly too.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.cache import OpenSegment, RereadSegment
from segment_recurrence_pytorch.checks import check_has_weights, check_state_like, not_finite
from segment_recurrence_pytorch.state import State, where_rows


class SegmentModel(nn.Module, ABC):
    """A model that reads segments and carries a state. The docstring of this module says how to write one.

    Attributes:
        num_tokens: size of the vocabulary.
        dim: features of an embedding and of a hidden state.
        causal: whether no position sees a later one, so that the next token can be learned and generated.
            Default: True.
        max_segment_length: the longest segment that the model can read, in tokens. Default: None, no limit.
        parallel_segments: whether one `advance` can read many segments, whose length `segment_length` tells.
            Default: False, `advance` is given one segment at a time.
        arguments: what the constructors of the class and of its bases were called with, defaults filled in. A saved
            state or file of weights goes back only into a model with the same arguments.
    """

    num_tokens: int
    dim: int
    causal: bool = True
    max_segment_length: int | None = None
    parallel_segments: bool = False
    arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if '__init__' in vars(cls):
            cls.__init__ = _with_recorded_arguments(cls.__init__)  # type: ignore[method-assign]

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """Returns the state before the first segment, a value of its own for `batch_size` rows."""

    @abstractmethod
    def advance(
        self,
        tokens: Tensor,
        state: State = None,
        *,
        segment_length: int | None = None,
        mask: Tensor | None = None,
        need_hidden: bool = True,
    ) -> tuple[Any, State]:
        """Reads the next segment, or the next segments if `parallel_segments` is True.

        Args:
            tokens: ids (b, n) or embeddings (b, n, dim).
            state: the state at the border before the tokens. Default: None, the initial state.
            segment_length: tokens of a segment; the last one may be shorter. Default: None, all tokens are one
                segment. A model without `parallel_segments` is never given more than one segment.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            need_hidden: False: nobody needs hidden states, so only the work that the state needs has to be done.
                Default: True.

        Returns:
            Hidden states (b, n, dim), or None if need_hidden is False, and the state at the next border.
        """

    @abstractmethod
    def to_logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., num_tokens) for hidden states (..., dim)."""

    def open_segment(self, state: State, segment_length: int) -> OpenSegment:
        """Returns an open segment in which nothing was read yet, for generation. Needs a causal model.

        By default it keeps its tokens and reads them again for every new one: exact for every model, at the cost of a
        whole segment a token. Override it to return a cache of the model's own.

        Args:
            state: the state at the border where the segment begins. It is not changed.
            segment_length: the most tokens that the segment will hold.
        """
        return RereadSegment(self, state, segment_length)

    def as_state(self, state: Any, batch_size: int) -> State:
        """Returns the state that a caller means, before `check_state` looks at it. A model may take other forms of a
        state here, for example a bare tensor. By default: what was given."""
        return state

    def largest_state(self, batch_size: int) -> State:
        """Returns a state in its largest shapes; only its tree, shapes, dtypes and devices are looked at.

        By default it is the initial state: then a state always has the same shapes. A model whose state holds a
        growing history returns the longest one here; the NamedTuple with that history has a property `shorter_along`,
        which maps the name of a field to the axis along which it may be shorter.
        """
        return self.initial_state(batch_size)

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises ValueError, with the name of the part, for a state that `advance` cannot take for this batch size."""
        check_state_like(state, self.largest_state(batch_size))

    def state_faults(self, state: State) -> list[tuple[str, Tensor]]:
        """Returns what may be wrong with the values of a state: messages, each with a flag () bool that says whether it
        applies. The flags of one call are looked at together. By default: whether a tensor is NaN or infinite."""
        return not_finite(state)

    def per_segment_faults(self, values: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Returns what may be wrong with further arguments of `advance`, as `state_faults` does.

        Args:
            values: by name, (b, segments) each, what `SegmentWrapper.loss` got as per_segment.

        Raises:
            ValueError: for what shapes and dtypes tell without a look at the values.
        """
        return [(f'{name} holds NaN or infinite values', ~value.isfinite().all()) for name, value in values.items()]

    def reset(self, state: State, rows: Tensor) -> State:
        """Returns the state with the rows where `rows` (b,) bool is True back at the initial state."""
        return self.where(rows, self.initial_state(rows.shape[0]), state)

    def where(self, rows: Tensor, chosen: State, other: State) -> State:
        """Returns a state with the rows of `chosen` where `rows` (b,) bool is True, and those of `other` elsewhere."""
        return where_rows(rows, chosen, other)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Returns groups of parameters for an optimizer: those that `decays` names, and the others without decay.

        Args:
            lr: learning rate of both groups.
            weight_decay: weight decay of the first group.
        """
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups[self.decays(name, parameter)].append(parameter)
        return [
            {'params': groups[True], 'lr': lr, 'weight_decay': weight_decay},
            {'params': groups[False], 'lr': lr, 'weight_decay': 0.0},
        ]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter. By default: to the weights of linear layers."""
        path, _, attribute = name.rpartition('.')
        return attribute == 'weight' and isinstance(self.get_submodule(path), nn.Linear)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what a state of this model depends on: the name of the class, the arguments, and the sha256 of the
        weights. A cursor file holds it. ValueError on the meta device."""
        check_has_weights(self)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {'class': type(self).__name__, 'arguments': plain_arguments(self), 'sha256': digest.hexdigest()}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype


def plain_arguments(model: SegmentModel) -> dict[str, Any]:
    """Returns `model.arguments` as JSON holds them. What JSON cannot hold is told by the name of its type."""
    return json.loads(json.dumps(model.arguments, default=lambda value: f'a {type(value).__qualname__}'))


def _with_recorded_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which also writes its arguments into `self.arguments`, beside those of the bases that it calls.
    An argument of the outer class stands for that of the same name of a base."""
    signature = inspect.signature(init)
    rest = next((name for name, each in signature.parameters.items() if each.kind == each.VAR_KEYWORD), None)

    @functools.wraps(init)
    def recording(self: SegmentModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        own = dict(given)
        own |= own.pop(rest, {}) if rest else {}
        self.arguments = {**getattr(self, 'arguments', {}), **own}

    return recording
