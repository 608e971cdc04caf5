"""Saved heads and result rows, format version 1 (probes/README.md)."""

import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.fields import MISSING_FIELD, Fault, letter, shown
from featprobe.levels import FeatureLevel
from featprobe.probes.cards import card_faults
from featprobe.probes.heads import HeadRecipe, build_head
from featprobe.specs import FeatureRecipe, digest

HEAD_FORMAT, HEAD_VERSION, ROW_VERSION = "featprobe-head", 1, 1
FINGERPRINT = ("backbone", "weights_sha256", "levels", "final_norm", "channels", "mean", "std", "intensity")


def fingerprint(recipe: FeatureRecipe) -> dict[str, Any]:
    """What features must agree in with those that a head was trained on."""
    values = recipe.to_json()
    return {name: values[name] for name in FINGERPRINT}


def save_head(
    folder: Path,
    head: nn.Module,
    card: Mapping[str, Any],
    files: Mapping[str, bytes],
    backbone: Mapping[str, Tensor] | None = None,
) -> None:
    """Write head.safetensors, card.json and what else is given, each whole or not at all; the card comes last.

    files: name -> bytes, as what each test image contributed to the scores. backbone: the tensors of a fine-tuned one.
    """
    make_folder(folder)
    for name in ("card.json", "sheet.png", "backbone.safetensors"):  # without a card a folder is no saved head
        (folder / name).unlink(missing_ok=True)
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in head.state_dict().items()}
    for name, tensors in (("head", own), ("backbone", dict(backbone or {}))):
        if tensors:
            said = {"format": HEAD_FORMAT}
            if name == "backbone":  # one entry alone: the order of several varies from process to process
                said = {"frame": "{}x{}".format(*card["features"]["frame"])}
            save_file(tensors, folder / f".{name}.tmp", metadata=said)
            (folder / f".{name}.tmp").replace(folder / f"{name}.safetensors")
    for name, data in files.items():
        (folder / f".{name}.tmp").write_bytes(data)
        (folder / f".{name}.tmp").replace(folder / name)
    sealed = plain({**card, "head_sha256": _sha256(folder / "head.safetensors")})
    sealed["card_sha256"] = digest(sealed)
    (folder / ".card.tmp").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    (folder / ".card.tmp").replace(folder / "card.json")


def make_folder(folder: Path) -> None:
    """Make a folder for a saved head; raises ProbeError where it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProbeError(f"{folder} can't be written ({error.strerror}). Nothing was trained.") from error


def load_head(
    folder: Path, recipe: FeatureRecipe | None = None, *, whole: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A saved head in eval mode, and its card.

    recipe: of the features that it is to be fed, checked against the card's fingerprint when given. whole: as for
    `read_card`.
    Raises ProbeError when the folder holds no saved head, or one for other features.
    """
    try:
        card = read_card(folder, whole=whole)
        tensors = load_file(folder / "head.safetensors")
        if card["head_sha256"] != _sha256(folder / "head.safetensors"):
            raise ProbeError(f"{folder}: head.safetensors is not the file that card.json describes. Train it again.")
        levels = [FeatureLevel(**level) for level in card["fingerprint"]["levels"]]
        recipe_of_head = HeadRecipe.from_json(card["head"])
        try:
            head = build_head(recipe_of_head, levels)
        except ProbeError as error:
            raise ProbeError(f"{folder} holds a head that can't be built. {error}") from error
        head.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ProbeError(f"{folder} holds no saved head that can be read: {type(error).__name__}: {error}.") from error
    if recipe is not None:
        check_fingerprint(folder, card["fingerprint"], recipe)
    return head.eval(), card


def read_card(folder: Path, *, whole: bool = False) -> dict[str, Any]:
    """The card of a saved head; raises ProbeError when there is none, or it is not as it was written, or has faults.

    whole: as `cards.card_faults` has it: a card of a head that featprobe trained.
    """
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if card["format"] != HEAD_FORMAT or card["version"] > HEAD_VERSION:
            raise ProbeError(
                f"{folder} holds {card['format']} {card['version']}. wanted: {HEAD_FORMAT} {HEAD_VERSION}."
            )
        if card.pop("card_sha256") != digest(card):
            raise ProbeError(f"{folder}/card.json is not as featprobe wrote it. Was it edited? Train the head again.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProbeError(f"{folder} holds no saved head that can be read: {type(error).__name__}: {error}.") from error
    faults = card_faults(card, whole=whole)
    if faults:
        what = f"{folder}/card.json is no card that this featprobe can use. Nothing was computed."
        raise ProbeError(letter(what, faults, "Train the head again, or update featprobe where a newer one wrote it."))
    return card


def check_fingerprint(folder: Path, wanted: Mapping[str, Any], recipe: FeatureRecipe) -> None:
    """Raise ProbeError, naming what differs, when features are not those that a head was trained on."""
    found = json.loads(json.dumps(fingerprint(recipe)))
    differing = [name for name in FINGERPRINT if wanted.get(name) != found[name]]
    if differing:
        lines = [f"  {name}\n    wanted  {wanted.get(name)}\n    found   {found[name]}" for name in differing]
        raise ProbeError(f"{folder} was trained on other features. Nothing was computed.\n" + "\n".join(lines))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one result as a JSON line; several processes may do so at once.

    A torn last line, left by a kill, is closed off first, so that it spoils no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"version": ROW_VERSION, **plain(row)}, separators=(",", ":")).encode() + b"\n"
    with path.open("a+b") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


class Checkpoint:
    """The state of a training in a file, for the same training to go on from.

    identity: of what is trained; a state of anything else is not taken. One is kept at the last step, and at the end of
    a pass over the training rows (`every` steps) when the last time is `seconds` ago. before: seconds that were spent
    on the training until the state that was loaded.
    """

    def __init__(self, path: Path, identity: str, every: int, last: int, seconds: float) -> None:
        self.path, self.identity, self.every, self.last, self.seconds = path, identity, every, last, seconds
        self.before, self.begun = 0.0, time.perf_counter()
        self.kept = self.begun

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None where there is none. Raises ProbeError for a damaged file."""
        self.begun = self.kept = time.perf_counter()
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            if kept["identity"] != self.identity:
                return None
            self.before = kept["seconds"]
            return kept["state"]
        except Exception as error:  # a damaged file meets torch's reader in many ways
            raise ProbeError(f"{self.path} can't be read: {error}.\nRemove it to train from the start.") from error

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Keep a state, whole or not at all, when it is time to."""
        now = time.perf_counter()
        if step != self.last and (step % self.every or now - self.kept < self.seconds):
            return
        temporary = self.path.with_suffix(".tmp")
        kept = {"identity": self.identity, "seconds": self.before + now - self.begun, "state": state()}
        with temporary.open("wb") as stream:
            torch.save(kept, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)
        self.kept = time.perf_counter()


def read_rows(
    path: Path, faults_of: Callable[[Mapping[str, Any]], list[Fault]] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and what was wrong with lines that hold none; nothing where there is no file.

    A torn last line, left by a kill, rows of another schema version, and rows in which `faults_of` finds something are
    left aside.
    """
    rows, faults = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, said = _row(line, faults_of)
        if row is not None:
            rows.append(row)
            continue
        torn = number == len(lines) and said == NO_JSON
        faults.append(f"{path}: line {number} {'is torn, as by a kill' if torn else said}; it was left aside")
    return rows, faults


NO_JSON = "is no JSON"


def _row(
    line: bytes, faults_of: Callable[[Mapping[str, Any]], list[Fault]] | None
) -> tuple[dict[str, Any] | None, str]:
    """The row of a line, or None and why there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, NO_JSON
    if not isinstance(row, dict):
        return None, "is no JSON object"
    if type(row.get("version")) is not int or row["version"] != ROW_VERSION:
        return None, f"is of version {shown(row.get('version'))}, known is {ROW_VERSION}"
    said = _said_of(line, faults_of) if faults_of else ""
    return None if said else row, said


@lru_cache(4096)
def _said_of(line: bytes, faults_of: Callable[[Mapping[str, Any]], list[Fault]]) -> str:
    """What is wrong with the fields of a row; "" for nothing. Files are read again and again, and their lines stay."""
    row = json.loads(line)
    faults = faults_of(row)
    if not faults:
        return ""
    missing = [fault.place[-1] for fault in faults if fault.said == MISSING_FIELD]
    others = [str(fault) for fault in faults if fault.said != MISSING_FIELD]
    others += [f"it holds no {', '.join(map(str, missing))}: an older featprobe wrote it"] if missing else []
    folder = f" ({row['folder']})" if isinstance(row.get("folder"), str) else ""
    return f"has wrong fields{folder}: {'; '.join(others)}"


def plain(value: Any) -> Any:
    """A value as JSON can hold it, which has no nan: a score that does not exist is None."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
