"""The rows of a cache that are trained on, chosen on and scored, and those of a part of the training split."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.datasets.label_sets import mixed_verdicts, verdicts
from featprobe.datasets.split_file import SplitFile, read_split_file
from featprobe.datasets.splits import (
    SHARES,
    carve_validation,
    folds_by_group,
    leaks,
    split_by_group,
    splits_of_fold,
    starved,
)
from featprobe.errors import DataError, ProbeError
from featprobe.image_labels import UNKNOWN, LabelNames
from featprobe.specs import Rows, digest
from featprobe.splitting import SPLITS_BY, SplitChoice
from featprobe.stages.image_truth import mask_values
from featprobe.stages.row_images import images_of
from featprobe.targets import IGNORE, Instance, Target, values_in

SCARCE_FIRST: Mapping[str, float] = {split: SHARES[split] for split in ("train", "test", "val")}
"""The shares in the order in which they are given a class of fewer than three groups."""
Classes = list[set[int]]
_classes: WeakKeyDictionary[Cache, Classes] = WeakKeyDictionary()
_regrouped: WeakKeyDictionary[Cache, dict[SplitChoice, Cache]] = WeakKeyDictionary()


def single_splits(choice: SplitChoice) -> list[SplitChoice]:
    """The single splits of a choice: the folds of a cross-validation, a file with its digest.

    Raises DataError for a file that can't be read or is not what the choice has pinned.

    >>> [str(single) for single in single_splits(SplitChoice("group", 3))]
    ['group:3/1', 'group:3/2', 'group:3/3']
    """
    if choice.file:
        file = _file_of(choice)
        choice = replace(choice, by=f"{choice.file}#{file.digest}", folds=file.folds)
    if choice.fold or not choice.folds:
        return [choice]
    return [replace(choice, fold=fold) for fold in range(1, choice.folds + 1)]


@dataclass(frozen=True)
class Partition:
    """A cache under one of the `single_splits`: which of its rows are trained on, chosen on and scored.

    source: the cache as it was opened. Nothing is read of it, or of a split file, before it is asked for.
    """

    source: Cache
    choice: SplitChoice

    def __repr__(self) -> str:
        return f"Partition({str(self.choice)!r} of {self.source!r})"

    @property
    def cache(self) -> Cache:
        """The cache, whose images have the groups that a split file gives them; raises DataError.

        The same object for each partition of one cache and split, so that what is known of it is known to all of them.
        """
        if not self.choice.file:
            return self.source
        known = _regrouped.setdefault(self.source, {})
        if self.choice not in known:
            known[self.choice] = _regroup(self.source, self.choice)
        return known[self.choice]

    @cached_property
    def rows(self) -> Mapping[str, Rows]:
        """Usable rows of train, val and test.

        Raises ProbeError when one of them is empty, or when another split than the cache's would need other rows;
        DataError where the split does not fit the cache's images.
        """
        cache, usable = self.source, self.source.usable()
        if self.choice.by != "own" and cache.recipe.keeps_own_split:
            raise ProbeError(
                f"{cache.path} holds views, or fewer empty tiles, of the training images of the set's own split.\n"
                f"Omit --split {self.choice}, which would need others; or extract without --views and "
                "--empty-tiles."
            )
        images = images_of(cache, usable)
        split_of = dict(zip(images.tolist(), _assigned_in(cache, self.choice, images)[1], strict=True))
        splits = [split_of[image] for image in cache.image_of[usable].tolist()]
        rows = {s: usable[[a == s for a in splits]] for s in ("train", "val", "test")}
        empty = [s for s, found in rows.items() if not len(found)]
        if empty:
            raise ProbeError(f"{cache.path}: the {', '.join(empty)} split has no usable image. Nothing was trained.")
        return rows


def _file_of(choice: SplitChoice) -> SplitFile:
    file = read_split_file(Path(choice.file))
    if choice.pinned and not file.digest.startswith(choice.pinned):
        raise DataError(
            f"{choice.file} says something else than it did.\n"
            f"  wanted  digest {choice.pinned}\n  found   digest {file.digest}\n"
            f"Nothing was trained. Bring the old file back, or take the new one:  --split {choice.file}"
        )
    if choice.folds not in (0, file.folds):
        raise DataError(f"{choice.file} has {file.folds or 'no'} folds. wanted: {choice.folds}, as --split says.")
    return file


def assigned(
    choice: SplitChoice,
    ids: Sequence[str],
    groups: Sequence[str],
    own: Sequence[str],
    classes: Callable[[], Classes],
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    """The group and the split of each image; its fold, where the choice has folds and names none of them.

    own: the set's own splits. classes: of each image, asked for only where the choice needs them. seed: of the order
    in which groups are placed. Raises DataError.
    """
    if choice.file:
        groups, splits = _file_of(choice).placed(ids, groups)
        if choice.fold:
            splits = splits_of_fold(groups, splits, choice.fold)
        elif not choice.folds and "val" not in splits:
            splits = carve_validation(groups, splits)
        return list(groups), splits
    if choice.by == "own":
        return list(groups), list(own)
    units = ids if choice.by == "image" else groups
    held = classes() if choice.by == "stratified" else None
    if not choice.folds:
        return list(groups), split_by_group(units, SCARCE_FIRST if held else SHARES, held, seed)
    folds = folds_by_group(units, choice.folds, held, seed)
    return list(groups), splits_of_fold(units, folds, choice.fold, held, seed) if choice.fold else folds


def _assigned_in(cache: Cache, choice: SplitChoice, images: Rows) -> tuple[list[str], list[str]]:
    """The group and the split of each of these images."""
    asked = range(len(cache.images)) if choice.file else images.tolist()  # a file names what can't be used too
    columns = [cache.images.column(name) for name in ("id", "group", "split")]
    ids, groups, own = ([column[i] for i in asked] for column in columns)
    found = assigned(choice, ids, groups, own, lambda: [classes_of(cache)[i] for i in asked])
    place = {image: i for i, image in enumerate(asked)}
    return [found[0][place[i]] for i in images.tolist()], [found[1][place[i]] for i in images.tolist()]


def partition_of(cache: Cache, choice: SplitChoice) -> tuple[str, set[str]]:
    """A digest over the group and the split of each usable image, in each fold, and the ids of those that are tested.

    The same digest for the same partition, whatever it is called. Raises FeatprobeError where it can't be found now.
    """
    images = images_of(cache, cache.usable())
    every = cache.images.column("id")
    ids = [every[i] for i in images.tolist()]
    folds = [_assigned_in(cache, single, images) for single in single_splits(choice)]
    tested = {name for _, splits in folds for name, own in zip(ids, splits, strict=True) if own == "test"}
    return digest(sorted(zip(ids, *(column for fold in folds for column in fold), strict=True))), tested


def _regroup(cache: Cache, choice: SplitChoice) -> Cache:
    groups, _ = _assigned_in(cache, choice, np.arange(len(cache.images)))
    rows = cache.rows.grouped([groups[i] for i in cache.image_of.tolist()])
    images = cache.images.grouped(groups) if cache.recipe.in_parts else None
    return Cache(cache.path, replace(cache.contents, rows=rows, images=images))


def split_notes(cache: Cache, choice: SplitChoice) -> list[str]:
    """Notes about a split for a user: leaks of a file, classes that a part of it lacks, how folds are scored."""
    choices = single_splits(choice)
    images = images_of(cache, cache.usable())
    named = names_held(cache.data.tasks, cache.data.classes, cache.data.label_names)
    good = verdicts(cache.data.label_names, labels_held(cache))
    notes = []
    if len(choices) > 1:
        notes.append(f"{len(choices)} folds: the table gives means over folds; featprobe compare scores all as one set")
    elif choices[0].fold:
        notes.append(f"fold {choices[0].fold} of {choices[0].folds} alone; featprobe compare waits for the others")
    for one in choices:
        groups, splits = _assigned_in(cache, one, images)
        if one.file and one.fold <= 1:
            notes += leaks(groups, splits, f"the split of {Path(one.file).name}")
        if one.fold <= 1:
            called = f"the split of {Path(one.file).name}" if one.file else SPLITS_BY[one.by]
            notes += mixed_verdicts(groups, splits, [good[i] for i in images.tolist()], called)
        lacking = starved(splits, [classes_of(cache)[i] for i in images.tolist()], groups, named)
        notes += [f"fold {one.fold} of {one.folds}: {note}" if one.fold else note for note in lacking]
    if choices[0].by == "group" and any(" holds " in note for note in notes):
        notes.append("--split stratified spreads the groups so that each split sees each class, where groups allow it")
    return notes


def classes_of(cache: Cache) -> Classes:
    """The classes in each image of a cache but the background, from its mask and its objects."""
    if cache not in _classes:
        drawn, listed = (np.flatnonzero(cache.images.labelled(kind)).tolist() for kind in ("semantic", "instances"))
        values = dict(zip(drawn, mask_values(cache, "images", drawn), strict=True))
        objects = {i: cache.image_instances(i) for i in listed}
        _classes[cache] = [_held(values.get(i), objects.get(i), own) for i, own in enumerate(labels_held(cache))]
    return _classes[cache]


def labels_held(cache: Cache) -> list[tuple[int, ...] | None]:
    """The labels of each image of a cache, as `Target` has them; None where nothing is known."""
    values = cache.image_labels
    if values is None:
        return [None] * len(cache.images)
    return [None if UNKNOWN in own else tuple(np.flatnonzero(own).tolist()) for own in values]


def names_held(tasks: Sequence[str], classes: Sequence[str], names: LabelNames | None) -> tuple[str, ...]:
    """The names of what `classes_in` finds: classes, or where a set has only labels of images, these."""
    return names.names if names and not tasks else tuple(classes)


def classes_in(target: Target) -> set[int]:
    """The classes that an image holds but the background; its labels, where it has only labels as a whole."""
    return _held(None if target.semantic is None else values_in(target.semantic), target.instances, target.labels)


def _held(values: Iterable[int] | None, instances: Iterable[Instance] | None, labels: Iterable[int] | None) -> set[int]:
    """The same, from the values in its mask, its objects and its labels."""
    if values is None and instances is None:
        return set(labels or ())
    return {*(values or ()), *(one.category for one in instances or () if not one.crowd)} - {0, IGNORE}


def training_subset(
    ids: Sequence[str], groups: Sequence[str], classes: Sequence[Collection[int]], fraction: float, seed: int | None
) -> NDArray[np.intp]:
    """Indices of the images that stand for a fraction of a training split, ascending.

    First, for each class from the rarest on, an image that holds it; then group after group, in the order of a hash of
    their names and a seed, as if fewer parts had been annotated. So of two fractions of one seed the smaller is
    contained in the larger, and no subset lacks a class, even where that takes more images than the fraction says.
    Other seeds draw other images: the spread over seeds holds the choice of images.

    classes: of each image. seed: None for the one subset that seeds of a shared order have in common.

    >>> training_subset(["a", "b", "c", "d"], ["p", "p", "q", "q"], [{0}, {0, 1}, {0}, {0}], 0.5, 0).tolist()
    [1, 2]
    """
    salt = "" if seed is None else f"{seed}/"
    order = sorted(range(len(ids)), key=lambda i: (_hash(salt + groups[i]), groups[i], _hash(salt + ids[i]), ids[i]))
    every = sorted(set().union(*classes), key=lambda c: (sum(c in own for own in classes), c))
    cover: list[int] = []
    for wanted in every:
        if not any(wanted in classes[i] for i in cover):
            cover.append(next(i for i in order if wanted in classes[i]))
    count = max(len(cover), round(fraction * len(ids)), 1)
    ranked = cover + [i for i in order if i not in set(cover)]
    return np.array(sorted(ranked[:count]), dtype=np.intp)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
