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
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from segment_recurrence_pytorch.cache import OpenSegment
from segment_recurrence_pytorch.checks import is_whole
from segment_recurrence_pytorch.cursor import Cursor, as_cursor, read_segments
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.sampling import FilterFn, Sampler
from segment_recurrence_pytorch.state import leaves, map_state

CHECK_EVERY = 32  # tokens between two looks at the values on a GPU
IDLE_CACHES = 2  # of compiled streams of one shape, which wait for the next stream


class GenerationOptions(TypedDict, total=False):
    """Options of generation and their types, for editors and type checkers. `SegmentWrapper.stream` explains them."""

    prompt_lengths: Any
    start_token: int | None
    segment_length: int | None
    eos_token_id: int | list[int] | tuple[int, ...] | None
    compile: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    generator: torch.Generator | None


class StreamOptions(GenerationOptions, total=False):
    """All options of `SegmentWrapper.stream`."""

    batch_size: int | None
    filter_fn: FilterFn | None


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
                shape = model.arguments, model.dtype, len(rest), segment_length, self._autocast
                compiled = _compiled(str(model.device), type(model), repr(shape))
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
        # what a row that is finished would draw is never used
        self._unchecked.append(largest if self.eos is None else largest.masked_fill(self._done, 0))
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


def open_stream(
    model: SegmentModel,
    prompt: Any,
    max_new_tokens: int | None,
    state: Any,
    *,
    segment_length: int,
    segments_per_pass: int | None,
    check_values: bool,
    prompt_lengths: Any = None,
    batch_size: int | None = None,
    start_token: int | None = None,
    eos_token_id: int | list[int] | tuple[int, ...] | None = None,
    compile: bool = False,
    **sampling: Any,
) -> Stream:
    """Returns a stream after everything is checked.

    Args:
        model: the model.
        prompt: see `SegmentWrapper.stream`, as all arguments that are not explained here.
        max_new_tokens: number of new tokens of each row. None: the stream has no end.
        state: a state, a `Cursor`, or None.
        segment_length: number of tokens of a segment.
        segments_per_pass: see `SegmentWrapper`.
        check_values: see `SegmentWrapper`.
        sampling: the arguments of `sampling.Sampler`.

    Raises:
        TypeError: if there is no option of a name.
        ValueError: if an argument does not fit.
    """
    if model.mesh is not None:
        raise ValueError(
            'the parameters of the model are sharded, and generation needs all of them: call it inside '
            '`with segment_recurrence_pytorch.distributed.gathered(wrapper.model):`'
        )
    for name in sampling:
        if name not in StreamOptions.__annotations__:
            known = ', '.join(['state', *StreamOptions.__annotations__])
            raise TypeError(f'generation has no option {name!r}: its options are {known}')
    sampler = Sampler(**sampling)
    if sampler.generator is not None and sampler.generator.device.type != model.device.type:
        raise ValueError(f'generator is on {sampler.generator.device}, the model on {model.device}')
    if eos_token_id is not None:
        eos_token_id = tuple(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else (eos_token_id,)
        if not eos_token_id:
            raise ValueError('eos_token_id is an empty list: give token ids, or None')
    given = [('eos_token_id', token) for token in eos_token_id or ()] + [('start_token', start_token)]
    for name, token in given:
        if token is not None and not (is_whole(token) and 0 <= token < model.num_tokens):
            raise ValueError(f'{name} is {token!r}: give a token id in [0, {model.num_tokens})')
    if not isinstance(compile, bool):
        raise ValueError(f'compile is {compile!r}: give True or False')
    if batch_size is None and start_token is not None:
        raise ValueError(f'start_token={start_token} begins new rows: give batch_size, and no prompt or cursor')
    if batch_size is not None:
        if not is_whole(batch_size) or batch_size < 1:
            raise ValueError(f'batch_size is {batch_size!r}: give a whole number of rows from 1 on')
        if prompt is not None or isinstance(state, Cursor):
            raise ValueError(f'batch_size={batch_size} begins new rows with start_token: give no prompt or cursor')
        prompt = torch.full((batch_size, 1), start_token or 0, device=model.device)
    cursor, counts = as_cursor(model, prompt, prompt_lengths, state, check_values=check_values)
    return Stream(
        model,
        cursor,
        segment_length=segment_length,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        compile=compile,
        check_every=1 if model.device.type == 'cpu' else CHECK_EVERY,
        segments_per_pass=segments_per_pass,
        counts=counts,
    )


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
        """Returns a cache that no stream uses, with the values of a new one; or the new one if none is of its form."""
        while self.idle:
            cache = self.idle.pop()
            if _is_alike(cache, fresh):
                for old, new in zip(leaves(vars(cache)), leaves(vars(fresh)), strict=True):
                    old.copy_(new)
                return cache
        return fresh

    def take_back(self, cache: OpenSegment) -> None:
        """Keeps the cache of a stream that is gone, unless enough of them wait."""
        if len(self.idle) < IDLE_CACHES:
            self.idle.append(cache)


def _is_alike(cache: OpenSegment, fresh: OpenSegment) -> bool:
    """Returns whether a cache becomes another one of its class if its tensors get the other one's values. What the two
    hold besides tensors has to be the same: plain values, and modules of a model. Other objects are their own."""
    (old, old_form), (new, new_form) = (tree_flatten(vars(each)) for each in (cache, fresh))
    if type(cache) is not type(fresh) or old_form != new_form:
        return False
    for ours, theirs in zip(old, new, strict=True):
        if type(ours) is not type(theirs):
            return False
        if isinstance(ours, Tensor):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                return False
        elif isinstance(ours, (nn.Module, int, float, str)) and ours is not theirs and ours != theirs:
            return False
    return True


@lru_cache(maxsize=32)
def _compiled(device: str, model_class: type, shape: str) -> _Compiled:
    return _Compiled(torch.device(device).type)
