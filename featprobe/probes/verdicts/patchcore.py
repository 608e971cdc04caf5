"""PatchCore: the distance of each cell to the nearest of few cells that stand for all those of good images.

Roth et al., Towards total recall in industrial anomaly detection, CVPR 2022. Details follow anomalib 2.7.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from featprobe.errors import ProbeError, counted
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.head import Anomalies, Fit
from featprobe.probes.verdicts.coreset import Draw, farthest_first
from featprobe.probes.verdicts.map_heads import MapAnomalyHead, Passes
from featprobe.probes.verdicts.neighbours import nearest

NEIGHBOURS = 9  # of the bank, that decide how much the score of an image weighs
MOST_BANK_BYTES = 2**30


class PatchCoreHead(MapAnomalyHead):
    """Cells of several levels, each averaged over 3x3 cells, against a bank of cells of good images.

    bank: (examples, channels of all levels). Averages count cells outside of the image as 0, as anomalib's do.
    """

    bank: Tensor

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__(levels)
        self.register_buffer("bank", torch.zeros(0, sum(level.channels for level in self.levels)))
        self.banks = (*self.banks, "bank")

    def cells_of(self, features: Features) -> tuple[Tensor, Tensor]:
        """The cells that hold a part of an image: (cells, channels of all levels), float32, image by image.

        Beside them which cells of the grid these are, (batch, rows, columns), bool.
        """
        maps = [
            self.at_finest(avg_pool2d(self.map_of(features, level), 3, 1, 1), features, level) for level in self.levels
        ]
        inside = self.inside(features, self.levels[0])
        return torch.cat(maps, 1).movedim(1, -1)[inside], inside

    @torch.no_grad()
    def fit(self, passes: Passes, seed: int, *, coreset: float = 0.01, remove_position: bool = False) -> Fit:
        """Choose the bank among the cells of good images: two passes over them, and one for the mean map.

        seed: decides the projection, the first cell, and the draw where cells are drawn. coreset: the share of the
        cells that the bank holds, in (0, 1]. Raises ProbeError where there is no good image.
        """
        self.fit_position(passes, remove=remove_position)
        draw = Draw(self.bank.shape[1], seed, self.bank.device)
        for features in self.each(passes()):
            draw.add(self.cells_of(features)[0])
        if not draw.kept:
            raise ProbeError("There is no good image to train on.")
        row_bytes = 4 * self.bank.shape[1]
        wanted = max(1, int(draw.kept * coreset))
        size = min(wanted, max(1, MOST_BANK_BYTES // row_bytes))
        start = int(np.random.default_rng([seed, 2]).integers(draw.kept))
        chosen = draw.places[farthest_first(draw.values, size, start)]
        kept, seen, columns = draw.kept, draw.seen, draw.values.shape[1]
        del draw
        self.put("bank", self._collected(passes, chosen))
        notes = []
        if kept < seen:
            notes.append(
                f"of {counted(seen, 'cell')} of good images {kept} were drawn at random, as many as memory may hold; "
                f"the bank has {coreset:.3g} of these"
            )
        if size < wanted:
            notes.append(f"the bank holds {size} cells, not {wanted}: it may take {MOST_BANK_BYTES >> 20} MiB")
        said = {"cells": seen, "drawn": kept, "columns": columns, "bank": size, "bank_bytes": size * row_bytes}
        return Fit(said, notes)

    def _collected(self, passes: Passes, places: Tensor) -> Tensor:
        """The cells at some places of the stream of all cells, in their order: (places, channels)."""
        order = places.argsort()
        ascending = places[order]
        found = self.bank.new_empty(len(places), self.bank.shape[1])
        first = 0
        for features in self.each(passes()):
            cells = self.cells_of(features)[0]
            begin, end = torch.searchsorted(ascending, places.new_tensor([first, first + len(cells)])).tolist()
            found[order[begin:end]] = cells[ascending[begin:end] - first]
            first += len(cells)
        return found

    def found(self, features: Features) -> Anomalies:
        """Distances of the cells; the score of an image is the largest, weighted by its neighbourhood in the bank.

        The weight is that of the paper: 1 less the share of the nearest in the softmax of the distances to its
        NEIGHBOURS nearest in the bank. It is near 1 where the nearest of the bank lies among others.
        """
        cells, inside = self.cells_of(features)
        distances, places = nearest(cells, self.filled("bank"), 1)
        maps = self.bank.new_zeros(inside.shape)
        maps[inside] = distances[:, 0]
        number = self.bank.new_full(inside.shape, -1, dtype=torch.int64)
        number[inside] = torch.arange(len(cells), device=number.device)
        flat = maps.masked_fill(~inside, -1).flatten(1)
        worst = number.flatten(1).gather(1, flat.argmax(1, keepdim=True))[:, 0]  # (batch,), places among the cells
        return Anomalies(self._weights(cells[worst], places[worst, 0]) * distances[worst, 0], maps)

    def _weights(self, cells: Tensor, places: Tensor) -> Tensor:
        """(batch,), in [0, 1). cells: the worst of each image. places: of what is nearest to them in the bank."""
        if len(self.bank) == 1:
            return cells.new_ones(len(cells))
        _, beside = nearest(self.bank[places], self.bank, NEIGHBOURS)
        beside[:, 0] = places  # also where another example is the same
        apart = torch.linalg.vector_norm(cells[:, None] - self.bank[beside], dim=2)
        return 1 - apart.softmax(1)[:, 0]
