"""An extraction with nothing to do, known without reading its data set: files have the sizes and times of last time."""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featprobe import __version__
from featprobe.cache import Cache
from featprobe.datasets import FORMATS, DataSet
from featprobe.datasets.formats import places_of
from featprobe.errors import DiskError, FileKindError
from featprobe.io.disk import read_json, write_whole
from featprobe.io.plugins import DATASETS, names_in
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract_options import OF_ONE_RUN, ExtractOptions
from featprobe.stages.workspace import Workspace

LOOK_VERSION = 1  # of what is kept; another is ignored
RACY_SECONDS = 2.0  # a file that changed so shortly before may change again and show the same time
MOST_BYTES = 1 << 20  # of what is kept of one cache
CHANGE_NO_FILE = ("batch_size", *OF_ONE_RUN)  # options that change no file


@dataclass(frozen=True)
class Asked:
    """An extraction that is asked for, and how the files of its set lie just now.

    folder: where caches of the set lie. request: sha256 over all that is asked. places: what the set is read from.
    listing: see `listing_of`.
    """

    folder: Path
    request: str
    places: tuple[Path, ...]
    listing: str


@dataclass(frozen=True)
class Settled:
    """A cache file that was the answer to what is asked, when the files lay as they do.

    identity_sha256: of the cache; notes: on the data set.
    """

    path: Path
    identity_sha256: str
    notes: tuple[str, ...]


def ask(workspace: Workspace, spec: BackboneSpec, data_name: str, options: ExtractOptions, device: str) -> Asked:
    """Describe the request, without reading the data set. Raises DataError if no data set has that name.

    options: with what featprobe.toml says; device: cpu, cuda or mps.
    """
    name, root = workspace.data_root(data_name)
    own = workspace.data_options(data_name)
    request = {
        "featprobe": __version__,
        "timm": version("timm"),
        "formats": names_in(DATASETS),
        "data": [name, str(root.resolve()), own.get("classes"), *filter(None, [own.get("good")])],
        "options": {key: value for key, value in asdict(options).items() if key not in CHANGE_NO_FILE},
        "backbone": asdict(spec),
        "device": device,
    }
    pinned = [Path(options.split_file)] if options.split_file else []
    places = (*places_of(root), *pinned) if root.is_dir() else ()
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return Asked(workspace.cache_folder(name, root), digest, places, listing_of(places))


def listing_of(places: Sequence[Path]) -> str:
    """sha256 over path, inode, size, and times of modification and change of each file in these folders, links too.

    "" where there are no places, where a file can't be asked, or changed within the last two seconds or in the future.
    """
    running, latest = hashlib.sha256(), (time.time() - RACY_SECONDS) * 1e9
    try:
        for path, status in _files(places):
            if max(status.st_mtime_ns, status.st_ctime_ns) > latest:
                return ""
            times = f"\0{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
            running.update(os.fsencode(path) + times.encode())
    except OSError:
        return ""
    return running.hexdigest() if places else ""


def _files(places: Sequence[Path]) -> Iterator[tuple[str, os.stat_result]]:
    """Each file of these files and folders, in order; a folder that was met under another path stands for its files."""
    waiting, met = [os.path.abspath(place) for place in reversed(places)], set()
    while waiting:
        path = waiting.pop()
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in met:
            yield path, status
        else:
            met.add((status.st_dev, status.st_ino))
            inside = []
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir():
                        inside.append(entry.path)
                    else:
                        yield entry.path, entry.stat()
            waiting += reversed(inside)


def answers_to(asked: Asked) -> Iterator[Settled]:
    """The caches that were the answer to this; what can't be read, or is of another version, is ignored."""
    for kept in sorted(asked.folder.glob(".*.look")) if asked.listing else []:
        try:
            said: Any = read_json(kept, MOST_BYTES)
            if (said["version"], said["request"], said["listing"]) == (LOOK_VERSION, asked.request, asked.listing):
                path = asked.folder / f"{kept.name.removeprefix('.').removesuffix('.look')}.h5"
                yield Settled(path, str(said["identity_sha256"]), tuple(map(str, said["notes"])))
        except (OSError, ValueError, KeyError, TypeError, FileKindError):
            continue


def keep(asked: Asked, cache: Cache, data: DataSet, notes: Sequence[str]) -> None:
    """Keep beside a cache that it is the answer to what was asked, if the files lie as they lay before they were read.

    Nothing is kept of a set that a format of another package read: that may read any file. A disk that refuses is no
    error, since it is only time that is lost.
    """
    how = data.description
    ours = "images" in how or str(how.get("format")).partition(":")[0] in FORMATS
    if not asked.listing or not ours or listing_of(asked.places) != asked.listing:
        return
    said = {
        "version": LOOK_VERSION,
        "request": asked.request,
        "listing": asked.listing,
        "identity_sha256": cache.contents.identity_sha256,
        "notes": list(notes),
    }
    text = json.dumps(said).encode()
    if len(text) < MOST_BYTES:
        with suppress(DiskError):
            write_whole(look_path(cache.path), text)


def look_path(path: Path) -> Path:
    """The path of the file that keeps the request which a cache answers."""
    return path.parent / f".{path.stem}.look"
