"""Contents of a study file: keys, types, limits and meanings. The template and the JSON schema come from them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, field, fields, make_dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from featprobe.io.fields import Fault
from featprobe.io.schemas import Field, check, json_schema
from featprobe.kinds import KINDS, LOSSES, SOLVED, TASKS, TrainRecipe, head_names, kinds_of
from featprobe.stages.training.logs import LOGS
from featprobe.stages.training.probe_options import REGIMES, Tuning

AUTO = "auto"
ALL = "all"
Texts = Annotated[tuple[str, ...], Field(min_length=1)]


def _default_heads() -> str:
    """The default kind of head of each task."""
    tasks: dict[str, list[str]] = {}
    for task in TASKS:
        tasks.setdefault(kinds_of(task)[0], []).append(task)
    return ", ".join(f"{'/'.join(own)} {kind}" for kind, own in tasks.items())


def _some_of(names: Iterable[str], least: int = 0) -> Any:
    """The type of a list of these names."""
    return Annotated[tuple[Literal[tuple(names)], ...], Field(min_length=least)]  # type: ignore[misc]


LIMITED: Mapping[str, Any] = {
    "data": Texts,
    "backbones": Texts,
    "tasks": _some_of(TASKS, 1),
    "regimes": _some_of(REGIMES, 1),
    "seeds": Annotated[int, Field(ge=1, le=1000)],
    "fractions": Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)],
    "tiles": tuple[Annotated[int, Field(ge=0)], ...],
    "overlap": Annotated[int, Field(ge=0)],
    "empty_tiles": Annotated[float, Field(ge=0, le=1)],
    "false_calls": Annotated[float, Field(ge=0, lt=1)],
    "coreset": Annotated[float, Field(gt=0, le=1)],
    "lr": tuple[Annotated[float, Field(gt=0)], ...],
    "weight_decay": tuple[Annotated[float, Field(ge=0)], ...],
    "show": Annotated[int, Field(ge=0, le=1000)],
    "log": _some_of(LOGS),
}
"""Types that say more about keys of `Study` than its annotations do; that of `heads` follows from what is installed."""
SAID: Mapping[str, str] = {
    "data": "Data sets: built-in names, names in featprobe.toml, or paths.",
    "backbones": "Aliases, names of timm, packages or featprobe.toml. NAME-random: random weights.",
    "tasks": f"{', '.join(TASKS)}; omitted where there are no labels.",
    "heads": f"Else {_default_heads()}.",
    "regimes": "full trains the backbone too; frozen-online keeps it frozen, but augments images.",
    "seeds": "How many seeds per training, counted from 0.",
    "fractions": "Shares of the training images. Heads are trained on each of them.",
    "sizes": "Height x width in pixels. Omitted: from featprobe.toml, else as `extract` chooses.",
    "tiles": "Sides in pixels; 0 keeps images whole. Omitted: from featprobe.toml.",
    "overlap": "Overlap of neighbouring tiles in pixels. Omitted: an eighth of a tile.",
    "empty_tiles": "Share of the training tiles without a defect that is kept. Omitted: all.",
    "views": "Stored views of training images. Omitted: from featprobe.toml.",
    "split": "own, group, stratified, image, or a file of `data split`. group:5 makes 5 folds.",
    "labels": "Labels of images: own, defect (whether they show one), or classes (which ones).",
    "unit": "What gets a label or an anomaly score: image, or each tile.",
    "false_calls": "Share of the good validation images that may lie above the threshold.",
    "coreset": "Share of the patches of good images that a memory of patches keeps.",
    "remove_position": "Subtract the mean map of the good training images, for anomaly heads with maps.",
    "lr": "Learning rates; all are tried. Omitted: that of [train].",
    "weight_decay": "Weight decays; all are tried. Omitted: that of [train].",
    "train": "How heads are trained. [train.all] is for all kinds; the section of a kind comes before it.",
    "tuning": "How images and the backbone are treated in the regimes full and frozen-online.",
    "show": "Test images on the picture sheet of each first seed; 0 for no sheets.",
    "log": "Curves to write during training. Each needs the extra of that name.",
    "no_verify": "Do not check the hash of features when they are read.",
}
SAID_OF_TRAINING: Mapping[str, str] = {
    "iterations": 'Training steps. "auto" increases them until validation gains no more.',
    "batch_size": "Images per step.",
    "lr": "Peak learning rate of AdamW.",
    "weight_decay": "Weight decay of AdamW.",
    "warmup": "Share of the iterations in which the learning rate rises.",
    "loss": f"Loss of dense heads: {', '.join(LOSSES)}, or a sum as ce+dice.",
    "loss_at": "Grid of the loss of dense heads: image, or level, which is several times faster.",
    "class_weights": "Weights of the classes in the loss of dense heads: inverse-sqrt or none.",
    "clip": "Largest norm of a head's gradient; 0 for no limit.",
    "evaluations": "How many points the validation curve has.",
    "weights_from": "Point of that curve that the head is taken from: best or end.",
}
SAID_OF_TUNING: Mapping[str, str] = {
    "regime": "No effect here: the key regimes decides.",
    "augment": "Vary images by crops, flips and grey levels.",
    "backbone_lr": "Learning rate of the backbone, as a multiple of that of the head.",
    "layer_decay": "Factor on that rate at each layer further down.",
    "bn": "BatchNorm layers of the backbone: frozen or train.",
    "clip": "Largest norm of the backbone's gradient; 0 for no limit.",
    "accumulate": "Compute each batch in this many parts, to save memory.",
    "ema": "Decay of a running mean of the weights; 0 for none.",
    "checkpointing": "Compute activations twice instead of storing them, to save memory.",
    "precision": "Omitted: bf16 on a GPU that has it, else fp32; frozen-online: as its cache.",
    "compile": "Compile the backbone with torch.",
    "init_head": "A saved head to start from. Omitted: none.",
    "workers": "Threads that decode images. Omitted: one per usable core, at most 16.",
}
"""The meaning of each key."""
EXAMPLES: Mapping[str, Any] = {
    "data": ["surface"],
    "backbones": ["embedded"],
    "heads": [kinds_of(TASKS[0])[0], *SOLVED],
    "sizes": ["256x256"],
    "tiles": [0, 512],
    "overlap": 64,
    "empty_tiles": 0.1,
    "views": ["none", "hflip,crop:2"],
    "lr": [0.001, 0.005],
    "weight_decay": [0.0001, 0.001],
    "log": ["tensorboard"],
    "precision": "fp32",
    "init_head": "probes/SET/BACKBONE/HEAD/seed0",
    "workers": 4,
}
"""Values of keys that have no default, or an empty one."""


def _kind(name: str, of: type, said: Mapping[str, str], changed: Mapping[str, Any], defaults: object = None) -> type:
    """A dataclass with the fields of another one, with their meanings and with `changed` types.

    defaults: an instance that gives the default values, else those of the dataclass. A field without one gets None.
    """
    made: list[Any] = []
    hints: dict[str, Any] = {**get_type_hints(of), **changed}
    for own in fields(of):
        usual = own.default if defaults is None else getattr(defaults, own.name)
        examples = [EXAMPLES[own.name]] if usual in (None, MISSING, ()) and own.name in EXAMPLES else None
        described = Field(description=said[own.name], examples=examples)
        hint: Any = Annotated[hints[own.name], described]
        needed = own.default is MISSING and own.default_factory is MISSING
        made.append(
            (own.name, hint) if needed else (own.name, hint, field(default=None if usual is MISSING else usual))
        )
    return make_dataclass(name, made, frozen=True)


def schema_of(study: type) -> type:
    """The dataclass that a study file is checked against, made from `Study`, `TrainRecipe` and `Tuning`."""
    return _schema_of(study, head_names())


@cache
def _schema_of(study: type, names: tuple[str, ...]) -> type:
    """The same for heads of these names; of those of other packages, which are not loaded, no defaults are known."""
    steps = {"iterations": int | Literal["auto"]}
    kinds = {ALL: None, **{kind.name: kind.recipe for kind in reversed([*KINDS.values()])}}  # the first of a name
    heads = [
        (name, _kind(f"Training of {name}", TrainRecipe, SAID_OF_TRAINING, steps, kinds.get(name)), None)
        for name in (ALL, *names)
    ]
    sections = {"train": make_dataclass("Trainings", heads), "tuning": _kind("Tuning", Tuning, SAID_OF_TUNING, {})}
    return _kind("Study", study, SAID, {**LIMITED, "heads": _some_of(names), **sections})


def faults_of(study: type, values: Mapping[str, Any]) -> list[Fault]:
    """Everything in a study file that is of a wrong type, out of its limits or unknown."""
    return [_misplaced(fault) for fault in check(schema_of(study), values)]


def _misplaced(fault: Fault) -> Fault:
    """A fault, which says of a key that is known elsewhere where it belongs: in TOML a section ends at the next one."""
    *table, key = fault.place or ("",)
    if not fault.said.startswith("unknown.") or key == "regime":  # of that, the list is meant
        return fault
    if table and key in SAID and key not in ("train", "tuning"):
        return replace(
            fault, said="it is a key of the study itself, and stands under a section. Put it above all [sections]"
        )
    sections = {"[train.all]": SAID_OF_TRAINING, "[tuning]": SAID_OF_TUNING}
    homes = [name for name, said in sections.items() if key in said and name[1:-1].split(".") != table]
    return replace(fault, said=f"it belongs below {' or '.join(homes)}") if homes else fault


def schema(study: type) -> dict[str, Any]:
    """The JSON schema of a study file, which editors of TOML take."""
    whole: dict[str, Any] = _without_null(json_schema(schema_of(study)))
    return whole


def _without_null(value: Any) -> Any:
    """A JSON schema without null, which TOML does not have."""
    if isinstance(value, list):
        return [_without_null(own) for own in value]
    if not isinstance(value, dict):
        return value
    kept = {k: _without_null(own) for k, own in value.items() if not (k == "default" and own is None) and k != "title"}
    kinds = [own for own in kept.get("anyOf", []) if own != {"type": "null"}]
    if len(kinds) == 1:
        return {**kinds[0], **{k: own for k, own in kept.items() if k != "anyOf"}}
    return kept | ({"anyOf": kinds} if kinds else {})


def template(study: type) -> str:
    """A study file with every key, its default and its meaning; keys that can be omitted stand after `# `."""
    whole = schema(study)
    lines = [
        "# A study:  featprobe study FILE.toml --dry-run",
        "# A # is followed by the default of a key, or by an example; then the text says what applies without it.",
        "",
    ]
    sections = []
    for key, own in whole["properties"].items():
        if "$ref" in own:
            sections.append((key, own))
        else:
            lines += _lines({key: own}, whole["required"])
    for key, own in sections:
        part = _part(whole, own)
        lines += ["", f"# {own['description']}"]
        if all("$ref" in inner for inner in part.values()):
            lines += _of_heads(key, {name: _part(whole, inner) for name, inner in part.items()})
        else:
            lines += [f"# [{key}]", *_lines(part)]
    return "\n".join(lines) + "\n"


def _part(whole: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section of a schema."""
    found: dict[str, Any] = whole["$defs"][own["$ref"].rpartition("/")[2]]["properties"]
    return found


def _of_heads(key: str, kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Sections of the heads that are trained: all keys of the first kind, and of the others the keys that differ."""
    trained = {kind.name for kind in KINDS.values() if kind.live}
    first, *others = [kind for kind in kinds if kind in trained]
    yield f"# [{key}.{first}]"
    yield from _lines(kinds[first])
    for kind in others:
        differing = {n: own for n, own in kinds[kind].items() if own["default"] != kinds[first][n]["default"]}
        yield f"# [{key}.{kind}]"
        yield from (f"# {name} = {_toml(own['default'])}" for name, own in differing.items())


def _lines(keys: Mapping[str, Mapping[str, Any]], needed: tuple[str, ...] | list[str] = ()) -> Iterator[str]:
    """A line for each key: name, value, meaning."""
    for name, own in keys.items():
        value = own["default"] if own.get("default") not in (None, [], ()) else own["examples"][0]
        yield f"{'' if name in needed else '# '}{name} = {_toml(value)}".ljust(34) + f"  # {own['description']}"


def _toml(value: Any) -> str:
    """A text, number, truth or list of these in TOML, which has them as JSON does."""
    return json.dumps(value, ensure_ascii=False)
