"""The recipes of heads, and in which parts of them two results differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featprobe.probes import HeadRecipe
from featprobe.result_rows import ResultRow, Settings
from featprobe.specs import digest

OF_TRIALS = ("lr", "weight_decay", "iterations", "weights_from")  # of a training recipe; taken from elsewhere in a row
LADDER = "found by doubling"


@dataclass(frozen=True)
class Field:
    """A part of the recipe in which two results differ, and what each has there.

    bars: whether a difference of their scores may be its doing, so that it says nothing of what was to be compared.
    """

    name: str
    a: str
    b: str
    bars: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.a} | {self.b}"


def shared_recipe(row: ResultRow, head: HeadRecipe) -> str:
    """A digest of what backbones and regimes have to agree in to be compared: the same for recipes that meet."""
    return digest({**_shared(row, head), "iterations": LADDER if row.budget else row.iterations})


def fields_that_differ(
    kind: Literal["backbones", "regimes"], a: tuple[ResultRow, HeadRecipe], b: tuple[ResultRow, HeadRecipe]
) -> tuple[Field, ...]:
    """In what the recipes of two results differ.

    Budgets that were both found by doubling are alike, whatever they are. What belongs to a regime (its augmentation,
    its treatment of the backbone, the rates that were tried) bars nothing between regimes. Of a head that is solved in
    one regime and trained in the other, the training is nothing in which they could agree.
    """
    one, other = a[0], b[0]
    regimes, one_solved = kind == "regimes", one.is_solved != other.is_solved
    ladders = one.budget and other.budget
    iterations = [{"iterations": row.iterations} for row in (one, other)]
    fields = [] if ladders or one_solved else list(_differing(*iterations))
    fields += _differing(_shared(*a, trained=not one_solved), _shared(*b, trained=not one_solved))
    if one.model == other.model:  # levels follow the network
        fields += _differing({"levels": one.levels}, {"levels": other.levels})
    fields += [] if one_solved else _differing(_tried(one), _tried(other), bars=not regimes)
    if all(row.trials > 1 and not row.is_solved for row in (one, other)):
        fields += _differing({"trials chosen by": one.chosen_with}, {"trials chosen by": other.chosen_with})
    if not regimes:
        fields += _differing(_treatment(one), _treatment(other))
    rates = ({"false calls": row.settings.false_calls} if row.settings else {} for row in (one, other))
    fields += _differing(*rates, bars=False)
    return tuple(fields)


def told_apart(results: Sequence[tuple[ResultRow, HeadRecipe]]) -> list[str]:
    """Of each of several results the parts of its recipe in which it differs from any other, as "lr 0.01, loss ce"."""
    each = []
    for own in results:
        fields = [field for other in results for field in fields_that_differ("backbones", own, other)]
        each.append(", ".join(dict.fromkeys(f"{field.name} {field.a}" for field in fields)))
    return each


def _shared(row: ResultRow, head: HeadRecipe, *, trained: bool = True) -> dict[str, Any]:
    """The part of a recipe that is not its regime's, without the iterations. trained: with that of a training."""
    loop = {} if row.is_solved or not trained else {k: v for k, v in asdict(row.recipe).items() if k not in OF_TRIALS}
    share = {"images of the share": row.subset or "one for all seeds"} if row.fraction < 1 else {}
    return {
        **{name.replace("_", " "): value for name, value in loop.items()},
        **({"weights from": row.weights_from} if trained else {}),
        **share,
        "width": head.width or row.kind.width or None,
        "pyramid": head.pyramid,
        **(_asked(row.settings) if row.settings else {}),
    }


def _asked(settings: Settings) -> dict[str, Any]:
    """The options of a head that are its recipe; what is labelled and called are not."""
    of_head = {"coreset": settings.coreset, "position removed": settings.remove_position}
    return {name: value for name, value in of_head.items() if value is not None}


def _tried(row: ResultRow) -> dict[str, Any]:
    """The trials from which one was chosen."""
    grid, own = row.chosen_from or row.grid, row.recipe
    rates = {"lr": grid.lr or (own.lr,), "weight decay": grid.weight_decay or (own.weight_decay,)}
    return {**({} if row.is_solved else rates), "trials": row.trials}


def _treatment(row: ResultRow) -> dict[str, Any]:
    """How images and backbone were treated."""
    treated = asdict(row.tuning) if row.tuning else {}
    tuning = {k.replace("_", " "): v for k, v in treated.items() if k not in ("regime", "augment")}
    return {**tuning, **{f"augmentation {k}": v for k, v in (row.augmentation or {}).items()}}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], *, bars: bool = True) -> Iterator[Field]:
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if one != other:
            yield Field(name, _text(one), _text(other), bars)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
