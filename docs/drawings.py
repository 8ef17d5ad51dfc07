"""Draws the idea of the library and the kinds of back-propagation, as SVG for a light and for a dark background.

    python docs/drawings.py                   # docs/drawings/*.svg
    python docs/drawings.py --png FOLDER      # the same as PNG with a background, to look at

Units are those of the axes: a token is a square of side 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).resolve().parent / 'drawings'
THEMES = {
    'light': dict(ink='#24292f', faint='#8c959f', line='#d0d7de', text='#4493f8', memory='#e8833a', block='#f3f4f6',
                  gradient='#cf222e', paper='#ffffff'),
    'dark': dict(ink='#e6edf3', faint='#8b949e', line='#484f58', text='#4493f8', memory='#f0954f', block='#262c36',
                 gradient='#ff7b72', paper='#0d1117'),
}  # fmt: skip


class Drawing:
    """A figure without axes, in the colours of a theme.

    Args:
        theme: the name of a theme.
        width: width in units.
        height: height in units.
        unit: inches of a unit.
    """

    def __init__(self, theme: str, width: float, height: float, unit: float = 0.3):
        self.colors = THEMES[theme]
        self.figure = Figure(figsize=(width * unit, height * unit))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis('off')

    def token(self, x: float, y: float, color: str, *, full: bool = True, side: float = 0.78) -> None:
        """Draws a token whose lower left corner is at x, y. It is only an outline unless it is full."""
        face = self.colors[color] if full else 'none'
        self.axes.add_patch(
            FancyBboxPatch((x + 0.11, y + 0.11), side, side, boxstyle='round,pad=0,rounding_size=0.16',
                           facecolor=face, edgecolor=self.colors[color], linewidth=1.3)
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, label: str = '', **options: Any) -> None:
        """Draws a rounded box with a label in its middle."""
        style = dict(facecolor=self.colors['block'], edgecolor=self.colors['line'], linewidth=1.2) | options
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle='round,pad=0,rounding_size=0.25', **style))
        self.text(x + width / 2, y + height / 2, label)

    def arrow(self, start: tuple[float, float], stop: tuple[float, float], color: str, **options: Any) -> None:
        """Draws an arrow from start to stop."""
        style = dict(arrowstyle='-|>', mutation_scale=11, linewidth=1.6, shrinkA=0, shrinkB=0) | options
        self.axes.add_patch(FancyArrowPatch(start, stop, color=self.colors[color], **style))

    def path(self, points: list[tuple[float, float]], color: str) -> None:
        """Draws lines through points; the last one is an arrow."""
        xs, ys = zip(*points[:-1], strict=True)
        self.axes.plot(xs, ys, color=self.colors[color], linewidth=1.6, solid_joinstyle='round')
        self.arrow(points[-2], points[-1], color)

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Writes words around x, y."""
        style = dict(color='ink', fontsize=9.5, ha='center', va='center') | options
        style['color'] = self.colors[style['color']]
        self.axes.text(x, y, words, **style)

    def matrix(self, x: float, y: float, cells: int = 4, side: float = 0.36) -> None:
        """Draws a memory as a matrix, with its normaliser as a row below it."""
        for row in range(cells):
            for column in range(cells):
                shade = 0.35 + 0.6 * ((3 * row + 5 * column + row * column) % 7) / 6
                self.axes.add_patch(
                    Rectangle((x + column * side, y + row * side), side, side, facecolor=self.colors['memory'],
                              alpha=shade, edgecolor=self.colors['paper'], linewidth=0.6)
                )  # fmt: skip


def idea(theme: str) -> Figure:
    """Draws three segments, and what each of the two models carries from one to the next."""
    draw = Drawing(theme, 35.4, 24.2)
    starts = [0.6, 12.2, 23.8]

    draw.text(0.5, 23.4, 'Recurrent Memory Transformer', ha='left', fontsize=13, weight='bold')
    words = 'The state is a few memory tokens. What a segment writes at its end, the next one reads first.'
    draw.text(0.5, 22.3, words, ha='left', color='faint')
    for number, x in enumerate(starts):
        y = 15.2
        for i in range(2):
            draw.token(x + i, y, 'memory', full=number > 0)
            draw.token(x + 7 + i, y, 'memory', full=False)
        for i in range(5):
            draw.token(x + 2 + i, y, 'text')
        draw.box(x, y + 1.5, 9, 2.4, 'transformer')
        draw.arrow((x + 4.5, y + 1.02), (x + 4.5, y + 1.45), 'faint')
        draw.arrow((x + 4.5, y + 3.95), (x + 4.5, y + 4.75), 'faint')
        draw.text(x + 4.5, y + 5.25, 'next tokens', color='faint')
        for i in range(2):
            draw.token(x + 7 + i, y + 4.75, 'memory')
        draw.arrow((x + 8, y + 3.95), (x + 8, y + 4.75), 'memory')
        stop = x + 12.6 if number < 2 else x + 10.6
        if number < 2:
            draw.path(
                [(x + 9.05, y + 5.25), (x + 10.3, y + 5.25), (x + 10.3, y - 0.75), (stop, y - 0.75), (stop, y)],
                'memory',
            )
        else:
            draw.arrow((x + 9.05, y + 5.25), (stop, y + 5.25), 'memory')
    draw.text(starts[0] + 1, 14.45, 'read', color='memory')
    draw.text(starts[0] + 4.5, 14.45, 'text of the segment', color='text')
    draw.text(starts[0] + 8, 14.45, 'write', color='memory')

    draw.axes.plot([0.5, 34.9], [12.9, 12.9], color=draw.colors['line'], linewidth=1)

    draw.text(0.5, 11.9, 'Infini-Transformer', ha='left', fontsize=13, weight='bold')
    words = 'The state is a matrix in every head of every layer. A layer recalls from it, then writes its segment.'
    draw.text(0.5, 10.8, words, ha='left', color='faint')
    for number, x in enumerate(starts):
        y = 2.1
        for i in range(8):
            draw.token(x + i, y, 'text')
        for layer in range(2):
            bottom = y + 1.5 + 2.9 * layer
            draw.box(x, bottom, 8, 2.1, f'layer {layer + 1}')
            draw.arrow((x + 4, bottom - 0.75 + 0.27 * (layer == 0)), (x + 4, bottom - 0.05), 'faint')
            draw.arrow((x + 8.05, bottom + 1.05), (x + 8.95, bottom + 1.05), 'memory')
            draw.matrix(x + 9.05, bottom + 0.33)
            if number < 2:
                draw.arrow((x + 10.6, bottom + 1.05), (x + 11.55, bottom + 1.05), 'memory')
        draw.arrow((x + 4, y + 6.55), (x + 4, y + 7.3), 'faint')
        draw.text(x + 4, y + 7.75, 'next tokens', color='faint')
        draw.text(x + 4, 1.45, ('segment 1', 'segment 2', 'segment 3')[number])
    draw.text(starts[2] + 9.77, 2.75, 'and so on', color='memory', fontsize=9)
    draw.axes.plot([0.7, 13.9], [0.6, 0.6], color=draw.colors['faint'], linewidth=1.1)
    draw.text(17.7, 0.6, 'a text of any length, read once', color='faint')
    draw.arrow((21.5, 0.6), (34.7, 0.6), 'faint', linewidth=1.1)
    return draw.figure


def backprop(theme: str) -> Figure:
    """Draws which segments are held and how far the gradient goes, for each kind of back-propagation."""
    draw = Drawing(theme, 36.6, 25)
    rows = [
        ('one graph', 'loss.backward()', range(6), (), 'exact', 'everything:\ngrows with the text'),
        ('recompute=True, or memory replay (backward=True)', 'read once without a graph, then again from the end',
         (3,), (), 'exact', 'the states, and\none segment'),
        ('the same, with segments_per_pass=2', 'a window of two segments at a time', (2, 3), (), 'exact',
         'the states, and\none window'),
        ('backprop_segments=2', 'the state is cut off after every second segment', (2, 3), (1, 3), 'truncated',
         'with backward=True:\nat most two segments'),
    ]  # fmt: skip
    draw.text(29.4, 24.2, 'gradients', color='faint')
    draw.text(33.6, 24.2, 'held', color='faint')
    for number, (name, note, held, cuts, gradients, memory) in enumerate(rows):
        y = 19.0 - 5.4 * number
        draw.text(0.6, y + 3.9, name, ha='left', weight='bold', fontsize=10.5)
        draw.text(0.6, y + 3.0, note, ha='left', color='faint')
        draw.text(29.4, y + 1, gradients)
        draw.text(33.6, y + 1, memory)
        for segment in range(6):
            x = 0.6 + 4.6 * segment
            full = segment in held
            edge = draw.colors['text' if full else 'faint']
            draw.box(x, y, 3, 2, f'{segment + 1}', facecolor=draw.colors['text'] if full else 'none', edgecolor=edge,
                     linestyle='-' if full else (0, (3, 2)))  # fmt: skip
            if segment == 5:
                continue
            draw.arrow((x + 3.05, y + 1.35), (x + 4.55, y + 1.35), 'memory')
            if segment in cuts:
                for side in (-1, 1):
                    draw.axes.plot([x + 3.8 - 0.28, x + 3.8 + 0.28], [y + 0.6 - 0.28 * side, y + 0.6 + 0.28 * side],
                                   color=draw.colors['faint'], linewidth=1.6)  # fmt: skip
            else:
                draw.arrow((x + 4.55, y + 0.6), (x + 3.05, y + 0.6), 'gradient')
    y = 0.75
    draw.box(0.6, y - 0.35, 1.1, 0.75, facecolor=draw.colors['text'], edgecolor=draw.colors['text'])
    draw.text(2.0, y, 'activations held at this moment', ha='left')
    draw.arrow((13.2, y), (14.8, y), 'memory')
    draw.text(15.1, y, 'state', ha='left')
    draw.arrow((19.6, y), (18.0, y), 'gradient')
    draw.text(19.9, y, 'gradient of the state', ha='left')
    return draw.figure


def main(png: str | None = None) -> None:
    """Draws all, for both backgrounds."""
    matplotlib.rcParams.update({'svg.hashsalt': 'drawings', 'font.family': 'DejaVu Sans', 'svg.fonttype': 'path'})
    for draw in (idea, backprop):
        for theme in THEMES:
            figure, name = draw(theme), f'{draw.__name__}-{theme}'
            if png:
                figure.savefig(Path(png) / f'{name}.png', dpi=110, facecolor=THEMES[theme]['paper'])
            else:
                FOLDER.mkdir(exist_ok=True)
                figure.savefig(FOLDER / f'{name}.svg', transparent=True, metadata={'Date': None})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--png', metavar='FOLDER', help='write PNG files into this folder instead')
    main(**vars(parser.parse_args()))
