"""The first screen of the page of results: what the memories are worth, and what was not reached."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks import text
from benchmarks.evidence.rows import MILLION, ROWS, TITLES, LanguageRow, TaskRow
from benchmarks.evidence.tables import interval, mean_and_worst, prose, table, targets
from benchmarks.intervals import bounds

Texts = dict[tuple[int, str], list[dict[str, Any]]]  # runs of `benchmarks.text`, by length of a segment and arm
EARLIER = ', initial weights of an earlier version of the library'
BYTES = [row for row in ROWS.values() if isinstance(row, LanguageRow)]
LENGTHS = sorted({row.segment_length for row in BYTES})


def summary(results: dict[str, list[dict[str, Any]]], texts: Texts, earlier: Texts) -> list[str]:
    """Returns the parts of the first screen. What has no results is left out.

    Args:
        results: the results of each row, by its name.
        texts: the runs of `benchmarks.text`.
        earlier: those with the initial weights of an earlier version, for what the others do not have.
    """
    parts = []
    if gains := gains_on_bytes(results):
        parts += [prose('text'), table(['model', 'training', *(f'segments of {length}' for length in LENGTHS)], gains)]
        parts.append(f'{longest_gain(results)}\n')
    older = {(at, arm): runs for (at, arm), runs in earlier.items() if arm == 'segments' or (at, arm) not in texts}
    lengths = sorted({at for at, _ in (*texts, *older)})
    cases = [(runs, at, note) for at in lengths for runs, note in ((texts, ''), (older, EARLIER))]
    if longer := [told for runs, at, note in cases if (told := gains_at(runs, at, note))]:
        parts.append(f'{prose("longer").strip()} {" ".join(longer)} {about_runs(texts)}\n')
    if facts := after_a_million(results):
        parts.append(prose('fact') + '\n' + ''.join(f'- {fact}\n' for fact in facts))
    if missed := not_reached(results):
        parts.append('**Not reached**, or not decided by the seeds:\n\n' + ''.join(f'- {each}\n' for each in missed))
    return parts


def gains_on_bytes(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Returns the lines of a table of what a memory saves on text: models and steps by the length of a segment."""
    if not any(results[row.name] for row in BYTES):
        return []
    lines = []
    for model, steps in [(model, steps) for model in TITLES for steps in sorted({row.steps for row in BYTES})]:
        cells = dict.fromkeys(LENGTHS, 'not run')
        for row in BYTES:
            if (row.model, row.steps) == (model, steps) and results[row.name]:
                gains = [result['gain'] for result in results[row.name]]
                cells[row.segment_length] = interval(gains) + f' ({of_seeds(gains)})' * (len(gains) < len(row.seeds))
        lines.append([TITLES[model], f'{steps:,} steps', *cells.values()])
    return lines


def longest_gain(results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns a sentence on the longest segments at which the seeds tell a gain from 0."""
    longest: dict[str, int] = {}
    for row in BYTES:
        gains = [result['gain'] for result in results[row.name]]
        if len(gains) == len(row.seeds) and bounds(gains)[0] > 0:
            longest[row.model] = max(longest.get(row.model, 0), row.segment_length)
    tried = {model: max(row.segment_length for row in BYTES if row.model == model) for model in longest}
    each = [
        f'{length} bytes for {TITLES[model]}' + ', the longest that was tried' * (length == tried[model])
        for model, length in longest.items()
    ]
    return f'The longest segments at which a gain is told from 0 by five seeds: {"; ".join(each) or "none"}.'


def gains_on_text(texts: Texts, length: int, arm: str) -> list[float]:
    """Returns what an arm of `benchmarks.text` saves over segments alone, for each seed that both have.

    Args:
        texts: see `summary`.
        length: number of bytes of a segment.
        arm: a name of `text.LABELS`.
    """
    alone = {run['seed']: run['bits'] for run in texts.get((length, 'segments'), [])}
    own = [] if arm == 'segments' else texts.get((length, arm), [])
    return [alone[run['seed']] - run['bits'] for run in own if run['seed'] in alone]


def gains_at(texts: Texts, length: int, note: str = '') -> str:
    """Returns a sentence on the gains of all arms of `benchmarks.text` at a length of segments, if there are any.

    Args:
        texts: see `summary`.
        length: number of bytes of a segment.
        note: what is said of the runs behind the length. Default: '', nothing.
    """
    found = {arm: gains_on_text(texts, at, arm) for at, arm in texts if at == length}
    each = [f'{text.LABELS[arm]} {interval(gains)} ({of_seeds(gains)})' for arm, gains in found.items() if gains]
    return f'Segments of {length}{note}: {"; ".join(each)}.' if each else ''


def about_runs(texts: Texts) -> str:
    """Returns how many runs of `benchmarks.text` there are, and what that means."""
    done = sum(map(len, texts.values()))
    about = f'{done} of {len(text.RUNS)} runs are done.'
    return about + ('' if done == len(text.RUNS) else ' What one seed says is not decided.')


def not_reached(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns a line for each row with targets that were missed or are not decided, or with scores below a paper's."""
    lines: dict[str, list[str]] = {}
    for claim, at, measured, asked, _ in targets(results):
        if '(missed)' in asked or '(undecided)' in asked:
            lines.setdefault(claim, []).append(f'{measured}{at and f" at {at}"}, asked for {asked}')
    for name, found in results.items():
        row = ROWS[name]
        if not isinstance(row, TaskRow) or not found:
            continue
        for length, published in row.paper.items():
            shares = [result['curve'][f'{length}'] for result in found if f'{length}' in result['curve']]
            if shares and round(mean(shares), 2) < published:
                measured = mean_and_worst(row, length, shares)
                lines.setdefault(row.claim, []).append(f'{measured} at {length} segments, published {published:.2f}')
    return [f'{claim}: {"; ".join(each)}' for claim, each in lines.items()]


def after_a_million(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns a line for each task row that was asked after a million tokens."""
    lines = []
    for name, found in results.items():
        row = ROWS[name]
        if isinstance(row, TaskRow) and found and f'{MILLION}' in found[0]['curve']:
            shares = [result['curve'][f'{MILLION}'] for result in found]
            about = f'{mean_and_worst(row, MILLION, shares)}, {of_seeds(shares)}, {row.steps:,} steps'
            lines.append(f'{row.label or row.claim}: {about}')
    return lines


def of_seeds(values: list[float]) -> str:
    """Returns the number of seeds as text."""
    return f'{len(values)} seed{"s" * (len(values) != 1)}'
