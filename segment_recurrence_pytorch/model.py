"""The contract between a segment-recurrent model and the rest of the library, and how to write such a model.

A model reads a long sequence segment by segment and carries a small state from each segment to the next. The wrapper,
back-propagation, generation, cursors, tasks and checkpoints use only what `SegmentModel` declares. They do not know
which model they work on.

What you write: a subclass of `SegmentModel` that sets `num_tokens` and `dim` and has three methods.

    import torch
    from torch import nn
    from segment_recurrence_pytorch import SegmentModel, SegmentWrapper

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

What you get: `SegmentWrapper` trains the model on sequences of any length. Gradients go through all segments, by one
graph, by recomputing or by memory replay (see `backprop`). The wrapper also scores texts and generates and streams
tokens, and its cursors can be forked, saved and loaded.

    model = DecayingMean(256, 64)
    wrapper = SegmentWrapper(model, segment_length=32)
    text = torch.randint(0, 256, (2, 100))
    loss, num_targets, state = wrapper.loss(text, backward=True)          # memory replay; then optimizer.step()
    logits, state = wrapper.logits(text)
    cursor = wrapper.read(text)                                           # to save, to fork, or to go on from:
    new_tokens = wrapper.generate_tokens(None, 20, state=cursor)          # (2, 20)

All results are exact without further work. Generation, however, reads the whole open segment again for every new token.
To make it fast, override `open_segment` and return an `OpenSegment` of your own; `cache.RereadSegment`, the default, is
the shortest example of one.

What the three methods are given: `tokens` are at least one and at most segment_length columns (more segments only if
`parallel_segments` is True), either ids in [0, num_tokens), at padded positions too, or embeddings of floating point.
`state` is None or a state that an earlier call returned. `mask` is None if every position is valid. `segment_length` is
the length of a full segment, or None; a model that reads one segment at a time can ignore it.

What has to hold inside the three methods (`testing.check_model` tries it out):

- A state is a value. It is a tensor, or a tree of tensors in tuples, NamedTuples, lists or dicts, and the first
  dimension of every tensor is the batch. `advance` takes a state and returns a new one. It does not change the state
  that it was given, and stores no state on the module. Neither `initial_state` nor `advance` returns a view of a
  parameter or of its input: a learned first state is `self.start.expand(batch_size, -1).clone()`. All states of a model
  have the shapes, dtypes and device of its `initial_state`, under autocast too, and the entries of a dict their order;
  a model whose state can grow overrides `largest_state`. They hold no infinite values, unless `state_faults` says so.
- Padding has no effect. A position where `mask` is False changes neither the state of its row nor the hidden states of
  other positions. A row without any valid position keeps its state.
- In a causal model, the hidden state at position i depends only on the positions up to i and on the state.
- `advance` never looks at the value of a tensor (no `.item()`, no `if` on a tensor), so a GPU never waits for its host.
- `advance` must also work without a graph, as in the first pass of replay and in generation. A model that computes
  gradients inside `advance` calls `torch.autograd.grad` inside `torch.enable_grad()`, with create_graph as
  `torch.is_grad_enabled()` was before, and detaches them if that was False. (`torch.func.grad` works without a graph
  as well, but PyTorch refuses it where a wrapper recomputes.)
- `advance` draws random numbers only in training mode, and draws the same ones with need_hidden=True and with
  need_hidden=False. Replay restores the random state and reads a segment a second time; both passes must then agree.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.cache import OpenSegment, RereadSegment
from segment_recurrence_pytorch.checks import check_has_weights, check_state_like, not_finite
from segment_recurrence_pytorch.state import State, leaves, where_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from segment_recurrence_pytorch.distributed import Chain

M = TypeVar('M', bound='SegmentModel')


class SegmentModel(nn.Module, ABC):
    """A model that reads segments and carries a state from each segment to the next.

    The docstring of this module says how to write one.

    Attributes:
        num_tokens: size of the vocabulary.
        dim: number of features of an embedding and of a hidden state.
        causal: whether no position sees a later position. Only a causal model can learn the next token and generate.
            Default: True.
        max_segment_length: the longest segment that the model can read, in tokens. Default: None, there is no limit.
        parallel_segments: whether one call of `advance` can read several segments. Default: False, each call of
            `advance` gets a single segment.
        can_chain: whether `advance` can read its segments after those of another rank, inside
            `distributed.context_parallel`. Such a model takes the state from the rank before and hands it on to the
            rank after through `chain`, layer by layer. Its `advance` takes an argument `cuts`, the numbers of those of
            its segments whose entering state is cut from the graph. Default: False.
        chain: the ranks that read a sequence together. `distributed.context_parallel` sets it. Default: None.
        mesh: the ranks over which `distributed.shard` has spread the parameters. Default: None.
        arguments: the arguments of the constructors of the class and of its base classes, with defaults filled in. The
            base class records them, in the form that `recorded_argument` returns. A saved cursor or a file of weights
            can only be loaded into a model with the same arguments, but for `free_arguments`.
        free_arguments: names of arguments that change neither the shapes of the weights nor what the model computes in
            evaluation mode, such as dropout. Default: none.
        can_export: whether `export.export_segment` can make a graph of `advance`. Default: True.
        fingerprint_values: how many values of each weight the fingerprint looks at. They are evenly spaced. Default:
            None, all values.
    """

    num_tokens: int
    dim: int
    causal: bool = True
    max_segment_length: int | None = None
    parallel_segments: bool = False
    can_chain: bool = False
    chain: Chain | None = None
    mesh: DeviceMesh | None = None
    can_export: bool = True
    fingerprint_values: int | None = None
    free_arguments: frozenset[str] = frozenset()
    arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if '__init__' in vars(cls):
            cls.__init__ = _with_recorded_arguments(cls.__init__)  # type: ignore[method-assign]

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """Returns the state before the first segment. Its tensors share memory with no parameter.

        Args:
            batch_size: number of rows b.
        """

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
            tokens: token ids (b, n) or embeddings (b, n, dim).
            state: the state at the border before the tokens. Default: None, the initial state.
            segment_length: number of tokens of a segment; the last segment may be shorter. A model without
                `parallel_segments` never gets more than one segment. Default: None, all tokens are one segment.
            mask: (b, n) bool, True = valid. Default: None, all positions are valid.
            need_hidden: whether the caller needs the hidden states. If False, the model only has to compute the next
                state. Default: True.

        Returns:
            The hidden states (b, n, dim), or None if need_hidden is False, and the state at the border after the
            tokens.
        """

    @abstractmethod
    def to_logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits (..., num_tokens) for hidden states (..., dim).

        If it draws random numbers, memory replay draws others than one graph does. The gradient then belongs to those.
        """

    def open_segment(self, state: State, segment_length: int) -> OpenSegment:
        """Returns an open segment for generation, which holds no token yet. The model must be causal.

        The default keeps the tokens of the segment and reads all of them again for every new token. This is exact for
        every model, but each new token costs as much as reading the segment. Override it to return a cache of the
        model's own.

        Args:
            state: the state at the border where the segment begins. It is not changed.
            segment_length: the largest number of tokens that the segment can hold.
        """
        return RereadSegment(self, state, segment_length)

    def as_state(self, state: Any, batch_size: int) -> State:
        """Converts what a caller gave as a state into a state of this model, before `check_state` checks it.

        A model can accept other forms of a state here, for example a bare tensor. The default returns the object
        unchanged.

        Args:
            state: what the caller gave.
            batch_size: number of rows b.
        """
        return state

    def largest_state(self, batch_size: int) -> State:
        """Returns a state whose tensors have the largest shapes that they can get.

        Only its tree, shapes, dtypes and devices are used, to check other states. The default returns the initial
        state, which means that all states have the same shapes. A model whose state holds a growing history returns the
        longest history here. The NamedTuple that holds the history then has a property `shorter_along`: a dict from the
        name of a field to the axis along which that field may be shorter.

        Args:
            batch_size: number of rows b.
        """
        return self.initial_state(batch_size)

    def segment_bytes(self, segment_length: int) -> int:
        """Returns how many bytes of states a window holds for each row and segment: by this, the default size of a
        window of a model that reads segments in parallel is limited. The default returns the size of a state.

        Args:
            segment_length: number of tokens of a segment.
        """
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(self.largest_state(1)))

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises ValueError if `advance` cannot take the state for this batch size. The message names the wrong part.

        Args:
            state: a state, as `as_state` returned it.
            batch_size: number of rows b.
        """
        check_state_like(state, self.largest_state(batch_size))

    def state_faults(self, state: State) -> list[tuple[str, Tensor]]:
        """Returns the checks of the values in a state: pairs of an error message and a flag () bool, True if the error
        applies.

        `checks.check_faults` fetches all flags of a call from the device at once. The default finds NaN and infinite
        values.
        """
        return not_finite(state)

    def per_segment_faults(self, values: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Returns the checks of further arguments of `advance`, in the form that `state_faults` returns.

        Args:
            values: the arguments by name, (b, segments) each. It is the argument per_segment of `SegmentWrapper.loss`.

        Raises:
            ValueError: if an argument has a wrong shape or dtype, which can be seen without looking at its values.
        """
        return [(f'{name} holds NaN or infinite values', ~value.isfinite().all()) for name, value in values.items()]

    def reset(self, state: State, rows: Tensor) -> State:
        """Returns the state with some rows set back to the initial state.

        Args:
            state: a state of b rows.
            rows: (b,) bool, True for the rows to set back.
        """
        return self.where(rows, self.initial_state(rows.shape[0]), state)

    def where(self, rows: Tensor, chosen: State, other: State) -> State:
        """Returns a state that takes some rows from one state and the other rows from another.

        Args:
            rows: (b,) bool, True for the rows to take from `chosen`.
            chosen: a state of b rows.
            other: a state of b rows, which gives the remaining rows.
        """
        return where_rows(rows, chosen, other)

    @property
    def draws_random(self) -> bool:
        """Whether `advance` may draw random numbers as the model is now. Replay and recomputing then keep the random
        state of each window.

        The default is True, which is always right. A class that draws none, or none in evaluation mode, may return
        False then, which saves that work; a subclass of it that does draw some has to return True again.
        """
        return True

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Returns two groups of parameters for an optimizer, one with weight decay and one without.

        The method `decays` decides to which group a parameter belongs. Frozen parameters (requires_grad=False) are in
        no group, so a group may be empty.

        Args:
            lr: learning rate of both groups.
            weight_decay: weight decay of the first group.
        """
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[self.decays(name, parameter)].append(parameter)
        return [
            {'params': groups[True], 'lr': lr, 'weight_decay': weight_decay},
            {'params': groups[False], 'lr': lr, 'weight_decay': 0.0},
        ]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Returns whether weight decay applies to a parameter. The default applies it to the weights of linear layers.

        Args:
            name: the name of the parameter in `named_parameters`.
            parameter: the parameter.
        """
        path, _, attribute = name.rpartition('.')
        return attribute == 'weight' and isinstance(self.get_submodule(path), nn.Linear)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies this model: the name of its class, its arguments, and the sha256 of its weights.

        A cursor file holds the fingerprint of the model that read the text, since its state means nothing to another
        model. If `fingerprint_values` is a number, the sha256 is that of the names, dtypes and shapes of all weights
        and of so many evenly spaced values of each. It then tells models apart that were trained differently, but may
        miss a change of single values. The entry `values` says how many values were looked at.

        If the parameters are sharded, they are gathered one after the other: all ranks have to make the call.

        Raises:
            ValueError: if the model is on the meta device.
        """
        check_has_weights(self)
        found = {'class': class_name(self), 'arguments': plain_arguments(self)}
        found['sha256'] = digest_of_weights(self.state_dict(), self.fingerprint_values)
        return found if self.fingerprint_values is None else {**found, 'values': self.fingerprint_values}

    def recorded_argument(self, name: str, value: Any) -> Any:
        """Returns what `arguments` holds for an argument of the constructor. The default returns the value itself.

        Override it if an argument is an object that a file cannot hold, for example a module: return what identifies
        it, as JSON can store it.

        Args:
            name: the name of the argument.
            value: what the constructor was given.
        """
        return value

    def as_arguments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Converts the arguments that a file holds into the form in which this version records them, before they are
        compared with `arguments`. The default returns them unchanged.

        Args:
            saved: the arguments of the model that wrote the file.
        """
        return saved

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None) -> None:
        """Writes the model to a folder: its weights (model.safetensors), its arguments (config.json) and a model card
        (README.md), which is not written if there is one.

        The format is that of `huggingface_hub.PyTorchModelHubMixin`. The package itself is not needed.

        Args:
            folder: the folder. It is made if it is not there.
            run: the folder of the training run that made the weights. The card then tells the settings and the
                validation of the run. Default: None, `folder` itself, if it holds a run.

        Raises:
            ValueError: if an argument of the model cannot be stored as JSON, if `folder` is a file, if the folder of
                the run does not tell how it was made, or if the model is on the meta device. Nothing has been written
                then.
            OSError: if a file cannot be written, for example because the disk is full.
        """
        from segment_recurrence_pytorch.hub import save_pretrained

        save_pretrained(self, folder, run=run)

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_folder: str | Path,
        *,
        device: torch.device | str = 'cpu',
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> M:
        """Returns a model from a folder or from the Hugging Face Hub, in evaluation mode and in the dtype in which its
        weights were saved.

        A folder is one that `save_pretrained` or `huggingface_hub.PyTorchModelHubMixin` wrote, or that of a run of the
        training script. Only the hub needs the package huggingface_hub (extra `hub`).

        Args:
            name_or_folder: a folder, or the name of a model on the hub, such as 'user/name'.
            device: the device of the model. Default: 'cpu'.
            revision: a branch, tag or commit on the hub. Default: None, the newest one.
            token: the token with which to sign in to the hub. Default: None, the one that is stored on this machine.
            cache_dir: the folder for what is downloaded. Default: None, that of huggingface_hub.
            force_download: whether to download what is in that folder already. Default: False.
            local_files_only: whether to download nothing, and to take what is in that folder. Default: False.
            arguments: arguments of the constructor that replace those in config.json, for example another dropout.

        Raises:
            ValueError: if the folder or the model on the hub cannot be read, holds a model of another class or of a
                newer version, or is damaged. The message names the file.
            ImportError: if the model is on the hub and huggingface_hub is not installed.
        """
        from segment_recurrence_pytorch.hub import from_pretrained

        return from_pretrained(
            cls,
            name_or_folder,
            device=device,
            arguments=arguments,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        commit_message: str = 'Push model using huggingface_hub.',
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face Hub. It needs the extra `hub`.

        Args:
            repo_id: the name of the model on the hub, such as 'user/name'. It is made if it is not there.
            run: see `save_pretrained`. Default: None, the card tells of no run.
            commit_message: the message of the commit. Default: that of `PyTorchModelHubMixin`.
            private: whether a new model on the hub is private. Default: None, as the account is set up.
            token: the token with which to sign in. Default: None, the one that is stored on this machine.
            branch: the branch of the commit. Default: None, main.
            create_pr: whether to open a pull request instead of committing. Default: None, False.

        Returns:
            The address of the commit.

        Raises:
            ValueError: see `save_pretrained`. Nothing has been made on the hub then.
            ImportError: if huggingface_hub is not installed.
        """
        from segment_recurrence_pytorch.hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            run=run,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )

    @property
    def device(self) -> torch.device:
        """The device of the parameters, on which tokens and states have to be."""
        return self._first_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters. Override it if the first parameter does not tell it, for example because it is
        quantised, or an adapter."""
        return self._first_parameter.dtype

    @property
    def _first_parameter(self) -> nn.Parameter:
        for parameter in self.parameters():
            return parameter
        raise ValueError('the model has no parameters, which tell its device and dtype: override both')

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values. It is that of autocast if autocast is on and the model is not
        float64."""
        device = self.device.type
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.dtype


def own_class(model: nn.Module) -> type:
    """Returns the class of a model, also if its parameters are sharded: FSDP2 makes a subclass for that."""
    cls = type(model)
    return cls.__bases__[-1] if hasattr(model, 'set_requires_gradient_sync') else cls


def class_name(model: nn.Module) -> str:
    """Returns the name of `own_class`."""
    return own_class(model).__name__


def with_own_rate(groups: list[dict[str, Any]], chosen: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Returns the parameter groups of an optimizer with some of their parameters in a last group of their own, without
    weight decay. What is in no group, since it is frozen, stays out.

    Args:
        groups: the groups.
        chosen: the parameters to move.
        lr: their learning rate.
    """
    known = {id(parameter) for parameter in chosen}
    moved = [parameter for group in groups for parameter in group['params'] if id(parameter) in known]
    rest = [{**group, 'params': [p for p in group['params'] if id(p) not in known]} for group in groups]
    return [*rest, {'params': moved, 'lr': lr, 'weight_decay': 0.0}]


def plain_arguments(model: SegmentModel) -> dict[str, Any]:
    """Returns `model.arguments` as JSON can store them. A value that JSON cannot store becomes the name of its type."""
    return json.loads(json.dumps(model.arguments, default=lambda value: f'a {type(value).__qualname__}'))


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with all of its values. If it is spread over ranks (a DTensor), all ranks have to make the call.
    Other tensors are returned unchanged."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def digest_of_weights(tensors: dict[str, Tensor], values: int | None = None) -> str:
    """Returns the sha256 of tensors: of their names, dtypes, shapes and values. Of an object that is no tensor, it is
    that of its `repr`. If tensors are spread over ranks, all ranks have to make the call.

    Args:
        tensors: the tensors by name.
        values: how many values of each tensor are looked at, evenly spaced. Default: None, all of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):  # what a module's get_extra_state returned
            digest.update(f'{name} {tensor!r}'.encode())
            continue
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        flat = whole(tensor.detach()).flatten()
        if values is not None and len(flat) > values:
            flat = flat[:: -(-len(flat) // values)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _copied_argument(value: Any) -> Any:
    """Returns an argument with dicts, lists, tuples and sets of its own. Other objects are the same."""
    if type(value) is dict:
        return {name: _copied_argument(each) for name, each in value.items()}
    return type(value)(map(_copied_argument, value)) if type(value) in (list, tuple, set, frozenset) else value


def _with_recorded_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Returns the constructor, extended so that it also records its arguments in `self.arguments`.

    The arguments of the base classes' constructors stand beside them. If a base class has an argument of the same name,
    the value that the outermost class got is kept.
    """
    signature = inspect.signature(init)
    rest = next((name for name, each in signature.parameters.items() if each.kind == each.VAR_KEYWORD), None)

    @functools.wraps(init)
    def recording(self: SegmentModel, *args: Any, **kwargs: Any) -> None:
        given = _copied_argument([args, kwargs])  # as they are now: a dict may be changed later, or by the constructor
        init(self, *args, **kwargs)
        bound = signature.bind(self, *given[0], **given[1])
        bound.apply_defaults()
        _, *pairs = bound.arguments.items()
        own = dict(pairs)
        own |= own.pop(rest, {}) if rest else {}
        own = {name: self.recorded_argument(name, value) for name, value in own.items()}
        self.arguments = {**getattr(self, 'arguments', {}), **own}

    return recording
