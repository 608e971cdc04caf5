"""Tables as sealed Parquet files, and reading those that others may have made.

Of a column every value is of one kind, and may be missing:

    text    (codes, words): int32 (rows,), places among the words, -1 for none; the words, each once
    int     int32 (rows,), >= 0; -1 for none
    float   float32 (rows,); nan for none
    bool    int8 (rows,), 0 or 1; -1 for none
    ints    (values, lengths): int32, those of all rows one after another; int32 (rows,), how many each row has
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.io.disk import parse_json, read_regular
from featprobe.io.parquet_pages import Claims, claims_of

Kind = Literal["text", "int", "float", "bool", "ints"]
Column = Any
"""As the module says: an array, or a pair."""
KEY = b"featprobe"
"""Where in the metadata of a file the JSON lies that says what the table is."""
SEALED, SEAL = b"seal", b"featprobe-seal-"
"""Where in the metadata the seal lies, and how it begins; then comes the sha256 of the file with UNSEALED there."""
UNSEALED = SEAL + b"0" * 64
LARGEST_TEXT = 1 << 24  # bytes of a text in a file's own description
MOST_RARE = 1 << 22  # letters of a column's texts that may be any of Unicode's
MOST_COLUMNS = 1 << 20  # entries of a list in a file's own description
ROOM = 190 << 20
BACKED = 30
"""A table may take as many bytes in memory as its file has and ROOM more, or BACKED times those of its packed columns.
For a million numbers that were measured 7 times are needed, for the names and hashes of a million images 26 times."""
BYTES_OF: Mapping[Kind, int] = {"text": 3, "int": 4, "float": 4, "bool": 2, "ints": 12}
"""Bytes that a value takes while it is read and used."""
WORD, PER_TEXT_BYTE = 80, 6
"""Bytes that a word takes, and each of its bytes, while it is read and used."""


def table_bytes(columns: Mapping[str, tuple[Kind, Column]], about: Mapping[str, Any]) -> bytes:
    """A table as the bytes of a Parquet file. about: what it is, as JSON can hold it; it is kept under KEY."""
    import pyarrow as pa  # it takes time, and most commands need none of it
    import pyarrow.parquet as pq

    arrays = {name: _to_arrow(kind, column) for name, (kind, column) in columns.items()}
    said = {KEY: json.dumps(about, allow_nan=False).encode(), SEALED: UNSEALED}
    table = pa.table(arrays).replace_schema_metadata(said)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", write_statistics=False,
        use_dictionary=[name for name, (kind, _) in columns.items() if kind == "text"],
    )  # fmt: skip
    data = sink.getvalue().to_pybytes()
    return data.replace(UNSEALED, SEAL + hashlib.sha256(data).hexdigest().encode())


def read_table(path: Path, kinds: Mapping[str, Kind], most: int) -> tuple[Any, Mapping[str, Column]]:
    """(what a Parquet file says of itself, its columns of these names), as `table_bytes` has them.

    A column is decoded each time it is asked for, so that memory never holds all. most: bytes that the file may have,
    and that its columns may take in memory. Columns of other names are not read. Raises FileKindError, OSError, and
    ValueError, saying what is wrong with the file; the columns raise ValueError.
    """
    data = read_regular(path, most)
    _check_seal(data)
    claims = claims_of(data, kinds)
    _check_room(claims, kinds, min(most, max(len(data) + ROOM, BACKED * claims.packed)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _refusing():
        file = pq.ParquetFile(
            pa.BufferReader(data), read_dictionary=[name for name, kind in kinds.items() if kind == "text"],
            thrift_string_size_limit=LARGEST_TEXT,
            thrift_container_size_limit=MOST_COLUMNS,
        )  # fmt: skip
        about = (file.metadata.metadata or {}).get(KEY)
        if about is None:
            raise ValueError("it does not say what it holds")
        said = parse_json(about)
        _check_types(file.schema_arrow, kinds)
    return said, _Columns(file, kinds)


class _Columns(Mapping[str, Column]):
    """The columns of a file, each decoded when it is asked for."""

    def __init__(self, file: Any, kinds: Mapping[str, Kind]) -> None:
        self._file, self._kinds = file, kinds

    def __getitem__(self, name: str) -> Column:
        kind = self._kinds[name]
        with _refusing():
            table = self._file.read(columns=[name], use_threads=False).unify_dictionaries()
            table.validate(full=True)
            return _from_arrow(kind, table.column(0).combine_chunks())

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


@contextmanager
def _refusing() -> Iterator[None]:
    """What pyarrow raises for a bad file becomes a ValueError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, OverflowError, MemoryError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _to_arrow(kind: Kind, column: Column) -> Any:
    """An array of Arrow from its own bytes: what makes one from values loads pandas, which takes time."""
    import pyarrow as pa

    match kind:
        case "text":
            codes, words = column
            texts = [word.encode() for word in words]
            ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
            known = pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
            return pa.DictionaryArray.from_arrays(_numbers(pa.int32(), codes, codes < 0), known)
        case "int":
            return _numbers(pa.int32(), column.astype(np.int32), column < 0)
        case "float":
            return _numbers(pa.float32(), column.astype(np.float32), np.isnan(column))
        case "bool":
            return _numbers(pa.bool_(), np.packbits(column == 1, bitorder="little"), column < 0)
        case "ints":
            values, lengths = column
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            found = _numbers(pa.int32(), values.astype(np.int32), np.zeros(len(values), bool))
            return pa.ListArray.from_arrays(_numbers(pa.int32(), ends, np.zeros(len(ends), bool)), found)


def _numbers(of: Any, values: NDArray[Any], missing: NDArray[np.bool_]) -> Any:
    """An array of one type from the bytes of its values. missing: (rows,)."""
    import pyarrow as pa

    there = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    return pa.Array.from_buffers(of, len(missing), [there, pa.py_buffer(np.ascontiguousarray(values))])


def _from_arrow(kind: Kind, array: Any) -> Column:
    import pyarrow.compute as pc

    match kind:
        case "text":
            _check_letters(array.dictionary)
            codes = pc.fill_null(array.indices, -1).to_numpy(zero_copy_only=False)
            return codes.astype(np.int32, copy=False), tuple(array.dictionary.to_pylist())
        case "int":
            _check_least(found := pc.fill_null(array, -1).to_numpy(zero_copy_only=False))
            return found
        case "float":
            return pc.fill_null(array, float("nan")).to_numpy(zero_copy_only=False)
        case "bool":
            return pc.fill_null(array.cast("int8"), -1).to_numpy(zero_copy_only=False)
        case "ints":
            if array.null_count or array.flatten().null_count:
                raise ValueError("a list, or a number in one, is missing")
            values = array.flatten().to_numpy(zero_copy_only=False)
            return values, array.value_lengths().to_numpy(zero_copy_only=False)


def _check_letters(words: Any) -> None:
    """Raise ValueError for words that take far more memory than their bytes: one rare letter makes all take four."""
    import pyarrow.compute as pc

    held = words.buffers()[2]
    rare = held is not None and bool((np.frombuffer(held, np.uint8) >= 0xF0).any())  # where UTF-8 needs four bytes
    if rare and pc.sum(pc.utf8_length(words)).as_py() > MOST_RARE:
        raise ValueError(f"it has texts of more than {MOST_RARE} letters, with rare ones among them")


def _check_least(values: NDArray[np.int32]) -> None:
    if len(values) and values.min() < -1:
        raise ValueError(f"a whole number is {values.min()}, and none may be negative")


def _check_types(schema: Any, kinds: Mapping[str, Kind]) -> None:
    """Raise ValueError, with all faults, where columns are missing or of other types."""
    import pyarrow as pa

    wanted = {
        "text": pa.dictionary(pa.int32(), pa.string()), "int": pa.int32(), "float": pa.float32(), "bool": pa.bool_(),
    }  # fmt: skip
    faults = []
    for name, kind in kinds.items():
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            faults.append(f"{name}: {'it is missing' if not places else 'it is there more than once'}")
            continue
        found = schema.field(places[0]).type
        fits = pa.types.is_list(found) and found.value_type == pa.int32() if kind == "ints" else found == wanted[kind]
        faults += [] if fits else [f"{name}: wanted {kind}, found {str(found)[:60]}"]
    if faults:
        raise ValueError("; ".join(faults))


def _check_seal(data: bytes) -> None:
    """Raise ValueError for other bytes than were written: pyarrow ends the process on some damaged footers."""
    found = [*islice(re.finditer(re.escape(SEAL) + b"([0-9a-f]{64})", data), 2)]
    if len(found) != 1:
        raise ValueError("it is cut, or no table that featprobe wrote")
    begin, end = found[0].span()
    whole = memoryview(data)
    running = hashlib.sha256(whole[:begin])
    running.update(UNSEALED)
    running.update(whole[end:])
    if running.hexdigest().encode() != found[0][1]:
        raise ValueError("it is not as it was written")


def _check_room(claims: Claims, kinds: Mapping[str, Kind], room: int) -> None:
    """Raise ValueError where a table takes more memory than there is room for."""
    wanted = claims.rows * sum(BYTES_OF[kind] for kind in kinds.values()) + claims.listed * BYTES_OF["ints"]
    wanted += claims.words * WORD + claims.text_bytes * PER_TEXT_BYTE + 2 * claims.page
    if wanted > room:
        raise ValueError(f"it claims {wanted} bytes in memory, and {room} are left for it")
