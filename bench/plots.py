"""Curves as PNG (matplotlib) and as text, from the same points."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 64, 16
MARKS = "*o+x#@%&"


@dataclass(frozen=True, slots=True)
class Plot:
    """``curves``: points (x, y) by name. ``bars``: x is a name, not a number, and the curves are stacked."""

    name: str  # of the files
    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = True
    bars: Sequence[str] = ()


def save(plot: Plot, directory: Path) -> None:
    """``name.png`` and ``name.txt``."""
    (directory / f"{plot.name}.txt").write_text(text(plot))
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display; large imports
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.bars:
        left = [0.0] * len(plot.bars)
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for name, points in plot.curves.items():
            values = [y for _, y in points]
            axes.barh(list(plot.bars), values, left=left, label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set(xlabel=plot.y, ylabel="")
    else:
        for name, points in plot.curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.grid(alpha=0.3)
        if plot.logarithmic:
            axes.loglog()
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(directory / f"{plot.name}.png", dpi=110)


def text(plot: Plot) -> str:
    """The plot in characters, for terminals and for readers who cannot see the image."""
    return f"{plot.title}\n\n{_bars(plot) if plot.bars else _grid(plot)}"


def _bars(plot: Plot) -> str:
    totals = [sum(points[i][1] for points in plot.curves.values()) for i in range(len(plot.bars))]
    lines = []
    for i, bar in enumerate(plot.bars):
        lines.append(f"{bar}: {totals[i]:.0f} {plot.y}")
        for name, points in plot.curves.items():
            value = points[i][1]
            lines.append(f"  {name:<24} {value:7.1f} {'#' * round(value / max(totals) * WIDTH)}")
    return "\n".join(lines) + "\n"


def _grid(plot: Plot) -> str:
    scale = math.log10 if plot.logarithmic else float
    points = [point for curve in plot.curves.values() for point in curve]
    xs, ys = ([scale(p[i]) for p in points] for i in (0, 1))
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    grid = [[" "] * (WIDTH + 1) for _ in range(HEIGHT + 1)]
    for mark, curve in zip(MARKS, plot.curves.values(), strict=False):
        for x, y in curve:
            column = round((scale(x) - left) / (right - left or 1) * WIDTH)
            row = round((scale(y) - low) / (high - low or 1) * HEIGHT)
            grid[HEIGHT - row][column] = mark
    extremes = {0: f"{max(p[1] for p in points):.4g}", HEIGHT: f"{min(p[1] for p in points):.4g}"}
    lines = [f"{extremes.get(i, ''):>10} |{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    first, last = f"{min(p[0] for p in points):.4g}", f"{max(p[0] for p in points):.4g}"
    axis = f"{'':>10} +{'-' * WIDTH}\n{'':>12}{first}{last:>{WIDTH - len(first)}}   {plot.x}; y: {plot.y}"
    legend = "   ".join(f"{mark} {name}" for mark, name in zip(MARKS, plot.curves, strict=False))
    return "\n".join((*lines, axis, legend)) + "\n"
