"""Heads by name, and the recipe that says which one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from featprobe.errors import ProbeError, nearest
from featprobe.levels import FeatureLevel, choose_levels
from featprobe.probes.linear import LinearHead

HEADS: Mapping[tuple[str, str], Callable[[Sequence[FeatureLevel], int], nn.Module]] = {
    ("semseg", "linear"): LinearHead,
}


@dataclass(frozen=True)
class HeadRecipe:
    """Which head: its task, its kind, its classes (the background first), the levels it takes.

    levels: names; empty for every level that there is.
    """

    task: str
    kind: str
    classes: tuple[str, ...]
    levels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them."""
        return asdict(self)


def build_head(recipe: HeadRecipe, levels: Sequence[FeatureLevel]) -> nn.Module:
    """A new head for features of these levels: from a cache or from a live backbone, the same line.

    Raises ProbeError for an unknown task or kind, fewer than two classes, or a level that is not there.
    """
    tasks = sorted({task for task, _ in HEADS})
    if recipe.task not in tasks:
        raise ProbeError(f"There is no task {recipe.task!r}. {nearest(recipe.task, tasks)}")
    kinds = [kind for task, kind in HEADS if task == recipe.task]
    if recipe.kind not in kinds:
        raise ProbeError(f"There is no {recipe.task} head {recipe.kind!r}. {nearest(recipe.kind, kinds)}")
    if len(recipe.classes) < 2:
        raise ProbeError(f"A head needs the background and at least one class. found: {list(recipe.classes)}")
    try:
        chosen = choose_levels(levels, recipe.levels)
    except KeyError as error:
        names = [level.name for level in levels]
        raise ProbeError(
            f"There is no level {error.args[0]!r} here. {nearest(error.args[0], names)}\n"
            "Extract it:  featprobe extract … --levels " + ",".join([*names, error.args[0]])
        ) from None
    return HEADS[recipe.task, recipe.kind](chosen, len(recipe.classes))


def parameter_count(head: nn.Module) -> int:
    """Number of values that training moves."""
    return sum(p.numel() for p in head.parameters() if p.requires_grad)
