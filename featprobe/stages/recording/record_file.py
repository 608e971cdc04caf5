"""defects.parquet: the defects and calls of a scored head, beside it. Format: probes/README.md."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FieldError, FileKindError, ProbeError
from featprobe.io.disk import below, write_whole
from featprobe.io.fields import limits, made, plain
from featprobe.io.parquet import Column, Kind, read_table, table_bytes
from featprobe.machine import available_memory
from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    IGNORED,
    NOTHING,
    SIZES,
    TOUCHES,
    UNKNOWN,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Indices,
    Records,
    found_scores,
)

RECORDS = "defects.parquet"
FORMAT, VERSION = "featprobe-records", 1
SPLITS = ("val", "test")
KINDS_OF_ROW = ("image", "defect", "call")
TRUTHS = {DEFECT: "defect", GOOD: "good", UNKNOWN: "unknown"}
TOUCHED = {NOTHING: "nothing", TOUCHES: "defect", IGNORED: "ignored"}
BOX, SPACING = ("x1", "y1", "x2", "y2"), ("mm_per_pixel_y", "mm_per_pixel_x")
IN_MM = tuple(f"{size}_mm" for size in SIZES)
COLUMNS: Mapping[str, Kind] = {
    "record": "text", "split": "text", "image": "text", "group": "text", "number": "int", "class": "text",
    "score": "float", **dict.fromkeys((*BOX, *SIZES, *IN_MM), "float"), "contrast": "float", "cut": "bool",
    "touched": "text", "finds": "ints", "truth": "text", "height": "int", "width": "int",
    **dict.fromkeys(SPACING, "float"), "file": "text", "image_hash": "text",
}  # fmt: skip
"""The columns of the table, and what each holds. A row holds an image, a defect or a call; what it lacks is missing."""
FIELDS: Mapping[str, tuple[str, ...]] = {"boxes": BOX, "pixels": SIZES, "millimetres": IN_MM}
"""Fields of `Objects` of several columns."""
Names = NDArray[np.object_]


@dataclass(frozen=True)
class _Said:
    """What a file says of itself, as JSON. base: None for none."""

    format: str
    version: int
    task: str
    head: str
    head_sha256: str
    classes: tuple[str, ...]
    rule: FoundRule
    base: float | None
    base_from: Literal["validation", "default", ""]
    parts: bool
    pooled: bool

    def faults(self) -> list[Any]:
        """The faults of values out of their limits."""
        return limits({
            "format": (self.format == FORMAT, FORMAT, self.format),
            "version": (self.version == VERSION, str(VERSION), self.version),
            "rule": (self.rule.iou is None or 0 < self.rule.iou <= 1, "an IoU above 0 and at most 1", self.rule.iou),
            "classes": (
                len(self.classes) == len(set(self.classes)) <= 256, "each class once, at most 256", len(self.classes)
            ),
        })  # fmt: skip


def write_records(path: Path, records: Records) -> None:
    """Write the records of a head, whole or not at all. Raises DiskError."""
    write_whole(path, record_bytes(records))


def record_bytes(records: Records) -> bytes:
    """The bytes of the file that `write_records` writes: images first, then defects, then calls, in their order."""
    images, defects, calls = records.images, records.defects, records.calls
    counts = len(images), len(defects), len(calls)
    of_image = np.concatenate([np.arange(len(images)), defects.image, calls.image]).astype(np.intp)
    values: dict[str, Column] = {
        "record": _texts(np.repeat(np.array(KINDS_OF_ROW, object), counts)),
        "number": np.concatenate([np.full(counts[0], -1), _numbers(defects.image), _numbers(calls.image)]),
        "score": _joined(images.score, np.where(np.isneginf(defects.score), np.nan, defects.score), calls.score),
        "contrast": _joined(counts[0], defects.contrast, counts[2]),
        "cut": np.concatenate([np.full(counts[0], -1), defects.cut, np.full(counts[2], -1)]).astype(np.int8),
        "finds": _listed(records, counts),
    }
    classes = (*records.about.classes,)
    category = np.concatenate([np.zeros(counts[0]), defects.category, calls.category]).astype(np.int32)
    values["class"] = np.where(category > 0, category, -1), classes
    touched = np.concatenate([np.full(counts[0] + counts[1], -1), calls.touched]).astype(np.int32)
    values["touched"] = touched, tuple(TOUCHED.values())
    truth = np.concatenate([images.good, np.full(counts[1] + counts[2], -1)]).astype(np.int32)
    values["truth"] = truth, tuple(TRUTHS[i] for i in range(len(TRUTHS)))
    for name, own in {"split": images.splits, "image": images.ids, "group": images.groups}.items():
        codes, words = _texts(np.array(own, object))
        values[name] = codes[of_image], words
    for name, own in {"file": images.files, "image_hash": images.hashes}.items():
        codes, words = _texts(np.array(own, object))
        values[name] = np.concatenate([codes, np.full(counts[1] + counts[2], -1)]).astype(np.int32), words
    for i, name in enumerate(("height", "width")):
        values[name] = np.concatenate([images.sizes[:, i], np.full(counts[1] + counts[2], -1)])
    for i, name in enumerate(SPACING):
        values[name] = _joined(images.spacing[:, i], counts[1], counts[2])
    for of_kind, names in FIELDS.items():
        for i, name in enumerate(names):
            values[name] = _joined(counts[0], getattr(defects, of_kind)[:, i], getattr(calls, of_kind)[:, i])
    whole = {name: (kind, _narrow(kind, values[name])) for name, kind in COLUMNS.items()}
    said = {"format": FORMAT, "version": VERSION, **asdict(records.about)}
    return table_bytes(whole, plain(said))


def read_records(folder: Path, head_sha256: str) -> Records:
    """The records beside a head. Raises ProbeError where there are none that can be used, or they are of another head.

    folder: of the head. head_sha256: the hash of its head.safetensors, as its card has it.
    """
    path = folder / RECORDS
    try:
        found = below(folder, RECORDS, "The folder of a head")
        said, columns = read_table(found, COLUMNS, available_memory() // 4)
        records = _records_of(made(_Said, said, "The table"), columns)
    except FileNotFoundError as error:
        raise ProbeError(
            f"{folder} has no {RECORDS}: its defects and calls were not recorded. Nothing was computed.\n"
            "Make it from the cache and the head:  featprobe inspect --rescore"
        ) from error
    except (OSError, ValueError, FileKindError, FieldError) as error:
        fault = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise ProbeError(
            f"{path} can't be used. Nothing was computed.\n  {fault}\n"
            "Make it again from the cache and the head:  featprobe inspect --rescore"
        ) from error
    if records.about.head_sha256 != head_sha256:
        raise ProbeError(
            f"{path} is of another head than lies beside it. Nothing was computed.\n"
            f"  wanted  sha256 {head_sha256[:16]}…\n  found   sha256 {records.about.head_sha256[:16]}…\n"
            "Make it again from the cache and the head:  featprobe inspect --rescore"
        )
    return records


# ---- writing ---------------------------------------------------------------------------------------------------------


def _texts(values: Names) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Texts as a column has them."""
    words: dict[str, int] = {}
    codes = [words.setdefault(text, len(words)) for text in values.tolist()]
    return np.array(codes, np.int32), tuple(words)


def _joined(*parts: Any) -> NDArray[np.float32]:
    """A column of numbers from those of images, defects and calls; a count stands for as many that are missing."""
    return np.concatenate([np.full(p, np.nan) if isinstance(p, int) else p for p in parts]).astype(np.float32)


def _numbers(image: Indices) -> Indices:
    """The number of each object within its image, from 0 in their order."""
    if len(image) and (image[1:] < image[:-1]).any():
        order = np.argsort(image, kind="stable")
        numbers = np.empty_like(order)
        numbers[order] = _numbers(image[order])
        return numbers
    begins = np.flatnonzero(np.diff(image, prepend=-1))
    numbers = np.arange(len(image))
    numbers -= np.repeat(begins, np.diff(begins, append=len(image)))
    return numbers


def _listed(records: Records, counts: tuple[int, int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The column `finds`."""
    finds = records.finds[np.lexsort((records.finds[:, 1], records.finds[:, 0]))]
    lengths = np.bincount(finds[:, 0], minlength=counts[2])
    numbers = _numbers(records.defects.image)[finds[:, 1]]
    return numbers.astype(np.int32), np.concatenate([np.zeros(counts[0] + counts[1]), lengths]).astype(np.int32)


def _narrow(kind: Kind, column: Column) -> Column:
    if kind == "text":
        return column[0].astype(np.int32), column[1]
    return column.astype(np.int32) if kind == "int" else column


# ---- reading ---------------------------------------------------------------------------------------------------------


def _records_of(said: _Said, columns: Mapping[str, Column]) -> Records:
    """The records in the columns of a file. Raises ValueError, saying what is wrong, where they are none."""
    about = About(
        said.task, said.head, said.head_sha256, said.classes, said.rule,
        math.nan if said.base is None else said.base, said.base_from, said.parts, said.pooled,
    )  # fmt: skip
    kind = _codes(columns["record"], KINDS_OF_ROW, "record")
    if (np.diff(kind) < 0).any() or (kind < 0).any():
        raise ValueError("its rows are not images, then defects, then calls")
    counts = np.bincount(kind, minlength=3)
    rows = [slice(*ends) for ends in zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True)]
    named = columns["image"]
    images = _images(columns, named, rows[0])
    of_image = _image_of(columns, named[0], len(images))
    parts = [_objects(columns, rows[i], of_image[rows[i]], said.classes) for i in (1, 2)]
    contrast, cut = columns["contrast"][rows[1]], columns["cut"][rows[1]]
    _check((cut >= 0).all(), "cut", "a defect lacks it")
    defects = Defects(**parts[0], contrast=contrast, cut=cut == 1)
    defects.score[np.isnan(defects.score)] = -np.inf
    touched = _codes(columns["touched"], tuple(TOUCHED.values()), "touched")[rows[2]]
    _check((touched >= 0).all(), "touched", "a call lacks it")
    calls = Calls(**parts[1], touched=touched.astype(np.uint8))
    _check(np.isfinite(calls.score).all(), "score", "a call lacks it")
    return Records(about, images, defects, calls, _finds(columns["finds"], rows, defects, calls))


def _check(holds: Any, name: str, fault: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {fault}")


def _codes(column: Column, known: tuple[str, ...], name: str) -> NDArray[np.int16]:
    """A column of texts as places among the known ones; -1 for none."""
    codes, words = column
    place = {word: i for i, word in enumerate(known)}
    strange = next((word for word in words if word not in place), None)
    _check(strange is None, name, f"{str(strange)[:60]!r} is none of {', '.join(known)}")
    places = np.array([*(place[word] for word in words), -1], np.int16)
    return places[codes]


def _words(column: Column, rows: slice, name: str) -> tuple[str, ...]:
    """Texts of some rows, of which none may be missing."""
    codes, words = column[0][rows], column[1]
    _check((codes >= 0).all(), name, "a row lacks it")
    return tuple(words[code] for code in codes.tolist())


def _images(columns: Mapping[str, Column], named: Column, rows: slice) -> Images:
    truth = _codes(columns["truth"], tuple(TRUTHS[i] for i in range(len(TRUTHS))), "truth")[rows]
    _check((truth >= 0).all(), "truth", "an image lacks it")
    _codes(columns["split"], SPLITS, "split")
    sizes = np.stack([columns[name][rows] for name in ("height", "width")], axis=1).astype(np.intp)
    _check((sizes > 0).all(), "height, width", "an image lacks them")
    spacing = np.stack([columns[name][rows] for name in SPACING], axis=1)
    _check(not (spacing <= 0).any() and not np.isinf(spacing).any(), ", ".join(SPACING), "one is no length")
    score = columns["score"][rows]
    _check(not np.isinf(score).any(), "score", "that of an image is not finite")
    ids = _words(named, rows, "image")
    _check(len(set(ids)) == len(truth), "image", "two images have the same name")
    names = {name: _words(columns[name], rows, name) for name in ("group", "split", "file", "image_hash")}
    return Images(
        ids, names["group"], names["split"], names["file"], names["image_hash"], truth.astype(np.uint8),
        score, spacing, sizes,
    )  # fmt: skip


def _image_of(columns: Mapping[str, Column], codes: NDArray[np.int32], count: int) -> Indices:
    """The image of each row, which must be one of the images, in the same group and split.

    codes: of the names of images, in all rows. count: how many images there are; each has another code.
    """
    place = np.full(codes.max(initial=-1) + 2, -1, np.intp)
    place[codes[:count]] = np.arange(count)
    of_image = place[codes]
    _check((of_image >= 0).all(), "image", "a defect or a call is of an image that is not in the table")
    for name in ("group", "split"):
        own = columns[name][0]
        _check((own == own[:count][of_image]).all(), name, "that of a defect or a call is not that of its image")
    return of_image


def _objects(columns: Mapping[str, Column], rows: slice, image: Indices, classes: tuple[str, ...]) -> dict[str, Any]:
    """The fields that defects and calls share."""
    category = _codes(columns["class"], classes, "class")[rows]
    found = {name: np.stack([columns[column][rows] for column in own], axis=1) for name, own in FIELDS.items()}
    _check(np.isfinite(found["boxes"]).all(), ", ".join(BOX), "one is missing or not finite")
    for name in ("pixels", "millimetres"):
        bad = (found[name] < 0) | np.isinf(found[name])
        _check(not bad.any(), ", ".join(FIELDS[name]), "one is no size")
    _check((np.diff(image) >= 0).all(), "image", "objects are not in the order of their images")
    _check((columns["number"][rows] == _numbers(image)).all(), "number", "objects of an image are not counted from 0")
    score = columns["score"][rows].copy()
    _check(not np.isinf(score).any(), "score", "one is not finite")
    return {"image": image, "category": np.maximum(category, 0).astype(np.uint8), **found, "score": score}


def _finds(column: Column, rows: list[slice], defects: Defects, calls: Calls) -> Indices:
    """The pairs of the column `finds`. Raises ValueError where they are not those that give defects their scores."""
    numbers, lengths = column
    _check(not lengths[: rows[2].start].any(), "finds", "a row that is no call has some")
    of_call = np.repeat(np.arange(len(calls)), lengths[rows[2]])
    first = np.searchsorted(defects.image, calls.image)
    count = np.searchsorted(defects.image, calls.image, side="right") - first
    inside = (numbers >= 0) & (numbers < count[of_call])
    _check(inside.all(), "finds", "a call finds what is not in its image")
    pairs = np.stack([of_call, first[of_call] + numbers], axis=1).astype(np.intp)
    best = found_scores(pairs, calls.score, len(defects))
    _check(np.array_equal(best, defects.score), "score", "a defect has another than the highest call that finds it")
    again = len(np.unique(pairs[:, 0] * (len(defects) + 1) + pairs[:, 1])) < len(pairs)
    _check(not again, "finds", "a call finds a defect twice")
    _check((calls.touched[pairs[:, 0]] == TOUCHES).all(), "touched", "a call that finds a defect touches none")
    return pairs
