"""Tiles and views: which parts of its images a cache holds, with the labels that belong to each."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import xxhash

from featprobe.cache import Row
from featprobe.geometry import IDENTITY, TURNS, Part, Placement, place, place_tile, tiles_of
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.crops import Augmentation, choose_crop, place_crop
from featprobe.targets import (
    IGNORE,
    Labels,
    cut_instances,
    decode_instances,
    decode_semantic,
    encode_instances,
    encode_semantic,
)


def parts_of(row: Row, recipe: FeatureRecipe, multiple: int, image_index: int) -> list[Row]:
    """The rows that show an image: its tiles, and for a training image their views, each with labels of its own.

    row: of the whole image, unplaced in any frame. Of the training tiles without a defect, those are there that the
    tiling keeps. A crop shows a defect seven times in ten where there is one.
    """
    whole, tiling = row.placement.original, recipe.tiling
    tiles = tiles_of(whole, tiling.tile, tiling.overlap) if tiling and not row.reason else [Part(0, 0, *whole)]
    labels = decode_semantic(row.semantic) if row.semantic else None
    objects = decode_instances(row.instances) if row.instances else None

    def cut(named: Row, part: Part) -> Row:
        return replace(
            named,
            part=part,
            semantic=b"" if labels is None else encode_semantic(part.take(labels)),
            instances=b"" if objects is None else encode_instances(cut_instances(objects[0], part), objects[1]),
            placement=_placed(part, named.part or part, recipe, multiple),
        )

    found = []
    for part in tiles:
        name = f"{row.id}@{part.left},{part.top}" if tiling else row.id
        own = cut(replace(row, id=name, image_index=image_index), part)
        training = row.split == "train" and not row.reason
        if training and tiling and tiling.thinned and not _has_defect(own) and not tiling.keeps(name):
            continue
        found.append(own)
        if training:
            found += [cut(replace(own, id=f"{name}~{view.view}"), view) for view in _views(own, recipe)]
    return found


def _placed(part: Part, tile: Part, recipe: FeatureRecipe, multiple: int) -> Placement:
    """The placement of a part in its frame. tile: the part that it is a view of, or itself."""
    if part.view.startswith("crop"):
        return place_crop(part.size, tile.size, recipe)
    if recipe.tile:
        return place_tile(part.size, recipe.tile, recipe.size, multiple)
    return place(part.size, recipe.size, recipe.fit, multiple)


def _views(tile: Row, recipe: FeatureRecipe) -> Iterator[Part]:
    """The views of a tile or image that the recipe asks for."""
    assert tile.part is not None
    for view in recipe.views:
        if view in TURNS:
            yield replace(tile.part, view=view)
        elif view != IDENTITY:
            for number in range(1, int(view.removeprefix("crop:")) + 1):
                yield _crop(tile, tile.part, number)


def _crop(tile: Row, part: Part, number: int) -> Part:
    labels = decode_semantic(tile.semantic) if tile.semantic else None
    instances = decode_instances(tile.instances)[0] if tile.instances else None
    random = np.random.default_rng([xxhash.xxh3_64_intdigest(tile.id.encode()), number])
    top, left, height, width = choose_crop(part.size, labels, instances, Augmentation(), random)
    return Part(part.left + left, part.top + top, height, width, f"crop{number}")


def _has_defect(row: Row) -> bool:
    labels: Labels | None = decode_semantic(row.semantic) if row.semantic else None
    if labels is not None and bool(((labels > 0) & (labels != IGNORE)).any()):
        return True
    return bool(row.instances) and any(not instance.crowd for instance in decode_instances(row.instances)[0])
