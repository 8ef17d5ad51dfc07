"""The contract that a segment-recurrent model keeps with the wrapper, with back-propagation and with generation.

A model reads a long sequence segment by segment and carries a small state from each segment to the
next. Nothing outside a model needs to know which model it is: subclass `SegmentModel` to add a third.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.attention import choose_backend
from segment_recurrence_pytorch.cache import SegmentCache
from segment_recurrence_pytorch.state import State, where_rows


class SegmentModel(nn.Module, ABC):
    """A transformer that reads segments and carries a state (`segment_recurrence_pytorch.state`).

    num_tokens: size of the vocabulary.
    causal: whether position i sees no later position, so that the next token can be learned.
    max_segment_length: the longest segment that it can read, None if there is no limit.
    token_emb, norm: the embedding of ids, and the norm of what the last layer returns.
    arguments: what the constructor was called with; a saved state goes back only into a model of the same.
    parallel_segments: whether one `advance` can take many segments (`segment_length` tells the borders).
    """

    arguments: dict[str, Any]
    num_tokens: int
    dim: int
    dim_head: int
    causal: bool
    max_segment_length: int | None
    parallel_segments: bool
    backend: str = 'auto'
    token_emb: nn.Embedding
    norm: nn.RMSNorm

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state before the first segment: what None as a state means."""

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
        """Reads the next segment, or the next segments if `parallel_segments`.

        tokens: ids (b, n) or embeddings (b, n, d); one segment unless `segment_length` is given.
        mask: (b, n) bool, True = valid. Rows without a valid token keep their state.
        need_hidden=False: None instead of the hidden states, and only the work that the state needs.
        Returns hidden states (b, n, d) and the next state. Checks no values: see `checks`.
        """

    @abstractmethod
    def to_logits(self, hidden: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, num_tokens)."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids (..., n), or embeddings (..., n, d), as what the first layer takes, positions apart."""
        return tokens.to(self.dtype) if tokens.is_floating_point() else self.token_emb(tokens)

    @abstractmethod
    def open_segment(self, state: State, segment_length: int) -> SegmentCache:
        """The cache of an open segment of at most segment_length tokens, in which nothing was read yet. Needs a causal
        model. The state is not changed."""

    @torch.no_grad()
    def extend(self, cache: SegmentCache, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, SegmentCache]:
        """Reads the next tokens (b, n) of the open segments: the hidden states (b, n, d) that `advance` gives there.

        lengths: (b,), row i appends its first lengths[i] tokens, at most n; None: n. No graph is kept, and the cache
        that is given is used up.
        """
        return cache.extend(self, tokens, lengths), cache

    @torch.no_grad()
    def close_segment(self, cache: SegmentCache, rows: Tensor | None = None) -> SegmentCache:
        """The rows where `rows` (b,) is True (None: all) write their memory and enter their next segment: their
        state is the one that `advance` returns. Uses up the cache that is given."""
        cache.close(self, rows)
        return cache

    @abstractmethod
    def check_state(self, state: State, batch_size: int) -> None:
        """Raises ValueError if `state` is not one that `advance` can take for this batch."""

    def as_state(self, state: Any, batch_size: int) -> State:
        """The state that a caller means, before `check_state`: models may take other forms of it too."""
        return state

    def reset(self, state: State, rows: Tensor) -> State:
        """The state with the rows where `rows` (b,) is True back at the initial state."""
        return self.where(rows, self.initial_state(rows.shape[0]), state)

    def where(self, rows: Tensor, chosen: State, other: State) -> State:
        """The state with the rows of `chosen` where `rows` (b,) is True, and those of `other` elsewhere."""
        return where_rows(rows, chosen, other)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: weight decay for the matrices of layers and axial attention, none for the rest."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (decayed if parameter.ndim == 2 and name.startswith(('layers.', 'axial.')) else others).append(parameter)
        return [
            {'params': decayed, 'lr': lr, 'weight_decay': weight_decay},
            {'params': others, 'lr': lr, 'weight_decay': 0.0},
        ]

    @property
    def attention_backend(self) -> str:
        """The backend that runs here, without a padding mask. Set it to a name of `attention.BACKENDS` to force one."""
        return self._backend_for(self.backend)

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        """Raises ValueError, with the backend as it was, for one that cannot run here."""
        self._backend_for(name)
        self.backend = name

    def _backend_for(self, name: str) -> str:
        return choose_backend(name, device=self.device, dtype=self.compute_dtype, dim_head=self.dim_head)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values: autocast's where it is on."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype
