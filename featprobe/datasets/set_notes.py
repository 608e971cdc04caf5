"""Notes on a set's labels, for all formats: copies of objects, similar names of classes, parts without groups."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import PurePath
from shlex import quote

from featprobe.datasets.samples import DataSet, listed
from featprobe.errors import counted
from featprobe.targets import Target

FEWEST = 3  # groups that a split needs
PATTERNS = (
    r"([^/]+)\.rf\.[0-9a-f]+\.",  # Roboflow's copies of one picture
    r"([^/]*\d[^/]*)/[^/]+$",  # one folder per part, where files in them have the same names
    r"(?:^|/)([^/_]*\d[^/_]*)_[^/]*$",
    r"(?:^|/)([^/_-]*\d[^/_-]*)-[^/]*$",
    r"(?:^|/)([^/]*\d[^/]*?)[_-][a-zA-Z]*\d+[_-][a-zA-Z]*\d+\.[^./]+$",
    r"(?:^|/)([^/]*\d[^/]*)[_-][a-zA-Z]*\d+\.[^./]+$",
)
"""Patterns of a part's name in ids, the widest first. Names of parts contain a number, names of classes don't."""
OF_FOLDERS = PATTERNS[1]


def copies_in(target: Target, classes: Sequence[str]) -> list[str]:
    """Objects that an image has more than once (same class, box and mask), as texts. Crowds do not count."""
    objects = (i for i in target.instances or () if not i.crowd)
    seen = Counter((i.category, i.box_xyxy, i.rle and str(i.rle["counts"])) for i in objects)
    return [
        f"{classes[category]}, {count} times at x1, y1, x2, y2 = {', '.join(f'{v:g}' for v in box)}"
        for (category, box, _), count in seen.items()
        if count > 1
    ]


def copy_notes(copies: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """A note on the images with copies of objects. held: id -> the texts of `copies_in`."""
    held = [f"{own} ({'; '.join(texts)})" for own, texts in copies if texts]
    if not held:
        return []
    return [f"{counted(len(held), 'image holds', 'images hold')} an object more than once: {listed(held, 3)}"]


def alike_classes(data: DataSet) -> list[str]:
    """A note per pair of classes whose names differ only in blanks or case.

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
    """A note, with the option to use, where every image is its own group although ids name common parts."""
    ids = [sample.id for sample in data.samples]
    if len({sample.group for sample in data.samples}) < len(ids):
        return []
    for pattern in PATTERNS:
        groups = _groups(ids, pattern)
        if groups:
            first = next(iter(groups))
            shown = ", ".join(PurePath(identity).name for identity in groups[first][:2])
            return [
                f"every image is its own group, though names show {len(groups)} parts ({first}: {shown}, …): images of "
                f"one part may stand in two splits; --group-from {quote(pattern)} makes them groups"
            ]
    return []


def _groups(ids: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """Part -> its ids, as a pattern finds them; {} where these are no sensible parts.

    Sensible: the pattern matches all ids, there are three parts or more, none has more than half of all images, and
    most images share their part with another.
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
