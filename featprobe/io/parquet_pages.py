"""What the pages of a Parquet file claim, before a reader takes memory for them or trusts a number in them.

A footer and the headers of pages are structs of Thrift's compact protocol. They are read here with limits, and only the
pages are taken that `featprobe.io.parquet` writes. So the library that decodes them never sees other claims: it takes
gigabytes for some, and ends the process on others. Nothing is taken that the library would read as something else: a
field twice, a number that is too long for it, a value of another type.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MAGIC = b"PAR1"
MOST_FOOTER = 1 << 20  # bytes
MOST_VALUES = 100_000  # of a footer
DEEPEST = 12  # structs and lists within each other
LARGEST_PAGE = 1 << 28  # bytes, unpacked
ROWS_PER_GROUP, VALUES_PER_PAGE, FIRST_PAGES = 1 << 16, 1 << 10, 16
"""A file has at most one group for so many rows, and a column of a group a page for so many values, and a few more."""
BOOLEAN, INT32, FLOAT, BYTE_ARRAY = 0, 1, 4, 6
PHYSICAL: Mapping[str, int] = {"text": BYTE_ARRAY, "int": INT32, "float": FLOAT, "bool": BOOLEAN, "ints": INT32}
ZSTD = 6
PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
DATA_PAGE, DICTIONARY_PAGE = 0, 2
Path = tuple[int, ...]
"""The numbers of the fields that lead to a value; those of a list's values are the list's."""
_I32, _I64, _BINARY, _STRUCT = 5, 6, 8, 12
_COLUMN = (4, 1, 3)  # of a footer: groups, columns of a group, about it
FOOTER: Mapping[Path, int] = {
    (2, 1): _I32, (2, 4): _BINARY, (2, 5): _I32, (3,): _I64, (4, 3): _I64, _COLUMN: _STRUCT,
    **dict.fromkeys([(*_COLUMN, 1), (*_COLUMN, 4)], _I32),
    **dict.fromkeys([(*_COLUMN, 5), (*_COLUMN, 7), (*_COLUMN, 9), (*_COLUMN, 11)], _I64),
}  # fmt: skip
PAGE: Mapping[Path, int] = {
    **dict.fromkeys([(1,), (2,), (3,), (5, 1), (5, 2), (5, 3), (5, 4), (7, 1), (7, 2)], _I32),
    (5,): _STRUCT, (7,): _STRUCT,
}  # fmt: skip
"""Thrift's types of the fields that are used. A reader passes over one of another type as if it were not there."""
LISTS: Mapping[Path, int] = {
    **dict.fromkeys([(2,), (4,), (5,), (7,), (4, 1), (4, 4), (*_COLUMN, 8), (*_COLUMN, 13)], _STRUCT),
    (*_COLUMN, 2): _I32, (*_COLUMN, 3): _BINARY, (*_COLUMN, 16, 2): _I64, (*_COLUMN, 16, 3): _I64,
}  # fmt: skip
"""Lists of a footer, and the type of their values, which a reader takes for granted."""
MOST_FIELDS = 1 << 15  # numbers of fields have 16 bits: greater ones would mean others


@dataclass(frozen=True)
class Claims:
    """What a file claims to hold in the wanted columns.

    rows: of the table. listed: numbers in lists. texts: of each column of texts how many are written out, and their
    bytes, unpacked. page: bytes of the largest page of other columns, unpacked. packed: bytes of the file that the
    columns take.
    """

    rows: int
    listed: int
    texts: tuple[tuple[int, int], ...]
    page: int
    packed: int


class _Pages(NamedTuple):
    """The pages of a column of a group."""

    values: int
    words: int
    unpacked: int
    largest: int


def claims_of(data: bytes, kinds: Mapping[str, str]) -> Claims:
    """What a file claims of the columns of these names; kinds as `featprobe.io.parquet` has them.

    Raises ValueError where it is not built as `featprobe.io.parquet` builds files, saying what is not.
    """
    try:
        return _claims(data, kinds)
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its footer can't be read: {type(error).__name__}: {str(error)[:100]}") from error


def _claims(data: bytes, kinds: Mapping[str, str]) -> Claims:
    end = len(data) - 8
    size = int.from_bytes(data[-8:-4], "little")
    if end < 4 or data[:4] != MAGIC or data[-4:] != MAGIC or not 0 < size <= min(end - 4, MOST_FOOTER):
        raise ValueError("its footer is missing, or too long")
    end -= size
    said = Reader(data, end, end + size, FOOTER, LISTS).struct()
    rows, groups = _whole(said[3]), said.get(4, [])
    if 8 in said or 9 in said:
        raise ValueError("it is encrypted")
    if len(groups) > 1 + rows // ROWS_PER_GROUP or rows != sum(_whole(group[3]) for group in groups):
        raise ValueError("its groups have other rows than it claims")
    leaves = _leaves(said[2])
    held: dict[str, list[_Pages]] = {name: [] for name in kinds}
    packed = 0
    for group in groups:
        if len(group[1]) != len(leaves):
            raise ValueError("a group has other columns than the table")
        for (path, physical), chunk in zip(leaves, group[1], strict=True):
            if (name := path[0].decode(errors="replace")) in kinds:
                kind = kinds[name]
                about = _checked(chunk, path, physical, kind)
                packed += _whole(about[7])
                pages = _pages(data, about, end, kind)
                fits = pages.values >= group[3] if kind == "ints" else pages.values == group[3]
                if pages.values != about[5] or not fits:
                    raise ValueError(f"{name}: it has other rows than the table")
                held[name].append(pages)
    if packed > len(data):
        raise ValueError("its columns share bytes")
    return Claims(
        rows=rows,
        listed=sum(own.values for name, every in held.items() if kinds[name] == "ints" for own in every),
        texts=tuple(
            (sum(own.words for own in every), sum(own.unpacked for own in every))
            for name, every in held.items()
            if kinds[name] == "text"
        ),
        page=max((own.largest for name, every in held.items() if kinds[name] != "text" for own in every), default=0),
        packed=packed,
    )


def _leaves(schema: Sequence[Any]) -> list[tuple[tuple[bytes, ...], int]]:
    """Path and physical type of each column, from the elements of a schema, which come depth first."""
    found: list[tuple[tuple[bytes, ...], int]] = []
    places = iter(schema)

    def walk(above: tuple[bytes, ...], count: int) -> None:
        if len(above) > DEEPEST:
            raise ValueError("its columns are nested too deeply")
        for _ in range(count):
            element = next(places, None)
            if element is None:
                raise ValueError("its schema is cut")
            path = (*above, element[4])
            if element.get(5):
                walk(path, _whole(element[5]))
            else:
                found.append((path, element[1]))

    root = next(places, None)
    if root is None:
        raise ValueError("it has no schema")
    walk((), _whole(root.get(5, 0)))
    return found


def _checked(chunk: Mapping[int, Any], path: Sequence[bytes], physical: int, kind: str) -> dict[int, Any]:
    """What a footer says of a column of a group. Raises ValueError where featprobe writes no such column."""
    about: dict[int, Any] = chunk[3]
    name = path[0].decode(errors="replace")
    if 1 in chunk or 8 in chunk:
        raise ValueError(f"{name}: its bytes lie in another file, or are encrypted")
    if list(about[3]) != list(path) or not about[1] == physical == PHYSICAL[kind]:
        raise ValueError(f"{name}: wanted {kind}, found another type")
    if about[4] != ZSTD:
        raise ValueError(f"{name}: it is packed in another way than zstd")
    return about


def _pages(data: bytes, about: Mapping[int, Any], end: int, kind: str) -> _Pages:
    """The pages of a column of a group, which lie one after another. end: where the footer begins."""
    places = [place for place in (_whole(about[9]), _whole(about.get(11, 0))) if place]
    if not places:  # of no rows
        return _Pages(0, 0, 0, 0)
    start = min(places)
    stop = start + _whole(about[7])
    if start < 4 or stop > end:
        raise ValueError("a column lies outside of it")
    most = FIRST_PAGES + _whole(about[5]) // VALUES_PER_PAGE
    values = words = unpacked = largest = 0
    for number, (header, place) in enumerate(_headers(data, start, stop)):
        size, counted, dictionary, encoding = _page(header)
        if number >= most:
            raise ValueError("a column is cut into too many pages")
        if size > LARGEST_PAGE:
            raise ValueError(f"a page claims {size} bytes")
        if dictionary and (number > 0 or kind != "text" or counted * 4 > size):
            raise ValueError("a column has other dictionaries than featprobe writes")
        if place > stop:
            raise ValueError("a page ends behind its column")
        values += 0 if dictionary else counted
        if dictionary or encoding == PLAIN:
            words += min(counted, size // 4)  # each has its length before it; those that are missing have nothing
        unpacked, largest = unpacked + size, max(largest, size)
    return _Pages(values, words, unpacked, largest)


def _headers(data: bytes, start: int, stop: int) -> Iterator[tuple[dict[int, Any], int]]:
    """The header of each page, and where the page ends."""
    while start < stop:
        reader = Reader(data, start, stop, PAGE)
        header = reader.struct()
        start = reader.place + _whole(header[3])
        yield header, start


def _page(header: Mapping[int, Any]) -> tuple[int, int, bool, int]:
    """Of a page: its bytes, unpacked; its values; whether it is a dictionary; the encoding of its values."""
    if header[1] not in (DATA_PAGE, DICTIONARY_PAGE):
        raise ValueError("a page is of another kind than featprobe writes")
    dictionary = header[1] == DICTIONARY_PAGE
    own = header[7 if dictionary else 5]
    known = (PLAIN, PLAIN_DICTIONARY) if dictionary else (PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY)
    if own[2] not in known or (not dictionary and {own[3], own[4]} != {RLE}):
        raise ValueError("a page is encoded in another way than featprobe does")
    return _whole(header[2]), _whole(own[1]), dictionary, own[2]


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a size or a count is {str(value)[:30]}")
    return value


class Reader:
    """Reads values of Thrift's compact protocol between two places of some bytes. Raises ValueError for all others.

    types: of fields, where another is refused. lists: all that there may be, with the types of their values.
    """

    def __init__(
        self, data: bytes, place: int, stop: int, types: Mapping[Path, int], lists: Mapping[Path, int] | None = None
    ) -> None:
        self.data, self.place, self.stop, self.left = data, place, stop, MOST_VALUES
        self.types, self.lists = types, lists or {}

    def struct(self, path: Path = ()) -> dict[int, Any]:
        """The fields of a struct by their numbers."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            own = (*path, number)
            if number in found or not 0 < number < MOST_FIELDS or self.types.get(own, head & 15) != head & 15:
                raise ValueError("a field in its footer, or in the header of a page, is there twice or of another type")
            found[number] = head & 15 == 1 if head & 15 in (1, 2) else self._value(head & 15, own)
        return found

    def _value(self, kind: int, path: Path) -> Any:
        self.left -= 1
        if self.left < 0 or len(path) > DEEPEST:
            raise ValueError("its footer says too much")
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9:
                head = self._byte()
                count = head >> 4 if head >> 4 < 15 else self._varint()
                if count > self.stop - self.place:
                    raise ValueError("its footer is cut")
                if self.lists.get(path) != head & 15:
                    raise ValueError("its footer holds other lists than featprobe writes")
                return [self._value(head & 15, path) for _ in range(count)]
            case 12:
                return self.struct(path)
        raise ValueError("its footer holds what featprobe never writes")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        if count > self.stop - self.place:
            raise ValueError("its footer, or the header of a page, is cut")
        self.place += count
        return self.data[self.place - count : self.place]

    def _varint(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("a number in its footer is too long")

    def _zigzag(self) -> int:
        found = self._varint()
        return (found >> 1) ^ -(found & 1)
