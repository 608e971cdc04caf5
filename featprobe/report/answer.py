"""The answer in plain sentences, made from intervals and p values. Where these show nothing, the answer says so."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from featprobe.errors import counted
from featprobe.kinds import kind_of
from featprobe.report.comparison import budget_text, interval_text, number, scores_of
from featprobe.scores import FEW_GROUPS, LABELS, SCORES, TaskScores

SURE = 0.05  # corrected p value up to which a difference is called one
SMALL, PART = 0.02, 0.1  # points, and share of the higher score: a smaller gain makes no difference in practice
FLOOR = 0.05  # a score whose interval reaches less above chance than this may mean that nothing was found
ACROSS = "To compare them anyway:  featprobe compare --across-recipes"
SEEDS = 3  # the number of seeds that is proposed where there is one seed
STORED_VIEWS = "frozen, augmented"  # the variant of frozen results on views that a cache holds
Line = Mapping[str, Any]


def answer_of(lines: Sequence[Line], differences: Sequence[Line]) -> tuple[str, ...]:
    """The answer for one data set: which backbone scores highest, and whether frozen is enough.

    lines: one per result. differences: one per compared pair of results. Both as `featprobe.report.comparison` has
    them. Only the results on the largest share of training data that stand for their backbone count.
    Returns sentences, one per claim.
    """
    most = max(line["fraction"] for line in lines)
    shown = [line for line in lines if line["fraction"] == most and line["chosen"]]
    among = [line for line in differences if line["fraction"] == most and not isnan(line["difference"])]
    sentences = []
    for head in dict.fromkeys(line["head"] for line in shown):
        sentences += _of_head([line for line in shown if line["head"] == head], [d for d in among if d["head"] == head])
    few = f"All of this rests on only {counted(lines[0]['groups'], 'test group')}: take it as a hint."
    return (*sentences, few) if lines[0]["groups"] < FEW_GROUPS else tuple(sentences)


def _of_head(lines: Sequence[Line], differences: Sequence[Line]) -> list[str]:
    score = scores_of(lines[0])[0]
    scored = [line for line in lines if not isnan(line[score])]
    head = lines[0]["head"]
    if not scored:
        return [f"{head}: the test split {_scores(lines[0]).lacks}, so there is no {LABELS[score]}."]
    if max(line[score] for line in scored) == 0:
        return [f"{head}: {LABELS[score]} is 0 for every result: nothing was found, so there is nothing to compare."]
    sentences = []
    regimes = list(dict.fromkeys(line["regime"] for line in scored))
    for regime in regimes:
        of_regime = [line for line in scored if line["regime"] == regime]
        if len(of_regime) > 1 or regime == regimes[0]:
            sentences += _which_backbone(of_regime, score, [d for d in differences if d["kind"] == "backbones"])
    return sentences + (
        [] if not kind_of(lines[0]["task"], head).live else _is_frozen_enough(scored, score, differences)
    )


def _scores(line: Line) -> TaskScores:
    """The scores of a line's task."""
    return SCORES[line["task"]]


# ---- which backbone --------------------------------------------------------------------------------------------------


def _which_backbone(lines: Sequence[Line], score: str, differences: Sequence[Line]) -> list[str]:
    """The sentences on the backbones of one regime and head."""
    best = max(lines, key=lambda line: line[score])
    within = f"{best['regime']}, {best['head']}"
    share = "" if best["fraction"] == 1 else f" on {100 * best['fraction']:g} % of the training images"
    value = f"{number(100 * best[score])} % {LABELS[score]} ({_interval_of(best, score)})"
    start = f"{within}{share}{_at(best['iterations'])}: {best['backbone']}"
    if len(lines) == 1:
        return [f"{start} reaches {value}. There is no other backbone to compare it with."]
    with_best = [d for d in differences if d["within"] == within and best["backbone"] in (d["a"], d["b"])]
    by_claim = {claim: [d for d in with_best if d["claim"] == claim] for claim in ("procedures", "heads", "none")}
    ranks = _ranks(by_claim["procedures"], best, "", " beyond chance")
    sentences = [f"{start} scores highest, {value}{': ' if ranks else ''}{'; '.join(ranks)}."]
    if by_claim["heads"]:
        ranks = _ranks(by_claim["heads"], best, "the head on ", "")
        sentences.append(
            f"{within}: among the trained heads ({_seeds(by_claim['heads'])}), the head on {best['backbone']} is "
            f"{'; '.join(ranks)}. This says nothing yet about the backbones: {_for_a_verdict(by_claim['heads'])}."
        )
    for alike in _by(by_claim["none"], lambda d: (d["recipes"], d["a"] == best["backbone"])):
        first = alike[0]["a"] == best["backbone"]
        sides = [best["backbone"], _list([d["b" if first else "a"] for d in alike])]
        which = " | ".join(sides if first else sides[::-1])
        others = _list([_other(d, best) for d in alike])
        sentences.append(
            f"{within}: no verdict on {best['backbone']} against {others}: the recipes differ "
            f"({which}: {alike[0]['recipes']}). {ACROSS}"
        )
    return sentences


def _ranks(differences: Sequence[Line], best: Line, the: str, sure: str) -> list[str]:
    """How the best backbone compares with the others. the: stands before each name; sure: stands after the names of
    those that are surely behind."""
    ahead = [the + _other(d, best) for d in differences if d["p_holm"] <= SURE]
    before = [the + _other(d, best) for d in differences if d["p"] <= SURE < d["p_holm"]]
    level = [the + _other(d, best) for d in differences if not d["p"] <= SURE]
    ranks = [f"ahead of {_list(ahead)}{sure}"] if ahead else []
    ranks += [f"ahead of {_list(before)} before, but not after, correction for multiple comparisons"] if before else []
    return ranks + ([f"not distinguishable from {_list(level)} with these test groups"] if level else [])


def _other(difference: Line, best: Line) -> str:
    """The other side of a difference: its name, the difference in points, and what else differs from the best one."""
    first = difference["a"] == best["backbone"]
    sign, name = (1, difference["b"]) if first else (-1, difference["a"])
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    other = ", at another input size" if _other_scale(difference) else ""
    if difference["recipes"] and difference["claim"] != "none":
        other += f"; the recipes differ, {difference['a']} | {difference['b']}: {difference['recipes']}"
    return f"{name} ({_points(sign * difference['difference'], low, high)}{other})"


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} points, {interval_text(low, high, '+.1f')}"


def _interval_of(line: Line, score: str) -> str:
    text = interval_text(line[f"{score}_low"], line[f"{score}_high"])
    return "no interval: one test group" if line["groups"] == 1 else f"95 % interval {text}" if "to" in text else text


def _at(*iterations: int | None) -> str:
    """How long the heads were trained; "" for heads that are solved."""
    return f" at {budget_text(iterations)}" if any(iterations) else ""


def _at_both(frozen: int | None, full: int) -> str:
    if frozen is None:
        return f", solved frozen and at {budget_text([full])} fine-tuned"
    return _at(frozen) if frozen == full else f" at {budget_text([frozen])} frozen and {full} fine-tuned"


def _seeds(differences: Sequence[Line]) -> str:
    return "; ".join(dict.fromkeys(d["seeds"] for d in differences))


def _for_a_verdict(differences: Sequence[Line]) -> str:
    """Why there is no verdict on backbones or regimes, and what to run for one."""
    why = {d["of_heads"] for d in differences}
    runs = [f"another seed gives another head. A verdict needs --seeds {SEEDS}"] if "one seed" in why else []
    others = " and ".join(sorted(why - {"one seed"}))
    runs += [f"there was {others}. A verdict needs the same seeds without --shared-order"] if others else []
    return "; ".join(runs)


def _by(lines: Sequence[Line], key: Callable[[Line], Any]) -> list[list[Line]]:
    return [[line for line in lines if key(line) == value] for value in dict.fromkeys(map(key, lines))]


def _other_scale(difference: Line) -> bool:
    return bool(difference.get("scale_a") != difference.get("scale_b"))


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- is frozen enough ------------------------------------------------------------------------------------------------


def _is_frozen_enough(lines: Sequence[Line], score: str, differences: Sequence[Line]) -> list[str]:
    """One sentence per backbone that has a frozen and a full result, or one sentence where no backbone has both."""
    head = lines[0]["head"]
    full = [
        d for d in differences
        if d["kind"] == "regimes" and d["a"].startswith("full") and d["b"] in ("frozen", STORED_VIEWS)
    ]  # fmt: skip
    if not full:
        frozen, tuned = (any(line["regime"].startswith(name) for line in lines) for name in ("frozen", "full"))
        wanted, command = {
            (True, False): ("a full result beside the frozen one", "finetune"),
            (False, True): ("a frozen result beside the full one", "probe"),
        }.get((frozen, tuned), ("a frozen and a full result of one backbone", "finetune"))
        command = f"featprobe {command} --task {lines[0]['task']}"
        return [f"{head}: to see whether frozen is enough, make {wanted}: {command}."]
    return [
        f"{head}{_at_both(d['iterations_b'], d['iterations_a'])}: {_verdict(d, lines, score, differences)}"
        for d in full
    ]


def _verdict(difference: Line, lines: Sequence[Line], score: str, differences: Sequence[Line]) -> str:
    backbone = difference["within"].rpartition(", ")[0]
    of = {line["regime"]: line for line in lines if line["backbone"] == backbone}
    full, frozen = of[difference["a"]], of[difference["b"]]
    name = f"fine-tuning {backbone}{' (not augmented)' if 'not augmented' in difference['a'] else ''}"
    name += ", against frozen features of augmented views," if difference["b"] == STORED_VIEWS else ""
    found = f"({_points(difference['difference'], difference['low'], difference['high'])})"
    cause = (
        " Part of this difference may come from augmentation, which the frozen result lacks. To find out:"
        f"  featprobe finetune --task {full['task']} --regime frozen-online"
        if difference["confounded"]
        else ""
    )
    cause += " The two saw images of different sizes." if _other_scale(difference) else ""
    why = _no_verdict(difference, full, frozen, score)
    if why:
        return f"no verdict on {name} {found}: {why}"
    floor, chance = _floor(frozen, lines, score, differences), _scores(full).chance
    margin = min(SMALL, PART * max(0, full[score] - chance, frozen[score] - chance))
    if floor and not (
        full[f"{score}_low"] >= chance + FLOOR and difference["p_holm"] <= SURE and difference["low"] > margin
    ):
        return f"no verdict on {name} {found}: {floor}, so frozen cannot be called enough.{cause}"
    if difference["claim"] == "heads":
        return _of_two_heads(difference, name, found) + cause
    if frozen["iterations"] is None and full["budget_unchecked"] and _is_enough(difference, margin):
        return (
            f"no verdict on {name} {found}: the frozen head is solved, and nobody has looked if {full['iterations']} "
            f"iterations are enough to fine-tune. Look with --iterations auto.{cause}"
        )
    return _worded(difference, name, found, margin) + (f" {floor[0].upper()}{floor[1:]}." if floor else "") + cause


def _no_verdict(difference: Line, full: Line, frozen: Line, score: str) -> str:
    """Why two results can't show whether frozen is enough, whatever their scores; "" where they can."""
    if difference["claim"] == "none":
        return f"the recipes differ (fine-tuned | frozen: {difference['recipes']}). {ACROSS}"
    sides = {"frozen": frozen, "fine-tuned": full}
    rising = [f"the {name} result" for name, line in sides.items() if line["not_converged"]]
    small = [f"the {name} result" for name, line in sides.items() if line["iterations_needed"]]
    text = f"{_list(rising)} had not converged. Train with more iterations." if rising else ""
    notes = "the notes name the commands"
    return text or (f"{_list(small)} had too few iterations: {notes}." if small else "")


def _floor(frozen: Line, lines: Sequence[Line], score: str, differences: Sequence[Line]) -> str:
    """The words that a frozen backbone may have found nothing; "" where it surely found something.

    It surely found something where it is ahead of the same network with random weights. Where no such control can be
    compared, its interval must stay above the floor.
    """
    controls = [
        line["backbone"] for line in lines
        if line["random_weights"] and line["regime"] == frozen["regime"]
        and line["model"] == frozen["model"] is not None
    ]  # fmt: skip
    within = f"{frozen['regime']}, {frozen['head']}"
    for control in controls if not frozen["random_weights"] else []:
        for d in differences:
            if d["within"] == within and {d["a"], d["b"]} == {control, frozen["backbone"]} and d["claim"] != "none":
                lead = d["difference"] if d["b"] == control else -d["difference"]
                ahead = d["p_holm"] <= SURE and lead > 0
                return "" if ahead else f"frozen is not shown to be ahead of random weights ({control})"
    low = frozen[f"{score}_low"]
    value = f"{number(100 * frozen[score])} % {LABELS[score]}, {_interval_of(frozen, score)}"
    least = _scores(frozen).chance + FLOOR
    found = frozen[score] >= least if isnan(low) else low >= least  # without an interval the score itself counts
    return "" if found else f"frozen may have found nothing ({value})"


def _of_two_heads(difference: Line, name: str, found: str) -> str:
    """The claim that one seed supports: about these two heads, not about the regimes that made them."""
    if not difference["p_holm"] <= SURE:
        claim = (
            f"with these two heads ({difference['seeds']}), these test groups cannot show whether {name} helps {found}"
        )
    else:
        gains = "gained" if difference["difference"] > 0 else "lost"
        claim = f"with these two heads ({difference['seeds']}), {name} {gains} {found}"
    return f"{claim}. This says nothing yet about the regimes: {_for_a_verdict([difference])}."


def _is_enough(difference: Line, margin: float) -> bool:
    """Whether a difference shows that fine-tuning gains nothing, or next to nothing."""
    sure, few = difference["p_holm"] <= SURE, difference["groups"] < FEW_GROUPS
    near = -margin <= difference["low"] and difference["high"] <= margin and not few
    return near or (sure and (difference["difference"] < 0 or difference["high"] <= margin))


def _worded(difference: Line, name: str, found: str, margin: float) -> str:
    low, high, sure = difference["low"], difference["high"], difference["p_holm"] <= SURE
    most = f"{100 * margin:.2g} points{'' if margin == SMALL else ' (a tenth of the higher score)'}"
    if sure and difference["difference"] < 0:
        return f"{name} loses {found}: frozen is enough."
    if sure and low > margin:
        return f"{name} gains more than {most} {found}: frozen is not enough for the best score."
    if sure and high <= margin:
        return f"{name} gains less than {most} {found}: frozen is nearly enough."
    if sure:
        return f"{name} gains, but perhaps less than {most} {found}."
    if low < high and -margin <= low and high <= margin and difference["groups"] >= FEW_GROUPS:
        return f"{name} makes no difference beyond {most} {found}: frozen is enough."
    if difference["p"] <= SURE:
        gains = "gains" if difference["difference"] > 0 else "loses"
        return f"{name} {gains} before, but not after, correction for multiple comparisons {found}."
    return f"these test groups cannot show whether {name} helps {found}."


# ---- modality gaps ---------------------------------------------------------------------------------------------------


def gap_sentences(gaps: Sequence[Line]) -> tuple[str, ...]:
    """One sentence per modality gap: whether one backbone's lead over another differs between two data sets."""
    return tuple(_gap_sentence(gap) for gap in gaps)


def _gap_sentence(gap: Line) -> str:
    share = "" if gap["fraction"] == 1 else f", {100 * gap['fraction']:g} % of train"
    start = f"{gap['task']}, {gap['regime']}, {gap['head']}{share}{_at(gap['iterations_a'], gap['iterations_b'])}:"
    found = f"({_points(gap['difference'], gap['low'], gap['high'])})"
    lead = f"the lead of {gap['a']} over {gap['b']}"
    where = f"{gap['first']} than on {gap['second']}"
    if gap["claim"] == "none":
        return (
            f"{start} no verdict on whether {lead} is larger on {where} {found}: the recipes differ "
            f"({gap['recipes']}). {ACROSS}"
        )
    of_heads = gap["claim"] == "heads"
    lead = f"{lead}, with these heads ({gap['seeds']})," if of_heads else lead
    caution = f" This says nothing yet about the backbones: {_for_a_verdict([gap])}." if of_heads else ""
    if gap["p_holm"] <= SURE:
        return f"{start} {lead} is {'larger' if gap['difference'] > 0 else 'smaller'} on {where} {found}.{caution}"
    if gap["p"] <= SURE:
        larger = "larger" if gap["difference"] > 0 else "smaller"
        late = "before, but not after, correction for multiple comparisons"
        return f"{start} {lead} is {larger} on {where} {late} {found}.{caution}"
    return f"{start} {lead} is not shown to differ between {gap['first']} and {gap['second']} {found}.{caution}"


# ---- good images alone -----------------------------------------------------------------------------------------------


def behind_sentences(lines: Sequence[Line]) -> tuple[str, ...]:
    """One sentence per backbone: how far its anomaly head stands behind its supervised one on the same test units."""
    return tuple(_behind_sentence(line) for line in lines)


def _behind_sentence(line: Line) -> str:
    label, lead = LABELS[line["score"]], line["behind"]
    regime = "" if line["supervised_regime"] == "frozen" else f"{line['supervised_regime']}, "
    start = f"{line['data']}, {line['backbone']}: {line['anomaly_head']}, which saw good images alone,"
    than = f"{regime}{line['supervised_head']}, which saw labels too"
    if isnan(lead):
        return f"{start} can't be compared with {than}: the test split has no {label}."
    few = f" It rests on only {counted(line['groups'], 'test group')}." if line["groups"] < FEW_GROUPS else ""
    ends, stands = (line["low"], line["high"]), "behind"
    if lead < 0:
        ends, stands = (-line["high"], -line["low"]), "ahead of"
    interval = f"95 % interval {interval_text(*ends, '+.1f')}" if not isnan(ends[0]) else interval_text(*ends)
    level = "; these test groups do not tell it from 0" if line["low"] <= 0 <= line["high"] else ""
    return f"{start} stands {number(100 * abs(lead))} points of {label} {stands} {than} ({interval}){level}.{few}"
