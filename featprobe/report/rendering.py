"""Pages from templates: one file each that holds all it shows. No script, no request.

Whatever a template prints is escaped, and its control characters are shown as such; only plots, which are SVG of
`report.plots`, go in as they are.
"""

import base64
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from featprobe.errors import FileKindError
from featprobe.io.disk import below, read_regular
from featprobe.io.texts import printable

TEMPLATES = Path(__file__).parent / "templates"
PNG_START, LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 1 << 26  # bytes


OPTION = re.compile(r"(?<![^\s(])(?:featprobe [a-z]+ )?--[a-z][a-z-]*[a-z](?: \d+| [a-z]+(?=[.,;)]))?")


@dataclass(frozen=True)
class Grid:
    """A table as pages show it. columns: the name of each, and its kind.

    kinds: "words"; "marks" and "phrases", which go on in the next line; "whole" for intervals, which no line breaks;
    "" for other figures.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, table: pd.DataFrame, words: Collection[str] = (), phrases: Collection[str] = ()) -> "Grid":
        """A table of texts. words, phrases: columns that are read, not compared."""

        def kind(name: str) -> str:
            if name == "marks":
                return name
            if name in words or name in phrases:
                return "words" if name in words else "phrases"
            return "whole" if name.startswith("95 %") else ""

        kinds = map(kind, map(str, table.columns))
        rows = tuple(tuple(map(str, row)) for row in table.itertuples(index=False))
        return cls(tuple(zip(map(str, table.columns), kinds, strict=True)), rows)


@dataclass(frozen=True)
class Picture:
    """A picture in a page. data: a PNG in base64. fault: why it is not shown; then there is no data."""

    caption: str
    data: str = ""
    fault: str = ""

    @classmethod
    def read(cls, caption: str, path: Path) -> "Picture":
        """The PNG of a file."""
        try:
            found = read_regular(below(path.parent, path.name, "The picture"), LARGEST_PICTURE)
            if not found.startswith(PNG_START):
                raise FileKindError(f"{path} is no PNG.")
        except FileKindError as error:
            return cls(caption, fault=str(error))
        return cls.of(caption, found)

    @classmethod
    def of(cls, caption: str, png: bytes) -> "Picture":
        """The bytes of a PNG file."""
        return cls(caption, base64.b64encode(png).decode())


def render(template: str, **values: Any) -> str:
    """The text of a page. Raises jinja2.UndefinedError for a template that prints what it was not given."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["prose"] = _prose
    return made


def _shown(value: Any) -> Any:
    """A value as it is printed: a text with its control characters escaped, or markup that a template made."""
    return value if hasattr(value, "__html__") else printable(str(value))


def _prose(text: str) -> Markup:
    """A sentence as a page shows it: an option of the command line is code, and a figure stays with its unit.

    >>> _prose("at <95 % needs --seeds 3.")
    Markup('at &lt;95\\xa0% needs <code>--seeds 3</code>.')
    """
    own = re.sub(r"(?<=\d) (?=(?:%|px)(?!\w))", "\u00a0", str(escape(printable(text))))
    return Markup(OPTION.sub(r"<code>\g<0></code>", own))
