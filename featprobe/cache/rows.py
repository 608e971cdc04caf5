"""The rows of a cache in columns: some bytes for each beside its texts. A Row is made when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, SupportsIndex, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.errors import CacheError
from featprobe.geometry import Part, Placement, Size

TARGET_KINDS = ("semantic", "instances")
PIECE = 1 << 22  # bytes of labels that are read at once
TEXT_FIELDS = ("id", "group", "split", "image", "image_hash")


@dataclass(frozen=True)
class Row:
    """Who a row is: its sample, its image's bytes, its place in the frame, its labels.

    image: path below the data set's root. image_hash: xxh3_128 of the file. semantic: PNG bytes,
    instances: JSON bytes, each empty where the set has none. reason: why the row can't be read, or "".
    part: what the row shows of its image, None for all of it; placement and labels are the part's own then, and
    image_index says which of the cache's images it is a part of.
    """

    id: str
    group: str
    split: str
    image: str
    image_hash: str
    placement: Placement
    semantic: bytes = b""
    instances: bytes = b""
    reason: str = ""
    part: Part | None = None
    image_index: int = -1

    def show(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """What the row shows of its image's pixels, (height, width, …)."""
        return pixels if self.part is None else self.part.take(pixels)


class Blob(Protocol):
    """Bytes in memory, or in a file that is read when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> bytes: ...


class Texts(Sequence[str]):
    """Many texts in one: a few bytes for each beside its characters. Raises UnicodeError for what is no Unicode."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._all = "".join(texts)
        self._all.encode()
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        self._ends = ends.astype(np.uint32) if len(self._all) < 1 << 32 else ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.to_list()[index]
        i = range(len(self))[index]
        return self._all[self._ends[i] : self._ends[i + 1]]

    def to_list(self) -> list[str]:
        """All of them."""
        text = self._all
        return [text[start:stop] for start, stop in pairwise(self._ends.tolist())]


@dataclass(frozen=True)
class Targets:
    """The labels of all rows, of one kind: row i's are bytes [offsets[i], offsets[i + 1]) of the blob."""

    blob: Blob
    offsets: NDArray[np.unsignedinteger]

    def of(self, row: int) -> bytes:
        """A row's bytes, as they lie there."""
        return self.blob[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def each(self) -> Iterator[bytes]:
        """Every row's bytes, in order, of pieces that are read at once."""
        start, piece = 0, b""
        for first, stop in pairwise(self.offsets.tolist()):
            if stop > start + len(piece):
                start, piece = first, self.blob[first : max(stop, first + PIECE)]
            yield piece[first - start : stop - start]


@dataclass(frozen=True, eq=False)
class RowTable(Sequence[Row]):
    """Rows of a cache, or the whole images that they are parts of; see `Row`.

    texts: those of TEXT_FIELDS, and `view` of parts. original, content: (rows, 2), (height, width) in pixels.
    frame: of all rows; None where each row is as large as itself. targets: by kind. checksum: (rows, 2), xxh3_64 of
    each kind; None where there is none to hold. part: (rows, 4), left, top, height, width, and image_index: (rows,);
    None where rows are images. mending: what to say of labels that are damaged.
    """

    texts: Mapping[str, Texts]
    original: NDArray[np.int32]
    content: NDArray[np.int32]
    frame: Size | None
    targets: Mapping[str, Targets]
    checksum: NDArray[np.uint64] | None = None
    part: NDArray[np.int32] | None = None
    image_index: NDArray[np.int32] | None = None
    mending: str = ""

    def __len__(self) -> int:
        return len(self.original)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | tuple[Row, ...]:
        """A row, whose labels are checked. Raises CacheError for those that are not what was written."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        i = range(len(self))[index]
        row = self.unchecked(i)
        if self.checksum is not None and target_checksums(row) != self.checksum[i].tolist():
            raise CacheError(f"The labels of row {i}, {row.id}, are damaged: not what was written.\n{self.mending}")
        return row

    def unchecked(self, row: int) -> Row:
        """A row, whatever became of its labels."""
        own: dict[str, Any] = {name: self.texts[name][row] for name in TEXT_FIELDS}
        own |= {kind: self.targets[kind].of(row) for kind in TARGET_KINDS}
        image = -1 if self.image_index is None else int(self.image_index[row])
        return Row(**own, placement=self.placement(row), part=self.part_of(row), image_index=image)

    def column(self, name: str) -> list[str]:
        """A text of every row: one of TEXT_FIELDS, or `view`."""
        return self.texts[name].to_list()

    def placement(self, row: int) -> Placement:
        """A row's place in the frame."""
        original, content = _size(self.original[row]), _size(self.content[row])
        return Placement(original, content, self.frame or original)

    def part_of(self, row: int) -> Part | None:
        """What a row shows of its image; None for all of it."""
        if self.part is None:
            return None
        left, top, height, width = self.part[row].tolist()
        return Part(left, top, height, width, self.texts["view"][row])

    def damaged(self) -> list[int]:
        """Rows whose labels do not hash to what was written."""
        if self.checksum is None:
            return []
        blobs = zip(*(self.targets[kind].each() for kind in TARGET_KINDS), strict=True)
        found = [[xxhash.xxh3_64_intdigest(blob) for blob in own] for own in blobs]
        return [i for i, wanted in enumerate(self.checksum.tolist()) if found[i] != wanted]

    def grouped(self, groups: Sequence[str]) -> "RowTable":
        """The same rows in other groups, one for each."""
        return replace(self, texts={**self.texts, "group": Texts(groups)})


def _size(pair: NDArray[np.int32]) -> Size:
    return int(pair[0]), int(pair[1])


def target_checksums(row: Row) -> list[int]:
    """xxh3_64 of each kind of target's bytes."""
    return [xxhash.xxh3_64_intdigest(getattr(row, kind)) for kind in TARGET_KINDS]


def checksum(kept: Sequence[NDArray[Any]]) -> int:
    """xxh3_64 of what is kept of a row for a level, in the order of `layout.level_tables`."""
    if len(kept) == 1:
        return xxhash.xxh3_64_intdigest(kept[0].data)
    running = xxhash.xxh3_64()
    for own in kept:
        running.update(own.data)
    return running.intdigest()
