"""`Cursor`, a place in texts from which a model can go on, and how a prompt is read up to it.

A prompt is read in whole segments, without logits. Its last 1 to segment_length tokens stay unread: the segment that
they begin is open.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from segment_recurrence_pytorch.backprop import (
    initial_state,
    plan_windows,
    read_window,
    read_windows,
    segments_at_once,
    window_of_rank,
)
from segment_recurrence_pytorch.checks import can_hold_ids, check_has_weights, check_input, check_whole, is_whole
from segment_recurrence_pytorch.distributed import agree_on_reads
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, copied, detach, map_state


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


def as_cursor(
    model: SegmentModel, prompt: Any, prompt_lengths: Any, state: Any, *, check_values: bool = True
) -> tuple[Cursor, list[int]]:
    """Returns the cursor of a prompt and a state, and its lengths as numbers. If a cursor is given as state, the prompt
    follows the tokens of that cursor.

    Args:
        model: the model that is to go on from it.
        prompt: token ids (b, n), or a list of b tensors (n_i,), or None.
        prompt_lengths: number of tokens of each row in a prompt (b, n), (b,). None: all n tokens.
        state: a state, a `Cursor`, or None.
        check_values: whether values are checked, see `SegmentWrapper`. Default: True.

    Raises:
        ValueError: if the model cannot generate, if an argument does not fit, or if a row would have no token.
    """
    if not model.causal:
        raise ValueError('a model with causal=False cannot generate: its positions see later tokens')
    check_has_weights(model)
    cursor, counts = _joined(prompt, prompt_lengths, state, model.device)
    tokens, state, _ = check_input(model, cursor.tokens, cursor.state, check_values=check_values)
    if model.chain is not None and check_values:
        model.chain.check_same(tokens, cursor.lengths)
    return Cursor(state, tokens, cursor.lengths), counts


def no_cursor(state: Any) -> Any:
    """Returns a state. Raises ValueError for a cursor, whose last tokens are not in its state yet."""
    if isinstance(state, Cursor):
        raise ValueError(
            'the state is a Cursor: give it to generate_tokens, stream or read. Its state alone, cursor.state, is the '
            'one at the last border, before cursor.tokens'
        )
    return state


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
        agree_on_reads(model, [window for plan in plans for window in plan])
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


def _joined(prompt: Any, prompt_lengths: Any, state: Any, device: torch.device) -> tuple[Cursor, list[int]]:
    """Returns a cursor with the tokens of a cursor that is given as state, and with those of a prompt after them; and
    its lengths as numbers. The state is not checked."""
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
