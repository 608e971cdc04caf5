"""A plot of a probability of detection: the curve with its band, a90 with its bound, hits and misses as ticks."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from featprobe.errors import figures
from featprobe.report.plots import COLOURS, INK, canvas, svg_of

Floats = Sequence[float]
LOOKS = ((COLOURS[0], "-"), (COLOURS[1], "--"), (COLOURS[3], ":"))  # of the lines


@dataclass(frozen=True)
class PodLine:
    """A curve: shares in [0, 1] at ascending sizes; low and high are its band, or empty."""

    label: str
    sizes: Floats
    share: Floats
    low: Floats = ()
    high: Floats = ()


@dataclass(frozen=True)
class PodPicture:
    """What is drawn. lines: the first has a90 and its bound; others are drawn without a band. hits, misses: sizes of
    the targets. a90, bound: sizes; None where there is none, or it is infinite. axis: name and unit of the size.
    """

    lines: Sequence[PodLine]
    hits: Floats
    misses: Floats
    a90: float
    bound: float | None
    axis: str


def pod_plot(drawn: PodPicture, name: str) -> str:
    """A POD curve as SVG: hits are ticks above it, misses ticks below. name: for screen readers."""
    with canvas(3.3 + 0.2 * (len(drawn.lines) + 3)) as (figure, axes):
        axes.axhline(90, color=INK, linewidth=0.8, alpha=0.4)
        for i, line in enumerate(drawn.lines):
            colour, dash = LOOKS[i % len(LOOKS)]
            axes.plot(line.sizes, [100 * p for p in line.share], dash, color=colour, linewidth=2, label=line.label)
            if i == 0 and line.low:
                low, high = ([100 * p for p in side] for side in (line.low, line.high))
                axes.fill_between(line.sizes, low, high, color=colour, alpha=0.18, linewidth=0)
        _mark(axes, drawn, max(line.sizes[-1] for line in drawn.lines))
        _ticks(axes, drawn.hits, 103, 110, f"{len(drawn.hits)} found (ticks above)", COLOURS[2])
        _ticks(axes, drawn.misses, -10, -3, f"{len(drawn.misses)} missed (ticks below)", COLOURS[4])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(-12, 112)
        axes.set_yticks([0, 25, 50, 75, 90, 100])
        axes.set_ylabel("found, percent")
        axes.set_xlabel(drawn.axis)
        axes.grid(color=INK, alpha=0.12)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9, ncols=1)
        return svg_of(figure, name)


def _ticks(axes: Axes, sizes: Floats, low: float, high: float, label: str, colour: str) -> None:
    """A tick for each size, all of them seen where they are few, dense where they are many."""
    alpha = min(0.9, max(0.15, 40 / max(len(sizes), 1)))
    axes.vlines(sizes, low, high, color=colour, linewidth=1, alpha=alpha)
    axes.plot([], [], color=colour, marker="|", linestyle="", markersize=9, label=label)


def _mark(axes: Axes, drawn: PodPicture, last: float) -> None:
    """a90 as a dot, and a bar from it to its bound; what lies beyond the last size is in words alone."""
    label = "a90 beyond these sizes"
    if drawn.a90 <= last:
        label = f"a90 {figures(drawn.a90)}"
        axes.plot([drawn.a90], [90], "o", color=INK, markersize=6)
    if drawn.bound is not None and drawn.a90 <= last:
        inside = drawn.bound <= last
        label += f", bar to a90/95 {figures(drawn.bound)}" if inside else ", a90/95 beyond these sizes"
        axes.plot([drawn.a90, min(drawn.bound, last)], [90, 90], color=INK, linewidth=2, solid_capstyle="butt")
        axes.plot([min(drawn.bound, last)], [90], "|" if inside else ">", color=INK, markersize=12 if inside else 7)
    marker = "o" if drawn.a90 <= last else ""
    axes.plot([], [], color=INK, marker=marker, linestyle="", markersize=6, label=label)
