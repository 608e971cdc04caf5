"""What several tests of the cache share: a stand-in for a network, tiny sets, tiny caches, their bytes."""

import hashlib
import json
import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from kill9 import CONTEXT, PoolingBackbone, find_file, row_bytes, write_set
from numpy.typing import NDArray

from featprobe.cache import Cache, CacheWriter, Row, create_file, read_contents
from featprobe.cache.header import FIXED, MAGIC
from featprobe.cache.quantised import SCALES
from featprobe.geometry import Placement
from featprobe.kinds import kind_of, kinds_of
from featprobe.levels import FeatureLevel
from featprobe.result_rows import ResultRow
from featprobe.specs import BYTES_PER_VALUE, DataInfo, FeatureRecipe
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.partition import Partition
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.run import Finished
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace
from featprobe.targets import encode_instances, encode_semantic

__all__ = ["CONTEXT", "PoolingBackbone", "find_file", "row_bytes", "write_set"]

CPU = torch.device("cpu")
LEVELS = (FeatureLevel("stride4", 6, 4), FeatureLevel("stride8", 9, 8))
UNSIGNED = {1: "u1", 2: "<u2", 4: "<u4"}  # bytes per value -> a dtype that takes any bits


def stored_rows() -> list[dict[str, Any]]:
    """The result rows of the stored workspace, as JSON."""
    path = Path(__file__).parent / "golden" / "stored" / "probes" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_row(**changed: Any) -> ResultRow:
    """A stored result row of a frozen dense head, some of whose fields are changed."""
    row = next(own for own in stored_rows() if own["task"] == "semseg" and own["regime"] == "frozen")
    return replace(ResultRow.from_json(row), **changed)


def options(**changed: object) -> ExtractOptions:
    """Blocks of two images, one worker, nothing printed."""
    return ExtractOptions(**({"batch_size": 2, "workers": 1, "quiet": True} | changed))


def extract(root: Path, data: Path, backbone: object = None, **changed: object) -> ExtractReport:
    """Extract the set in a folder into the workspace `root`, with the stand-in where no backbone is given."""
    workspace = Workspace(root)
    return extract_with(
        workspace, backbone or PoolingBackbone(), workspace.data_set(str(data)), options(**changed), CPU
    )


def opened(path: Path) -> Cache:
    """The cache at a path, whether its identity is intact or not."""
    return Cache(path, read_contents(path))


def training_of(
    workspace: Workspace, cache: Cache, task: str, options: ProbeOptions, seed: int = 0, fraction: float = 1.0
) -> Training:
    """The training of one seed."""
    named = replace(options, kind=kind_of(task, options.head or kinds_of(task)[0]))
    return Training(workspace, Partition(cache, named.choice), task, named, (seed,), fraction)


@contextmanager
def no_plots() -> Iterator[None]:
    """Pages of comparisons without their plots, which take most of the time. What they show is made all the same."""
    with pytest.MonkeyPatch.context() as patch:
        for plot in ("dot_plot", "line_plot"):
            patch.setattr(f"featprobe.report.page.{plot}", lambda *given: "")
        yield


def watch_memory(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[list[Any]]:
    """Let a module's `run` refuse to begin while the labels or heads of an earlier training are held.

    Such may fill a GPU that the next one needs. Returns what each training had, as weak references.
    """
    runs: list[list[Any]] = []
    plain = module.run

    def watched(*given: Any) -> Finished:
        assert [own for before in runs for own in before if own() is not None] == []
        found: Finished = plain(*given)
        runs.append([weakref.ref(own) for own in (found.prepared.task, *(one.head for one in found.fitted.trials))])
        return found

    monkeypatch.setattr(module, "run", watched)
    return runs


def stored(path: Path) -> dict[str, bytes]:
    """All that extraction computes: every level, the checksums, the states."""
    cache = opened(path)
    levels = {name: rows.tobytes() for name, rows in row_bytes(cache).items()}
    return levels | {"checksum": cache.stored_checksums().tobytes(), "done": cache.done.tobytes()}


def spy_on_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that fills with the rows whose features are written."""
    written: list[int] = []
    write = CacheWriter.write

    def noting(self: CacheWriter, start: int, maps: dict[str, NDArray]) -> None:
        written.extend(range(start, start + len(next(iter(maps.values())))))
        write(self, start, maps)

    monkeypatch.setattr(CacheWriter, "write", noting)
    return written


def flip_byte(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def header_of(path: Path) -> dict[str, Any]:
    """The JSON in the header of a cache file."""
    with path.open("rb") as stream:
        _, _, size, _ = FIXED.unpack(stream.read(FIXED.size))
        return json.loads(stream.read(size))


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a cache's header, and seal it anew, as anybody can."""
    values = header_of(path)
    change(values)
    said = json.dumps(values, separators=(",", ":")).encode()
    start = struct.pack("<8sII", MAGIC, 3, len(said))
    with path.open("r+b") as stream:
        stream.write(start + hashlib.sha256(start + said).digest() + said)


def change_part(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a part of a cache, whose sha256 is not changed with them."""
    place = header_of(path)["parts"][name]
    with path.open("r+b") as stream:
        stream.seek(place["offset"])
        data = stream.read(place["bytes"])
        stream.seek(place["offset"])
        stream.write(changed := change(data))
    assert len(changed) == len(data)


def change_provenance(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make what a cache says of its making another, which takes no more room, and seal it anew."""

    def rewritten(data: bytes) -> bytes:
        return json.dumps(change(json.loads(data)), separators=(",", ":")).encode().ljust(len(data))

    change_part(path, "provenance", rewritten)
    place = header_of(path)["parts"]["provenance"]
    data = path.read_bytes()[place["offset"] :][: place["bytes"]]
    change_header(path, lambda said: said["parts"]["provenance"].update(sha256=hashlib.sha256(data).hexdigest()))


def recipe_of(
    levels: Sequence[FeatureLevel] = LEVELS, frame: tuple[int, int] = (32, 32), dtype: str = "fp16", **changed: Any
) -> FeatureRecipe:
    """A recipe of some backbone that has these levels. changed: further fields."""
    recipe = FeatureRecipe(
        label="some", backbone="some", weights_sha256="0" * 64, levels=tuple(levels), final_norm=False, size=frame,
        frame=frame, fit="letterbox", intensity="none", window=None, mean=(0.5,) * 3, std=(0.5,) * 3,
        interpolation="bicubic", dtype=dtype,
    )  # fmt: skip
    return replace(recipe, **changed)


def rows_of(count: int, frame: tuple[int, int] = (32, 32), content: tuple[int, int] | None = None) -> list[Row]:
    """Rows with masks and without instances at odd indices, the other way round at even ones."""
    mask = encode_semantic(np.eye(8, dtype=np.uint8))
    return [
        Row(
            id=f"part{i}.png",
            group=f"part{i}",
            split=("train", "val", "test")[i % 3],
            image=f"images/part{i}.png",
            image_hash=xxhash.xxh3_128_hexdigest(bytes([i])),
            placement=Placement((8, 8), content or frame, frame),
            semantic=mask if i % 2 else b"",
            instances=b"" if i % 2 else encode_instances(()),
        )
        for i in range(count)
    ]


def data_info() -> DataInfo:
    """A data set of one class."""
    return DataInfo("parts", "parts", ("background", "defect"), ("semseg",), "f" * 64)


def make_cache(
    path: Path, recipe: FeatureRecipe | None = None, rows: Sequence[Row] | None = None, data: DataInfo | None = None
) -> Cache:
    """A new cache whose features are all missing."""
    recipe = recipe or recipe_of()
    assert create_file(path, recipe, data or data_info(), rows or rows_of(4, recipe.frame), {})
    return opened(path)


def random_maps(recipe: FeatureRecipe, rows: int, seed: int = 0) -> dict[str, NDArray]:
    """Rows of every level, of any bits: level name -> (rows, channels, height, width); for int8 any scales, too."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(UNSIGNED[BYTES_PER_VALUE[recipe.dtype]])
    maps = {
        level.name: rng.integers(0, 1 << 8 * dtype.itemsize, (rows, level.channels, *level.cells(recipe.frame)), dtype)
        for level in recipe.levels
    }
    if recipe.dtype == "int8":
        scales = {SCALES + level.name: rng.random((rows, level.channels, 2), np.float32) for level in recipe.levels}
        maps |= {name: both - np.float32([0, 0.5]) for name, both in scales.items()}
    return maps


def filled_cache(path: Path, recipe: FeatureRecipe | None = None, rows: Sequence[Row] | None = None) -> Cache:
    """A complete cache of random features (`random_maps` of the same recipe and seed 0)."""
    cache = make_cache(path, recipe, rows)
    with CacheWriter(path) as writer:
        writer.write(0, random_maps(cache.recipe, len(cache)))
    return cache


def words_of(page: Path) -> str:
    """A page whose figures may be parted from their units."""
    return page.read_text().replace("\u00a0", " ")


def code_block(page: Path) -> str:
    """The first Python block of a page."""
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{page} has no Python block"
    return found[1]


def become_nobody() -> None:
    """Give up the rights of root, to whom every folder is writable."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
