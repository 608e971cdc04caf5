"""The answer in plain language, worded from intervals and p values, honest where they tell nothing."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from featprobe.errors import counted
from featprobe.report.comparison import FEW_GROUPS, LABELS, interval_text, number, scores_of

SURE = 0.05  # corrected p value up to which a difference is called one
SMALL = 0.02  # a difference whose whole interval is nearer to 0 makes no difference in practice
STORED_VIEWS = "frozen, augmented"  # the variant of frozen results on views that a cache holds
Line = Mapping[str, Any]


def answer_of(lines: Sequence[Line], differences: Sequence[Line]) -> tuple[str, ...]:
    """What the results of one set say: which backbone, and whether frozen is enough.

    Only results on the most training data and those that stand for their backbone are spoken of.
    """
    most = max(line["fraction"] for line in lines)
    shown = [line for line in lines if line["fraction"] == most and line["chosen"]]
    own = [line for line in differences if line["fraction"] == most and not isnan(line["difference"])]
    sentences = []
    for head in dict.fromkeys(line["head"] for line in shown):
        sentences += _of_head([line for line in shown if line["head"] == head], [d for d in own if d["head"] == head])
    few = f"All of this rests on {counted(lines[0]['groups'], 'test group')} only: take it as a hint."
    return (*sentences, few) if lines[0]["groups"] < FEW_GROUPS else tuple(sentences)


def _of_head(lines: Sequence[Line], differences: Sequence[Line]) -> list[str]:
    score = scores_of(lines[0])[0]
    scored = [line for line in lines if not isnan(line[score])]
    head = lines[0]["head"]
    if not scored:
        return [f"{head}: no {LABELS[score]} exists on this test split."]
    if max(line[score] for line in scored) == 0:
        return [f"{head}: {LABELS[score]} is 0 throughout. Nothing was found, so nothing is told."]
    regimes = list(dict.fromkeys(line["regime"] for line in scored))
    sentences = []
    for regime in regimes:
        own = [line for line in scored if line["regime"] == regime]
        if len(own) > 1 or regime == regimes[0]:
            sentences.append(_which_backbone(own, score, [d for d in differences if d["kind"] == "backbones"]))
    if head != "ridge":
        sentences += _is_frozen_enough(head, [d for d in differences if d["kind"] == "regimes"])
    return sentences


def _which_backbone(lines: Sequence[Line], score: str, differences: Sequence[Line]) -> str:
    """A sentence on the backbones of one regime and head."""
    best = max(lines, key=lambda line: line[score])
    within = f"{best['regime']}, {best['head']}"
    interval = f"95 % interval {interval_text(best[f'{score}_low'], best[f'{score}_high'])}"
    told = "no interval: one test group" if isnan(best[f"{score}_low"]) else interval
    value = f"{number(100 * best[score])} % {LABELS[score]} ({told})"
    if len(lines) == 1:
        return f"{within}: {best['backbone']} reaches {value}. There is no other backbone here to compare it with."
    own = [d for d in differences if d["within"] == within and best["backbone"] in (d["a"], d["b"])]
    ahead = [_other(d, best) for d in own if d["p_holm"] <= SURE]
    perhaps = [_other(d, best) for d in own if d["p"] <= SURE < d["p_holm"]]
    untold = [_other(d, best) for d in own if not d["p"] <= SURE]
    says = [f"ahead of {_list(ahead)} beyond chance"] if ahead else []
    says += [f"perhaps ahead of {_list(perhaps)}, not surely among so many differences"] if perhaps else []
    says += [f"not to be told from {_list(untold)} with these test groups"] if untold else []
    return f"{within}: {best['backbone']} scores highest, {value}: {'; '.join(says)}."


def _other(difference: Line, best: Line) -> str:
    first = difference["a"] == best["backbone"]
    sign, name = (1, difference["b"]) if first else (-1, difference["a"])
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    other = ", at another input size" if _other_scale(difference) else ""
    return f"{name} ({100 * sign * difference['difference']:+.1f} points, {interval_text(low, high, '+.1f')}{other})"


def _other_scale(difference: Line) -> bool:
    return bool(difference.get("scale_a") != difference.get("scale_b"))


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is_frozen_enough(head: str, differences: Sequence[Line]) -> list[str]:
    """A sentence for each backbone that has a frozen and a full result, or one that says that none has."""
    full = [d for d in differences if d["a"].startswith("full") and d["b"] in ("frozen", STORED_VIEWS)]
    if not full:
        return [f"{head}: whether frozen is enough needs a frozen and a full result: featprobe finetune."]
    return [f"{head}: {_verdict(d)}" for d in full]


def _verdict(difference: Line) -> str:
    low, high, sure = difference["low"], difference["high"], difference["p_holm"] <= SURE
    backbone = difference["within"].rpartition(", ")[0]
    name = f"fine-tuning {backbone}{' (not augmented)' if 'not augmented' in difference['a'] else ''}"
    name += ", against frozen features of augmented views," if difference["b"] == STORED_VIEWS else ""
    found = f"({100 * difference['difference']:+.1f} points, {interval_text(low, high, '+.1f')})"
    cause = (
        " Part of that may be augmentation, which the frozen result lacks: featprobe finetune --regime frozen-online."
        if difference["confounded"]
        else ""
    )
    cause += " Not both had converged." if difference["not_converged"] else ""
    cause += " The two saw images of another size." if _other_scale(difference) else ""
    if sure and difference["difference"] < 0:
        return f"{name} loses {found}: frozen is enough.{cause}"
    if sure and low > SMALL:
        return f"{name} gains {found}: frozen is not enough for the best score.{cause}"
    if sure and high <= SMALL:
        return f"{name} gains less than {100 * SMALL:g} points {found}: frozen is nearly enough.{cause}"
    if sure:
        return f"{name} gains, but perhaps less than {100 * SMALL:g} points {found}.{cause}"
    if low < high and -SMALL <= low and high <= SMALL and difference["groups"] >= FEW_GROUPS:
        return f"{name} makes no difference beyond {100 * SMALL:g} points {found}: frozen is enough.{cause}"
    return f"whether {name} gains anything, these test groups do not tell {found}.{cause}"
