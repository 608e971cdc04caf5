"""The answer in defects and parts: what a head finds, what it misses, how many good parts it stops.

A finding is a line of `stages.inspection.lines`, with the backbone, regime and score of its line in the comparison. A
difference is a line too: the share of the defects that one head finds minus that of another, on the same test images.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from featprobe.errors import counted, figures
from featprobe.kinds import kind_of, kinds_of
from featprobe.report.answer import SURE
from featprobe.report.comparison import interval_text
from featprobe.scores import FEW_GROUPS

Line = Mapping[str, Any]
MOST = 0.9  # share of the defects of some size and more from which on a head is said to find these
FEW_DEFECTS = 5  # of some size and more; of fewer nothing is said


def defect_sentences(findings: Sequence[Line], differences: Sequence[Line], tuned: bool) -> tuple[str, ...]:
    """The sentences on one data set, the shortest answer first: of the head that leads, then of its rivals.

    findings: of the results on most training data that stand for their backbone. tuned: whether there is a result whose
    backbone was trained too, with or without records. Returns nothing where no head has records.
    """
    if not findings:
        return ()
    lead = leading(findings)
    about = [d for d in differences if lead["folder"] in (d["folder_a"], d["folder_b"])]
    sentences = [_finds(lead), *_of_parts(lead), *_misses(lead)]
    sentences += _regimes([d for d in about if d["kind"] == "regimes"], lead, findings, tuned)
    sentences += _backbones([d for d in about if d["kind"] == "backbones"], lead, findings)
    if lead["groups"] < FEW_GROUPS:
        sentences.append(f"All of this rests on only {counted(lead['groups'], 'test group')}: take it as a hint.")
    return tuple(sentences)


def leading(findings: Sequence[Line]) -> Line:
    """The finding that the answer begins with: of the frozen heads, where there are any, the kind that is best on
    validation, and of that kind the backbone with the highest score, which the answer in scores begins with too."""
    frozen = [own for own in findings if own["regime"].startswith("frozen")] or list(findings)
    head = max(frozen, key=lambda own: own["validation"])["head"]
    return max((own for own in frozen if own["head"] == head), key=lambda own: (own["score"], own["recall"]))


def things(finding: Line) -> str:
    """What people call the defects of a data set.

    >>> things({"pooled": False, "classes": ["crack"]}), things({"pooled": False, "classes": ["crack", "dent"]})
    ('crack defects', 'defects')
    """
    if finding["pooled"]:
        return "images with a defect"
    names = finding["classes"]
    return f"{names[0]} defects" if len(names) == 1 and names[0].lower() not in ("defect", "defects") else "defects"


def share_text(count: int, of: int, low: float, high: float) -> str:
    """A share with its interval; low, high: in [0, 1].

    >>> share_text(41, 47, 0.752, 0.9995), share_text(0, 3, float("nan"), float("nan"))
    ('87 %, 95 % interval 75 to 99.9', '0 %')
    """
    interval = "" if isnan(low) else f", 95 % interval {percent(low)} to {percent(high)}"
    return f"{percent(count / of)} %{interval}"


def percent(share: float) -> str:
    """A share of a few dozens in percent: whole, but near to either end with one decimal.

    >>> [percent(share) for share in (0.0, 0.0004, 0.0312, 0.872, 0.9968, 0.9999, 1.0)]
    ['0', '0.04', '3', '87', '99.7', '99.9', '100']
    """
    if 0.99 < share < 1:
        return f"{min(100 * share, 99.9):.1f}"
    return f"{100 * share:.1g}" if 0 < share < 0.01 else f"{100 * share:.0f}"


def false_calls_text(finding: Line) -> str:
    """How often a head calls where nothing is, by 100 good parts; where none is good, on all images."""
    unit = "part" if finding["parts_known"] else "image"
    good, stray = finding["good_parts"], finding["false_calls_on_good_parts"]
    if not good:
        every = f"{counted(finding['false_calls'], 'false call')} on {counted(finding['images'], 'test image')}"
        if finding["good_images"]:
            of_good = f"{finding['good_images_called']} of {counted(finding['good_images'], 'good image')}"
            return f"{every} ({of_good} called)"
        return f"{every}, of which none is good"
    if not stray:
        return f"no false call on {counted(good, f'good {unit}')}"
    return f"{figures(100 * stray / good, 2)} false calls per 100 good {unit}s ({stray} on {good})"


def size_text(finding: Line, value: float) -> str:
    """A size with its unit."""
    return f"{value:g} {finding['by_size'][0]['unit']}"


def found_from(finding: Line) -> tuple[float, int, int] | None:
    """(the size from which on most defects are found, how many of these are, how many there are); None where nearly
    all are found anyway, or the large ones are not."""
    sizes = finding["by_size"]
    if not sizes or finding["found"] >= MOST * finding["defects"]:
        return None
    for first in range(1, len(sizes)):
        found, defects = (sum(own[name] for own in sizes[first:]) for name in ("found", "defects"))
        if defects >= FEW_DEFECTS and found >= MOST * defects:
            return sizes[first]["least"], found, defects
    return None


def _finds(lead: Line) -> str:
    if not lead["defects"]:
        return f"{lead['backbone']}: the test images hold no defect, so nothing is said of what it finds."
    found = f"{lead['found']} of {lead['defects']} {things(lead)}"
    share = share_text(lead["found"], lead["defects"], lead["recall_low"], lead["recall_high"])
    large = found_from(lead)
    more = f" {large[1]} of {large[2]} from {size_text(lead, large[0])} on," if large else ""
    verb = "calls" if lead["pooled"] else "finds"
    return f"{lead['backbone']} {verb} {found} ({share}),{more} with {false_calls_text(lead)}."


def _of_parts(lead: Line) -> list[str]:
    """How many good parts are stopped, and how many bad ones escape."""
    unit = "part" if lead["parts_known"] else "image"
    said = []
    if lead["good_parts"]:
        share = share_text(lead["stopped"], lead["good_parts"], lead["overkill_low"], lead["overkill_high"])
        said.append(f"stops {lead['stopped']} of {counted(lead['good_parts'], f'good {unit}')} ({share})")
    if lead["bad_parts"]:
        share = share_text(lead["escaped"], lead["bad_parts"], lead["escapes_low"], lead["escapes_high"])
        said.append(f"lets {lead['escaped']} of {counted(lead['bad_parts'], f'bad {unit}')} pass ({share})")
    none = "" if lead["good_parts"] else f" No test {unit} is good: how many would be stopped is not known."
    return [f"It {' and '.join(said)}.{none}"] if said else []


def _misses(lead: Line) -> list[str]:
    missed = lead["defects"] - lead["found"]
    if not missed:
        return ["It misses no defect of the test images."] if lead["defects"] else []
    said = [f"It misses {missed} of {lead['defects']}"]
    large = found_from(lead)
    if large:
        small = missed - (large[2] - large[1])
        said.append(f"{'all' if small == missed else f'{small} of them'} below {size_text(lead, large[0])}")
    elif lead["by_size"] and (last := lead["by_size"][-1])["found"] < last["defects"]:
        lost = last["defects"] - last["found"]
        said.append(f"among them {lost} of the {last['defects']} largest (from {size_text(lead, last['least'])} on)")
    classes = [own for own in lead["by_class"] if own["missed"]]
    if len(lead["by_class"]) > 1 and classes:
        worst = max(classes, key=lambda own: own["missed"] / own["defects"])
        said.append(f"most often {worst['class']} ({worst['missed']} of {worst['defects']})")
    return [f"{', '.join(said)}."]


def _regimes(differences: Sequence[Line], lead: Line, findings: Sequence[Line], tuned: bool) -> list[str]:
    """Whether fine-tuning finds more."""
    said = []
    for own in differences:
        rival = _other(own, lead, findings)
        if rival["regime"].startswith("full"):
            more = _verdict(own, lead)
            start = f"The fine-tuned head finds {more}" if more else "Frozen and fine-tuned are not distinguishable"
            said.append(f"{start}: {rival['backbone']}, {rival['regime']}, finds {_beside(own, lead, rival)}.")
    task = lead["task"]
    if said or not lead["regime"].startswith("frozen") or not any(kind_of(task, name).live for name in kinds_of(task)):
        return said
    if not tuned:
        return ["Whether frozen is enough is not known: no backbone was fine-tuned."]
    if kind_of(task, lead["head"]).live:
        return ["What the fine-tuned backbone finds is not known here: it has no records that can be compared."]
    return []


def _backbones(differences: Sequence[Line], lead: Line, findings: Sequence[Line]) -> list[str]:
    """What the other backbones find, with heads of the same kind."""
    said = []
    for own in differences:
        rival = _other(own, lead, findings)
        more = _verdict(own, lead)
        start = f"The head on {rival['backbone']} {f'finds {more}' if more else 'is not distinguishable from it'}"
        said.append(f"{start}: {_beside(own, lead, rival)}.")
    return said


def _other(difference: Line, lead: Line, findings: Sequence[Line]) -> Line:
    """The finding that is compared with the one that leads."""
    other = difference["folder_b" if difference["folder_a"] == lead["folder"] else "folder_a"]
    return next(own for own in findings if own["folder"] == other)


def _verdict(difference: Line, lead: Line) -> str:
    """Whether the other surely finds more or less than the one that leads; "" where that is not sure."""
    if not difference["p_holm"] <= SURE:
        return ""
    return "less" if (difference["difference"] > 0) == (difference["folder_a"] == lead["folder"]) else "more"


def _beside(difference: Line, lead: Line, rival: Line) -> str:
    """What the other finds, by how much that is more, and its false calls."""
    sign = -1 if difference["folder_a"] == lead["folder"] else 1
    low, high = sorted((sign * difference["low"] + 0.0, sign * difference["high"] + 0.0))  # no -0.0
    points = f"{100 * sign * difference['difference'] + 0.0:+.1f} points, {interval_text(low, high, '+.1f')}"
    return f"{rival['found']} of {rival['defects']} ({points}), with {false_calls_text(rival)}"
