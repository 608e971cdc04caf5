"""The answer in defects and parts says what its figures say, and no more."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featprobe.report.facts import cost_sentence, data_sentence, point_sentence
from featprobe.report.findings.defect_answer import defect_sentences, found_from, leading
from featprobe.report.findings.finding_tables import finding_table
from featprobe.report.page import Answer, PageSet, Probability, page_text
from featprobe.report.rendering import Picture

NAN = float("nan")


def finding(name: str = "a", found: int = 41, **changed: Any) -> dict[str, Any]:
    """What a head finds of 47 cracks in 12 bad parts, beside 32 good ones."""
    sizes = [(8.0, 16, 10), (16.0, 31, 30)] if found == 41 else [(8.0, 16, 0), (16.0, 31, found)]
    own = {
        **{"backbone": name, "regime": "frozen", "head": "linear", "task": "semseg", "folder": f"probes/{name}"},
        **{"pooled": False, "classes": ["crack"], "score": 0.5, "validation": 0.5, "groups": 24, "seed": 0},
        **{"wanted": "0.1 false calls per image", "per": "image", "threshold": 0.5, "least_area": 1, "rule": ""},
        **{"defects": 47, "found": found, "recall": found / 47, "recall_low": 0.7, "recall_high": 0.95, "images": 48},
        **{"good_images": 28, "good_images_called": 1, "false_calls": 2, "false_calls_per_image": 2 / 48},
        **{"parts_known": True, "bad_parts": 12, "escaped": 1, "escapes_low": 0.002, "escapes_high": 0.38},
        **{"good_parts": 32, "stopped": 1, "overkill_low": 0.001, "overkill_high": 0.16},
        **{"false_calls_on_good_parts": 1, "by_class": [{"class": "crack", "defects": 47, "missed": 47 - found}]},
        "by_size": [
            {"unit": "px", "least": least, "below": 2 * least, "defects": defects, "found": hits}
            for least, defects, hits in sizes
        ],
    }
    return {**own, **changed}


def difference(a: str, b: str, value: float, p: float, kind: str = "backbones") -> dict[str, Any]:
    return {"kind": kind, "folder_a": f"probes/{a}", "folder_b": f"probes/{b}", "difference": value,
            "low": value - 0.05, "high": value + 0.05, "p": p, "p_holm": p}  # fmt: skip


def said(*findings: dict[str, Any], differences: Any = (), tuned: bool = False) -> str:
    return "\n".join(defect_sentences(findings, differences, tuned))


def test_the_first_sentence_has_defects_sizes_and_false_calls() -> None:
    first, parts, missed, frozen = defect_sentences([finding()], (), False)
    assert first == (
        "a finds 41 of 47 crack defects (87 %, 95 % interval 70 to 95), 30 of 31 from 16 px on, with 3.1 false calls "
        "per 100 good parts (1 on 32)."
    )
    assert "stops 1 of 32 good parts (3 %, 95 % interval 0.1 to 16)" in parts
    assert "lets 1 of 12 bad parts pass (8 %, 95 % interval 0.2 to 38)" in parts
    assert missed == "It misses 6 of 47, 5 of them below 16 px."
    assert frozen == "Whether frozen is enough is not known: no backbone was fine-tuned."


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"good_parts": 0}, r"with 2 false calls on 48 test images \(1 of 28 good images called\)\."),
        ({"good_parts": 0}, "how many would be stopped is not known"),
        ({"good_parts": 0, "good_images": 0}, "2 false calls on 48 test images, of which none is good"),
        ({"false_calls_on_good_parts": 0}, "with no false call on 32 good parts"),
        ({"false_calls_on_good_parts": 48}, r"with 150 false calls per 100 good parts \(48 on 32\)"),
        ({"parts_known": False}, "false calls per 100 good images|stops 1 of 32 good images"),
        ({"pooled": True, "by_size": []}, "a calls 41 of 47 images with a defect"),
        ({"classes": ["crack", "dent"]}, "finds 41 of 47 defects"),
        ({"recall_low": NAN}, r"crack defects \(87 %\)"),
        ({"defects": 0, "found": 0, "by_size": [], "bad_parts": 0}, "hold no defect, so nothing is said"),
        ({"groups": 9}, "only 9 test groups"),
        ({"head": "ridge"}, "Whether frozen is enough is not known"),
        ({"task": "anomaly", "head": "patchcore"}, "^(?!.*Whether frozen)"),
    ],
)
def test_what_the_test_images_can_not_show_is_not_said(changed: dict[str, Any], words: str) -> None:
    text = said(finding(**changed))
    for word in words.split("|"):
        assert re.search(word, text, re.DOTALL), text


def test_a_rival_is_told_apart_only_where_that_is_sure() -> None:
    rival = finding("b", 30, score=0.4)
    sure, unsure = (said(finding(), rival, differences=[difference("a", "b", 0.23, p)]) for p in (0.01, 0.3))
    assert "The head on b finds less: 30 of 47 (-23.0 points, -28.0 to -18.0)" in sure
    assert "The head on b is not distinguishable from it: 30 of 47" in unsure
    swapped = said(finding(), rival, differences=[difference("b", "a", -0.23, 0.01)])
    assert "finds less: 30 of 47 (-23.0 points, -28.0 to -18.0)" in swapped


def test_fine_tuned_heads_are_compared_with_the_frozen_one_of_the_same_backbone() -> None:
    full = finding("f", 43, regime="full", backbone="a")
    level = said(finding(), full, differences=[difference("f", "a", 0.043, 0.4, "regimes")], tuned=True)
    assert "Frozen and fine-tuned are not distinguishable: a, full, finds 43 of 47 (+4.3 points" in level
    more = said(finding(), full, differences=[difference("f", "a", 0.043, 0.01, "regimes")], tuned=True)
    assert "The fine-tuned head finds more: a, full, finds 43 of 47" in more
    assert "no records that can be compared" in said(finding(), tuned=True)


def test_the_answer_begins_with_the_kind_of_head_that_validation_prefers() -> None:
    best = finding("b", head="ridge", validation=0.7, score=0.4)
    assert leading([finding(score=0.9), best, finding("c", head="ridge", validation=0.6, score=0.3)]) is best
    assert leading([finding(regime="full", score=0.9), finding("b", 3, score=0.1)])["backbone"] == "b", "a frozen one"


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), min_size=1, max_size=6))
def test_a_size_is_named_only_where_nine_in_ten_and_five_from_there_on_are_found(each: list[tuple[int, float]]) -> None:
    sizes = [
        {"unit": "px", "least": 2.0**k, "below": 2.0 ** (k + 1), "defects": n, "found": round(n * share)}
        for k, (n, share) in enumerate(each)
    ]
    own = {"by_size": sizes, "defects": sum(s["defects"] for s in sizes), "found": sum(s["found"] for s in sizes)}
    named = found_from(own)
    if named:
        least, found, defects = named
        large = [s for s in sizes if s["least"] >= least]
        assert (found, defects) == (sum(s["found"] for s in large), sum(s["defects"] for s in large))
        assert defects >= 5 and found >= 0.9 * defects and own["found"] < 0.9 * own["defects"]


def line(regime: str = "frozen", **changed: Any) -> dict[str, Any]:
    own = {"data": "castings", "fraction": 1.0, "size": "64x64", "train_images": 97, "test_images": 48, "groups": 24,
           "extract_seconds": 227.0 if regime == "frozen" else 0.0, "train_seconds": 12.0}  # fmt: skip
    return {**own, "regime": regime, **changed}


def test_the_operating_point_is_said_in_words() -> None:
    assert point_sentence(None) == []
    assert point_sentence(finding()) == ["The threshold was chosen on validation for 0.1 false calls per image."]
    (folds,) = point_sentence(finding(threshold=None, least_area=9))
    assert folds.startswith("The threshold of each fold was") and folds.endswith(", for calls of 9 pixels or more.")


def test_data_and_cost_are_said_in_words() -> None:
    assert data_sentence([line()], finding()) == (
        "castings: trained on 97 images of 64x64 pixels, tested on 48 other images of 24 groups, with 47 crack defects "
        "in 12 bad parts, and 32 good parts."
    )
    assert data_sentence([line(), line(size="32x32")], None).endswith("of 64x64 or 32x32 pixels, tested on 48 other "
                                                                      "images of 24 groups.")  # fmt: skip
    broken = data_sentence([line()], None, unreadable=4)
    assert broken.endswith("of 24 groups. 4 more images took no part: they or their labels can't be used.")
    folds = data_sentence([line()], None, 5)
    assert "5 folds, each trained on 97 images of 64x64 pixels, tested on all 48 images, each once by a head" in folds
    cost = cost_sentence([line(), line(train_seconds=15.0), line("full", train_seconds=1500.0)])
    assert cost == (
        "Cost: the features of a backbone took 3.8 min, once for all heads; a head on them 12 s to 15 s; a training in "
        "the regime full took 25.0 min."
    )
    assert "a time that was not kept" in cost_sentence([line(extract_seconds=NAN)])


def test_whatever_the_page_says_of_findings_is_escaped() -> None:
    hostile = "<script>alert('&\"$x_1$')</script>"
    stored = json.loads((Path(__file__).parents[2] / "golden" / "compare.json").read_text())["sets"][-1]["lines"][0]
    unknown = {name: NAN for name, value in stored.items() if value is None and name.endswith(("_sd", "_low", "_high"))}
    shown = {**stored, **unknown, "backbone": hostile, "regime": "frozen", "differs": hostile}
    own = finding(hostile, 30, classes=[hostile], wanted=hostile, size=hostile, dtype=None, fraction=1.0, recipe_key="",
                  by_class=[{"class": hostile, "defects": 47, "missed": 17}] * 2)  # fmt: skip
    curve = [{"false_calls": rate, "recall": 0.5, "low": 0.4, "high": 0.6} for rate in (0.0, 0.1, 1.0)]
    own |= {"froc": curve, "by_size": [{**size, "low": 0.1, "high": 0.9} for size in own["by_size"]]}
    said = Answer(hostile, defect_sentences([own], (), False), [hostile], [hostile])
    worst = [Picture(hostile, fault=hostile), Picture.of(hostile, b"")]
    pod = Probability("", [(hostile, [hostile]), (hostile, [hostile])])
    item = PageSet(hostile, [shown], [], [], [hostile], [own], worst, pod, [(hostile, hostile)])
    text = page_text(hostile, [said], [item], [], [(hostile, hostile)], [hostile])
    assert "<script" not in text and text.count("&lt;script&gt;") > 30 and text.count("<svg") >= 3


def test_a_table_of_findings_leaves_out_what_it_does_not_know() -> None:
    table = finding_table([finding(), finding("b", 30)])
    assert table["found"].tolist() == ["41 of 47 (87.2 %)", "30 of 47 (63.8 %)"]
    assert "good parts stopped" in table and "good images called" not in table and "seed" not in table
    none = finding_table([finding(good_parts=0, overkill_low=NAN, overkill_high=NAN, seed=2)])
    assert none["good images called"].tolist() == ["1 of 28 (3.57 %)"] and none["seed"].tolist() == ["2"]
    assert "good parts stopped" not in none
