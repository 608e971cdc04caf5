"""From the records of an inspection to a probability of detection: of hits and misses, and of the scores as signals."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit

from featprobe.errors import counted, figures
from featprobe.metrics.defects.operating import Counts
from featprobe.metrics.defects.records import Records, Size, Unit
from featprobe.metrics.intervals import grouped
from featprobe.metrics.pod.conditions import UNCHECKED
from featprobe.metrics.pod.floor_ceiling import FloorCeiling, floor_ceiling
from featprobe.metrics.pod.hit_miss import hit_miss
from featprobe.metrics.pod.pod_values import Pod, Refused
from featprobe.metrics.pod.signal_response import SignalPod, signal_response

if TYPE_CHECKING:
    from featprobe.report.pod_plot import PodPicture

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
LAST = 1 - 2.0**-24  # the largest probability below 1 in float32: one of 1 is known to be at least this
AXES: dict[Size, str] = {
    "root_area": "square root of the area",
    "area": "area",
    "longest": "longest side",
    "shortest": "shortest side",
}
FAR = 10.0  # times the largest target: a size beyond that is no figure to show
DOUBT = 0.05  # p-value of a curve's fit, below which it is doubted
ONE_SCORE = "This head gives each image one score, so it is not known which of its defects is found."
OTHER_HEAD = "a head that finds places: one with maps, or one of objects"


@dataclass(frozen=True)
class PodAnswer:
    """The probability of detection of a head at its operating point.

    signal: of the scores of defects as signals; None where scores of several heads do not compare. sizes, found:
    (targets,), of the defects whose size is known. cluster: what targets that resemble each other share, "part" or
    "image". size, unit: what sizes are. other: the curve with floor and ceiling, for the picture alone; None where the
    usual one does as well. notes: sentences.
    """

    hit_miss: Pod | Refused
    signal: SignalPod | Refused | None
    sizes: Floats
    found: Flags
    cluster: str
    size: Size
    unit: Unit
    other: FloorCeiling | None = None
    notes: tuple[str, ...] = ()

    @property
    def unit_text(self) -> str:
        """The unit of the size."""
        return self.unit + ("²" if self.size == "area" else "")


def pod_of(
    records: Records, found: Flags, thresholds: tuple[float, ...], size: Size = "root_area", unit: Unit = "px"
) -> PodAnswer:
    """The probability of detection of the defects of test records.

    found: (defects,), at the operating point. thresholds: of the operating point, one for each head that found some.
    Targets of one part are a cluster; where groups are not known to be parts, those of one image are.
    """
    defects, images = records.defects, records.images
    sizes = defects.size(size, unit).astype(float)
    known = np.isfinite(sizes) & (sizes > 0)
    notes = []
    if unknown := int((~known).sum()):
        notes.append(f"{_are(unknown, 'defect')} omitted, as the size is not known.")
    if cut := int(defects.cut[known].sum()):
        notes.append(f"{_are(cut, 'defect')} cut by the border of an image: the size is that of the part that is seen.")
    answer = PodAnswer(
        hit_miss=Refused("hit/miss", (ONE_SCORE,), (OTHER_HEAD,), int(known.sum()), int(found[known].sum())),
        signal=None,
        sizes=sizes[known],
        found=found[known],
        cluster="part" if records.about.parts else "image",
        size=size,
        unit=unit,
        notes=tuple(notes),
    )
    if records.about.pooled:
        return answer
    cluster = grouped(images.groups)[1] if records.about.parts else np.arange(len(images))
    return _fitted(answer, records, known, cluster[defects.image[known]], thresholds)


def _fitted(
    answer: PodAnswer, records: Records, known: Flags, clusters: NDArray[np.intp], thresholds: tuple[float, ...]
) -> PodAnswer:
    hits = hit_miss(answer.sizes, answer.found, clusters.tolist())
    other = floor_ceiling(answer.sizes, answer.found, hits.curve.sizes) if isinstance(hits, Pod) else None
    answer = replace(answer, hit_miss=hits, other=other)
    if len(thresholds) == 1:
        return replace(answer, signal=_signals(answer.sizes, records, known, clusters, thresholds[0]))
    note = "Each fold has a head with scores of its own: a signal response takes those of one head."
    return replace(answer, notes=(*answer.notes, note))


def _signals(
    sizes: Floats, records: Records, known: Flags, clusters: NDArray[np.intp], threshold: float
) -> SignalPod | Refused:
    """The signal of a defect is its score: the logit of a probability, the logarithm of a value of an anomaly map.

    Below the base threshold of a map, or below the lowest call of a detector, no signal is seen: it is censored there.
    """
    scores, values = records.defects.score[known].astype(float), records.about.task == "anomaly"
    noise = records.about.base if math.isfinite(records.about.base) else float(records.calls.score.min(initial=np.inf))
    if not 0 < noise < math.inf:
        why = "There is no call" if noise == math.inf else f"The lowest score of a call is {noise:.3g}, not above 0"
        hits = int((scores >= threshold).sum())
        return Refused("signal response", (f"{why}: signals have no scale.",), ("calls above 0",), len(scores), hits)

    def scale(score: ArrayLike) -> Floats:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.maximum(score, 0)) if values else logit(np.clip(score, 0, LAST)), dtype=float)

    saturation = None if values or not (scores >= LAST).any() else float(scale(LAST))
    decided, low = scale([max(threshold, noise), noise]).tolist()
    return signal_response(sizes, scale(scores), decided, low, saturation, clusters, log=False)


def pod_lines(answer: PodAnswer, counts: Counts) -> list[str]:
    """A probability of detection in sentences; those that begin with a space belong to the one above.

    counts: of the test images at the same operating point.
    """
    size = f"{AXES[answer.size]}, {answer.unit_text}"
    lines = [f"Probability of detection by hits and misses ({size}):", *_said(answer.hit_miss, answer)]
    if answer.signal is not None:
        lines += [f"Probability of detection by signals, the scores of defects ({size}):"]
        lines += _said(answer.signal, answer)
    if any(isinstance(pod, Pod) for pod in (answer.hit_miss, answer.signal)):
        lines += [f"At the same threshold: {', '.join(_rates(answer, counts))}.", *answer.notes]
        return [*lines, "Conditions of MIL-HDBK-1823A that the data can't show:", *(f"  {own}" for own in UNCHECKED)]
    return [*lines, *answer.notes]


def _rates(answer: PodAnswer, counts: Counts) -> list[str]:
    """False calls: how many, and per image and part."""
    rates = [f"{counted(counts.false_calls, 'false call')} on {counted(counts.over('image'), 'image')}"]
    if images := counts.over("image"):
        rates.append(f"{figures(counts.false_calls / images)} per image")
    if (parts := counts.over("part")) and answer.cluster == "part":
        rates.append(f"{figures(counts.false_calls / parts)} per part")
    return rates


def _said(pod: Pod | Refused, answer: PodAnswer) -> list[str]:
    """One curve, or why there is none, in indented sentences."""
    if isinstance(pod, Refused):
        each = zip(pod.reasons, pod.missing, strict=True)
        return [f"  No curve: {reason} Missing: {missing}." for reason, missing in each]
    given = pod.a90_95 is not None and math.isfinite(pod.a90_95)
    found = f"{pod.hits} of {counted(pod.targets, 'defect')} found"
    if pod.clustered:
        found += f", in {counted(pod.clusters, answer.cluster)}"
        found += f"; the bound allows for defects of one {answer.cluster} that are alike" if given else ""
    a50, a90, bound = (_size(size, answer) for size in (pod.a50, pod.a90, pod.a90_95))
    said = [f"a50 {a50}, a90 {a90}, {f'a90/95 {bound}' if given else 'no a90/95'}.", f"{found}."]
    if pod.no_bound:
        said.append(pod.no_bound)
    if pod.joint_a90_95 is not None and math.isfinite(pod.joint_a90_95):
        said.append(f"The joint bound of Cheng and Iles, of the handbook: {_size(pod.joint_a90_95, answer)}.")
    if isinstance(pod, SignalPod):
        if given:
            said.append(f"The bound by the delta method, of the handbook: {_size(pod.delta_a90_95, answer)}.")
        said.append(f"{counted(pod.below, 'signal')} at the noise, {pod.above} at the saturation.")
    if pod.coverage is not None and given:
        sets = f"of {pod.simulated}" if pod.simulated else "like this one"
        said.append(f"In simulated sets {sets}, the bound is above the true a90 in {100 * pod.coverage:.1f} %.")
    if pod.lack_of_fit is not None and pod.lack_of_fit < DOUBT:
        said.insert(0, "Do not use these sizes, as the curve does not fit:")
    elif pod.lack_of_fit is not None:
        said.append(f"Fit: p {pod.lack_of_fit:.2g}, no sign of a lack of fit.")
    return [f"  {line}" for line in (*said, *pod.notes)]


def _size(size: float | None, answer: PodAnswer) -> str:
    """A size with its unit, or words; "" for none."""
    if size is None:
        return ""
    if size > FAR * answer.sizes.max():
        return f"beyond {FAR:g} times the largest target"
    return f"{figures(size)} {answer.unit_text}"


def drawing_of(answer: PodAnswer) -> "PodPicture | None":
    """What is drawn: the curve of hits and misses, beside it that of signals; None where there is neither."""
    from featprobe.report.pod_plot import PodLine, PodPicture  # which loads matplotlib

    curves = [pod for pod in (answer.hit_miss, answer.signal) if isinstance(pod, Pod)]
    if not curves:
        return None
    lines = []
    for pod in curves:
        curve, label = pod.curve, "hits and misses" if pod.kind == "hit/miss" else "signals"
        band = (curve.low.tolist(), curve.high.tolist()) if pod.a90_95 is not None else ((), ())
        if pod.lack_of_fit is not None and pod.lack_of_fit < DOUBT:
            label += " (does not fit)"
        lines.append(PodLine(f"by {label}", curve.sizes.tolist(), curve.pod.tolist(), *band))
    if (other := answer.other) is not None:
        label = f"floor {100 * other.floor:.0f} %, ceiling {100 * other.ceiling:.0f} % (not for a90)"
        lines.append(PodLine(label, other.sizes.tolist(), other.pod.tolist()))
    hits, misses = answer.sizes[answer.found].tolist(), answer.sizes[~answer.found].tolist()
    bound = curves[0].a90_95
    if bound is not None and not math.isfinite(bound):
        bound = None
    return PodPicture(lines, hits, misses, curves[0].a90, bound, f"{AXES[answer.size]}, {answer.unit_text}")


def _are(number: int, noun: str) -> str:
    return f"{counted(number, noun)} {'is' if number == 1 else 'are'}"
