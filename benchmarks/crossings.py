"""What follows from times and memory by length: where two curves cross, and their plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FULL = 'full attention'
LENGTHS = tuple(2**k for k in range(10, 21, 2))  # 1,024 to 1,048,576
# what is asked, and the fields of its points that are plotted
QUESTIONS = {
    'training': ('seconds', 'megabytes'),
    'reading': ('seconds', 'megabytes'),
    'decoding': ('seconds', 'bytes'),
}


class Line(NamedTuple):
    """What one line of a plot shows.

    Attributes:
        model: a name in `SEGMENTS`, or `FULL`.
        mode: 'one graph', 'replay' or 'recompute' in training, 'eager' or 'compiled' elsewhere.
        dtype: 'float32' or 'bfloat16': that of autocast in training, else that of the weights.
    """

    model: str
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f'{self.model}, {self.mode}, {self.dtype}'

    @property
    def short(self) -> str:
        """What a page calls it that has one dtype."""
        return f'{self.model}, {self.mode}'.removesuffix(', eager')


def curve(points: list[dict[str, Any]], line: Line, field: str = 'seconds') -> dict[int, float]:
    """Returns a field of the points of a line by length, in order."""
    own = [point for point in points if Line(point['model'], point['mode'], point['dtype']) == line]
    return {point['tokens']: point[field] for point in sorted(own, key=lambda point: point['tokens']) if field in point}


def lines_of(points: list[dict[str, Any]]) -> list[Line]:
    """Returns the lines that have a point."""
    return list(dict.fromkeys(Line(point['model'], point['mode'], point['dtype']) for point in points))


def square(curve: dict[int, float]) -> dict[int, float]:
    """Returns seconds beyond the last length of full attention, from a n + b n^2 with the least relative errors."""
    lengths = torch.tensor(list(curve), dtype=torch.float64)
    seconds = torch.tensor(list(curve.values()), dtype=torch.float64)
    terms = torch.stack((lengths, lengths**2), dim=1) / seconds[:, None]
    a, b = torch.linalg.lstsq(terms, torch.ones(len(seconds), 1, dtype=torch.float64)).solution.flatten().tolist()
    if min(a, b) < 0:  # too noisy to tell the two apart: the square alone, through the last point
        a, b = 0.0, (seconds[-1] / lengths[-1] ** 2).item()
    return {n: a * n + b * n * n for n in LENGTHS if n > max(curve)}


def crossing(ours: dict[int, float], full: dict[int, float], measured_to: int) -> dict[str, Any] | None:
    """Returns from how many tokens on `ours` is below `full`, by interpolation on logarithmic scales.

    Args:
        ours: values by length.
        full: values of full attention by length.
        measured_to: the length after which values of full attention are extrapolated.

    Returns:
        tokens; whether it lies among extrapolated values; and whether it is the shortest length of all, so that the
        crossing may lie before. None if `ours` is above at the longest length, or has no length in common.
    """

    def at(curve: dict[int, float], n: int) -> float:
        known = sorted(curve)
        right = next(i for i, each in enumerate(known) if each >= n)
        if known[right] == n:
            return math.log(curve[n])
        x0, x1 = math.log(known[right - 1]), math.log(known[right])
        y0, y1 = math.log(curve[known[right - 1]]), math.log(curve[known[right]])
        return y0 + (y1 - y0) * (math.log(n) - x0) / (x1 - x0)

    if not ours or not full:
        return None
    low, high = max(min(ours), min(full)), min(max(ours), max(full))
    grid = sorted(n for n in {*ours, *full} if low <= n <= high)
    ahead = [at(full, n) - at(ours, n) for n in grid]
    if not grid or ahead[-1] <= 0:
        return None
    behind = [i for i, each in enumerate(ahead) if each <= 0]
    if not behind:
        return {'tokens': grid[0], 'extrapolated': grid[0] > measured_to, 'from_the_first_length_on': True}
    i = behind[-1]
    share = -ahead[i] / (ahead[i + 1] - ahead[i])
    tokens = round(math.exp(math.log(grid[i]) + share * math.log(grid[i + 1] / grid[i])))
    return {'tokens': tokens, 'extrapolated': tokens > measured_to, 'from_the_first_length_on': False}


def standard(question: str, dtype: str) -> Line:
    """Returns the line of full attention that others are compared with."""
    return Line(FULL, 'one graph' if question == 'training' else 'eager', dtype)


def beyond(points: list[dict[str, Any]], question: str, dtype: str, field: str) -> dict[int, float]:
    """Returns what full attention takes at lengths not measured: seconds by `square`, memory in proportion."""
    full = curve(points, standard(question, dtype), field)
    if question == 'decoding' or len(full) < 2:
        return {}
    if field == 'seconds':
        return square(full)
    most = max(full)
    return {n: full[most] * n / most for n in LENGTHS if n > most}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Returns what the points of a run say together.

    Args:
        results: the points by question.

    Returns:
        crossings: what `crossing` returned, by question, line and field.
        slopes: how many times the time of a token at 16,384 one at the longest length takes, by question and line.
    """
    crossings: dict[str, dict[str, Any]] = {}
    slopes: dict[str, dict[str, Any]] = {}
    for question, fields in QUESTIONS.items():
        points = results[question]
        for line in lines_of(points):
            seconds = curve(points, line)
            per_token = seconds if question == 'decoding' else {n: s / n for n, s in seconds.items()}
            first, last = 2**14, max(seconds)
            if first in seconds and last > first:
                slopes.setdefault(question, {})[str(line)] = {
                    'from': first, 'to': last, 'times': round(per_token[last] / per_token[first], 2)
                }  # fmt: skip
            if line.model == FULL:
                continue
            for field in fields:
                full = curve(points, standard(question, line.dtype), field)
                known = {**full, **beyond(points, question, line.dtype, field)}
                found = crossing(curve(points, line, field), known, max(full, default=0))
                crossings.setdefault(question, {})[f'{line}, {field}'] = found
    return {'crossings': crossings, 'slopes': slopes}


def report(results: dict[str, Any]) -> str:
    """Returns the crossings and the slopes as text, a line each."""
    said = []
    for question, found in results['crossings'].items():
        for name, each in found.items():
            if each is None:
                where = 'not below full attention at the longest length'
            else:
                since = f'{each["tokens"]:,} tokens on'
                if each['from_the_first_length_on']:
                    since = f'the shortest length on, {each["tokens"]:,} tokens'
                where = f'below full attention from {since}' + ', extrapolated' * each['extrapolated']
            said.append(f'{question}: {name}: {where}')
    for question, found in results['slopes'].items():
        for name, each in found.items():
            said.append(
                f'{question}: {name}: a token at {each["to"]:,} takes {each["times"]} times one at {each["from"]:,}'
            )
    return '\n'.join(said)


COLORS = {
    FULL: 'black',
    'RMT': 'tab:blue',
    'Infini': 'tab:orange',
    'Infini, delta rule': 'tab:green',
    'no memory': 'tab:gray',
}
STYLES = {'one graph': '-o', 'eager': '-o', 'replay': '--s', 'recompute': ':^', 'compiled': '--D'}
TITLES = {
    'training': 'Training: forward and backward of one text',
    'reading': 'Reading a prompt, without gradients',
    'decoding': 'A new token, by its position',
}


def plot(files: Sequence[Path], folder: Path) -> list[Path]:
    """Plots each question, and returns the plots: they have the name of the first file, and that of the question.

    Args:
        files: JSON of runs. Where two have the same point, the last one counts. Files that are missing are left out.
        folder: where the plots go.
    """
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    runs = [json.loads(path.read_text()) for path in files if path.exists()]
    main = 'float32' if runs[0]['device'] == 'cpu' else 'bfloat16'
    made = []
    for question, fields in QUESTIONS.items():
        by_point = {
            (point['model'], point['mode'], point['dtype'], point['tokens']): point
            for run in runs for point in run[question]
        }  # fmt: skip
        points = list(by_point.values())
        if not points:
            continue
        figure, both = plt.subplots(1, 2, figsize=(12, 4.8), layout='constrained')
        for axes, field in zip(both, fields, strict=True):
            rate = field == 'seconds' and question != 'decoding'
            unit = {'seconds': 1e3, 'bytes': 2**-20, 'megabytes': 1.0}[field]
            for line in lines_of(points):
                drawn = curve(points, line, field)
                same = line.dtype == main
                axes.plot(
                    list(drawn), [n / value if rate else unit * value for n, value in drawn.items()],
                    STYLES[line.mode], color=COLORS[line.model], markersize=5, linewidth=1.6 if same else 0.8,
                    label=line.short if same else str(line),
                    markerfacecolor=None if same else 'white',
                )  # fmt: skip
            more = beyond(points, question, main, field)
            if more:
                full = curve(points, standard(question, main), field)
                ends = {max(full): full[max(full)], **more}
                values = [n / value if rate else unit * value for n, value in ends.items()]
                axes.plot(list(ends), values, '--', color='black', linewidth=1, label=f'{FULL}, extrapolated')
            what = {'seconds': 'tokens per second' if rate else 'milliseconds per token',
                    'megabytes': 'peak of memory, MB', 'bytes': 'held between tokens, MB'}[field]  # fmt: skip
            axes.set(xscale='log', yscale='log', xlabel='position' if question == 'decoding' else 'tokens', ylabel=what)
            ticks = [n for n in LENGTHS if axes.get_xlim()[0] <= n <= axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f'{n // 1024}k' if n < 2**20 else '1M' for n in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.25)
        handles, labels = both[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside right upper', fontsize=8)
        figure.suptitle(f'{TITLES[question]} ({runs[0]["device"]}, {main})', fontsize=11)
        made.append(folder / f'{files[0].stem}_{question}.png')
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made
