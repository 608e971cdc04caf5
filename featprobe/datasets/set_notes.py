"""What can be said of labels as a set, in all formats: copies of objects, classes alike, parts without groups."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import PurePath
from shlex import quote

from featprobe.datasets.samples import DataSet, listed
from featprobe.errors import counted
from featprobe.targets import Target

FEWEST = 3  # groups, as a split needs
PATTERNS = (
    r"([^/]+)\.rf\.[0-9a-f]+\.",  # Roboflow's copies of one picture
    r"([^/]*\d[^/]*)/[^/]+$",  # a folder a part, where files in them have the same names
    r"(?:^|/)([^/_]*\d[^/_]*)_[^/]*$",
    r"(?:^|/)([^/_-]*\d[^/_-]*)-[^/]*$",
    r"(?:^|/)([^/]*\d[^/]*?)[_-][a-zA-Z]*\d+[_-][a-zA-Z]*\d+\.[^./]+$",
    r"(?:^|/)([^/]*\d[^/]*)[_-][a-zA-Z]*\d+\.[^./]+$",
)
"""How a part is named in ids, the widest reading first; a part's name has a number in it, a class's has none."""
OF_FOLDERS = PATTERNS[1]


def copies_in(target: Target, classes: Sequence[str]) -> list[str]:
    """Objects of an image that stand there more than once: of one class, one box and one mask. No crowds."""
    objects = (i for i in target.instances or () if not i.crowd)
    seen = Counter((i.category, i.box_xyxy, i.rle and str(i.rle["counts"])) for i in objects)
    return [
        f"{classes[category]}, {count} times at x1, y1, x2, y2 = {', '.join(f'{v:g}' for v in box)}"
        for (category, box, _), count in seen.items()
        if count > 1
    ]


def copy_notes(copies: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """A note on the images, by id, in which `copies_in` found some."""
    held = [f"{own} ({'; '.join(texts)})" for own, texts in copies if texts]
    if not held:
        return []
    return [f"{counted(len(held), 'image holds', 'images hold')} an object more than once: {listed(held, 3)}"]


def alike_classes(data: DataSet) -> list[str]:
    """A note on classes whose names differ in blanks or case alone.

    >>> from pathlib import Path
    >>> alike_classes(DataSet("set", Path(), ("background", "pore", "Pore "), (), (), lambda *_: Target(None, None)))
    ["classes 'pore' and 'Pore ' differ in blanks or case alone; if they are one, give it one name"]
    """
    plain = {name: "".join(name.split()).casefold() for name in data.classes}
    return [
        f"classes {a!r} and {b!r} differ in blanks or case alone; if they are one, give it one name"
        for a, b in combinations(plain, 2)
        if plain[a] == plain[b]
    ]


def unnamed_parts(data: DataSet) -> list[str]:
    """A note, with what to type, where every image is its own group although ids name parts that they share."""
    ids = [sample.id for sample in data.samples]
    if len({sample.group for sample in data.samples}) < len(ids):
        return []
    for pattern in PATTERNS:
        groups = _groups(ids, pattern)
        if groups:
            first = next(iter(groups))
            shown = ", ".join(PurePath(own).name for own in groups[first][:2])
            return [
                f"every image is its own group, though names show {len(groups)} parts ({first}: {shown}, …): images of "
                f"one part may stand in two splits; --group-from {quote(pattern)} makes them groups"
            ]
    return []


def _groups(ids: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """The ids of each part that a pattern finds; none where it makes no sense as one.

    It does where it matches all ids, the parts are three or more, none is more than half of all images, and most images
    share theirs with another.
    """
    search = re.compile(pattern).search
    groups: dict[str, list[str]] = defaultdict(list)
    for own in ids:
        match = search(own)
        if match is None:
            return {}
        groups[match[1]].append(own)
    sizes = [len(own) for own in groups.values()]
    shared = sum(size for size in sizes if size > 1)
    if len(sizes) < FEWEST or 2 * max(sizes) > len(ids) or 2 * shared < len(ids):
        return {}
    if pattern == OF_FOLDERS:
        names = Counter(PurePath(own).name for own in ids)
        if 2 * sum(count for count in names.values() if count > 1) < len(ids):
            return {}
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
