"""What the tables of the page of results are made of: targets, means with their worst seed, and intervals."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.evidence.rows import ROWS, LanguageRow, TaskRow
from benchmarks.intervals import bounds

PROSE = Path(__file__).parents[1] / 'results' / 'evidence' / 'prose'


def prose(name: str) -> str:
    """Returns a text of the page by its name. It is empty if there is no such text."""
    path = PROSE / f'{name}.md'
    return path.read_text() if path.exists() else ''


def table(head: list[str], lines: list[list[str]]) -> str:
    """Returns a Markdown table."""
    first, *rest = (f'| {" | ".join(cells)} |\n' for cells in (head, *lines))
    return ''.join((first, '|---' * len(head) + '|\n', *rest))


def interval(differences: list[float]) -> str:
    """Returns the mean and its 95 % t interval as text. The text is bold if the interval does not contain 0."""
    if len(differences) < 2:
        return f'{mean(differences):+.3f}'
    low, high = bounds(differences)
    text = f'{mean(differences):+.3f} [{low:+.3f}, {high:+.3f}]'
    return text if low <= 0 <= high else f'**{text}**'


def targets(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Returns a line of cells for each target: the claim, the length, what was measured, what was asked for, and the
    number of seeds.

    Args:
        results: the results of each row, by its name.
    """
    lines = []
    for name, found in results.items():
        row = ROWS[name]
        if not found:
            continue
        if isinstance(row, LanguageRow):
            gains = [result['gain'] for result in found]
            cells = [row.claim, '', f'{interval(gains)} bits per byte ({min(gains):+.3f})', asked_gain(row, gains)]
            lines.append([*cells, f'{len(found)}'])
            continue
        for length in [*row.targets, *row.limits]:
            if str(length) not in found[0]['curve']:
                continue
            shares = [result['curve'][str(length)] for result in found]
            tokens = f'{length * row.task().segment_length:,} tokens'
            cells = [tokens, mean_and_worst(row, length, shares), asked_of(row, length, mean(shares)), f'{len(found)}']
            lines.append([row.claim, *cells])
    return lines


def mean_and_worst(row: TaskRow, length: int, shares: list[float]) -> str:
    """Returns the mean over the seeds with the worst seed in brackets. If a row asks for a low accuracy, the worst is
    the highest.

    Args:
        row: the row.
        length: number of segments.
        shares: the accuracy on each seed.
    """
    return f'{mean(shares):.3f} ({(max if length in row.limits else min)(shares):.3f})'


def asked_gain(row: LanguageRow, gains: list[float]) -> str:
    """Returns the target of a byte row, with a note if it is missed or if the seeds cannot decide it.

    Args:
        row: the row.
        gains: the gain over the twin on each seed, in bits per byte.
    """
    text = asked(mean(gains), at_least=row.target)
    return f'{text} (undecided)' if len(gains) > 1 and bounds(gains)[0] < row.target <= mean(gains) else text


def asked_of(row: TaskRow, length: int, share: float) -> str:
    """Returns the target of a row at a length, with a note if it is missed.

    Args:
        row: the row.
        length: number of segments.
        share: the accuracy.
    """
    return asked(share, at_least=row.targets.get(length), at_most=row.limits.get(length))


def asked(value: float, at_least: float | None = None, at_most: float | None = None) -> str:
    """Returns a target as text, with a note if it is missed. The text is empty if there is no target.

    Args:
        value: the measured value.
        at_least: the lowest value that is asked for. Default: None.
        at_most: the highest value that is asked for. Default: None.
    """
    if at_least is not None:
        return f'at least {at_least:.2f}{" (missed)" if value < at_least else ""}'
    if at_most is not None:
        return f'at most {at_most:.2f}{" (missed)" if value > at_most else ""}'
    return ''
