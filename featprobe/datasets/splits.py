"""Splits by group: deterministic, and no group is in two splits."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import xxhash

from featprobe.datasets.samples import SPLITS, DataSet, Samples, listed, split_of
from featprobe.errors import DataError, counted

SHARES: Mapping[str, float] = {"train": 0.6, "val": 0.2, "test": 0.2}
VAL_OF_TRAIN = 0.2


def split_by_group(
    groups: Sequence[str],
    shares: Mapping[str, float] = SHARES,
    classes: Sequence[Collection[int]] | None = None,
    seed: int = 0,
) -> list[str]:
    """A split for each image. It depends only on the names of groups and, where given, on their classes.

    groups: the group of each image. shares: split -> share of the images. Groups are placed in the order of a hash of
    their name; each goes to the split that lacks most images of its share. Every split gets a group where there are
    enough groups. Raises DataError for fewer groups than splits.

    classes: the classes of each image, to stratify by. Groups with the rarest class are placed first, each in a split
    without that class, else in the split that lacks most of it. So a class that is in at least as many groups as there
    are splits gets into every split, as far as groups with several classes allow; a class in fewer groups goes to the
    splits in the order of `shares`. seed: of the hash.

    >>> split_by_group(["a", "a", "b", "c"])
    ['test', 'test', 'train', 'val']

    After Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data (2011).
    """
    sizes: dict[str, int] = defaultdict(int)
    held_by: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # group -> class -> images
    for group, of_image in zip(groups, classes or [()] * len(groups), strict=True):
        sizes[group] += 1
        for name in set(of_image):
            held_by[group][name] += 1
    if len(sizes) < len(shares):
        parts = counted(len(shares), "fold") if all(map(str.isdigit, shares)) else ", ".join(shares)
        raise DataError(
            f"{counted(len(sizes), 'group')} of images can't be split into {parts}.\n"
            f"  wanted  at least {len(shares)} groups, so that no group is in two splits\n"
            f"  found   {listed(sorted(sizes))}\n"
            "Give the images smaller groups, or name their splits."
        )
    held = dict.fromkeys(shares, 0)
    seen: dict[tuple[str, int], int] = defaultdict(int)  # images of a class in a split
    chosen: dict[str, str] = {}
    by_hash = sorted(sizes, key=lambda group: (xxhash.xxh3_64_intdigest(group.encode(), seed=seed), group))
    order = _rarest_first(by_hash, held_by)
    for left, (group, rarest) in zip(range(len(order), 0, -1), order, strict=True):
        empty = [split for split in shares if not held[split]]
        candidates = empty if len(empty) >= left else list(shares)
        without = [split for split in candidates if rarest is not None and not seen[split, rarest]]
        filled = {s: (seen[s, rarest] / shares[s] if rarest is not None else 0, held[s] / shares[s]) for s in shares}
        chosen[group] = without[0] if without else min(candidates, key=lambda split: filled[split])
        held[chosen[group]] += sizes[group]
        for name, count in held_by[group].items():
            seen[chosen[group], name] += count
    return [chosen[group] for group in groups]


def _rarest_first(by_hash: Sequence[str], held_by: Mapping[str, Mapping[int, int]]) -> list[tuple[str, int | None]]:
    """(group, class by which it is placed): groups with the rarest class first, groups without a class last."""
    holders: dict[int, list[str]] = defaultdict(list)
    for group in by_hash:
        for name in held_by.get(group, ()):
            holders[name].append(group)
    counts = {name: len(groups) for name, groups in holders.items()}  # of groups that are not placed yet
    found: dict[str, int | None] = {}
    while counts:
        rarest = min(counts, key=lambda name: (counts[name], name))
        for group in holders[rarest]:
            if group not in found:
                found[group] = rarest
                for name in held_by[group]:
                    counts[name] -= 1
        counts = {name: count for name, count in counts.items() if count}
    return [*found.items(), *((group, None) for group in by_hash if group not in found)]


def fold_splits(
    groups: Sequence[str],
    folds: int,
    fold: int,
    classes: Sequence[Collection[int]] | None = None,
    seed: int = 0,
) -> list[str]:
    """The split of each image in one fold of a cross-validation by group.

    Each group is a test group in exactly one fold. Of the other groups' images, 20 % are validation, by group.
    fold: 1 <= fold <= folds. Raises DataError for fewer groups than folds.
    """
    return splits_of_fold(groups, folds_by_group(groups, folds, classes, seed), fold, classes, seed)


def folds_by_group(
    groups: Sequence[str], folds: int, classes: Sequence[Collection[int]] | None = None, seed: int = 0
) -> list[str]:
    """The fold of each image, "1" to the number of folds. Folds have as equal numbers of images as groups allow."""
    return split_by_group(groups, {str(fold): 1.0 for fold in range(1, folds + 1)}, classes, seed)


def splits_of_fold(
    groups: Sequence[str],
    fold_of: Sequence[str],
    fold: int,
    classes: Sequence[Collection[int]] | None = None,
    seed: int = 0,
) -> list[str]:
    """The split of each image: test in the given fold; elsewhere train, and val carved from it by group."""
    splits = ["test" if image_fold == str(fold) else "train" for image_fold in fold_of]
    return carve_validation(groups, splits, classes, seed)


def complete_splits(data: DataSet, called: str = "its own split") -> DataSet:
    """Give every sample of a data set a split, and keep the set's own split where it has one.

    Without any split, 60/20/20 % by group. A missing validation split is carved from train by group (20 %), never from
    test. Where a set has only train and val, val becomes test. Notes report leaks and choices. called: the name of the
    samples' split in the notes. Raises DataError for splits that are unknown, empty, or named for some images only.
    """
    samples = Samples.of(data.samples)
    groups, splits = samples.texts("group"), [split_of(split) for split in samples.texts("split")]
    named = {*splits} - {""}
    notes = list(data.notes)
    if not named:
        splits = split_by_group(groups)
        notes.append("the set names no splits: 60/20/20 by group, from the names of the groups")
        return _with_splits(data, splits, notes)
    lost = [identity for identity, split in zip(samples.texts("id"), splits, strict=True) if not split]
    if lost:
        raise DataError(f"{data.root} names the split of some images only; without one: {listed(lost)}.")
    unknown = sorted(named - set(SPLITS))
    if unknown:
        raise DataError(f"{data.root} names splits {listed(unknown)}. wanted: {', '.join(SPLITS)}.")
    if "train" not in named or not named & {"val", "test"}:
        raise DataError(
            f"{data.root} has an empty split.\n  wanted  train, and val or test\n  found   {', '.join(sorted(named))}"
        )
    if "test" not in named:
        splits = ["test" if split == "val" else split for split in splits]
        notes.append("the set has the splits train and val only: its val is scored as test")
    notes += leaks(groups, splits, called)
    if "val" not in splits:
        splits = carve_validation(groups, splits)
        held = splits.count("val")
        share = f"{held} of {held + splits.count('train')} images"
        notes.append(f"validation was carved from train by group, as no split is val: {share}")
    return _with_splits(data, splits, notes)


def carve_validation(
    groups: Sequence[str],
    splits: Sequence[str],
    classes: Sequence[Collection[int]] | None = None,
    seed: int = 0,
) -> list[str]:
    """The splits, with 20 % of the training images, in whole groups, moved to val."""
    train = [i for i, split in enumerate(splits) if split == "train"]
    shares = {"train": 1 - VAL_OF_TRAIN, "val": VAL_OF_TRAIN}
    of_train = [classes[i] for i in train] if classes is not None else None
    found = list(splits)
    for i, split in zip(train, split_by_group([groups[i] for i in train], shares, of_train, seed), strict=True):
        found[i] = split
    return found


def leaks(groups: Sequence[str], splits: Sequence[str], called: str = "its own split") -> list[str]:
    """A note where groups are in more than one split; [] where none is.

    >>> leaks(["a", "a", "b"], ["train", "test", "test"])
    ['its own split leaks: 1 of 2 groups stand in more than one split (a); --split group makes one that does not']
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        seen[group].add(split)
    straddling = [group for group, found in seen.items() if len(found) > 1]
    if not straddling:
        return []
    return [
        f"{called} leaks: {len(straddling)} of {len(seen)} groups stand in more than one split "
        f"({listed(straddling, 3)}); --split group makes one that does not"
    ]


def starved(
    splits: Sequence[str], classes: Sequence[Collection[int]], groups: Sequence[str], names: Sequence[str]
) -> list[str]:
    """A note per split that lacks a class of the other splits, with the number of groups that hold the class.

    classes: the classes of each image. names: class names by index.

    >>> starved(["train", "val", "test"], [{1}, {1}, {2}], ["a", "b", "c"], ["ground", "pore", "dent"])
    ['no train image holds dent (1 group in all)', 'no val image holds dent (1 group in all)', \
'no test image holds pore (2 groups in all)']
    """
    holders: dict[int, set[str]] = defaultdict(set)
    seen: dict[str, set[int]] = defaultdict(set)
    for split, held, group in zip(splits, classes, groups, strict=True):
        seen[split].update(held)
        for name in held:
            holders[name].add(group)
    notes = []
    for split in SPLITS:
        lacking = [
            f"{names[c]} ({counted(len(holders[c]), 'group')} in all)" for c in sorted(holders.keys() - seen[split])
        ]
        notes += [f"no {split} image holds {', '.join(lacking)}"] if lacking and split in splits else []
    return notes


def group_pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a text, to find groups in ids. Raises DataError for a text that is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise DataError(
            f"--group-from {text!r} is no regular expression: {error}.\n"
            r"  wanted  one such as '(C\d+)_': its first group, or else the whole match, names a sample's group"
        ) from error


def regroup(data: DataSet, pattern: str) -> DataSet:
    """Give every sample the group that a regular expression finds in its id: its first group, else the whole match.

    A sample without a match is a group of its own. Raises DataError for a text that is no regular expression, and
    for one that matches no sample.
    """
    search = group_pattern(pattern).search
    found = [search(sample.id) for sample in data.samples]
    names = [match and (match[1] if match.re.groups else match[0]) for match in found]
    if not any(names):
        raise DataError(
            f"--group-from {pattern!r} matches no image of {data.root}.\n"
            f"  found   {listed([sample.id for sample in data.samples])}\n"
            "Nothing was read. Write one that matches these ids; \\. matches a dot."
        )
    samples = tuple(replace(s, group=name or s.id) for s, name in zip(data.samples, names, strict=True))
    missed = [sample.id for sample, name in zip(data.samples, names, strict=True) if not name]
    alone = f"; {len(missed)} of {len(samples)} images do not match and are groups of their own: {listed(missed)}"
    note = f"groups are from the ids, by --group-from {pattern}{alone if missed else ''}"
    notes = [note for note in data.notes if not note.startswith("groups are")]
    return replace(data, samples=samples, notes=(*notes, note))


def _with_splits(data: DataSet, splits: Sequence[str], notes: Sequence[str]) -> DataSet:
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        raise DataError(f"{data.root} has no image in its {', '.join(empty)} split. Nothing can be trained and scored.")
    return replace(data, samples=Samples.of(data.samples).with_splits(splits), notes=tuple(notes))
