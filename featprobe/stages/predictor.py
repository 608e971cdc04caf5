"""A saved head behind its own backbone and preprocessing, and what it finds in images."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite, isnan
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.given import at_hand, check_needed
from featprobe.backbones.precision import computing
from featprobe.cache.quantised import TORCH_DTYPE, as_read
from featprobe.cache.reader import free_memory
from featprobe.datasets.images.pixels import DTYPE_OF, Levels, counted_levels, to_levels
from featprobe.datasets.images.reading import Header, header_of, read_levels, unit_of
from featprobe.errors import DataError, ProbeError, UsageError, counted
from featprobe.features import Features
from featprobe.geometry import Part, Placement, Size, place, place_tile, tiles_of
from featprobe.io.disk import below
from featprobe.levels import FeatureLevel
from featprobe.probes import load_head
from featprobe.probes.saved import check_fingerprint
from featprobe.processes import pick_device
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.findings import Box, Judged, Threshold
from featprobe.stages.memory import failing, too_small
from featprobe.stages.outputs import OUTPUTS, Batches, Output, Piece, Predicted
from featprobe.stages.recording.operating_file import OPERATING, read_point
from featprobe.targets import Rle, decode_rle

AT_ONCE = 8  # images of a call that are computed together


@dataclass(frozen=True)
class Prediction(Predicted[Any]):
    """What a head found in an image.

    clipped: share of its pixels outside of the head's intensity window; 0 where there is none. milliseconds: from the
    file to what was found, its share of the batch.
    """

    clipped: float
    header: Header
    milliseconds: float


@dataclass(frozen=True)
class Found:
    """One finding, in pixels of the image.

    name: its class; "" for a tile, which has none. box: x1, y1, x2, y2. area: of its mask, or of its box where it has
    no mask. score: the highest in it. rle: its mask as compressed COCO RLE; None for a box.
    """

    name: str
    box: Box
    area: float
    score: float
    rle: Rle | None = field(default=None, repr=False)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(height, width) of the image; decoded when it is asked for, because an image may have hundreds."""
        return None if self.rle is None else decode_rle(self.rle)


@dataclass(frozen=True, repr=False)
class Result:
    """What a `Predictor` says of an image.

    verdict: "called", "passed", or "" where the head has no threshold and none was given or chosen. score: the highest
    in the image; None where it has none. threshold: None where the rule of the task needs none, or none is known.
    findings: best first; empty also where the image is judged as a whole. milliseconds: its share of the batch.

    By task: class_map: (height, width) class indices, uint8. heat_map: (height, width), float32. probabilities:
    (labels,), float32, of the names in `Predictor.classes`, and labels, the names of those that are decided to hold; of
    heads that judge tiles (tiles, labels), a tuple of names for each tile, and tiles, their places.
    """

    verdict: str
    score: float | None
    threshold: float | None
    findings: tuple[Found, ...]
    milliseconds: float
    class_map: NDArray[np.uint8] | None = None
    heat_map: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None
    labels: tuple[Any, ...] = ()
    tiles: tuple[Part, ...] = ()

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.3g}"
        return f"<Result {self.verdict or 'no verdict'}{score}, {counted(len(self.findings), 'finding')}>"


class Predictor:
    """A saved head behind its own backbone and preprocessing, which its card names, to be held in a program.

        with Predictor(folder) as predictor:
            for result in predictor([array, "scan.tif"]):
                print(result.verdict, result.score)

    folder: of the head. weights: those of the backbone, if they have moved. device: the best there is without one.
    threshold: as `featprobe predict --threshold`; without one the operating point counts that `inspect` keeps beside
    the head, `point`, or else the threshold of the head or of its task. backbone: the module whose features the head
    was trained on, where that was given as an object. It may be called from several threads: one waits for the other.
    Raises ProbeError when the folder holds no such head, or when the backbone that can be had now is not the one that
    it was trained on; BackboneError when that can't be had at all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        weights: str | None = None,
        device: str | None = None,
        threshold: float | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.folder = Path(folder)
        head, self.card = load_head(self.folder, whole=True)
        self.recipe = FeatureRecipe.from_json(self.card["features"])
        self.head = head.to(self.device)
        self.point = read_point(self.folder, self.card["head_sha256"]) if threshold is None else None
        limit = None if threshold is None else Threshold.given(threshold)
        limit = limit if self.point is None else Threshold.of_point(self.point)
        self.output = OUTPUTS[SCORES[self.card["head"]["task"]].on](self.head, self.card, limit)
        if threshold is not None:
            _check_threshold(threshold, self.output, self.card["head"]["task"], self.folder)
        if self.output.threshold.is_point:
            _check_point(self.output, self.folder)
        with at_hand(() if backbone is None else backbone):
            self.backbone = backbone_of(self.folder, self.card, self.head.levels, weights, self.device)
        self.framing = Framing(self.recipe, self.device)
        self._named = self.output.named
        self._lock, self._closed = Lock(), False

    def __call__(self, images: Sequence[NDArray[Any] | str | Path]) -> list[Result]:
        """What is found in images: raw levels as they come from a camera, or paths of files and pages.

        An array is (height, width) or (height, width, 3) in RGB order, uint8, uint16 or float32, as deep as the images
        that the head was trained on. Raises DataError for an image that does not fit, and BackboneError where the
        device fails or does not hold one image; then there are no results.
        """
        if isinstance(images, (str, Path, np.ndarray)):
            raise DataError("A predictor takes a list of images. Give it [image], also for one.")
        checked = [self._checked(image, f"images[{i}]") for i, image in enumerate(images)]
        results = []
        for start in range(0, len(checked), AT_ONCE):
            some = checked[start : start + AT_ONCE]
            began = perf_counter()
            read = [read_levels(image) if isinstance(image, Path) else image for image in some]
            with self._lock:
                if self._closed:
                    raise ProbeError("This predictor was closed. Make a new one.")
                output, found = self.output, _found_in(self, read)  # another thread may close it afterwards
            each = 1000 * (perf_counter() - began) / len(some)
            results += [_result(own, judged, output, each) for own, judged in found]
        return results

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        task, kind = self.card["head"]["task"], self.card["head"]["kind"]
        return f"<Predictor {task} {kind}, {self.recipe.label}, {self.device}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of classes, the background first, or those of labels; none of anomalies."""
        return self._named

    def close(self) -> None:
        """Free the memory of the networks. From then on a call raises ProbeError."""
        with self._lock:
            if not self._closed:
                del self.head, self.backbone, self.output
            self._closed = True
        free_memory()

    def predict(self, images: Sequence[tuple[Path, str]]) -> list[Prediction]:
        """Predict a batch of (image, name); raises DataError for one that does not fit."""
        began = perf_counter()
        headers = [header_of(path) for path, _ in images]
        read = [self._read(path, header) for (path, _), header in zip(images, headers, strict=True)]
        found = self._find(read)
        each = 1000 * (perf_counter() - began) / max(1, len(images))
        return [
            Prediction(path, name, _size_of(levels), own, judged, self._clipped(levels), header, each)
            for (path, name), (own, judged), levels, header in zip(images, found, read, headers, strict=True)
        ]

    def _find(self, read: Sequence[Levels]) -> list[tuple[Any, Judged]]:
        """What the head finds in images, and what is said of each."""
        pieces = [
            Piece(i, levels if part is None else part.take(levels), part, self._place(levels, part))
            for i, levels in enumerate(read)
            for part in self._parts(levels)
        ]
        with torch.inference_mode():
            return list(self.output.found(self._batches(pieces, len(read)), [_size_of(levels) for levels in read]))

    def picture(self, path: Path) -> NDArray[np.float32]:
        """An image as the head's intensity policy shows it, in [0, 1]."""
        return unit_of(read_levels(path), self.recipe)

    def _batches(self, pieces: Sequence[Piece], at_once: int) -> Batches:
        """Some of the pieces and their features, again and again."""
        for start in range(0, len(pieces), at_once):
            some = pieces[start : start + at_once]
            yield some, self._features([p.levels for p in some], [p.placement for p in some])

    def _checked(self, image: Any, where: str) -> Levels | Path:
        """The levels of an image that somebody gave, or its path."""
        if isinstance(image, (str, Path)):
            self._check_bits(header_of(Path(image)).bits, image)
            return Path(image)
        if not isinstance(image, np.ndarray):
            raise DataError(
                f"{where} is a {type(image).__name__}. wanted: a numpy array of raw levels, or the path of an image."
            )
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        bits = next((bits for bits, own in DTYPE_OF.items() if own == image.dtype.newbyteorder("=")), None)
        if not shaped or not image.size or bits is None:
            raise DataError(
                f"{where} can't be read as an image.\n"
                "  wanted  (height, width), or (height, width, 3) in RGB order, of uint8, uint16 or float32\n"
                f"  found   {image.shape} of {image.dtype}"
            )
        self._check_bits(bits, where)
        return to_levels(image, Path(where))

    def _read(self, path: Path, header: Header) -> Levels:
        self._check_bits(header.bits, path)
        return read_levels(path)

    def _check_bits(self, bits: int, where: object) -> None:
        wanted = self.card["data"].get("bits")
        if wanted is not None and bits != wanted:
            raise DataError(
                f"{where} is an image of {bits} bits, and the head was trained on images of {wanted}.\n"
                f"Its grey levels would mean something else. Give it images of {wanted} bits."
            )

    def _clipped(self, levels: NDArray[Any]) -> float:
        if self.recipe.window is None:
            return 0.0
        low, high = self.recipe.window
        own = counted_levels(levels)
        return float(np.mean((own < low) | (own > high))) if own.size else 0.0

    def _parts(self, levels: NDArray[Any]) -> list[Part] | list[None]:
        """The tiles of an image, as the head's training images were cut; None for an image that is not cut."""
        if self.recipe.tile is None:
            return [None]
        return tiles_of((levels.shape[0], levels.shape[1]), self.recipe.tile, self.recipe.overlap)

    def _place(self, levels: NDArray[Any], part: Part | None) -> Placement:
        recipe = self.recipe
        if part is None or recipe.tile is None:
            placed = place((levels.shape[0], levels.shape[1]), recipe.size, recipe.fit, 1)
        else:
            placed = place_tile(part.size, recipe.tile, recipe.size, 1)
        return replace(placed, frame=recipe.frame)

    @torch.inference_mode()
    def _features(self, images: Sequence[Any], placements: Sequence[Placement]) -> Features:
        recipe = self.recipe
        with computing(recipe.precision, self.device):
            maps = self.backbone(self.framing.together(images, placements)).maps
        stored = {name: m.to(TORCH_DTYPE[recipe.dtype]) for name, m in maps.items()}
        if not all(bool(m.isfinite().all()) for m in stored.values()):
            raise DataError(
                f"Features of an image are not finite in {recipe.dtype}, the number format that the head was trained "
                "on. Nothing can be said of it."
            )
        contents = torch.tensor([placement.content for placement in placements], dtype=torch.int32)
        whole = bool((contents == torch.tensor(recipe.frame)).all())
        return Features(as_read(stored, recipe.dtype), recipe.frame, None if whole else contents.to(self.device))


def _found_in(predictor: Predictor, read: Sequence[Levels]) -> list[tuple[Any, Judged]]:
    """What is found in images, in halves where the memory of the device does not hold all of them."""
    try:
        with failing(predictor.device, "There are no results. Another process may use it again."):
            return predictor._find(read)
    except torch.cuda.OutOfMemoryError as error:
        said = str(error)
    # out here nothing holds the tensors of the images any more
    free_memory()
    if len(read) == 1:
        raise too_small(predictor.device, f"under {predictor.recipe.label}", 1, said, 0, "")
    half = len(read) // 2
    return [*_found_in(predictor, read[:half]), *_found_in(predictor, read[half:])]


def _result(found: Any, judged: Judged, output: Output[Any], milliseconds: float) -> Result:
    findings = tuple(
        Found(output.named[one.category] if one.category else "", one.box, one.area, one.score, one.rle)
        for one in judged.findings or ()
    )
    limit = None if isnan(output.threshold.value) else output.threshold.value
    return Result(judged.verdict, judged.score, limit, findings, milliseconds, **output.values(found))


def _check_threshold(threshold: float, output: Output[Any], task: str, folder: Path) -> None:
    """Raise UsageError for a threshold out of range, ProbeError where a head can have none."""
    if not (isfinite(output.threshold.value) and 0 <= threshold <= output.most):
        wanted = "0 or more" if output.most == inf else f"from 0 to {output.most:g}"
        raise UsageError(
            f"The threshold of a head for {task} can't be {threshold:g}.\n"
            f"  wanted  a number {wanted}\nNothing was computed."
        )
    if not output.rule:
        raise ProbeError(
            f"{folder} has no score of a defect that a threshold could stand for: none of its labels "
            f"({', '.join(output.named)}) says that an image is good. Nothing was computed.\n"
            'Name the good one, good = "NAME" in featprobe.toml, and train the head again; or omit the threshold.'
        )


def _check_point(output: Output[Any], folder: Path) -> None:
    """Raise ProbeError for an operating point of another kind than the head's scores."""
    threshold = output.threshold
    if threshold.on_maps not in output.on_maps or not output.rule:
        wanted = "a base threshold, as it finds pixels of maps" if True in output.on_maps else "none, as it has no maps"
        raise ProbeError(
            f"{folder / OPERATING} is no operating point of this head. Nothing was computed.\n"
            f"  wanted  base: {wanted}\n  found   {threshold.base:.6g}\n"
            "Choose it again with `featprobe inspect`, or remove it."
        )


def _size_of(levels: Levels) -> Size:
    return levels.shape[0], levels.shape[1]


def backbone_of(
    folder: Path, card: Mapping[str, Any], levels: Sequence[FeatureLevel], weights: str | None, device: torch.device
) -> Backbone:
    """The backbone that a head in a folder was trained on; see Predictor. levels: those of the head."""
    values, recipe = card.get("backbone"), FeatureRecipe.from_json(card["features"])
    if values is None:
        raise ProbeError(f"{folder} does not say where its backbone comes from. Train it again from a new cache.")
    spec = BackboneSpec.from_json(values)
    if spec.source == "file":
        named = Path(str(spec.weights))
        if weights is None and named.is_absolute():
            raise ProbeError(
                f"{folder} was trained on your own weights file, which is elsewhere. It was not opened.\n"
                f"Name them:  --weights {shlex.quote(str(named))}"
            )
        if weights is None:  # a fine-tuned one lies beside its head
            spec = replace(spec, weights=str(below(folder, named, f"The card of {folder}")))
    if weights is not None:
        spec = replace(spec, source="file", weights=weights)
    check_needed(spec)
    backbone = load_backbone(spec, [level.name for level in levels], device)
    now = replace(
        recipe, backbone=backbone.identity, weights_sha256=backbone.sha256, final_norm=backbone.final_norm,
        mean=backbone.mean, std=backbone.std, interpolation=backbone.interpolation,
    )  # fmt: skip
    check_fingerprint(folder, card["fingerprint"], now)
    missing = [level for level in backbone.levels if level not in recipe.levels]
    if missing:
        raise ProbeError(f"{folder}: the backbone's level {missing[0]} is another than the head was trained on.")
    backbone.fit(recipe.frame, recipe.sized)
    return backbone
