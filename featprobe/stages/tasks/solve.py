"""Heads that are solved in closed form, and not trained: one pass over the training cells, a choice on validation."""

import torch

from featprobe.probes import DenseHead
from featprobe.probes.ridge import STRENGTHS, RidgeSums, choose
from featprobe.specs import Rows
from featprobe.stages.memory import Batches
from featprobe.stages.tasks.segmentation import Segmentation
from featprobe.stages.tasks.task import Solution, evaluation_batches

MOST_LOGITS = 1_000_000  # of validation cells that ridge's strengths and offsets are chosen on


def solve(task: Segmentation, head: DenseHead, seed: int, batches: Batches, train: Rows, val: Rows) -> Solution:
    """Ridge regression of the class shares of the training cells, its strength and offsets chosen on validation.

    head: of which the levels are taken. seed: of no effect. batches: gives features of rows. One process computes it.
    """
    levels = head.levels
    stride = levels[0].stride
    weights = task.weights(stride)
    ones = torch.ones(len(task.classes), device=task.device)
    sums = RidgeSums(levels, len(task.classes), ones if weights is None else weights)
    shares = task.shares(train, stride)
    for rows, features in batches(evaluation_batches(train)):
        sums.add(features, shares(rows))
    solved = sums.solve()

    shares = task.shares(val, stride)
    scored = ((features, shares(rows)) for rows, features in batches(evaluation_batches(val)))
    cells = levels[0].cells(task.cache.recipe.frame)
    step = -(-len(val) * cells[0] * cells[1] * len(task.classes) // MOST_LOGITS)
    index, offsets, _ = choose(solved, scored, step)
    with torch.no_grad():
        solved[index].bias.add_(offsets)
    state = {name: value.cpu() for name, value in solved[index].state_dict().items()}
    return Solution(state, {"strength": STRENGTHS[index], "offsets": offsets.tolist(), "tried": len(solved)})
