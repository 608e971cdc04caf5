"""The search for nearest neighbours in a graph: what `neighbours.nearest` finds, for a bank that is part of it."""

import torch
from torch import Tensor, nn

AT_ONCE = 2**22  # distances of one image that are in memory at once


class Nearest(nn.Module):
    """The nearest vectors of a bank by Euclidean distance, nearest first.

    Candidates come from products, which round; their distances are computed from differences. bank: (m, channels).
    count: how many are wanted; at most m are found. queries: of one image, about.
    """

    bank: Tensor
    shift: Tensor
    norms: Tensor

    def __init__(self, bank: Tensor, count: int, queries: int) -> None:
        super().__init__()
        self.count = min(count, len(bank))
        self.block = max(self.count, AT_ONCE // queries)
        shift = bank.float().mean(0)  # products of small numbers round less; distances stay
        self.register_buffer("bank", bank.float())
        self.register_buffer("shift", shift)
        self.register_buffer("norms", (bank.float() - shift).square().sum(1))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distances, float32, and places in the bank, int64, (n, count) each. queries: (n, channels)."""
        moved = queries - self.shift
        best, places = None, None
        for first in range(0, len(self.bank), self.block):
            part = slice(first, first + self.block)
            apart = self.norms[part] - 2 * (moved @ (self.bank[part] - self.shift).T)  # squared, less that of the query
            values, own = self._smallest(apart)
            own = own + first
            if best is not None and places is not None:
                values, own = torch.cat([best, values], 1), torch.cat([places, own], 1)
                values, order = self._smallest(values)
                own = own.gather(1, order)
            best, places = values, own
        assert places is not None  # a bank holds something
        distances = torch.linalg.vector_norm(queries[:, None] - self.bank[places], dim=2)
        distances, order = distances.topk(self.count, 1, largest=False)
        return distances, places.gather(1, order)

    def _smallest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest of each row and their places."""
        if self.count == 1:
            return values.amin(1, keepdim=True), values.argmin(1, keepdim=True)
        found = values.topk(min(self.count, values.shape[1]), 1, largest=False)
        return found.values, found.indices
