"""A saved head on new images, and the files of what it finds there."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import isnan
from os.path import realpath
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featprobe.datasets.files import stem_of
from featprobe.datasets.images.pages import is_page_name, misnamed, page_of, pages_of
from featprobe.datasets.images.reading import SUFFIXES, Header, pixel_notes
from featprobe.datasets.names import visible
from featprobe.datasets.samples import check_names, listed
from featprobe.errors import DataError, ProbeError, counted
from featprobe.io.disk import make_folders, replacing, write_together, write_whole
from featprobe.report.sheets import draw_overlay, png
from featprobe.report.streamed import csv_text
from featprobe.stages.extraction.survey import skippable
from featprobe.stages.findings import point_note
from featprobe.stages.memory import failing, largest_that_fits, too_small
from featprobe.stages.outputs import file_name_of
from featprobe.stages.predictor import Prediction, Predictor
from featprobe.stages.progress import Progress
from featprobe.stages.tasks.settle import CALLED, PASSED

UNREADABLE = "unreadable"
"""The verdict on an image that could not be used, and was omitted."""
LeftOut = list[tuple[str, str]]
"""Images that could not be used, with the reason."""
CLIPPED_WARNING = 0.1  # share of an image's pixels outside of the intensity window


@dataclass(frozen=True)
class Line:
    """What the summary says of an image.

    verdict: called, passed, "" where there is no threshold, or UNREADABLE. findings: their number, of each class in
    `by_class`, and area: the sum of their areas in pixels; None where the image is judged as a whole. score: the
    highest in the image. milliseconds: its share of the batch, from file to finding. reason: why it is unreadable.
    """

    image: str
    verdict: str
    findings: int | None = None
    area: float | None = None
    score: float | None = None
    milliseconds: float | None = None
    by_class: dict[str, int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class PredictReport:
    """The written files; left_out: images that can't be read, with the reason; notes: facts about the rest.

    called: images with the verdict "called"; None where the head has no threshold and none was given.
    """

    out: Path
    images: int
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    called: int | None


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
    threshold: float | None = None,
    need_verdict: bool = False,
) -> PredictReport:
    """Run a saved head on images and folders of images, and write what it finds.

    Into `out`: for segmentation masks/NAME.png (class indices, with a palette), for objects predictions.json (COCO
    JSON in pixels of the original images), of both findings.json; for labels of images labels.csv; for anomalies
    scores.csv and maps; for all overlays/NAME.png, summary.csv and summary.json.

    threshold: of a finding, or of the score of an image, in place of the operating point that is kept beside the head,
    or of the head's own, see `stages.findings`.
    need_verdict: refuse a head without a threshold, before anything is computed. backbone: the module whose features
    the head was trained on, where that was given as an object. Raises FeatprobeError; what was written before a bad
    image stays.
    """
    named = find_images(images, out)
    predictor = Predictor(folder, weights=weights, device=device, threshold=threshold, backbone=backbone)
    output = predictor.output
    if need_verdict and not output.rule:
        raise ProbeError(
            f"{folder} gives no verdicts: it has no threshold. Nothing was computed.\n"
            "Give one with --threshold, or train it again with good images in validation."
        )
    try:
        make_folders(out)
    except OSError as error:
        raise ProbeError(f"{out} can't be written ({error.strerror}). Nothing was computed.") from error
    seen: list[tuple[str, Header, float]] = []  # of each image its path, its header, and how much of it is clipped
    lines: list[Line] = []
    left_out: LeftOut = []
    bar = Progress(len(named), predictor.recipe.label, "img", quiet=quiet, leave=True)
    with bar, _streams(out, predictor) as add:
        for start in range(0, len(named), batch_size):
            batch = named[start : start + batch_size]
            pictures: dict[Path, bytes] = {}
            try:
                with _trouble(predictor, batch):
                    for found in _predicted(predictor, batch, skip_bad, left_out):
                        if isinstance(found, Line):
                            lines.append(found)
                            continue
                        pictures |= _pictures(out, found, predictor)
                        add(found)
                        lines.append(_line(found, predictor))
                        seen.append((str(found.image), found.header, found.clipped))
            finally:
                if pictures:
                    write_together(pictures)
            bar.update(len(batch))
    files = _write_summary(out, predictor, lines)
    notes = [*output.notes, *point_note(predictor.point), *_clipped_notes(seen, predictor.recipe.window)]
    notes += pixel_notes([(image, header) for image, header, _ in seen])
    called = sum(line.verdict == CALLED for line in lines) if output.rule else None
    return PredictReport(out, len(seen), (*output.files, *files), tuple(left_out), tuple(notes), called)


@contextmanager
def _streams(out: Path, predictor: Predictor) -> Iterator[Callable[[Prediction], None]]:
    """What adds an image to the files about all images, which are there when the block ends."""
    files = predictor.output.streamed()
    with ExitStack() as stack:
        streams = [stack.enter_context(replacing(out / file.name)) for file in files]

        def write(texts: Iterable[str]) -> None:
            for stream, text in zip(streams, texts, strict=True):
                stream.write(text.encode())

        write(file.begin() for file in files)
        yield lambda found: write(file.of(found) for file in files)
        write(file.end() for file in files)


def _line(one: Prediction, predictor: Predictor) -> Line:
    judged, named = one.judged, predictor.output.named
    findings = judged.findings
    return Line(
        one.file_name,
        judged.verdict,
        None if findings is None else len(findings),
        judged.area,
        judged.score,
        round(one.milliseconds, 3),
        dict(Counter(named[finding.category] for finding in findings or () if finding.category)),
    )


def _write_summary(out: Path, predictor: Predictor, lines: Sequence[Line]) -> tuple[str, ...]:
    """Write summary.csv and summary.json; returns their names."""
    said = predictor.output.threshold.said
    table = [["image", "verdict", "findings", "area", "score", "threshold", "milliseconds", "reason"]]
    table += [
        [line.image, line.verdict, *map(_number, (line.findings, line.area, line.score, said, line.milliseconds)),
         line.reason]
        for line in lines
    ]  # fmt: skip
    write_whole(out / "summary.csv", csv_text(table))
    write_whole(out / "summary.json", json.dumps(_summary(predictor, lines), indent=1) + "\n")
    return "summary.csv", "summary.json"


def _number(value: str | float | None) -> str:
    """A number with six digits or more, and no fewer than stand before the point.

    >>> _number(12345678.0), _number(0.12345678), _number("default"), _number(None)
    ('12345678', '0.123457', 'default', '')
    """
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"


def _summary(predictor: Predictor, lines: Sequence[Line]) -> dict[str, Any]:
    """The head, the rule, counts, and a record for each image."""
    card, output = predictor.card, predictor.output
    verdicts = Counter(line.verdict for line in lines)
    classes: Counter[str] = Counter()
    for line in lines:
        classes.update(line.by_class)
    return {
        "head": str(predictor.folder),
        "task": card["head"]["task"],
        "kind": card["head"]["kind"],
        "backbone": predictor.recipe.label,
        "classes": list(output.named),
        "rule": output.rule,
        "threshold": output.threshold.said,
        "threshold_from": output.threshold.source,
        "operating_point": None
        if predictor.point is None
        else {
            "wanted": str(predictor.point.wanted),
            "base": None if isnan(predictor.point.base) else predictor.point.base,
            "least_area": predictor.point.least_area,
        },
        "counts": {
            "images": len(lines),
            **{name: verdicts[name] for name in (CALLED, PASSED, UNREADABLE)},
            "without_verdict": verdicts[""],
            "findings": sum(line.findings or 0 for line in lines),
            "by_class": dict(classes),
        },
        "images": [asdict(line) for line in lines],
    }


def _clipped_notes(seen: Sequence[tuple[str, Header, float]], window: tuple[float, float] | None) -> list[str]:
    """A note on images of other levels than the head was trained on."""
    clipped = [image for image, _, share in seen if share > CLIPPED_WARNING]
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
    except torch.cuda.OutOfMemoryError as error:
        found = str(error)
    # out here nothing holds the tensors of the batch that failed any more
    fits = largest_that_fits(len(batch), lambda images: predictor.predict(batch[:images]))
    what = f"under {predictor.recipe.label}"
    remedy = f"run the same command with --batch-size {fits}"
    raise too_small(predictor.device, what, len(batch), found, fits, remedy)


def _predicted(
    predictor: Predictor, batch: Sequence[tuple[Path, str]], skip_bad: bool, left_out: list[tuple[str, str]]
) -> Iterator[Prediction | Line]:
    """Predictions of a batch; image by image where one of it is bad and is to be left out."""
    try:
        yield from predictor.predict(batch)
    except DataError as error:
        if not skip_bad:
            raise skippable(error) from error
        if len(batch) == 1:
            path, name = batch[0]
            said = str(error).replace(str(path), " ".join(str(path).split("\n")))  # a name may hold the end of a line
            left_out.append((str(path), said.splitlines()[0]))
            yield Line(file_name_of(path, name), UNREADABLE, reason=left_out[-1][1])
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
