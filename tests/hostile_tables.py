"""Tables of records that are sealed as they should be, and built byte by byte to take memory, time, or the process.

    python hostile_tables.py FOLDER

makes each in FOLDER, reads it as `featprobe inspect` does, and prints a line of JSON for each: its name, how it ended,
the bytes of memory that it took beyond those in use before, and the seconds of processor time.
"""

import hashlib
import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401  pyarrow loads it when it reads: here, and not in the process of each table
import pyarrow as pa
import pyarrow.parquet

from featprobe.errors import ProbeError
from featprobe.io.parquet import KEY, SEAL, SEALED, UNSEALED
from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    NOTHING,
    TOUCHES,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
)
from featprobe.stages.recording.record_file import COLUMNS, RECORDS, read_records, record_bytes

BOOL, BYTE, I32, I64, BINARY, LIST, STRUCT = 1, 3, 5, 6, 8, 9, 12
"""Types of Thrift's compact protocol."""
TYPE = {"text": 6, "int": 1, "float": 4, "bool": 0, "ints": 1}
ZSTD, GZIP = 6, 2
PLAIN, RLE, DELTA, DICTIONARY = 0, 3, 5, 8
HEAD = "0" * 64
ALLOWED = 192 << 20  # bytes of memory that reading may take, beside twice the file: 256 MiB less those of pandas
FUSE = 6 << 30  # bytes of memory at which a reader without limits ends, before the machine does
ABOUT = json.dumps(
    {
        "format": "featprobe-records", "version": 1, "task": "semseg", "head": "linear", "head_sha256": HEAD,
        "classes": ["background", "crack"], "rule": {"iou": None, "same_class": False}, "base": 0.5,
        "base_from": "validation", "parts": True, "pooled": False,
    }
).encode()  # fmt: skip


# ---- Thrift ----------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encoded(kind: int, value: Any) -> bytes:
    """A value: an int, bytes, a list as (type, values), or a struct as {number: (type, value)}.

    A number is a float, as 3.5, for a field that is there a second time.
    """
    if kind == BYTE:
        return bytes([value])
    if kind in (I32, I64):
        return varint((value << 1) ^ (value >> 63))
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == LIST:
        inner, items = value
        known = {id(item): encoded(inner, item) for item in {id(item): item for item in items}.values()}
        return bytes([0xF0 | inner]) + varint(len(items)) + b"".join(known[id(item)] for item in items)
    out, last = b"", 0
    for number in sorted(value):
        inner, own = value[number]
        step, last = int(number) - last, int(number)
        kind = inner if inner != BOOL else 1 if own else 2
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + encoded(I32, last)
        out += b"" if inner == BOOL else encoded(inner, own)
    return out + b"\0"


def i32(value: int) -> tuple[int, int]:
    return I32, value


def i64(value: int) -> tuple[int, int]:
    return I64, value


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """A page. claimed: bytes that its header says it unpacks to, if others than `body` has. more: of its header."""

    body: bytes
    values: int
    encoding: int = PLAIN
    dictionary: bool = False
    claimed: int = -1
    more: Mapping[float, Any] = field(default_factory=dict)

    def bytes(self, codec: str = "zstd") -> bytes:
        level = 1 if codec == "gzip" else None  # the fastest
        packed = pa.Codec(codec, level).compress(self.body, asbytes=True) if self.body else b""
        said = {1: i32(self.values), 2: i32(self.encoding)}
        own: dict[float, Any] = {1: i32(2 if self.dictionary else 0)}
        own |= {2: i32(len(self.body) if self.claimed < 0 else self.claimed), 3: i32(len(packed))}
        own |= {7: (STRUCT, said)} if self.dictionary else {5: (STRUCT, said | {3: i32(RLE), 4: i32(RLE)})}
        return encoded(STRUCT, {**own, **self.more}) + packed


@dataclass
class Table:
    """What is written. groups: rows of each; all but `spoilt` columns hold no value in any row.

    spoilt: pages, in each group, by the name of a column. shared: whether all groups mean the same bytes. chunk: more
    fields of a column's description. schema: elements in place of those of the table. about: what it says of itself.
    """

    groups: list[int]
    spoilt: Mapping[str, list[Page]] = field(default_factory=dict)
    shared: bool = False
    codec: tuple[int, str] = (ZSTD, "zstd")
    chunk: Mapping[float, Any] = field(default_factory=dict)
    schema: list[dict[int, Any]] | None = None
    about: bytes = ABOUT
    listed: int = -1


def nothing(kind: str, rows: int) -> Page:
    """A page without a value in any row."""
    levels = varint(rows << 1) + b"\0"
    body = struct.pack("<I", len(levels)) + levels
    return Page(body * 2 if kind == "ints" else body, rows)


def present(rows: int, levels: int = 1) -> bytes:
    """Definition levels of rows that all have a value."""
    run = varint(rows << 1) + bytes([levels])
    return struct.pack("<I", len(run)) + run


def written(table: Table) -> bytes:
    """The bytes of a table, with its seal."""
    out = bytearray(b"PAR1")
    groups: list[Any] = []
    for number, rows in enumerate(table.groups):
        if number and table.shared:
            groups.append(groups[0])
            continue
        chunks = [_chunk(out, table, name, rows) for name in COLUMNS]
        groups.append({1: (LIST, (STRUCT, chunks)), 2: i64(len(out)), 3: i64(rows)})
    said = [{1: (BINARY, key), 2: (BINARY, value)} for key, value in ((KEY, table.about), (SEALED, UNSEALED))]
    footer = encoded(STRUCT, {
        1: i32(2), 2: (LIST, (STRUCT, table.schema or schema())), 3: i64(sum(table.groups)),
        4: (LIST, (STRUCT, groups)), 5: (LIST, (STRUCT, said)),
    })  # fmt: skip
    data = bytes(out) + footer + struct.pack("<I", len(footer)) + b"PAR1"
    return data.replace(UNSEALED, SEAL + hashlib.sha256(data).hexdigest().encode())


def _chunk(out: bytearray, table: Table, name: str, rows: int) -> dict[int, Any]:
    kind = COLUMNS[name]
    pages = table.spoilt.get(name) or [nothing(kind, rows)]
    start = len(out)
    made = {id(page): page.bytes(table.codec[1]) for page in {id(page): page for page in pages}.values()}
    written = [made[id(page)] for page in pages]
    out += b"".join(written)
    path = [b"finds", b"list", b"element"] if kind == "ints" else [name.encode()]
    values = table.listed if kind == "ints" and table.listed >= 0 else rows
    own: dict[float, Any] = {
        1: i32(TYPE[kind]), 2: (LIST, (I32, sorted({RLE, *(page.encoding for page in pages)}))),
        3: (LIST, (BINARY, path)), 4: i32(table.codec[0]), 5: i64(values),
        6: i64(sum(len(page.body) for page in pages)), 7: i64(len(out) - start), 9: i64(start),
    }  # fmt: skip
    own |= {11: i64(start), 9: i64(start + len(written[0]))} if pages[0].dictionary else {}
    own |= table.chunk
    return {2: i64(start), 3: (STRUCT, own)}


def schema() -> list[dict[int, Any]]:
    """The elements of the schema of records."""
    found: list[dict[int, Any]] = [{4: (BINARY, b"schema"), 5: i32(len(COLUMNS))}]
    for name, kind in COLUMNS.items():
        if kind == "ints":
            found.append({3: i32(1), 4: (BINARY, name.encode()), 5: i32(1), 6: i32(3)})
            found.append({3: i32(2), 4: (BINARY, b"list"), 5: i32(1)})
            found.append({1: i32(1), 3: i32(1), 4: (BINARY, b"element")})
        else:
            text = {6: i32(0)} if kind == "text" else {}
            found.append({1: i32(TYPE[kind]), 3: i32(1), 4: (BINARY, name.encode()), **text})
    return found


# ---- what is hostile -------------------------------------------------------------------------------------------------

MANY = 5_000_000
CODES = present(1) + b"\1" + b"\2\0"  # one value: of a width of a bit, a run of one, the first word


def _words(count: int) -> list[Page]:
    return [Page(bytes(4 * count), count, PLAIN, dictionary=True), Page(CODES, 1, DICTIONARY)]


def _listed(count: int) -> list[Page]:
    repeated = b"\2\0" + varint((count - 1) << 1) + b"\1"
    return [Page(struct.pack("<I", len(repeated)) + repeated + present(count, 3) + bytes(4 * count), count)]


def _one(more: Mapping[float, Any], unpacked: int = 1 << 29) -> Table:
    """One empty text in a page of many bytes, whose header first claims few, and then says more."""
    return Table([1], {"record": [Page((present(1) + bytes(4)).ljust(unpacked, b"\0"), 1, claimed=16, more=more)]})


def _deep() -> Table:
    level = {4: (BINARY, b"a"), 5: i32(1)}
    return Table([1], schema=[*schema()[:-1], *[level] * 20_000, {1: i32(1), 4: (BINARY, b"a")}])


HOSTILE: Mapping[str, Callable[[], Table]] = {
    "rows that no byte stands for": lambda: Table([MANY]),
    "groups that share their bytes": lambda: Table([MANY // 100] * 100, shared=True),
    "a dictionary of 64 million empty words": lambda: Table([1], {"image": _words(1 << 26)}),
    "a word of half a gigabyte": lambda: Table(
        [1], {"file": [Page(present(1) + struct.pack("<I", 1 << 29) + bytes(1 << 29), 1)]}
    ),
    "a list of 100 million numbers": lambda: Table([1], {"finds": _listed(100_000_000)}, listed=100_000_000),
    "a page of zeros": lambda: Table([1 << 26], {"score": [Page(present(1 << 26) + bytes(4 << 26), 1 << 26)]}),
    "a page that claims two gigabytes": lambda: Table(
        [1], {"score": [Page(present(1) + bytes(4), 1, claimed=(1 << 31) - 1)]}
    ),
    "250,000 pages": lambda: Table([1], {"x1": [*[Page(b"", 0)] * 250_000, nothing("float", 1)]}),
    "differences of no width": lambda: Table(
        [MANY], {"number": [Page(present(MANY) + b"\x80\1\4" + varint(MANY) + b"\0" * 20_000, MANY, DELTA)]}
    ),
    "a page that claims half a gigabyte the second time": lambda: _one({2.5: i32(1 << 29)}, 16),
    "a page that claims it by a number that overflows": lambda: _one({2 + (1 << 16): i32(1 << 29)}),
    "a page whose size is of another type": lambda: _one({2: i64(1 << 29)}, 16),
    "a list of another type than its reader takes it for": lambda: Table([1], chunk={2: (LIST, (BYTE, [0x95] * 20))}),
    "gzip": lambda: Table([1], {"file": [Page(present(1) + bytes(1 << 28), 1)]}, codec=(GZIP, "gzip")),
    "columns before the file": lambda: Table([1], chunk={9: i64(-(1 << 40))}),
    "columns behind the file": lambda: Table([1], chunk={7: i64(1 << 40)}),
    "columns in another file": lambda: Table([1], chunk={3: (LIST, (BINARY, [b"../secret"]))}),
    "columns that are nested deeply": _deep,
    "50,000 groups of nothing": lambda: Table([0] * 50_000, shared=True),
    "a description of a million lists": lambda: Table([1], about=b'{"a": [' + b"[]," * 1_000_000 + b"1]}"),
}
"""Each must be refused in words."""


def records(names: Sequence[str], calls: int = 0, defects: int = 0, *, measured: bool = False) -> bytes:
    """A table that is as it should be, of images with these names, and calls and defects in the last of them.

    Each call finds each defect. measured: names have hashes, and calls have sizes, that hardly pack.
    """
    images, rng = len(names), np.random.default_rng(0)
    of_call, of_defect = (np.full(own, images - 1) for own in (calls, defects))
    unknown = np.full((images, 2), np.nan, np.float32)
    good = np.full(images, GOOD, np.uint8)
    good[of_defect] = DEFECT
    drawn = rng.bytes(16 * images).hex()
    hashes = tuple(drawn[32 * i : 32 * i + 32] for i in range(images)) if measured else ("0" * 32,) * images
    files = tuple(f"images/{name}.png" for name in names) if measured else ("file",) * images
    whole = Images(
        tuple(names), tuple(name[:12] for name in names) if measured else ("group",) * images, ("test",) * images,
        files, hashes, good, unknown[:, 0], unknown, np.ones((images, 2), np.intp),
    )  # fmt: skip

    def objects(count: int) -> tuple[Any, ...]:
        sizes = rng.random((3, count, 4), np.float32) if measured else np.zeros((3, count, 4), np.float32)
        return np.zeros(count, np.uint8), *sizes, np.zeros(count, np.float32)

    own = Defects(of_defect, *objects(defects), np.zeros(defects, np.float32), np.zeros(defects, bool))
    about = About("semseg", "linear", HEAD, ("background", "crack"), FoundRule(), 0.5, "validation", parts=True)
    pairs = np.stack(np.divmod(np.arange(calls * defects), max(1, defects)), axis=1)
    touched = np.full(calls, TOUCHES if defects else NOTHING, np.uint8)
    return record_bytes(Records(about, whole, own, Calls(of_call, *objects(calls), touched), pairs))


def _names(count: int) -> list[str]:
    return [f"line2/part{i // 5:06}/view{i % 5}" for i in range(count)]


LARGEST: Mapping[str, Callable[[], bytes]] = {
    "small": lambda: records(["a", "b"], 100),
    "as many rows as there is room for": lambda: records(["a"], 1_600_000),
    "as long a word of other letters": lambda: records(["\u0101" + "a" * (22 << 20)]),  # two bytes a letter
    "as many words as there is room for": lambda: records([f"{i:06}" for i in range(550_000)]),
    "as long a word of rare letters": lambda: records(["\U0001f9f1" + "a" * (22 << 20)]),  # four bytes a letter
    "as many names and hashes as there is room for": lambda: records(_names(290_000), measured=True),
    "as many finds as there is room for": lambda: records(["a"], 5_000, 1_100),
    "calls that hardly pack": lambda: records(["a"], 500_000, measured=True),
}
"""Each is sound, must be read, and may take no more memory than others."""
TOO_LARGE: Mapping[str, Callable[[], bytes]] = {
    "more rows": lambda: records(["a"], 1_800_000),
    "more words": lambda: records([f"{i:06}" for i in range(700_000)]),
}
"""Each is sound, but would take more memory than others may, and must be refused."""


# ---- reading under watch ---------------------------------------------------------------------------------------------


def used(name: str) -> int:
    """VmRSS, the memory that this process uses, or VmHWM, the most since it was last forgotten, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(name)


def taken(folder: Path) -> tuple[str, int, float]:
    """How reading the records in a folder ends, the memory that it takes, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the most
    before, begun = used("VmRSS"), time.process_time()
    try:
        read_records(folder, HEAD)
        ended = "read"
    except ProbeError as error:
        ended = f"refused: {str(error).splitlines()[1].strip()}"
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"[:200]
    return ended, used("VmHWM") - before, time.process_time() - begun


def apart(work: Callable[[], Any]) -> Any:
    """What work gives, as JSON holds it, in a process of its own: memory that it leaves would hide what others take."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as stream:
        said = stream.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else [f"its process ended with {ended}", 0, 0.0]


def main(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (FUSE, FUSE))
    tables = {name: lambda own=own: written(own()) for name, own in HOSTILE.items()}
    for name, made in {**LARGEST, **TOO_LARGE, **tables}.items():
        path = folder / name / RECORDS
        path.parent.mkdir(parents=True, exist_ok=True)
        apart(lambda path=path, made=made: path.write_bytes(made()))
        print(json.dumps([name, path.stat().st_size, *apart(lambda path=path: taken(path.parent))]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
