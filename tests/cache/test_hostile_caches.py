"""Caches made to do harm (hostile_caches.py): each ends in words or is served as it is, and nothing else is read.

Every variant is described, opened, read in both ways and verified in a process whose memory is limited; its own time on
a processor is measured.
"""

import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hdf5_server import forked
from helpers import CONTEXT
from hostile_caches import HARMLESS, LONG, NEW, OLD, SECRET, write_sound

from featprobe.cache import WHOLE, legacy, open_cache, verify
from featprobe.cache.row_reader import RowReader
from featprobe.errors import FeatprobeError
from featprobe.stages.upkeep.caches import describe_cache
from featprobe.targets import labels_in_frame

SECONDS = 2.0  # of a processor, in the process that opens the file
SPARE = 256 << 20  # bytes of memory, beside twice the file
WANTED = {1: sorted(OLD.keys() - LONG), 3: sorted(NEW)}
"""Version -> the variants that are tried; `make attack` tries all."""


def served(path: Path) -> dict[str, Any]:
    """All that a reader gets of a file: who rows are, features of whole rows in two ways, labels."""
    cache = open_cache(path)
    rows = np.flatnonzero(cache.done == WHOLE)
    out: dict[str, Any] = {"rows": [tuple(vars(row).items()) for row in cache.rows]}
    out |= {"images": [tuple(vars(row).items()) for row in cache.images], "recipe": cache.recipe, "data": cache.data}
    for mode in ("memmap", "preadv"):
        with RowReader(cache, mode=mode) as reader:
            got = {level.name: np.empty((len(rows), reader.row_bytes(level)), np.uint8) for level in cache.levels}
            reader.read(rows, got)
        out[mode] = {name: values.tobytes() for name, values in got.items()}
    for i in range(len(cache)):
        framed = labels_in_frame(cache.semantic(i), cache.rows[i].placement)
        out[f"labels {i}"] = (framed.tobytes(), cache.instances(i))
    for i in range(len(cache.images)):
        out[f"labels of image {i}"] = (cache.image_semantic(i).tobytes(), cache.image_instances(i))
    return out


def look(path: Path, truth: dict[str, Any]) -> tuple[str, str]:
    """How a file is taken, and all that is said of it and comes out of it."""
    said, refused, wrong = "", False, False
    for take in (describe_cache, served, damages):
        try:
            got = take(path)
            said += repr(got)
            wrong |= take is served and any(got[name] != value for name, value in truth.items())
            refused |= take is damages and bool(got)
        except FeatprobeError as error:
            refused = True
            said += str(error)
    return ("refused" if refused else "wrong" if wrong else "right"), said


def damages(path: Path) -> list[Any]:
    """What `verify` finds."""
    return [item for item in verify(path) if not isinstance(item, int)]


def run(folder: Path, version: int, names: list[str]) -> list[tuple[str, str, float]]:
    """Name, how it is taken and seconds of a processor of each variant; in a process that is limited for each."""
    with forked():
        return _run(folder, version, names)


def _run(folder: Path, version: int, names: list[str]) -> list[tuple[str, str, float]]:
    legacy.SETTLED_SECONDS = 0.0  # no file is changed while it is looked at
    found = []
    sound = {}
    for parts in (False, True):
        path = folder / f"sound{parts}.h5"
        write_sound(path, version, parts)
        sound[parts] = path, served(path)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        path, truth = sound[name.endswith("of parts")]
        shutil.copy(path, place / "cache.h5")
        (OLD if version < 3 else NEW)[name](place / "cache.h5")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        size = (place / "cache.h5").stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (held + 2 * size + SPARE, unlimited[1]))
        begun = time.process_time()
        try:
            how, said = look(place / "cache.h5", truth)
        except BaseException as error:
            how, said = f"{type(error).__name__}: {str(error)[:100]}", ""
        seconds = time.process_time() - begun
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        if any(SECRET[i : i + 16].decode() in said for i in range(0, 32, 8)):
            how = "tells the secret"
        found.append((name, how, seconds))
        shutil.rmtree(place)
    return found


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], tuple[str, float]]]:
    """How each variant is taken, by version and name."""
    folder = tmp_path_factory.mktemp("hostile")
    jobs = []
    with ProcessPoolExecutor(2, CONTEXT) as pool:
        for version, variants in WANTED.items():
            for start in range(2):
                own = folder / f"{version}-{start}"
                own.mkdir()
                jobs.append((version, pool.submit(run, own, version, variants[start::2])))
        yield {(version, name): (how, s) for version, job in jobs for name, how, s in job.result(timeout=900)}


def test_there_are_enough_of_them() -> None:
    assert all(len(names) >= 68 for names in WANTED.values())


@pytest.mark.parametrize("version", [1, 3])
def test_each_is_refused_in_words_or_read_as_it_is(taken: Any, version: int) -> None:
    wanted = {name: "right" if name in HARMLESS else "refused" for name in WANTED[version]}
    found = {name: how for (own, name), (how, _) in taken.items() if own == version}
    assert {name: how for name, how in found.items() if how != wanted[name]} == {}
    assert found.keys() == wanted.keys()


def test_none_takes_the_time_of_who_opens_it(taken: Any) -> None:
    assert {name: seconds for name, (_, seconds) in taken.items() if seconds > SECONDS} == {}
