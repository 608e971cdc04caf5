"""defects.parquet: the defects and calls of a scored head, beside it. Format: probes/README.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FieldError, FileKindError, ProbeError
from featprobe.io.disk import below, write_whole
from featprobe.io.fields import limits, made, plain
from featprobe.io.packed_texts import Texts
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
FINDS_AT_ONCE = 1 << 16  # that are looked up together
FIELDS: Mapping[str, tuple[str, ...]] = {"boxes": BOX, "pixels": SIZES, "millimetres": IN_MM}
"""Fields of `Objects` of several columns."""


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
        "record": _kinds(counts),
        "number": np.concatenate(
            [np.full(counts[0], -1), _numbers(defects.image), _numbers(calls.image)],
            dtype=np.int32,
            casting="same_kind",
        ),
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
        codes, words = _texts(own)
        values[name] = codes[of_image], words
    for name, own in {"file": images.files, "image_hash": images.hashes}.items():
        codes, words = _texts(own)
        values[name] = np.concatenate([codes, np.full(counts[1] + counts[2], -1)]).astype(np.int32), words
    for i, name in enumerate(("height", "width")):
        values[name] = np.concatenate([images.sizes[:, i], np.full(counts[1] + counts[2], -1)]).astype(np.int32)
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


def _texts(values: Sequence[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Texts as a column has them."""
    words: dict[str, int] = {}
    codes = (words.setdefault(text, len(words)) for text in values)
    return np.fromiter(codes, np.int32, len(values)), tuple(words)


def _kinds(counts: tuple[int, int, int]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """The column `record`, in which a kind without rows has no word."""
    there = [(kind, count) for kind, count in zip(KINDS_OF_ROW, counts, strict=True) if count]
    codes = np.repeat(np.arange(len(there), dtype=np.int32), [count for _, count in there])
    return codes, tuple(kind for kind, _ in there)


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
    rows = _rows(columns)
    images, of_image = _images_and_theirs(columns, rows[0])
    parts = _objects(columns, rows, of_image, said.classes)
    contrast, cut = columns["contrast"][rows[1]].copy(), columns["cut"][rows[1]]
    _check((cut >= 0).all(), "cut", "a defect lacks it")
    defects = Defects(**parts[0], contrast=contrast, cut=cut == 1)
    defects.score[np.isnan(defects.score)] = -np.inf
    touched = _codes(columns["touched"], tuple(TOUCHED.values()), "touched")[rows[2]]
    _check((touched >= 0).all(), "touched", "a call lacks it")
    calls = Calls(**parts[1], touched=touched.astype(np.uint8))
    _check(np.isfinite(calls.score).all(), "score", "a call lacks it")
    return Records(about, images, defects, calls, _finds(columns["finds"], rows, defects, calls))


def _rows(columns: Mapping[str, Column]) -> list[slice]:
    """The rows of images, of defects and of calls."""
    kind = _codes(columns["record"], KINDS_OF_ROW, "record")
    if (kind[1:] < kind[:-1]).any() or (kind < 0).any():
        raise ValueError("its rows are not images, then defects, then calls")
    ends = [0, *np.searchsorted(kind, np.arange(len(KINDS_OF_ROW), dtype=kind.dtype), side="right").tolist()]
    return [slice(*own) for own in pairwise(ends)]


def _check(holds: Any, name: str, fault: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {fault}")


def _codes(column: Column, known: tuple[str, ...], name: str) -> NDArray[np.int16]:
    """A column of texts as places among the known ones; -1 for none."""
    codes, words = column
    place = {word: i for i, word in enumerate(known)}
    strange = next((word for word in words if word not in place), None)
    _check(strange is None, name, f"{str(strange)[:60]!r} is none of {', '.join(known)}")
    places = np.append(np.fromiter((place[word] for word in words), np.int16, len(words)), np.int16(-1))
    return places[codes]


def _words(column: Column, rows: slice, name: str) -> Texts:
    """Texts of some rows, of which none may be missing."""
    codes, words = column[0][rows].copy(), column[1]  # a view would hold those of all rows
    _check((codes >= 0).all(), name, "a row lacks it")
    return Texts.of(words).some(codes)


def _side_by_side(columns: Mapping[str, Column], names: Sequence[str], rows: slice) -> NDArray[Any]:
    """Some rows of columns of numbers, (rows, columns); one column is held beside them at a time."""
    first = columns[names[0]][rows]
    found = np.empty((len(first), len(names)), first.dtype)
    found[:, 0] = first
    for i, name in enumerate(names[1:], 1):
        found[:, i] = columns[name][rows]
    return found


def _images_and_theirs(columns: Mapping[str, Column], rows: slice) -> tuple[Images, Indices]:
    """The images, and the image of each row of the table."""
    named = columns["image"]
    images = _images(columns, named, rows)
    return images, _image_of(columns, named[0], len(images))


def _images(columns: Mapping[str, Column], named: Column, rows: slice) -> Images:
    truth = _codes(columns["truth"], tuple(TRUTHS[i] for i in range(len(TRUTHS))), "truth")[rows]
    _check((truth >= 0).all(), "truth", "an image lacks it")
    _codes(columns["split"], SPLITS, "split")
    sizes = _side_by_side(columns, ("height", "width"), rows)
    _check((sizes > 0).all(), "height, width", "an image lacks them")
    spacing = _side_by_side(columns, SPACING, rows)
    _check(not (spacing <= 0).any() and not np.isinf(spacing).any(), ", ".join(SPACING), "one is no length")
    score = columns["score"][rows].copy()
    _check(not np.isinf(score).any(), "score", "that of an image is not finite")
    ids = _words(named, rows, "image")
    _check(ids.all_differ(), "image", "two images have the same name")
    names = {name: _words(columns[name], rows, name) for name in ("group", "split", "file", "image_hash")}
    return Images(
        ids, names["group"], names["split"], names["file"], names["image_hash"], truth.astype(np.uint8),
        score, spacing, sizes.astype(np.intp),
    )  # fmt: skip


def _image_of(columns: Mapping[str, Column], codes: NDArray[np.int32], count: int) -> Indices:
    """The image of each row, which must be one of the images, in the same group and split.

    codes: of the names of images, in all rows. count: how many images there are; each has another code.
    """
    place = np.full(codes.max(initial=-1) + 2, -1, np.int32)
    place[codes[:count]] = np.arange(count)
    of_image = place[codes].astype(np.intp)
    _check((of_image >= 0).all(), "image", "a defect or a call is of an image that is not in the table")
    for name in ("group", "split"):
        own = columns[name][0]
        _check((own == own[:count][of_image]).all(), name, "that of a defect or a call is not that of its image")
    return of_image


def _objects(
    columns: Mapping[str, Column], rows: Sequence[slice], of_image: Indices, classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The fields that defects and calls share, of both: a column is decoded once."""
    every = slice(rows[1].start, rows[2].stop)
    category = np.maximum(_codes(columns["class"], classes, "class")[every], 0).astype(np.uint8)
    found = {name: _side_by_side(columns, own, every) for name, own in FIELDS.items()}
    _check(np.isfinite(found["boxes"]).all(), ", ".join(BOX), "one is missing or not finite")
    for name in ("pixels", "millimetres"):
        _check(
            not (found[name] < 0).any() and not np.isinf(found[name]).any(), ", ".join(FIELDS[name]), "one is no size"
        )
    score, number = columns["score"][every].copy(), columns["number"]
    _check(not np.isinf(score).any(), "score", "one is not finite")
    parts = []
    for own in rows[1:]:
        _check_order(of_image[own], number[own])
        among = slice(own.start - every.start, own.stop - every.start)
        fields = {"category": category, **found, "score": score}
        parts.append({"image": of_image[own], **{name: values[among] for name, values in fields.items()}})
    return parts


def _check_order(image: Indices, number: NDArray[np.int32]) -> None:
    """Raise ValueError for objects that are not in the order of their images, or not counted from 0 in each."""
    same = image[1:] == image[:-1]
    _check((image[1:] >= image[:-1]).all(), "image", "objects are not in the order of their images")
    counted = not number[:1].any() and not number[1:][~same].any() and (number[1:] == number[:-1] + 1)[same].all()
    _check(counted, "number", "objects of an image are not counted from 0")


def _finds(column: Column, rows: list[slice], defects: Defects, calls: Calls) -> Indices:
    """The pairs of the column `finds`. Raises ValueError where they are not those that give defects their scores."""
    numbers, lengths = column
    _check(not lengths[: rows[2].start].any(), "finds", "a row that is no call has some")
    pairs = np.empty((len(numbers), 2), np.intp)
    pairs[:, 0] = np.repeat(np.arange(len(calls)), lengths[rows[2]])
    for start in range(0, len(pairs), FINDS_AT_ONCE):
        part, own = pairs[start : start + FINDS_AT_ONCE], numbers[start : start + FINDS_AT_ONCE]
        first, stop = (np.searchsorted(defects.image, calls.image[part[:, 0]], side) for side in ("left", "right"))
        _check(((own >= 0) & (own < stop - first)).all(), "finds", "a call finds what is not in its image")
        part[:, 1] = first + own
    best = found_scores(pairs, calls.score, len(defects))
    _check(np.array_equal(best, defects.score), "score", "a defect has another than the highest call that finds it")
    each = pairs[:, 0] * (len(defects) + 1) + pairs[:, 1]
    each.sort()
    _check((each[1:] != each[:-1]).all(), "finds", "a call finds a defect twice")
    _check((calls.touched[pairs[:, 0]] == TOUCHES).all(), "touched", "a call that finds a defect touches none")
    return pairs
