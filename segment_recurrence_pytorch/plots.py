"""Plots of a training run. They need matplotlib, which the extra `train` of the package installs."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.checks import is_number
from segment_recurrence_pytorch.metrics import read_metrics


def plot_losses(folder: Path, levels: dict[str, float]) -> None:
    """Plots the training losses in metrics.jsonl as loss.png.

    Steps whose line is missing or incomplete are left out.

    Args:
        folder: the folder of the run.
        levels: bits per byte by name. Each is drawn as a horizontal line. The validation comes first.
    """
    lines = read_metrics(folder / 'metrics.jsonl')
    lines = [line for line in lines if is_number(line.get('bits')) and is_number(line.get('bytes'))]
    megabytes = torch.tensor([line['bytes'] for line in lines]).cumsum(0) / 1e6
    bits = torch.tensor([line['bits'] for line in lines])
    width = max(1, len(bits) // 100)
    smooth = bits[: len(bits) // width * width].view(-1, width).mean(1)
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    axes.plot(megabytes, bits, color='tab:blue', alpha=0.25, linewidth=0.8)
    axes.plot(megabytes[width - 1 :: width][: len(smooth)], smooth, color='tab:blue', label='training')
    for (name, value), style in zip(levels.items(), ('-', ':', '--', '-.'), strict=False):
        color = 'tab:red' if name == 'validation' else 'gray'
        axes.axhline(value, color=color, linestyle=style, linewidth=1, label=f'{name} {value:.3f}')
    axes.set(xlabel='megabytes read', ylabel='bits per byte', title=folder.name, ylim=(0, 8.5))
    axes.legend()
    _write(figure, folder / 'loss.png')


def plot_memory_shares(folder: Path) -> None:
    """Plots, as memory_shares.png, the share that the memory has in the output of each head at each training step.

    Figure 3 of arXiv 2404.07143 shows these shares at the end of a training. Steps whose line is missing or incomplete
    are left out.

    Args:
        folder: the folder of the run.
    """
    lines = [line for line in read_metrics(folder / 'metrics.jsonl') if 'memory_shares' in line]
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    shares = torch.tensor([line['memory_shares'] for line in lines])  # (steps, depth, heads)
    for layer in range(shares.shape[1] if lines else 0):
        for head in range(shares.shape[2]):
            label = f'layer {layer}' if head == 0 else None
            axes.plot([line['step'] for line in lines], shares[:, layer, head], color=f'C{layer}', label=label)
    axes.set(xlabel='step', ylabel="memory's share, 1 - sigmoid(gate)", ylim=(0, 1), title=folder.name)
    if lines:
        axes.legend(title='one line a head')
    _write(figure, folder / 'memory_shares.png')


def _write(figure: Figure, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format='png')
