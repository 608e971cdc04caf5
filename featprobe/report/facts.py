"""What a comparison rests on, in a sentence each: the data, and what the results cost."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any

from featprobe.errors import counted
from featprobe.machine import time_text
from featprobe.report.findings.defect_answer import things

Line = Mapping[str, Any]


def data_sentence(lines: Sequence[Line], lead: Line | None, folds: int = 0, unreadable: int = 0) -> str:
    """What the heads of a table were trained and tested on. lead: a finding, which knows defects and parts.
    folds: of a cross-validation; 0 for none. unreadable: images that took no part.
    """
    most = max(line["fraction"] for line in lines)
    first = next(line for line in lines if line["fraction"] == most)
    sizes = _listed(line["size"] for line in lines)
    trained, groups = f"trained on {counted(first['train_images'], 'image')} of {sizes} pixels", first["groups"]
    tested = f"tested on {counted(first['test_images'], 'other image')}"
    if folds:
        trained = f"{folds} folds, each {trained}"
        tested = f"tested on all {counted(first['test_images'], 'image')}, each once by a head that had not seen it,"
    said = f"{first['data']}: {trained}, {tested} of {counted(groups, 'group')}"
    whose = "it or its" if unreadable == 1 else "they or their"
    others = f" {counted(unreadable, 'more image')} took no part: {whose} labels can't be used." if unreadable else ""
    if lead is None:
        return f"{said}.{others}"
    unit = "part" if lead["parts_known"] else "image"
    held = f"{lead['defects']} {things(lead)} in {counted(lead['bad_parts'], f'bad {unit}')}"
    good = lead["good_parts"]
    return f"{said}, with {held}, and {counted(good, f'good {unit}') if good else f'no good {unit}'}.{others}"


def point_sentence(lead: Line | None) -> list[str]:
    """At which operating point a head finds what it finds. lead: a finding."""
    if lead is None:
        return []
    which = "The threshold was" if lead["threshold"] is not None else "The threshold of each fold was"
    least = f", for calls of {lead['least_area']} pixels or more" if lead["least_area"] > 1 else ""
    return [f"{which} chosen on validation for {lead['wanted']}{least}."]


def cost_sentence(lines: Sequence[Line]) -> str:
    """What the results on the most training data took, in words."""
    most = max(line["fraction"] for line in lines)
    shown = [line for line in lines if line["fraction"] == most]
    frozen = [line for line in shown if line["regime"].startswith("frozen") and line["extract_seconds"] != 0]
    tuned = [line for line in shown if line not in frozen]
    said = []
    if frozen:
        said.append(
            f"the features of a backbone took {_times(line['extract_seconds'] for line in frozen)}, once for all "
            f"heads; a head on them {_times(line['train_seconds'] for line in frozen)}"
        )
    for regime in dict.fromkeys(line["regime"] for line in tuned):
        times = [line["train_seconds"] for line in tuned if line["regime"] == regime]
        if not all(map(isnan, times)):
            said.append(f"a training in the regime {regime} took {_times(times)}")
    return f"Cost: {'; '.join(said)}." if said else ""


def _times(seconds: Iterable[float]) -> str:
    """Times as one text, from the least to the most where they differ."""
    known = [value for value in seconds if not isnan(value)]
    if not known:
        return "a time that was not kept"
    least, most = (("under 1 s" if value < 0.5 else time_text(value)) for value in (min(known), max(known)))
    return least if least == most else f"{least} to {most}"


def _listed(names: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(names))
