"""What was measured of the defects of a cache's images, kept beside it (cache/README.md, Measured defects)."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.cache.pooled_file import UNREADABLE, read_header
from featprobe.errors import DiskError
from featprobe.geometry import Size, Spacing
from featprobe.io.arrays import read_entry
from featprobe.io.disk import open_regular, replacing
from featprobe.metrics.defects.records import DEFECT, GOOD, SIZES, UNKNOWN, Floats
from featprobe.stages.recording.sizes import UNKNOWN_SPACING, Outlines, is_cut, outlines_of
from featprobe.targets import Instance

VERSION = 1
MOST_BYTES = 1 << 30  # of a file; one that would be larger is not kept
MOST_CORNERS = 1 << 13  # of an outline: no convex hull of the pixels of an image of 100,000 pixels a side has as many
Source = Literal["own", "components"]
"""Where defects come from: the set's labelled objects, where it has them; connected components of its masks."""
SOURCES: tuple[Source, ...] = ("own", "components")
Table = Mapping[int, "Measured"]
"""Index of an image -> what was measured in it."""


OF_DEFECTS = {
    "category": ("u1", ()),
    "boxes": ("<f4", (4,)),
    "pixels": ("<f4", (len(SIZES),)),
    "contrast": ("<f4", ()),
    "cut": ("|b1", ()),
    "corners": ("<i4", ()),
    "points": ("<f4", (2,)),
}
"""Arrays of defects in a file: number format, and shape of an entry; `points` has one per corner."""


@dataclass(frozen=True)
class Measured:
    """The defects of an image as measured: (n,) each, in the order of their labels.

    good: whether the image is, GOOD, DEFECT or UNKNOWN. spacing: millimetres per pixel, down and across, as its header
    says; nan for unknown. category, boxes, pixels, contrast, cut: see `records.Defects`. corners: how many `points` of
    an outline each has. points: (sum of corners, 2), see `sizes.Outlines`.
    """

    good: int
    spacing: Spacing
    category: NDArray[np.uint8]
    boxes: Floats
    pixels: Floats
    contrast: Floats
    cut: NDArray[np.bool_]
    corners: NDArray[np.int32]
    points: Floats

    def __len__(self) -> int:
        return len(self.category)

    def sizes(self, spacing: Spacing) -> Floats:
        """(n, 4), sizes in millimetres at a spacing, in the order of SIZES; nan for an unknown one."""
        area = self.pixels[:, SIZES.index("area")].astype(np.float64)
        return Outlines(area, self.corners.astype(np.intp), self.points.astype(np.float64)).sizes(spacing)


def measured(objects: Sequence[Instance], good: int, size: Size, spacing: Spacing | None, contrast: Floats) -> Measured:
    """What is measured of the defects of an image of (height, width) pixels, given their contrast."""
    outlines = outlines_of(objects)
    return Measured(
        good,
        spacing or UNKNOWN_SPACING,
        np.array([own.category for own in objects], np.uint8),
        np.array([own.box_xyxy for own in objects], np.float32).reshape(-1, 4),
        outlines.sizes(),
        contrast,
        np.array([is_cut(own, size) for own in objects], bool),
        outlines.corners.astype(np.int32),
        outlines.points.astype(np.float32),
    )


def truth_path(path: Path) -> Path:
    """The path of the file that keeps what was measured of the defects of a cache."""
    return path.with_name(f"{path.stem}.defects.npz")


def kept(cache: Cache, source: Source) -> Table:
    """What is kept beside a cache; nothing of a file that is damaged, of another version, or of another cache."""
    try:
        with open(truth_path(cache.path), "rb", opener=open_regular) as stream:
            if os.fstat(stream.fileno()).st_size > MOST_BYTES:
                return {}
            archive = zipfile.ZipFile(stream)
            there = archive.namelist()
            if len(set(there)) < len(there) or read_header(archive) != _header(cache):
                return {}
            return _table(cache, archive, source) if f"{source}/images.npy" in there else {}
    except UNREADABLE:
        return {}


def keep(cache: Cache, source: Source, table: Table) -> list[str]:
    """Keep a table beside its cache, with that of the other source; returns a note where that could not be."""
    if not cache.is_in_place():
        return []
    said = np.frombuffer(json.dumps(_header(cache)).encode(), np.uint8)
    arrays: dict[str, Any] = {"header": said}
    for own in SOURCES:
        if found := table if own == source else kept(cache, own):
            arrays |= {f"{own}/{name}": values for name, values in _arrays(found).items()}
    if sum(values.nbytes for values in arrays.values()) > MOST_BYTES - (1 << 16):
        return []
    try:
        with replacing(truth_path(cache.path)) as stream:
            np.savez(stream, **arrays)
    except DiskError as error:
        return [
            f"sizes of the defects of {cache.data.name} are not kept, and measured again: {str(error).splitlines()[0]}"
        ]
    return []


def _header(cache: Cache) -> dict[str, Any]:
    return {"version": VERSION, "identity_sha256": cache.contents.identity_sha256}


def _arrays(table: Table) -> dict[str, NDArray[Any]]:
    """A table as the arrays of a file, image after image."""
    images = sorted(table)
    of_images = {
        "images": np.array(images, "<i4"),
        "good": np.array([table[i].good for i in images], "u1"),
        "spacing": np.array([table[i].spacing for i in images], "<f4").reshape(-1, 2),
        "defects": np.array([len(table[i]) for i in images], "<i4"),
    }
    return of_images | {
        name: np.concatenate([getattr(table[i], name) for i in images]).astype(dtype)
        for name, (dtype, _) in OF_DEFECTS.items()
    }


def _table(cache: Cache, archive: zipfile.ZipFile, source: Source) -> Table:
    """The table of a file; raises one of UNREADABLE where it can't be one of this cache's."""

    def read(name: str, dtype: str, shape: tuple[int, ...] = ()) -> NDArray[Any]:
        return read_entry(archive, f"{source}/{name}.npy", dtype, shape, rows=True)

    images, good, defects = read("images", "<i4"), read("good", "u1"), read("defects", "<i4")
    spacing = read("spacing", "<f4", (2,))
    of = {name: read(name, dtype, shape) for name, (dtype, shape) in OF_DEFECTS.items()}
    total, corners = int(defects.sum(dtype=np.int64)), int(of["corners"].sum(dtype=np.int64))
    fits = (
        len(images) == len(good) == len(defects) == len(spacing)
        and bool((np.diff(images, prepend=-1) > 0).all() and (images < len(cache.images)).all())
        and np.isin(good, (GOOD, DEFECT, UNKNOWN)).all()
        and ((spacing > 0) & (spacing < np.inf) | np.isnan(spacing)).all()
        and (defects >= 0).all()
        and all(len(own) == (corners if name == "points" else total) for name, own in of.items())
        and bool(((of["corners"] >= 2) & (of["corners"] <= MOST_CORNERS)).all())
        and (of["pixels"] >= 0).all()
        and (of["cut"].view(np.uint8) <= 1).all()
        and bool(((of["category"] > 0) & (of["category"] < len(cache.data.classes))).all())
        and all(np.isfinite(of[name]).all() for name in ("boxes", "pixels", "points"))
    )
    if not fits:
        raise ValueError("what was measured is of other images")
    ends = np.cumsum([0, *defects.tolist()])
    places = np.concatenate([[0], np.cumsum(of["corners"])])[ends]
    found = {}
    for i, image in enumerate(images.tolist()):
        own = {name: values[ends[i] : ends[i + 1]] for name, values in of.items() if name != "points"}
        points = of["points"][places[i] : places[i + 1]]
        found[image] = Measured(int(good[i]), (float(spacing[i, 0]), float(spacing[i, 1])), **own, points=points)
    return found
