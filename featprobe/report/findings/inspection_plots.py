"""Plots of an inspection: defects found against false calls (FROC), and by size."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from featprobe.report.plots import COLOURS, DASHES, INK, LINE, canvas, svg_of

MOST_SIZES = 6  # whose names fit beside each other; those of more take two lines
BANDS = 2  # curves, up to which each shows its band; of more the first alone does
Floats = Sequence[float]


@dataclass(frozen=True)
class FrocCurve:
    """Recall, with its band, at numbers of false calls per image or part, ascending; all recalls in [0, 1].

    at: the false calls and the recall at the operating point. low, high: nan where there is no band.
    """

    label: str
    false_calls: Floats
    recall: Floats
    low: Floats
    high: Floats
    at: tuple[float, float]


@dataclass(frozen=True)
class SizeCurve:
    """Defects of some sizes: how many of so many are found, and the interval of that share; shares in [0, 1].

    sizes: the name of each size, the same for all curves of a plot.
    """

    label: str
    sizes: Sequence[str]
    defects: Sequence[int]
    found: Sequence[int]
    low: Floats
    high: Floats


def froc_plot(curves: Sequence[FrocCurve], per: str, name: str) -> str:
    """Defects found against false calls, with the operating point as a dot. per: "image" or "part"."""
    positive = [x for own in curves for x in (*own.false_calls, own.at[0]) if x > 0]
    least = min(positive, default=1.0) / 2  # stands for none on the logarithmic axis
    labels = _labels(curves)
    with canvas(3.2 + _height(labels)) as (figure, axes):
        for i, own in enumerate(curves):
            colour, dash = _look(i)
            x = [max(least, value) for value in own.false_calls]
            axes.step(x, _percent(own.recall), dash, where="post", color=colour, label=labels[i])
            if i == 0 or len(curves) <= BANDS:
                band = _percent(own.low), _percent(own.high)
                axes.fill_between(x, *band, step="post", color=colour, alpha=0.15, linewidth=0)
            axes.plot([max(least, own.at[0])], [100 * own.at[1]], "o", color=colour, markersize=7, clip_on=False)
        axes.set_xscale("log")
        axes.set_xlim(least, max([*positive, 2 * least]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _shares(axes, "defects found, percent")
        axes.set_xlabel(f"false calls per {per} (● operating point; left edge: none)")
        return svg_of(figure, name)


def size_plot(curves: Sequence[SizeCurve], unit: str, name: str) -> str:
    """Share of the defects found by size, with intervals, and the number of defects of each size."""
    labels = _labels(curves)
    sizes = curves[0].sizes
    with canvas(3.2 + _height(labels)) as (figure, axes):
        for i, own in enumerate(curves):
            colour, dash = _look(i)
            places = [k + 0.5 * ((i + 0.5) / len(curves) - 0.5) for k in range(len(sizes))]
            shares = [100 * found / defects for found, defects in zip(own.found, own.defects, strict=True)]
            axes.vlines(places, _percent(own.low), _percent(own.high), color=colour, linewidth=1.5, alpha=0.7)
            axes.plot(places, shares, dash, marker="o", markersize=5, linewidth=0.8, color=colour, label=labels[i])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        names = [size.replace("–", "–\n") for size in sizes] if len(sizes) > MOST_SIZES else sizes
        counts = zip(names, curves[0].defects, strict=True)
        axes.set_xticks(range(len(sizes)), [f"{name}\n({count})" for name, count in counts], fontsize=9)
        _shares(axes, "defects found, percent")
        axes.set_xlabel(f"size, {unit} (number of defects)")
        return svg_of(figure, name)


def _labels(curves: Sequence[FrocCurve] | Sequence[SizeCurve]) -> list[str]:
    return [textwrap.fill(own.label, 56) for own in curves]


def _height(labels: Sequence[str]) -> float:
    """Inches that a legend of these labels takes."""
    return 0.2 * len(labels) + LINE * sum(label.count("\n") for label in labels)


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _percent(shares: Floats) -> list[float]:
    return [100 * share for share in shares]


def _shares(axes: Axes, label: str) -> None:
    """An axis of percent, a grid, and the legend above."""
    axes.set_ylim(0, 102)
    axes.set_ylabel(label)
    axes.grid(color=INK, alpha=0.15)
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9)
