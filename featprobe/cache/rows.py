"""The rows of a cache, stored in columns. A Row object is made only when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, SupportsIndex, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.errors import CacheError
from featprobe.geometry import Part, Placement, Size
from featprobe.io.packed_texts import Texts

TARGET_KINDS = ("semantic", "instances")
PIECE = 1 << 22  # bytes of labels that are read at once
TEXT_FIELDS = ("id", "group", "split", "image", "image_hash")


@dataclass(frozen=True)
class Row:
    """One row of a cache: its sample, its image file, its placement in the frame, its labels.

    image: path below the data set's root. image_hash: xxh3_128 of the file. semantic: PNG bytes,
    instances: JSON bytes, each empty where the set has none. reason: why the row can't be read, or "".
    part: the tile or view of its image that the row shows, None for the whole image. With a part, placement and labels
    are those of the part, and image_index is the index of the image in the cache. labels: of the whole image, indices
    into the set's `LabelNames`; None where they are not known. They are written, and read by `Cache.image_labels`.
    """

    id: str
    group: str
    split: str
    image: str
    image_hash: str
    placement: Placement
    semantic: bytes = field(default=b"", repr=False)
    instances: bytes = field(default=b"", repr=False)
    reason: str = ""
    part: Part | None = None
    image_index: int = -1
    labels: tuple[int, ...] | None = None

    def show(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The pixels that the row shows, from those of its image, (height, width, …)."""
        return pixels if self.part is None else self.part.take(pixels)


class Blob(Protocol):
    """Bytes in memory, or bytes in a file that are read when they are needed."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> bytes: ...


@dataclass(frozen=True)
class Targets:
    """Labels of one kind for all rows: those of row i are bytes [offsets[i], offsets[i + 1]) of the blob."""

    blob: Blob
    offsets: NDArray[np.unsignedinteger]

    def of(self, row: int) -> bytes:
        """A row's bytes, unchecked."""
        return self.blob[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def each(self) -> Iterator[bytes]:
        """Every row's bytes, in order. The file is read in larger pieces."""
        start, piece = 0, b""
        for first, stop in pairwise(self.offsets.tolist()):
            if stop > start + len(piece):
                start, piece = first, self.blob[first : max(stop, first + PIECE)]
            yield piece[first - start : stop - start]


@dataclass(frozen=True, eq=False)
class RowTable(Sequence[Row]):
    """Rows of a cache, or the whole images whose parts they show; see `Row`.

    texts: TEXT_FIELDS, and `view` for parts. original, content: (rows, 2), (height, width) in pixels.
    frame: of all rows; None where each row's frame is its original size. targets: by kind. checksum: (rows, 2), xxh3_64
    per kind; None where the file holds none. part: (rows, 4), left, top, height, width, and image_index: (rows,);
    None where each row is an image. mending: the end of the message on damaged labels: how they are repaired.
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

    def __repr__(self) -> str:
        return f"RowTable({len(self)} rows{'' if self.part is None else ', parts of images'})"

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | tuple[Row, ...]:
        """A row with checked labels. Raises CacheError where its labels are damaged."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        i = range(len(self))[index]
        row = self.unchecked(i)
        if self.checksum is not None and target_checksums(row) != self.checksum[i].tolist():
            raise CacheError(f"The labels of row {i}, {row.id}, are damaged: not what was written.\n{self.mending}")
        return row

    def unchecked(self, row: int) -> Row:
        """A row with unchecked labels."""
        values: dict[str, Any] = {name: self.texts[name][row] for name in TEXT_FIELDS}
        values |= {kind: self.targets[kind].of(row) for kind in TARGET_KINDS}
        image = -1 if self.image_index is None else int(self.image_index[row])
        return Row(**values, placement=self.placement(row), part=self.part_of(row), image_index=image)

    def column(self, name: str) -> list[str]:
        """A text of every row: one of TEXT_FIELDS, or `view`."""
        return self.texts[name].to_list()

    def labelled(self, kind: str) -> NDArray[np.bool_]:
        """(rows,), which rows have labels of a kind: one of TARGET_KINDS."""
        return np.diff(self.targets[kind].offsets) > 0

    def placement(self, row: int) -> Placement:
        """A row's placement in the frame."""
        original, content = _size(self.original[row]), _size(self.content[row])
        return Placement(original, content, self.frame or original)

    def part_of(self, row: int) -> Part | None:
        """The part of its image that a row shows; None for the whole image."""
        if self.part is None:
            return None
        left, top, height, width = self.part[row].tolist()
        return Part(left, top, height, width, self.texts["view"][row])

    def damaged(self) -> list[int]:
        """Indices of rows with damaged labels, found by hashing them."""
        if self.checksum is None:
            return []
        blobs = zip(*(self.targets[kind].each() for kind in TARGET_KINDS), strict=True)
        found = [[xxhash.xxh3_64_intdigest(blob) for blob in of_row] for of_row in blobs]
        return [i for i, wanted in enumerate(self.checksum.tolist()) if found[i] != wanted]

    def grouped(self, groups: Sequence[str]) -> "RowTable":
        """The same rows with other groups, one group per row."""
        return replace(self, texts={**self.texts, "group": Texts(groups)})


def _size(pair: NDArray[np.int32]) -> Size:
    return int(pair[0]), int(pair[1])


def target_checksums(row: Row) -> list[int]:
    """xxh3_64 of each kind of target's bytes."""
    return [xxhash.xxh3_64_intdigest(getattr(row, kind)) for kind in TARGET_KINDS]


def checksum(kept: Sequence[NDArray[Any]]) -> int:
    """xxh3_64 over a row's values for one level, in the order of `layout.level_tables`."""
    if len(kept) == 1:
        return xxhash.xxh3_64_intdigest(kept[0].data)
    running = xxhash.xxh3_64()
    for values in kept:
        running.update(values.data)
    return running.intdigest()
