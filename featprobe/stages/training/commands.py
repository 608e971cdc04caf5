"""The commands that made a result, from its row and its card."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from featprobe.kinds import KINDS, TrainRecipe
from featprobe.stages.extraction.command_line import command_of_card, option_name
from featprobe.stages.training.probe_options import Tuning

ON_THE_LINE = ("iterations", "batch_size", "lr", "weight_decay", "loss", "loss_at", "class_weights", "weights_from")
"""Parts of a training recipe that the command line can say."""
Words = list[str]


def commands_of(
    card: Mapping[str, Any], seeds: Sequence[int], data: str, table: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Command lines that extract the features and train the heads of one result again.

    seeds: that it has; the command trains all from 0 to the last of them. data: the name of its data set where the
    commands are to run, or its path. table: what featprobe.toml says of it there. What only Python can say, such as
    another warm-up, stands in a comment behind.
    """
    row = card["result"]
    train = [*_train(card), "--seeds", str(max(seeds) + 1)]
    train += [] if row["regime"] == "frozen" else _tuning(row)
    return command_of_card(card, data, table or {}), shlex.join(train) + _unsaid(row)


def level_command(
    card: Mapping[str, Any],
    seeds: Sequence[int],
    data: str,
    table: Mapping[str, Any] | None = None,
    *,
    backbones: Sequence[str] = (),
    iterations: int | None = None,
) -> str:
    """The command that trains one result with more iterations. Arguments as of commands_of.

    backbones: that are to have equally many, found by doubling. iterations: this many instead.
    """
    row = card["result"]
    found = row.get("budget") if iterations is None else None
    recipe = row["recipe"] if iterations is None else {**row["recipe"], "iterations": iterations}
    more = {**row, "backbone": ",".join(backbones) or row["backbone"], "recipe": recipe, "budget": found}
    return commands_of({**card, "result": more}, seeds, data, table)[1]


def again_command(row: Mapping[str, Any]) -> str:
    """The command that trains again what a row is of, whose head and card may be gone.

    A row of an older featprobe does not say which --levels, --width and --pyramid were asked for: then the usual ones.
    """
    if row.get("chosen_from"):  # trained as the counterpart of a frozen result
        return shlex.join(["featprobe", "finetune", *_tuning(row)])
    head = row.get("asked") or {"levels": [], "width": None, "pyramid": "auto"}
    train = [*_train({"result": row, "head": head}), "--seeds", str(row["seed"] + 1)]
    train += [] if row["regime"] == "frozen" else _tuning(row)
    return shlex.join(train) + _unsaid(row)


def _train(card: Mapping[str, Any]) -> Words:
    row, head = card["result"], card["head"]
    words = ["featprobe", "probe" if row["regime"] == "frozen" else "finetune", "--task", row["task"]]
    words += ["--data", row["data"], "--backbone", row["backbone"], "--head", row["head"]]
    words += ["--levels", ",".join(head["levels"])] if head["levels"] else []
    words += ["--width", str(head["width"])] if head["width"] is not None else []
    words += _unusual(head, {"pyramid": "auto"})
    words += _recipe(row)
    words += ["--shared-order"] if row["spread"] == "initialisation" else []
    words += ["--fraction", f"{row['fraction']:g}"] if row["fraction"] != 1 else []
    return words + _unusual(row, {"instances": "own", "split": "own", "absent_classes": "ignore"})


def _recipe(row: Mapping[str, Any]) -> Words:
    usual, recipe = asdict(KINDS[row["head"]].recipe), asdict(TrainRecipe.from_json(row["recipe"]))
    climbed = row["fraction"] < 1 and row["head"] != "ridge"  # where nothing is said of iterations
    words = []
    for name in ON_THE_LINE:
        values = row["grid"].get(name) or [recipe[name]]
        if name == "iterations" and row.get("budget"):
            words += ["--iterations", "auto"]
        elif values != [usual[name]] or row["grid"].get(name) or (name == "iterations" and climbed):
            words += [option_name(name), ",".join(map(str, values))]
    return words


def _unusual(values: Mapping[str, Any], usual: Mapping[str, Any]) -> Words:
    """Options whose value is not the usual one."""
    return [word for name in usual if values[name] != usual[name] for word in (option_name(name), str(values[name]))]


def _tuning(row: Mapping[str, Any]) -> Words:
    usual, found = asdict(Tuning()), row["tuning"]
    words = _unusual(
        found, {name: usual[name] for name in found if name in usual and name not in ("augment", "precision")}
    )
    words += [] if found["augment"] else ["--no-augment"]
    on_its_own = "bf16" if row["device"].startswith("cuda") else "fp32"  # what such a device takes unasked
    return words if found["precision"] == on_its_own else [*words, "--precision", found["precision"]]


def _unsaid(row: Mapping[str, Any]) -> str:
    """A comment on parts of the recipe that are not the default and that the command line can't say."""
    usual = asdict(KINDS[row["head"]].recipe)
    recipe = asdict(TrainRecipe.from_json(row["recipe"]))
    other = [f"{k}={v}" for k, v in recipe.items() if k not in ON_THE_LINE and v != usual[k]]
    return f"  # and from Python: {', '.join(other)}" if other and row["head"] != "ridge" else ""
