"""Pages from templates: one file each that holds all it shows. No script, no request.

Whatever a template prints is escaped, and its control characters are shown as such; only plots, which are SVG of
`report.plots`, go in as they are.
"""

import base64
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from featprobe.errors import FileKindError
from featprobe.io.disk import below, read_regular
from featprobe.io.texts import printable

TEMPLATES = Path(__file__).parent / "templates"
PNG_START, LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 1 << 26  # bytes


@dataclass(frozen=True)
class Grid:
    """A table as pages show it. columns: the name of each, and its kind.

    kinds: "words", "marks"; "whole" for intervals, which no line breaks; "" for other figures.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, table: pd.DataFrame, words: Collection[str] = ()) -> "Grid":
        """A table of texts. words: columns that are read, not compared."""
        kinds = (
            "marks" if name == "marks" else "words" if name in words else "whole" if name.startswith("95 %") else ""
            for name in map(str, table.columns)
        )
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
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """A value as it is printed: a text with its control characters escaped, or markup that a template made."""
    return value if hasattr(value, "__html__") else printable(str(value))
