"""Tables as sealed Parquet files, and reading those that others may have made.

Of a column every value is of one kind, and may be missing:

    text    (codes, words): int32 (rows,), places among the words, -1 for none; the words, each once where they
            are written, and `Texts` where they were read
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
from featprobe.io.packed_texts import Texts
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
LONGEST_WORD = 1 << 25  # bytes of a text in a column: a letter takes up to four when it is looked at
MOST_COLUMNS = 1 << 20  # entries of a list in a file's own description
ROOM = 190 << 20
"""A table may take as many bytes in memory as its file has and ROOM more, beside the file itself. pyarrow's code takes
what is left of 256 MB."""
BYTES_OF: Mapping[Kind, int] = {"text": 2, "int": 4, "float": 3, "bool": 2, "ints": 8}
"""Bytes that a value takes while its column is read, and those that are read already are used."""
LISTED = 32  # bytes that a number in a list takes
WORD, PER_TEXT_BYTE = 60, 7
"""Bytes that a word and each of its bytes take while pyarrow decodes its column, beside a table of hashes."""


def table_bytes(columns: Mapping[str, tuple[Kind, Column]], about: Mapping[str, Any]) -> bytes:
    """A table as the bytes of a Parquet file. about: what it is, as JSON can hold it; it is kept under KEY."""
    import pyarrow as pa  # it takes time, and most commands need none of it
    import pyarrow.parquet as pq

    said = {KEY: json.dumps(about, allow_nan=False).encode(), SEALED: UNSEALED}
    table = pa.table({name: _to_arrow(kind, column) for name, (kind, column) in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(said), sink, compression="zstd", write_statistics=False,
        use_dictionary=[name for name, (kind, _) in columns.items() if kind == "text"],
    )  # fmt: skip
    del table
    data = memoryview(sink.getvalue())
    place = next(re.finditer(re.escape(UNSEALED), data)).start()
    seal = SEAL + hashlib.sha256(data).hexdigest().encode()
    return b"".join([data[:place], seal, data[place + len(seal) :]])


def read_table(path: Path, kinds: Mapping[str, Kind], most: int) -> tuple[Any, Mapping[str, Column]]:
    """(what a Parquet file says of itself, its columns of these names), as `table_bytes` has them.

    A column is decoded each time it is asked for, so that memory never holds all. most: bytes that the file may have,
    and that its columns may take in memory. Columns of other names are not read. Raises FileKindError, OSError, and
    ValueError, saying what is wrong with the file; the columns raise ValueError.
    """
    data = read_regular(path, most)
    _check_seal(data)
    claims = claims_of(data, kinds)
    _check_room(claims, kinds, min(most, len(data) + ROOM))
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
        import pyarrow as pa

        kind = self._kinds[name]
        with _refusing():
            found = self._decoded(kind, name)
        pa.default_memory_pool().release_unused()  # which would stay beside the columns that follow
        return found

    def _decoded(self, kind: Kind, name: str) -> Column:
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
            return _own(pc.fill_null(array.indices, -1).cast("int32")), _words(array.dictionary)
        case "int":
            _check_least(found := _own(pc.fill_null(array, -1)))
            return found
        case "float":
            return _own(pc.fill_null(array, float("nan")))
        case "bool":
            return _own(pc.fill_null(array.cast("int8"), -1))
        case "ints":
            if array.null_count or array.flatten().null_count:
                raise ValueError("a list, or a number in one, is missing")
            return _own(array.flatten()), _own(array.value_lengths())


def _own(array: Any) -> NDArray[Any]:
    """The values of an array in memory of their own, so that nothing of pyarrow's is held by them."""
    return np.array(array.to_numpy(zero_copy_only=False))


def _words(array: Any) -> Texts:
    """The words of a column. Raises ValueError for one that is missing or longer than LONGEST_WORD."""
    if array.null_count:
        raise ValueError("a word of a column is missing")
    if not len(array):
        return Texts(())
    _, held, data = array.buffers()
    ends = np.frombuffer(held, np.int32)[array.offset : array.offset + len(array) + 1]
    begin, end = int(ends[0]), int(ends[-1])
    words = Texts.of_bytes(bytes(memoryview(data)[begin:end]) if data else b"", ends - begin)
    if words.longest > LONGEST_WORD:
        raise ValueError(f"it has a text of {words.longest} bytes, and at most {LONGEST_WORD} are taken")
    return words


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
    wanted = claims.rows * sum(BYTES_OF[kind] for kind in kinds.values()) + claims.listed * LISTED + 2 * claims.page
    wanted += sum(size for _, size in claims.texts)  # which are kept
    wanted += max((_hashed(words) + words * WORD + size * PER_TEXT_BYTE for words, size in claims.texts), default=0)
    if wanted > room:
        raise ValueError(f"it claims {wanted} bytes in memory, and {room} are left for it")


def _hashed(words: int) -> int:
    """Bytes of the table in which pyarrow looks words up, with the one that it grew from by four."""
    places = 32
    while places < 2 * words:
        places *= 4
    return 20 * places
