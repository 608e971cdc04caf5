"""Looking after cache files: list, describe, verify, upgrade, remove."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from featprobe.cache import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Cache,
    CacheWriter,
    Damage,
    RowLocks,
    checksum,
    damaged_rows,
    make_temporary,
    read_contents,
    read_states,
    replace_file,
    verify,
)
from featprobe.cache.contents import Contents, begins_as_cache
from featprobe.cache.header import FILE_VERSION
from featprobe.cache.legacy import disagreements
from featprobe.cache.pooled_file import pooled_path, read_pooled, rows_digest
from featprobe.errors import CacheError, FeatprobeError, counted
from featprobe.io.disk import listable, remove_leftovers
from featprobe.kinds import loaded_kinds
from featprobe.stages.extraction.run_log import doubt_of, log_path
from featprobe.stages.progress import BYTES, Progress
from featprobe.stages.recording.kept_truth import truth_path
from featprobe.stages.workspace import Workspace


def list_cache(path: Path) -> dict[str, Any]:
    """The line of a list of caches, from the header of a file and the states of its rows. Raises CacheError."""
    recipe, done, version = read_states(path)
    return {
        "path": str(path),
        "version": version,
        "bytes": _size_of(path),
        "rows": len(done),
        "whole": int((done == WHOLE).sum()),
        "recipe": recipe.to_json(),
        **({"pooled_bytes": size} if (size := _size_of(pooled_path(path))) else {}),
    }


def missing_rows(path: Path) -> set[int]:
    """The rows of a cache that `extract` computes again. Raises CacheError."""
    _, done, _ = read_states(path)
    return set(np.flatnonzero(done == MISSING).tolist())


def describe_cache(path: Path) -> dict[str, Any]:
    """The contents of a cache file, as plain values."""
    cache = Cache(path, read_contents(path))
    done = cache.done
    return {
        "path": str(path),
        "version": cache.contents.version,
        "bytes": cache.contents.file.status.st_size,
        "rows": len(cache),
        "whole": int((done == WHOLE).sum()),
        "missing": int((done == MISSING).sum()),
        "unreadable": {cache.rows.texts["id"][i]: cache.reason(i) for i in np.flatnonzero(done == UNREADABLE).tolist()},
        "intact": cache.contents.is_intact(),
        "key": cache.recipe.key,
        "recipe": cache.recipe.to_json(),
        "data": cache.data.to_json(),
        "command": cache.contents.command,
        "provenance": dict(cache.contents.provenance),
        "may_hold_tf32": doubt.text if (doubt := doubt_of(cache)) else "",
        **_pooled(cache),
    }


def _pooled(cache: Cache) -> dict[str, Any]:
    """The facts about pooled features: the heads that a cache of them alone serves, by task, or what lies beside it."""
    if cache.recipe.store == "pooled":
        able = {task: [kind.name for kind in loaded_kinds(task) if kind.pooled] for task in cache.data.serves}
        return {"serves": {task: names for task, names in able.items() if names}}
    size = _size_of(pooled_path(cache.path))
    digest = rows_digest(cache) if size else ""  # one level is in memory at a time
    levels = [level.name for level in cache.levels if size and read_pooled(cache, [level], digest)]
    return {"pooled_bytes": size, "pooled_levels": levels} if size else {}


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none, or none any more."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if S_ISREG(found.st_mode) else 0


def verify_cache(
    path: Path, quiet: bool = False, hdf5: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Damage]:
    """Hash every row, level and target again; rows whose features are bad are marked missing.

    `extract` then computes exactly those rows anew. A file whose targets or identity are damaged is left as
    it is: `extract` makes it anew from the data set and copies over the features that are sound. A file
    that can't be opened is damage too. hdf5: whether a file of version 3 is also opened through HDF5, in a process of
    its own, which must find what the file's header says; older files are read so anyway. say: gets a line
    where bad rows could not be marked, with the reason.
    """
    found: list[Damage] = []
    try:
        contents = read_contents(path)
    except CacheError as error:
        return [Damage(-1, "", f"the whole file: {str(error).splitlines()[0]}")]
    total = contents.recipe.row_bytes * len(contents.rows)
    with Progress(total, path.name, BYTES, quiet=quiet) as bar:
        for item in verify(path):
            if isinstance(item, Damage):
                found.append(item)
            else:
                bar.update(item)
    if hdf5 and contents.version == FILE_VERSION:
        found += [
            Damage(-1, "", f"HDF5 reads it differently: {line}")
            for line in disagreements(contents.file, contents.index)
        ]
    bad = damaged_rows(found)
    if bad and contents.is_intact():  # else `extract` makes a new file, and this one's addresses can't be trusted
        try:
            _mark_missing(contents, bad)
        except FeatprobeError as error:
            say(f"{path}: bad rows were not marked as missing: {error}")
    return found


def _mark_missing(contents: Contents, rows: list[int]) -> None:
    """Mark rows of the very file that was verified, whose path may mean another by now. Raises CacheError."""
    path = contents.file.path
    with RowLocks(path) as locks:
        locks.claim_all()
        with CacheWriter(path) as writer:
            if (writer.inode, writer.identity_sha256) != (contents.inode, contents.identity_sha256):
                raise CacheError("the file was replaced while it was verified. Run the same command again.")
            for row in rows:
                writer.mark_missing(row)


def upgrade_cache(path: Path, quiet: bool = False) -> bool:
    """Copy a cache of version 1 or 2 into one of version 3 under its name; False where it is one already.

    Rows keep their states, reasons and checksums, so that nothing is computed again. Raises CacheError where a row or
    anything else is damaged, or a process writes into the file; the file is as it was then.
    """
    if not begins_as_cache(path):
        read_states(path)  # no lock file is left beside what is no cache
    with RowLocks(path) as locks:
        locks.wait_for_creation()
        locks.claim_all()
        old = Cache(path, read_contents(path))
        if old.contents.version == FILE_VERSION:
            return False
        if not old.contents.is_intact() or old.contents.damaged_targets():
            raise _damaged(path, "its rows or targets are not what was written", old.contents.command)
        unreadable = {i: old.reason(i) for i in np.flatnonzero(old.done == UNREADABLE).tolist()}
        rows = [replace(row, reason=unreadable.get(i, "")) for i, row in enumerate(old.rows)]
        images = old.images if old.recipe.in_parts else ()
        temporary = make_temporary(path, old.recipe, old.data, rows, old.contents.provenance, images)
        try:
            bad = _copy_whole(old, temporary, quiet)
            if bad:
                rows_text = counted(len(bad), "row")
                what = f"features of {rows_text} are not what was written, {bad[0]!r} first"
                raise _damaged(path, what, old.contents.command)
            replace_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _copy_whole(old: Cache, target: Path, quiet: bool) -> list[str]:
    """Copy all rows that are whole; returns the ids of those that do not hash to what was written."""
    bad = []
    expected, ids = old.stored_checksums(), old.rows.column("id")
    total = old.recipe.row_bytes * int((old.done == WHOLE).sum())
    with (
        CacheWriter(target) as writer,
        Progress(total, old.path.name, BYTES, quiet=quiet) as bar,
    ):
        for row in np.flatnonzero(old.done == WHOLE).tolist():
            kept = [old.stored(row, level) for level in old.levels]
            if [checksum(list(own.values())) for own in kept] != expected[row].tolist():
                bad.append(ids[row])
            writer.write(row, {name: array[np.newaxis] for own in kept for name, array in own.items()})
            bar.update(old.recipe.row_bytes)
    return bad


def _damaged(path: Path, what: str, command: str) -> CacheError:
    return CacheError(
        f"{path} is damaged: {what}.\nNothing was changed. List what is bad, and mark it as missing:  "
        f"featprobe cache verify FILE\nThen upgrade the file, and repair it from the images:  {command}"
    )


def check_removable(workspace: Workspace, path: Path) -> int:
    """Bytes of what `remove_caches` would remove. Raises CacheError for a file elsewhere that is no cache, and
    FeatprobeError for a folder here that may not be looked into.

    A cache that can't be opened may be removed: one in the workspace, or one that begins as caches do.
    """
    listable(path)
    if not workspace.holds(path) and not begins_as_cache(path):
        try:
            read_states(path)
        except CacheError as error:
            raise CacheError(
                f"{str(error).splitlines()[0]} It does not lie in {workspace.cache}. Nothing was removed.\n"
                "  wanted  a cache, or the name of one here:  featprobe cache ls\n"
                "If nobody needs this file, remove it without featprobe."
            ) from error
    return _with_beside(path)


def _with_beside(path: Path) -> int:
    """Bytes of a cache file and of what was computed from it and lies beside it."""
    return sum(_size_of(own) for own in (path, pooled_path(path), truth_path(path)))


def remove_caches(paths: Iterable[Path]) -> int:
    """Delete cache files and what lies beside them but the lock files; returns the bytes set free.

    A cache itself goes last, so that after an error the same command finds it again. Raises CacheBusyError, and deletes
    nothing, when a process is writing into one of them; and OSError where the disk refuses.
    """
    with ExitStack() as held:
        for path in (there := list(paths)):
            held.enter_context(RowLocks(path)).claim_all()
        return sum(map(_remove, there))


def _remove(path: Path) -> int:
    from featprobe.stages.extraction.settled import look_path  # it takes the formats of data sets, which take time

    size = _with_beside(path)
    for beside in (look_path(path), pooled_path(path), truth_path(path), log_path(path)):
        if not beside.is_dir() or beside.is_symlink():  # a folder is not featprobe's
            beside.unlink(missing_ok=True)
    path.unlink()
    remove_leftovers(path.parent)
    return size
