"""CVAT's labelmap.txt, one `name:R,G,B:parts:actions` per line. Masks hold these colours, or the lines' indices."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.files import is_missing, kept_below, read_text
from featprobe.datasets.objects import check_classes, stored_pixels
from featprobe.datasets.samples import listed
from featprobe.datasets.values import gathered, to_whole
from featprobe.errors import DataError
from featprobe.io.pictures import MASK_FORMATS, picture
from featprobe.targets import IGNORE, Labels, equal_runs, numbered

NAME = "labelmap.txt"
IGNORED = ("ignored", "ignore")  # CVAT's name for VOC's void, and featprobe's
VOID = 0xE0E0C0  # VOC's colour of ignored pixels
COLOURED = ("RGB", "RGBA")
INDEXED = ("P", "L", "1")


@dataclass(frozen=True)
class Labelmap:
    """The content of the file. classes: names, the background first. of_colour, of_line: class index or IGNORE per
    colour and per line."""

    path: Path
    classes: tuple[str, ...]
    of_colour: Mapping[int, int]
    of_line: tuple[int, ...]

    def read(self, path: Path) -> Labels:
        """(height, width) class indices of a mask. A palette's colours count where all are named, else its indices.

        Raises DataError for a colour or an index that is not in the file.
        """
        mode, values = stored_pixels(path)
        if mode not in (*COLOURED, *INDEXED):
            raise DataError(
                f"{path} is a mask of the pixel format {mode}. wanted: RGB colours, a palette or 8-bit grey."
            )
        if mode in COLOURED:
            return self._named(_coded(values), self.of_colour, "#{:06x}", path)
        by_line = {**dict(enumerate(self.of_line)), IGNORE: IGNORE}
        palette = _palette(path) if mode == "P" else {}
        found = np.unique(equal_runs(values)[0]).tolist()
        if all(palette.get(index) in self.of_colour for index in found):
            by_line = {index: self.of_colour[palette[index]] for index in found}
        return self._named(values.astype(np.int64), by_line, "{}", path)

    def _named(self, values: NDArray, named: Mapping[int, int], form: str, path: Path) -> Labels:
        found, places = numbered(values)
        unknown = [form.format(value) for value in found.tolist() if value not in named]
        if unknown:
            raise DataError(
                f"{path} holds values that {self.path.name} does not name.\n"
                f"  wanted  {', '.join(form.format(value) for value in named)}\n  found   {listed(unknown)}"
            )
        index = np.array([named[value] for value in found.tolist()], dtype=np.uint8)
        return index[places]


def read_labelmap(root: Path, *folders: Path) -> Labelmap | None:
    """The labelmap.txt in the first of these folders that has one; None without. Raises DataError."""
    path = next((folder / NAME for folder in (*folders, root) if not is_missing(folder / NAME)), None)
    if path is None:
        return None
    lines = enumerate(read_text(kept_below(root, path)).splitlines(), start=1)
    named = gathered(
        partial(_line, line, f"{path}, line {number}")
        for number, line in lines
        if line.strip() and not line.startswith("#")
    )
    for what in zip(*named, strict=True):
        again = [str(value) for value, count in Counter(what).items() if count > 1]
        if again:
            raise DataError(f"{path} names {listed(again)} twice. wanted: each name and each colour once.")
    back = next((i for i, (name, _) in enumerate(named) if name.lower() == "background"), None)
    back = next((i for i, (_, colour) in enumerate(named) if not colour), None) if back is None else back
    if back is None:
        named, back = [("background", 0), *named], 0
    plain = [name for i, (name, _) in enumerate(named) if i != back and name.lower() not in IGNORED]
    classes = check_classes([named[back][0], *plain], path)
    number = {name: i for i, name in enumerate(classes)}
    indices = [IGNORE if name.lower() in IGNORED else number[name] for name, _ in named]
    return Labelmap(path, classes, {c: i for (_, c), i in zip(named, indices, strict=True)}, tuple(indices))


def codes_of(path: Path) -> tuple[NDArray, int]:
    """(height, width) numbers of a mask's objects (in a colour mask their colours), and the ignored number."""
    mode, values = stored_pixels(path)
    if mode not in (*COLOURED, *INDEXED):
        raise DataError(f"{path} is a mask of the pixel format {mode}. wanted: RGB colours, a palette or 8-bit grey.")
    return (_coded(values), VOID) if mode in COLOURED else (values.astype(np.int64), IGNORE)


def _line(line: str, where: str) -> tuple[str, int]:
    """The name of a line and its colour as 65536 R + 256 G + B. Raises DataError."""
    name, _, rest = line.partition(":")
    colour = rest.partition(":")[0].split(",")
    if not name.strip() or len(colour) != 3:
        raise DataError(f"{where}: wanted name:R,G,B::, found {line[:200]!r}.")
    parts = [to_whole(part, where) for part in colour]
    if max(parts) > 255:
        raise DataError(f"{where}: wanted R,G,B of 0 to 255, found {line[:200]!r}.")
    return name.strip(), parts[0] << 16 | parts[1] << 8 | parts[2]


def _coded(values: NDArray) -> NDArray:
    return np.asarray(values[..., :3].astype(np.int64) @ np.array([0x10000, 0x100, 1]))


def _palette(path: Path) -> dict[int, int]:
    """The colour of each index of a palette image."""
    with picture(path, MASK_FORMATS) as image:
        colours: Sequence[int] = image.getpalette() or []
    table = np.array(colours, dtype=np.uint8).reshape(-1, 3)
    return dict(enumerate(_coded(table).tolist()))
