"""HDF5's view of a cache file, taken in a process of its own:  python hdf5_child.py KIND DESCRIPTOR < REQUEST

KIND is `old` for the contents of a file of version 1 or 2, or `agrees` for the differences between HDF5 and the header
in REQUEST, which is JSON. The file comes as an open descriptor. The answer goes to the standard output: one line with
the number of bytes of each part, then the parts.

HDF5 follows every link of a file, into other files and in circles. So this process first looks at the structure, and
reads only what lies in the file itself, in the places that cache/README.md names; its memory and its processor time are
limited. featprobe.cache.legacy starts it, and ends it where it takes too long. It imports nothing of featprobe, so that
it starts at once and holds no data of others.
"""

import hashlib
import json
import os
import re
import resource
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

TEXT_FIELDS = ("id", "group", "split", "image", "image_hash")
TARGET_KINDS = ("semantic", "instances")
ATTRIBUTES = ("recipe", "recipe_key", "data", "provenance", "identity_sha256")
MOST_ATTRIBUTE = 4 << 20  # bytes of a text at the root
MOST_LEVELS = 1000
SUPERBLOCK = 48  # bytes: the least that HDF5 keeps at the front of its part of a file
OPENING_SECONDS = 1  # of processor time, for opening a file and looking at its structure
ROWS_PER_SECOND = 2000  # the least number of rows whose texts are read in a second
PIECE = 1 << 22  # bytes that are hashed at once


class Refused(Exception):
    """The file differs from cache/README.md; the text says how.

    kind: `newer` for a later version, `other` for HDF5 that is no cache at all, else "".
    """

    def __init__(self, found: str, kind: str = "") -> None:
        super().__init__(found)
        self.kind = kind


# Limits


def limit_memory(size: int) -> None:
    """Limit memory to what is in use now, and twice the file's size and 256 MB more."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: the system tells no process its address space, nor limits it
        return
    lower(resource.RLIMIT_AS, used + 2 * size + (256 << 20))


def limit_seconds(more: float) -> None:
    """Limit processor time from now on, in seconds; after that the system ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + more) + 1)


def lower(which: int, limit: int) -> None:
    """Set a limit, but no higher than the process that started this one allows."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


# Structure


def hard(parent: Any, name: str) -> Any:
    """The object under a name in a group. Only hard links are followed, since they can't leave the file."""
    for step in name.encode().split(b"/"):
        if not isinstance(parent, h5py.h5g.GroupID) or not parent.links.exists(step):
            raise Refused(f"{name!r} is missing")
        if parent.links.get_info(step).type != h5py.h5l.TYPE_HARD:
            raise Refused(f"{name!r} is a link that leads elsewhere")
        parent = h5py.h5o.open(parent, step)
    return parent


def dataset_at(root: Any, name: str) -> Any:
    """A dataset whose bytes lie in one piece in the file itself."""
    found = hard(root, name)
    if not isinstance(found, h5py.h5d.DatasetID):
        raise Refused(f"{name!r} is no dataset")
    made = found.get_create_plist()
    if made.get_layout() != h5py.h5d.CONTIGUOUS:
        raise Refused(f"{name!r} is not contiguous")
    if made.get_external_count():
        raise Refused(f"the bytes of {name!r} lie in another file")
    if made.get_nfilters():
        raise Refused(f"{name!r} is filtered")
    return found


def shape_of(dataset: Any, name: str, *wanted: int | None) -> tuple[int, ...]:
    """The shape of a dataset, which must be the wanted one; None stands for any length."""
    if dataset.get_space().get_simple_extent_type() != h5py.h5s.SIMPLE:
        raise Refused(f"{name!r} has no shape")
    shape = tuple(dataset.shape)
    if len(shape) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, shape, strict=True)):
        raise Refused(f"the shape of {name!r} is {list(shape)}, and should be {list(wanted)}".replace("None", "any"))
    return shape


def is_of(kind: Any, dtype: str) -> bool:
    """Whether an HDF5 type is the given numpy type."""
    wanted = np.dtype(dtype)
    if wanted.kind == "S":
        text = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
        return bool(text and kind.get_size() == wanted.itemsize)
    return bool(kind.equal(h5py.h5t.py_create(wanted)))


def place_of(root: Any, name: str, dtype: str, length: int, *wanted: int | None) -> dict[str, Any]:
    """The header entry of an array of numbers: its place, type and shape."""
    dataset = dataset_at(root, name)
    shape = shape_of(dataset, name, *wanted)
    if not is_of(dataset.get_type(), dtype):
        raise Refused(f"{name!r} is not of the type {dtype}")
    size = int(np.dtype(dtype).itemsize)
    for side in shape:
        size *= side
    offset = dataset.get_offset() if size else 0
    if size and (offset is None or dataset.get_storage_size() != size):
        raise Refused(f"{name!r} has no bytes of its own, or too few")
    if offset + size > length:
        raise Refused(f"{name!r} ends at byte {offset + size} of {length}: the file is cut short")
    return {"offset": offset, "bytes": size, "dtype": dtype, "shape": list(shape), "sha256": "", "required": False}


def check_apart(places: Mapping[str, tuple[int, int]]) -> None:
    """Refuse arrays that share bytes."""
    end, last = SUPERBLOCK, "the file's own bookkeeping"
    for name, (offset, size) in sorted(places.items(), key=lambda item: item[1]):
        if size and offset < end:
            raise Refused(f"{name!r} lies over {last}")
        if size:
            end, last = offset + size, repr(name)


def attribute(root: Any, name: str) -> Any:
    """The value of an attribute at the root, a text or a whole number."""
    if not h5py.h5a.exists(root, name.encode()):
        raise Refused(f"the attribute {name!r} is missing")
    found = h5py.h5a.open(root, name.encode())
    kind = found.get_type()
    if found.get_space().get_simple_extent_type() != h5py.h5s.SCALAR or kind.get_class() not in (
        h5py.h5t.STRING,
        h5py.h5t.INTEGER,
    ):
        raise Refused(f"the attribute {name!r} is neither a text nor a whole number")
    if kind.get_size() > MOST_ATTRIBUTE:
        raise Refused(f"the attribute {name!r} is too long")
    value = h5py.AttributeManager(h5py.Group(root))[name]
    if isinstance(value, np.integer):
        return int(value)
    text = value.decode() if isinstance(value, bytes) else str(value)
    if len(text) > MOST_ATTRIBUTE:
        raise Refused(f"the attribute {name!r} is too long")
    return text


def text_attribute(root: Any, name: str) -> str:
    """The value of an attribute at the root, which must be a text."""
    value = attribute(root, name)
    if not isinstance(value, str):
        raise Refused(f"the attribute {name!r} is no text")
    return value


# Files of versions 1 and 2


def read_old(root: Any, status: os.stat_result) -> Iterator[bytes]:
    """The header that the file would have in version 3, with its real places; then its texts and provenance."""
    kind = attribute(root, "format") if h5py.h5a.exists(root, b"format") else None
    if kind != "featprobe-cache":
        raise Refused(short(kind), "other")
    version = attribute(root, "version")
    if isinstance(version, int) and version > 2:
        raise Refused(f"version {version}", "newer")
    if version not in (1, 2):
        raise Refused(f"its version is {short(version)}")
    said = {name: text_attribute(root, name) for name in ATTRIBUTES}
    recipe = json.loads(said["recipe"])
    levels = recipe["levels"] if isinstance(recipe, dict) else None
    if not isinstance(levels, list) or len(levels) > MOST_LEVELS:
        raise Refused("its recipe has no list of levels")
    names = [level["name"] for level in levels]
    rows = shape_of(dataset_at(root, "rows/id"), "rows/id", None)[0]
    images = shape_of(dataset_at(root, "images/id"), "images/id", None)[0] if version == 2 else 0
    length = status.st_size
    parts = {
        name: place_of(root, name, dtype, length, *shape) for name, dtype, shape in old_parts(rows, images, version)
    }
    tables = {name: place_of(root, name, dtype, length, *shape) for name, dtype, shape in old_tables(rows, names, root)}
    texts, places = old_texts(root, rows, images, version, length)
    check_apart({name: (entry["offset"], entry["bytes"]) for name, entry in (parts | tables).items()} | places)
    limit_seconds(OPENING_SECONDS + (rows + images) / ROWS_PER_SECOND)
    for entry in tables.values():
        count = entry["shape"][0]
        entry |= {"rows": count, "row_bytes": entry["bytes"] // max(1, count)}
    data = json.loads(said["data"])
    held: dict[str, Any] = {"data": data, "rows": {}}
    held |= {"images": {}} if version == 2 else {}
    for group, name in texts:
        held[group][name] = h5py.Dataset(dataset_at(root, f"{group}/{name}")).asstr()[...].tolist()
    blobs = {"texts": dumped(held), "provenance": dumped(json.loads(said["provenance"]))}
    for name, blob in blobs.items():
        parts[name] = place_in_answer(blob)
    yield json.dumps(
        {
            "version": version, "recipe": recipe, "recipe_key": said["recipe_key"],
            "identity_sha256": said["identity_sha256"], "rows": rows, "images": images,
            "parts": parts, "tables": tables,
        }
    ).encode()  # fmt: skip
    yield from blobs.values()


def old_parts(rows: int, images: int, version: int) -> Iterator[tuple[str, str, tuple[int | None, ...]]]:
    """(name, type, shape) of each array of numbers that is written once."""
    yield "rows/original_size", "<i4", (rows, 2)
    yield "rows/content_size", "<i4", (rows, 2)
    yield "rows/affine", "<f8", (rows, 2, 3)
    yield "targets/checksum", "<u8", (rows, len(TARGET_KINDS))
    groups = {"targets": rows}
    if version == 2:
        yield "rows/part", "<i4", (rows, 4)
        yield "rows/image_index", "<i4", (rows,)
        yield "images/size", "<i4", (images, 2)
        groups["images"] = images
    for group, count in groups.items():
        for kind in TARGET_KINDS:
            yield f"{group}/{kind}", "u1", (None,)
            yield f"{group}/{kind}_offset", "<u8", (count + 1,)


def old_tables(rows: int, levels: list[str], root: Any) -> Iterator[tuple[str, str, tuple[int | None, ...]]]:
    """(name, type, shape) of each table that is written row by row; features may have any of the stored types."""
    for level in levels:
        name = f"features/{level}"
        kind = dataset_at(root, name).get_type()
        dtype = next((dtype for dtype in ("<f2", "<f4", "<u2") if is_of(kind, dtype)), "<f2")
        yield name, dtype, (rows, None, None, None)
    yield "done", "u1", (rows,)
    yield "checksum", "<u8", (rows, len(levels))
    yield "reason", "S240", (rows,)


def old_texts(
    root: Any, rows: int, images: int, version: int, length: int
) -> tuple[list[tuple[str, str]], dict[str, tuple[int, int]]]:
    """Group and name of each column of texts and the place of its references, after a check of both."""
    columns = [("rows", name) for name in TEXT_FIELDS]
    columns += [("rows", "view"), *(("images", name) for name in TEXT_FIELDS)] if version == 2 else []
    places = {}
    for group, name in columns:
        whole = f"{group}/{name}"
        dataset = dataset_at(root, whole)
        shape_of(dataset, whole, rows if group == "rows" else images)
        kind = dataset.get_type()
        if kind.get_class() != h5py.h5t.STRING or not kind.is_variable_str():
            raise Refused(f"{whole!r} holds no texts")
        offset, size = dataset.get_offset(), dataset.get_storage_size()
        if offset is None or offset + size > length or size < (rows if group == "rows" else images):
            raise Refused(f"{whole!r} has no bytes of its own, or too few")
        places[whole] = (offset, size)
    return columns, places


def place_in_answer(blob: bytes) -> dict[str, Any]:
    """The header entry of a part that an old file does not hold as one array."""
    said = {"offset": 0, "bytes": len(blob), "dtype": "u1", "shape": [len(blob)]}
    return said | {"sha256": hashlib.sha256(blob).hexdigest(), "required": True}


def dumped(value: Any) -> bytes:
    """JSON whose brackets and commas are structure only (in texts they are escaped), so that a reader can count the
    values first."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    escaped = {ord(mark): f"\\u{ord(mark):04x}" for mark in "[{,"}
    return re.sub(r'"(?:[^"\\]|\\.)*"', lambda found: found[0].translate(escaped), text).encode()


# Files that have a header


def disagreements(root: Any, header: Mapping[str, Any], handle: int) -> Iterator[str]:
    """The differences between a file as HDF5 reads it and its header: names, places, types, shapes, bytes of parts."""
    length = os.fstat(handle).st_size
    wanted = {
        "format": "featprobe-cache",
        "version": header["version"],
        "recipe_key": header["recipe_key"],
        "identity_sha256": header["identity_sha256"],
    }
    for name, value in wanted.items():
        yield from said_by(
            lambda name=name, value=value: differs(f"the attribute {name!r}", attribute(root, name), value)
        )
    yield from said_by(
        lambda: differs("the attribute 'recipe'", json.loads(text_attribute(root, "recipe")), header["recipe"])
    )
    for name, entry in (header["parts"] | header["tables"]).items():
        yield from said_by(lambda name=name, entry=entry: entry_differs(root, name, entry, length))


def entry_differs(root: Any, name: str, entry: Mapping[str, Any], length: int) -> None:
    """Raise Refused for a dataset that differs from its header entry."""
    found = place_of(root, name, entry["dtype"], length, *entry["shape"])
    size = entry["bytes"] if "bytes" in entry else entry["rows"] * entry["row_bytes"]
    differs(f"bytes of {name!r}", found["bytes"], size)
    if size:
        differs(f"the place of {name!r}", found["offset"], entry["offset"])
    if entry.get("sha256"):
        limit_seconds(OPENING_SECONDS + size / (50 << 20))
        differs(f"the sha256 of {name!r}", hash_of(dataset_at(root, name)), entry["sha256"])


def hash_of(dataset: Any) -> str:
    """sha256 over a dataset's bytes, as HDF5 reads them."""
    running, rows = hashlib.sha256(), h5py.Dataset(dataset)
    if not rows.size:
        return running.hexdigest()
    step = max(1, PIECE // max(1, rows.nbytes // rows.shape[0]))
    for start in range(0, rows.shape[0], step):
        running.update(np.ascontiguousarray(rows[start : start + step]).tobytes())
    return running.hexdigest()


def differs(what: str, found: Any, wanted: Any) -> None:
    """Raise Refused where a found value is not the wanted one."""
    if found != wanted:
        raise Refused(f"{what}: {short(found)} in HDF5, {short(wanted)} in the header")


def said_by(check: Any) -> Iterator[str]:
    """The texts of what the checks refuse."""
    try:
        check()
    except Refused as refusal:
        yield str(refusal)
    except FAULTS as error:
        yield fault_of(error)


# The process

FAULTS = (
    OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError, MemoryError, OverflowError,
    NotImplementedError,
)  # fmt: skip
"""Errors that h5py and json raise for foreign bytes. RecursionError is a RuntimeError."""


def fault_of(error: BaseException) -> str:
    """An error of another package as one line."""
    return f"{type(error).__name__}: {(str(error) or 'without a word').splitlines()[0][:200]}"


def short(value: Any) -> str:
    """A value for a message, cut."""
    return ascii(value)[:100]


def answer(parts: list[bytes]) -> None:
    """Write the length of each part, then the parts."""
    out = sys.stdout.buffer
    out.write(" ".join(str(len(part)) for part in parts).encode() + b"\n")
    for part in parts:
        out.write(part)
    out.flush()


def main(kind: str, handle: int) -> None:
    """Make the answer within the limits and write it; where that fails write b"", the refusal and its kind."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # HDF5 would keep Python from seeing it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = os.fstat(handle)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise Refused("it is no regular file")
        request = json.load(sys.stdin) if kind == "agrees" else None
        limit_memory(status.st_size)
        limit_seconds(OPENING_SECONDS)
        with h5py.File(f"/dev/fd/{handle}", "r", locking=False) as file:
            root = h5py.h5g.open(file.id, b"/")
            if request is None:
                parts = list(read_old(root, status))
            else:
                parts = [json.dumps(list(disagreements(root, request, handle))).encode()]
    except Refused as refusal:
        parts = [b"", str(refusal).encode(errors="replace"), refusal.kind.encode()]
    except FAULTS as error:
        parts = [b"", fault_of(error).encode(errors="replace"), b""]
    answer(parts)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
