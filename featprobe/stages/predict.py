"""A saved head on new images, and the files of what it finds there."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import realpath
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from featprobe.datasets.files import stem_of
from featprobe.datasets.images.pages import is_page_name, misnamed, page_of, pages_of
from featprobe.datasets.images.reading import SUFFIXES, pixel_notes
from featprobe.datasets.names import visible
from featprobe.datasets.samples import check_names, listed
from featprobe.errors import DataError, ProbeError, counted
from featprobe.io.disk import make_folders, write_together, write_whole
from featprobe.io.texts import printable
from featprobe.report.sheets import draw_overlay, png
from featprobe.stages.extraction.survey import skippable
from featprobe.stages.memory import failing, largest_that_fits, too_small
from featprobe.stages.predictor import Prediction, Predictor

CLIPPED_WARNING = 0.1  # share of an image's pixels outside of the intensity window


@dataclass(frozen=True)
class PredictReport:
    """The written files; left_out: images that can't be read, with the reason; notes: facts about the rest."""

    out: Path
    images: int
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


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
    backbone: nn.Module | None = None,
) -> PredictReport:
    """Run a saved head on images and folders of images, and write what it finds.

    Into `out`: for segmentation masks/NAME.png (class indices, with a palette), for objects predictions.json (COCO
    JSON in pixels of the original images), for labels of images labels.csv; overlays/NAME.png for all. backbone: the
    module whose features the head was trained on, where that was given as an object. Raises
    FeatprobeError; what was written before a bad image stays.
    """
    named = find_images(images, out)
    predictor = Predictor(folder, weights=weights, device=device, backbone=backbone)
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
