"""What heads were trained with, and in which of it two results differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from featprobe.kinds import KINDS
from featprobe.specs import digest

Row = Mapping[str, Any]
Head = Mapping[str, Any]  # a head's recipe, as cards keep it
OF_TRIALS = ("lr", "weight_decay", "iterations", "weights_from")  # of a training recipe; taken from elsewhere in a row
LADDER = "found by doubling"
OLD_CHOICE = {"semseg": "miou_foreground", "detect": "box_ap", "instseg": "mask_ap"}  # of rows that do not say


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


def shared_recipe(row: Row, head: Head) -> str:
    """A digest of what backbones and regimes have to agree in to be compared: the same for recipes that meet."""
    return digest({**_shared(row, head), "iterations": LADDER if row.get("budget") else _iterations(row)})


def fields_that_differ(
    kind: Literal["backbones", "regimes"], a: tuple[Row, Head], b: tuple[Row, Head]
) -> tuple[Field, ...]:
    """In what the recipes of two results differ.

    Budgets that were both found by doubling are alike, whatever they are. What belongs to a regime (its augmentation,
    its treatment of the backbone, the rates that were tried) bars nothing between regimes.
    """
    regimes = kind == "regimes"
    ladders = all(row.get("budget") for row, _ in (a, b))
    fields = [] if ladders else list(_differing({"iterations": _iterations(a[0])}, {"iterations": _iterations(b[0])}))
    fields += _differing(_shared(*a), _shared(*b))
    if a[0].get("model") == b[0].get("model"):  # levels follow the network
        fields += _differing({"levels": a[0].get("levels")}, {"levels": b[0].get("levels")})
    fields += _differing(_tried(a[0]), _tried(b[0]), bars=not regimes)
    if all(row["trials"] > 1 and row["head"] != "ridge" for row, _ in (a, b)):
        fields += _differing(_chosen_by(a[0]), _chosen_by(b[0]))
    if not regimes:
        fields += _differing(_treatment(a[0]), _treatment(b[0]))
    return tuple(fields)


def _shared(row: Row, head: Head) -> dict[str, Any]:
    """The part of a recipe that is not its regime's, without the iterations."""
    loop = {} if row["head"] == "ridge" else {k: v for k, v in row["recipe"].items() if k not in OF_TRIALS}
    share = {"images of the share": row.get("subset") or "one for all seeds"} if row["fraction"] < 1 else {}
    return {
        **{name.replace("_", " "): value for name, value in loop.items()},
        "weights from": row.get("weights_from", "end of training"),
        **share,
        "width": head.get("width") or KINDS[row["head"]].width or None,
        "pyramid": head.get("pyramid", "auto"),
    }


def _iterations(row: Row) -> Any:
    return None if row["head"] == "ridge" else row["recipe"]["iterations"]


def _tried(row: Row) -> dict[str, Any]:
    """What the chosen trial was chosen from."""
    grid = row.get("chosen_from") or row["grid"]
    rates = {} if row["head"] == "ridge" else {n: list(grid.get(n) or [row["recipe"][n]]) for n in OF_TRIALS[:2]}
    return {**{name.replace("_", " "): value for name, value in rates.items()}, "trials": row["trials"]}


def _chosen_by(row: Row) -> dict[str, Any]:
    return {"trials chosen by": row.get("chosen_by") or OLD_CHOICE[row["task"]]}


def _treatment(row: Row) -> dict[str, Any]:
    """How images and backbone were treated."""
    tuning = {k.replace("_", " "): v for k, v in (row["tuning"] or {}).items() if k not in ("regime", "augment")}
    return {**tuning, **{f"augmentation {k}": v for k, v in (row["augmentation"] or {}).items()}}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], *, bars: bool = True) -> Iterator[Field]:
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if one != other:
            yield Field(name, _text(one), _text(other), bars)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
