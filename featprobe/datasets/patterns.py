"""Patterns that describe where a set's images and masks lie, and the pairs that two of them give.

A pattern is a path below the data folder. In it

    *         stands for any text within one name, none too
    **        for any folders, none too; it is a whole part of the path
    {stem}    for a part of a name that an image shares with its masks
    {dir}     for any folders that an image shares with its masks, none too; it is a whole part of the path
    {split}   for train, training, val, valid, validation, test or testing

and all else for itself, in capitals or not. A field in braces is found in `images` and stands in `masks` for what was
found. Where `images` has no {stem}, it is the image's name without the suffix; where it has no {dir}, it is all the
folders of the image below the data folder. A file that fits `masks` is no image. With a * in the name that `masks` ends
with (not as its suffix, `.*`), a mask is an object, and an image may have any number of them.
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
MASK_SUFFIXES = (*(suffix for suffix in SUFFIXES if suffix not in DICOM), ".gif")  # in which masks are drawn
MOST = 255  # characters of a name


@dataclass(frozen=True)
class Pattern:
    """One pattern; see the module. Raises DataError, naming `called`, for one that means nothing or leads out."""

    text: str
    called: str

    def __post_init__(self) -> None:
        text = unicodedata.normalize("NFC", self.text.replace("\\", "/"))
        object.__setattr__(self, "text", text)
        parts = text.split("/")
        fault = ""
        if not text or text.startswith("/") or text[1:2] == ":" or ".." in parts or "\0" in text:
            fault = "is no path below the data folder. It was not looked at"
        elif {"", "."} & {*parts}:
            fault = "has a part without a name"
        elif any(word in part and part != word for part in parts for word in ("**", "{dir}")):
            fault = "has ** or {dir} beside other text. wanted: a whole part of the path, as masks/{dir}/{stem}.png"
        elif parts[-1] in ("**", "{dir}"):
            fault = "ends with folders. wanted: the name of a file behind them, as * or {stem}.png"
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
        """The fields that stand in it."""
        return tuple(name for name in FIELDS if f"{{{name}}}" in self.text)

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """The suffix that its files have, in small letters; none where it leaves that open."""
        suffix = splitext(self.text)[1].lower()
        return () if not suffix or re.search(r"[*{}]", suffix) else (suffix,)

    @cached_property
    def open_name(self) -> bool:
        """Whether the name of the file holds a *, its suffix aside."""
        return "*" in basename(self.text).removesuffix(".*")

    def match(self, path: str, longest: int = MOST) -> dict[str, str] | None:
        """The text of each field in a path, {stem} as long as it can be up to `longest`; None where it does not fit.

        >>> Pattern("{split}/**/{stem}_m.png", "masks").match("Train/a/b/p1_m.PNG")
        {'split': 'Train', 'stem': 'p1'}
        >>> Pattern("{dir}/*.png", "images").match("p1.png")
        {'dir': ''}
        """
        found = _compiled(self.text, longest).fullmatch(path)
        return None if found is None else {k: v.rstrip("/") for k, v in found.groupdict().items()}

    def filled(self, fields: Mapping[str, str]) -> str:
        """The pattern with the text of its fields.

        >>> Pattern("masks/{dir}/{stem}.*", "masks").filled({"dir": "", "stem": "p1"})
        'masks/p1.*'
        """
        text = self.text.replace("{dir}/", f"{fields['dir']}/" if fields.get("dir") else "")
        for name in ("stem", "split"):
            text = text.replace(f"{{{name}}}", fields.get(name, ""))
        return text


@lru_cache(maxsize=1024)
def _compiled(text: str, longest: int) -> re.Pattern[str]:
    """The regular expression of a pattern; a field that stands there again is the same text."""
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
    """Where the images and the masks of a set lie. Raises DataError for patterns that do not go together."""

    images: Pattern
    masks: Pattern

    @classmethod
    def of(cls, images: str, masks: str) -> "Description":
        """The description of two texts; raises DataError."""
        return cls(Pattern(images, "images"), Pattern(masks, "masks"))

    def __post_init__(self) -> None:
        if not {"stem", "dir"} & {*self.masks.fields}:
            raise DataError(
                f"masks = {self.masks.text!r} does not say of which image a mask is.\n"
                "  wanted  {stem}, {dir} or both in it, as 'masks/{stem}.png'"
            )
        if {*DICOM} & {*self.masks.suffixes}:
            raise DataError(
                f"masks = {self.masks.text!r} are DICOM files, which are read as images alone.\n"
                f"  wanted  {', '.join(MASK_SUFFIXES)}. Store the masks as one of these."
            )
        if "split" in self.masks.fields and "split" not in self.images.fields:
            raise DataError(
                f"masks = {self.masks.text!r} has a field {{split}}, and images = {self.images.text!r} none."
            )

    @property
    def of_objects(self) -> bool:
        """Whether a mask is an object."""
        return self.masks.open_name

    def __str__(self) -> str:
        return f"images = {self.images.text!r}, masks = {self.masks.text!r}"


@dataclass(frozen=True)
class Pairs:
    """What a description finds. All paths are relative to the data folder, as text.

    masks: of each image, in order; none where it has none. wanted: where an image's mask would be. splits: of each
    image, "" without a field. free: masks of no image.
    """

    masks: Mapping[str, Sequence[str]]
    wanted: Mapping[str, str]
    splits: Mapping[str, str]
    free: Sequence[str]

    @property
    def count(self) -> int:
        """Images that have a mask."""
        return sum(bool(own) for own in self.masks.values())

    @property
    def bare(self) -> list[str]:
        """Images that have none."""
        return [image for image, own in self.masks.items() if not own]


def pair(description: Description, files: Iterable[str]) -> Pairs:
    """The pairs that a description finds among files, as paths relative to the data folder.

    A mask is of the image that is called just so, else of the one whose name differs in form alone, see `names`.
    Raises DataError where masks can't be told apart by their image, or an image has several that are no objects.
    """
    images, masks = description.images, description.masks
    names = sorted(files)
    drawn = {name: own for name in names if (own := _fits(masks, name, MASK_SUFFIXES)) is not None}
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
                "Nothing was read. Write {dir} or {stem} in both patterns, so that each image has its own."
            )
        image_of[key] = name
    looks = {plain(key) for key in image_of}
    key_of = {name: _image_key(masks, name, own, looks) for name, own in drawn.items()}
    known_as = meant(key_of.values(), image_of)
    found_masks: dict[str, list[str]] = defaultdict(list)
    free: list[str] = []
    for name, key in key_of.items():
        image = image_of.get(known_as[key])
        (found_masks[image] if image else free).append(name)
    several = [] if description.of_objects else [own for own in found_masks.values() if len(own) > 1]
    if several:
        raise DataError(
            f"{description} gives one image the masks {' and '.join(several[0][:2])}.\n"
            "Nothing was read. Take one away, name their suffix, or write a * beside {stem} where a mask is an object."
        )
    return Pairs(
        {name: found_masks.get(name, []) for name in fields},
        {name: masks.filled(own) for name, own in fields.items()},
        {name: SPLIT_WORDS.get(own.get("split", "").lower(), "") for name, own in fields.items()},
        free,
    )


def _fits(pattern: Pattern, path: str, suffixes: Sequence[str]) -> dict[str, str] | None:
    """The fields of a path that has one of the suffixes, or that which the pattern names."""
    named = pattern.suffixes or suffixes
    return _match(pattern, path) if splitext(path)[1].lower() in named else None


def _match(pattern: Pattern, path: str, longest: int = MOST) -> dict[str, str] | None:
    """The fields of a path, as it is or else in the form of patterns, composed."""
    found = pattern.match(path, longest)
    return pattern.match(unicodedata.normalize("NFC", path), longest) if found is None else found


def _key(fields: Mapping[str, str], names: Sequence[str]) -> str:
    """What tells the image of a mask; all words for a split are one."""
    return "/".join(SPLIT_WORDS[fields[name].lower()] if name == "split" else fields[name] for name in reversed(names))


def _image_key(masks: Pattern, name: str, found: dict[str, str], looks: Collection[str]) -> str:
    """What tells the image of a mask: beside a *, a stem is the longest text that looks like an image's."""
    first = key = _key(found, masks.fields)
    while plain(key) not in looks:
        shorter = masks.open_name and len(found.get("stem", "")) > 1 and _match(masks, name, len(found["stem"]) - 1)
        if not shorter:
            return first
        found, key = shorter, _key(shorter, masks.fields)
    return key
