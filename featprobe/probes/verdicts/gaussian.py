"""One Gaussian per level over the cells of good images: the Mahalanobis distance of each cell.

Rippel, Mertens and Merhof, Modeling the distribution of normal data in pre-trained deep features for anomaly detection,
ICPR 2020, here for cells and not for images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.head import Anomalies, Fit
from featprobe.probes.verdicts.map_heads import MapAnomalyHead, Passes

SMALLEST = 1e-12  # variance, of channels that never change


class CellSums:
    """Number, sum and products of cells, from which mean and covariance follow: float64, (channels, channels)."""

    def __init__(self, channels: int, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.number = 0
        self.total = torch.zeros(channels, dtype=wide, device=device)
        self.products = torch.zeros(channels, channels, dtype=wide, device=device)
        self.origin = torch.zeros(channels, dtype=wide, device=device)

    def add(self, cells: Tensor) -> None:
        """cells: (n, channels). The first ones give the origin, so that little is lost in the difference of squares."""
        if not len(cells):
            return
        wide = cells.to(self.total.dtype)
        if not self.number:
            self.origin = wide.mean(0)
        wide = wide - self.origin
        self.number += len(cells)
        self.total += wide.sum(0)
        self.products.addmm_(wide.T, wide)

    def mean(self) -> Tensor:
        """(channels,)."""
        return self.origin + self.total / self.number

    def covariance(self) -> tuple[Tensor, float]:
        """The covariance, shrunk towards a multiple of the identity, and by how much, in [0, 1].

        The share is that of the oracle approximating estimator: Chen, Wiesel, Eldar and Hero, Shrinkage algorithms for
        MMSE covariance estimation, 2010, as scikit-learn's OAS has it.
        """
        mean, size = self.total / self.number, len(self.total)
        found = self.products / self.number - torch.outer(mean, mean)
        level, square = float(found.diagonal().mean()), float(found.square().mean())
        apart = (self.number + 1) * (square - level**2 / size)
        share = 1.0 if apart <= 0 else min(1.0, (square + level**2) / apart)
        shrunk = found * (1 - share)
        shrunk.diagonal().add_(share * level + SMALLEST)
        return shrunk, share


class GaussianHead(MapAnomalyHead):
    """The Mahalanobis distance of each cell under a Gaussian in which levels are independent.

    That is the root of the sum over the levels of squared distances, those of coarser levels taken bilinearly at the
    finest; it is divided by the root of all channels, so that a cell like those of good images has a value near 1. A
    level has a say as its channels are many; the largest distance of a level would leave it to the noisiest. The score
    of an image is the largest value of its map.

    mean_LEVEL: (channels,). whitening_LEVEL: (channels, channels), which turns a difference from the mean into numbers
    whose square sum is the squared distance over all channels.
    """

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__(levels)
        for level in self.levels:
            self.register_buffer(f"mean_{level.name}", torch.zeros(level.channels))
            self.register_buffer(f"whitening_{level.name}", torch.zeros(0, level.channels))
        self.banks = (*self.banks, *(f"whitening_{level.name}" for level in self.levels))

    @torch.no_grad()
    def fit(self, passes: Passes, seed: int, *, coreset: float = 0.01, remove_position: bool = False) -> Fit:
        """Estimate the Gaussians: one pass over good images, and one for the mean map.

        seed, coreset: of no effect. Raises ProbeError where there is no good image.
        """
        self.fit_position(passes, remove=remove_position)
        sums = {level.name: CellSums(level.channels, self.frame.device) for level in self.levels}
        for features in self.each(passes()):
            for level in self.levels:
                x = self.map_of(features, level)
                sums[level.name].add(x.movedim(1, -1)[self.inside(features, level)])
        if not all(own.number for own in sums.values()):
            raise ProbeError("There is no good image to train on.")
        shares = {}
        for level in self.levels:
            covariance, shares[level.name] = sums[level.name].covariance()
            whitening = _inverse_root(covariance) / sum(own.channels for own in self.levels) ** 0.5
            self.put(f"mean_{level.name}", sums[level.name].mean())
            self.put(f"whitening_{level.name}", whitening)
        return Fit({"cells": sums[self.levels[0].name].number, "shrinkage": shares}, [])

    def found(self, features: Features) -> Anomalies:
        """Distances of the cells, and the largest of each image."""
        inside = self.inside(features, self.levels[0])
        maps = self.frame.new_zeros(inside.shape, dtype=torch.float32)
        for level in self.levels:
            x = self.map_of(features, level)
            mean, whitening = self.get_buffer(f"mean_{level.name}"), self.filled(f"whitening_{level.name}")
            moved = torch.einsum("oc,bcn->bon", whitening, x.flatten(2) - mean[:, None])
            own = moved.square().sum(1).unflatten(1, tuple(x.shape[2:]))
            maps += self.at_finest(own[:, None], features, level)[:, 0]
        maps = maps.sqrt().masked_fill(~inside, 0)
        return Anomalies(maps.flatten(1).amax(1), maps)


def _inverse_root(covariance: Tensor) -> Tensor:
    """The inverse of the lower triangular root: its product with a vector has the squared Mahalanobis distance."""
    root = torch.linalg.cholesky(covariance)
    ones = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, ones, upper=False)
