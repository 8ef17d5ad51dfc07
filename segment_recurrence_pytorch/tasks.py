"""Synthetic tasks of any length that only a memory can solve, and a curriculum that makes them longer step by step.

The sequence of a task has several segments. Its end asks for something that stands in earlier segments, so a model
without memory can only guess. Its accuracy is at most `without_memory`. There is one exception: `Memorize` with one
segment holds the answer next to the question, as a first stage to learn from.

Labels are aligned with the tokens: labels[:, i] is the target of the logits at position i. They are `loss.IGNORE` where
nothing is asked.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from segment_recurrence_pytorch.backprop import read_windows
from segment_recurrence_pytorch.checks import check_finite, check_has_weights, check_whole, is_number, is_whole
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.wrapper import SegmentWrapper

PIECE_SEGMENTS = 256  # segments of a piece: a sequence of a million tokens is never held as a whole


class Example(NamedTuple):
    """A piece of a batch of sequences.

    Attributes:
        tokens: token ids (b, n).
        labels: target ids (b, n), `loss.IGNORE` where nothing is asked. None if nothing is asked in the whole piece.
    """

    tokens: Tensor
    labels: Tensor | None


class Task(ABC):
    """A task whose sequences can have any number of segments.

    Attributes:
        num_tokens: size of the vocabulary.
        segment_length: number of tokens of a segment.
        without_memory: the best accuracy that a model without memory can have.
    """

    num_tokens: int
    segment_length: int
    without_memory: float

    @abstractmethod
    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """Yields a batch of new sequences in pieces of whole segments, so that long sequences are never held as a
        whole.

        Args:
            segments: number of segments of each sequence.
            batch_size: number of sequences b.
            generator: the generator of the random numbers.

        Raises:
            ValueError: if the task has no sequences with this number of segments.
        """

    def batch(self, segments: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns a batch of new sequences as a single piece.

        Args:
            segments: number of segments of each sequence.
            batch_size: number of sequences b.
            generator: the generator of the random numbers.

        Returns:
            Token ids (b, n), and labels (b, n): the target of each position, or `loss.IGNORE` where nothing is asked.

        Raises:
            ValueError: if the task has no sequences with this number of segments.
        """
        pieces = list(self.pieces(segments, batch_size, generator))
        labels = [torch.full_like(tokens, IGNORE) if given is None else given for tokens, given in pieces]
        return torch.cat([tokens for tokens, _ in pieces], dim=1), torch.cat(labels, dim=1)


class Memorize(Task):
    """Remember a value that is marked in noise.

    The first segment is noise with a mark somewhere, and the value after it. The last segment ends with a query, and
    the model has to answer with the value.

    The noise contains values too, so only the mark tells which one counts.

    Args:
        values: number of different values. Default: 16.
        noise: number of different tokens in the noise. The values are among them. Default: 64.
        segment_length: number of tokens of a segment. Default: 32.
        anywhere: whether the mark may be in any segment except the last, and not only in the first ("detect and
            memorize"). Default: False.
        repeated: whether the noise is one sentence again and again, as in passkey retrieval. Default: False.
        key_length: number of tokens of the marked value. The model has to answer token by token. Default: 1.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(
        self,
        values: int = 16,
        noise: int = 64,
        segment_length: int = 32,
        *,
        anywhere: bool = False,
        repeated: bool = False,
        key_length: int = 1,
    ):
        check_whole(values=values, noise=noise, segment_length=segment_length, key_length=key_length)
        if values > noise:
            raise ValueError(f'values={values}: give 1 to noise={noise}, since the noise holds the values too')
        if segment_length < key_length + 1:
            raise ValueError(f'segment_length={segment_length}: give {key_length + 1} or more, for mark and value')
        self.values = values
        self.noise = noise
        self.segment_length = segment_length
        self.key_length = key_length
        self.anywhere = anywhere
        self.repeated = repeated
        self.mark = noise
        self.query = noise + 1
        self.num_tokens = noise + 2
        self.without_memory = 1 / values

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `Task.pieces`. With one segment, mark and query are in the same segment, and no memory is needed."""
        check_batch(segments, batch_size)
        length, k = self.segment_length, self.key_length
        if segments < 1 or (segments == 1 and length < 2 * k + 1):
            raise ValueError(f'{segments} segments of {length}: give at least 1, of at least {2 * k + 1} tokens')
        key = _draw(self.values, (batch_size, k), generator)
        marked = torch.cat((torch.full_like(key[:, :1], self.mark), key), dim=1)
        where = _draw(max(1, segments - 1) if self.anywhere else 1, (batch_size,), generator)
        room = length - k if segments > 1 else length - 2 * k
        columns = where[:, None] * length + _draw(room, (batch_size, 1), generator) + torch.arange(k + 1)
        for start in range(0, segments - 1, PIECE_SEGMENTS):
            stop = min(segments - 1, start + PIECE_SEGMENTS)
            tokens = self._filler(batch_size, stop - start, generator)
            here = columns - start * length
            inside = (here >= 0) & (here < tokens.shape[1])
            here = here.clamp(0, tokens.shape[1] - 1)
            yield Example(tokens.scatter(1, here, torch.where(inside, marked, tokens.gather(1, here))), None)
        tokens = self._filler(batch_size, 1, generator)
        if segments == 1:
            tokens = tokens.scatter(1, columns, marked)
        tokens[:, -k:] = torch.cat((torch.full_like(key[:, :1], self.query), key[:, :-1]), dim=1)
        labels = torch.full_like(tokens, IGNORE)
        labels[:, -k:] = key
        yield Example(tokens, labels)

    def _filler(self, batch_size: int, segments: int, generator: torch.Generator) -> Tensor:
        if not self.repeated:
            return _draw(self.noise, (batch_size, segments * self.segment_length), generator)
        sentence = _draw(self.noise, (1, self.segment_length), torch.Generator().manual_seed(0))
        return sentence.repeat(batch_size, segments)


class AssociativeRetrieval(Task):
    """Remember pairs of a key and a value.

    The last segment shows one of the keys, and the model has to answer with its value.

    Args:
        keys: number of different keys. Default: 26.
        values: number of different values. Default: 10.
        pairs_per_segment: number of pairs in a segment. A segment has twice as many tokens. Default: 1.
        rewritten: whether a key can come several times; its last value counts. If False, all keys of a sequence differ,
            so it has at most `keys` pairs. Default: False.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(self, keys: int = 26, values: int = 10, *, pairs_per_segment: int = 1, rewritten: bool = False):
        check_whole(keys=keys, values=values, pairs_per_segment=pairs_per_segment)
        self.keys = keys
        self.values = values
        self.pairs = pairs_per_segment
        self.rewritten = rewritten
        self.segment_length = 2 * pairs_per_segment
        self.go = keys + values
        self.pad = keys + values + 1
        self.num_tokens = keys + values + 2
        self.without_memory = 1 / values

    def without_keys(self, segments: int) -> float:
        """Returns the accuracy of a memory that holds the values and not which key each of them belongs to: it answers
        with the value that occurs most often. A memory retrieves by key only as far as it is better than this.

        Args:
            segments: number of segments, at least 2.

        Raises:
            ValueError: if keys can come several times (`rewritten`).
        """
        check_whole(segments=segments)
        if self.rewritten or segments < 2:
            raise ValueError(
                f'{segments} segments, rewritten={self.rewritten}: give 2 segments or more, and keys that differ'
            )
        count = (segments - 1) * self.pairs
        # the mean of the largest of `values` counts: the sum over m of the chance that it is above m
        return float(sum(1 - _no_count_above(m, count, self.values) for m in range(count)) / count)

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `Task.pieces`. A sequence has at least two segments."""
        check_batch(segments, batch_size)
        count = (segments - 1) * self.pairs
        if segments < 2 or (count > self.keys and not self.rewritten):
            limit = 1 + self.keys // self.pairs
            raise ValueError(f'{segments} segments of {self.pairs} pairs: give 2 to {limit}, or rewritten=True')
        if self.rewritten:
            keys = _draw(self.keys, (batch_size, count), generator)
        else:
            keys = torch.rand(batch_size, self.keys, generator=generator).argsort(1)[:, :count]
        values = _draw(self.values, (batch_size, count), generator)
        asked = keys.gather(1, _draw(count, (batch_size, 1), generator))
        last = torch.where(keys == asked, torch.arange(count), -1).amax(1, keepdim=True)
        pairs = torch.stack((keys, values + self.keys), dim=-1).flatten(1)
        question = torch.full((batch_size, self.segment_length), self.pad)
        question[:, -2], question[:, -1] = self.go, asked[:, 0]
        labels = torch.full_like(question, IGNORE)
        labels[:, -1] = values.gather(1, last)[:, 0] + self.keys
        yield Example(pairs, None)
        yield Example(question, labels)


class Copy(Task):
    """Remember a random source. The model has to write it `copies` times, or once and backwards, token by token.

    The source fills 1 / (1 + copies) of the segments, and the copies fill the others. arXiv 2207.06881 copies twice,
    with 3, 6 and 9 segments.

    Args:
        alphabet: number of different tokens in the source. Default: 10.
        segment_length: number of tokens of a segment. Default: 8.
        copies: number of copies to write. Default: 2.
        reverse: whether the source is written once and backwards instead; `copies` is then not used. Default: False.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(self, alphabet: int = 10, segment_length: int = 8, *, copies: int = 2, reverse: bool = False):
        check_whole(alphabet=alphabet, segment_length=segment_length, copies=copies)
        self.alphabet = alphabet
        self.segment_length = segment_length
        self.reverse = reverse
        self.copies = 1 if reverse else copies
        self.go = alphabet
        self.num_tokens = alphabet + 1
        self.without_memory = 1 / alphabet

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `Task.pieces`. The number of segments is a multiple of 1 + copies; with reverse=True, of 2."""
        check_batch(segments, batch_size)
        parts = 1 + self.copies
        if segments < parts or segments % parts:
            raise ValueError(f'{segments} segments: give a multiple of {parts}, a share for the source and each copy')
        source = _draw(self.alphabet, (batch_size, segments // parts * self.segment_length), generator)
        answer = source.flip(1) if self.reverse else source.repeat(1, self.copies)
        go = torch.full_like(source[:, :1], self.go)
        yield Example(source, None)
        yield Example(torch.cat((go, answer[:, :-1]), dim=1), answer)


class SegmentCurriculum:
    """A curriculum from few segments to many. It goes to the next stage when the average of a metric is high enough.

    The metric can be any number of a step that grows with success. For a task that asks for one token, exp(-loss) is
    the probability of the right answer:

        segments = curriculum.draw(generator)
        tokens, labels = task.batch(segments, 32, generator)
        loss = wrapper.loss(tokens, labels=labels, backward=True).loss
        optimizer.step()
        optimizer.zero_grad()
        curriculum.update(loss.neg().exp().item(), segments)

    Args:
        stages: the number of segments of each stage, in growing order.
        threshold: the next stage comes when the moving average of the metric is at least this high. Default: 0.96.
        mix: share of the steps that use a random earlier stage instead of the present one, in [0, 1).
            Default: 0.5.
        patience: number of steps over which the average is taken. A stage has at least this many steps. Default: 20.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(self, stages: Sequence[int], *, threshold: float = 0.96, mix: float = 0.5, patience: int = 20):
        numbers = list(stages)
        whole = all(is_whole(stage) and stage >= 1 for stage in numbers)
        if not numbers or not whole or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f'stages={numbers}: give growing numbers of segments, from 1 on')
        check_whole(patience=patience)
        check_finite(threshold=threshold)
        if not (is_number(mix) and 0 <= mix < 1):
            raise ValueError(f'mix is {mix!r}: give a share of steps in [0, 1)')
        self.stages = numbers
        self.threshold = threshold
        self.mix = mix
        self.patience = patience
        self.stage = 0
        self.average = 0.0
        self.steps = 0

    def draw(self, generator: torch.Generator) -> int:
        """Returns the number of segments of the next step.

        Args:
            generator: the generator of the random numbers.
        """
        stage = self.stage
        if stage and torch.rand((), generator=generator) < self.mix:
            stage = int(_draw(stage, (), generator))
        return self.stages[stage]

    def update(self, metric: float, segments: int) -> None:
        """Takes the metric of a step into account, and goes to the next stage if it is time.

        Args:
            metric: the metric of the step; higher is better.
            segments: number of segments of the step. Steps of earlier stages are not counted.

        Raises:
            ValueError: if the metric is not a finite number.
        """
        check_finite(metric=metric)
        if segments != self.stages[self.stage]:
            return
        self.steps += 1
        self.average += (metric - self.average) / min(self.steps, self.patience)
        if self.average >= self.threshold and self.steps >= self.patience and self.stage + 1 < len(self.stages):
            self.stage, self.average, self.steps = self.stage + 1, 0.0, 0


def virtual_lengths(batch_size: int, segments: int, *, most: float, generator: torch.Generator) -> Tensor:
    """Returns how many times each segment counts as read in a training step ("virtual length"), (b, segments).

    Given as `per_segment={'write_scale': ...}` to the loss of a wrapper, it trains the memory of an Infini-Transformer
    for texts that are far longer than those of the training: a segment that counts a thousand times fills the memory as
    a thousand segments do, and costs the time of one. In 70 % of the rows, one segment, neither the first nor the last,
    gets a number drawn log-uniformly between 1 and `most`. All other segments count once.

    Args:
        batch_size: number of rows b.
        segments: number of segments. With fewer than 3, all count once.
        most: the largest number of times, at least 1.
        generator: the generator of the random numbers.

    Raises:
        ValueError: if a value is outside its range.
    """
    check_whole(batch_size=batch_size, segments=segments)
    check_finite(most=most)
    if most < 1:
        raise ValueError(f'most is {most}: give at least 1, with which every segment counts once')
    scale = torch.ones(batch_size, segments)
    if segments < 3:
        return scale
    middle = torch.randint(1, segments - 1, (batch_size, 1), generator=generator)
    factor = torch.exp(torch.rand(batch_size, 1, generator=generator) * math.log(most))
    chosen = torch.rand(batch_size, 1, generator=generator) < 0.7
    return scale.scatter(1, middle, torch.where(chosen, factor, 1.0))


@torch.no_grad()
def accuracy(
    wrapper: SegmentWrapper, task: Task, segments: int, *, batch_size: int, generator: torch.Generator
) -> float:
    """Returns the share of the labelled tokens that a model predicts correctly.

    Sequences are read in the pieces in which the task makes them, so those of `Memorize` are never held as a whole.
    Logits are only computed where something is asked.

    Args:
        wrapper: the model in a wrapper, which has the segment length of the task.
        task: the task.
        segments: number of segments of each sequence.
        batch_size: number of sequences.
        generator: the generator of the random numbers.

    Raises:
        ValueError: if the model or the wrapper does not fit the task.
    """
    model, length, state = wrapper.model, task.segment_length, None
    check_whole(batch_size=batch_size)
    check_has_weights(model)
    if wrapper.segment_length != length:
        raise ValueError(f'the wrapper has segment_length={wrapper.segment_length}, the task {length}')
    if model.num_tokens < task.num_tokens:
        raise ValueError(f'the model has num_tokens={model.num_tokens}, the task needs {task.num_tokens}')
    right = asked = 0
    with evaluating(wrapper):
        for tokens, labels in task.pieces(segments, batch_size, generator):
            tokens = tokens.to(model.device)
            for at, hidden, after in read_windows(
                model,
                tokens,
                state,
                length,
                need_hidden=labels is not None,
                segments_per_pass=wrapper.segments_per_pass,
            ):
                state = after
                if labels is None:
                    continue
                chosen = labels[:, at].to(model.device)
                is_asked = chosen != IGNORE
                predicted = model.to_logits(hidden[is_asked]).argmax(-1)
                right += int((predicted == chosen[is_asked]).sum())
                asked += int(is_asked.sum())
    return right / asked


def _no_count_above(most: int, draws: int, kinds: int) -> Fraction:
    """Returns the chance that, in a number of draws from equally likely kinds, no kind comes more than `most` times.

    It is draws! / kinds^draws times the coefficient of x^draws in (sum over j up to `most` of x^j / j!)^kinds.
    """
    series = [Fraction(1)] + [Fraction(0)] * draws
    for _ in range(kinds):
        series = [
            sum((series[n - j] / math.factorial(j) for j in range(min(most, n) + 1)), Fraction(0))
            for n in range(draws + 1)
        ]
    return series[draws] * math.factorial(draws) / Fraction(kinds) ** draws


def check_batch(segments: int, batch_size: int) -> None:
    """Raises ValueError if the number of segments is no whole number, or the batch size none from 1 on."""
    if not is_whole(segments):
        raise ValueError(f'{segments!r} segments: give a whole number')
    check_whole(batch_size=batch_size)


def _draw(limit: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, limit, shape, generator=generator)
