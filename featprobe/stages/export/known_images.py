"""The images that a graph is compared on: those that its head was tested on, or those that a user names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featprobe.datasets.images.pixels import DTYPE_OF, Levels
from featprobe.datasets.images.reading import header_of, read_levels
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.geometry import Part, Size, tiles_of
from featprobe.scores import SCORES
from featprobe.stages.comparison.tested import TESTS
from featprobe.stages.export.graph import Raw
from featprobe.stages.predict import find_images
from featprobe.stages.predictor import Predictor
from featprobe.stages.workspace import Workspace


@dataclass(frozen=True)
class KnownImages:
    """Images, or tiles of images, that a graph takes.

    raw: what they have in common. shown: file and tile of each; None for all of an image. others: how many there are
    beside them that the graph does not take. words: what they are, for people.
    """

    raw: Raw
    shown: tuple[tuple[Path, Part | None], ...]
    others: int
    words: str

    def levels(self, place: int) -> Levels:
        """The raw levels of one, as a graph takes them: what a header calls empty is 0."""
        path, part = self.shown[place]
        levels = read_levels(path)
        own = levels.filled(0) if isinstance(levels, np.ma.MaskedArray) else levels
        return own if part is None else part.take(own)


def find_known(
    predictor: Predictor, folder: Path, workspace: Workspace, given: Sequence[Path], size: Size | None, most: int
) -> KnownImages:
    """At most so many images of one kind, spread over all that are found.

    given: files and folders; where there are none, the images that the head was tested on. size: (height, width) of
    the images; None for the commonest. Raises ProbeError where there is no such image, DataError for a damaged one.
    """
    paths = [path for path, _ in find_images(given)] if given else _tested(predictor, folder, workspace)
    what = "image" if predictor.recipe.tile is None else "tile"
    words = f"{what}s of {', '.join(map(str, given))}" if given else f"test {what}s of {predictor.card['data']['name']}"
    kinds: list[tuple[Raw, Path, Part | None]] = []
    for path in paths:
        header = header_of(path)
        for part in _parts(predictor, header.size):
            raw = Raw(str(DTYPE_OF[header.bits]), header.channels, header.size if part is None else part.size)
            kinds.append((raw, path, part))
    bits = predictor.card["data"].get("bits")
    fitting = Counter(
        raw
        for raw, _, _ in kinds
        if (bits is None or raw.dtype == str(DTYPE_OF[bits])) and (size is None or raw.size == size)
    )
    if not fitting:
        raise ProbeError(_none_fits(words, [raw for raw, _, _ in kinds], bits, size, what))
    ((raw, _),) = fitting.most_common(1)
    own = [(path, part) for kind, path, part in kinds if kind == raw]
    places = np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))
    return KnownImages(raw, tuple(own[i] for i in places), len(kinds) - len(own), words)


def _parts(predictor: Predictor, size: Size) -> Sequence[Part | None]:
    recipe = predictor.recipe
    return [None] if recipe.tile is None else tiles_of(size, recipe.tile, recipe.overlap)


def _tested(predictor: Predictor, folder: Path, workspace: Workspace) -> list[Path]:
    """The files of the images that a head was tested on, in the order of their ids. Raises ProbeError."""
    card = predictor.card
    kept = card["data"]
    try:
        ids = TESTS[SCORES[card["head"]["task"]].on].read(folder, card).ids
        named = workspace.data_argument(kept["name"], Path(kept["root"]))
        read = card.get("read_as", {})
        data = workspace.data_set(
            named, read.get("format"), read.get("group_from"), read.get("split_file"), False, read.get("images"),
            read.get("masks"),
        )  # fmt: skip
    except FeatprobeError as error:
        raise ProbeError(_not_found(folder, str(error))) from error
    tiles = predictor.recipe.tile is not None
    tested = {name.rpartition("@")[0] if tiles else name for name in ids}  # a tile is called IMAGE@LEFT,TOP
    found = [sample.image for sample in data.samples if sample.id in tested]
    if not found:
        raise ProbeError(
            _not_found(folder, f"{kept['root']} holds none of the {len(ids)} images that it was tested on")
        )
    return found


def _not_found(folder: Path, reason: str) -> str:
    return (
        f"The test images of {folder} can't be found, and a graph is only written once it was compared on images.\n"
        f"  found   {reason}\n"
        "Nothing was written. Bring them back, or name others of the same kind:  --images FOLDER"
    )


def _none_fits(words: str, kinds: Sequence[Raw], bits: int | None, size: Size | None, what: str) -> str:
    found = ", ".join(f"{count} {raw.dtype} of {_sides(raw.size)}" for raw, count in Counter(kinds).most_common(3))
    wanted = [f"{bits} bits"] if bits is not None else []
    wanted += [f"{_sides(size)} pixels"] if size is not None else []
    return (
        f"None of the {words} fits the graph, so it can't be compared on them. Nothing was written.\n"
        f"  wanted  {what}s of {' and '.join(wanted) or 'one kind'}\n"
        f"  found   {found}\n"
        f"Take another --image-size, or name {what}s of that kind:  --images FOLDER"
    )


def _sides(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
