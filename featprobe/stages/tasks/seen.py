"""What anomaly heads say of images or tiles, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from featprobe.cache import Cache
from featprobe.features import Features
from featprobe.geometry import Part, Placement, Size
from featprobe.image_labels import Unit
from featprobe.probes.head import VerdictHead
from featprobe.probes.train import Feed
from featprobe.probes.verdicts.heat_maps import maps_at_original
from featprobe.specs import Rows
from featprobe.stages.image_truth import units_of
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.recording.watch import Watch
from featprobe.stages.stitch import stitched_maps
from featprobe.stages.tasks.task import evaluation_batches
from featprobe.targets import Instance


@dataclass(frozen=True)
class Seen:
    """What a head says of a unit. map: (height, width), float32, of its pixels; None where there is none.

    tiles: of an image of tiles, the score and the place of each.
    """

    score: float
    map: Tensor | None = None
    tiles: tuple[tuple[float, Part], ...] = ()

    @property
    def without_map(self) -> "Seen":
        """The same without its map, which takes memory."""
        return Seen(self.score, None, self.tiles)


@dataclass(frozen=True)
class SeenPiece:
    """What a head says of an image, or of a tile of it. cells: (rows, columns), each `stride` frame pixels wide."""

    score: float
    cells: Tensor
    stride: int


def pieces_of(head: VerdictHead, features: Features) -> list[SeenPiece]:
    """What a head with maps says of each image or tile of a batch."""
    found = head(features)
    stride = features.frame[0] // found.maps.shape[1]
    return [SeenPiece(score, own, stride) for score, own in zip(found.scores.tolist(), found.maps, strict=True)]


def joined(pieces: Sequence[tuple[SeenPiece, Placement, Part | None]], size: Size, *, maps: bool = True) -> Seen:
    """What a head says of an image of (height, width): the highest score of its tiles, the mean of their maps.

    pieces: with their places; one without a part is all of it. maps: whether to make the map.
    """
    seen = of_tiles([(piece.score, part) for piece, _, part in pieces])
    if not maps:
        return seen
    whole = ((maps_at_original(own.cells[None], own.stride, placed)[0], part) for own, placed, part in pieces)
    return replace(seen, map=stitched_maps(whole, size))


def of_tiles(tiles: Sequence[tuple[float, Part | None]]) -> Seen:
    """What a head says of an image by the scores of its tiles, or by one score without a part."""
    return Seen(max(score for score, _ in tiles), None, tuple((score, part) for score, part in tiles if part))


@torch.inference_mode()
def seen_on_maps(
    cache: Cache, heads: Sequence[VerdictHead], feed: Feed, rows: Rows, unit: Unit, *, maps: bool = True
) -> Iterator[tuple[int, list[Seen]]]:
    """(unit, what each head says of it), in the order of the rows; the maps of one unit are in memory.

    maps: whether to make those of pixels; the heads see features either way.
    """

    def pieces() -> Iterator[tuple[int, tuple[SeenPiece, ...]]]:
        for batch, features in feed(evaluation_batches(rows)):
            yield from zip(
                batch.tolist(), zip(*(pieces_of(head, features) for head in heads), strict=True), strict=True
            )

    of = dict(zip(rows.tolist(), units_of(cache, rows, unit).tolist(), strict=True))
    table = cache.images if unit == "image" else cache.rows
    for number, own in groupby(pieces(), lambda pair: of[pair[0]]):
        parts = [
            (found, (cache.rows.placement(row), cache.rows.part_of(row) if unit == "image" else None))
            for row, found in own
        ]
        size = table.placement(number).original
        yield (
            number,
            [joined([(found[i], *place) for found, place in parts], size, maps=maps) for i in range(len(heads))],
        )


@torch.inference_mode()
def seen_on_vectors(
    cache: Cache, heads: Sequence[VerdictHead], rows: Rows, unit: Unit
) -> Iterator[tuple[int, list[Seen]]]:
    """The same of heads that read one vector per unit, in ascending order of units, without maps."""
    if not len(rows):
        return
    vectors = torch.from_numpy(pooled_vectors(cache, heads[0].levels, unit, rows, quiet=True))
    every = [head(vectors.to(head.get_buffer(head.banks[0]).device)).scores.tolist() for head in heads]
    units = sorted(set(units_of(cache, rows, unit).tolist()))
    for number, *scores in zip(units, *every, strict=True):
        yield number, [Seen(score) for score in scores]


def hand_over(cache: Cache, units: Sequence[int], scores: Sequence[Sequence[float]], unit: Unit, watch: Watch) -> None:
    """Hand a watch the scores of units, (units, heads): of an image as a whole, or of a tile as an object of no class.

    units: the tiles of an image may stand anywhere among them.
    """
    if unit == "image":
        for image, own in zip(units, scores, strict=True):
            for head, score in enumerate(own):
                watch.image_score(head, image, score)
        return
    tiles: dict[int, list[tuple[Instance, Sequence[float]]]] = {}
    for row, own in zip(units, scores, strict=True):
        tiles.setdefault(int(cache.image_of[row]), []).append((_tile(cache, row), own))
    for image, found in tiles.items():
        for head in range(len(found[0][1])):
            watch.objects(head, image, [(instance, own[head]) for instance, own in found])


def _tile(cache: Cache, row: int) -> Instance:
    """A tile as an object of a class that is not known."""
    part = cache.rows.part_of(row)
    assert part is not None  # of a cache of tiles
    left, top = float(part.left), float(part.top)
    return Instance(0, (left, top, left + part.width, top + part.height))
