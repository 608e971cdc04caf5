"""A saved head on new images, and the files of what it finds there."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import realpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.precision import computing
from featprobe.cache.quantised import TORCH_DTYPE, as_read
from featprobe.datasets.files import stem_of
from featprobe.datasets.images.pages import is_page_name, misnamed, page_of, pages_of
from featprobe.datasets.images.pixels import counted_levels
from featprobe.datasets.images.reading import SUFFIXES, Header, header_of, pixel_notes, read_levels, unit_of
from featprobe.datasets.names import visible
from featprobe.datasets.samples import check_names, listed
from featprobe.errors import DataError, ProbeError, counted
from featprobe.features import Features
from featprobe.geometry import Part, Placement, place, place_tile, tiles_of
from featprobe.io.disk import below, make_folders, write_together, write_whole
from featprobe.io.texts import printable
from featprobe.probes import load_head
from featprobe.probes.saved import check_fingerprint
from featprobe.processes import pick_device
from featprobe.report.sheets import draw_overlay, png
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.extraction.survey import skippable
from featprobe.stages.memory import failing, largest_that_fits, too_small
from featprobe.stages.outputs import OUTPUTS, Batches, Piece, Predicted

CLIPPED_WARNING = 0.1  # share of an image's pixels outside of the intensity window


@dataclass(frozen=True)
class Prediction(Predicted[Any]):
    """What a head found in an image.

    clipped: share of its pixels outside of the head's intensity window; 0 where there is none.
    """

    clipped: float
    header: Header


@dataclass(frozen=True)
class PredictReport:
    """The written files; left_out: images that can't be read, with the reason; notes: facts about the rest."""

    out: Path
    images: int
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class Predictor:
    """A saved head behind its own backbone and preprocessing, all of them from the head's card.

    Raises ProbeError when the folder holds no such head, or when the backbone that can be had now is not the one that
    it was trained on; BackboneError when that can't be had at all.
    """

    def __init__(self, folder: Path, *, weights: str | None = None, device: str | None = None) -> None:
        self.device = pick_device(device)
        head, self.card = load_head(folder, whole=True)
        self.recipe = FeatureRecipe.from_json(self.card["features"])
        self.head = head.to(self.device)
        self.output = OUTPUTS[SCORES[self.card["head"]["task"]].on](self.head, self.card)
        self.backbone = self._backbone(folder, weights)
        self.framing = Framing(self.recipe, self.device)

    def predict(self, images: Sequence[tuple[Path, str]]) -> list[Prediction]:
        """Predict a batch of (image, name); raises DataError for one that does not fit."""
        headers = [header_of(path) for path, _ in images]
        read = [self._read(path, header) for (path, _), header in zip(images, headers, strict=True)]
        pieces = [
            Piece(i, levels if part is None else part.take(levels), part, self._place(levels, part))
            for i, levels in enumerate(read)
            for part in self._parts(levels)
        ]
        sizes = [(levels.shape[0], levels.shape[1]) for levels in read]
        with torch.inference_mode():
            found = list(self.output.found(self._batches(pieces, len(read)), sizes))
        return [
            Prediction(path, name, size, own, self._clipped(levels), header)
            for (path, name), size, own, levels, header in zip(images, sizes, found, read, headers, strict=True)
        ]

    def picture(self, path: Path) -> NDArray[np.float32]:
        """An image as the head's intensity policy shows it, in [0, 1]."""
        return unit_of(read_levels(path), self.recipe)

    def _batches(self, pieces: Sequence[Piece], at_once: int) -> Batches:
        """Some of the pieces and their features, again and again."""
        for start in range(0, len(pieces), at_once):
            some = pieces[start : start + at_once]
            yield some, self._features([p.levels for p in some], [p.placement for p in some])

    def _read(self, path: Path, header: Header) -> NDArray[Any]:
        bits, wanted = header.bits, self.card["data"].get("bits")
        if wanted is not None and bits != wanted:
            raise DataError(
                f"{path} is an image of {bits} bits, and the head was trained on images of {wanted}.\n"
                f"Its grey levels would mean something else. Give it images of {wanted} bits."
            )
        return read_levels(path)

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

    def _backbone(self, folder: Path, weights: str | None) -> Backbone:
        values = self.card.get("backbone")
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
        backbone = load_backbone(spec, [level.name for level in self.head.levels], self.device)
        now = replace(
            self.recipe, weights_sha256=backbone.sha256, final_norm=backbone.final_norm, mean=backbone.mean,
            std=backbone.std, interpolation=backbone.interpolation,
        )  # fmt: skip
        check_fingerprint(folder, self.card["fingerprint"], now)
        missing = [level for level in backbone.levels if level not in self.recipe.levels]
        if missing:
            raise ProbeError(f"{folder}: the backbone's level {missing[0]} is another than the head was trained on.")
        backbone.fit(self.recipe.frame, self.recipe.sized)
        return backbone


def predict(
    folder: Path,
    images: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    device: str | None = None,
    batch_size: int = 8,
    skip_bad: bool = False,
    quiet: bool = False,
) -> PredictReport:
    """Run a saved head on images and folders of images, and write what it finds.

    Into `out`: for segmentation masks/NAME.png (class indices, with a palette), for objects predictions.json (COCO
    JSON in pixels of the original images), for labels of images labels.csv; overlays/NAME.png for all. Raises
    FeatprobeError; what was written before a bad image stays.
    """
    named = find_images(images, out)
    predictor = Predictor(folder, weights=weights, device=device)
    try:
        make_folders(out)
    except OSError as error:
        raise ProbeError(f"{out} can't be written ({error.strerror}). Nothing was computed.") from error
    done: list[Prediction] = []
    left_out: list[tuple[str, str]] = []
    bar = tqdm(total=len(named), desc=printable(predictor.recipe.label), unit="img", disable=quiet)
    with bar:
        for start in range(0, len(named), batch_size):
            batch = named[start : start + batch_size]
            pictures: dict[Path, bytes] = {}
            try:
                with _trouble(predictor, batch):
                    for prediction in _predicted(predictor, batch, skip_bad, left_out):
                        pictures |= _pictures(out, prediction, predictor)
                        done.append(replace(prediction, found=predictor.output.kept(prediction.found)))
            finally:
                if pictures:
                    write_together(pictures)
            bar.update(len(batch))
    for name, text in predictor.output.tables(done).items():
        write_whole(out / name, text)
    notes = [*predictor.output.notes, *_clipped_notes(done, predictor.recipe.window)]
    notes += pixel_notes([(str(one.image), one.header) for one in done])
    return PredictReport(out, len(done), predictor.output.files, tuple(left_out), tuple(notes))


def _clipped_notes(done: Sequence[Prediction], window: tuple[float, float] | None) -> list[str]:
    """A note on images of other levels than the head was trained on."""
    clipped = [str(one.image) for one in done if one.clipped > CLIPPED_WARNING]
    if window is None or not clipped:
        return []
    return [
        f"more than {CLIPPED_WARNING:.0%} of the pixels lie outside of the levels that the head knows "
        f"({window[0]:g} to {window[1]:g}) in {counted(len(clipped), 'image')}, and what it says there counts for "
        f"little: {listed(clipped)}"
    ]


def find_images(paths: Sequence[Path], out: Path | None = None) -> list[tuple[Path, str]]:
    """(image, name) of files, pages, and all images below folders; a name is the path without its file's suffix.

    Where images differ in nothing but the suffix, their names keep it. All pages of a file are taken, and of folders
    called like an image file what is called like its pages. Hidden files are read only where they are named. out: a
    folder that is not looked into: what an earlier run has written is no input. Raises DataError for a path that is not
    there, a folder without images, two images of one name, or a name that is no UTF-8.
    """
    found: list[tuple[Path, Path]] = []  # an image and the folder that its name begins at
    for path in paths:
        file, page = page_of(path)
        if page is not None:
            found.append((path, file.parent))
        elif path.is_file():
            found += [(p, path.parent) for p in pages_of(path)]
        elif path.is_dir():
            inside = visible(path, (p for p in path.rglob("*") if _is_called_an_image(p) and not p.is_dir()))
            if out is not None and out.resolve() != path.resolve():
                inside = [p for p in inside if not Path(realpath(p)).is_relative_to(out.resolve())]
            if not inside:
                raise DataError(f"{path} holds no images. wanted: files ending in {', '.join(SUFFIXES)}.")
            found += [(p, path) for file in inside for p in pages_of(file)]
        else:
            raise DataError(misnamed(path) or f"There is no image or folder {path}. Nothing was computed.")
    stems = [stem_of(image, folder) for image, folder in found]
    counts = Counter(stems)
    named = [
        (image, stem if counts[stem] == 1 else image.relative_to(folder).as_posix())
        for (image, folder), stem in zip(found, stems, strict=True)
    ]
    check_names(str(path) for path, _ in named)
    taken: dict[str, Path] = {}
    for path, name in named:
        if name in taken:
            raise DataError(f"{taken[name]} and {path} would both be written as {name}. Give them in two runs.")
        taken[name] = path
    return named


def _is_called_an_image(path: Path) -> bool:
    """Whether a path ends like an image's, or like that of a page, which `data convert` writes as a file."""
    named = path.parent if is_page_name(path.name) else path
    return named.suffix.lower() in SUFFIXES


@contextmanager
def _trouble(predictor: Predictor, batch: Sequence[tuple[Path, str]]) -> Iterator[None]:
    """Say in words that the device failed, or that its memory does not hold a batch, and how large a one it holds."""
    try:
        with failing(predictor.device, "What was written stays. Run the same command again."):
            yield
        return
    except torch.OutOfMemoryError as error:
        found = str(error)
    # out here nothing holds the tensors of the batch that failed any more
    fits = largest_that_fits(len(batch), lambda images: predictor.predict(batch[:images]))
    what = f"under {predictor.recipe.label}"
    remedy = f"run the same command with --batch-size {fits}"
    raise too_small(predictor.device, what, len(batch), found, fits, remedy)


def _predicted(
    predictor: Predictor, batch: Sequence[tuple[Path, str]], skip_bad: bool, left_out: list[tuple[str, str]]
) -> Iterator[Prediction]:
    """Predictions of a batch; image by image where one of it is bad and is to be left out."""
    try:
        yield from predictor.predict(batch)
    except DataError as error:
        if not skip_bad:
            raise skippable(error) from error
        if len(batch) == 1:
            left_out.append((str(batch[0][0]), str(error).splitlines()[0]))
            return
        for one in batch:
            yield from _predicted(predictor, [one], skip_bad, left_out)


def _pictures(out: Path, prediction: Prediction, predictor: Predictor) -> dict[Path, bytes]:
    """The pictures of a prediction, by their paths."""
    output, name = predictor.output, f"{prediction.name}.png"
    panel = output.panel(predictor.picture(prediction.image), prediction.found)
    further = output.pictures(prediction.name, prediction.found)
    return {
        out / "overlays" / name: png(draw_overlay(panel, output.classes)),
        **{out / path: data for path, data in further.items()},
    }
