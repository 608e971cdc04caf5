"""Looking after saved heads: list and remove. Formats: probes/README.md."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from featprobe.errors import ProbeError, nearest
from featprobe.io.disk import filter_lines, in_use, is_there, listable, read_regular
from featprobe.machine import available_memory
from featprobe.result_rows import ResultRow, folder_of, row_of
from featprobe.stages.workspace import Workspace

RESULTS = "results.jsonl"
HEAD = re.compile(r"[^/]+-[0-9a-f]{6}/[^/]+/[^/]+(/fold[0-9]+)?/seed[0-9]+")
"""Folders of heads below probes/, as paths from there."""
OWN = re.compile(
    r"card\.json|curves\.json|operating\.json|predictions\.json|truth\.json|(head|backbone)\.safetensors|scores\.npz"
    r"|defects\.parquet|sheet\.png|checkpoint[0-9]+\.pt|log|\..*\.tmp"
)
"""Names of what is in a head's folder; `log` may hold anything."""
IN_MEMORY = 4  # bytes that a byte of results takes at most, when its lines are filtered


@dataclass(frozen=True)
class HeadFolder:
    """A head's folder below probes/. name: its path from there. row: the last in results.jsonl, None without one.

    whole: whether it has a card; without one it holds what a stopped training left.
    """

    path: Path
    name: str
    bytes: int
    row: ResultRow | None
    whole: bool


def head_folders(workspace: Workspace) -> list[HeadFolder]:
    """Every head's folder of a workspace, by name. No link is followed.

    Raises FeatprobeError where the folder of all heads may not be read.
    """
    rows = last_rows(workspace.probes / RESULTS)
    found = []
    for path in _below(listable(workspace.probes), 5):
        name = path.relative_to(workspace.probes).as_posix()
        if HEAD.fullmatch(name):
            row = rows.get(name)
            found.append(HeadFolder(path, name, _size(path), row, os.path.isfile(path / "card.json")))
    return sorted(found, key=lambda own: own.name)


def _below(folder: Path, depth: int) -> list[Path]:
    """All folders below a folder, down to a depth, without links."""
    try:
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [*inner, *(path for own in inner if depth > 1 for path in _below(own, depth - 1))]


def _size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a temporary file of a training, which goes meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def last_rows(path: Path) -> Mapping[str, ResultRow]:
    """The last row of each folder in results.jsonl; what holds no row, or one of an unknown task, is passed over."""
    if not is_there(path):
        return {}
    found = {}
    for line in read_regular(path, available_memory() // IN_MEMORY).split(b"\n"):
        row = row_of(line)
        if row is not None and row.is_known:
            found[row.folder] = row
    return found


def find_heads(workspace: Workspace, texts: Sequence[str]) -> list[HeadFolder]:
    """The heads that paths below probes/, or parts of the names of their folders, mean. Raises ProbeError.

    A path that leads elsewhere is no path here: beside a data folder `xray`, xray means the heads that are called so.
    """
    every, root = head_folders(workspace), Path(os.path.abspath(workspace.probes))
    found: dict[str, HeadFolder] = {}
    for text in texts:
        part, inside = text.strip("/"), Path(os.path.abspath(text))
        own = [head for head in every if part and part != os.curdir and part in head.name]
        if os.path.lexists(text) and root in inside.parents:
            own = [head for head in every if inside in (root / head.name, *(root / head.name).parents)]
        if not own:
            hint = nearest(text, [head.name for head in every]) if every else "There is none yet."
            raise ProbeError(
                f"No head in {workspace.probes} is called {text!r}. {hint}".rstrip() + "\nNothing was removed. "
                "List them:  featprobe probes ls"
            )
        found |= {head.name: head for head in own}
    return list(found.values())


def check_removable(heads: Sequence[HeadFolder]) -> None:
    """Raise ProbeError, naming all of them, for heads whose folders hold files that featprobe did not write.

    The same for those whose folders may not be changed by this user.
    """
    kept = [str(h.path) for h in heads if not (os.access(h.path, os.W_OK) and os.access(h.path.parent, os.W_OK))]
    if kept:
        lines = "\n  ".join(kept)
        raise ProbeError(
            f"You may not remove these heads. Nothing was removed.\n  {lines}\n"
            "They belong to another user, or lie on a disk that is read-only."
        )
    strange = [f"{h.path}: {', '.join(own)}" for h in heads if (own := _strange(h.path))]
    if strange:
        lines = "\n  ".join(strange)
        raise ProbeError(
            f"These folders hold more than a head. Nothing was removed.\n  {lines}\n"
            "Move these files elsewhere, then run the same command again."
        )


def _strange(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not OWN.fullmatch(name))


def remove_heads(workspace: Workspace, heads: Sequence[HeadFolder]) -> int:
    """Remove heads, and their rows from results.jsonl; returns the bytes set free.

    All folders are checked first, and none may be in use by a training; one that is gone since is as one that was
    removed. Rows go first, so that a stop leaves no row
    without its head: what is left then are folders, which the same command removes. A row of which the head is not
    removed stays as it is, byte for byte. Raises ProbeError, DiskError.
    """
    there = [head for head in heads if os.path.isdir(head.path)]
    check_removable(there)
    with ExitStack() as held:
        for head in there:
            try:
                held.enter_context(in_use(head.path, alone=True))
            except BlockingIOError as error:
                raise _busy(head) from error
        names = {head.name for head in heads}
        if os.path.lexists(workspace.probes / RESULTS):
            filter_lines(workspace.probes / RESULTS, lambda line: folder_of(line) not in names)
        for head in there:
            shutil.rmtree(head.path)  # which follows no link
            _remove_empty(head.path.parent, workspace.probes)
    return sum(head.bytes for head in there)


def _busy(head: HeadFolder) -> ProbeError:
    return ProbeError(
        f"A training is running in {head.path}. Nothing was removed.\n"
        "Wait until it ends, or stop it, then run the same command again."
    )


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove folders that are empty now, from one up to below `root`."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return  # something is in it
        folder = folder.parent
