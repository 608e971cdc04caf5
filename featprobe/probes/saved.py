"""Saved heads and result rows, format version 1 (probes/README.md). Reading cards and rows loads no torch."""

import hashlib
import json
import math
import os
import pickle
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from featprobe.errors import FieldError, FileKindError, ProbeError
from featprobe.io.disk import (
    append_line,
    below,
    is_there,
    make_folders,
    open_regular,
    packed,
    parse_json,
    read_json,
    read_regular,
    replacing,
    write_together,
)
from featprobe.io.fields import MISSING_FIELD, Fault, message, plain, shown
from featprobe.kinds import TASKS, builder_of, how_known, kinds_of, names_of_kinds
from featprobe.levels import FeatureLevel
from featprobe.machine import available_memory
from featprobe.probes.cards import HEAD_FILE, Fingerprint, HeadRecipe, card_faults
from featprobe.result_rows import ROW_VERSION, ResultRow
from featprobe.specs import FeatureRecipe, digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featprobe.probes.head import Head

T = TypeVar("T")
HEAD_FORMAT, HEAD_VERSION = "featprobe-head", 1
FINGERPRINT = tuple(known.name for known in fields(Fingerprint))

IN_MEMORY = 16  # bytes that a byte of rows takes, about, when they are parsed
MADE_AGAIN = ("defects.parquet", "operating.json")
"""Files beside a head that its card does not name: they may be made again without a change of the head."""
LARGEST_CARD, LARGEST_ROW = 1 << 26, 1 << 24  # bytes
UNREADABLE = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError, FileKindError
)  # fmt: skip
"""Errors of reading files that are no head's files. RuntimeError: from torch, or for too deep a nesting."""


def fingerprint(recipe: FeatureRecipe) -> dict[str, Any]:
    """The values in which features must agree with those that a head was trained on."""
    values = recipe.to_json()
    return {name: values[name] for name in FINGERPRINT if name in values}


def save_head(
    folder: Path,
    head: "nn.Module",
    card: Mapping[str, Any],
    files: Mapping[str, bytes],
    backbone: "Mapping[str, Tensor] | None" = None,
    beside: Callable[[str], Mapping[str, bytes]] = lambda sha256: {},
) -> None:
    """Write head.safetensors, card.json and the given files, each whole or not at all; the card is written last.

    When this returns, everything is on the disk, with its names. A head that was there before is replaced only when the
    whole new head is on the disk beside it. files: name -> bytes, such as the contributions of test images to the
    scores. backbone: the tensors of a fine-tuned backbone. beside: from the hash of head.safetensors to files of
    MADE_AGAIN, which the card does not name. Raises DiskError.
    """
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in head.state_dict().items()}
    written = {HEAD_FILE: save(own, {"format": HEAD_FORMAT}), **files}
    if backbone:  # one entry alone of what is said: the order of several varies from process to process
        said = {"frame": "{}x{}".format(*card["features"]["frame"])}
        written["backbone.safetensors"] = save(dict(backbone), said)
    hashes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in written.items()}
    sealed = plain({**card, "head_sha256": hashes[HEAD_FILE]["sha256"], "files": hashes})
    sealed["card_sha256"] = digest(sealed)
    written |= beside(sealed["head_sha256"])
    written["card.json"] = (json.dumps(sealed, indent=1) + "\n").encode()
    stale = [folder / name for name in ("sheet.png", "backbone.safetensors", *MADE_AGAIN) if name not in written]
    write_together({folder / name: data for name, data in written.items()}, folder / "card.json", stale)


def make_folder(folder: Path) -> None:
    """Make a folder for a saved head; raises ProbeError where it can't be written."""
    try:
        make_folders(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProbeError(f"{folder} can't be written ({error.strerror}). Nothing was trained.") from error


def load_head(
    folder: Path, recipe: FeatureRecipe | None = None, *, whole: bool = False
) -> tuple["Head", dict[str, Any]]:
    """A saved head in eval mode, and its card.

    recipe: that of the features for the head; if given, it is checked against the card's fingerprint. whole: see
    `read_card`.
    Raises ProbeError when the folder holds no saved head, or one for other features.
    """
    from safetensors.torch import load

    from featprobe.probes.heads import build_head

    try:
        card = read_card(folder, whole=whole)
        try:
            (data,) = read_files(folder, card, [HEAD_FILE])
        except ProbeError as error:
            raise ProbeError(f"{folder}: {error}. Train it again.") from error
        tensors = load(data)
        levels = [FeatureLevel(**level) for level in card["fingerprint"]["levels"]]
        recipe_of_head = HeadRecipe.from_json(card["head"])
        try:
            _check_claim(recipe_of_head, levels, len(data))
            head = build_head(recipe_of_head, levels)
        except ProbeError as error:
            raise ProbeError(f"{folder} holds a head that can't be built. {error}") from error
        head.load_state_dict(tensors, strict=True)
    except UNREADABLE as error:
        raise ProbeError(
            f"{folder} holds no saved head that can be read: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error
    if recipe is not None:
        check_fingerprint(folder, card["fingerprint"], recipe)
    return head.eval(), card


def _check_claim(recipe: HeadRecipe, levels: Sequence[FeatureLevel], held: int) -> None:
    """Raise ProbeError for a head of more bytes than its file holds, before memory is taken for it."""
    import torch

    from featprobe.probes.heads import build_head

    if recipe.task not in TASKS or builder_of(recipe.task, recipe.kind) is not None:
        return  # one of your own may be anything
    with torch.device("meta"):
        claimed = sum(t.numel() * t.element_size() for t in build_head(recipe, levels).state_dict().values())
    if claimed > held:
        raise ProbeError(f"Its card describes one of {claimed} bytes, and {HEAD_FILE} has {held}.")


def read_card(folder: Path, *, whole: bool = False) -> dict[str, Any]:
    """The card of a saved head. Raises ProbeError when there is none, or it was changed, or has faults.

    whole: whether it must be the card of a head that featprobe trained, see `cards.card_faults`.
    """
    try:
        card = read_json(below(folder, "card.json", "The folder of a head"), LARGEST_CARD)
        if card["format"] != HEAD_FORMAT or card["version"] > HEAD_VERSION:
            raise ProbeError(
                f"{folder} holds {shown(card['format'])} {shown(card['version'])}. "
                f"wanted: {HEAD_FORMAT} {HEAD_VERSION}."
            )
        if card.pop("card_sha256") != digest(card):
            raise ProbeError(f"{folder}/card.json is not as featprobe wrote it. Was it edited? Train the head again.")
    except FileNotFoundError as error:
        raise ProbeError(_no_card(folder)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FileKindError, RecursionError) as error:
        raise ProbeError(
            f"{folder} holds no saved head that can be read: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error
    _check_kind(folder, card)
    faults = card_faults(card, whole=whole)
    if faults:
        what = f"{folder}/card.json is not a card that this featprobe can use. Nothing was computed."
        raise ProbeError(message(what, faults, "Train the head again, or update featprobe where a newer one wrote it."))
    return card


def _check_kind(folder: Path, card: Mapping[str, Any]) -> None:
    """Raise ProbeError where the head of a card is of a kind that is not known here, and say what makes it known."""
    head = card.get("head")
    task, name = (head.get("task"), head.get("kind")) if isinstance(head, Mapping) else (None, None)
    if not (isinstance(name, str) and task in TASKS):
        return  # a fault of the card
    if name not in (kinds := kinds_of(str(task))):
        raise ProbeError(
            f"{folder} holds a head that is not known here. Nothing was computed.\n"
            f"  wanted  one of {', '.join(kinds)}\n  found   the {task} head {name}\n{how_known(str(task), name)}"
        )


def _no_card(folder: Path) -> str:
    """The error text for a folder without a card."""
    seeds = sorted(path.parent.name for path in folder.glob("seed*/card.json"))
    if seeds:
        return f"{folder} holds no head itself, but {', '.join(seeds)}. Name one of them."
    return f"{folder} has no card.json, so there is no saved head in it. Nothing was computed. Train it again."


def check_fingerprint(folder: Path, wanted: Mapping[str, Any], recipe: FeatureRecipe) -> None:
    """Raise ProbeError, with all differences, when features differ from those that a head was trained on."""
    found = json.loads(json.dumps(fingerprint(recipe)))
    differing = [name for name in FINGERPRINT if wanted.get(name) != found.get(name)]
    if differing:
        lines = [f"  {name}\n    wanted  {wanted.get(name)}\n    found   {found.get(name)}" for name in differing]
        lines += ["Name the weights that it was trained on:  --weights FILE"] if "weights_sha256" in differing else []
        raise ProbeError(f"{folder} was trained on other features. Nothing was computed.\n" + "\n".join(lines))


def read_files(folder: Path, card: Mapping[str, Any], names: Iterable[str]) -> list[bytes]:
    """The bytes of files beside a card, checked with its hashes. Raises ProbeError.

    A card of an older featprobe has only the hash of head.safetensors.
    """
    found = []
    for name in names:
        try:
            data = read_regular(below(folder, name, f"The card of {folder}"), available_memory() // 2)
        except FileNotFoundError as error:
            raise ProbeError(f"{name} is not beside its head") from error
        except OSError as error:
            raise ProbeError(f"{name} can't be read: {error.strerror}") from error
        except FileKindError as error:
            raise ProbeError(str(error)) from error
        said = _said(card).get(name, {}).get("sha256")
        if said is not None and said != hashlib.sha256(data).hexdigest():
            raise ProbeError(f"{name} is not the file that card.json describes")
        found.append(data)
    return found


def fault_of(folder: Path, card: Mapping[str, Any], *, hashes: bool = False) -> str:
    """The fault of the files that a card names; "" where there is none.

    Their sizes are checked, and that they don't begin with zeros, as unsynced files do after a loss of power. hashes:
    also check all bytes. A card of an older featprobe has no sizes: its head is always hashed.
    """
    for name, said in _said(card).items():
        try:
            with open(below(folder, name, f"The card of {folder}"), "rb", opener=open_regular) as stream:
                size, begins = os.fstat(stream.fileno()).st_size, stream.read(8)
        except FileKindError as error:
            return str(error)
        except OSError as error:
            return f"{name} is not beside its head" if isinstance(error, FileNotFoundError) else f"{name}: {error}"
        if not any(begins) or said.get("bytes", size) != size:
            return f"{name} is not the file that card.json describes"
        if hashes or "bytes" not in said:
            try:
                read_files(folder, card, [name])
            except ProbeError as error:
                return str(error)
    return ""


def _said(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card's entries on the files beside it, by name."""
    own = {HEAD_FILE: {"sha256": card["head_sha256"]}} if "head_sha256" in card else {}
    return {**own, **card.get("files", {})}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one result as a JSON line, as `append_line` does."""
    append_line(path, json.dumps({"version": ROW_VERSION, **plain(row)}, separators=(",", ":")).encode())


class Checkpoint:
    """The state of a training in a file, from which the same training can continue.

    identity: that of the training; the state of another one is ignored. A state is kept at the last step, and at the
    end of a pass over the training rows (`every` steps) if the last one is `seconds` old. before: seconds of training
    up to the loaded state.
    """

    def __init__(self, path: Path, identity: str, every: int, last: int, seconds: float) -> None:
        self.path, self.identity, self.every, self.last, self.seconds = path, identity, every, last, seconds
        self.before, self.begun = 0.0, time.perf_counter()
        self.kept = self.begun

    def load(self, check: Callable[[Any], None] = lambda state: None) -> dict[str, Any] | None:
        """The last saved state; None where there is none.

        Raises ProbeError for a damaged file, and for a state for which `check` raises ValueError.
        """
        import torch

        self.begun = self.kept = time.perf_counter()
        if not self.path.exists():
            return None
        try:
            with packed(self.path, sums=True) as stream:
                kept = torch.load(stream, map_location="cpu", weights_only=True)
            if kept["identity"] != self.identity:
                return None
            before = kept["seconds"]
            if type(before) is not float or not 0 <= before < math.inf:
                raise ValueError("seconds is no time")
            check(kept["state"])
        except Exception as error:  # torch raises many kinds of errors on a damaged file
            raise ProbeError(
                f"{self.path} can't be gone on from. Nothing was trained.\n  found   {_fault_of_state(error)}\n"
                f"Remove it, and the same command trains from the start:  rm {shlex.quote(str(self.path))}"
            ) from error
        self.before = before
        return kept["state"]

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Keep a state, whole or not at all, when one is due. Raises DiskError; then the last state stays."""
        now = time.perf_counter()
        if step != self.last and (step % self.every or now - self.kept < self.seconds):
            return
        kept = {"identity": self.identity, "seconds": self.before + now - self.begun, "state": state()}
        with replacing(self.path) as stream:
            _torch_save(kept, stream)
        self.kept = time.perf_counter()


def _fault_of_state(error: Exception) -> str:
    """Why a file holds no state. torch's own text proposes to run the code in it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain values"
    if isinstance(error, ValueError | FileKindError):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def head_folder(probes: Path, row: ResultRow) -> Path:
    """The folder of a row's head. Raises ProbeError for a folder that is not below `probes`."""
    try:
        return below(probes, row.folder, "its row")
    except FileKindError as error:
        raise ProbeError(str(error)) from error


def _torch_save(value: Any, stream: IO[bytes]) -> None:
    """torch.save with a clear error when the disk refuses."""
    import torch

    refused: list[OSError] = []

    def write(data: bytes) -> int:
        try:
            return stream.write(data)
        except OSError as error:
            refused.append(error)
            raise

    try:
        torch.save(value, SimpleNamespace(write=write, flush=lambda: None))
    except RuntimeError as error:
        raise refused[0] if refused else error from error


def read_results(path: Path) -> tuple[list[ResultRow], list[str]]:
    """The rows of results.jsonl, and what was wrong with lines that hold none, as `read_rows` has them."""
    return _read(path, partial(_result, known=names_of_kinds()))


def read_rows(
    path: Path, faults_of: Callable[[Mapping[str, Any]], list[Fault]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and notes on lines without a valid row; ([], []) where there is no file.

    An incomplete last line of a killed process, rows of another schema version, and rows with `faults_of` are skipped.
    """
    return _read(path, partial(_row, faults_of=faults_of))


def _read(path: Path, parse: Callable[[bytes], tuple[T | None, str]]) -> tuple[list[T], list[str]]:
    """The values in the lines of a file, and the faults of lines that hold none."""
    rows, faults = [], []
    lines = read_regular(path, available_memory() // IN_MEMORY).split(b"\n") if is_there(path) else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, said = parse(line)
        if row is not None:
            rows.append(row)
            continue
        torn = number == len(lines) and said == NO_JSON
        faults.append(f"{path}: line {number} {'is torn, as by a kill' if torn else said}; it was skipped")
    return rows, faults


NO_JSON = "is not JSON, or too long or deep"


def _row(
    line: bytes, faults_of: Callable[[Mapping[str, Any]], list[Fault]] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """The row of a line, or None and why there is none."""
    try:
        if len(line) > LARGEST_ROW:
            raise ValueError("no row is as long")
        row = parse_json(line)
    except ValueError:
        return None, NO_JSON
    if not isinstance(row, dict):
        return None, "is not a JSON object"
    if type(row.get("version")) is not int or row["version"] != ROW_VERSION:
        return None, f"is of version {shown(row.get('version'))}, known is {ROW_VERSION}"
    faults = faults_of(row) if faults_of else []
    return (None, _said_of(row, faults)) if faults else (row, "")


@lru_cache(4096)
def _result(line: bytes, known: tuple[tuple[str, str], ...]) -> tuple[ResultRow | None, str]:
    """The result row of a line. Files are read again and again, and their lines stay. known: the kinds of heads."""
    row, said = _row(line)
    if row is None:
        return None, said
    try:
        return ResultRow.from_json(row), ""
    except FieldError as error:
        return None, _said_of(row, error.faults)


def _said_of(row: Mapping[str, Any], faults: Sequence[Fault]) -> str:
    """The faults in the fields of a row."""
    missing = [fault.place[-1] for fault in faults if fault.said == MISSING_FIELD]
    others = [str(fault) for fault in faults if fault.said != MISSING_FIELD]
    others += [f"it holds no {', '.join(map(str, missing))}: an older featprobe wrote it"] if missing else []
    folder = f" ({row['folder']})" if isinstance(row.get("folder"), str) else ""
    return f"has wrong fields{folder}: {'; '.join(others)}"
