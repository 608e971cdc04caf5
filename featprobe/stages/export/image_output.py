"""What graphs of heads that read one vector per image give: probabilities of labels, or an anomaly score."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featprobe.datasets.images.pixels import Levels
from featprobe.errors import ProbeError
from featprobe.features import Features, pool
from featprobe.geometry import Placement
from featprobe.image_labels import names_by
from featprobe.levels import FeatureLevel
from featprobe.metrics.images import decide, defect_scores
from featprobe.probes.head import Anomalies, ImageHead, PooledAnomalyHead
from featprobe.probes.verdicts.anomaly_knn import NEIGHBOURS, AnomalyKnnHead
from featprobe.probes.verdicts.classifiers import KnnClassifier
from featprobe.result_rows import ResultRow
from featprobe.specs import DataInfo
from featprobe.stages.export.graph import (
    Differences,
    GraphOutput,
    compared_logits,
    compared_verdicts,
    largest_of,
    reference,
    relative,
)
from featprobe.stages.export.search import Nearest
from featprobe.stages.findings import Threshold
from featprobe.stages.predictor import Predictor
from featprobe.stages.tasks.classification import probabilities_of


class Vectors(nn.Module):
    """What `features.pool` makes of images of one placement: (batch, 2 * channels of all levels)."""

    def __init__(self, levels: Sequence[FeatureLevel], placement: Placement) -> None:
        super().__init__()
        self.levels, self.content = tuple(levels), placement.content
        whole = placement.content == placement.frame
        for level in self.levels:
            content = torch.tensor([placement.content])
            share = Features({"": torch.zeros(1, 1, *level.cells(placement.frame))}, placement.frame, content)
            self.register_buffer(f"share_{level.name}", None if whole else share.valid_share(level.stride))

    def forward(self, features: Features) -> Tensor:
        """Mean, then maximum, level by level."""
        found = []
        for level in self.levels:
            rows, columns = (-(-side // level.stride) for side in self.content)
            x = features.maps[level.name][:, :, :rows, :columns]
            share: Tensor | None = self.get_buffer(f"share_{level.name}")
            weighted = x if share is None else x * share[:, :rows, :columns]
            cells = self.content[0] * self.content[1] / level.stride**2
            found += [weighted.sum((2, 3)) / cells, x.amax((2, 3))]
        return torch.cat(found, 1)


class NearestLabels(nn.Module):
    """A KnnClassifier, whose number of neighbours is settled."""

    votes: Tensor

    def __init__(self, head: KnnClassifier) -> None:
        super().__init__()
        self.head, self.multi = head, bool(head.multi)
        self.search = Nearest(head.bank, int(head.neighbours), 1)
        self.register_buffer("votes", head.votes.float())

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, (images, labels)."""
        standard = nn.functional.normalize(self.head.standardised(vectors), eps=1e-30)
        _, places = self.search(standard)
        share = (self.votes[places].sum(1) + self.head.prior) / (places.shape[1] + 1)
        limits = torch.finfo(share.dtype)
        share = share.clamp(min=limits.tiny)
        if not self.multi:
            return share.log()
        share = share.clamp(limits.eps, 1 - limits.eps)
        return (share / (1 - share)).log()


class NearestImages(nn.Module):
    """An AnomalyKnnHead."""

    def __init__(self, head: AnomalyKnnHead) -> None:
        super().__init__()
        self.head, self.search = head, Nearest(head.bank, NEIGHBOURS, 1)

    def forward(self, vectors: Tensor) -> Anomalies:
        """Mean distances."""
        distances, _ = self.search((vectors - self.head.mean) * self.head.scale)
        return Anomalies(distances.mean(1))


IN_GRAPHS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    KnnClassifier: NearestLabels,
    AnomalyKnnHead: NearestImages,
}
"""Heads that look through a bank -> what computes the same in a graph. Others are taken as they are."""


def in_graph(head: nn.Module) -> nn.Module:
    """A head in the operators of graphs."""
    return IN_GRAPHS.get(type(head), lambda own: own)(head)


class LabelOutput(GraphOutput):
    """Labels of an image, or of a tile where heads judge tiles.

    probabilities (n, labels). decided (n, labels), uint8: which labels are said to hold. logits (n, labels). Where
    labels say what is good: score (n,), how surely it is not good; where there is a threshold for it: verdict (n,),
    bool, whether the score is above.
    """

    def __init__(
        self, head: ImageHead, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
    ) -> None:
        super().__init__()
        check_unit(card)
        settings = ResultRow.from_json(card["result"]).settings
        if settings is None or settings.labels is None:
            raise ProbeError("The card of this head does not say which labels it was trained on. Train it again.")
        data = DataInfo.from_json(card["data"])
        self.labels = names_by(settings.labels, data.label_names, data.classes)
        self.good = None if self.labels.good is None else self.labels.names.index(self.labels.good)
        self.threshold = threshold or threshold_of(head)
        self.vectors, self.inner = Vectors(head.levels, placement), in_graph(head)
        self.register_buffer("prior", head.prior.clone())
        scores = ("score", "verdict")[: 2 if self.limit is not None else 1] if self.labels.says_good else ()
        self.names = ("probabilities", "decided", *scores, "logits")

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        logits = self.inner(self.vectors(features))
        shares = logits.sigmoid() if self.labels.multi else logits.softmax(1)
        found = [shares, self._decided(shares)]
        if self.labels.says_good:
            found.append(shares.amax(1) if self.good is None else 1 - shares[:, self.good])
            found += [] if self.limit is None else [found[-1] > self.above]
        return *found, logits

    def _decided(self, shares: Tensor) -> Tensor:
        """What `metrics.images.decide` decides."""
        prior = self.get_buffer("prior")
        lift = torch.where(prior > 0, shares / prior.clamp(min=1e-30), 0.0)
        if self.labels.multi:
            return ((lift >= 1) | (prior >= 1)).to(torch.uint8)
        best = lift.argmax(1, keepdim=True)
        return (torch.arange(lift.shape[1]) == best).to(torch.uint8)

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Logits and scores; a label that is decided otherwise counts as an object that differs."""
        head: Any = predictor.head
        logits = head(pool(reference(predictor, levels), head.levels).vectors(head.levels))
        shares = probabilities_of(logits, self.labels)
        decided = decide(shares, head.prior.numpy(), self.labels.multi)
        said: dict[str, Any] = {"objects": decided.size, "equal_objects": int((decided == found["decided"]).sum())}
        wanted = defect_scores(shares, self.labels.multi, self.good)
        scores: float | None = relative(found["probabilities"], shares)
        if wanted is not None:
            scores = largest_of(scores, relative(found["score"], wanted))
            if self.limit is not None:
                said |= compared_verdicts(found["verdict"], wanted > self.above, wanted - self.above)
        return Differences(**compared_logits(found["logits"], logits.numpy()), scores=scores, **said)


class ScoreOutput(GraphOutput):
    """score (n,): how unlike good images an image is, or a tile where heads judge tiles. Where there is a threshold:
    verdict (n,), bool, whether the score is above."""

    def __init__(
        self, head: PooledAnomalyHead, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
    ) -> None:
        super().__init__()
        check_unit(card)
        self.threshold = threshold or threshold_of(head)
        self.vectors, self.inner = Vectors(head.levels, placement), in_graph(head)
        self.names = ("score",) if self.limit is None else ("score", "verdict")

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        score = self.inner(self.vectors(features)).scores
        return (score,) if self.limit is None else (score, score > self.above)

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Scores and verdicts."""
        head = predictor.head
        wanted = head(pool(reference(predictor, levels), head.levels).vectors(head.levels)).scores.double().numpy()
        said = {}
        if self.limit is not None:
            said = compared_verdicts(found["verdict"], wanted > self.above, wanted - self.above)
        return Differences(scores=relative(found["score"], wanted), **said)


def threshold_of(head: Any) -> Threshold | None:
    """The threshold that a head keeps; None where it has none."""
    own = Threshold.of_head(float(head.threshold))
    return None if own.source == "none" else own


def check_unit(card: Mapping[str, Any]) -> None:
    """Raise ProbeError for a head that joins the features of all tiles of an image before it judges it."""
    settings = ResultRow.from_json(card["result"]).settings
    if card["features"].get("tile") is not None and (settings is None or settings.unit == "image"):
        raise ProbeError(
            "This head pools the features of all tiles of an image, and a graph sees one tile. Nothing was written.\n"
            "Train one on tiles, --unit tile, or on a cache of whole images."
        )
