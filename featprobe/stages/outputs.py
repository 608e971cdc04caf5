"""What `predict` makes of what a head finds: a class for each kind of output, in one table."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images.pages import page_of
from featprobe.errors import ProbeError
from featprobe.features import Features, Pooled, pool
from featprobe.geometry import Part, Placement, Size
from featprobe.image_labels import Unit, names_by
from featprobe.kinds import kind_of
from featprobe.metrics.images import decide, defect_scores
from featprobe.probes import DenseHead, ObjectHead, objects_at_original
from featprobe.probes.head import AnomalyHead, ImageHead, PooledAnomalyHead, VerdictHead
from featprobe.report.heat import Heat
from featprobe.report.outlines import polygons_of
from featprobe.report.sheets import Panel, colour_of, png
from featprobe.report.streamed import CocoFile, CsvFile, StreamedFile
from featprobe.result_rows import ResultRow
from featprobe.scores import On
from featprobe.specs import DataInfo
from featprobe.stages.findings import (
    AT_LEAST,
    Finding,
    Judged,
    Threshold,
    judged_map,
    judged_objects,
    judged_pixels,
    judged_score,
    judged_tiles,
)
from featprobe.stages.stitch import Objects, stitched_objects, whole_logits
from featprobe.stages.tasks.classification import (
    balanced,
    colours_of,
    label_text,
    probabilities_of,
    tile_boxes,
)
from featprobe.stages.tasks.detection import coco_results
from featprobe.stages.tasks.heat_panels import panel_of
from featprobe.stages.tasks.seen import Seen, joined, of_tiles, pieces_of
from featprobe.targets import Instance, Labels, decode_rle

FOUND = "an image with a finding is called; a finding is "
F = TypeVar("F")
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A tile of an image, or all of it where `part` is None. image: its number in the batch. levels: its pixels."""

    image: int
    levels: NDArray[Any]
    part: Part | None
    placement: Placement


@dataclass(frozen=True)
class Predicted(Generic[F]):
    """What a head found in an image of (height, width), and what is said of the image.

    image: its path. name: that of its files, without suffix.
    """

    image: Path
    name: str
    size: Size
    found: F
    judged: Judged

    @property
    def file_name(self) -> str:
        """See `file_name_of`."""
        return file_name_of(self.image, self.name)


def file_name_of(image: Path, name: str) -> str:
    """The path of an image, or of a page of one, below the folder that was asked for. name: that of its files."""
    file, page = page_of(image)
    folder = Path(name).parent
    return (folder / file.name if page is None else folder.parent / file.name / image.name).as_posix()


Batches = Iterator[tuple[Sequence[Piece], Features]]
"""Some pieces, and their features: those of an image follow each other."""


class Output(ABC, Generic[F]):
    """What one kind of head gives. F: what it finds in an image; its pixels are those of the original image.

    files: what is written, for people. classes: what overlays have colours for, the background first. notes: what a
    user should know of all of it. threshold, rule: when an image is called, see `findings`; the rule for people. most:
    the largest threshold that makes sense. on_maps: which kinds of operating points it may have: of pixels of maps that
    are joined (True), or of scores as they are.
    """

    files: tuple[str, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    threshold: Threshold
    most: float = 1.0
    on_maps: tuple[bool, ...] = (False,)

    @property
    def named(self) -> tuple[str, ...]:
        """The names of what is found: classes, the background first, or labels."""
        return self.classes

    @property
    @abstractmethod
    def rule(self) -> str:
        """When an image is called, for people; "" where no image is."""

    @abstractmethod
    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[F, Judged]]:
        """What the head finds in each image of these sizes, from its pieces; and what is said of the image."""

    @abstractmethod
    def panel(self, pixels: NDArray[np.float32], found: F) -> Panel:
        """The picture of an overlay."""

    def pictures(self, name: str, found: F) -> Mapping[str, bytes]:
        """Further files of an image, by their paths."""
        return {}

    def streamed(self) -> Sequence[StreamedFile[Predicted[F]]]:
        """Files about all images."""
        return ()

    def values(self, found: F) -> Mapping[str, Any]:
        """The fields of a `predictor.Result` that this kind of head fills."""
        return {}


class Masks(Output[Labels]):
    """Class indices of pixels, as PNG files with a palette, and findings as COCO JSON."""

    files = ("masks/", "findings.json", "overlays/")
    on_maps = (True,)

    def __init__(self, head: DenseHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        self.head, self.classes = head, tuple(card["head"]["classes"])
        self.threshold = threshold or Threshold(nan, "default")

    @property
    def rule(self) -> str:
        """See Output."""
        of = "in the class map"
        if self.threshold.source == "given":
            of = f"among the pixels whose probability of a class is {self.threshold.value:.6g} or more"
        if self.threshold.is_point:
            of = _joined_rule(self.threshold, "probability of a class")
        return f"{FOUND}a connected component of one class but {self.classes[0]} {of}"

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[Labels, Judged]]:
        """Class indices, (height, width): those of findings, 0 elsewhere."""
        cells = _each(lambda features: self.head(features).unbind(), batches)
        for size, (_, own) in zip(sizes, groupby(cells, _image_of), strict=True):
            pieces = (([found], piece.placement, piece.part) for piece, found in own)
            (logits,) = whole_logits(pieces, self.head.stride, size)
            yield judged_pixels(logits, self.threshold)

    def panel(self, pixels: NDArray[np.float32], found: Labels) -> Panel:
        """The classes over the image."""
        return Panel(pixels, found)

    def pictures(self, name: str, found: Labels) -> Mapping[str, bytes]:
        """The mask."""
        picture = Image.fromarray(found, mode="P")
        picture.putpalette([value for index in range(256) for value in colour_of(index, self.classes)])
        return {f"masks/{name}.png": png(picture)}

    def streamed(self) -> Sequence[StreamedFile[Predicted[Labels]]]:
        """The findings."""
        return [findings_file(self)]

    def values(self, found: Labels) -> Mapping[str, Any]:
        """The mask."""
        return {"class_map": found}


class FoundObjects(Output[Objects]):
    """Boxes, with or without masks, as COCO JSON in pixels of the original images: all of them, and the findings."""

    files = ("predictions.json", "findings.json", "overlays/")

    def __init__(self, head: ObjectHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        self.head, self.classes = head, tuple(card["head"]["classes"])
        own = ResultRow.from_json(card["result"]).instances == "own"
        self.category_ids: Sequence[int] = card["data"].get("category_ids", ()) if own else ()
        self.threshold = threshold or Threshold(AT_LEAST, "default")

    @property
    def rule(self) -> str:
        """See Output."""
        return f"{FOUND}a detection with a score of {self.threshold.value:.6g} or more{_area_rule(self.threshold)}"

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[Objects, Judged]]:
        """Objects with a score each, best first."""
        detections = _each(self.head, batches)
        for size, (_, own) in zip(sizes, groupby(detections, _image_of), strict=True):
            pieces = [(objects_at_original(one, piece.placement), piece.part) for piece, one in own]
            objects = stitched_objects(pieces, size)
            yield objects, judged_objects(objects, self.threshold)

    def panel(self, pixels: NDArray[np.float32], found: Objects) -> Panel:
        """The findings over the image."""
        findings = judged_objects(found, self.threshold).findings or ()
        return Panel(pixels, instances=tuple(finding.instance for finding in findings))

    def streamed(self) -> Sequence[StreamedFile[Predicted[Objects]]]:
        """All objects under the set's own ids of classes, and the findings."""
        ids = list(self.category_ids) or list(range(1, len(self.classes)))
        categories = list(zip(ids, self.classes[1:], strict=True))
        every = {"description": "all detections, also those that are no finding"}
        return [
            CocoFile("predictions.json", every, categories, _image_record, partial(_all_of, ids)),
            findings_file(self),
        ]


@dataclass(frozen=True)
class Verdict:
    """What is said of an image, or of one tile of it. probabilities, decided: (labels,). part: the tile."""

    probabilities: NDArray[np.float32]
    decided: NDArray[np.uint8]
    part: Part | None = None


class ImageVerdicts(Output[list[Verdict]]):
    """Labels of images, or of their tiles, in one CSV file."""

    files = ("labels.csv", "overlays/")

    def __init__(self, head: ImageHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        self.head, self.threshold = head, _threshold_of(head, threshold)
        data, settings = DataInfo.from_json(card["data"]), ResultRow.from_json(card["result"]).settings
        if settings is None or settings.labels is None:
            raise ProbeError("The card of this head does not say which labels it was trained on. Train it again.")
        self.unit, self.names = settings.unit, names_by(settings.labels, data.label_names, data.classes)
        self.classes = colours_of(self.names) if self.unit == "tile" else ()
        self.good = None if self.names.good is None else self.names.names.index(self.names.good)
        shares = ", ".join(f"{n} {100 * p:.0f} %" for n, p in zip(self.names.names, self._prior.tolist(), strict=True))
        self.notes = (
            "labels are decided as if all were equally frequent; the probabilities in labels.csv are for images as "
            f"frequent as in training ({shares})",
        )

    @property
    def named(self) -> tuple[str, ...]:
        """The labels."""
        return self.names.names

    @property
    def rule(self) -> str:
        """See Output."""
        return _score_rule(self.threshold, self.unit, "score of a defect") if self.names.says_good else ""

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[list[Verdict], Judged]]:
        """A verdict on the image, or one on each of its tiles."""
        pooled = [(pieces, pool(features, self.head.levels)) for pieces, features in batches]
        pieces = [piece for own, _ in pooled for piece in own]
        every = Pooled.of_all([own for _, own in pooled])
        if self.unit == "image":
            index = torch.tensor([piece.image for piece in pieces], device=self.head.prior.device)
            every = every.joined(index, len(sizes))
        shares = probabilities_of(self.head(every.vectors(self.head.levels)), self.names)
        said = decide(shares, self._prior, self.names.multi)
        if self.unit == "image":
            for one in map(Verdict, shares, said):
                yield [one], judged_score(self._score(one), self.threshold)
            return
        verdicts = [Verdict(p, own, piece.part) for p, own, piece in zip(shares, said, pieces, strict=True)]
        for _, some in groupby(zip(pieces, verdicts, strict=True), _image_of):
            tiles = [one for _, one in some]
            scores = [(self._score(one), one.part) for one in tiles if one.part]
            yield tiles, judged_tiles(scores, self.threshold)

    def panel(self, pixels: NDArray[np.float32], found: list[Verdict]) -> Panel:
        """The labels below the image; of tiles, a box for each label but the good one."""
        if self.unit == "image":
            (one,) = found
            shares = balanced(one.probabilities[None], self._prior, self.names)[0]
            return Panel(pixels, text=(*label_text(one.decided, shares, self.names), *self._called(one)))
        return Panel(pixels, instances=tile_boxes([(v.part, v.decided) for v in found], self.names))

    def streamed(self) -> Sequence[StreamedFile[Predicted[list[Verdict]]]]:
        """A line for each image or tile."""
        tile = ["left", "top", "width", "height"] if self.unit == "tile" else []
        probabilities = [f"probability of {name}" for name in self.names.names]
        scores = ["score of a defect", "threshold", "verdict"] if self.names.says_good else []
        header = ["image", *tile, "labels", *probabilities, *scores]
        return [CsvFile("labels.csv", header, lambda one: [[one.file_name, *self._line(v)] for v in one.found])]

    def values(self, found: list[Verdict]) -> Mapping[str, Any]:
        """Probabilities and decided labels, of the image or of each of its tiles."""
        named = [tuple(n for n, own in zip(self.names.names, v.decided.tolist(), strict=True) if own) for v in found]
        shares = np.stack([verdict.probabilities for verdict in found])
        if self.unit == "tile":
            return {"probabilities": shares, "labels": tuple(named), "tiles": tuple(v.part for v in found)}
        return {"probabilities": shares[0], "labels": named[0]}

    @property
    def _prior(self) -> NDArray[np.float32]:
        prior: NDArray[np.float32] = self.head.prior.cpu().numpy()
        return prior

    def _line(self, one: Verdict) -> list[Any]:
        part = [one.part.left, one.part.top, one.part.width, one.part.height] if one.part else []
        held = [name for name, own in zip(self.names.names, one.decided.tolist(), strict=True) if own]
        score, threshold = self._score(one), self.threshold.value
        limit = "" if isnan(threshold) else f"{threshold:.6f}"
        scores = [] if score is None else [f"{score:.6f}", limit, *(self._called(one) or [""])]
        return [*part, "|".join(held), *(f"{p:.6f}" for p in one.probabilities), *scores]

    def _score(self, one: Verdict) -> float | None:
        scores = defect_scores(one.probabilities[None], self.names.multi, self.good)
        return None if scores is None else float(scores[0])

    def _called(self, one: Verdict) -> list[str]:
        """What the threshold says of an image or a tile; nothing where there is none."""
        score, area = self._score(one), inf if one.part is None else one.part.height * one.part.width
        said = "" if score is None else self.threshold.verdict(score, area)
        return [said] if said else []


class Anomalies(Output[Seen]):
    """Scores of images in one CSV file."""

    classes = ()
    most = inf

    def __init__(self, head: VerdictHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        self.threshold, self.unit = _threshold_of(head, threshold), _unit_of(card)
        self.notes = _notes_on(self.threshold, self.unit)

    @property
    def rule(self) -> str:
        """See Output."""
        if self.threshold.on_maps:
            return f"{FOUND}a connected component {_joined_rule(self.threshold, 'value')}"
        return _score_rule(self.threshold, self.unit, "score")

    def judged(self, seen: Seen) -> Judged:
        """What is said of an image by its score, by those of its tiles, or by its map at an operating point of maps."""
        if self.threshold.on_maps and seen.map is not None:
            return judged_map(seen.map.cpu().numpy(), self.threshold)
        if self.unit == "tile":
            return judged_tiles(seen.tiles, self.threshold)
        return judged_score(seen.score, self.threshold)

    def streamed(self) -> Sequence[StreamedFile[Predicted[Seen]]]:
        """A line for each image: its score, the threshold and the verdict, both empty without a threshold."""
        value = self.threshold.value
        limit = "" if isnan(value) else f"{value:.6g}"

        def line(one: Predicted[Seen]) -> list[list[object]]:
            return [[one.file_name, f"{one.judged.score:.6g}", limit, one.judged.verdict]]

        return [CsvFile("scores.csv", ["image", "score", "threshold", "verdict"], line)]

    def panel_at(self, pixels: NDArray[np.float32], found: Seen, map_threshold: float) -> Panel:
        """The image under its heat map, with the verdict below. map_threshold: of pixels, where colours change."""
        if not self.threshold.is_point:
            return panel_of(pixels, found, self.threshold.value, map_threshold, self.unit)
        judged = self.judged(found)
        heat = None if found.map is None else Heat(found.map.cpu().numpy(), map_threshold)
        boxes = tuple(Instance(1, one.box) for one in judged.findings or ())
        text = f"{judged.verdict}: score {judged.score:.3g}", f"operating point {self.threshold.value:.3g}"
        return Panel(pixels, instances=boxes, text=text, heat=heat)


class HeatMaps(Anomalies):
    """The same, and a heat map of each image.

    The maps are TIFF files of 32-bit floating point: the values of the pixels of the original image.
    """

    files = ("scores.csv", "maps/", "overlays/")

    def __init__(self, head: AnomalyHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        super().__init__(head, card, threshold)
        self.head = head
        self.on_maps = (False,) if self.unit == "tile" else (True, False)

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[Seen, Judged]]:
        """The score and the map."""
        pieces = _each(partial(pieces_of, self.head), batches)
        for size, (_, own) in zip(sizes, groupby(pieces, _image_of), strict=True):
            seen = joined([(found, piece.placement, piece.part) for piece, found in own], size)
            yield seen, self.judged(seen)

    def panel(self, pixels: NDArray[np.float32], found: Seen) -> Panel:
        """The heat map over the image, on the scale of all maps of this head."""
        return self.panel_at(pixels, found, float(self.head.map_threshold))

    def pictures(self, name: str, found: Seen) -> Mapping[str, bytes]:
        """The map."""
        return {} if found.map is None else {f"maps/{name}.tif": float_tiff(found.map.cpu().numpy())}

    def values(self, found: Seen) -> Mapping[str, Any]:
        """The map."""
        return {} if found.map is None else {"heat_map": found.map.cpu().numpy()}


class AnomalyScores(Anomalies):
    """Scores of images by a head without maps."""

    files = ("scores.csv", "overlays/")

    def __init__(self, head: PooledAnomalyHead, card: Mapping[str, Any], threshold: Threshold | None) -> None:
        super().__init__(head, card, threshold)
        self.head = head

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[tuple[Seen, Judged]]:
        """The score; of tiles that are judged each for itself, the highest."""
        pooled = [(pieces, pool(features, self.head.levels)) for pieces, features in batches]
        pieces = [piece for own, _ in pooled for piece in own]
        every = Pooled.of_all([own for _, own in pooled])
        if self.unit == "image":
            device = self.head.get_buffer(self.head.banks[0]).device
            every = every.joined(torch.tensor([piece.image for piece in pieces], device=device), len(sizes))
        scores = self.head(every.vectors(self.head.levels)).scores.tolist()
        if self.unit == "image":
            yield from ((seen, self.judged(seen)) for seen in map(Seen, scores))
            return
        for _, own in groupby(zip(pieces, scores, strict=True), _image_of):
            seen = of_tiles([(score, piece.part) for piece, score in own])
            yield seen, self.judged(seen)

    def panel(self, pixels: NDArray[np.float32], found: Seen) -> Panel:
        """The image with its score."""
        return self.panel_at(pixels, found, nan)


def _threshold_of(head: ImageHead | VerdictHead, given: Threshold | None) -> Threshold:
    """The threshold that was given or chosen, or else the one that was set on good validation images."""
    return given or Threshold.of_head(float(head.threshold))


def _score_rule(threshold: Threshold, unit: Unit, score: str) -> str:
    """When an image with one score, or its tiles with one each, is called."""
    if isnan(threshold.value):
        return ""
    above = f"a {score} above {threshold.value:.6g}"
    if threshold.is_point:
        above = f"a {score} of {threshold.value:.6g} or more{_area_rule(threshold) if unit == 'tile' else ''}"
    source = ", the threshold that was set on good validation images" if threshold.source == "head" else ""
    return f"{FOUND}a tile with {above}{source}" if unit == "tile" else f"an image is called for {above}{source}"


def _joined_rule(threshold: Threshold, value: str) -> str:
    """Which pixels are joined to findings at an operating point of maps, and which of them count."""
    return (
        f"among the pixels whose {value} is {np.float32(threshold.base):.6g} or more, with a largest {value} of "
        f"{threshold.value:.6g} or more{_area_rule(threshold)}"
    )


def _area_rule(threshold: Threshold) -> str:
    return f", of {threshold.least_area} pixels or more" if threshold.least_area > 1 else ""


def _notes_on(threshold: Threshold, unit: Unit) -> tuple[str, ...]:
    """What people must know of the verdicts of an anomaly head."""
    notes = []
    if isnan(threshold.value):
        notes.append("this head has no threshold: there were no good images in validation. So there are no verdicts")
    if unit == "tile":
        notes.append("this head judges tiles: an image has the highest score of its tiles")
    return tuple(notes)


def _unit_of(card: Mapping[str, Any]) -> Unit:
    settings = ResultRow.from_json(card["result"]).settings
    if settings is None:
        raise ProbeError("The card of this head does not say whether it judges images or tiles. Train it again.")
    return settings.unit


def float_tiff(values: NDArray[np.float32]) -> bytes:
    """A map, (height, width), as the bytes of a compressed TIFF file of 32-bit floating point."""
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.float32)).save(stream, format="TIFF", compression="tiff_adobe_deflate")
    return stream.getvalue()


def _of_anomalies(head: Any, card: Mapping[str, Any], threshold: Threshold | None) -> Output[Seen]:
    pooled = kind_of(card["head"]["task"], card["head"]["kind"]).pooled
    return (AnomalyScores if pooled else HeatMaps)(head, card, threshold)


OUTPUTS: Mapping[On, Callable[[Any, Mapping[str, Any], Threshold | None], Output[Any]]] = {
    "pixels": Masks,
    "boxes": FoundObjects,
    "masks": FoundObjects,
    "images": ImageVerdicts,
    "anomalies": _of_anomalies,
}
"""What a task is scored on -> what its heads give, from a head, its card, and a threshold that was given or chosen."""


def _each(head: Callable[[Features], Sequence[T]], batches: Batches) -> Iterator[tuple[Piece, T]]:
    """Each piece, and what the head finds in it."""
    for pieces, features in batches:
        yield from zip(pieces, head(features), strict=True)


def _image_of(found: tuple[Piece, object]) -> int:
    return found[0].image


def findings_file(output: Output[Any]) -> StreamedFile[Predicted[Any]]:
    """Findings as COCO JSON with polygons, as CVAT and Label Studio import it; classes count from 1.

    A box alone has an empty `segmentation`, which CVAT makes a rectangle.
    """

    def image(one: Predicted[Any]) -> dict[str, Any]:
        return _image_record(one) | {"verdict": one.judged.verdict}

    def annotations(one: Predicted[Any]) -> list[dict[str, Any]]:
        return [_annotation(finding) for finding in one.judged.findings or ()]

    categories = list(enumerate(output.classes))[1:]
    return CocoFile("findings.json", {"description": output.rule}, categories, image, annotations)


def _annotation(one: Finding) -> dict[str, Any]:
    x1, y1, x2, y2 = one.box
    return {
        "category_id": one.category,
        "bbox": [round(v, 4) for v in (x1, y1, x2 - x1, y2 - y1)],
        "area": round(one.area, 4),
        "segmentation": [] if one.rle is None else polygons_of(one.rle),
        "score": round(one.score, 6),
    }


def _image_record(one: Predicted[Any]) -> dict[str, Any]:
    return {"file_name": one.file_name, "height": one.size[0], "width": one.size[1]}


def _all_of(category_ids: Sequence[int], one: Predicted[Objects]) -> list[dict[str, Any]]:
    """All objects of an image, as COCO has annotations, with run lengths."""
    found = coco_results(one.found, 0, category_ids)
    for annotation in found:
        mask = annotation.get("segmentation")
        annotation["area"] = int(decode_rle(mask).sum()) if mask else annotation["bbox"][2] * annotation["bbox"][3]
    return found
