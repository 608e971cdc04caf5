"""What is in force in a workspace, and where it comes from: featprobe.toml, the environment, or defaults."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from featprobe.io.disk import read_regular
from featprobe.io.fields import path_text, shown
from featprobe.io.texts import without_login
from featprobe.kinds import SEEDS, TASKS, kinds_of
from featprobe.machine import usable_cores
from featprobe.stages.extraction.extract_options import MOST_WORKERS, DataEntry
from featprobe.stages.workspace import CONFIG, Workspace

ROOT_VARIABLE = "FEATPROBE_WORKSPACE"
LARGEST = 1 << 22  # bytes of a featprobe.toml
MEANT: Mapping[str, str] = {
    ROOT_VARIABLE: "the workspace, where --workspace does not say it",
    "FEATPROBE_RECORD": "0: no training step is recorded as a CUDA graph",
    "HF_HOME": "the folder of downloaded weights",
    "HF_HUB_OFFLINE": "1: the model hub is not asked",
    "HF_ENDPOINT": "the address of the model hub",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used",
    "OMP_NUM_THREADS": "threads that compute on a CPU",
    "THP_MEM_ALLOC_ENABLE": "0: torch takes no large pages of memory on a CPU; featprobe says 1 where it is not set",
    "MALLOC_TRIM_THRESHOLD_": "bytes of freed memory that a process keeps; 256 MB where it is not set",
    "TMPDIR": "the folder of temporary files",
}
"""Environment variables that change what featprobe does, and how."""


@dataclass(frozen=True)
class Setting:
    """A setting that is in force. source: where it comes from, as `featprobe.toml:3` or `default`."""

    name: str
    value: str
    source: str


def in_force(workspace: Workspace, root_source: str) -> list[Setting]:
    """Everything that commands take here where their command line says nothing. root_source: of the workspace."""
    root, config = workspace.root, workspace.root / CONFIG
    there = os.path.lexists(config)
    folders = (
        ("features", workspace.cache),
        ("heads and results", workspace.probes),
        ("built-in sets", workspace.data),
    )
    return [
        Setting("workspace", str(root.resolve()), root_source),
        *(Setting(name, f"{folder}/", "of the workspace") for name, folder in folders),
        Setting(CONFIG, str(config) if there else "none", "of the workspace"),
        *(_entries(workspace.config, config) if there else ()),
        *_defaults(),
        *(
            Setting(name, without_login(os.environ.get(name, "not set")), f"environment: {what}")
            for name, what in MEANT.items()
        ),
    ]


def _entries(config: Mapping[str, Any], path: Path) -> Iterator[Setting]:
    """The entries of featprobe.toml, each with its line."""
    lines = read_regular(path, LARGEST).decode("utf-8-sig").splitlines()
    for section, named in config.items():
        for name, entry in named.items():
            for key, value in entry.items():
                line = line_of(lines, (section, name), key)
                source = f"{CONFIG}:{line}" if line else CONFIG
                yield Setting(path_text((section, name, key)), shown(value), source)


def line_of(lines: Sequence[str], table: tuple[str, str], key: str) -> int | None:
    """The line, from 1, in which a key of a table stands, in the layout that featprobe writes; None in another one.

    >>> line_of(["[data.a]", "path = 'x'", "", '[data."b c"]', "# path = 'y'", "path = 'z'"], ("data", "b c"), "path")
    6
    """
    section, name = table
    heads = {f"[{section}.{own}]" for own in (name, f'"{name}"', f"'{name}'")}
    inside = False
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip() if line.lstrip().startswith("[") else line.strip()
        if text.startswith("["):
            inside = re.sub(r"\s*([\[\].])\s*", r"\1", text) in heads
        elif inside and re.match(rf"{re.escape(key)}\s*=", text):
            return number
    return None


def _defaults() -> Iterator[Setting]:
    """What commands take where nothing says otherwise."""
    usual = {entry.name: entry.default for entry in fields(DataEntry)}
    heads = ", ".join(f"{task} {kinds_of(task)[0]}" for task in TASKS)
    yield Setting("device", "cuda, else mps, else cpu (`featprobe doctor` says which is here)", "default")
    yield Setting("workers", str(min(MOST_WORKERS, usable_cores())), f"default: usable cores, at most {MOST_WORKERS}")
    yield Setting("heads", heads, "default")
    yield Setting("seeds", str(SEEDS), "default")
    yield Setting("size", "that of the images if all have one and no side is above 512, else 512x512", "default")
    yield Setting("fit", str(usual["fit"] or "resize"), "default")
    yield Setting("intensity", "none for 8-bit images, else percentile:0.01:99.99 of training", "default")
    yield Setting("tiles and views", "none", "default")
