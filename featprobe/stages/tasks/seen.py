"""What anomaly heads say of images or tiles, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from featprobe.cache import Cache
from featprobe.image_labels import Unit
from featprobe.probes.head import VerdictHead
from featprobe.probes.train import Feed
from featprobe.probes.verdicts.heat_maps import maps_at_original
from featprobe.specs import Rows
from featprobe.stages.image_truth import units_of
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.stitch import stitched_maps
from featprobe.stages.tasks.task import evaluation_batches


@dataclass(frozen=True)
class Seen:
    """What a head says of a unit. map: (height, width), float32, of its pixels; None for a head without maps."""

    score: float
    map: Tensor | None = None


@dataclass(frozen=True)
class _Piece:
    """A row, and what each head says of it. cells: of each head (rows, columns), None for one without maps.

    stride: frame pixels of a cell.
    """

    row: int
    scores: tuple[float, ...]
    cells: tuple[Tensor | None, ...]
    stride: int


@torch.inference_mode()
def seen_on_maps(
    cache: Cache, heads: Sequence[VerdictHead], feed: Feed, rows: Rows, unit: Unit, *, maps: bool = True
) -> Iterator[tuple[int, list[Seen]]]:
    """(unit, what each head says of it), in the order of the rows; the maps of one unit are in memory.

    An image of tiles has the highest of their scores, and the mean of their maps at a pixel. maps: whether to make
    them; the heads see features either way.
    """
    of = dict(zip(rows.tolist(), units_of(cache, rows, unit).tolist(), strict=True))
    for number, own in groupby(_pieces(heads, feed, rows), lambda piece: of[piece.row]):
        pieces = list(own)
        yield (
            number,
            [
                Seen(max(p.scores[i] for p in pieces), _map(cache, number, unit, pieces, i) if maps else None)
                for i in range(len(heads))
            ],
        )


@torch.inference_mode()
def seen_on_vectors(
    cache: Cache, heads: Sequence[VerdictHead], rows: Rows, unit: Unit
) -> Iterator[tuple[int, list[Seen]]]:
    """The same of heads that read one vector per unit, in ascending order of units, without maps."""
    if not len(rows):
        return
    vectors = torch.from_numpy(pooled_vectors(cache, heads[0].levels, unit, rows, quiet=True))
    every = [head(vectors.to(head.threshold.device)).scores.tolist() for head in heads]
    units = sorted(set(units_of(cache, rows, unit).tolist()))
    for i, number in enumerate(units):
        yield number, [Seen(own[i]) for own in every]


def _pieces(heads: Sequence[VerdictHead], feed: Feed, rows: Rows) -> Iterator[_Piece]:
    for batch, features in feed(evaluation_batches(rows)):
        every = [head(features) for head in heads]
        scores = [own.scores.tolist() for own in every]
        for i, row in enumerate(batch.tolist()):
            cells = tuple(None if own.maps is None else own.maps[i] for own in every)
            height = next((own.shape[0] for own in cells if own is not None), features.frame[0])
            yield _Piece(row, tuple(own[i] for own in scores), cells, features.frame[0] // height)


def _map(cache: Cache, number: int, unit: Unit, pieces: Sequence[_Piece], head: int) -> Tensor | None:
    """The map of a unit by one head, from those of the rows that show it."""
    whole = [
        (maps_at_original(cells[None], piece.stride, cache.rows.placement(piece.row))[0], cache.rows.part_of(piece.row))
        for piece in pieces
        if (cells := piece.cells[head]) is not None
    ]
    if not whole:
        return None
    if unit == "tile":
        return whole[0][0]
    return stitched_maps(whole, cache.images.placement(number).original)
