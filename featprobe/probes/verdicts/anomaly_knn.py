"""The distance of an image's pooled features to those of the nearest good images."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from featprobe.errors import ProbeError, counted
from featprobe.levels import FeatureLevel
from featprobe.probes.head import Anomalies, Fit, PooledAnomalyHead
from featprobe.probes.verdicts.neighbours import nearest

NEIGHBOURS = 2
"""Good images whose mean distance counts: Bergman, Cohen and Hoshen, Deep nearest neighbor anomaly detection, 2020."""
SMALLEST = 1e-6  # standard deviation of a value that counts


class AnomalyKnnHead(PooledAnomalyHead):
    """The mean Euclidean distance to the NEIGHBOURS nearest good images, each value standardised.

    It is divided by the root of the number of values: two good images have a distance near the root of 2.

    bank: (good images, values), standardised. mean, scale: (values,), of the good images; scale is one over their
    standard deviation, and 0 for a value that does not change.
    """

    bank: Tensor
    mean: Tensor
    scale: Tensor
    banks = ("bank",)

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.classes = 2
        values = 2 * sum(level.channels for level in self.levels)
        self.register_buffer("bank", torch.zeros(0, values))
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("scale", torch.zeros(values))

    @torch.no_grad()
    def fit(self, passes: Callable[[], Iterable[Tensor]], seed: int) -> Fit:
        """Keep the good images. passes: gives their vectors, (images, values) each. seed: of no effect.

        Raises ProbeError where there are none.
        """
        parts = [own.to(self.bank, copy=True) for own in passes()]
        if not sum(map(len, parts)):
            raise ProbeError("There is no good image to train on.")
        vectors = torch.cat(parts)
        wide = vectors.to(torch.float32 if vectors.device.type == "mps" else torch.float64)
        spread = wide.std(0, correction=0)
        self.mean.copy_(wide.mean(0))
        self.scale.copy_(torch.where(spread > SMALLEST, spread.reciprocal(), 0) / vectors.shape[1] ** 0.5)
        self.bank = (vectors - self.mean) * self.scale
        notes = []
        if len(vectors) <= NEIGHBOURS:
            notes.append(f"{counted(len(vectors), 'good image')} to compare with: no distance can be trusted")
        return Fit({"bank": len(vectors), "bank_bytes": 4 * self.bank.numel()}, notes)

    def forward(self, vectors: Tensor) -> Anomalies:
        """Mean distances to the nearest good images."""
        if not len(self.bank):
            raise ProbeError("This head knows no good image: its bank is empty. Train it again.")
        distances, _ = nearest((vectors.float() - self.mean) * self.scale, self.bank, NEIGHBOURS)
        return Anomalies(distances.mean(1))
