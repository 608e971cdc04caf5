"""Looking at data sets: what they hold, and how they look."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featprobe.datasets import DataSet, Sample
from featprobe.datasets.duplicates import Look, look_of, near_copies
from featprobe.datasets.images.reading import (
    bits_of,
    header_of,
    image_size,
    pixel_notes,
    read_levels,
    to_unit,
    training_window,
)
from featprobe.datasets.label_sets import held_text, label_counts, mixed_verdicts, verdicts
from featprobe.datasets.samples import SPLITS, listed
from featprobe.datasets.set_notes import copies_in, copy_notes
from featprobe.datasets.split_file import write_split_file
from featprobe.datasets.splits import leaks, starved
from featprobe.errors import DataError, counted
from featprobe.intensity import Intensity, default_intensity
from featprobe.io.threads import in_threads
from featprobe.report.sheets import Panel, save_sheet
from featprobe.splitting import SplitChoice
from featprobe.stages.partition import assigned, classes_in, names_held
from featprobe.stages.progress import counting
from featprobe.targets import IGNORE, pixels_of_each


@dataclass(frozen=True)
class DataSummary:
    """A data set in numbers. pixels: share of each class among labelled pixels, None without masks.

    sizes: smallest and largest (height, width) in pixels. description: its path, and how it was read, by the names of
    featprobe.toml. serves: all tasks that its labels serve. labels: images of each label, by split; of several labels
    also those without any, under "". None where the set has no labels of images.
    """

    name: str
    root: str
    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    images: dict[str, int]
    groups: dict[str, int]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    depth: int
    pixels: dict[str, float] | None
    instances: dict[str, int] | None
    notes: tuple[str, ...]
    description: Mapping[str, Any]
    serves: tuple[str, ...] = ()
    labels: dict[str, dict[str, int]] | None = None

    @property
    def toml(self) -> str:
        """The section of featprobe.toml that reads the data set in the same way."""
        lines = (f"{key} = {toml_text(value)}" for key, value in self.description.items())
        name = self.name if re.fullmatch(r"[A-Za-z0-9_-]+", self.name) else json.dumps(self.name, ensure_ascii=False)
        return "\n".join([f"[data.{name}]", *lines])


def share_text(share: float) -> str:
    """A share of pixels in percent; one that is not 0 does not look like it.

    >>> share_text(0.12345), share_text(0), share_text(0.00001)
    ('12.35%', '0.00%', '<0.01%')
    """
    return "<0.01%" if 0 < share < 0.00005 else f"{share:.2%}"


def toml_text(value: bool | str | Sequence[str]) -> str:
    r"""A text or a list of texts in TOML, in single quotes where possible: these keep backslashes.

    >>> print(toml_text([r"(C\d+)_", "it's"]))
    ['(C\d+)_', "it's"]
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return f"[{', '.join(map(toml_text, value))}]"
    plain = "'" not in value and value.isprintable()
    return f"'{value}'" if plain else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def one_of_all(data: DataSet) -> Iterator[None]:
    """Add to the error of the first image or label that can't be used the command that lists all of them."""
    try:
        yield
    except DataError as error:
        command = shlex.join(["featprobe", "data", "check", str(data.root)])
        raise type(error)(f"{error}\nAll files that can't be used:  {command}") from error


def summarise(data: DataSet) -> DataSummary:
    """Read all labels of a data set and count them; raises DataError for the first bad label."""
    with one_of_all(data):
        return _counted(data)


def _counted(data: DataSet) -> DataSummary:
    headers = [header_of(sample.image) for sample in data.samples]
    sizes = [header.size for header in headers]
    counts = np.zeros(256, dtype=np.int64)
    objects: list[int] = []
    copies: list[tuple[str, list[str]]] = []
    classes, held = [], []
    for sample, size in zip(data.samples, sizes, strict=True):
        target = data.read_target(sample, size)
        classes.append(classes_in(target))
        held.append(target.labels)
        copies.append((sample.id, copies_in(target, data.classes)))
        if target.semantic is not None:
            counts += pixels_of_each(target.semantic)
        objects += [instance.category for instance in target.instances or ()]
    labelled = counts[: len(data.classes)]
    shares = (labelled / max(1, labelled.sum())).tolist()
    splits = ("train", "val", "test")
    of_samples, groups = [s.split for s in data.samples], [s.group for s in data.samples]
    return DataSummary(
        name=data.name,
        root=str(data.root),
        classes=data.classes,
        tasks=data.tasks,
        images={split: len(data.in_split(split)) for split in splits},
        groups={split: len({s.group for s in data.in_split(split)}) for split in splits},
        sizes=(min(sizes), max(sizes)),
        depth=headers[0].bits,
        pixels=dict(zip(data.classes, shares, strict=True)) if data.has_masks else None,
        instances={n: objects.count(i) for i, n in enumerate(data.classes) if i} if data.has_objects else None,
        notes=(
            *data.notes,
            *pixel_notes([(sample.id, header) for sample, header in zip(data.samples, headers, strict=True)]),
            *copy_notes(copies),
            *mixed_verdicts(groups, of_samples, verdicts(data.label_names, held)),
            *starved(of_samples, classes, groups, names_held(data.tasks, data.classes, data.label_names)),
        ),
        description={"path": str(data.root.resolve()), **data.description},
        serves=data.serves,
        labels=label_counts(data.label_names, of_samples, held),
    )


@dataclass(frozen=True)
class SplitReport:
    """A split that was written: images and groups of each split or fold, and how many of its images hold each class.

    near_copies: ids of images that look the same and stand in two splits, see datasets.duplicates.
    """

    images: dict[str, int]
    groups: dict[str, int]
    holders: dict[str, dict[str, int]]
    near_copies: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def write_split(
    data: DataSet, out: Path, choice: SplitChoice, seed: int = 0, *, workers: int = 2, quiet: bool = False
) -> SplitReport:
    """Write a split of a data set to a CSV file, see datasets.split_file; then look for copies across it.

    choice: of a cross-validation, the file holds the folds. seed: of the order in which groups are placed. workers:
    threads that decode the images. Raises DataError where the split can't be made, the file exists already, or a label
    is bad; images that can't be read are noted.
    """
    if choice.file or choice.fold:
        raise DataError(
            f"{choice} can't be written as a split. wanted: own, group, stratified or image, or all folds: group:K."
        )
    if seed and choice.by == "own":
        raise DataError("--seed would change nothing in the set's own split. Omit it, or use --split group.")
    with one_of_all(data):
        targets = [data.read_target(sample, image_size(sample.image)) for sample in data.samples]
    classes = [classes_in(target) for target in targets]
    named = names_held(data.tasks, data.classes, data.label_names)
    good = verdicts(data.label_names, [target.labels for target in targets])
    ids, groups, own = ([getattr(sample, name) for sample in data.samples] for name in ("id", "group", "split"))
    _, splits = assigned(choice, ids, groups, own, lambda: classes, seed)
    write_split_file(out, ids, groups, splits)
    looks = _looks(data.samples, workers, quiet)
    seen = [i for i, look in enumerate(looks) if look]
    pairs = [(seen[a], seen[b]) for a, b in near_copies([look for look in looks if look])]
    across = [(a, b) for a, b in pairs if splits[a] != splits[b]]
    parts = {part: [i for i, found in enumerate(splits) if found == part] for part in _in_order(splits)}
    return SplitReport(
        images={part: len(own) for part, own in parts.items()},
        groups={part: len({groups[i] for i in own}) for part, own in parts.items()},
        holders={
            part: {name: sum(c in classes[i] for i in own) for c, name in enumerate(named) if c or not data.tasks}
            for part, own in parts.items()
        },
        near_copies=tuple((ids[a], ids[b]) for a, b in across),
        notes=(
            *(data.notes if choice.by == "own" else leaks(groups, splits, "this split")),
            *mixed_verdicts(groups, splits, good, "this split"),
            *starved(splits, classes, groups, named),
            *_alike([tuple(f"{ids[i]} ({splits[i]})" for i in pair) for pair in across]),
            *([f"{counted(len(looks) - len(seen), 'image')} can't be read"] if len(seen) < len(looks) else []),
        ),
    )


def _looks(samples: Sequence[Sample], workers: int, quiet: bool) -> list[Look | None]:
    """How each image looks, None for one that can't be read."""

    def look(sample: Sample) -> Look | None:
        try:
            return look_of(read_levels(sample.image))
        except DataError:
            return None

    with in_threads(look, samples, workers) as results:
        return list(counting(results, len(samples), "comparing", "img", quiet=quiet))


def _alike(pairs: Sequence[Sequence[str]]) -> list[str]:
    """A note on images that look the same in two splits."""
    if not pairs:
        return []
    shown = listed([" and ".join(pair) for pair in pairs], 3)
    return [f"{counted(len(pairs), 'pair')} of images that look the same in two splits: {shown}"]


def _in_order(splits: Sequence[str]) -> list[str]:
    """Train, val and test, or folds by number."""
    return sorted(set(splits), key=lambda part: SPLITS.index(part) if part in SPLITS else int(part))


def contact_sheet(
    data: DataSet, out: Path, count: int = 8, split: str = "train", intensity: str | None = None
) -> list[str]:
    """Write a PNG of images beside their labels; returns the ids shown, evenly spread over the split.

    Images with labels come before those without. A label of the whole image stands below it. Images are shown as the
    intensity policy makes them, None for the default. Raises DataError for an empty split.
    """
    samples = data.in_split(split)
    if not samples:
        raise DataError(f"{data.name} has no {split} split. wanted: one of train, val, test.")
    with one_of_all(data):
        labelled = [sample for sample in samples if _is_labelled(data, sample)]
        others = {sample.id for sample in samples} - {sample.id for sample in labelled}
        plain = spread([sample for sample in samples if sample.id in others], max(0, count - len(labelled)))
        chosen = [*spread(labelled, count), *plain]
        policy = Intensity.parse(intensity) if intensity else default_intensity(bits_of(chosen[0].image))
        window = training_window([s.image for s in data.in_split("train")], policy)
        rows = (_row(data, sample, window, policy) for sample in chosen)  # one image in memory at a time
        save_sheet(out, rows, ["image", "labels"][: 1 + bool(data.tasks)], data.classes)
    return [sample.id for sample in chosen]


def _row(
    data: DataSet, sample: Sample, window: tuple[float, float] | None, policy: Intensity
) -> tuple[str, list[Panel]]:
    """An image beside its labels, as a row of a sheet."""
    image = to_unit(read_levels(sample.image), window, policy)
    target = data.read_target(sample, image_size(sample.image))
    of_image = held_text(data.label_names, target.labels) if data.label_names else ""
    drawn = [Panel(image, target.semantic, target.instances or ())] if data.tasks else []
    group = f"  ({sample.group})" if sample.group != sample.id else ""
    return f"{sample.id}{group}{of_image and f': {of_image}'}", [Panel(image), *drawn]


def _is_labelled(data: DataSet, sample: Sample) -> bool:
    target = data.read_target(sample, image_size(sample.image))
    if target.semantic is not None:
        return bool(((target.semantic > 0) & (target.semantic != IGNORE)).any())
    return bool(target.instances)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spread over their order."""
    if not samples:
        return []
    picked = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[i] for i in picked]
