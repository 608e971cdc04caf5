"""Plots as inline SVG that needs nothing from outside and takes the colours of the page that it stands in."""

import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

WIDTH = 4.6  # inches: as wide as a phone, so that text keeps its size there; labels are folded to fit it
LINE = 0.15  # inches, of a label's text
INK = "#010203"  # stands for the page's own text colour until the SVG is written
COLOURS = ("#2f7ed8", "#e07b00", "#2a9d5c", "#c64fb5", "#d1443c", "#8a7f00", "#159aa8", "#7a6be0")
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "featprobe",  # the same plot, the same bytes
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 10,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Dot:
    """A value with its interval, in percent; low and high are nan where there is none. hue: dots of one are alike."""

    label: str
    value: float
    low: float
    high: float
    hue: str


@dataclass(frozen=True)
class Series:
    """A line of a plot, y in percent; low and high, where given, are intervals of its points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def dot_plot(dots: Sequence[Dot], axis: str, name: str) -> str:
    """Values and their intervals, one below the other, each under its label. name: for screen readers."""
    hues = list(dict.fromkeys(dot.hue for dot in dots))
    labels = [textwrap.fill(dot.label, 64) for dot in dots]
    row = 0.35 + LINE * max(label.count("\n") + 1 for label in labels)  # inches
    with canvas(row * len(dots) + 0.7) as (figure, axes):
        for place, dot in enumerate(dots):
            colour = COLOURS[hues.index(dot.hue) % len(COLOURS)]
            axes.plot([dot.low, dot.high], [-place, -place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([dot.value], [-place], "o", color=colour, markersize=7)
            at = axes.get_yaxis_transform()
            axes.text(0, -place + 0.12 / row, labels[place], transform=at, fontsize=9, verticalalignment="bottom")
        axes.set_ylim(-len(dots) + 0.5, 0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=INK, alpha=0.15)
        axes.set_xlabel(axis)
        return svg_of(figure, name)


def line_plot(series: Sequence[Series], x_axis: str, y_axis: str, name: str, shares: bool = False) -> str:
    """Lines with a mark at every point that there is. shares: x is a share of 1, on a logarithmic axis."""
    labels = [textwrap.fill(own.label, 56) for own in series]
    with canvas(3.0 + 0.2 * len(series) + LINE * sum(label.count("\n") for label in labels)) as (figure, axes):
        for i, own in enumerate(series):
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            axes.plot(own.x, own.y, dash, marker="o", markersize=4, color=colour, label=labels[i])
            if own.low is not None and own.high is not None:
                axes.fill_between(own.x, own.low, own.high, color=colour, alpha=0.15, linewidth=0)
        if shares:
            axes.set_xscale("log")
            ticks = sorted({x for own in series for x in own.x})
            axes.set_xticks(ticks, [f"{100 * x:g} %" for x in ticks])
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)
        axes.grid(color=INK, alpha=0.15)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9)
        return svg_of(figure, name)


@contextmanager
def canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot of this height in inches, as wide as all of them, in the style of the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def svg_of(figure: Figure, name: str) -> str:
    """A figure as an SVG element without metadata or addresses. name: makes its ids its own on the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(rf"\b(fill|stroke): {INK}", r"\1: currentColor", text)
    own = "".join(re.findall(r"[a-z0-9]+", name.lower()))
    text = re.sub(r'(<[^<>]*\bid=")', rf"\1{own}-", text)
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\1{own}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)
