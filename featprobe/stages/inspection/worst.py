"""The worst that a head does on test, in pictures: what it misses, and what it calls where nothing is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from math import isnan

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.reading import hash_image, read_levels, unit_of
from featprobe.errors import FeatprobeError, counted, figures
from featprobe.geometry import Box
from featprobe.io.disk import read_json
from featprobe.metrics.defects.records import GOOD, NOTHING, Records
from featprobe.report.closeups import draw_closeup
from featprobe.specs import FeatureRecipe
from featprobe.stages.inspection.inspect import Inspection
from featprobe.stages.inspection.scored_heads import LARGEST_CARD, head_in

SIZED = {"root_area": "{} (square root of its area)", "area": "{} of area", "longest": "{} long", "shortest": "{} wide"}


@dataclass(frozen=True)
class Closeup:
    """A picture with its caption. png: the bytes of its file. fault: why there is none; then png is empty."""

    caption: str
    png: bytes = b""
    fault: str = ""


def worst(inspection: Inspection, count: int) -> list[Closeup]:
    """The worst misses of a head on test, then its worst false calls, at most `count` of each.

    Misses: in turn the largest and the clearest (by contrast to noise); of images with one score each, those with the
    lowest. False calls: those with the highest score. Each image is shown once, as long as others are left. An image
    that can't be read, or is not the one that was scored, is passed over; where that leaves nothing to show, one entry
    says why.
    """
    records, seen = inspection.records, _Images(inspection)
    missed = np.flatnonzero(~inspection.found)
    false = np.flatnonzero(records.called(inspection.thresholds) & (records.calls.touched == NOTHING))
    kinds: tuple[tuple[str, Iterable[int], NDArray[np.intp], Callable[[int], tuple[int, Box | None, str]]], ...] = (
        ("missed defect", _missed_first(inspection, missed), records.defects.image, lambda i: _of_miss(inspection, i)),
        ("false call", _highest_first(records, false), records.calls.image, lambda i: _of_call(inspection, i)),
    )
    return list(chain.from_iterable(
        seen.drawn(what, map(describe, spread(list(order), images)), count) for what, order, images, describe in kinds
    ))  # fmt: skip


def spread(order: Sequence[int], images: NDArray[np.intp]) -> list[int]:
    """The same indices, those first that are the first of their image.

    >>> spread([4, 1, 0, 2], np.array([7, 8, 9, 9, 8]))
    [4, 0, 2, 1]
    """
    first: dict[int, int] = {}
    for index in order:
        first.setdefault(int(images[index]), index)
    firsts = set(first.values())
    return [*first.values(), *(index for index in order if index not in firsts)]


def _missed_first(own: Inspection, missed: NDArray[np.intp]) -> Iterator[int]:
    """Missed defects in turn by size and by contrast, each once; the lowest scores first where neither is known."""
    defects = own.records.defects
    if own.records.about.pooled:
        scores = own.records.images.score[defects.image[missed]]
        yield from missed[np.argsort(scores, kind="stable")].tolist()
        return
    ranked = [_falling(values[missed]) for values in (defects.size(own.size, own.unit), defects.contrast)]
    known: set[int] = set()
    for pair in zip_longest(*(missed[order].tolist() for order in ranked)):
        for index in pair:
            if index is not None and index not in known:
                known.add(index)
                yield index


def _falling(values: NDArray[np.float32]) -> NDArray[np.intp]:
    """The order of values from the largest down, nan last."""
    return np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")


def _highest_first(records: Records, calls: NDArray[np.intp]) -> list[int]:
    found: list[int] = calls[_falling(records.calls.score[calls])].tolist()
    return found


def _of_miss(own: Inspection, index: int) -> tuple[int, Box | None, str]:
    """Image, box and caption of a missed defect."""
    defects, image = own.records.defects, int(own.records.defects.image[index])
    threshold, score = float(own.thresholds[image]), float(defects.score[index])
    if own.records.about.pooled:
        said = [f"image {_apart(float(own.records.images.score[image]), threshold)}"]
    else:
        said = [_size_text(own, defects.size(own.size, own.unit)[index])]
        contrast = float(defects.contrast[index])
        said += [] if isnan(contrast) else [f"contrast to noise {figures(contrast, 2)}"]
        said += ["cut by the border of the image"] if defects.cut[index] else []
        said += [f"its {_apart(score, threshold)}" if np.isfinite(score) else "no call finds it"]
    return image, _box(defects.boxes[index]), _caption(own, "Missed defect", image, int(defects.category[index]), said)


def _of_call(own: Inspection, index: int) -> tuple[int, Box | None, str]:
    """Image, box and caption of a false call."""
    calls, image = own.records.calls, int(own.records.calls.image[index])
    said = [
        _apart(float(calls.score[index]), float(own.thresholds[image])),
        _size_text(own, calls.size(own.size, own.unit)[index]),
        "no defect in this image"
        if own.records.images.good[image] == GOOD
        else "not where the defects of this image are",
    ]
    return image, _box(calls.boxes[index]), _caption(own, "False call", image, int(calls.category[index]), said)


def _caption(own: Inspection, what: str, image: int, category: int, said: Sequence[str]) -> str:
    classes = own.records.about.classes
    name = f" ({classes[category]})" if 0 < category < len(classes) else ""
    return f"{what}{name} in {own.records.images.ids[image]}: {', '.join(text for text in said if text)}"


def _apart(score: float, threshold: float) -> str:
    """A score and a threshold, with as many digits as it takes to tell them apart.

    >>> _apart(0.48412, 0.4844)
    'score 0.4841, threshold 0.4844'
    """
    digits = next((n for n in range(3, 9) if f"{score:.{n}g}" != f"{threshold:.{n}g}"), 9)
    return f"score {score:.{digits}g}, threshold {threshold:.{digits}g}"


def _size_text(own: Inspection, value: float) -> str:
    if isnan(value):
        return ""
    squared = "²" if own.size == "area" else ""
    return SIZED[own.size].format(f"{figures(value)} {own.unit}{squared}")


def _box(values: NDArray[np.float32]) -> Box | None:
    x1, y1, x2, y2 = values.tolist()
    return (x1, y1, x2, y2) if np.isfinite(values).all() else None


class _Images:
    """The images that a head was scored on, as they were when its cache was made. Raises ProbeError without a card."""

    def __init__(self, own: Inspection) -> None:
        self.images = own.records.images
        self.root = head_in(own.folder).root
        self.recipe = FeatureRecipe.from_json(read_json(own.folder / "card.json", LARGEST_CARD)["features"])

    def drawn(self, what: str, found: Iterable[tuple[int, Box | None, str]], count: int) -> list[Closeup]:
        """The pictures of the first of some places that can be drawn."""
        closeups: list[Closeup] = []
        reasons: list[str] = []
        for image, box, caption in found:
            if len(closeups) == count:
                break
            try:
                drawn = draw_closeup(self.pixels(image), box)
            except (FeatprobeError, OSError) as error:
                reasons.append(str(error).splitlines()[0])
                continue
            more = "; the enlarged place has a stretched contrast" if drawn.stretched else ""
            closeups.append(Closeup(f"{caption}{more}.", drawn.png))
        if reasons and not closeups:
            return [Closeup(f"No picture of {counted(len(reasons), what)}.", fault=reasons[0])]
        return closeups

    def pixels(self, image: int) -> NDArray[np.float32]:
        """An image in [0, 1], as its cache shows it; raises FeatprobeError."""
        path = self.root / self.images.files[image]
        if hash_image(path) != self.images.hashes[image]:
            raise FeatprobeError(f"{path} is not the image that was scored.")
        return unit_of(read_levels(path), self.recipe)
