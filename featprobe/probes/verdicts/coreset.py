"""The choice of few cells that stand for many: a bounded draw, a random projection, the greedy k-centre."""

import math

import numpy as np
import torch
from torch import Tensor

from featprobe.probes import execution
from featprobe.probes.verdicts.neighbours import AT_ONCE, AT_ONCE_WIDE

EPSILON = 0.9  # of the Johnson-Lindenstrauss lemma, as PatchCore has it
MOST_DRAWN_BYTES = 2**29  # of projected cells in memory
ACTIVE_SHARE, FEWEST_ACTIVE = 32, 1024
"""One point of so many, and at least so many, are kept up to date with every centre."""


def projected_columns(cells: int) -> int:
    """Columns of a random projection that keeps all distances of so many cells within 1 ± EPSILON.

    Johnson and Lindenstrauss, with the constant of Dasgupta and Gupta (2003).

    >>> projected_columns(204_800)
    301
    """
    return int(4 * math.log(max(2, cells)) / (EPSILON**2 / 2 - EPSILON**3 / 3))


class Draw:
    """Cells drawn from a stream, each with the same chance, projected to few columns where that makes them fewer.

    While all fit into memory, all are kept. Else each stays with the same chance, which halves whenever they
    do not fit. The draw depends on the seed and the order of the cells, not on how they are cut into batches.

    channels: of a cell. most: bytes of the projected cells.
    """

    def __init__(self, channels: int, seed: int, device: torch.device, most: int = MOST_DRAWN_BYTES) -> None:
        self.random = np.random.default_rng([seed, 0])
        columns = projected_columns(most // (4 * min(channels, projected_columns(2**24))))
        self.projection: Tensor | None = None
        if columns < channels:
            normal = np.random.default_rng([seed, 1]).standard_normal((channels, columns))
            self.projection = torch.from_numpy(normal / math.sqrt(columns)).float().to(device)
        self.most = most // (4 * min(channels, columns))  # cells
        self._values = torch.empty(self.most, min(channels, columns), device=device)
        self._places = torch.empty(self.most, dtype=torch.int64, device=device)
        self._keys = np.empty(self.most)
        self.kept, self.seen, self.chance = 0, 0, 1.0

    @property
    def values(self) -> Tensor:
        """The projected cells that were drawn: (drawn, columns), float32."""
        return self._values[: self.kept]

    @property
    def places(self) -> Tensor:
        """Their places in the stream: (drawn,), int64, ascending."""
        return self._places[: self.kept]

    def add(self, cells: Tensor) -> None:
        """Draw from the next cells of the stream. cells: (n, channels), float32."""
        keys = self.random.random(len(cells))
        place = np.arange(self.seen, self.seen + len(cells))
        self.seen += len(cells)
        taken = np.flatnonzero(keys < self.chance)
        while len(taken):
            fitting = taken[: self.most - self.kept]
            self._keep(cells, keys, place, fitting)
            taken = taken[len(fitting) :]
            if len(taken):
                self._halve()
                taken = taken[keys[taken] < self.chance]

    def _keep(self, cells: Tensor, keys: np.ndarray, place: np.ndarray, taken: np.ndarray) -> None:
        own = cells if len(taken) == len(cells) else cells[torch.from_numpy(taken).to(cells.device)]
        into = slice(self.kept, self.kept + len(taken))
        self._values[into] = own if self.projection is None else own @ self.projection
        self._places[into] = torch.from_numpy(place[taken])
        self._keys[into] = keys[taken]
        self.kept += len(taken)

    def _halve(self) -> None:
        self.chance /= 2
        staying = np.flatnonzero(self._keys[: self.kept] < self.chance)
        index = torch.from_numpy(staying).to(self._values.device)
        for first in range(0, len(staying), 2**16):  # a place never moves up, so that no value is lost
            part = slice(first, min(first + 2**16, len(staying)))
            self._values[part], self._places[part] = self._values[index[part]], self._places[index[part]]
        self._keys[: len(staying)] = self._keys[staying]
        self.kept = len(staying)


@torch.no_grad()
def farthest_first(points: Tensor, count: int, start: int) -> Tensor:
    """The greedy k-centre: from `start` on, always the point that is farthest from all chosen ones.

    points: (n, columns), float32 or float64; they are moved in place, so that their mean is 0. Returns `count` of their
    indices in the order of choice, int64, no index twice.

    A point's distance to the nearest chosen one can only fall, so an old distance is an upper bound. Few points, those
    of the largest bounds, are kept up to date; the others are looked at again, with all new centres in one product,
    only when the best of the few falls below what one of the others may have. The choice is that of comparing every
    point with every centre.
    """
    count = min(count, len(points))
    points -= points.mean(0)
    norms = points.square().sum(1)
    bounds = torch.full_like(norms, torch.inf)  # squared distances
    chosen = torch.full((count,), start, dtype=torch.int64, device=points.device)
    few = min(len(points), max(FEWEST_ACTIVE, len(points) // ACTIVE_SHARE))
    known, number = 0, 1
    while number < count:
        _lower(bounds, points, norms, chosen[known:number])
        bounds[chosen[:number]] = -1
        known = number
        top = bounds.topk(few)
        active, own = top.indices, top.values
        others = float(own[-1]) if few < len(points) else -torch.inf
        near, own_norms = points[active], norms[active]
        while number < count:
            best = own.argmax()
            if float(own[best]) < others:
                break
            chosen[number] = active[best]
            number += 1
            apart = torch.addmv(own_norms, near, near[best], alpha=-2).add_(own_norms[best]).clamp_(min=0)
            torch.minimum(own, apart, out=own)
            own[best] = -1
    return chosen


def _lower(bounds: Tensor, points: Tensor, norms: Tensor, centres: Tensor) -> None:
    """Lower bounds to the squared distances to some centres where these are nearer. centres: indices of points."""
    at_once = AT_ONCE_WIDE if execution.whole_batches(points.device) else AT_ONCE
    for some in centres.split(2**10):
        own, own_norms = points[some].T.contiguous(), norms[some]
        rows = max(1, at_once // len(some))
        for first in range(0, len(points), rows):
            part = slice(first, first + rows)
            apart = torch.addmm(own_norms, points[part], own, alpha=-2).amin(1).add_(norms[part]).clamp_(min=0)
            torch.minimum(bounds[part], apart, out=bounds[part])
