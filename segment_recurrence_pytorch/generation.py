"""Exact generation, for any causal `SegmentModel`.

The prompt is read in whole segments, without logits. Its last 1 to segment_length tokens go into an open segment. Each
new token is then appended to the open segment. A full segment is closed, which gives the next state, only when another
token has to be read after it.

With a cache of the model's own (`cache.SegmentCache`), a new token costs the work of one position, however long the
text is.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from segment_recurrence_pytorch.backprop import (
    initial_state,
    plan_windows,
    read_window,
    read_windows,
    segments_at_once,
    window_of_rank,
)
from segment_recurrence_pytorch.cache import OpenSegment
from segment_recurrence_pytorch.checks import can_hold_ids, check_whole, is_whole
from segment_recurrence_pytorch.distributed import check_same_reads
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.sampling import Sampler
from segment_recurrence_pytorch.state import State, copied, detach, leaves, map_state

CHECK_EVERY = 32  # tokens between two looks at the values on a GPU
IDLE_CACHES = 2  # of compiled streams of one shape, which wait for the next stream


class Cursor(NamedTuple):
    """A place in the text of each row, from which the model can go on. To go on, it reads at most one segment again.

    Attributes:
        state: the state at the last border that each row has passed. None means the initial state.
        tokens: ids of the tokens after that border, (b, n). Each row starts at column 0. The state does not contain
            these tokens: they are read, or read again, when the cursor is continued. The newest token is one of them.
        lengths: number of these tokens in each row, (b,). The columns after them mean nothing.
    """

    state: State
    tokens: Tensor
    lengths: Tensor

    def fork(self, copies: int) -> Cursor:
        """Returns a cursor with `copies` copies of each row, to continue one text in several ways. The copies of a row
        stand one after the other: two rows with two copies each are 0, 0, 1, 1.

        Args:
            copies: number of copies of each row.

        Raises:
            ValueError: if copies is not a whole number of at least 1.
        """
        check_whole(copies=copies)
        return map_state(lambda t: t.repeat_interleave(copies, dim=0), self)

    def rows(self, index: Tensor) -> Cursor:
        """Returns a cursor with some of the rows.

        Args:
            index: row numbers (k,), or a bool tensor (b,), True for the rows to take.

        Raises:
            ValueError: if the index has another form, or names rows that the cursor does not have.
        """
        count = len(self.tokens)
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or index.is_complex():
            found = tuple(index.shape) if isinstance(index, Tensor) else repr(index)
            raise ValueError(f'rows of a cursor: the index is {found}: give row numbers (k,), or bool (batch,)')
        if index.dtype == torch.bool and len(index) != count:
            raise ValueError(f'rows of a cursor: the index has {len(index)} bools, the cursor {count} rows')
        if index.dtype != torch.bool and not ((index >= 0) & (index < count)).all():
            raise ValueError(f'rows of a cursor: the index is {index.tolist()}: give row numbers in [0, {count})')
        index = index if index.dtype == torch.bool else index.long()
        return map_state(lambda t: t[index], self)


class Stream:
    """An iterator over new tokens (b,), one for each row. `SegmentWrapper.stream` makes it.

    A row is finished when one of eos_token_id was drawn in it. The stream then returns the first of them for this row
    again and again, and the cursor of the row does not move any more. The model is in evaluation mode only while a
    token is computed.

    Three counters tell where a row stands. Here the row has the text 'c a t _ s a', the segments have 4 tokens, and the
    token 'a' was just drawn:

          border          border
          | c   a   t   _ | s   a
                                ^  the newest token: it was drawn, but the model has not read it yet

          _in_cache    1   tokens of the open segment that the model has read: 's'
          _in_cursor   2   tokens after the last border, read or not: 's a'. The cursor returns them.
          _column      1   the column of the newest token in the open segment. It equals _in_cache, but is a tensor
                           on the device: using it never waits for the device.

    The newest token is read when the next logits are needed. If the open segment is full by then, it is closed first.
    The newest token becomes the first one of the next segment: _in_cache and _column fall to 0 and _in_cursor to 1.
    Then the token is read, and _in_cache and _column grow by 1. In a finished row _in_cursor stays as it is, while the
    other two counters go on as in the rows that are not finished.

    Args:
        model: a causal model.
        cursor: where the stream begins, with at least one token in every row.
        segment_length: number of tokens of a segment.
        sampler: chooses the new tokens.
        max_new_tokens: number of new tokens of each row. Default: None, the stream has no end.
        eos_token_id: the tokens that end a row. Default: None, no row ends.
        compile: see `SegmentWrapper.stream`. Default: False.
        check_every: number of tokens between two looks at the values: whether logits are NaN, and whether all rows have
            ended. A look waits for the device. Default: 1.
        segments_per_pass: number of segments of a window, when the tokens of the cursor are read. Default: None, the
            number that `backprop.segments_at_once` returns.
        counts: the lengths of the cursor, as numbers. Default: None, they are fetched from the device.
    """

    def __init__(
        self,
        model: SegmentModel,
        cursor: Cursor,
        *,
        segment_length: int,
        sampler: Sampler,
        max_new_tokens: int | None = None,
        eos_token_id: tuple[int, ...] | None = None,
        compile: bool = False,
        check_every: int = 1,
        segments_per_pass: int | None = None,
        counts: list[int] | None = None,
    ):
        self.model = model
        self.sampler = sampler
        self.max_new_tokens = max_new_tokens
        self.eos = eos_token_id
        self.segment_length = segment_length
        self.check_every = check_every
        self.produced = 0
        self._ended = False  # whether all rows had ended when the values were looked at
        self._checked = 0  # number of new tokens whose logits were checked
        self._unchecked: list[Tensor] = []  # the largest logit of each row, of every new token that was not checked yet
        self._start = cursor.lengths.tolist() if counts is None else counts
        device = model.device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with self.guarded():
            (state, rest, lengths), self._in_cache = read_segments(
                model, cursor, segment_length, segments_per_pass, counts=self._start
            )
            self._cache = model.open_segment(state, segment_length)
            uniform = len(set(self._in_cache)) == 1
            hidden = self._cache.extend(model, rest, None if uniform else lengths)
            last = hidden[torch.arange(len(rest), device=rest.device), lengths - 1]
            self._logits: Tensor | None = model.to_logits(last)
            steps: tuple[Callable, Callable] = _step, _close
            if compile:
                self._cache.make_static()
                shape = type(model), model.arguments, model.dtype, len(rest), segment_length, self._autocast
                compiled = _compiled(str(model.device), repr(shape))
                steps, self._cache = compiled.steps, compiled.lend(self._cache)
                weakref.finalize(self, compiled.take_back, self._cache)
            self._step, self._close = steps
            self._tokens = rest.new_zeros(len(rest), segment_length + 1)
            self._tokens[:, : rest.shape[1]] = rest
            self._in_cursor = lengths
            self._column = lengths.clone()
            self._newest = rest[:, -1]
            self._done = torch.zeros_like(lengths, dtype=torch.bool)
            self._state = self._cache.state_now()  # for the cursor: in finished rows it stays, while the cache goes on
            self._seen = _occurrences(cursor, model.num_tokens) if sampler.needs_seen else None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        with self.guarded():
            token = self._advance()
        if token is None:
            raise StopIteration
        return token

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Returns the `with` block in which tokens are computed.

        Inside, the model is in evaluation mode, gradients are off, and autocast is as it was when the stream was made.
        """
        autocast = torch.autocast(*self._autocast)
        with evaluating(self.model), torch.inference_mode(False), torch.no_grad(), autocast:
            yield

    def _advance(self) -> Tensor | None:
        if self.produced == self.max_new_tokens or self._ended:
            self._look()
            return None
        if self._logits is None:
            self._logits = self._next_logits()
        token, largest = self.sampler(self._logits, self._seen)
        self._unchecked.append(largest)
        if len(self._unchecked) >= self.check_every:
            self._look(token)
        self._take(token)
        self._logits = None
        self.produced += 1
        return self._newest.clone()  # a copy, which the caller may change

    def unguarded(self) -> Iterator[Tensor]:
        """Returns an iterator over the same tokens, to be used inside `with stream.guarded()`.

        `next(stream)` enters that block for every single token. This iterator saves the time that this takes.
        """
        while (token := self._advance()) is not None:
            yield token

    @property
    def cursor(self) -> Cursor:
        """Where each row stands now, as a `Cursor`. `generate_tokens`, `stream` and `read` can go on from it, with or
        without a prompt."""
        state = self._cache.state_now() if self.eos is None else self._state
        known = max(self._in_cache) + (self.produced > 0)  # if no row has ended, without waiting for the device
        longest = known if self.eos is None else int(self._in_cursor.max())
        return map_state(torch.clone, Cursor(state, self._tokens[:, :longest], self._in_cursor))

    @property
    def finished(self) -> Tensor:
        """Which rows are finished, (b,) bool."""
        return self._done.clone()

    def is_end(self, tokens: Tensor) -> Tensor:
        """Returns which tokens end a row, a bool tensor of their shape. Only for a stream with eos_token_id."""
        assert self.eos is not None
        return functools.reduce(torch.logical_or, [tokens == eos for eos in self.eos])

    def _next_logits(self) -> Tensor:
        """Closes the segments that are full, reads the newest token of each row, and returns the logits after it."""
        full = [count == self.segment_length for count in self._in_cache]
        if any(full):
            rows = self._column == self.segment_length
            if self._cache.static:  # shapes stay: all rows are computed
                self._close(self.model, self._cache, rows, None)
            else:
                self._close(self.model, self._cache, None if all(full) else rows, sum(full))
            if self.eos is not None:
                self._state = self.model.where(self._done, self._state, self._cache.state_now())
            self._column.masked_fill_(rows, 0)
            self._in_cache = [0 if is_full else count for count, is_full in zip(self._in_cache, full, strict=True)]
            self._put(self._newest, rows & ~self._done)
        logits = self._step(self.model, self._cache, self._newest[:, None])
        self._in_cache = [count + 1 for count in self._in_cache]
        self._column = self._column + 1
        return logits

    def _take(self, token: Tensor) -> None:
        """Appends the drawn tokens (b,) to the cursor, except in rows that were finished before."""
        if self.eos is not None:
            token = token.masked_fill(self._done, self.eos[0])
            self._put(token, ~self._done)
        else:
            self._tokens.scatter_(1, self._column[:, None], token[:, None])
            self._in_cursor = self._column + 1
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        self._newest = token
        if self.eos is not None:
            self._done = self._done | self.is_end(token)

    def _put(self, token: Tensor, rows: Tensor) -> None:
        """Writes tokens (b,) into the current column of the cursor, in the rows where `rows` (b,) is True."""
        column = self._column[:, None]
        old = self._tokens.gather(1, column)
        self._tokens.scatter_(1, column, torch.where(rows[:, None], token[:, None], old))
        self._in_cursor = torch.where(rows, self._column + 1, self._in_cursor)

    def _look(self, token: Tensor | None = None) -> None:
        """Waits for the device, and sees whether all rows have ended.

        Args:
            token: the tokens (b,) that were just drawn and not taken yet. Default: None.

        Raises:
            ValueError: if logits since the last look are NaN or infinite.
        """
        if not self._unchecked:
            return
        bad_and_done = [~largest.isfinite() for largest in self._unchecked]
        bad_and_done.append(self._done if token is None or self.eos is None else self._done | self.is_end(token))
        *bad, done = torch.stack(bad_and_done).tolist()
        self._ended = all(done)
        first, self._checked = self._checked, self._checked + len(bad)
        self._unchecked.clear()
        for step, flags in enumerate(bad, start=first):
            if any(flags):
                row = flags.index(True)
                raise ValueError(
                    f'the logits of row {row} after {self._start[row] + step} tokens (new token {step}) are NaN or '
                    'infinite, or a filter forbids every token: look at the weights, the state and filter_fn'
                )


def read_segments(
    model: SegmentModel,
    cursor: Cursor,
    segment_length: int,
    segments_per_pass: int | None = None,
    *,
    counts: list[int],
) -> tuple[Cursor, list[int]]:
    """Reads whole segments of the tokens of a cursor. The last 1 to segment_length tokens of each row stay unread.

    Args:
        model: the model.
        cursor: a cursor with at least one token in every row.
        segment_length: number of tokens of a segment.
        segments_per_pass: number of segments of a window. Default: None, the number that `backprop.segments_at_once`
            returns.
        counts: the lengths of the cursor, as numbers: the device need not be waited for.

    Returns:
        The new cursor: the state at the last border of each row, the ids of the unread tokens (b, n), and their number
        in each row (b,). And these numbers as a list.
    """
    state, tokens, lengths = cursor
    whole = (lengths - 1) // segment_length
    shortest, longest = (end(count - 1 for count in counts) // segment_length * segment_length for end in (min, max))
    further = torch.arange(shortest, longest, device=tokens.device) < (whole * segment_length)[:, None]
    # the part that all rows have needs no mask
    parts: list[tuple[Tensor, Tensor | None]] = [(tokens[:, :shortest], None), (tokens[:, shortest:longest], further)]
    if model.chain is not None:  # each rank reads its segments at once, and the last one has the state after them
        window = window_of_rank(longest, segment_length, model.chain)
        at = slice(window.start, window.stop)
        every = None if shortest == longest else F.pad(further, (shortest, 0), value=True)[:, at]
        _, state = read_window(model, tokens[:, at], state, every, segment_length, need_hidden=False)
        state, parts = model.chain.last(state), []
    if model.mesh is not None:
        at_once = segments_per_pass or segments_at_once(model, segment_length, len(tokens))
        plans = (plan_windows(part.shape[1], segment_length, segments_per_pass=at_once) for part, _ in parts)
        check_same_reads(model, [window for plan in plans for window in plan])
    for part, mask in parts:
        windows = read_windows(
            model, part, state, segment_length, mask=mask, need_hidden=False, segments_per_pass=segments_per_pass
        )
        for _, _, after in windows:
            state = after
    rest, left_counts = lengths - whole * segment_length, [(count - 1) % segment_length + 1 for count in counts]
    place = (whole * segment_length)[:, None] + torch.arange(max(left_counts), device=tokens.device)
    left = tokens.gather(1, place.clamp_max(tokens.shape[1] - 1))
    if state is None:
        state = initial_state(model, len(tokens))
    elif not longest:  # no segment was read: it is the caller's
        state = copied(state)
    state = detach(state)
    left = left.masked_fill(torch.arange(left.shape[1], device=left.device) >= rest[:, None], 0)
    return Cursor(state, left, rest), left_counts


def as_cursor(prompt: Any, prompt_lengths: Any, state: Any, device: torch.device) -> tuple[Cursor, list[int]]:
    """Returns the cursor of a state and a prompt, and its lengths as numbers. If a cursor is given as state, the prompt
    follows the tokens of that cursor.

    Args:
        prompt: token ids (b, n), or a list of b tensors (n_i,), or None.
        prompt_lengths: number of tokens of each row in a prompt (b, n), (b,). None: all n tokens.
        state: a state, a `Cursor`, or None.
        device: the device of the result.

    Raises:
        ValueError: if an argument does not fit, or if a row would have no token.
    """
    rows: list[Tensor] | None = None
    if prompt is None and prompt_lengths is not None:
        raise ValueError('prompt_lengths without a prompt: leave one out, or give the other')
    if isinstance(prompt, Tensor):
        if prompt.ndim != 2 or not can_hold_ids(prompt.dtype):
            raise ValueError(
                f'the prompt is {prompt.dtype} of shape {tuple(prompt.shape)}: give token ids (batch, length), or a '
                'list of rows (length,)'
            )
        if prompt_lengths is not None and isinstance(state, Cursor):
            prompt_lengths, state = _fetched_together(prompt_lengths, state)
        counts = (
            [prompt.shape[1]] * len(prompt)
            if prompt_lengths is None
            else _counts(prompt_lengths, prompt, 'prompt_lengths')
        )
        rows = [row[:count] for row, count in zip(_moved(prompt, device), counts, strict=True)]
    elif prompt is not None:
        if not isinstance(prompt, (list, tuple)):
            raise ValueError(
                f'the prompt is a {type(prompt).__name__}: give a tensor (batch, length), or a list of rows'
            )
        if prompt_lengths is not None:
            raise ValueError('prompt_lengths says how long the rows of one tensor are: leave it out for a list')
        for row in prompt:
            if not isinstance(row, Tensor) or row.ndim != 1 or not can_hold_ids(row.dtype):
                raise ValueError('the prompt is a list: give one tensor of token ids (length,) a row')
        rows = [_moved(row, device) for row in prompt]
    if isinstance(state, Cursor):
        if not isinstance(state.tokens, Tensor) or state.tokens.ndim != 2 or not can_hold_ids(state.tokens.dtype):
            raise ValueError('the cursor holds no token ids (batch, length): give what a call returned')
        counts = _counts(state.lengths, state.tokens, 'the lengths of the cursor')
        before = [row[:count] for row, count in zip(_moved(state.tokens, device), counts, strict=True)]
        if rows is not None and len(rows) != len(before):
            raise ValueError(f'{len(rows)} prompts for a cursor of {len(before)} rows: `cursor.fork` copies its rows')
        rows = before if rows is None else [torch.cat(pair) for pair in zip(before, rows, strict=True)]
        state = state.state
    if not rows or not all(map(len, rows)):
        raise ValueError(
            'the prompt is empty: give at least one token in every row, a Cursor as the state, or batch_size= to begin '
            'with start_token'
        )
    counts = [len(row) for row in rows]
    return Cursor(state, pad_sequence(rows, batch_first=True), torch.tensor(counts, device=device)), counts


def new_token_count(name: str, length: int | None, max_new_tokens: int | None, prompt: Any) -> int:
    """Returns the number of new tokens.

    The caller gives either this number, or a total length that includes the prompt, as the published packages do.

    Args:
        name: the published name of `length`, for error messages.
        length: number of tokens of the prompt and new tokens together, or None.
        max_new_tokens: number of new tokens, or None.
        prompt: the prompt.

    Raises:
        ValueError: unless exactly one of the two is given. If `length` is given, and the prompt is not a tensor (b, n)
            or is longer.
    """
    if (length is None) == (max_new_tokens is None):
        raise ValueError(f'{name} is {length} and max_new_tokens is {max_new_tokens}: give one of them')
    if max_new_tokens is not None:
        return max_new_tokens
    assert length is not None
    if not is_whole(length):
        raise ValueError(f'{name} is {length!r}: give a whole number of tokens')
    if not isinstance(prompt, Tensor) or prompt.ndim != 2:
        raise ValueError(f'{name}={length} counts a prompt of shape (batch, length): give max_new_tokens')
    if length < prompt.shape[-1]:
        raise ValueError(f'{name} is {length}, and the prompt has {prompt.shape[-1]} tokens, which it counts, too')
    return length - prompt.shape[-1]


_evaluations: dict[
    nn.Module, int
] = {}  # modules that were in training mode, and the number of `evaluating` blocks that they are in
_evaluations_lock = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode inside the `with` block.

    Afterwards every submodule is in the mode in which it was before. Blocks may overlap, also in several threads: the
    modes come back when the last of them ends.

    Args:
        module: the module.
    """
    with _evaluations_lock:
        held = [each for each in module.modules() if each.training or each in _evaluations]
        for each in held:
            _evaluations[each] = _evaluations.get(each, 0) + 1
            each.training = False
    try:
        yield
    finally:
        with _evaluations_lock:
            for each in held:
                _evaluations[each] -= 1
                if not _evaluations[each]:
                    del _evaluations[each]
                    each.training = True


def _moved(tokens: Tensor, device: torch.device) -> Tensor:
    """Returns token ids on a device, as int64, so that those of several rows can stand in one tensor.

    Raises:
        ValueError: if they are on the meta device and so have no values.
    """
    if tokens.is_meta:
        raise ValueError('the prompt or cursor is on the meta device, where it has no values: give token ids')
    return tokens.to(device, torch.long)


def _fetched_together(prompt_lengths: Any, cursor: Cursor) -> tuple[Any, Cursor]:
    """Returns the lengths of a prompt, and a cursor. If both have lengths on a device, they are fetched to the CPU at
    once."""
    both = [prompt_lengths, cursor.lengths]
    if all(isinstance(each, Tensor) and each.ndim == 1 and can_hold_ids(each.dtype) and each.is_cuda for each in both):
        first, second = torch.cat(both).cpu().split([len(each) for each in both])
        return first, cursor._replace(lengths=second)
    return prompt_lengths, cursor


def _counts(lengths: Any, tokens: Tensor, name: str) -> list[int]:
    rows, width = tokens.shape
    try:
        counts = torch.as_tensor(lengths).tolist()
    except (RuntimeError, TypeError, ValueError):
        counts = lengths
    fits = isinstance(counts, list) and len(counts) == rows
    if not fits or not all(is_whole(count) and 0 <= count <= width for count in counts):
        raise ValueError(f'{name} is {counts!r}: give {rows} whole numbers from 0 to {width}')
    return counts


def _occurrences(cursor: Cursor, num_tokens: int) -> Tensor:
    """Returns which token ids occur in each row of a cursor, (b, num_tokens) bool."""
    _, tokens, lengths = cursor
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    counts = torch.zeros(len(tokens), num_tokens, dtype=torch.long, device=tokens.device)
    return counts.scatter_add_(1, tokens, valid.long()) > 0


def _step(model: SegmentModel, cache: OpenSegment, tokens: Tensor) -> Tensor:
    return model.to_logits(cache.extend(model, tokens)[:, -1])


def _close(model: SegmentModel, cache: OpenSegment, rows: Tensor | None, count: int | None) -> None:
    cache.close(model, rows, count)


class _Compiled:
    """`_step` and `_close`, compiled for one model and its shapes, and the caches that they work on. On CUDA they run
    as CUDA graphs, which belong to the addresses of a cache: a cache that is used again needs no new graph.

    Args:
        device_type: type of the device, for example 'cuda'.
    """

    def __init__(self, device_type: str):
        mode = 'reduce-overhead' if device_type == 'cuda' else None
        # each gets its own code object: the compiler compiles only a few variants of one code object
        step, close = (
            torch.compile(FunctionType(fn.__code__.replace(), fn.__globals__), fullgraph=True, dynamic=False, mode=mode)
            for fn in (_step, _close)
        )
        self.steps = step, close
        self.idle: list[OpenSegment] = []

    def lend(self, fresh: OpenSegment) -> OpenSegment:
        """Returns a cache that no stream uses, with the values of a new one; or the new one if there is none."""
        while self.idle:
            cache = self.idle.pop()
            pairs = list(zip(leaves(vars(cache)), leaves(vars(fresh)), strict=True))
            if all(old.shape == new.shape and old.dtype == new.dtype for old, new in pairs):
                for old, new in pairs:
                    if old is not new:  # as constants are, which all caches share
                        old.copy_(new)
                return cache
        return fresh

    def take_back(self, cache: OpenSegment) -> None:
        """Keeps the cache of a stream that is gone, unless enough of them wait."""
        if len(self.idle) < IDLE_CACHES:
            self.idle.append(cache)


@lru_cache(maxsize=32)
def _compiled(device: str, shape: str) -> _Compiled:
    return _Compiled(torch.device(device).type)
