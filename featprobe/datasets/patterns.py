"""Patterns that describe where a set's images and masks are, and the pairs of images and masks that they give.

A pattern is a path below the data folder. In it

    *         stands for any text within one name, also none
    **        stands for any folders, also none; it must be a whole part of the path
    {stem}    stands for a part of a name that an image shares with its masks
    {dir}     stands for any folders that an image shares with its masks, also none; it must be a whole part of the path
    {split}   stands for train, training, val, valid, validation, test or testing

Other text stands for itself, in upper or lower case. The text of a field in braces is found by `images` and put into
`masks`. Where `images` has no {stem}, the stem is the image's name without its suffix; where it has no {dir}, that is
all the image's folders below the data folder. A file that fits `masks` is no image. With a * in the last name of
`masks` (not as its suffix, `.*`), each mask is an object, and an image may have any number of masks.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from posixpath import basename, dirname, splitext

from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.names import meant, plain
from featprobe.errors import DataError, nearest

FIELDS = ("stem", "dir", "split")
SPLIT_WORDS: Mapping[str, str] = {
    "training": "train", "train": "train", "validation": "val", "valid": "val", "val": "val", "testing": "test",
    "test": "test",
}  # fmt: skip  # longer words first
DICOM = (".dcm", ".dicom")
MASK_SUFFIXES = (*(suffix for suffix in SUFFIXES if suffix not in DICOM), ".gif")  # suffixes of masks
MOST = 255  # characters of a name


@dataclass(frozen=True)
class Pattern:
    """One pattern; see the module's docstring. Raises DataError, naming `called`, for a text that is no pattern or
    leads out of the data folder."""

    text: str
    called: str

    def __post_init__(self) -> None:
        text = unicodedata.normalize("NFC", self.text.replace("\\", "/"))
        object.__setattr__(self, "text", text)
        parts = text.split("/")
        fault = ""
        if not text or text.startswith("/") or text[1:2] == ":" or ".." in parts or "\0" in text:
            fault = "is no path below the data folder. It was not read"
        elif {"", "."} & {*parts}:
            fault = "has a part without a name"
        elif any(word in part and part != word for part in parts for word in ("**", "{dir}")):
            fault = "has ** or {dir} beside other text. wanted: a whole part of the path, as masks/{dir}/{stem}.png"
        elif parts[-1] in ("**", "{dir}"):
            fault = "ends with folders. wanted: the name of a file after them, as * or {stem}.png"
        elif unknown := [f for f in re.findall(r"\{([^{}]*)\}", text) if f not in FIELDS]:
            fault = f"has a field {{{unknown[0]}}}. {nearest(unknown[0], FIELDS)}".removesuffix(".")
        elif re.search(r"[{}]", re.sub(r"\{\w+\}", "", text)):
            fault = "has a brace without its other half"
        elif twice := [name for name in FIELDS if text.count(f"{{{name}}}") > 1 and name != "stem"]:
            fault = f"has {{{twice[0]}}} twice"
        if fault:
            raise DataError(
                f"{self.called} = {self.text[:200]!r} {fault}.\n"
                f"  wanted  a path as 'shots/*/*.jpg' or 'seg/{{stem}}_m.png', with *, **, {{stem}}, {{dir}}, {{split}}"
            )

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of its fields in braces."""
        return tuple(name for name in FIELDS if f"{{{name}}}" in self.text)

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """The suffix of its files, in lower case; empty where any suffix fits."""
        suffix = splitext(self.text)[1].lower()
        return () if not suffix or re.search(r"[*{}]", suffix) else (suffix,)

    @cached_property
    def open_name(self) -> bool:
        """Whether the name of the file holds a * before its suffix."""
        return "*" in basename(self.text).removesuffix(".*")

    def match(self, path: str, longest: int = MOST) -> dict[str, str] | None:
        """The text of each field in a path, with the longest {stem} of up to `longest` characters; None without a fit.

        >>> Pattern("{split}/**/{stem}_m.png", "masks").match("Train/a/b/p1_m.PNG")
        {'split': 'Train', 'stem': 'p1'}
        >>> Pattern("{dir}/*.png", "images").match("p1.png")
        {'dir': ''}
        """
        found = _compiled(self.text, longest).fullmatch(path)
        return None if found is None else {k: v.rstrip("/") for k, v in found.groupdict().items()}

    def filled(self, fields: Mapping[str, str]) -> str:
        """The pattern with texts in place of its fields.

        >>> Pattern("masks/{dir}/{stem}.*", "masks").filled({"dir": "", "stem": "p1"})
        'masks/p1.*'
        """
        text = self.text.replace("{dir}/", f"{fields['dir']}/" if fields.get("dir") else "")
        for name in ("stem", "split"):
            text = text.replace(f"{{{name}}}", fields.get(name, ""))
        return text


@lru_cache(maxsize=1024)
def _compiled(text: str, longest: int) -> re.Pattern[str]:
    """The regular expression of a pattern; a field that occurs again must have the same text."""
    words = {
        "**": "(?:[^/]+/)*",
        "{dir}": "(?P<dir>(?:[^/]+/)*)",
        "*": "[^/]*",
        "{stem}": rf"(?P<stem>[^/]{{1,{longest}}})",
        "{split}": f"(?P<split>{'|'.join(SPLIT_WORDS)})",
    }
    found: list[str] = []
    for token in re.split(r"(\*\*/|\{dir\}/|\*|\{stem\}|\{split\})", text):
        word = words.get(token.removesuffix("/") if token.endswith("/") else token)
        again = token == "{stem}" and words["{stem}"] in found
        found.append("(?P=stem)" if again else re.escape(token) if word is None else word)
    return re.compile("".join(found), re.IGNORECASE)


@dataclass(frozen=True)
class Description:
    """Two patterns: where the images and the masks of a set are. Raises DataError where they do not fit together."""

    images: Pattern
    masks: Pattern

    @classmethod
    def of(cls, images: str, masks: str) -> "Description":
        """The description from two texts. Raises DataError."""
        return cls(Pattern(images, "images"), Pattern(masks, "masks"))

    def __post_init__(self) -> None:
        if not {"stem", "dir"} & {*self.masks.fields}:
            raise DataError(
                f"masks = {self.masks.text!r} does not say to which image a mask belongs.\n"
                "  wanted  {stem}, {dir} or both in it, as 'masks/{stem}.png'"
            )
        if {*DICOM} & {*self.masks.suffixes}:
            raise DataError(
                f"masks = {self.masks.text!r} are DICOM files, which can only be images.\n"
                f"  wanted  {', '.join(MASK_SUFFIXES)}. Store the masks as one of these."
            )
        if "split" in self.masks.fields and "split" not in self.images.fields:
            raise DataError(
                f"masks = {self.masks.text!r} has a field {{split}}, and images = {self.images.text!r} none."
            )

    @property
    def of_objects(self) -> bool:
        """Whether each mask is one object."""
        return self.masks.open_name

    def __str__(self) -> str:
        return f"images = {self.images.text!r}, masks = {self.masks.text!r}"


@dataclass(frozen=True)
class Pairs:
    """The images and masks that a description finds. All paths are texts relative to the data folder.

    masks: image -> its masks, in order. wanted: image -> where its mask would be. splits: image -> its split, "" where
    `images` has no {split}. free: masks without an image.
    """

    masks: Mapping[str, Sequence[str]]
    wanted: Mapping[str, str]
    splits: Mapping[str, str]
    free: Sequence[str]

    @property
    def count(self) -> int:
        """The number of images that have a mask."""
        return sum(map(bool, self.masks.values()))

    @property
    def bare(self) -> list[str]:
        """The images without a mask."""
        return [image for image, masks in self.masks.items() if not masks]


def pair(description: Description, files: Iterable[str]) -> Pairs:
    """The pairs that a description finds among files, given as paths relative to the data folder.

    A mask belongs to the image with exactly its name, else to the image whose name differs only in form, see `names`.
    Raises DataError where two images have the same masks, or an image has several masks that are no objects.
    """
    images, masks = description.images, description.masks
    names = sorted(files)
    drawn = {name: found for name in names if (found := _fits(masks, name, MASK_SUFFIXES)) is not None}
    fields: dict[str, dict[str, str]] = {}
    image_of: dict[str, str] = {}
    for name in names:
        found = _fits(images, name, SUFFIXES) if name not in drawn else None
        if found is None:
            continue
        fields[name] = {"stem": splitext(basename(name))[0], "dir": dirname(name), **found}
        key = _key(fields[name], masks.fields)
        if key in image_of:
            raise DataError(
                f"{description} gives {image_of[key]} and {name} the same masks, {masks.filled(fields[name])}.\n"
                "Nothing was read. Write {dir} or {stem} in both patterns, so that each image has masks of its own."
            )
        image_of[key] = name
    looks = {plain(key) for key in image_of}
    key_of = {name: _image_key(masks, name, found, looks) for name, found in drawn.items()}
    known_as = meant(key_of.values(), image_of)
    found_masks: dict[str, list[str]] = defaultdict(list)
    free: list[str] = []
    for name, key in key_of.items():
        image = image_of.get(known_as[key])
        (found_masks[image] if image else free).append(name)
    several = [] if description.of_objects else [found for found in found_masks.values() if len(found) > 1]
    if several:
        raise DataError(
            f"{description} gives one image the masks {' and '.join(several[0][:2])}.\n"
            "Nothing was read. Remove one, name their suffix, or write a * beside {stem} where each mask is an object."
        )
    return Pairs(
        {name: found_masks.get(name, []) for name in fields},
        {name: masks.filled(found) for name, found in fields.items()},
        {name: SPLIT_WORDS.get(found.get("split", "").lower(), "") for name, found in fields.items()},
        free,
    )


def _fits(pattern: Pattern, path: str, suffixes: Sequence[str]) -> dict[str, str] | None:
    """The fields of a path that fits and has one of the suffixes, or the pattern's suffix; else None."""
    named = pattern.suffixes or suffixes
    return _match(pattern, path) if splitext(path)[1].lower() in named else None


def _match(pattern: Pattern, path: str, longest: int = MOST) -> dict[str, str] | None:
    """The fields of a path as it is written, else in composed Unicode, as patterns are; None where neither fits."""
    found = pattern.match(path, longest)
    return pattern.match(unicodedata.normalize("NFC", path), longest) if found is None else found


def _key(fields: Mapping[str, str], names: Sequence[str]) -> str:
    """The texts by which a mask finds its image; all words for one split count as the same."""
    return "/".join(SPLIT_WORDS[fields[name].lower()] if name == "split" else fields[name] for name in reversed(names))


def _image_key(masks: Pattern, name: str, found: dict[str, str], looks: Collection[str]) -> str:
    """The texts by which a mask finds its image. Beside a *, the stem is the longest that looks like an image's."""
    first = key = _key(found, masks.fields)
    while plain(key) not in looks:
        shorter = masks.open_name and len(found.get("stem", "")) > 1 and _match(masks, name, len(found["stem"]) - 1)
        if not shorter:
            return first
        found, key = shorter, _key(shorter, masks.fields)
    return key
