"""What is asked of an inspection, and the refusals where records can't carry it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featprobe.errors import ProbeError, UsageError, counted
from featprobe.metrics.defects.operating import Wanted
from featprobe.metrics.defects.overlaps import rule_text
from featprobe.metrics.defects.records import FoundRule, Records, Size, Unit


@dataclass(frozen=True)
class Asked:
    """The arguments of `inspect.inspect` that concern each head."""

    wanted: Wanted | None = None
    size: Size = "root_area"
    unit: Unit = "px"
    least_area: int | None = None
    rule: FoundRule | None = None
    pod: bool = False


def rule_words(rule: FoundRule) -> str:
    """The options that ask for a rule."""
    return f"--found {'usual' if rule.iou is None else f'iou:{rule.iou:g}'}{' --same-class' if rule.same_class else ''}"


def wanted_text(wanted: Wanted) -> str:
    """What an operating point was chosen for, for people.

    >>> wanted_text(Wanted("false_calls", 0.05, "part")), wanted_text(Wanted("recall", 0.95))
    ('0.05 false calls per part', '95 % of the defects found')
    """
    if wanted.kind == "false_calls":
        return f"{wanted.rate:g} false calls per {wanted.per}"
    if wanted.kind == "recall":
        return f"{100 * wanted.rate:g} % of the defects found"
    return f"the least cost, {wanted.miss:g} for a missed defect and {wanted.call:g} for a false call"


def check_rule(folder: Path, records: Records, rule: FoundRule | None) -> None:
    """Raise ProbeError where records follow another rule than the one that is asked for."""
    if rule in (None, records.about.rule):
        return
    assert rule is not None
    raise ProbeError(
        f"The records of {folder} follow another rule of what is found.\n"
        f"  wanted  {rule_text(rule)}\n"
        f"  found   {rule_text(records.about.rule)}\n"
        f"Take theirs:  omit --found and --same-class\n"
        f"or make records of your rule:  featprobe inspect --rescore {rule_words(rule)} {folder}"
    )


def check_parts(folder: Path, records: Records, wanted: Wanted | None) -> None:
    """Raise ProbeError for a rate per part where no groups are known."""
    if wanted is None or wanted.kind != "false_calls" or wanted.per != "part" or records.about.parts:
        return
    raise ProbeError(
        f"{folder}: a rate per part can't be set, as it is not known which images show one part.\n"
        f"  wanted  groups of images\n  found   {counted(len(records.images), 'image')}, each in a group of its own\n"
        f"Ask for a rate per image:  --false-calls {wanted.rate:g}/image\n"
        "or say which images belong together, with --group-from or --split-file of `featprobe extract`, and train again."
    )


def check_size(folder: Path, records: Records, size: Size, unit: Unit) -> tuple[str, ...]:
    """Notes on defects whose size is not known; raises ProbeError where none has a size in mm."""
    unknown = int(np.isnan(records.defects.size(size, unit)).sum())
    if unit == "mm" and len(records.defects) and unknown == len(records.defects):
        raise ProbeError(
            f"{folder}: sizes in mm need the size of a pixel.\n"
            f"  wanted  pixel_size of the data set, in mm, or DICOM files that say it\n"
            f"  found   none, for all of {counted(len(records.images), 'test image')}\n"
            "Ask for pixels:  --unit px\n"
            f"or write it into featprobe.toml, as pixel_size = 0.05 in the section of the data set, and run:  "
            f"featprobe inspect --rescore {folder}"
        )
    if unknown:
        return (f"{unknown} of {counted(len(records.defects), 'defect')} have no size in {unit}, and are in no size",)
    return ()
