"""Probability of detection of an inspection's records: targets, clusters, signals, sentences and the drawing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_records import drawn_records
from scipy.special import expit

from featprobe.metrics.defects.operating import counts_at
from featprobe.metrics.defects.records import Records
from featprobe.metrics.pod.conditions import CHECKED, UNCHECKED
from featprobe.metrics.pod.pod_values import Pod, Refused
from featprobe.metrics.pod.signal_response import SignalPod
from featprobe.report.pod_plot import pod_plot
from featprobe.stages.inspection.pod import PodAnswer, drawing_of, pod_lines, pod_of

BASE, THRESHOLD = 0.1, 0.5


def grown(seed: int, images: int = 150, **about: object) -> Records:
    """Records of a head whose scores grow with the size of a defect: the true a90 is e ** 2.1, 8 pixels."""
    drawn = drawn_records(seed, images, groups=60)
    rng = np.random.default_rng(seed)
    logs = np.log(drawn.defects.size())
    scores = expit(-5 + 3 * logs + rng.normal(size=len(logs))).astype(np.float32)
    scores[scores < BASE] = -np.inf
    return replace(drawn, about=replace(drawn.about, base=BASE, **about), defects=replace(drawn.defects, score=scores))


def answer_of(records: Records, threshold: float = THRESHOLD, **more: object) -> PodAnswer:
    return pod_of(records, records.defects.score >= threshold, (threshold,), **more)  # type: ignore[arg-type]


def said(answer: PodAnswer, records: Records) -> str:
    return "\n".join(pod_lines(answer, counts_at(records, THRESHOLD)))


def test_hits_and_signals_of_one_head_agree() -> None:
    records = grown(1)
    answer = answer_of(records)
    assert isinstance(answer.hit_miss, Pod) and isinstance(answer.signal, SignalPod)
    assert answer.signal.hits == answer.hit_miss.hits == int(answer.found.sum())
    true = np.exp((1.2816 + 5) / 3)
    assert answer.signal.a90 == pytest.approx(true, rel=0.15)
    assert answer.hit_miss.a90 == pytest.approx(true, rel=0.25)
    assert answer.signal.below == int((records.defects.score <= BASE).sum()) > 0
    assert answer.cluster == "part" and answer.hit_miss.clustered


def test_images_are_clusters_where_parts_are_not_known() -> None:
    records = grown(2, parts=False)
    answer = answer_of(records)
    assert answer.cluster == "image"
    assert isinstance(answer.hit_miss, Pod)
    assert answer.hit_miss.clusters == len(np.unique(records.defects.image))
    assert "per part" not in said(answer, records)


def test_sizes_that_are_not_known_and_defects_that_are_cut_are_named() -> None:
    records = grown(3)
    pixels, cut = records.defects.pixels.copy(), records.defects.cut.copy()
    pixels[:3], cut[3:5] = np.nan, True
    answer = answer_of(replace(records, defects=replace(records.defects, pixels=pixels, cut=cut)))
    assert len(answer.sizes) == len(answer.found) == len(cut) - 3
    assert "3 defects are omitted" in answer.notes[0] and "2 defects are cut" in answer.notes[1]


def test_millimetres_scale_the_answer() -> None:
    records = grown(4)
    scale = np.array([0.1, 0.01, 0.1, 0.1], dtype=np.float32)
    records = replace(records, defects=replace(records.defects, millimetres=records.defects.pixels * scale))
    one, other = answer_of(records), answer_of(records, unit="mm")
    assert isinstance(one.hit_miss, Pod) and isinstance(other.hit_miss, Pod)
    assert other.hit_miss.a90 == pytest.approx(one.hit_miss.a90 / 10, rel=1e-4)
    assert "mm" in said(other, records) and " px" not in said(other, records)


def test_probabilities_of_one_are_censored_from_above() -> None:
    records = grown(5)
    scores = np.where(records.defects.score > 0.95, np.float32(1), records.defects.score)
    answer = answer_of(replace(records, defects=replace(records.defects, score=scores)))
    assert isinstance(answer.signal, SignalPod)
    assert answer.signal.above == int((scores == 1).sum()) > 0
    assert "at the saturation" in said(answer, records)


def test_values_of_an_anomaly_map_are_taken_by_their_logarithm() -> None:
    records = grown(6)
    scores = np.where(records.defects.score > 0, 1 / (1 / records.defects.score.clip(1e-9) - 1), -np.inf)  # the odds
    about = replace(records.about, task="anomaly", base=BASE / (1 - BASE))
    odds = replace(records, about=about, defects=replace(records.defects, score=scores.astype(np.float32)))
    one, other = answer_of(records).signal, answer_of(odds, 1.0).signal
    assert isinstance(one, SignalPod) and isinstance(other, SignalPod)
    assert other.a90 == pytest.approx(one.a90, rel=1e-3)


def test_detections_have_the_lowest_call_as_noise() -> None:
    records = grown(7)
    answer = answer_of(replace(records, about=replace(records.about, base=float("nan"))))
    assert isinstance(answer.signal, SignalPod)
    lowest = records.calls.score.min()
    assert answer.signal.below == int((records.defects.score <= lowest).sum())


def test_folds_have_hits_and_misses_alone() -> None:
    records = grown(8)
    answer = pod_of(records, records.defects.score >= THRESHOLD, (0.5, 0.4))
    assert isinstance(answer.hit_miss, Pod) and answer.signal is None
    assert "fold" in answer.notes[-1]


def test_a_head_with_one_score_for_each_image_is_refused() -> None:
    records = drawn_records(9, 100, pooled=True)
    answer = pod_of(records, np.zeros(len(records.defects), bool), (0.5,))
    assert isinstance(answer.hit_miss, Refused) and answer.signal is None
    assert drawing_of(answer) is None
    assert "one score" in said(answer, records)


def test_refusals_say_what_is_missing_and_nothing_is_drawn() -> None:
    records = grown(10, images=20)
    answer = answer_of(records)
    assert isinstance(answer.hit_miss, Refused) and isinstance(answer.signal, Refused)
    text = said(answer, records)
    assert text.count("No curve:") == text.count("Missing:") >= 2 and "more target" in text
    assert "At the same threshold" not in text and "Conditions" not in text
    assert drawing_of(answer) is None


def test_no_call_at_all_is_no_signal() -> None:
    records = grown(11)
    calls = records.calls
    none = replace(calls, **{name: column[:0] for name, column in vars(calls).items()})
    silent = replace(records.defects, score=np.full(len(records.defects), -np.inf, np.float32))
    empty = replace(records, about=replace(records.about, base=float("nan")), calls=none, defects=silent)
    answer = answer_of(replace(empty, finds=empty.finds[:0]))
    assert isinstance(answer.signal, Refused) and "no call" in answer.signal.reasons[0]


def test_sentences_give_the_false_calls_at_the_same_threshold_and_what_is_not_checked() -> None:
    records = grown(12)
    counts = counts_at(records, THRESHOLD)
    text = said(answer_of(records), records)
    assert f"{counts.false_calls} false call" in text
    assert f"{counts.false_calls / counts.over('image'):.3g} per image" in text and "per part" in text
    assert "that the data can't show" in text and "stand for the defects in service" in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_drawing_has_every_target_and_is_the_same_each_time() -> None:
    records = grown(13)
    answer = answer_of(records)
    drawn = drawing_of(answer)
    assert drawn is not None and isinstance(answer.hit_miss, Pod)
    assert sorted((*drawn.hits, *drawn.misses)) == sorted(answer.sizes.tolist())
    assert [line.label for line in drawn.lines[:2]] == ["by hits and misses", "by signals"]
    assert drawn.a90 == answer.hit_miss.a90
    svg = pod_plot(drawn, "POD of <linear>")
    assert svg == pod_plot(drawn, "POD of <linear>")
    assert svg.startswith("<svg") and "POD of &lt;linear&gt;" in svg and "<script" not in svg
    for text in (f"{len(drawn.hits)} found", f"{len(drawn.misses)} missed", f"a90 {drawn.a90:.3g}", "found, percent"):
        assert text in svg


def test_a_ceiling_is_drawn_and_gives_no_size() -> None:
    rng = np.random.default_rng(14)
    records = grown(14, images=400)
    scores = np.where(rng.random(len(records.defects)) < 0.25, -np.inf, records.defects.score + 0.2).astype(np.float32)
    answer = answer_of(replace(records, defects=replace(records.defects, score=scores)))
    assert answer.other is not None and answer.other.ceiling == pytest.approx(0.75, abs=0.1)
    drawn = drawing_of(answer)
    assert drawn is not None and "ceiling" in drawn.lines[-1].label and not drawn.lines[-1].low
    assert isinstance(answer.hit_miss, Pod) and drawn.a90 == answer.hit_miss.a90


def test_the_page_lists_the_conditions_that_are_printed() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pod.md").read_text(encoding="utf-8")
    assert [line for line in (*CHECKED, *UNCHECKED) if f"- {line}\n" not in page] == []
