"""Labels of whole images, for all readers: their names, which of them says good, and what would spoil them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from featprobe.datasets.samples import SPLITS, DataSet, listed
from featprobe.errors import DataError, counted, nearest
from featprobe.image_labels import MOST_NAMES, LabelNames

GOOD_WORDS = (
    "good", "ok", "okay", "normal", "pass", "passed", "free", "clean", "io", "negative", "no_defect", "no_defects",
    "defect_free", "non_defect", "non_defective", "undamaged", "intact", "without_defect",
)  # fmt: skip
"""Usual names for images without a defect, in any case, with or without blanks, hyphens and underscores."""
LONGEST_LABEL = 200  # characters
NO_LABEL = "good (no label)"  # what an image without any is called, where images have several labels
HELD = tuple[int, ...] | None  # the labels of an image, None where they are not known


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


_GOOD = frozenset(map(_plain, GOOD_WORDS))


def says_good(name: str) -> bool:
    """Whether a label has a usual name for images without a defect.

    >>> [says_good(name) for name in ("OK", "defect-free", "i.O.", "not ok")]
    [True, True, True, False]
    """
    return _plain(name) in _GOOD


def label_names(held: Mapping[str, int], *, multi: bool, where: object) -> LabelNames:
    """The names of labels, sorted, still without the one that says good.

    held: name -> images. Good images alone are enough for heads of anomalies. Raises DataError, naming `where`, for
    one other label alone where each image has one, for too many, for very long ones, and for a label that says good
    among several labels of an image.
    """
    names = sorted(held)
    if long := [name for name in names if len(name) > LONGEST_LABEL]:
        raise DataError(
            f"{where} has labels of more than {LONGEST_LABEL} characters.\n"
            f"  found   {listed([f'{name[:40]}… of {len(name)} characters' for name in long], 3)}\n"
            "Nothing was read. Shorten them, or look whether a quotation mark is missing."
        )
    alone = len(names) == 1 and not multi and says_good(names[0])
    if not (alone or 2 - multi <= len(names) <= MOST_NAMES):
        found = listed([f"{name} ({counted(held[name], 'image')})" for name in names], 8) or "none"
        few = len(names) <= MOST_NAMES
        so = ": nothing could be told apart" if few else ""
        to_do = "Add images of another label, such as good beside the defects." if few else "Join some of them."
        raise DataError(
            f"{where} gives its images {counted(len(names), 'label')}{so}.\n"
            f"  wanted  {'1' if multi else '2'} to {MOST_NAMES} labels\n  found   {found}\nNothing was read. {to_do}"
        )
    good = [name for name in names if says_good(name)]
    if multi and good:
        raise DataError(
            f"{where} gives images several labels, and {listed(good)} among them says that there is no defect.\n"
            f"  wanted  no label for a good image\n  found   {listed([f'{n} ({held[n]} images)' for n in good])}\n"
            "Nothing was read. Leave the label of these images empty. If each image has one label, remove the |."
        )
    return LabelNames(tuple(names), multi)


def with_good(data: DataSet, good: str | None) -> DataSet:
    """The set, whose labels say which of them means good: the named one, else the one with a usual name.

    A note says where none has. Raises DataError where several have, and where the named one is no label of the set.
    """
    names = data.label_names
    if good is not None and (names is None or names.multi or good not in names.names):
        raise DataError(_no_such_good(data, good))
    if names is None or names.multi or names.good is not None:
        return data
    usual = [name for name in names.names if says_good(name)]
    if good is None and len(usual) > 1:
        raise DataError(
            f"{data.root} has several labels that could say that an image is good.\n"
            f"  wanted  one\n  found   {listed(usual)}\n"
            "Nothing was read. Give them one name. Or name one in featprobe.toml; then the others count as defects:\n"
            f"{_section(data, usual[0])}"
        )
    found = good or next(iter(usual), None)
    notes = [] if found else [_none_good(names)]
    return replace(data, label_names=replace(names, good=found), notes=(*data.notes, *notes))


def _no_such_good(data: DataSet, good: str) -> str:
    names = data.label_names
    if names is None:
        found, to_do = "no labels of images", "Omit good."
    elif names.multi:
        found, to_do = "several labels for an image, where an image without any is good", "Omit good."
    else:
        found, to_do = listed(names.names, 12), nearest(good, names.names)
    return (
        f"good = {good!r} is no label of the images of {data.root}.\n"
        f"  wanted  one of its labels\n  found   {found}\nNothing was read. {to_do}"
    )


def _none_good(names: LabelNames) -> str:
    return (
        f"nothing says which of the labels {listed(names.names)} means that an image is good; "
        'good = "NAME" in featprobe.toml does'
    )


def _section(data: DataSet, good: str) -> str:
    return f'  [data.{data.name}]\n  path = "{data.root.resolve()}"\n  good = "{good}"'


def check_held(held: HELD, names: LabelNames | None, where: object) -> None:
    """Raise DataError, naming `where`, for labels of an image that its set can't have. held: None for unknown."""
    if held is None:
        return
    count = len(names.names) if names else 0
    if names is None or any(not 0 <= own < count for own in held) or (not names.multi and len(held) != 1):
        wanted = "no labels" if names is None else f"{'numbers' if names.multi else 'one number'} from 0 to {count - 1}"
        raise DataError(f"{where}: its reader gives labels of the image that do not fit the set. wanted: {wanted}. "
                        f"found: {list(held)}.")  # fmt: skip


def mixed_verdicts(
    groups: Sequence[str], splits: Sequence[str], good: Sequence[bool | None], called: str = "its own split"
) -> list[str]:
    """A note where groups with good and with bad images stand in more than one split; [] where none does.

    good: of each image; None where nothing is known of that. A head can then know the part, and not the defect.

    >>> mixed_verdicts(["a", "a", "b"], ["train", "test", "test"], [True, False, False])
    ['its own split: 1 group with good and bad images stands in more than one split (a); --split group makes one \
where none does']
    """
    parts, verdicts = defaultdict(set), defaultdict(set)
    for group, split, own in zip(groups, splits, good, strict=True):
        if own is not None:
            parts[group].add(split)
            verdicts[group].add(own)
    mixed = [group for group in parts if len(parts[group]) > 1 and len(verdicts[group]) > 1]
    if not mixed:
        return []
    count = counted(len(mixed), "group with good and bad images stands", "groups with good and bad images stand")
    return [f"{called}: {count} in more than one split ({listed(mixed, 3)}); --split group makes one where none does"]


def verdicts(names: LabelNames | None, held: Sequence[HELD]) -> list[bool | None]:
    """Whether each image is good, from its labels; None where nothing is known of that."""
    if names is None or not names.says_good:
        return [None] * len(held)
    good = () if names.good is None else (names.names.index(names.good),)
    return [None if own is None else tuple(own) == good for own in held]


def held_text(names: LabelNames, held: HELD) -> str:
    """The labels of an image for people.

    >>> held_text(LabelNames(("dent", "scratch"), multi=True), (0, 1)), held_text(LabelNames(("a", "b")), None)
    ('dent, scratch', 'not known')
    """
    return "not known" if held is None else ", ".join(names.names[i] for i in held) or NO_LABEL


def label_counts(
    names: LabelNames | None, splits: Sequence[str], held: Sequence[HELD]
) -> dict[str, dict[str, int]] | None:
    """Images of each label, by split; of several labels also those without any, under "". None without labels."""
    if names is None:
        return None
    found = {split: dict.fromkeys([*names.names, *([""] if names.multi else [])], 0) for split in _in_order(splits)}
    for split, own in zip(splits, held, strict=True):
        for name in [names.names[i] for i in own] or [""] if own is not None else []:
            found[split][name] += 1
    return found


def _in_order(splits: Sequence[str]) -> list[str]:
    """The splits that occur: train, val and test first."""
    return [*(split for split in SPLITS if split in splits), *sorted(set(splits).difference(SPLITS))]
