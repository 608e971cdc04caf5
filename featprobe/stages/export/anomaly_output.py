"""What graphs of anomaly heads on maps give: a score and a map of distances from good images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from featprobe.datasets.images.pixels import Levels
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.kinds import kind_of
from featprobe.probes.head import Anomalies
from featprobe.probes.verdicts.heat_maps import maps_at_original
from featprobe.probes.verdicts.map_heads import MapAnomalyHead
from featprobe.probes.verdicts.patchcore import NEIGHBOURS, PatchCoreHead
from featprobe.stages.export.graph import (
    AtOriginal,
    Differences,
    GraphOutput,
    compared_verdicts,
    largest_of,
    pieces_of_size,
    reference,
    relative,
)
from featprobe.stages.export.image_output import ScoreOutput, threshold_of
from featprobe.stages.export.search import Nearest
from featprobe.stages.findings import Threshold, joined_pixels
from featprobe.stages.predictor import Predictor
from featprobe.stages.tasks.settle import CALLED


class PatchCoreGraph(nn.Module):
    """A PatchCoreHead for images of one placement: which cells hold a part of the image is settled."""

    def __init__(self, head: PatchCoreHead, placement: Placement) -> None:
        super().__init__()
        self.head = head
        self.grid = tuple(-(-side // head.stride) for side in placement.content)
        bank = head.filled("bank")
        self.search = Nearest(bank, 1, self.grid[0] * self.grid[1])
        self.beside = Nearest(bank, NEIGHBOURS, 1)

    def forward(self, features: Features) -> Anomalies:
        """Scores, and maps of the cells that hold a part of the image."""
        head, (rows, columns) = self.head, self.grid
        maps = [
            head.at_finest(avg_pool2d(head.map_of(features, level), 3, 1, 1), features, level) for level in head.levels
        ]
        cells = torch.cat(maps, 1)[:, :, :rows, :columns].flatten(2).transpose(1, 2)  # (batch, cells, channels)
        found, places = self.search(cells.flatten(0, 1))
        distances, places = (own.view(-1, rows * columns) for own in (found, places))
        worst = distances.argmax(1, keepdim=True)
        largest, place = distances.gather(1, worst)[:, 0], places.gather(1, worst)[:, 0]
        cell = cells.gather(1, worst[:, :, None].expand(-1, 1, cells.shape[2]))  # (batch, 1, channels)
        return Anomalies(self._weights(cell, place) * largest, distances.unflatten(1, (rows, columns)))

    def _weights(self, cells: Tensor, places: Tensor) -> Tensor:
        """As `PatchCoreHead` has them: (batch,). cells: (batch, 1, channels)."""
        bank = self.search.bank
        if len(bank) == 1:
            return torch.ones_like(cells[:, 0, 0])
        _, beside = self.beside(bank[places])
        beside = torch.cat([places[:, None], beside[:, 1:]], 1)
        apart = torch.linalg.vector_norm(cells - bank[beside], dim=2)
        return 1 - apart.softmax(1)[:, 0]


class CellGraph(nn.Module):
    """A head on maps that graphs can compute as it is."""

    def __init__(self, head: MapAnomalyHead, placement: Placement) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Features) -> Anomalies:
        """Scores and maps."""
        return self.head.found(features)


IN_GRAPHS: Mapping[type[nn.Module], Callable[[Any, Placement], nn.Module]] = {PatchCoreHead: PatchCoreGraph}
"""Heads that look through a bank -> what computes the same in a graph."""


class HeatOutput(GraphOutput):
    """score (n,): how unlike good images an image is. map (n, height, width): the same of each pixel of the image as it
    is given. Where there is a threshold: verdict (n,), bool, whether the score is above.

    At an operating point of maps the score is the largest value of the map. Where the point has a least area, there is
    no verdict: a graph joins no pixels.
    """

    def __init__(
        self, head: MapAnomalyHead, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
    ) -> None:
        super().__init__()
        self.threshold = threshold or threshold_of(head)
        self.of_map = self.threshold is not None and self.threshold.on_maps
        self.inner = IN_GRAPHS.get(type(head), CellGraph)(head, placement)
        self.pixels = AtOriginal(maps_at_original, head.stride, placement)
        verdicts = self.threshold is not None and self.threshold.in_graphs
        self.names = ("score", "map", "verdict") if verdicts else ("score", "map")

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        found = self.inner(features)
        maps = self.pixels(found.maps)
        score = maps.amax((1, 2)) if self.of_map else found.scores
        return (score, maps, score > self.above) if "verdict" in self.names else (score, maps)

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Scores and verdicts; values of maps are compared relative to the largest of their image."""
        pieces, size = pieces_of_size(predictor, levels)
        batches = iter([(pieces, reference(predictor, levels))])
        seen, judged = zip(*predictor.output.found(batches, [size] * len(levels)), strict=True)
        wanted = np.array([own.score for own in judged])
        maps = np.stack([own.map.numpy() for own in seen])
        apart = np.abs(found["map"] - maps).max((1, 2)) / maps.max((1, 2)).clip(min=1e-30)
        said = {}
        if self.threshold is not None:
            limit = self.threshold
            calls = [joined_pixels(own, None, limit).any() for own in found["map"]] if self.of_map else found["verdict"]
            called = np.array([own.verdict == CALLED for own in judged])
            said = compared_verdicts(np.asarray(calls), called, wanted - self.above)
        return Differences(scores=largest_of(relative(found["score"], wanted), float(apart.max())), **said)


def anomaly_output(
    head: Any, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
) -> GraphOutput:
    """The output of a head on maps, or of one on vectors."""
    pooled = kind_of(card["head"]["task"], card["head"]["kind"]).pooled
    return (ScoreOutput if pooled else HeatOutput)(head, card, placement, threshold)
