"""Pooled features: from maps that are there, or in place of them; kept beside a cache, and never needed."""

import io
import json
import os
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import (
    CONTEXT,
    LEVELS,
    PoolingBackbone,
    become_nobody,
    change_header,
    extract,
    flip_byte,
    make_cache,
    opened,
    random_maps,
    recipe_of,
    rows_of,
    stored,
    write_set,
)
from numpy.typing import NDArray
from PIL import Image

from featprobe.backbones import backbone as backbones
from featprobe.cache import Cache, CacheWriter, open_cache, verify
from featprobe.cache import pooled_file as keeping
from featprobe.cache.pooled_file import pooled_path, read_pooled, rows_digest
from featprobe.cache.reader import FeatureLoader
from featprobe.cache.row_reader import RowReader
from featprobe.cli.main import cli
from featprobe.errors import CacheError, CacheIncompleteError, DataError, FieldError, NoMapsError
from featprobe.kinds import KINDS, TrainRecipe, kind_of
from featprobe.specs import FeatureRecipe
from featprobe.stages import pooled as stage
from featprobe.stages.extraction import settled
from featprobe.stages.extraction.extract import extract as extract_for_real
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.plan import bytes_of
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.predict import predict
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.upkeep.caches import describe_cache, list_cache, remove_caches
from featprobe.stages.workspace import Workspace

COUNT = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes, which letterbox pads in several ways; one of them shows less than one cell."""
    root = write_set(tmp_path_factory.mktemp("set"), COUNT, (40, 64))
    for i, (height, width) in enumerate([(64, 40), (40, 40), (3, 64)]):
        for folder in ("images", "masks"):
            path = root / folder / f"part{i:02}.png"
            Image.open(path).resize((width, height), Image.Resampling.NEAREST).save(path)
    return root


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of maps; tests that change it take a copy."""
    return extract(tmp_path_factory.mktemp("dense"), data, fit="letterbox", size=(40, 40)).path


@pytest.fixture
def cache(dense: Path, tmp_path: Path) -> Cache:
    """A copy of the cache of maps that no test has read yet."""
    path = tmp_path / "cache" / "set" / dense.name
    path.parent.mkdir(parents=True)
    path.write_bytes(dense.read_bytes())
    return open_cache(path)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing is known of what was pooled before."""
    stage._known.clear()


def vectors(cache: Cache, unit: Any = "image", **how: Any) -> NDArray[np.float32]:
    return pooled_vectors(cache, cache.levels, unit, cache.usable(), **how)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A list that fills with (level, row) for each row of features that is read."""
    found: list[tuple[str, int]] = []
    read = RowReader._read_level

    def noting(self: RowReader, level: Any, rows: NDArray[np.intp], out: Any) -> None:
        found.extend((level.name, row) for row in rows.tolist())
        read(self, level, rows, out)

    monkeypatch.setattr(RowReader, "_read_level", noting)
    return found


# ---- pooled in place of maps -----------------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "tiles": {"tile": 24, "overlap": 6, "fit": None, "size": None},
    "views": {"views": ("hflip", "crop:2"), "fit": "resize"},
}


@pytest.mark.parametrize("how", HOW)
def test_pooled_live_is_what_is_pooled_from_the_cache_of_maps(how: str, data: Path, tmp_path: Path) -> None:
    given = {"fit": "letterbox", "size": (40, 40), "batch_size": 3} | HOW[how]
    maps = open_cache(extract(tmp_path / "maps", data, **given).path)
    pooled = open_cache(extract(tmp_path / "pooled", data, store="pooled", **given).path)
    assert pooled.path.stat().st_size < maps.path.stat().st_size and len(pooled) == len(maps)
    assert np.array_equal(vectors(maps), vectors(pooled)) and len(vectors(maps)) == len(maps.images)
    if how == "tiles":
        assert len(maps) > len(maps.images) and np.array_equal(vectors(maps, "tile"), vectors(pooled, "tile"))
    one = int(pooled.usable()[0])
    assert [pooled.read_row(one, level).shape for level in pooled.levels] == [(2, 6), (2, 9)]
    assert [item for item in verify(pooled.path) if not isinstance(item, int)] == []


def test_the_parts_of_an_image_join_as_their_areas_say(data: Path, tmp_path: Path) -> None:
    cache = open_cache(extract(tmp_path, data, store="pooled", tile=24, overlap=0).path)
    rows = np.flatnonzero(cache.image_of == 4)
    (whole,) = pooled_vectors(cache, cache.levels[:1], "image", rows)
    tiles = pooled_vectors(cache, cache.levels[:1], "tile", rows)
    areas = cache.rows.content[rows].prod(1)[:, None]
    channels = cache.levels[0].channels
    np.testing.assert_allclose(whole[:channels], (tiles * areas)[:, :channels].sum(0) / areas.sum(), rtol=1e-5)
    np.testing.assert_array_equal(whole[channels:], tiles[:, channels:].max(0))


def test_a_pooled_cache_is_stopped_continued_shared_out_and_repaired_like_any_other(data: Path, tmp_path: Path) -> None:
    whole = stored(extract(tmp_path / "one", data, store="pooled").path)
    for shard in ((2, 2), (1, 2)):
        report = extract(tmp_path / "two", data, store="pooled", shard=shard)
    assert stored(report.path) == whole and report.missing == 0 and report.bytes_written == report.computed * 8 * 15
    assert extract(tmp_path / "two", data, store="pooled", rehash=True).computed == 0
    flip_byte(report.path, opened(report.path).contents.extents["features/stride8"].offset + 3 * 8 * 9)
    with pytest.raises(CacheError, match="the features of row 3"):
        vectors(open_cache(report.path))
    with CacheWriter(report.path) as writer:
        writer.mark_missing(3)
    assert extract(tmp_path / "two", data, store="pooled").computed == 1
    assert stored(report.path) == whole
    command = open_cache(report.path).contents.command
    assert command.endswith("--batch-size 2 --store pooled")


def test_only_a_pooled_recipe_names_what_it_stores() -> None:
    recipe = recipe_of()
    assert "store" not in recipe.to_json() and FeatureRecipe.from_json(recipe.to_json()) == recipe
    pooled = replace(recipe, store="pooled")
    assert pooled.to_json() == recipe.to_json() | {"store": "pooled"} and pooled.key != recipe.key
    assert FeatureRecipe.from_json(pooled.to_json()) == pooled
    assert pooled.row_bytes == 8 * (6 + 9) and bytes_of(recipe, 3)["pooled"] == bytes_of(pooled, 3)["pooled"] == 360
    assert bytes_of(pooled, 3)["fp16"] == 3 * recipe.row_bytes
    with pytest.raises(FieldError, match='store: wanted maps beside dtype int8, found "pooled"'):
        FeatureRecipe.from_json(pooled.to_json() | {"dtype": "int8"})


def test_int8_has_nothing_to_store_in_a_pooled_cache(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dtype int8 stores maps, and --store pooled keeps none"):
        extract(tmp_path, data, store="pooled", dtype="int8")
    assert not list(tmp_path.glob("cache/*/*.h5"))


def test_a_cache_of_maps_that_says_it_is_pooled_is_refused(cache: Cache) -> None:
    def lie(header: dict[str, Any]) -> None:
        header["recipe"]["store"] = "pooled"
        header["recipe_key"] = FeatureRecipe.from_json(header["recipe"]).key

    change_header(cache.path, lie)
    with pytest.raises(CacheError, match=r"wanted  features/stride4: <f4 of shape \[7, 2, 6\]"):
        open_cache(cache.path)


# ---- kept beside a cache of maps -------------------------------------------------------------------------------------


def test_maps_are_read_once_and_never_computed(
    cache: Cache, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolingBackbone, "__call__", lambda *_: pytest.fail("a forward pass"))
    first = vectors(cache)
    assert sorted(reads) == [(level.name, row) for level in cache.levels for row in range(COUNT)]
    reads.clear()
    few = pooled_vectors(cache, cache.levels[1:], "image", np.array([5, 2, 5]))
    assert np.array_equal(few, first[[2, 5], -2 * cache.levels[1].channels :]) and not reads
    stage._known.clear()  # as in another process
    assert np.array_equal(vectors(open_cache(cache.path)), first) and not reads


def test_each_level_is_pooled_when_it_is_first_asked_for(cache: Cache, reads: list[tuple[str, int]]) -> None:
    one, other = cache.levels
    pooled_vectors(cache, [other], "image", cache.usable())
    assert {name for name, _ in reads} == {other.name} and read_pooled(
        cache, cache.levels, rows_digest(cache)
    ).keys() == {other.name}
    stage._known.clear()
    reads.clear()
    vectors(cache)
    assert {name for name, _ in reads} == {one.name}
    stage._known.clear()
    reads.clear()
    pooled_vectors(cache, [one], "image", cache.usable())
    vectors(cache)
    assert not reads and describe_cache(cache.path)["pooled_levels"] == [one.name, other.name]


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_values_are_the_mean_and_the_maximum_of_what_a_reader_gives(dtype: Any, tmp_path: Path) -> None:
    content, recipe = (28, 19), recipe_of(dtype=dtype)
    cache = make_cache(tmp_path / "cache.h5", recipe, rows_of(4, (32, 32), content))
    maps = random_maps(recipe, 4)
    if dtype == "fp16":  # of finite values
        maps = {name: (values % 2048).astype(np.float16) for name, values in maps.items()}
    with CacheWriter(cache.path) as writer:
        writer.write(0, maps)
    parts = np.split(vectors(cache), np.cumsum([2 * level.channels for level in cache.levels])[:-1], axis=1)
    for level, part in zip(cache.levels, parts, strict=True):
        rows = np.stack([cache.read_row(i, level) for i in range(4)]).astype(np.float64)
        pixels = rows.repeat(level.stride, 2).repeat(level.stride, 3)[:, :, : content[0], : content[1]]
        np.testing.assert_allclose(part[:, : level.channels], pixels.mean((2, 3)), rtol=1e-5)
        np.testing.assert_array_equal(part[:, level.channels :], pixels.max((2, 3)))


def rewritten(change: Callable[[dict[str, NDArray[Any]]], object]) -> Callable[[Path, Cache], None]:
    """A change of the arrays of a file, which is written again by numpy."""

    def apply(path: Path, cache: Cache) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].copy() for name in file.files}
        change(arrays)
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=True, **arrays)  # type: ignore[arg-type]
        path.write_bytes(packed.getvalue())

    return apply


def said(**changed: Any) -> Callable[[Path, Cache], None]:
    """A change of what the header says."""

    def change(arrays: dict[str, NDArray[Any]]) -> None:
        header = json.loads(arrays["header"].tobytes()) | changed
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)

    return rewritten(change)


def bomb(path: Path, cache: Cache) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.save(header, np.frombuffer(json.dumps(keeping._header(cache, rows_digest(cache))).encode(), np.uint8))
        archive.writestr("header.npy", header.getvalue())
        with archive.open("features/stride4.npy", "w") as packed:
            np.lib.format.write_array_header_1_0(
                packed, {"descr": "<f4", "fortran_order": False, "shape": (7, 2, 1 << 20)}
            )
            for _ in range(56):
                packed.write(bytes(1 << 20))


def of_bytes(header: bytes, version: int = 1, packing: int = zipfile.ZIP_STORED) -> Callable[[Path, Cache], None]:
    """A first array whose header holds these bytes; an array that is packed in some way."""

    def apply(path: Path, cache: Cache) -> None:
        with zipfile.ZipFile(path) as archive:
            held = {entry: archive.read(entry) for entry in archive.namelist()}
        length = len(header).to_bytes(2 * version, "little")
        held["features/stride4.npy"] = b"\x93NUMPY" + bytes([version, 0]) + length + header
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in held.items():
                archive.writestr(entry, data, packing if "stride4" in entry else zipfile.ZIP_STORED)

    return apply


def broken_lzma(path: Path, cache: Cache) -> None:
    of_bytes(bytes(100), packing=zipfile.ZIP_LZMA)(path, cache)
    flip_byte(path, path.read_bytes().index(b"stride4.npy") + 25)


HARM: dict[str, Callable[[Path, Cache], Any]] = {
    "cut short": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, _: os.truncate(path, 0),
    "a flipped bit of a value": lambda path, _: flip_byte(path, path.read_bytes().index(b"stride8.npy") + 200),
    "a pipe": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path, _: (path.unlink(), path.symlink_to(path.name)),
    "of another cache": said(identity_sha256="0" * 64),
    "of other rows": said(rows_sha256="0" * 64),
    "of another version": said(version=2),
    "a header that is a list": rewritten(lambda a: a.update(header=np.frombuffer(b"[1, 2]", np.uint8))),
    "no header": rewritten(lambda a: a.pop("header")),
    "a huge header": rewritten(lambda a: a.update(header=np.zeros(1 << 16, np.uint8))),
    "rows too few": rewritten(lambda a: a.update({"features/stride4": a["features/stride4"][:3]})),
    "of another type": rewritten(lambda a: a.update({"features/stride4": a["features/stride4"].astype(np.float64)})),
    "by columns": rewritten(lambda a: a.update({"features/stride4": np.asfortranarray(a["features/stride4"])})),
    "not finite": rewritten(lambda a: a["features/stride4"].__setitem__((0, 0, 0), np.nan)),
    "objects": rewritten(lambda a: a.update({"features/stride4": np.array([print], dtype=object)})),
    "a bomb": bomb,
    "a header that is no text": of_bytes(b"("),
    "a header that never ends": of_bytes(b"'''"),
    "a type that is none": of_bytes(b"{'descr': ',,', 'fortran_order': False, 'shape': (1,)}"),
    "a header that unpacks to more than the file": of_bytes(bytes(1 << 24), 2, zipfile.ZIP_DEFLATED),
    "packed by lzma, and damaged": broken_lzma,
    "longer than any": lambda path, _: os.truncate(path, 1 << 30),
}
"""What may lie in the place of pooled features."""


@pytest.mark.parametrize("harm", HARM)
def test_what_is_no_sound_file_of_this_cache_is_pooled_anew(harm: str, cache: Cache, reads: list[Any]) -> None:
    wanted, path = vectors(cache), pooled_path(cache.path)
    sound = path.read_bytes()
    HARM[harm](path, cache)
    assert harm == "longer than any" or path.is_fifo() or path.is_symlink() or path.read_bytes() != sound
    stage._known.clear()
    reads.clear()
    assert np.array_equal(vectors(cache), wanted) and len(reads) > 0
    assert path.read_bytes() == sound
    assert [left.name for left in path.parent.glob(".*.tmp")] == []


def test_a_folder_in_its_place_is_said_and_no_harm(cache: Cache) -> None:
    pooled_path(cache.path).mkdir()
    lines: list[str] = []
    assert len(vectors(cache, say=lines.append)) == COUNT
    assert len(lines) == 1 and "are not kept, so the next command pools them again" in lines[0]


def _as_nobody(path: str, line: Connection) -> None:
    become_nobody()
    lines: list[str] = []
    line.send((vectors(open_cache(path), say=lines.append), lines))


def test_where_nothing_may_be_written_features_are_pooled_and_not_kept(cache: Cache) -> None:
    ours, theirs = CONTEXT.Pipe()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        path = Path(folder) / "cache.h5"
        path.write_bytes(cache.path.read_bytes())
        os.chmod(folder, 0o555)
        child = CONTEXT.Process(target=_as_nobody, args=(str(path), theirs))
        child.start()
        assert ours.poll(60)
        found, lines = ours.recv()
        child.join()
        assert not pooled_path(path).exists()
    assert np.array_equal(found, vectors(cache))
    assert len(lines) == 1 and "can't be written" in lines[0]


def test_rows_that_are_made_again_are_pooled_again(cache: Cache, reads: list[Any]) -> None:
    before = vectors(cache)
    with CacheWriter(cache.path) as writer:
        kept = {level.name: cache.stored(2, level)[level.name][None] * np.float16(2) for level in cache.levels}
        writer.write(2, kept)
    reads.clear()
    assert np.array_equal(vectors(cache), np.where(np.arange(COUNT)[:, None] == 2, 2 * before, before)) and reads


def test_unreadable_rows_take_no_part_and_missing_ones_are_refused(cache: Cache) -> None:
    wanted = vectors(cache)
    with CacheWriter(cache.path) as writer:
        writer.mark_unreadable(1, "gone")
    assert np.array_equal(vectors(cache), np.delete(wanted, 1, axis=0))
    assert not read_pooled(cache, cache.levels, rows_digest(cache))["stride4"][1].any()
    with pytest.raises(CacheIncompleteError, match="1 of 2 rows are missing or unreadable"):
        pooled_vectors(cache, cache.levels, "image", np.array([0, 1]))


def test_a_damaged_row_is_found_while_it_is_pooled(cache: Cache) -> None:
    flip_byte(cache.path, cache.contents.extents["features/stride4"].offset + 5)
    with pytest.raises(CacheError, match="the features of row 0"):
        vectors(cache)
    assert not pooled_path(cache.path).exists()


# ---- processes -------------------------------------------------------------------------------------------------------


def _pool_slowly(path: str, flag: str, seconds: float) -> None:
    """Pool a row at a time, and write piece by piece; say before each what comes."""
    stage.BYTES_AT_ONCE = 1
    pool, replacing = stage.pool, keeping.replacing

    def slow(wait: Callable[..., Any], name: str) -> Callable[..., Any]:
        def work(*given: Any) -> Any:
            with open(flag, "a") as file:
                file.write(f"{name}\n")
            time.sleep(seconds)
            return wait(*given)

        return work

    @contextmanager
    def slowly(target: Path) -> Iterator[Any]:
        with replacing(target) as stream:
            through = {name: getattr(stream, name) for name in ("read", "seek", "tell", "flush")}
            yield SimpleNamespace(**through, write=slow(stream.write, "write"))

    stage.pool, keeping.replacing = slow(pool, "pool"), slowly
    found = vectors(open_cache(path))
    np.save(f"{flag}.npy", found)


@pytest.mark.parametrize("moment", [("pool", 3), ("write", 2)])
def test_a_kill_leaves_no_file_or_a_whole_one(moment: tuple[str, int], cache: Cache, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    child = CONTEXT.Process(target=_pool_slowly, args=(str(cache.path), str(flag), 0.2))
    child.start()
    deadline = time.monotonic() + 60
    while not flag.exists() or flag.read_text().split().count(moment[0]) < moment[1]:
        assert time.monotonic() < deadline and child.exitcode is None
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    left = list(cache.path.parent.glob(".*.tmp"))
    assert not pooled_path(cache.path).exists() and bool(left) == (moment[0] == "write")
    other = CONTEXT.Process(target=_pool_slowly, args=(str(cache.path), str(flag), 0.0))
    other.start()
    other.join(60)
    assert other.exitcode == 0 and np.array_equal(np.load(f"{flag}.npy"), vectors(cache))
    assert not list(cache.path.parent.glob(".*.tmp")), "what the killed process left is gone"


def test_two_processes_pool_one_cache_at_once(cache: Cache, tmp_path: Path, reads: list[Any]) -> None:
    children = [
        CONTEXT.Process(target=_pool_slowly, args=(str(cache.path), str(tmp_path / f"flag{i}"), 0.02)) for i in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    wanted = vectors(cache)
    assert not reads and all(np.array_equal(np.load(tmp_path / f"flag{i}.npy"), wanted) for i in range(2))


# ---- upkeep, and who is served ---------------------------------------------------------------------------------------


def test_a_list_a_description_and_a_removal_know_the_file(cache: Cache, tmp_path: Path) -> None:
    assert "pooled_bytes" not in {*list_cache(cache.path), *describe_cache(cache.path)}
    vectors(cache)
    size = pooled_path(cache.path).stat().st_size
    assert list_cache(cache.path)["pooled_bytes"] == describe_cache(cache.path)["pooled_bytes"] == size
    run = CliRunner().invoke
    where = ["--workspace", str(tmp_path), "cache"]
    assert " pooled" in run(cli, [*where, "ls"]).stdout
    assert " pooled from stride4, stride8" in run(cli, [*where, "info", "set"]).stdout
    total = cache.path.stat().st_size + size
    (cache.path.parent / f".x.{os.uname().nodename}-999999999-00000000.tmp").touch()
    assert remove_caches([cache.path]) == total
    assert {left.suffix for left in cache.path.parent.iterdir()} == {".lock"}


def test_a_folder_in_the_place_of_pooled_features_stays_when_its_cache_is_removed(cache: Cache) -> None:
    pooled_path(cache.path).mkdir()
    (pooled_path(cache.path) / "notes.txt").write_text("mine")
    assert remove_caches([cache.path]) and not cache.path.exists()
    assert (pooled_path(cache.path) / "notes.txt").read_text() == "mine"


def test_a_pooled_cache_serves_what_reads_pooled_features_and_nothing_else(data: Path, tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    path = extract(tmp_path, data, store="pooled").path
    served, _ = find_caches(space, "classify", (), (), pooled=True)
    assert [cache.path for cache in served] == [path]
    with pytest.raises(NoMapsError, match="holds pooled features alone") as refused:
        find_caches(space, "semseg", (), ())
    assert "wanted  maps" in str(refused.value)
    assert f"featprobe extract --backbone pooling --data {data} --batch-size 2" in str(refused.value)
    assert "--head" not in str(refused.value)
    with pytest.raises(NoMapsError, match="reads pooled features:  --head knn"):
        find_caches(space, "anomaly", (), ())
    with pytest.raises(NoMapsError):
        FeatureLoader(open_cache(path))
    asked = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "cache", "audit", "set", "--heads", "none"])
    assert asked.exit_code == 1 and "holds pooled features alone" in str(asked.stderr)
    info = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "cache", "info", path.stem]).stdout
    assert "classify (linear, knn), anomaly (knn)" in info and "pooled from fp16" in info


def test_of_maps_and_pooled_features_of_one_recipe_the_maps_are_taken(data: Path, tmp_path: Path) -> None:
    maps, pooled = extract(tmp_path, data).path, extract(tmp_path, data, store="pooled").path
    smaller = extract(tmp_path, data, store="pooled", size=(32, 32)).path
    space = Workspace(tmp_path)
    served, notes = find_caches(space, "classify", (), (), pooled=True)
    assert {cache.path for cache in served} == {maps, smaller}
    assert f"left aside: {pooled.name} holds pooled features, and its maps are here, too" in notes
    both = (pooled.name, smaller.name)
    served, notes = find_caches(space, "semseg", (), ())
    assert [cache.path for cache in served] == [maps]
    wanted = [f"left aside: {name} holds pooled features alone, and this head reads maps" for name in both]
    assert sorted(notes) == sorted(wanted)


QUICK = ProbeOptions(recipe=TrainRecipe(iterations=2, batch_size=2, evaluations=1), seeds=1, quiet=True, device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a pooled cache, and nothing else, of a small set under a small network."""
    root = tmp_path_factory.mktemp("small")
    write_set(root / "parts", 12)
    (root / "featprobe.toml").write_text(
        '[data.parts]\npath = "parts"\nsize = "64x64"\n'
        '[backbones.small]\nmodel = "test_efficientnet"\nrandom_init = true\n'
    )
    space = Workspace(root)
    how = ExtractOptions(store="pooled", device="cpu", quiet=True)
    extract_for_real(space, space.backbone("small"), "parts", how)
    return space


def test_what_lies_as_it_lay_is_not_read_again_unless_asked(small: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "RACY_SECONDS", 0.0)
    spec, how = small.backbone("small"), ExtractOptions(store="pooled", device="cpu", quiet=True)
    first = extract_for_real(small, spec, "parts", how)  # which keeps what it was asked
    again = extract_for_real(small, spec, "parts", how)
    assert (first.computed, again.computed, again.by_times) == (0, 0, True)
    assert not extract_for_real(small, spec, "parts", replace(how, rehash=True)).by_times


def test_a_live_backbone_starts_from_a_pooled_cache_whatever_the_head(small: Workspace, tmp_path: Path) -> None:
    (row,) = finetune(small, "semseg", options=replace(QUICK, head="linear")).rows
    assert row["regime"] == "full" and row["task"] == "semseg"
    predict(small.probes / row["folder"], [small.root / "parts" / "images" / "part00.png"], tmp_path / "out")
    assert list((tmp_path / "out").rglob("part00.png"))


def test_maps_that_a_head_wants_are_made_beside_pooled_features(small: Workspace, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "own")
    space = Workspace(tmp_path / "own")
    with pytest.raises(NoMapsError, match="Or let this command make it first:  --extract"):
        probe(space, "semseg", ["parts"], options=QUICK)
    (row,) = probe(space, "semseg", ["parts"], options=QUICK, extract=True).rows
    assert sorted(open_cache(path).recipe.store for path in space.cache_files()) == ["maps", "pooled"]
    assert row["test"]["miou"] is not None


KINDS_OF_IMAGES = [(kind.task, kind.name) for kind in KINDS.values() if kind.task in ("classify", "anomaly")]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    """Workspaces with a cache of maps and a pooled cache of a set of which a half has defects."""
    root = tmp_path_factory.mktemp("both")
    data = write_set(root / "set", 32, (32, 32))
    for i in range(0, 32, 2):
        Image.new("L", (32, 32)).save(data / "masks" / f"part{i:02}.png")
    spaces = {}
    for store in ("maps", "pooled"):
        spaces[store] = Workspace(root / store)
        extract(root / store, data, store=store)
    return spaces


def asked(task: str, head: str, **changed: Any) -> ProbeOptions:
    labels: Any = {"labels": "defect"} if task == "classify" else {}
    return ProbeOptions(head=head, quiet=True, device="cpu", **labels, **changed)


@pytest.mark.parametrize(("task", "head"), KINDS_OF_IMAGES)
def test_stored_features_serve_image_labels_and_anomalies_without_a_forward_pass(
    task: str, head: str, both: dict[str, Workspace], reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "load_backbone", lambda *_: pytest.fail("a backbone was loaded"))
    monkeypatch.setattr(PoolingBackbone, "__call__", lambda *_: pytest.fail("a forward pass"))
    (path,) = both["maps"].cache_files()
    pooled_path(path).unlink(missing_ok=True)
    rows = probe(both["maps"], task, options=asked(task, head, seeds=2)).rows
    assert len(rows) == 2
    if not kind_of(task, head).pooled:
        return
    assert sorted(reads) == [(level.name, row) for level in LEVELS for row in range(32)], "each row of a level once"
    (other, _) = probe(both["pooled"], task, options=asked(task, head, seeds=2)).rows
    assert other["test"] == rows[0]["test"] and other["val"] == rows[0]["val"]


def test_a_command_says_where_pooled_features_are_not_kept(both: dict[str, Workspace]) -> None:
    (path,) = both["maps"].cache_files()
    pooled_path(path).unlink(missing_ok=True)
    pooled_path(path).mkdir()
    for task in ("classify", "anomaly"):
        stage._known.clear()
        notes = probe(both["maps"], task, options=asked(task, "knn", seeds=1)).notes
        assert sum("are not kept, so the next command pools them again" in note for note in notes) == 1
    pooled_path(path).rmdir()
