"""What heads find, as tables for people: defects, false calls and parts at the operating point, and by size."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from featprobe.report.comparison import NO_INTERVAL, NONE, interval_text, number

Line = Mapping[str, Any]


def finding_table(findings: Sequence[Line]) -> pd.DataFrame:
    """Defects and parts, a row for each head; shares in percent."""
    table = pd.DataFrame([_cells(own) for own in findings]).fillna(NONE)
    usual = {"least area, px": {"1"}, "seed": {"0"}, "head": set()}
    nothing = {NONE, NO_INTERVAL}
    return table.drop(columns=[name for name in table if set(table[name]) <= usual.get(str(name), nothing)])


def _cells(own: Line) -> dict[str, str]:
    unit = "parts" if own["parts_known"] else "images"
    good = own["good_parts"]
    return {
        "backbone": own["backbone"],
        "found": _share(own["found"], own["defects"]),
        "95 %": interval_text(own["recall_low"], own["recall_high"]),
        "regime": own["regime"],
        "head": own["head"],
        f"false calls per 100 good {unit}": number(100 * own["false_calls_on_good_parts"] / good) if good else NONE,
        "good images called": NONE if good else _share(own["good_images_called"], own["good_images"]),
        "false calls per image": number(own["false_calls_per_image"], ".3g"),
        f"good {unit} stopped": _share(own["stopped"], good),
        "95 % of stopped": interval_text(own["overkill_low"], own["overkill_high"]),
        f"bad {unit} passed": _share(own["escaped"], own["bad_parts"]),
        "95 % of passed": interval_text(own["escapes_low"], own["escapes_high"]),
        "operating point": own["wanted"],
        "threshold": number(own["threshold"], ".4g"),
        "least area, px": str(own["least_area"]),
        "seed": str(own["seed"]),
    }


def size_table(findings: Sequence[Line]) -> pd.DataFrame:
    """How many defects of each size are found, a row for each head."""
    return pd.DataFrame([
        {"backbone": own["backbone"], "regime": own["regime"], "head": own["head"]}
        | {f"{size_name(each)} {each['unit']}": f"{each['found']} of {each['defects']}" for each in own["by_size"]}
        for own in findings
    ]).fillna(NONE)  # fmt: skip


def size_name(size: Line) -> str:
    """The ends of an octave of sizes.

    >>> size_name({"least": 8.0, "below": 16.0})
    '8–16'
    """
    return f"{size['least']:g}–{size['below']:g}"


def _share(count: int, of: int) -> str:
    return f"{count} of {of} ({number(100 * count / of, '.3g')} %)" if of else NONE
