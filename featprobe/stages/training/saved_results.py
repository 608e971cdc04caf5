"""Whether the head of a result row is there as it was saved, and what lies beside it. Formats: probes/README.md."""

import io
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FileKindError, ProbeError
from featprobe.io.arrays import array_header
from featprobe.io.disk import parse_json
from featprobe.machine import available_memory
from featprobe.metrics import anomalies, images
from featprobe.probes.saved import fault_of, head_folder, read_card, read_files
from featprobe.result_rows import ResultRow
from featprobe.scores import On
from featprobe.stages.commands import again_command

UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError,
    MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, FileKindError,
)  # fmt: skip
"""Errors that files beside a head raise which featprobe did not write."""
ARRAYS: Mapping[On, Collection[str]] = {
    "pixels": ("ids", "groups", "confusion"),
    "images": images.ARRAYS,
    "anomalies": anomalies.ARRAYS,
}
"""Names of the arrays in scores.npz, by what is scored."""


def card_beside(probes: Path, row: ResultRow, *, hashes: bool = False) -> dict[str, Any]:
    """The card of the head that a row is of; raises ProbeError, saying why, where that is not there as it was saved.

    The files of the head are looked at as `fault_of` does, with `hashes` as well.
    """
    folder = head_folder(probes, row)
    if not row.is_known:
        raise ProbeError(f"the task {row.task} is not known here")
    try:
        has_card = (folder / "card.json").is_file()
    except OSError as error:
        raise ProbeError(f"{folder} can't be read: {error.strerror}. It may be sound") from error
    if not has_card:
        gone = "its folder is not here any more" if not folder.is_dir() else "its folder holds no card.json"
        raise damaged(row, gone)
    try:
        card = read_card(folder, whole=True)
    except ProbeError as error:
        raise damaged(row, str(error)) from error
    if ResultRow.from_checked(card["result"]) != row:
        raise ProbeError("its folder was written again since, by another run")
    fault = fault_of(folder, card, hashes=hashes)
    if not fault and "files" in card:
        missing = [name for name in ("head.safetensors", *_beside(row)) if name not in card["files"]]
        fault = f"its card names no {', '.join(missing)}" if missing else ""
    fault = fault or ("" if "files" in card else _unreadable(folder, row))
    if fault:
        raise damaged(row, fault)
    return card


def damaged(row: ResultRow, reason: str) -> ProbeError:
    """The error that a row has no sound head any more, with the reason and the command that trains it again."""
    again = f" Train it again:  {again_command(row)}" if row.is_known else ""
    return ProbeError(f"{reason.rstrip('.')}.{again}")


def is_whole(probes: Path, row: ResultRow, *, hashes: bool = False) -> bool:
    """Whether the head that a row is of is there as it was saved; see `card_beside`."""
    try:
        card_beside(probes, row, hashes=hashes)
    except ProbeError:
        return False
    return True


def _beside(row: ResultRow) -> tuple[str, ...]:
    """The files that lie beside the head of a row."""
    return "curves.json", *(("truth.json", "predictions.json") if row.scores.objects else ("scores.npz",))


def _unreadable(folder: Path, row: ResultRow) -> str:
    """The unreadable part of the files beside a head of an older featprobe, whose card omits them; "" for none."""
    for name in _beside(row):
        try:
            (data,) = read_files(folder, {}, [name])
            if name.endswith(".json"):
                parse_json(data)
            else:
                read_arrays(data, ARRAYS[row.scores.on])
        except ProbeError as error:
            return str(error)
        except UNREADABLE:
            return f"{name} can't be read"
    return ""


def read_arrays(data: bytes, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays of scores.npz with these names that are there, each of which holds what its header claims.

    Nothing is unpacked that claims more than a quarter of the memory. Raises ProbeError, or one of UNREADABLE.
    """
    most = available_memory() // 4
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name not in names or name in found:
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ProbeError(f"scores.npz packs {name} in another way than featprobe")
            with archive.open(entry) as packed:
                shape, _, dtype = array_header(packed)
            claimed = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or claimed > entry.file_size or entry.file_size > most:
                raise ProbeError(f"scores.npz claims {claimed} bytes of {name}, which it does not hold")
            most -= entry.file_size
            with archive.open(entry) as packed:
                found[name] = np.lib.format.read_array(packed, allow_pickle=False)
    return found
