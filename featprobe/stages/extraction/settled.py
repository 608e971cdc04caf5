"""An extraction with nothing to do, known by its files, which have the sizes and times of last time.

Neither the data set is read nor the network loaded, and on a CPU no torch.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from featprobe import __version__
from featprobe.backbones.weight_files import weight_files
from featprobe.cache import WHOLE, Cache, read_contents
from featprobe.datasets import FORMATS, DataSet
from featprobe.datasets.formats import places_of
from featprobe.errors import DiskError, FeatprobeError, FileKindError
from featprobe.io.disk import read_json, write_whole
from featprobe.io.plugins import DATASETS, names_in
from featprobe.io.texts import one_line
from featprobe.specs import BackboneSpec, CachePrecision
from featprobe.stages.extraction.cache_precision import settle_precision
from featprobe.stages.extraction.extract_options import OF_ONE_RUN, ExtractOptions
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.workspace import Workspace

LOOK_VERSION = 2  # of what is kept; another is ignored
RACY_SECONDS = 2.0  # a file that changed so shortly before may change again and show the same time
MOST_BYTES = 1 << 20  # of what is kept of one cache
CHANGE_NO_FILE = ("batch_size", *OF_ONE_RUN)  # options that change no file


@dataclass(frozen=True)
class Asked:
    """An extraction that is asked for, and how the files of its set and of its backbone lie just now.

    folder: where caches of the set lie. request: sha256 over all that is asked. places: what the set is read from;
    weights: what the backbone is made from, see `weight_files`. listing, weights_listing: of these, see `listing_of`.
    """

    folder: Path
    request: str
    places: tuple[Path, ...]
    listing: str
    weights: tuple[Path, ...]
    weights_listing: str


@dataclass(frozen=True)
class Settled:
    """A cache file that was the answer to what is asked, when the files of the set lay as they do.

    identity_sha256: of the cache; weights_listing: how the files of the backbone lay then, "" where that is not known;
    notes: on the data set.
    """

    path: Path
    identity_sha256: str
    weights_listing: str
    notes: tuple[str, ...]


def ask(workspace: Workspace, spec: BackboneSpec, data_name: str, options: ExtractOptions, device: str) -> Asked:
    """Describe the request, without reading the data set. Raises DataError if no data set has that name.

    options: with what featprobe.toml says; device: cpu, cuda or mps.
    """
    name, root = workspace.data_root(data_name)
    own = workspace.data_options(data_name)
    request = {
        "featprobe": __version__,
        **{package: version(package) for package in ("torch", "timm")},
        "formats": names_in(DATASETS),
        "data": [name, str(root.resolve()), own.get("classes"), *filter(None, [own.get("good")])],
        "follow_links": workspace.follow_links or own.get("follow_links", False),
        "options": {key: value for key, value in asdict(options).items() if key not in CHANGE_NO_FILE},
        "backbone": asdict(spec),
        "device": device,
    }
    pinned = [Path(options.split_file)] if options.split_file else []
    places = (*places_of(root), *pinned) if root.is_dir() else ()
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    weights = weight_files(spec)
    folder = workspace.cache_folder(name, root)
    return Asked(folder, digest, places, listing_of(places), weights, listing_of(weights))


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
    """The caches that were the answer to this; what can't be read, or is of another version, is ignored.

    So are notes that could pass for other lines of a terminal: the file may be a colleague's.
    """
    for kept in sorted(asked.folder.glob(".*.look")) if asked.listing else []:
        try:
            said: Any = read_json(kept, MOST_BYTES)
            if (said["version"], said["request"], said["listing"]) == (LOOK_VERSION, asked.request, asked.listing):
                path = asked.folder / f"{kept.name.removeprefix('.').removesuffix('.look')}.h5"
                identity, weights, notes = said["identity_sha256"], said["weights"], said["notes"]
                if all(note == one_line(note) for note in notes):
                    yield Settled(path, str(identity), str(weights), tuple(notes))
        except (OSError, ValueError, KeyError, TypeError, FileKindError):
            continue


def without_a_network(
    asked: Asked, precision: CachePrecision | Literal["auto"], device: str, begun: float
) -> ExtractReport | None:
    """The report on a cache that is the answer, if its backbone's files lie as they did, too; else None.

    precision, device: that are asked for. begun: on `time.perf_counter`.
    """
    for found in answers_to(asked):
        if found.weights_listing == asked.weights_listing != "" and (held := open_whole(found, precision, device)):
            return nothing_to_do(found, *held, device, begun)
    return None


def open_whole(
    found: Settled, precision: CachePrecision | Literal["auto"], device: str
) -> tuple[Cache, tuple[str, ...]] | None:
    """A cache that is whole, intact and in the precision that is meant, with notes on that; else None."""
    try:
        cache = Cache(found.path, read_contents(found.path))
        contents, kind = cache.contents, device.partition(":")[0]
        meant, notes = settle_precision(cache.recipe, precision, kind, found.path.parent, contents.data.fingerprint)
    except FeatprobeError:  # reading the set tells more of it
        return None
    same = (contents.identity_sha256, cache.recipe) == (found.identity_sha256, meant)
    return (cache, notes) if same and (cache.done == WHOLE).all() and contents.is_intact() else None


def nothing_to_do(found: Settled, cache: Cache, notes: Sequence[str], device: str, begun: float) -> ExtractReport:
    """The report on a cache that is the answer as it is."""
    return ExtractReport(
        path=found.path,
        rows=len(cache),
        computed=0,
        copied=0,
        missing=0,
        unreadable=(),
        bytes_written=0,
        seconds={"load": time.perf_counter() - begun, "look": 0.0, "run": 0.0, "wait_images": 0.0, "wait_disk": 0.0},
        notes=(*found.notes, *notes),
        device=device,
        images=len(cache.images),
        by_times=True,
    )


def keep(asked: Asked, cache: Cache, data: DataSet, notes: Sequence[str]) -> None:
    """Keep beside a cache that it is the answer to what was asked, if the files lie as they lay before they were read.

    Nothing is kept of a set that a format of another package read: that may read any file.
    """
    how = data.description
    ours = "images" in how or str(how.get("format")).partition(":")[0] in FORMATS
    if asked.listing and ours and listing_of(asked.places) == asked.listing:
        _keep(asked, Settled(cache.path, cache.contents.identity_sha256, asked.weights_listing, tuple(notes)))


def keep_weights(asked: Asked, found: Settled) -> None:
    """Keep that a cache, which was known as the answer, is that of the backbone whose files lie as they do."""
    if asked.weights_listing not in ("", found.weights_listing):
        _keep(asked, replace(found, weights_listing=asked.weights_listing))


def _keep(asked: Asked, answer: Settled) -> None:
    """Write what is kept. A disk that refuses is no error, since it is only time that is lost."""
    said = {
        "version": LOOK_VERSION,
        "request": asked.request,
        "listing": asked.listing,
        "weights": answer.weights_listing if listing_of(asked.weights) == answer.weights_listing else "",
        "identity_sha256": answer.identity_sha256,
        "notes": list(answer.notes),
    }
    text = json.dumps(said).encode()
    if len(text) < MOST_BYTES:
        with suppress(DiskError):
            write_whole(look_path(answer.path), text)


def look_path(path: Path) -> Path:
    """The path of the file that keeps the request which a cache answers."""
    return path.parent / f".{path.stem}.look"
