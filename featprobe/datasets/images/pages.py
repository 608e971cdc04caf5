"""Files of several images (pages): their names, their number, and their places in a TIFF.

A page is named as if its file were a folder, by four digits from 0 on: images/stack.tif/0003. In a TIFF it is an IFD
that is no reduced copy and no transparency mask, or a plane of an ImageJ stack after its only IFD; in DICOM, a frame.
"""

import io
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import BinaryIO, TypeVar

from featprobe.errors import DataError, FileKindError
from featprobe.io.disk import open_regular

T = TypeVar("T")

DIGITS = 4
MAX_PAGES = 10**DIGITS
PAGED = (".tif", ".tiff", ".dcm", ".dicom")  # when a folder is listed, only these files are searched for pages
LOOKED_AT_FIRST = 132  # bytes that show whether a file is TIFF or DICOM
VALUE_TYPES = frozenset(
    "AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
LONG_TYPES = frozenset("OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # two bytes, and a length of four
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_TAGS = 4096  # most tags of an IFD; tifffile too treats more as damage
SUBFILE, OLD_SUBFILE, DESCRIPTION = 254, 255, 270  # tags
COPY_OR_MASK, MASK, OLD_COPY = 0b101, 0b100, 2  # bits of NewSubfileType; SubfileType's value for a reduced copy
SHORT = 3  # the type of two bytes
LOOKED_AT = 1 << 16  # bytes of a description
USUAL = 512  # bytes: most IFDs are shorter
RACY = 2_000_000_000  # nanoseconds after which a new write gives a file another time, on any file system
FRAMES = 0x00280008  # DICOM's NumberOfFrames


@contextmanager
def opened_file(file: Path, buffering: int = io.DEFAULT_BUFFER_SIZE) -> Iterator[BinaryIO]:
    """Open a file of a data set for reading. Raises DataError for a pipe, a device, a folder, and for what is no path;
    OSError as `open`.
    """
    try:
        opened = open(file, "rb", buffering, opener=open_regular)
    except FileKindError as error:
        raise DataError(str(error)) from error
    except ValueError as error:  # a NUL, or what is no text
        raise DataError(f"{str(file)!a} can't be the path of a file: {error}.") from error
    with opened as stream:
        yield stream


def page_of(path: Path) -> tuple[Path, int | None]:
    """The file of an image and the number of its page; None for an image that is the whole file.

    >>> page_of(Path("images/0003"))[1] is None  # there is no file called images
    True
    """
    if is_page_name(path.name) and path.parent.is_file():
        return path.parent, int(path.name)
    return path, None


def is_page_name(name: str) -> bool:
    """Whether a name can be that of a page: four digits."""
    return len(name) == DIGITS and name.isascii() and name.isdecimal()


def page_path(file: Path, number: int) -> Path:
    """The path of a page. Raises ValueError for a number that four digits can't hold.

    >>> page_path(Path("stack.tif"), 3).as_posix()
    'stack.tif/0003'
    """
    if not 0 <= number < MAX_PAGES:
        raise ValueError(f"wanted 0 <= page < {MAX_PAGES}, found {number}")
    return file / f"{number:0{DIGITS}d}"


def pages_of(file: Path) -> list[Path]:
    """The paths of the images in a file: its pages, or the file where it holds one image.

    Reads a few bytes per page. An unreadable file counts as one image: reading its pixels raises the error.
    """
    count = 1
    if file.suffix.lower() in PAGED:
        with suppress(DataError, OSError):
            count = count_pages(file)
    return [page_path(file, number) for number in range(count)] if 1 < count <= MAX_PAGES else [file]


def group_of(identity: str, image: Path) -> str:
    """The default group of an image: its id, or for a page the id of its file."""
    return identity if page_of(image)[1] is None else identity[: -DIGITS - 1]


def count_pages(file: Path) -> int:
    """The number of images in a TIFF or DICOM file; 1 for other files. Raises DataError, and OSError as `open`."""
    with opened_file(file, buffering=0) as stream:
        start = stream.read(LOOKED_AT_FIRST)
        if is_dicom(start):
            try:
                return _count_frames(stream)
            except Exception as error:  # pydicom may be missing, and raises many kinds of errors
                raise DataError(f"{file} can't be read as DICOM: {error}.") from error
    return len(tiff_images(file)) if start[:4] in TIFF_STARTS else 1


def can_be_counted(file: Path) -> bool:
    """Whether `count_pages` succeeds on a file."""
    try:
        return count_pages(file) <= MAX_PAGES
    except (DataError, OSError):
        return False


def once_a_file(most: int) -> Callable[[Callable[[Path], T]], Callable[[Path], T]]:
    """A reader of files that keeps its results for the last `most` files, so that a page needs no scan of all pages.

    A file is read again when its time, size or inode has changed, and always within two seconds of its last write,
    because a further write may not change its time.
    """

    def remembering(read: Callable[[Path], T]) -> Callable[[Path], T]:
        known = lru_cache(maxsize=most)(lambda file, *stamp: read(file))

        @wraps(read)
        def asked(file: Path) -> T:
            now = file.stat()
            if abs(time.time_ns() - now.st_mtime_ns) < RACY:  # a file may be dated in the future
                return read(file)
            return known(file, now.st_mtime_ns, now.st_size, now.st_ino)

        return asked

    return remembering


def misnamed(path: Path) -> str:
    """The error text for a path below a file that is no name of a page; "" for other paths."""
    if not path.parent.is_file():
        return ""
    return (
        f"{path} is no page of {path.parent.name}.\n"
        f"  wanted  its number from 0 on, of four digits, as 0003\n  found   {path.name}"
    )


def _count_frames(stream: BinaryIO) -> int:
    from pydicom.filereader import read_partial

    stream.seek(0)
    header = read_partial(stream, stop_when=lambda tag, vr, length: tag > FRAMES, specific_tags=[FRAMES], force=True)
    return int(header.get("NumberOfFrames") or 1)


def is_dicom(start: bytes) -> bool:
    """Whether a file with these first 132 bytes is DICOM: a preamble and `DICM`, or a bare data set.

    A bare data set, as older systems write it, is recognised by its first two elements: the first is of group 2 or 8,
    tags rise, and lengths are even, in little endian.
    """
    if start[128:] == b"DICM":
        return True
    place, last, met = 0, -1, 0
    while place + 8 <= len(start) and met < 2:
        group, element, kind, length = struct.unpack_from("<HH2sH", start, place)
        tag = group << 16 | element
        if not (tag > last and (met or group in (2, 8)) and group < 0x7FE0):
            return False
        if kind.decode("latin-1") not in VALUE_TYPES:  # implicit: four bytes of length follow the tag
            length = struct.unpack_from("<I", start, place + 4)[0]
        elif kind.decode("latin-1") in LONG_TYPES:
            length = int.from_bytes(start[place + 8 : place + 12], "little") + 4
        if length % 2:
            return False
        place, last, met = place + 8 + length, tag, met + 1
    return met == 2


# ---- TIFF ------------------------------------------------------------------------------------------------------------


@once_a_file(64)
def tiff_images(file: Path) -> tuple[int, ...]:
    """`tiff_images_in` for the path of a file."""
    with opened_file(file, buffering=0) as stream:
        return tiff_images_in(stream, file)


def tiff_images_in(stream: BinaryIO, file: Path) -> tuple[int, ...]:
    """The offset of each image's IFD in an open TIFF, in bytes; planes after a single IFD all have its offset.

    Only the IFDs (each once) and ImageJ's description are read. Raises DataError for IFDs that are not in the file or
    form a circle, for more than 10,000, and where ImageJ counts more images than there are.
    """
    tiff = _Tiff(stream, file)
    found: list[int] = []
    seen: set[int] = set()
    planes, offset = 1, tiff.first
    while offset:
        if offset in seen:
            raise DataError(f"{file} is truncated or damaged: its pages lead in a circle.")
        if len(seen) == MAX_PAGES:
            raise DataError(too_many(file, f"more than {MAX_PAGES}"))
        directory = tiff.directory(offset)
        planes = planes if seen else tiff.imagej_images(directory)
        seen.add(offset)
        found += [offset] if tiff.is_image(directory) else []
        offset = directory.following
    found = found or [tiff.first]
    if planes > len(found) and len(seen) > 1:
        raise DataError(
            f"{file} is truncated or damaged: ImageJ counts {planes} images in it, and {len(seen)} are there."
        )
    if planes > MAX_PAGES:
        raise DataError(too_many(file, str(planes)))
    return tuple(found) if planes <= len(found) else (tiff.first,) * planes


def tiff_mask_behind(stream: BinaryIO, file: Path, image: int) -> int:
    """The offset of the transparency mask's IFD after an image's IFD; 0 where there is none. Raises DataError.

    The search ends at the next image. Masks of reduced copies do not count.
    """
    tiff = _Tiff(stream, file)
    offset, seen = tiff.directory(image).following, {image}
    while offset and offset not in seen:
        directory = tiff.directory(offset)
        if tiff.is_image(directory):
            return 0
        if tiff.is_mask(directory):
            return offset
        seen.add(offset)
        offset = directory.following
    return 0


def too_many(file: Path, found: str) -> str:
    """The error text for a file with more pages than four digits can name."""
    return (
        f"{file} holds {found} images (pages, slices or frames), or its header is damaged.\n"
        f"  wanted  at most {MAX_PAGES}, as four digits name\nCut it into several files."
    )


@dataclass(frozen=True)
class _Directory:
    """An IFD. tags: in their order; entries: the bytes of all tags; following: offset of the next IFD, 0 for none."""

    tags: tuple[int, ...]
    entries: bytes
    following: int


class _Tiff:
    """The IFDs of an open TIFF, of both byte orders and both sizes of offsets."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        start = self._read(0, 16)
        self._order, self._big = "<" if start[:2] == b"II" else ">", start[2:4] in (b"+\0", b"\0+")
        self._count, self._size, self._offset = ("Q", 20, "Q") if self._big else ("H", 12, "I")
        self.first = self._number("Q", start[8:16]) if self._big else self._number("I", start[4:8])
        if not self.first:
            raise DataError(self._damaged("it holds no page"))

    def directory(self, offset: int) -> _Directory:
        """The IFD at an offset. Raises DataError where there is none, or it has thousands of tags."""
        data = self._read(offset, USUAL)
        before = struct.calcsize("=" + self._count)
        count = self._number(self._count, data[:before])
        if count > MAX_TAGS:
            raise DataError(self._damaged(f"one of its pages has {count} tags"))
        after = before + count * self._size
        end = after + struct.calcsize("=" + self._offset)
        data = self._read(offset, end) if end > USUAL else data
        following = self._number(self._offset, data[after:end])
        return _Directory(
            struct.unpack_from(self._order + f"H{self._size - 2}x" * count, data, before), data[before:after], following
        )

    def is_image(self, directory: _Directory) -> bool:
        """Whether an IFD is an image, neither a reduced copy nor a transparency mask."""
        kind = self._value(directory, SUBFILE)
        return not kind & COPY_OR_MASK if kind else self._value(directory, OLD_SUBFILE) != OLD_COPY

    def is_mask(self, directory: _Directory) -> bool:
        """Whether an IFD is the transparency mask of an image and not of a reduced copy."""
        return self._value(directory, SUBFILE) & COPY_OR_MASK == MASK

    def imagej_images(self, directory: _Directory) -> int:
        """The number of images in ImageJ's description; 1 where there is no description."""
        if DESCRIPTION not in directory.tags:
            return 1
        length, place = struct.unpack(
            f"{self._order}4x{self._offset}{self._offset}", self._entry(directory, DESCRIPTION)
        )
        text = self._read(place, min(length, LOOKED_AT)) if length > struct.calcsize("=" + self._offset) else b""
        found = re.search(rb"\nimages=(\d{1,18})", text) if text.startswith(b"ImageJ=") else None
        return int(found[1]) if found else 1

    def _value(self, directory: _Directory, tag: int) -> int:
        """The number of a tag of type SHORT or LONG; 0 where there is none."""
        if tag not in directory.tags:
            return 0
        entry = self._entry(directory, tag)
        at = self._size - struct.calcsize("=" + self._offset)
        short = self._number("H", entry[2:4]) == SHORT
        return self._number("H", entry[at : at + 2]) if short else self._number("I", entry[at : at + 4])

    def _entry(self, directory: _Directory, tag: int) -> bytes:
        at = directory.tags.index(tag) * self._size
        return directory.entries[at : at + self._size]

    def _number(self, format_: str, data: bytes) -> int:
        try:
            return int(struct.unpack(self._order + format_, data)[0])
        except struct.error as error:
            raise DataError(self._damaged("one of its pages is not there")) from error

    def _read(self, offset: int, count: int) -> bytes:
        try:
            self._stream.seek(offset)
        except (OSError, OverflowError, ValueError) as error:  # the place is outside of the file
            raise DataError(self._damaged("one of its pages is not there")) from error
        return self._stream.read(count)

    def _damaged(self, what: str) -> str:
        return f"{self._file} is truncated or damaged: {what}."
