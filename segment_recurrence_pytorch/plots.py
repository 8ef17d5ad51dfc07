"""Plots of a training run. They need matplotlib, which the extra `train` of the package installs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.checks import is_number
from segment_recurrence_pytorch.compare import Run
from segment_recurrence_pytorch.metrics import read_metrics


def plot_losses(folder: Path, levels: dict[str, float], beside: Sequence[Run] = ()) -> None:
    """Plots the training losses in metrics.jsonl as loss.png.

    Steps whose line is missing or incomplete are left out.

    Args:
        folder: the folder of the run.
        levels: bits per byte by name. Each is drawn as a horizontal line. The validation comes first.
        beside: other runs, of which the mean losses and the validation are drawn, too. Default: none.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    tops = [*levels.values(), _plot_losses_of(axes, folder, 'training', 'tab:blue')]
    for (name, value), style in zip(levels.items(), ('-', ':', '--', '-.'), strict=False):
        color = 'tab:blue' if name == 'validation' else 'gray'
        axes.axhline(value, color=color, linestyle=style, linewidth=1, label=f'{name} {value:.3f}')
    tops += _plot_runs(axes, beside, first_color=1, raw=False)
    axes.set(xlabel='megabytes read', ylabel='bits per byte')
    axes.set_title(_shown(folder), parse_math=False)
    axes.set_ylim(top=1.05 * max(filter(math.isfinite, tops)))
    _add_legend(axes)
    _write(figure, folder / 'loss.png')


def plot_comparison(runs: Sequence[Run], path: Path) -> None:
    """Plots the training losses and the validations of several runs.

    Args:
        runs: the runs.
        path: the PNG to write.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    tops = _plot_runs(axes, runs)
    axes.set(xlabel='megabytes read', ylabel='bits per byte', title='training, and validation as a horizontal line')
    axes.set_ylim(top=1.05 * max(filter(math.isfinite, tops)))
    _add_legend(axes)
    _write(figure, path)


def _plot_runs(axes: Axes, runs: Sequence[Run], first_color: int = 0, raw: bool = True) -> list[float]:
    """Draws runs, and returns the highest values that the axes have to show."""
    tops = []
    names = [run.folder.name for run in runs]
    for i, run in enumerate(runs, first_color):
        name = _shown(run.folder) if names.count(run.folder.name) == 1 else str(run.folder)
        name = f'run {name}' if name.startswith('_') else name  # matplotlib leaves such labels out
        label = f'{name}, validation {run.validation:.3f}'
        tops += [_plot_losses_of(axes, run.folder, label, f'C{i}', raw), run.validation]
        axes.axhline(run.validation, color=f'C{i}', linewidth=1)
    return tops


def _plot_losses_of(axes: Axes, folder: Path, label: str, color: str, raw: bool = True) -> float:
    """Draws the mean of the losses of each hundredth of a run, and the losses themselves behind them.

    Returns:
        The highest mean after the first twentieth of the run, in which every model falls from 8 bits. It is 8 if there
        are no losses.
    """
    lines = read_metrics(folder / 'metrics.jsonl')
    lines = [line for line in lines if is_number(line.get('bits')) and is_number(line.get('bytes'))]
    megabytes = torch.tensor([line['bytes'] for line in lines]).cumsum(0) / 1e6
    bits = torch.tensor([line['bits'] for line in lines])
    width = max(1, len(bits) // 100)
    means = bits[: len(bits) // width * width].view(-1, width).mean(1)
    axes.plot(megabytes[width - 1 :: width][: len(means)], means, color=color, label=label)
    if raw:
        axes.plot(megabytes, bits, color=color, alpha=0.25, linewidth=0.8, scaley=False)
    return means[len(means) // 20 :].max().item() if lines else 8.0


def plot_memory_shares(folder: Path) -> None:
    """Plots, as memory_shares.png, the share that the memory has in the output of each head at each training step.

    Figure 3 of arXiv 2404.07143 shows these shares at the end of a training. Steps whose line is missing or incomplete
    are left out.

    Args:
        folder: the folder of the run.
    """
    lines = [line for line in read_metrics(folder / 'metrics.jsonl') if _form_of(line.get('memory_shares'))]
    lines = [line for line in lines if _form_of(line['memory_shares']) == _form_of(lines[0]['memory_shares'])]
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    shares = torch.tensor([line['memory_shares'] for line in lines])  # (steps, depth, heads)
    for layer in range(shares.shape[1] if lines else 0):
        for head in range(shares.shape[2]):
            label = f'layer {layer}' if head == 0 else None
            axes.plot([line['step'] for line in lines], shares[:, layer, head], color=f'C{layer}', label=label)
    axes.set(xlabel='step', ylabel="memory's share, 1 - sigmoid(gate)", ylim=(0, 1))
    axes.set_title(_shown(folder), parse_math=False)
    if lines:
        axes.legend(title='one line a head')
    _write(figure, folder / 'memory_shares.png')


def _form_of(shares: Any) -> tuple[int, int] | None:
    """Returns the numbers of layers and heads of the shares in a line of the metrics. None if they are not whole."""
    if not isinstance(shares, list) or not shares or not all(isinstance(layer, list) for layer in shares):
        return None
    heads = {len(layer) for layer in shares}
    are_numbers = all(is_number(share) for layer in shares for share in layer)
    return (len(shares), heads.pop()) if are_numbers and len(heads) == 1 else None


def _shown(folder: Path) -> str:
    """Returns the name of a folder as text that can be drawn."""
    return folder.name.encode(errors='replace').decode()


def _add_legend(axes: Axes) -> None:
    """Adds a legend whose labels are shown as they are: a name may hold what means mathematics elsewhere."""
    for text in axes.legend().get_texts():
        text.set_parse_math(False)


def _write(figure: Figure, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format='png')
