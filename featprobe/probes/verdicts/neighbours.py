"""Exact search for nearest neighbours, in blocks of bounded memory."""

import torch
from torch import Tensor

from featprobe.probes import execution

AT_ONCE, AT_ONCE_WIDE = 2**21, 2**26
"""Distances that are in memory at once: in pieces that fit a CPU's caches, or in few large operations."""
MOST_BESIDE = 2**13  # vectors of the bank in one block


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest vectors of a bank by Euclidean distance, nearest first.

    queries: (n, channels). bank: (m, channels), m >= 1. count: how many are wanted; at most m are found.
    Returns (distances, float32; places in the bank, int64), each (n, count). Candidates come from products, which
    round; their distances are then computed from differences, so that a vector of the bank is at distance 0 of itself.
    """
    count = min(count, len(bank))
    queries, bank = queries.float(), bank.float()
    shift = bank.mean(0)  # products of small numbers round less; distances stay
    centred = bank - shift
    norms = centred.square().sum(1)
    at_once = AT_ONCE_WIDE if execution.whole_batches(bank.device) else AT_ONCE
    rows = max(1, min(at_once // min(len(bank), MOST_BESIDE), at_once // (count * bank.shape[1])))
    found = [_of_block(own - shift, own, bank, centred, norms, count) for own in queries.split(rows)]
    if not found:
        return queries.new_zeros(0, count), torch.zeros(0, count, dtype=torch.int64, device=queries.device)
    distances, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, places


def _of_block(
    moved: Tensor, queries: Tensor, bank: Tensor, centred: Tensor, norms: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`nearest` of a few queries. moved: the same, centred as the bank is."""
    best, places = None, None
    for first in range(0, len(bank), MOST_BESIDE):
        part = slice(first, first + MOST_BESIDE)
        apart = torch.addmm(norms[part], moved, centred[part].T, alpha=-2)  # squared, less that of the query
        values, own = _smallest(apart, min(count, apart.shape[1]))
        own += first
        if best is not None and places is not None:
            values, own = torch.cat([best, values], 1), torch.cat([places, own], 1)
            values, order = _smallest(values, min(count, values.shape[1]))
            own = own.gather(1, order)
        best, places = values, own
    assert places is not None
    distances = torch.linalg.vector_norm(queries[:, None] - bank[places], dim=2)
    distances, order = distances.sort(dim=1, stable=True)
    return distances, places.gather(1, order)


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest of each row and their places; of one alone a search takes a quarter of the time."""
    if count == 1:
        found = values.min(1, keepdim=True)
        return found.values, found.indices
    top = values.topk(count, 1, largest=False, sorted=False)
    return top.values, top.indices
