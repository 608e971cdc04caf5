"""How help is laid out: options under headings, commands in the order of work, and what follows from the head kinds."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import click

from featprobe.kinds import KINDS, SEEDS, SOLVED, TASKS, HeadKind, kinds_of
from featprobe.scores import SCORES

REST = "Other options"


class Option(click.Option):
    """An option with the heading that it stands under in help; "" for none."""

    def __init__(self, *arguments: Any, heading: str = "", **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.heading = heading


def under(heading: str) -> Callable[..., Callable[[Any], Any]]:
    """`click.option` for options that stand under this heading."""
    return partial(click.option, cls=Option, heading=heading)


class Grouped(click.Command):
    """A command whose help shows its options under their headings, in the order in which these first occur."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading with its options; the options without a heading come last."""
        found: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            heading = param.heading if isinstance(param, Option) else ""
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                found.setdefault(heading or REST, []).append(record)
        for heading in sorted(found, key=lambda name: name == REST):
            with formatter.section(heading):
                formatter.write_dl(found[heading])


class InOrder(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)


def listed(names: Iterable[str]) -> str:
    """Names as a person writes them.

    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def by_kind(value: Callable[[HeadKind], object], kinds: Iterable[HeadKind]) -> str:
    """A default of these kinds of heads; with their names where it differs between them.

    >>> by_kind(lambda kind: kind.width, [kind for kind in KINDS.values() if kind.width and kind.task != "instseg"])
    '128 (upsample), 64 (fcos, fasterrcnn)'
    >>> by_kind(lambda kind: kind.pooled, [KINDS["semseg", "linear"], KINDS["classify", "linear"]])
    'False (linear of semseg), True (linear of classify)'
    """
    found: dict[str, list[str]] = {}
    for kind in kinds:
        several = sum(name == kind.name for _, name in KINDS) > 1
        found.setdefault(str(value(kind)), []).append(f"{kind.name} of {kind.task}" if several else kind.name)
    return ", ".join(f"{text} ({', '.join(names)})" if len(found) > 1 else text for text, names in found.items())


TRAINED = [kind for kind in KINDS.values() if kind.live]
DENSE = [kind for kind in TRAINED if SCORES[kind.task].dense]
ON_IMAGES = [task for task in TASKS if SCORES[task].on == "images"]
OF_UNITS = [task for task in TASKS if SCORES[task].on in ("images", "anomalies")]
"""Tasks that judge whole images, or tiles."""
DRAWN = [kind.name for kind in KINDS.values() if kind.drawn]
ON_MAPS = [kind.name for kind in KINDS.values() if SCORES[kind.task].on == "anomalies" and not kind.pooled]
"""Kinds of heads that --coreset and --remove-position are for."""
ALL_KINDS = "; ".join(f"{task}: {', '.join(kinds_of(task))}" for task in TASKS)
ALL_TASKS = listed(TASKS)
SEEDS_TEXT = f"{SEEDS}; 1 for {listed(SOLVED)} on all training images"


def default_of(name: str) -> str:
    """The default of a field of TrainRecipe, in brackets as click writes defaults.

    >>> default_of("loss")
    '[default: ce]'
    """
    dense = name in ("loss", "loss_at", "class_weights")
    return f"[default: {by_kind(lambda kind: getattr(kind.recipe, name), DENSE if dense else TRAINED)}]"


def default_width() -> str:
    """Channels of the kinds of heads that have a pyramid."""
    return f"[default: {by_kind(lambda kind: kind.width, [kind for kind in KINDS.values() if kind.width])}]"
