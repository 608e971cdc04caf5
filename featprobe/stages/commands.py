"""The commands that made a result, from its row and its card."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from featprobe.io.fields import built
from featprobe.probes import HeadRecipe
from featprobe.result_rows import AskedHead, ResultRow, Settings
from featprobe.stages.extraction.command_line import command_of_card, option_name
from featprobe.stages.training.probe_options import ProbeOptions, Tuning

ON_THE_LINE = ("iterations", "batch_size", "lr", "weight_decay", "loss", "loss_at", "class_weights", "weights_from")
"""Parts of a training recipe that the command line can say."""
USUAL_SETTINGS = {name: getattr(ProbeOptions(), name) for name in Settings.__dataclass_fields__}
Words = list[str]


def commands_of(
    card: Mapping[str, Any], seeds: Sequence[int], data: str, table: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Command lines that extract the features and train the heads of one result again.

    seeds: that it has; the command trains all from 0 to the last of them. data: the name of its data set where the
    commands are to run, or its path. table: what featprobe.toml says of it there. What only Python can say, such as
    another warm-up, stands in a comment behind.
    """
    row = ResultRow.from_json(card["result"])
    return command_of_card(card, data, table or {}), _trained(row, card, seeds)


def level_command(
    card: Mapping[str, Any], seeds: Sequence[int], *, backbones: Sequence[str] = (), iterations: int | None = None
) -> str:
    """The command that trains one result with more iterations. Arguments as of commands_of.

    backbones: that are to have equally many, found by doubling. iterations: this many instead.
    """
    row = ResultRow.from_json(card["result"])
    if iterations is not None:
        row = replace(row, budget=None, recipe=replace(row.recipe, iterations=iterations))
    return _trained(replace(row, backbone=",".join(backbones) or row.backbone), card, seeds)


def again_command(row: ResultRow) -> str:
    """The command that trains again what a row is of, whose head and card may be gone.

    A row of an older featprobe does not say which --levels, --width and --pyramid were asked for: then the usual ones.
    """
    if row.chosen_from:  # trained as the counterpart of a frozen result
        return shlex.join(["featprobe", "finetune", *_tuning(row)])
    return _train(row, row.asked or AskedHead((), None, "auto"), row.seed)


def _trained(row: ResultRow, card: Mapping[str, Any], seeds: Sequence[int]) -> str:
    head: HeadRecipe = built(HeadRecipe, card["head"])
    return _train(row, AskedHead(head.levels, head.width, head.pyramid), max(seeds))


def _train(row: ResultRow, head: AskedHead, last: int) -> str:
    """The command that trains a result for all seeds up to the last."""
    words = ["featprobe", "probe" if row.regime == "frozen" else "finetune", "--task", row.task]
    words += ["--data", row.data, "--backbone", row.backbone, "--head", row.head]
    words += ["--levels", ",".join(head.levels)] if head.levels else []
    words += ["--width", str(head.width)] if head.width is not None else []
    words += _unusual(asdict(head), {"pyramid": "auto"})
    words += _recipe(row)
    settings = row.settings.options() if row.settings else {}
    words += _unusual(settings, {name: USUAL_SETTINGS[name] for name in settings})
    words += ["--shared-order"] if row.shared_order else []
    words += ["--fraction", f"{row.fraction:g}"] if row.fraction != 1 else []
    words += _unusual(row.to_json(), {"instances": "own", "split": "own", "absent_classes": "ignore"})
    words += ["--seeds", str(last + 1)]
    words += [] if row.regime == "frozen" else _tuning(row)
    return shlex.join(words) + _unsaid(row)


def unusual_settings(row: ResultRow) -> str:
    """The settings that are not the default and that results of one table may differ in, for people; "" for none."""
    found = row.settings.options() if row.settings else {}
    said = {"false_calls": "false calls {:g}", "coreset": "coreset {:g}", "remove_position": "position removed"}
    return ", ".join(
        said[name].format(found[name]) for name in said if found.get(name, USUAL_SETTINGS[name]) != USUAL_SETTINGS[name]
    )


def _recipe(row: ResultRow) -> Words:
    usual, recipe, grid = asdict(row.kind.recipe_in(row.regime)), asdict(row.recipe), asdict(row.grid)
    climbed = row.fraction < 1 and not row.is_solved  # where nothing is said of iterations
    words = []
    for name in ON_THE_LINE:
        values = list(grid.get(name) or [recipe[name]])
        if name == "iterations" and row.budget:
            words += ["--iterations", "auto"]
        elif values != [usual[name]] or grid.get(name) or (name == "iterations" and climbed):
            words += [option_name(name), ",".join(map(str, values))]
    return words


def _unusual(values: Mapping[str, Any], usual: Mapping[str, Any]) -> Words:
    """Options whose value is not the usual one; a flag stands alone."""
    found = {name: values[name] for name in usual if name in values and values[name] != usual[name]}
    return [word for name, own in found.items() for word in (option_name(name), *([] if own is True else [str(own)]))]


def _tuning(row: ResultRow) -> Words:
    assert row.tuning is not None  # as of each live backbone
    usual, found = asdict(Tuning()), asdict(row.tuning)
    words = _unusual(
        found, {name: usual[name] for name in found if name in usual and name not in ("augment", "precision")}
    )
    words += [] if row.tuning.augment else ["--no-augment"]
    on_its_own = "bf16" if row.device.startswith("cuda") else "fp32"  # what such a device takes unasked
    return words if row.tuning.precision == on_its_own else [*words, "--precision", row.tuning.precision]


def _unsaid(row: ResultRow) -> str:
    """A comment on parts of the recipe that are not the default and that the command line can't say."""
    usual = asdict(row.kind.recipe_in(row.regime))
    other = [f"{k}={v}" for k, v in asdict(row.recipe).items() if k not in ON_THE_LINE and v != usual[k]]
    return f"  # and from Python: {', '.join(other)}" if other and not row.is_solved else ""
