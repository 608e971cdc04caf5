"""The check of a data set as one HTML page that holds all it shows."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from featprobe.io.disk import write_whole
from featprobe.report.rendering import Grid, Picture, render

LISTED = 200  # entries of a finding on a page


def write_check_page(
    path: Path,
    title: str,
    facts: Sequence[str],
    findings: Sequence[tuple[bool, str, Sequence[str]]],
    tables: Sequence[tuple[str, pd.DataFrame]],
    notes: Sequence[str],
    sheets: Sequence[tuple[str, Path]],
) -> None:
    """Write what was found in a data set. findings: whether it would spoil a study, what it is, its entries.

    Raises DiskError where it can't be written.
    """
    text = render(
        "check.html",
        title=title,
        facts=facts,
        findings=[
            (
                f"{'Would spoil a study: ' if spoils else 'To know: '}{said}",
                entries[:LISTED],
                max(0, len(entries) - LISTED),
            )
            for spoils, said, entries in findings
        ],
        tables=[(heading, Grid.of(table)) for heading, table in tables],
        sheets=[Picture.read(caption, sheet) for caption, sheet in sheets],
        notes=notes,
    )
    write_whole(path, text)
