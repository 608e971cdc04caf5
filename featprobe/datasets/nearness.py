"""How near a folder is to a format, for the error message when no format fits."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.layouts import can_stand, role_of
from featprobe.datasets.names import is_hidden, visible
from featprobe.datasets.patterns import MASK_SUFFIXES
from featprobe.datasets.samples import listed
from featprobe.errors import counted


@dataclass(frozen=True)
class Near:
    """found: the things a format looks for that a folder has. lacks: the first of them that it lacks."""

    found: tuple[str, ...]
    lacks: str


def seek(*wanted: str, then: str = "") -> Callable[[Path], Near]:
    """A function that looks for things in a folder, in order. Each is a `Path.glob` pattern, or several joined by |.

    then: the contents that they must have; this is what is lacking where all are there and the format does not fit.
    """

    def look(root: Path) -> Near:
        there = {
            each: next((p for glob in each.split("|") for p in visible(root, root.glob(glob))), None) for each in wanted
        }
        found = tuple(path.relative_to(root).as_posix() for path in there.values() if path)
        lacking = [" or ".join(each.split("|")) for each, path in there.items() if not path]
        return Near(found, lacking[0] if lacking else then or "files whose contents fit their names")

    return look


def nearest_pairs(root: Path) -> Near:
    """How near a folder is to pairs of images and masks."""
    images, masks, others = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    linked, odd = linked_folders(root), list[str]()
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not is_hidden(name)]
        folder = PurePosixPath(Path(place).relative_to(root).as_posix())
        role = next((role_of(part) for part in reversed(folder.parts) if role_of(part)), "")
        odd += [] if can_stand(folder.as_posix()) else [f"{folder}/"]
        for suffix in (Path(name).suffix.lower() for name in names if not is_hidden(name)):
            if role == "masks" and suffix in MASK_SUFFIXES:
                masks[f"{folder}/"] += 1
            elif role == "masks":
                others[f"{folder}/", suffix or "no suffix"] += 1
            elif suffix in SUFFIXES:
                images[f"{folder}/"] += 1
    found = tuple(f"{counted(n, 'image')} in {folder}" for held in (images, masks) for folder, n in held.most_common(1))
    also = f"; linked folders are not entered: {listed(linked)}" if linked else ""
    also += f"; folders of names with * {{ }} or \\ are not searched: {listed(odd)}" if odd else ""
    if not images:
        there = (f"links to folders: {listed(linked)}",) if linked else ()
        return Near((*found, *there), f"images (files ending in {', '.join(SUFFIXES)}){also}")
    if masks:
        lacks = "matching names: no mask has the name of an image, with any text before or after it"
    elif others:
        each = [f"{counted(n, 'file')} of {suffix} in {folder}" for (folder, suffix), n in sorted(others.items())]
        lacks = f"masks that are images; it has {listed(each)}. wanted: {', '.join(MASK_SUFFIXES)}"
    else:
        wanted = "a folder called masks, labels, annotations, seg or gt, or names as NAME_mask"
        held = listed([f"{n} images in {f}" for f, n in images.most_common()], 3)
        lacks = f"masks: {wanted}; it has {held}"
    return Near(found, lacks + also)


def linked_folders(root: Path) -> list[str]:
    """Linked folders below a folder, relative to it. No search enters them."""
    return sorted(
        Path(place, name).relative_to(root).as_posix()
        for place, folders, _ in os.walk(root)
        for name in folders
        if not is_hidden(name) and Path(place, name).is_symlink()
    )
