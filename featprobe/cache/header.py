"""The header of a cache file of version 3: from bytes to a checked index, and back (cache/README.md, *Header*).

It lies in the block at the front of the file that HDF5 skips, so that a cache can be read without HDF5.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featprobe.specs import digest

FILE_VERSION = 3
"""Version of the files that are written, and the newest that is read; not part of any key."""
MAGIC = b"\x89fpcach\n"
FIXED = struct.Struct("<8sII32s")  # magic, version, bytes of the JSON, sha256 over all of these and the JSON
LEAST_BLOCK = 4096  # bytes: the least user block
MOST_JSON = 1 << 20  # bytes
MOST_VALUES = 100_000  # in a JSON without the texts of rows: limits the memory that reading it takes
WIDEST = 10**19  # an offset of more digits than any that a file has


class FormatFault(Exception):
    """A file differs from cache/README.md. wanted, found: short texts for the message of the CacheError."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(f"wanted {wanted}, found {found}")
        self.wanted, self.found = wanted, found


class NewerFormat(FormatFault):
    """A file needs a newer featprobe."""


@dataclass(frozen=True)
class Entry:
    """The place of a part or a table: bytes [offset, offset + size) of the file.

    dtype, shape: type and shape of the array there. sha256: 64 hex digits over a part's bytes; "" for a table, which is
    written later. required: whether a reader that does not know this entry must refuse the file.
    """

    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""
    required: bool = True

    def part(self) -> dict[str, Any]:
        """The JSON of a part in the header."""
        return self._common() | {"bytes": self.size, "sha256": self.sha256}

    def table(self) -> dict[str, Any]:
        """The JSON of a table in the header."""
        return self._common() | {"rows": self.shape[0], "row_bytes": self.size // max(1, self.shape[0])}

    def _common(self) -> dict[str, Any]:
        return {"offset": self.offset, "dtype": self.dtype, "shape": list(self.shape), "required": self.required}


@dataclass(frozen=True)
class Index:
    """The values of a header.

    recipe: as JSON. rows, images: their numbers; images is 0 where each row is an image. block: bytes of the user
    block; 0 for a file of version 1 or 2.
    """

    version: int
    recipe: Mapping[str, Any]
    recipe_key: str
    identity_sha256: str
    rows: int
    images: int
    parts: Mapping[str, Entry]
    tables: Mapping[str, Entry]
    block: int = 0

    @classmethod
    def of(cls, values: Any, version: int) -> "Index":
        """The index in a header's JSON. Raises FormatFault where a field is missing or of another type."""
        if not isinstance(values, dict):
            raise FormatFault("a header that is a JSON object", short(values))
        for name, kind in (("recipe", dict), ("parts", dict), ("tables", dict), ("recipe_key", str)):
            if not isinstance(values.get(name), kind):
                raise FormatFault(f"{name} in the header: {kind.__name__}", short(values.get(name)))
        if not isinstance(values.get("identity_sha256"), str):
            raise FormatFault("identity_sha256 in the header: str", short(values.get("identity_sha256")))
        rows, images, block = (
            _whole(values.get(name, 0), f"{name} in the header") for name in ("rows", "images", "user_block")
        )
        parts = {name: _part(name, entry) for name, entry in values["parts"].items()}
        tables = {name: _table(name, entry) for name, entry in values["tables"].items()}
        said = values["recipe"], values["recipe_key"], values["identity_sha256"]
        return cls(version, *said, rows, images, parts, tables, block)

    def to_json(self) -> dict[str, Any]:
        """The JSON that `of` reads."""
        return {
            "recipe": self.recipe,
            "recipe_key": self.recipe_key,
            "identity_sha256": self.identity_sha256,
            "rows": self.rows,
            "images": self.images,
            "user_block": self.block,
            "parts": {name: entry.part() for name, entry in self.parts.items()},
            "tables": {name: entry.table() for name, entry in self.tables.items()},
        }

    def identity(self) -> str:
        """sha256 over all that is written once but the provenance, so that the same cache made twice has the same."""
        parts = {
            name: [entry.dtype, list(entry.shape), entry.sha256]
            for name, entry in self.parts.items()
            if name != "provenance"
        }
        return digest({"recipe": self.recipe, "rows": self.rows, "images": self.images, "parts": parts})

    def check_places(self, length: int) -> None:
        """Raise FormatFault unless every entry lies between the block and the file's end, and no two overlap."""
        entries = [*(self.parts.items() if self.block else ()), *self.tables.items()]  # older parts have no place
        end, last = self.block, "the header"
        for name, entry in sorted(entries, key=lambda pair: (pair[1].offset, pair[1].size)):
            if entry.size and entry.offset < end:
                raise FormatFault(f"{name!r} behind {last}, from byte {end} on", f"byte {entry.offset}")
            if entry.offset + entry.size > length:
                raise FormatFault(
                    f"{name!r} in bytes {entry.offset} to {entry.offset + entry.size}",
                    f"a file of {length} bytes: it was cut short, or its header is wrong",
                )
            if entry.size:
                end, last = entry.offset + entry.size, repr(name)


def block_for(index: Index) -> int:
    """Bytes of a user block that holds this index, whatever its offsets become: a power of two."""
    entries = [*index.parts.values(), *index.tables.values()]
    wanted = FIXED.size + len(_json(index)) + len(str(WIDEST)) * (len(entries) + 1)
    return max(LEAST_BLOCK, 1 << (wanted - 1).bit_length())


def encode(index: Index) -> bytes:
    """The user block of a file: header, then zeros."""
    said = _json(index)
    if FIXED.size + len(said) > index.block:
        raise ValueError(f"A header of {len(said)} bytes does not fit a block of {index.block}.")
    return (FIXED.pack(MAGIC, FILE_VERSION, len(said), _hash(FILE_VERSION, said)) + said).ljust(index.block, b"\0")


def decode(start: bytes, said: bytes) -> tuple[Index, bool]:
    """The index of a header, and whether its sha256 holds. Raises FormatFault.

    start: the first FIXED.size bytes of the file. said: the JSON after them.
    """
    _, version, _, expected = FIXED.unpack(start)
    index = Index.of(parse_json(said, MOST_VALUES, "the header"), version)
    least = max(LEAST_BLOCK, FIXED.size + len(said))
    if index.block < least or index.block & (index.block - 1):
        raise FormatFault(f"user_block: a power of two of at least {least}", str(index.block))
    return index, _hash(version, said) == expected


def json_bytes(start: bytes) -> int:
    """Bytes of the JSON behind the first FIXED.size bytes of a header. Raises FormatFault, NewerFormat."""
    if len(start) < FIXED.size:
        raise FormatFault(f"a header of at least {FIXED.size} bytes", f"{len(start)} bytes")
    magic, version, size, _ = FIXED.unpack(start)
    if magic != MAGIC or version < FILE_VERSION:
        raise FormatFault(f"a header of version {FILE_VERSION}", short(start[:12]))
    if version > FILE_VERSION:
        raise NewerFormat(f"version {FILE_VERSION} or older", f"version {version}")
    if size > MOST_JSON:
        raise FormatFault(f"a header of at most {MOST_JSON} bytes", f"{size} bytes")
    return size


def parse_json(data: bytes, most: int, what: str) -> Any:
    """The value of a JSON text of at most `most` values, which limits the memory it takes. Raises FormatFault."""
    count = len(data) - len(data.translate(None, b"[{,"))
    if count > most:
        raise FormatFault(f"at most {most} values in {what}", str(count))
    try:
        return json.loads(data.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatFault(f"JSON in {what}", f"{type(error).__name__}: {str(error)[:80]}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value


def _json(index: Index) -> bytes:
    return json.dumps(index.to_json(), separators=(",", ":"), allow_nan=False).encode()


def _hash(version: int, said: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<8sII", MAGIC, version, len(said)) + said).digest()


def _part(name: str, entry: Any) -> Entry:
    offset, shape, dtype, required = _common(name, entry)
    sha256 = entry.get("sha256")
    if not isinstance(sha256, str) or len(sha256) not in (0, 64):
        raise FormatFault(f"64 hex digits as the sha256 of {name!r}", short(sha256))
    return Entry(offset, _whole(entry.get("bytes"), f"the bytes of {name!r}"), dtype, shape, sha256, required)


def _table(name: str, entry: Any) -> Entry:
    offset, shape, dtype, required = _common(name, entry)
    rows, row_bytes = (_whole(entry.get(key), f"the {key} of {name!r}") for key in ("rows", "row_bytes"))
    if not shape or shape[0] != rows:
        raise FormatFault(f"{name!r} of {rows} rows", f"the shape {list(shape)}")
    return Entry(offset, rows * row_bytes, dtype, shape, "", required)


def _common(name: str, entry: Any) -> tuple[int, tuple[int, ...], str, bool]:
    if not isinstance(entry, dict):
        raise FormatFault(f"the place of {name!r} as a JSON object", short(entry))
    shape, dtype, required = entry.get("shape"), entry.get("dtype"), entry.get("required", True)
    if not isinstance(shape, list) or not isinstance(dtype, str) or not isinstance(required, bool):
        raise FormatFault(f"dtype, shape and required of {name!r}", short([dtype, shape, required]))
    sizes = tuple(_whole(size, f"the shape of {name!r}") for size in shape)
    return _whole(entry.get("offset"), f"the offset of {name!r}"), sizes, dtype, required


def _whole(value: Any, what: str) -> int:
    """A whole number from a file, 0 <= value < 2^63. Raises FormatFault for another value."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise FormatFault(f"a whole number from 0 on as {what}", short(value))
    return value


def short(value: Any) -> str:
    """A value for a message, cut."""
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}…"
