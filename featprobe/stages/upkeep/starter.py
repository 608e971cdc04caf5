"""The files to begin with: a featprobe.toml that names a data set, and a study of it, with comments on the choices."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featprobe.datasets import DataSet
from featprobe.errors import FeatprobeError
from featprobe.io.disk import write_together
from featprobe.kinds import kinds_of
from featprobe.stages.upkeep.check import DataCheck, head_lines
from featprobe.stages.upkeep.describe import toml_text
from featprobe.stages.upkeep.first_look import Aim, aim_at
from featprobe.stages.workspace import CONFIG, RANDOM, Workspace

STUDY = "study.toml"
BACKBONES = ("embedded", f"embedded{RANDOM}")
WIDE = 110  # characters of a comment
OFF = (
    ("size", "384x960", "Height x width in pixels that images are brought to. Off: 512x512, or their own up to that."),
    ("fit", "letterbox", "Keep the shape of images. Off: they are stretched to the size."),
    ("tile", 512, "Cut images into square tiles of this side, in pixels. Off: whole images."),
    (
        "intensity",
        "percentile:0.01:99.99",
        "How raw grey levels become 0 to 1: window:LO:HI, percentile:LO:HI, minmax, log.",
    ),
    ("group_from", r"(C\d+)_", "Find the part of each image in its name: images of one part stay in one split."),
    ("split_file", "split.csv", "Splits and groups from a file:  featprobe data split NAME --out split.csv"),
    ("pixel_size", 0.05, "Millimetres per pixel, or [down, across], for sizes of defects in mm:  featprobe inspect"),
    ("views", "hflip,vflip", "Also store these views of the training images."),
)
"""Keys of a data set that are off at first: an example, and what it does."""


@dataclass(frozen=True)
class Started:
    """What was written. name: of the data set in featprobe.toml."""

    name: str
    checked: DataCheck
    aim: Aim
    files: tuple[Path, ...]


def check_free(workspace: Workspace) -> None:
    """Raise FeatprobeError where a file that would be written is there already."""
    there = [path for path in _places(workspace) if os.path.lexists(path)]
    if there:
        verb = "is" if len(there) == 1 else "are"
        raise FeatprobeError(
            f"{' and '.join(map(str, there))} {verb} there already. Nothing was written.\n"
            "Move what is there, or begin in another folder:  featprobe --workspace DIR init FOLDER\n"
            f"To add a data set to {CONFIG} by hand, copy its section from:  featprobe data info FOLDER"
        )


def start(workspace: Workspace, data: DataSet, checked: DataCheck) -> Started:
    """Write featprobe.toml and study.toml for a data set that was checked, both or neither.

    Raises DataError where no task can be learned from its labels, FeatprobeError where one of the files is there,
    DiskError.
    """
    check_free(workspace)
    aim = aim_at(checked, data)
    config, study = _places(workspace)
    write_together({config: _config_text(workspace, data, checked), study: _study_text(data, aim)}, fresh=True)
    return Started(data.name, checked, aim, (config, study))


def _places(workspace: Workspace) -> tuple[Path, Path]:
    return workspace.root / CONFIG, workspace.root / STUDY


def _comment(text: str, mark: str = "# ") -> Iterator[str]:
    """A text as lines of a comment, whatever lines it has."""
    words, line = "".join(c if c.isprintable() else " " for c in text).split(), mark.rstrip()
    for word in words:
        if len(line) + len(word) >= WIDE:
            yield line
            line = "#  "
        line += f" {word}"
    yield line


def _path_text(workspace: Workspace, root: Path) -> str:
    """A set's folder as featprobe.toml names it: from there where it lies below, so that both can be moved."""
    place, own = root.resolve(), workspace.root.resolve()
    return place.relative_to(own).as_posix() if place.is_relative_to(own) and place != own else str(place)


def _config_text(workspace: Workspace, data: DataSet, checked: DataCheck) -> str:
    """A featprobe.toml that reads the set as it was read."""
    lines = [
        "# The names of data sets and backbones in this folder, and how they are read. A line after # is off.",
        "# See what is in force:  featprobe config",
        "#",
    ]
    found = [*head_lines(checked), *(f"note: {note}" for note in checked.notes)]
    found += [f"{'spoils a study' if own.spoils else 'to know'}: {own.text}" for own in checked.findings]
    for text in [f"Found in {data.root}:", *found]:
        lines += _comment(text)
    name = data.name if re.fullmatch(r"[A-Za-z0-9_-]+", data.name) else json.dumps(data.name, ensure_ascii=False)
    entry = {"path": _path_text(workspace, data.root), **data.description}
    lines += ["", f"[data.{name}]", *(f"{key} = {toml_text(value)}" for key, value in entry.items())]
    if data.classes[1:] and "classes" not in entry:
        lines += _comment(f"classes, by index: {', '.join(data.classes)}")
    for key, example, said in OFF:
        if key not in entry:
            shown = example if isinstance(example, int | float) else toml_text(example)
            lines.append(f"# {key} = {shown}".ljust(40) + f"# {said}")
    lines += [
        "",
        "# [backbones.mine]                      # a name of your own, for --backbone mine",
        "# model = 'convnext_tiny.fb_in1k'       # a model of timm:  featprobe backbones '*convnext*'",
        "# weights = 'mine.safetensors'          # its weights, from here. Off: those of the model hub.",
    ]
    return "\n".join(lines) + "\n"


def _study_text(data: DataSet, aim: Aim) -> str:
    """A study that trains a quick head under both backbones, with the choices in comments."""
    task, others = aim.kind.task, [kind for kind in kinds_of(aim.kind.task) if kind != aim.kind.name]
    keys = [
        ("data", [data.name], "Names in featprobe.toml, built-in names, or paths."),
        ("backbones", list(BACKBONES), f"NAME{RANDOM} has random weights: the control. Others:  featprobe backbones"),
        ("tasks", [task], f"This set serves {', '.join(data.serves)}."),
        ("heads", [aim.kind.name], f"Also: {', '.join(others)}." if others else "The only kind for this task."),
        ("regimes", ["frozen"], '"full" trains the backbone too, which takes long without a GPU.'),
        ("split", aim.split, "own, group, stratified or image; with :5 behind, five folds."),
        *(
            [("labels", aim.labels, "own, defect (is there one?) or classes (which are shown?).")]
            if aim.labels != "own"
            else []
        ),
        ("seeds", 3, "Of each trained head. One that is solved needs no more than one."),
    ]
    off = [
        ("sizes", ["256x256", "512x512"], "Height x width in pixels. Off: that of featprobe.toml."),
        ("tiles", [0, 512], "Sides of tiles in pixels; 0 keeps images whole."),
        ("fractions", [0.1, 1.0], "Shares of the training images."),
    ]
    lines = [
        f"# A study of {data.name}. Its plan:  featprobe study {STUDY} --dry-run",
        "# All keys and what they mean:  featprobe study --template",
    ]
    for reason in aim.reasons:
        lines += _comment(f"because {reason}")
    lines.append("")
    for mark, part in (("", keys), ("# ", off)):
        for key, value, said in part:
            lines.append(f"{mark}{key} = {json.dumps(value, ensure_ascii=False)}".ljust(48) + f"# {said}")
    return "\n".join(lines) + "\n"
