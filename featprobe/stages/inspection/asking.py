"""What is asked of an inspection, and the refusals where records can't carry it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featprobe.errors import ProbeError, counted
from featprobe.metrics.defects.operating import OperatingPoint, Wanted
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


def check_rule(folder: Path, records: Records, rule: FoundRule | None) -> None:
    """Raise ProbeError where records follow another rule than the one that is asked for."""
    if rule is None or rule == records.about.rule:
        return
    raise ProbeError(
        f"The records of {folder} follow another rule of what is found.\n"
        f"  wanted  {rule_text(rule)}\n"
        f"  found   {rule_text(records.about.rule)}\n"
        f"Take theirs:  omit --found and --same-class\n"
        f"or make records of your rule:  featprobe inspect --rescore {rule_words(rule)} {folder}"
    )


def check_rules(folders: Sequence[Path], each: Sequence[Records]) -> None:
    """Raise ProbeError where the records of folds follow different rules: they are no one test."""
    rules = [own.about.rule for own in each]
    mend = f"Make them by one rule:  featprobe inspect --rescore {rule_words(rules[0])} {folders[0].parents[1]}"
    _check_alike("records follow different rules of what is found", folders, [rule_text(own) for own in rules], mend)


def check_points(folders: Sequence[Path], points: Sequence[OperatingPoint]) -> None:
    """Raise ProbeError where folds decide at operating points for different things: they are no one test."""
    said = [f"{point.wanted}, calls of {point.least_area} pixels or more" for point in points]
    mend = f"Choose one for all:  featprobe inspect {folders[0].parents[1]} --false-calls 0.1"
    _check_alike("operating points are for different things", folders, said, mend)


def _check_alike(fault: str, folders: Sequence[Path], said: Sequence[str], mend: str) -> None:
    if len(set(said)) > 1:
        each = "\n".join(f"          {folder}: {own}" for folder, own in zip(folders, said, strict=True))
        raise ProbeError(
            f"In the folds of a cross-validation, {fault}. Nothing was computed.\n"
            f"  wanted  the same of all\n  found\n{each}\n{mend}"
        )


def check_parts(folder: Path, records: Records, wanted: Wanted | None) -> None:
    """Raise ProbeError for a rate per part where no groups are known."""
    if wanted is None or wanted.kind != "false_calls" or wanted.per != "part" or records.about.parts:
        return
    raise ProbeError(
        f"{folder}: a rate per part can't be set, as it is not known which images show one part.\n"
        f"  wanted  groups of images\n  found   {counted(len(records.images), 'image')}, each in a group of its own\n"
        f"Ask for a rate per image:  --false-calls {wanted.rate:g}/image\n"
        "or extract with --group-from or --split-file, which say which images belong together, and train again."
    )


def check_size(folder: Path, records: Records, size: Size, unit: Unit) -> None:
    """Raise ProbeError for sizes in mm where the size of a pixel is not known."""
    unknown = records.defects.image[np.isnan(records.defects.size(size, unit))]
    if unit == "px" or records.about.pooled or not len(unknown):
        return
    images, every = np.unique(unknown), np.unique(records.defects.image)
    raise ProbeError(
        f"{folder}: sizes in mm need the size of a pixel.\n"
        f"  wanted  pixel_size of the data set, or DICOM files that say it\n"
        f"  found   none for {len(images)} of {counted(len(every), 'test image')} with defects, first "
        f"{records.images.ids[images[0]]}\n"
        "Ask for pixels:  --unit px\n"
        "or write pixel_size, in mm, into the section of the data set in featprobe.toml. Sides of pixels that are not "
        f"square need new records too:  featprobe inspect --rescore {folder}"
    )
