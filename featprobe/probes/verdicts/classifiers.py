"""Heads that give each image a label, or several, from its pooled features: a linear one, and nearest neighbours."""

from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.levels import FeatureLevel
from featprobe.probes.head import ImageHead
from featprobe.probes.verdicts.logistic import Path, Solution, choose, standard
from featprobe.probes.verdicts.neighbours import nearest

NEIGHBOURS = (1, 3, 5, 9, 17, 33)
"""Numbers of neighbours that are tried."""


class StandardisedHead(ImageHead):
    """What heads for labels have in common: each value is standardised with mean and deviation of training images.

    mean, scale: (values,); the scale is one over the standard deviation, and 0 for a value that does not change.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, levels: Sequence[FeatureLevel], classes: int) -> None:
        super().__init__()
        self.levels, self.classes = tuple(levels), classes
        self.values = 2 * sum(level.channels for level in self.levels)
        self.register_buffer("mean", torch.zeros(self.values))
        self.register_buffer("scale", torch.zeros(self.values))
        self.register_buffer("prior", torch.full((classes,), 1 / max(classes, 2)))

    def standardised(self, vectors: Tensor) -> Tensor:
        """(images, values), of mean 0 and variance 1 over the training images."""
        return (vectors.float() - self.mean) * self.scale

    @torch.no_grad()
    def _settle_on(self, vectors: Tensor, labels: Tensor) -> None:
        """Take mean, scale and prior from training images."""
        mean, scale = standard(vectors)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.prior.copy_(labels.float().mean(0))


class LinearClassifier(StandardisedHead):
    """Logistic regression on standardised features: solved for where they are stored, trained with a live backbone.

    weight: (classes, values). bias: (classes,).
    """

    def __init__(self, levels: Sequence[FeatureLevel], classes: int) -> None:
        super().__init__(levels, classes)
        self.weight = nn.Parameter(torch.zeros(classes, self.values))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, (images, classes)."""
        return nn.functional.linear(self.standardised(vectors), self.weight, self.bias)

    def begin(self, vectors: Tensor, labels: Tensor, *, multi: bool) -> None:
        """Begin by predicting how frequent the labels are; one that no training image has counts as half of one."""
        self._settle_on(vectors, labels)
        least = 0.5 / max(len(labels), 1)
        share = self.prior.clamp(least, 1 - least)
        with torch.no_grad():
            self.bias.copy_(share.logit() if multi else share.log())
            self.weight.zero_()

    @torch.no_grad()
    def solve(
        self, vectors: Tensor, labels: Tensor, val: Tensor, score: Callable[[Tensor], float], *, multi: bool
    ) -> dict[str, Any]:
        """The solution that scores highest: see `logistic.choose`, also for what is returned."""
        self._settle_on(vectors, labels)
        path = Path(vectors, labels, self.mean, self.scale, multi=multi)

        def scored(solution: Solution) -> float:
            self._take(solution)
            return score(self(val))

        solution, chosen = choose(path, scored)
        self._take(solution)
        return chosen

    def _take(self, solution: Solution) -> None:
        self.weight.copy_(solution.weight)
        self.bias.copy_(solution.bias)


class KnnClassifier(StandardisedHead):
    """The labels of the training images that are most alike: cosine of standardised features, exact search.

    A label's probability is the share of the nearest images that have it, with the prior as one more of them.

    bank: (training images, values), standardised, of length 1. votes: (training images, classes), 1 where a label
    holds. neighbours: how many are asked, a scalar. multi: whether images may have several labels, a scalar.
    """

    bank: Tensor
    votes: Tensor
    neighbours: Tensor
    multi: Tensor
    banks = ("bank", "votes")

    def __init__(self, levels: Sequence[FeatureLevel], classes: int) -> None:
        super().__init__(levels, classes)
        self.register_buffer("bank", torch.zeros(0, self.values))
        self.register_buffer("votes", torch.zeros(0, classes, dtype=torch.uint8))
        self.register_buffer("neighbours", torch.tensor(NEIGHBOURS[0]))
        self.register_buffer("multi", torch.tensor(False))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, (images, classes): of the shares of the nearest training images."""
        if not len(self.bank):
            raise ProbeError("This head knows no training image: its bank is empty. Train it again.")
        return self._logits(self._nearest(vectors, int(self.neighbours)), int(self.neighbours))

    def begin(self, vectors: Tensor, labels: Tensor, *, multi: bool) -> None:
        """Raises ProbeError: neighbours are looked up in stored features."""
        raise ProbeError("Nearest neighbours can't be trained with a backbone. Take the head linear.")

    @torch.no_grad()
    def solve(
        self, vectors: Tensor, labels: Tensor, val: Tensor, score: Callable[[Tensor], float], *, multi: bool
    ) -> dict[str, Any]:
        """Keep the training images; how many neighbours are asked is chosen on validation, the most of equals.

        score: nan counts as worst. Returns the number that was chosen, how many were tried, and the bank's images and
        bytes.
        """
        self._settle_on(vectors, labels)
        self.multi.fill_(multi)
        self.bank = self._of_length_1(vectors)
        self.votes = labels.to(self.bank.device, torch.uint8)
        tried = [count for count in NEIGHBOURS if count <= len(self.bank)]
        found = self._nearest(val, max(tried))
        scores = [score(self._logits(found, count)) for count in tried]
        best = max(range(len(tried)), key=lambda place: (-inf if isnan(scores[place]) else scores[place], place))
        self.neighbours.fill_(tried[best])
        size = self.bank.numel() * self.bank.element_size()
        return {"neighbours": tried[best], "tried": len(tried), "bank": len(self.bank), "bank_bytes": size}

    def _of_length_1(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(self.standardised(vectors), eps=1e-30)

    def _nearest(self, vectors: Tensor, count: int) -> Tensor:
        """Labels of the nearest training images, nearest first: (images, neighbours, classes), float32."""
        _, places = nearest(
            self._of_length_1(vectors), self.bank, count
        )  # on the sphere the order is that of the cosine
        return self.votes[places].float()

    def _logits(self, found: Tensor, count: int) -> Tensor:
        asked = found[:, :count]
        share = (asked.sum(1) + self.prior) / (asked.shape[1] + 1)
        share = share.clamp(min=torch.finfo(share.dtype).tiny)
        return share.logit(torch.finfo(share.dtype).eps) if self.multi else share.log()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *more)
        if len(self.bank) != len(self.votes):
            more[-1].append(f"{len(self.bank)} images in the bank, labels of {len(self.votes)}")
        if self.neighbours < 1:
            more[-1].append(f"{int(self.neighbours)} neighbours")
