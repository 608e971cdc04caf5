"""Splits by group: deterministic, and never one part in two splits."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import xxhash

from featprobe.datasets.samples import SPLITS, DataSet, Sample, listed
from featprobe.errors import DataError

SHARES: Mapping[str, float] = {"train": 0.6, "val": 0.2, "test": 0.2}
VAL_OF_TRAIN = 0.2


def split_by_group(groups: Sequence[str], shares: Mapping[str, float] = SHARES) -> list[str]:
    """A split for each image, from the name of its group alone.

    Groups are taken in the order of a hash of their name; each goes to the split that lacks most images
    of its share. Every split gets a group where there are enough of them.

    >>> split_by_group(["a", "a", "b", "c"])
    ['test', 'test', 'train', 'val']
    """
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    if len(sizes) < len(shares):
        raise DataError(
            f"{len(sizes)} group(s) of images can't be split into {', '.join(shares)}.\n"
            f"  wanted  at least {len(shares)} groups, so that no part stands in two splits\n"
            f"  found   {listed(sorted(sizes))}\n"
            "Give the images a finer group, or name their splits."
        )
    held = dict.fromkeys(shares, 0)
    chosen: dict[str, str] = {}
    order = sorted(sizes, key=lambda group: (xxhash.xxh3_64_intdigest(group.encode()), group))
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        empty = [split for split in shares if not held[split]]
        candidates = empty if len(empty) >= left else list(shares)
        chosen[group] = min(candidates, key=lambda split: held[split] / shares[split])
        held[chosen[group]] += sizes[group]
    return [chosen[group] for group in groups]


def complete_splits(data: DataSet) -> DataSet:
    """Give every sample of a data set a split, keeping the set's own where it has one.

    Without any, 60/20/20 by group. Validation is carved from train by group (20 %), never from test. A
    set of train and val only has its val scored as test. Leaks and choices are told in the notes.
    """
    named = {sample.split for sample in data.samples if sample.split}
    notes = list(data.notes)
    if not named:
        splits = split_by_group([s.group for s in data.samples])
        notes.append("the set names no splits: 60/20/20 by group, from the names of the groups")
        return _with_splits(data, splits, notes)
    lost = [s.id for s in data.samples if not s.split]
    if lost:
        raise DataError(f"{data.root} names the split of some images only; without one: {listed(lost)}.")
    unknown = sorted(named - set(SPLITS))
    if unknown:
        raise DataError(f"{data.root} names splits {listed(unknown)}. wanted: {', '.join(SPLITS)}.")
    if "train" not in named or not named & {"val", "test"}:
        raise DataError(
            f"{data.root} has an empty split.\n  wanted  train, and val or test\n  found   {', '.join(sorted(named))}"
        )
    splits = [sample.split for sample in data.samples]
    if "test" not in named:
        splits = ["test" if split == "val" else split for split in splits]
        notes.append("the set has train and val only: its val is scored as test")
    notes += leaks(data.samples, splits)
    if "val" not in splits:
        splits = carve_validation([s.group for s in data.samples], splits)
        held = splits.count("val")
        notes.append(f"validation was carved from train by group: {held} of {held + splits.count('train')} images")
    return _with_splits(data, splits, notes)


def carve_validation(groups: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Move 20 % of the training images, whole groups of them, to val."""
    train = [group for group, split in zip(groups, splits, strict=True) if split == "train"]
    carved = iter(split_by_group(train, {"train": 1 - VAL_OF_TRAIN, "val": VAL_OF_TRAIN}))
    return [next(carved) if split == "train" else split for split in splits]


def leaks(samples: Sequence[Sample], splits: Sequence[str]) -> list[str]:
    """A note where groups straddle the splits, none where they do not."""
    seen: dict[str, set[str]] = defaultdict(set)
    for sample, split in zip(samples, splits, strict=True):
        seen[sample.group].add(split)
    straddling = [group for group, found in seen.items() if len(found) > 1]
    if not straddling:
        return []
    return [
        f"its own split leaks: {len(straddling)} of {len(seen)} groups stand in more than one split "
        f"({listed(straddling, 3)}); --split group makes one that does not"
    ]


def _with_splits(data: DataSet, splits: Sequence[str], notes: Sequence[str]) -> DataSet:
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        raise DataError(f"{data.root} has no image in its {', '.join(empty)} split. Nothing can be trained and scored.")
    samples = tuple(replace(s, split=split) for s, split in zip(data.samples, splits, strict=True))
    return replace(data, samples=samples, notes=tuple(notes))
