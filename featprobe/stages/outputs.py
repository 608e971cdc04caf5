"""What `predict` makes of what a head finds: a class for each kind of output, in one table."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
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
from featprobe.io.texts import cell
from featprobe.kinds import kind_of
from featprobe.metrics.images import decide, defect_scores
from featprobe.probes import DenseHead, ObjectHead, objects_at_original
from featprobe.probes.head import AnomalyHead, ImageHead, PooledAnomalyHead, VerdictHead
from featprobe.report.sheets import Panel, colour_of, png
from featprobe.result_rows import ResultRow
from featprobe.scores import On
from featprobe.specs import DataInfo
from featprobe.stages.stitch import Objects, stitched_classes, stitched_objects
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
from featprobe.stages.tasks.settle import verdict
from featprobe.targets import Labels, decode_rle

SHOWN_FROM = 0.3  # least score of a detection in an overlay
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
    """What a head found in an image of (height, width). image: its path. name: that of its files, without suffix."""

    image: Path
    name: str
    size: Size
    found: F

    @property
    def file_name(self) -> str:
        """The path of an image, or of a page of one, below the folder that was asked for."""
        file, page = page_of(self.image)
        folder = Path(self.name).parent
        return (folder / file.name if page is None else folder.parent / file.name / self.image.name).as_posix()


Batches = Iterator[tuple[Sequence[Piece], Features]]
"""Some pieces, and their features: those of an image follow each other."""


class Output(ABC, Generic[F]):
    """What one kind of head gives. F: what it finds in an image; its pixels are those of the original image.

    files: what is written, for people. classes: what overlays have colours for, the background first. notes: what a
    user should know of all of it.
    """

    files: tuple[str, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[F]:
        """What the head finds in each image of these sizes, from its pieces."""

    @abstractmethod
    def panel(self, pixels: NDArray[np.float32], found: F) -> Panel:
        """The picture of an overlay."""

    def pictures(self, name: str, found: F) -> Mapping[str, bytes]:
        """Further files of an image, by their paths."""
        return {}

    def kept(self, found: F) -> F:
        """What `tables` needs of an image: the rest would fill the memory."""
        return found

    def tables(self, done: Sequence[Predicted[F]]) -> Mapping[str, str]:
        """Files about all images, by their names."""
        return {}


class Masks(Output[Labels | None]):
    """Class indices of pixels, as PNG files with a palette."""

    files = ("masks/", "overlays/")

    def __init__(self, head: DenseHead, card: Mapping[str, Any]) -> None:
        self.head, self.classes = head, tuple(card["head"]["classes"])

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[Labels | None]:
        """Class indices, (height, width)."""
        cells = _each(lambda features: self.head(features).unbind(), batches)
        for size, (_, own) in zip(sizes, groupby(cells, _image_of), strict=True):
            logits = (([found], piece.placement, piece.part) for piece, found in own)
            (classes,) = stitched_classes(logits, self.head.stride, size)
            yield classes.cpu().numpy()

    def panel(self, pixels: NDArray[np.float32], found: Labels | None) -> Panel:
        """The classes over the image."""
        return Panel(pixels, found)

    def pictures(self, name: str, found: Labels | None) -> Mapping[str, bytes]:
        """The mask."""
        picture = Image.fromarray(np.asarray(found), mode="P")
        picture.putpalette([value for index in range(256) for value in colour_of(index, self.classes)])
        return {f"masks/{name}.png": png(picture)}

    def kept(self, found: Labels | None) -> None:
        """Nothing."""


class FoundObjects(Output[Objects]):
    """Boxes, with or without masks, as COCO JSON in pixels of the original images."""

    files = ("predictions.json", "overlays/")

    def __init__(self, head: ObjectHead, card: Mapping[str, Any]) -> None:
        self.head, self.classes = head, tuple(card["head"]["classes"])
        own = ResultRow.from_json(card["result"]).instances == "own"
        self.category_ids: Sequence[int] = card["data"].get("category_ids", ()) if own else ()

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[Objects]:
        """Objects with a score each, best first."""
        detections = _each(self.head, batches)
        for size, (_, own) in zip(sizes, groupby(detections, _image_of), strict=True):
            objects = [(objects_at_original(one, piece.placement), piece.part) for piece, one in own]
            yield stitched_objects(objects, size)

    def panel(self, pixels: NDArray[np.float32], found: Objects) -> Panel:
        """The surer ones over the image."""
        return Panel(pixels, instances=tuple(instance for instance, score in found if score >= SHOWN_FROM))

    def tables(self, done: Sequence[Predicted[Objects]]) -> Mapping[str, str]:
        """All objects."""
        return {"predictions.json": json.dumps(coco_of(done, self.classes, self.category_ids)) + "\n"}


@dataclass(frozen=True)
class Verdict:
    """What is said of an image, or of one tile of it. probabilities, decided: (labels,). part: the tile."""

    probabilities: NDArray[np.float32]
    decided: NDArray[np.uint8]
    part: Part | None = None


class ImageVerdicts(Output[list[Verdict]]):
    """Labels of images, or of their tiles, in one CSV file."""

    files = ("labels.csv", "overlays/")

    def __init__(self, head: ImageHead, card: Mapping[str, Any]) -> None:
        self.head = head
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

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[list[Verdict]]:
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
            yield from ([Verdict(p, own)] for p, own in zip(shares, said, strict=True))
            return
        verdicts = [Verdict(p, own, piece.part) for p, own, piece in zip(shares, said, pieces, strict=True)]
        for _, some in groupby(zip(pieces, verdicts, strict=True), _image_of):
            yield [verdict for _, verdict in some]

    def panel(self, pixels: NDArray[np.float32], found: list[Verdict]) -> Panel:
        """The labels below the image; of tiles, a box for each label but the good one."""
        if self.unit == "image":
            (one,) = found
            shares = balanced(one.probabilities[None], self._prior, self.names)[0]
            return Panel(pixels, text=(*label_text(one.decided, shares, self.names), *self._called(one)))
        return Panel(pixels, instances=tile_boxes([(v.part, v.decided) for v in found], self.names))

    def tables(self, done: Sequence[Predicted[list[Verdict]]]) -> Mapping[str, str]:
        """A line for each image or tile."""
        stream = io.StringIO()
        tile = ["left", "top", "width", "height"] if self.unit == "tile" else []
        probabilities = [f"probability of {name}" for name in self.names.names]
        scores = ["score of a defect", "threshold", "verdict"] if self.names.says_good else []
        lines = [["image", *tile, "labels", *probabilities, *scores]]
        lines += [[one.file_name, *self._line(verdict)] for one in done for verdict in one.found]
        csv.writer(stream, lineterminator="\n").writerows([[cell(value) for value in line] for line in lines])
        return {"labels.csv": stream.getvalue()}

    @property
    def _prior(self) -> NDArray[np.float32]:
        prior: NDArray[np.float32] = self.head.prior.cpu().numpy()
        return prior

    def _line(self, one: Verdict) -> list[Any]:
        part = [one.part.left, one.part.top, one.part.width, one.part.height] if one.part else []
        held = [name for name, own in zip(self.names.names, one.decided.tolist(), strict=True) if own]
        score = self._score(one)
        threshold = float(self.head.threshold)
        limit = "" if np.isnan(threshold) else f"{threshold:.6f}"
        scores = [] if score is None else [f"{score:.6f}", limit, *(self._called(one) or [""])]
        return [*part, "|".join(held), *(f"{p:.6f}" for p in one.probabilities), *scores]

    def _score(self, one: Verdict) -> float | None:
        scores = defect_scores(one.probabilities[None], self.names.multi, self.good)
        return None if scores is None else float(scores[0])

    def _called(self, one: Verdict) -> list[str]:
        """Whether the score is above the threshold; nothing where there is none."""
        score = self._score(one)
        said = "" if score is None else verdict(score, float(self.head.threshold))
        return [said] if said else []


class HeatMaps(Output[Seen]):
    """Scores of images in one CSV file, and a heat map of each.

    The maps are TIFF files of 32-bit floating point: the values of the pixels of the original image.
    """

    files = ("scores.csv", "maps/", "overlays/")
    classes = ()

    def __init__(self, head: AnomalyHead, card: Mapping[str, Any]) -> None:
        self.head, self.notes, self.unit = head, _notes_on(head, card), _unit_of(card)

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[Seen]:
        """The score and the map."""
        pieces = _each(partial(pieces_of, self.head), batches)
        for size, (_, own) in zip(sizes, groupby(pieces, _image_of), strict=True):
            yield joined([(found, piece.placement, piece.part) for piece, found in own], size)

    def panel(self, pixels: NDArray[np.float32], found: Seen) -> Panel:
        """The heat map over the image, on the scale of all maps of this head."""
        return panel_of(pixels, found, float(self.head.threshold), float(self.head.map_threshold), self.unit)

    def pictures(self, name: str, found: Seen) -> Mapping[str, bytes]:
        """The map."""
        return {} if found.map is None else {f"maps/{name}.tif": float_tiff(found.map.cpu().numpy())}

    def kept(self, found: Seen) -> Seen:
        """The score."""
        return found.without_map

    def tables(self, done: Sequence[Predicted[Seen]]) -> Mapping[str, str]:
        """A line for each image."""
        return _scores_csv(done, float(self.head.threshold))


class AnomalyScores(Output[Seen]):
    """Scores of images in one CSV file, by a head without maps."""

    files = ("scores.csv", "overlays/")
    classes = ()

    def __init__(self, head: PooledAnomalyHead, card: Mapping[str, Any]) -> None:
        self.head, self.notes, self.unit = head, _notes_on(head, card), _unit_of(card)

    def found(self, batches: Batches, sizes: Sequence[Size]) -> Iterator[Seen]:
        """The score; of tiles that are judged each for itself, the highest."""
        pooled = [(pieces, pool(features, self.head.levels)) for pieces, features in batches]
        pieces = [piece for own, _ in pooled for piece in own]
        every = Pooled.of_all([own for _, own in pooled])
        if self.unit == "image":
            device = self.head.get_buffer(self.head.banks[0]).device
            every = every.joined(torch.tensor([piece.image for piece in pieces], device=device), len(sizes))
        scores = self.head(every.vectors(self.head.levels)).scores.tolist()
        if self.unit == "image":
            yield from map(Seen, scores)
            return
        for _, own in groupby(zip(pieces, scores, strict=True), _image_of):
            yield of_tiles([(score, piece.part) for piece, score in own])

    def panel(self, pixels: NDArray[np.float32], found: Seen) -> Panel:
        """The image with its score."""
        return panel_of(pixels, found, float(self.head.threshold), float("nan"), self.unit)

    def tables(self, done: Sequence[Predicted[Seen]]) -> Mapping[str, str]:
        """A line for each image."""
        return _scores_csv(done, float(self.head.threshold))


def _scores_csv(done: Sequence[Predicted[Seen]], threshold: float) -> dict[str, str]:
    """scores.csv: of each image its score, the threshold and the verdict, both empty without a threshold."""
    stream = io.StringIO()
    limit = "" if np.isnan(threshold) else f"{threshold:.6g}"
    lines = [["image", "score", "threshold", "verdict"]]
    lines += [[one.file_name, f"{one.found.score:.6g}", limit, verdict(one.found.score, threshold)] for one in done]
    csv.writer(stream, lineterminator="\n").writerows([[cell(value) for value in line] for line in lines])
    return {"scores.csv": stream.getvalue()}


def _notes_on(head: VerdictHead, card: Mapping[str, Any]) -> tuple[str, ...]:
    """What people must know of the verdicts of an anomaly head."""
    notes = []
    if np.isnan(float(head.threshold)):
        notes.append("this head has no threshold: there were no good images in validation. So there are no verdicts")
    if _unit_of(card) == "tile":
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


def _of_anomalies(head: Any, card: Mapping[str, Any]) -> Output[Seen]:
    pooled = kind_of(card["head"]["task"], card["head"]["kind"]).pooled
    return AnomalyScores(head, card) if pooled else HeatMaps(head, card)


OUTPUTS: Mapping[On, Callable[[Any, Mapping[str, Any]], Output[Any]]] = {
    "pixels": Masks,
    "boxes": FoundObjects,
    "masks": FoundObjects,
    "images": ImageVerdicts,
    "anomalies": _of_anomalies,
}
"""What a task is scored on -> what its heads give, from a head and its card."""


def _each(head: Callable[[Features], Sequence[T]], batches: Batches) -> Iterator[tuple[Piece, T]]:
    """Each piece, and what the head finds in it."""
    for pieces, features in batches:
        yield from zip(pieces, head(features), strict=True)


def _image_of(found: tuple[Piece, object]) -> int:
    return found[0].image


def coco_of(done: Sequence[Predicted[Objects]], classes: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
    """Objects of many images as COCO JSON: images, categories, and annotations with a score each."""
    ids = list(category_ids) or list(range(1, len(classes)))
    images = [
        {"id": i, "file_name": one.file_name, "height": one.size[0], "width": one.size[1]}
        for i, one in enumerate(done, start=1)
    ]
    annotations = [r for i, one in enumerate(done, start=1) for r in coco_results(one.found, i, ids)]
    for number, annotation in enumerate(annotations, start=1):
        mask = annotation.get("segmentation")
        area = int(decode_rle(mask).sum()) if mask else annotation["bbox"][2] * annotation["bbox"][3]
        annotation |= {"id": number, "iscrowd": 0, "area": area}
    categories = [{"id": number, "name": name} for number, name in zip(ids, classes[1:], strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}
