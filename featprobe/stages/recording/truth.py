"""The defects of images, from the labels of a cache: the same for all tasks, with their sizes and their contrast."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.datasets.images.decode import opened
from featprobe.datasets.images.reading import hash_image
from featprobe.errors import DataError, counted
from featprobe.geometry import Spacing
from featprobe.image_labels import ImageTruth
from featprobe.io.packed_texts import Texts
from featprobe.machine import usable_cores
from featprobe.metrics.defects.records import DEFECT, GOOD, SIZES, UNKNOWN, Defects, Floats, Images
from featprobe.processes import count
from featprobe.specs import Rows
from featprobe.stages.progress import Progress
from featprobe.stages.recording.contrast import contrasts
from featprobe.stages.recording.kept_truth import Measured, Source, keep, kept, measured
from featprobe.stages.tasks.labels import shelf_of
from featprobe.targets import IGNORE, Instance, Labels, components


@dataclass(frozen=True)
class TruthOfImage:
    """The defects of an image.

    objects: labelled objects, or connected components (8 neighbours) of each class of its mask. ignored: regions where
    nothing is known: crowds, and components of pixels that don't count. good: GOOD, DEFECT or UNKNOWN.
    """

    objects: tuple[Instance, ...]
    ignored: tuple[Instance, ...]
    good: int


class Truth(NamedTuple):
    """Defects of some images, image by image, each in the order of `TruthOfImage.objects`; none is found yet.

    notes: what a user should know.
    """

    images: Images
    defects: Defects
    notes: tuple[str, ...]


_known: WeakKeyDictionary[Cache, dict[tuple[Source, int], TruthOfImage]] = WeakKeyDictionary()
"""What was found in the labels of each image: heads, bases and splits are recorded over one cache."""


def defects_of(cache: Cache, image: int, source: Source = "own") -> TruthOfImage:
    """The defects of an image of a cache, and what is known of it.

    source: "components" for connected components of its mask, also where the set labels objects. An image without
    regions that are labelled is good or not as the labels of images say. Raises CacheError for damaged labels, and
    where components are wanted of a cache without masks.
    """
    known = _known.setdefault(cache, {})
    if (source, image) not in known:
        known[source, image] = _defects_in(cache, image, source)
    return known[source, image]


def _defects_in(cache: Cache, image: int, source: Source) -> TruthOfImage:
    row, mask = cache.images[image], None
    if row.semantic or source == "components":
        (mask,) = shelf_of(cache).truths(cache, np.array([image]))
    if row.instances and source == "own":
        found = (*cache.image_instances(image), *(() if mask is None else _ignored_in(mask)))
    else:
        found = () if mask is None else components(mask, len(cache.data.classes))
    objects = tuple(one for one in found if not one.crowd and one.category > 0)
    ignored = {(one.box_xyxy, str(one.rle)): one for one in found if one.crowd}  # a component is a crowd of each class
    good = DEFECT if objects else _as_labelled(cache, image)
    if good is None:
        labelled = bool(row.semantic or row.instances)
        good = GOOD if labelled and not ignored else UNKNOWN
    return TruthOfImage(objects, tuple(ignored.values()), good)


def table_of(
    cache: Cache,
    images: Rows,
    source: Source = "own",
    *,
    pixel_size: Spacing | None = None,
    split: str | None = None,
    quiet: bool = False,
) -> Truth:
    """The defects of some images of a cache, in this order, with sizes and contrast.

    images: their indices. source: see `defects_of`. pixel_size: millimetres per pixel, down and across, of all images;
    None for what the header of each says. split: of the images; None for the cache's own.

    Images are read for the contrast of their defects, and what was measured is kept beside the cache. An image that
    can't be read, or is not the one that the cache was made from, gives no contrast, and a note says so. Raises
    CacheError as `defects_of` does.
    """
    known = dict(kept(cache, source))
    lacking = [image for image in dict.fromkeys(images.tolist()) if image not in known]
    fresh, reasons = _measured_now(cache, lacking, source, quiet)
    unread = {image: reason for image, reason in reasons.items() if len(fresh[image])}
    notes = [_unread(cache, len(images), unread)] if unread else []
    known |= fresh
    if len(reasons) < len(fresh):
        notes += keep(cache, source, {image: own for image, own in known.items() if image not in reasons})
    found = [known[image] for image in images.tolist()]
    spacing = [pixel_size or own.spacing for own in found]
    return Truth(_images(cache, images, found, spacing, split), _defects(found, spacing), tuple(notes))


def _images(
    cache: Cache, images: Rows, found: Sequence[Measured], spacing: Sequence[Spacing], split: str | None
) -> Images:
    own = {name: cache.images.texts[name].some(images) for name in ("id", "group", "split", "image", "image_hash")}
    return Images(
        ids=own["id"],
        groups=own["group"],
        splits=own["split"] if split is None else Texts([split]).some(np.zeros(len(images), np.intp)),
        files=own["image"],
        hashes=own["image_hash"],
        good=np.array([one.good for one in found], np.uint8),
        score=np.full(len(images), np.nan, np.float32),
        spacing=np.array(spacing, np.float32).reshape(-1, 2),
        sizes=cache.images.original[images].astype(np.intp),
    )


def _defects(found: Sequence[Measured], spacing: Sequence[Spacing]) -> Defects:
    """The defects of images one after another, not found by anything yet."""

    def joined(name: str, empty: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([empty, *(getattr(own, name) for own in found)])

    sizes = np.zeros((0, len(SIZES)), np.float32)
    total = sum(map(len, found))
    return Defects(
        image=np.repeat(np.arange(len(found), dtype=np.intp), [len(own) for own in found]),
        category=joined("category", np.zeros(0, np.uint8)),
        boxes=joined("boxes", np.zeros((0, 4), np.float32)),
        pixels=joined("pixels", sizes),
        millimetres=np.concatenate([sizes, *(own.sizes(apart) for own, apart in zip(found, spacing, strict=True))]),
        score=np.full(total, -np.inf, np.float32),
        contrast=joined("contrast", np.zeros(0, np.float32)),
        cut=joined("cut", np.zeros(0, bool)),
    )


def _ignored_in(mask: Labels) -> tuple[Instance, ...]:
    """The components of the pixels of a mask that don't count."""
    return components(np.where(mask == IGNORE, mask, np.uint8(0)), 2) if (mask == IGNORE).any() else ()


def _as_labelled(cache: Cache, image: int) -> int | None:
    """Whether an image is good, as the labels of images say; None where they say nothing about that."""
    names, labels = cache.data.label_names, cache.image_labels
    if names is None or labels is None or not names.says_good:
        return None
    return {0: DEFECT, 1: GOOD}.get(int(ImageTruth(names, labels[image : image + 1]).good[0]), UNKNOWN)


def _measured_now(
    cache: Cache, images: Sequence[int], source: Source, quiet: bool
) -> tuple[dict[int, Measured], dict[int, str]]:
    """What was measured in some images, and why some of them could not be read."""
    found: dict[int, Measured] = {}
    reasons: dict[int, str] = {}

    def measure(image: int, truth: TruthOfImage) -> tuple[Measured, str]:
        size, reason = cache.images.placement(image).original, ""
        try:
            spacing, contrast = _read(cache, image, truth)
        except DataError as error:
            spacing, contrast, reason = None, np.full(len(truth.objects), np.nan, np.float32), str(error)
        return measured(truth.objects, truth.good, size, spacing, contrast), reason

    threads = max(1, usable_cores() // count())
    with (
        Progress(len(images), f"measuring defects of {cache.data.name}", "image", quiet=quiet) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="defects") as pool,
    ):
        truths = (defects_of(cache, image, source) for image in images)
        for image, (own, reason) in zip(images, pool.map(measure, images, truths), strict=True):
            found[image] = own
            if reason:
                reasons[image] = reason
            bar.update()
    return found, reasons


def _read(cache: Cache, image: int, truth: TruthOfImage) -> tuple[Spacing | None, Floats]:
    """The spacing that an image's header states, and the contrast of its defects; raises DataError."""
    path = Path(cache.data.root) / cache.images.texts["image"][image]
    if truth.objects and hash_image(path) != cache.images.texts["image_hash"][image]:
        raise DataError(f"{path} is not the image that {cache.path} was made from.")
    with opened(path) as found:
        if found.size != cache.images.placement(image).original:
            raise DataError(f"{path} has {found.size[0]}x{found.size[1]} pixels, other than {cache.path} says.")
        levels = found.read() if truth.objects else np.zeros(found.size, np.uint8)
        return found.spacing, contrasts(levels, truth.objects, truth.ignored)


def _unread(cache: Cache, asked: int, reasons: Mapping[int, str]) -> str:
    first = next(iter(reasons.values())).splitlines()[0]
    return (
        f"{cache.data.name}: the contrast of defects is unknown in {len(reasons)} of {counted(asked, 'image')}, which "
        f"can't be read or are others than the cache was made from: {first}"
    )
