"""The cache file: what is written is read, however it is read; what is wrong with a file is said."""

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
from dataclasses import replace
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from helpers import (
    CONTEXT,
    become_nobody,
    change_header,
    change_part,
    code_block,
    data_info,
    filled_cache,
    header_of,
    make_cache,
    opened,
    random_maps,
    recipe_of,
    rows_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featprobe import machine
from featprobe.cache import (
    Cache,
    CacheWriter,
    create_file,
    layout,
    make_temporary,
    open_cache,
    read_contents,
    reader,
    replace_file,
)
from featprobe.cache.header import MAGIC, Index
from featprobe.cache.layout import row_tables
from featprobe.cache.reader import FeatureLoader
from featprobe.cache.row_reader import RowReader, _direct_works, choose_mode
from featprobe.errors import CacheError, CacheIncompleteError, ShapeError
from featprobe.io.disk import remove_leftovers
from featprobe.levels import FeatureLevel
from featprobe.specs import FeatureRecipe
from featprobe.targets import decode_instances

PAGE = Path(__file__).parents[2] / "cache" / "README.md"


# What is written is read


@st.composite
def recipes(draw: st.DrawFn) -> FeatureRecipe:
    strides = draw(st.lists(st.sampled_from([4, 8, 16, 32]), min_size=1, max_size=4, unique=True))
    levels = [FeatureLevel(f"stride{s}", draw(st.integers(1, 40)), s) for s in sorted(strides)]
    frame = draw(st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64])))
    return recipe_of(levels, frame, draw(st.sampled_from(["fp16", "fp32", "bf16", "int8"])))


def read_all(path: Path, mode: str, order: NDArray[np.intp]) -> dict[str, bytes]:
    """The rows in this order, level by level, by one way of reading."""
    cache = opened(path)
    if mode == "h5py":
        with h5py.File(path, "r") as file:
            tables = [table for own in row_tables(cache.recipe).values() for table in own]
            return {table.key: b"".join(file[table.name][i].tobytes() for i in order) for table in tables}
    with RowReader(cache, mode=mode) as reader:
        buffers = [pair for level in cache.levels for pair in reader.buffers(level).items()]
        out = {name: np.empty((len(order), buffer.row_bytes), dtype=np.uint8) for name, buffer in buffers}
        reader.read(order, out)
    return {name: rows.tobytes() for name, rows in out.items()}


@settings(max_examples=40, deadline=None)
@given(recipes(), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False), st.integers(0, 1 << 32))
def test_rows_written_in_any_order_are_read_back_by_every_way_of_reading(recipe, count, block, shuffler, seed):
    maps = random_maps(recipe, count, seed)
    starts = list(range(0, count, block))
    shuffler.shuffle(starts)
    order = np.array(shuffler.choices(range(count), k=count + 2), dtype=np.intp)
    expected = {name: m[order].tobytes() for name, m in maps.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        make_cache(path, recipe, rows_of(count, recipe.frame))
        with CacheWriter(path) as writer:
            for start in starts:
                writer.write(start, {name: m[start : start + block] for name, m in maps.items()})
        assert open_cache(path).usable().tolist() == list(range(count))
        modes = ["memmap", "preadv", "h5py", *(["direct"] if _direct_works(opened(path)) else [])]
        assert all(read_all(path, mode, order) == expected for mode in modes)


def test_a_reader_of_some_levels_reads_those_alone(tmp_path):
    cache = filled_cache(tmp_path / "cache.h5")
    with FeatureLoader(cache, cache.levels[1:], mode="memmap") as loader:
        ((_, features),) = loader.batches([np.array([3, 0])])
    assert list(features.maps) == ["stride8"]
    written = random_maps(cache.recipe, 4)["stride8"][[3, 0]].view(np.float16)
    np.testing.assert_array_equal(features.maps["stride8"].numpy(), written)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_the_loader_gives_tensors_of_the_stored_format(tmp_path, dtype):
    cache = filled_cache(tmp_path / "cache.h5", recipe_of(dtype=dtype))
    with FeatureLoader(cache) as loader:
        ((_, features),) = loader.batches([np.array([1])])
    expected = random_maps(cache.recipe, 4)["stride4"][1:2]
    bits = features.maps["stride4"].view(torch.int16 if dtype != "fp32" else torch.int32).numpy()
    np.testing.assert_array_equal(bits.view(expected.dtype), expected)


def test_rows_ids_splits_and_targets_come_back(tmp_path):
    rows = rows_of(5)
    rows[1] = replace(rows[1], id="größe/µ 1.png", group="é", split="test")
    cache = make_cache(tmp_path / "cache.h5", rows=rows)
    assert list(cache.rows) == rows
    np.testing.assert_array_equal(cache.semantic(1), np.eye(8, dtype=np.uint8))
    assert cache.instances(2) == decode_instances(rows[2].instances)[0] == ()
    with pytest.raises(CacheError, match="holds no masks"):
        cache.semantic(0)
    with pytest.raises(CacheError, match="holds no instances"):
        cache.instances(1)


def test_a_row_that_lacks_a_level_or_has_another_size_is_not_written(tmp_path):
    cache = make_cache(tmp_path / "cache.h5")
    maps = random_maps(cache.recipe, 2)
    with CacheWriter(cache.path) as writer:
        with pytest.raises(ShapeError, match="every level"):
            writer.write(0, {"stride4": maps["stride4"]})
        with pytest.raises(ShapeError, match="another size"):
            writer.write(0, maps | {"stride4": maps["stride4"][:, :, :4]})
    assert not cache.done.any()


def test_missing_and_unreadable_rows_are_not_usable(tmp_path):
    cache = make_cache(tmp_path / "cache.h5")
    with CacheWriter(cache.path) as writer:
        writer.write(0, random_maps(cache.recipe, 2))
        writer.mark_unreadable(2, "part2.png is truncated: " + "ä" * 200)
        with pytest.raises(CacheIncompleteError, match="1 of 4 rows are missing"):
            cache.usable()
        writer.write(3, random_maps(cache.recipe, 1))
    assert cache.usable().tolist() == [0, 1, 3]
    assert cache.usable("val").tolist() == [1]
    assert cache.reason(2).startswith("part2.png is truncated: ää") and len(cache.reason(2).encode()) <= 240


# Padding


def test_content_tells_each_letterboxed_rows_own_part_of_the_frame(tmp_path):
    recipe = recipe_of()
    rows = [rows_of(3, content=content)[i] for i, content in enumerate([(32, 32), (20, 32), (32, 6)])]
    cache = filled_cache(tmp_path / "cache.h5", recipe, rows)
    with FeatureLoader(cache) as loader:
        ((_, features),) = loader.batches([np.array([2, 1])])
    assert features.content.tolist() == [[32, 6], [20, 32]]
    share = features.valid_share(8)  # cells of 8 pixels: 6 of the first column's 8 pixels are image
    assert share[0, 0].tolist() == [0.75, 0, 0, 0]
    assert share[1, :, 0].tolist() == [1, 1, 0.5, 0]


def test_content_is_none_when_every_image_fills_the_frame(tmp_path):
    with FeatureLoader(filled_cache(tmp_path / "cache.h5")) as loader:
        ((_, features),) = loader.batches([np.array([0])])
    assert features.content is None and features.valid_share(8) is None


# Making a file


def test_the_second_maker_of_a_file_leaves_the_first_ones_and_nothing_beside_it(tmp_path):
    path = tmp_path / "cache.h5"
    assert create_file(path, recipe_of(), data_info(), rows_of(3), {"maker": 1})
    assert not create_file(path, recipe_of(), data_info(), rows_of(3), {"maker": 2})
    assert read_contents(path).provenance == {"maker": 1}
    assert os.listdir(tmp_path) == ["cache.h5"]


def test_features_lie_contiguous_aligned_and_reserved(tmp_path):
    recipe = recipe_of([FeatureLevel("stride4", 96, 4), FeatureLevel("stride8", 7, 8)], (64, 64))
    cache = make_cache(tmp_path / "cache.h5", recipe, rows_of(5, (64, 64)))
    with h5py.File(cache.path, "r") as file:
        for level in recipe.levels:
            dataset = file[f"features/{level.name}"]
            assert dataset.chunks is None and dataset.compression is None
            assert dataset.shape == (5, level.channels, *level.cells((64, 64)))
            assert dataset.id.get_offset() % 4096 == 0
            assert dataset.attrs["stride"] == level.stride and dataset.attrs["dtype"] == b"fp16"
            assert dataset.id.get_create_plist().get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
    status = cache.path.stat()
    assert status.st_size > recipe.row_bytes * 5
    assert status.st_blocks * 512 >= status.st_size
    assert stat.S_IMODE(status.st_mode) == 0o644


def test_a_disk_that_refuses_any_write_of_a_new_file_leaves_nothing(tmp_path, monkeypatch):
    put, fsync, left = layout._put, os.fsync, [0]

    def refuse(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layout, "_put", lambda *what: (refuse(), put(*what)))
    monkeypatch.setattr(os, "fsync", lambda handle: (refuse(), fsync(handle)))
    make_cache(tmp_path / "first.h5")
    writes = -left[0]
    (tmp_path / "first.h5").unlink()
    for n in range(1, writes):  # the last sync is of the folder, where the file stands by then
        left[0] = n
        with pytest.raises(CacheError, match=r"can't be made: No space left[^@]*wanted[^@]*Nothing was changed"):
            make_cache(tmp_path / "cache.h5")
        assert not os.listdir(tmp_path)
    assert writes > 12


def test_a_file_is_whole_and_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened, fsync, link = [], os.fsync, os.link

    def syncing(handle):
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        happened.append(place.read_bytes() if place.is_file() else place)
        fsync(handle)

    def linking(source, target):
        happened.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "link", linking)
    path = make_cache(tmp_path / "cache.h5").path
    assert happened == [path.read_bytes(), "name", tmp_path]
    assert happened[0].startswith(MAGIC)


def test_the_place_of_an_image_is_stored_as_an_affine_map(tmp_path):
    cache = make_cache(tmp_path / "cache.h5", rows=rows_of(2, content=(16, 32)))
    with h5py.File(cache.path, "r") as file:
        np.testing.assert_array_equal(file["rows/affine"][0] @ [8, 8, 1], [32, 16])  # x, y: the far corner


def test_a_temporary_file_of_a_dead_process_is_swept_and_of_a_living_one_kept(tmp_path):
    living = make_temporary(tmp_path / "cache.h5", recipe_of(), data_info(), rows_of(1), {})
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", f"-{finished_process()}-"))
    shutil.copy(living, dead)
    others = [living.with_name(name + dead.name.removeprefix(".cache")) for name in (".cache2", ".other.cache")]
    for other in others:
        shutil.copy(living, other)
    remove_leftovers(tmp_path, "cache")
    assert living.exists() and not dead.exists() and all(other.exists() for other in others)


@pytest.mark.parametrize("name", ["cache", "a[b]*c"])
def test_a_sweep_survives_folders_and_numbers_that_no_process_has(tmp_path, name):
    living = make_temporary(tmp_path / f"{name}.h5", recipe_of(), data_info(), rows_of(1), {})
    number = f"-{os.getpid()}-"
    huge, folder = (living.with_name(living.name.replace(number, f"-{pid}-")) for pid in (10**30, finished_process()))
    shutil.copy(living, huge)
    folder.mkdir()
    remove_leftovers(tmp_path, name)
    assert living.exists() and huge.exists() and not folder.exists()


def finished_process() -> int:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_an_open_reader_keeps_its_file_when_a_newer_one_takes_the_name(tmp_path):
    path = tmp_path / "cache.h5"
    cache = filled_cache(path)
    expected = {name: m[[1]].tobytes() for name, m in random_maps(cache.recipe, 4).items()}
    replace_file(make_temporary(path, recipe_of(), data_info(), rows_of(9), {}), path)
    assert len(opened(path)) == 9
    assert cache.done.tolist() == [1, 1, 1, 1]
    assert cache.read_row(1, cache.levels[0]).tobytes() == expected["stride4"]
    for mode in ("memmap", "preadv"):  # opened only now, and of the old file all the same
        with FeatureLoader(cache, mode=mode) as loader:
            ((_, features),) = loader.batches([np.array([1])])
            assert {name: m.numpy().tobytes() for name, m in features.maps.items()} == expected


def test_contents_of_a_file_that_was_replaced_meanwhile_are_refused(tmp_path):
    path = tmp_path / "cache.h5"
    contents = make_cache(path).contents
    keeper = opened(path)  # holds the old file, so that its inode is not given away again
    replace_file(make_temporary(path, recipe_of(), data_info(), rows_of(9), {}), path)
    with pytest.raises(CacheError, match="replaced"):
        Cache(path, contents)
    assert len(keeper) == 4


# Identity and version


@pytest.mark.parametrize("field", ["classes", "name", "fingerprint"])
def test_what_is_said_of_the_data_set_is_part_of_the_identity(tmp_path, field):
    caches = [
        make_cache(tmp_path / name, data=replace(data_info(), **changed))
        for name, changed in (("one.h5", {}), ("two.h5", {field: ("a", "b") if field == "classes" else "other"}))
    ]
    assert len({cache.contents.identity_sha256 for cache in caches}) == 2
    value = caches[0].data.classes[0] if field == "classes" else getattr(caches[0].data, field)
    change_part(caches[0].path, "texts", lambda data: data.replace(f'"{value}"'.encode(), f'"X{value[1:]}"'.encode()))
    with pytest.raises(CacheError, match=r"is damaged.*texts.*featprobe extract"):
        open_cache_in_one_line(caches[0].path)


def open_cache_in_one_line(path: Path) -> None:
    try:
        open_cache(path)
    except CacheError as error:
        raise CacheError(str(error).replace("\n", " ")) from error


CHANGES = {
    "texts": lambda data: data.replace(b'"part3.png"', b'"part8.png"'),
    "rows/original_size": lambda data: b"\7" + data[1:],
    "rows/content_size": lambda data: b"\7" + data[1:],
    "targets/checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "provenance": lambda data: data.replace(b'"m"', b'"n"'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_part_but_labels_is_hashed_when_a_file_is_opened(tmp_path, name):
    path = tmp_path / "cache.h5"
    assert create_file(path, recipe_of(), data_info(), rows_of(4), {"maker": "m"})
    change_part(path, name, CHANGES[name])
    assert read_contents(path).damaged == (name,) and not read_contents(path).is_intact()
    with pytest.raises(CacheError, match=f"is damaged.*{name}"):
        open_cache(path)


@pytest.mark.parametrize("kind", ["semantic", "instances"])
def test_labels_are_hashed_when_a_row_is_used_first(tmp_path, kind):
    path = make_cache(tmp_path / "cache.h5").path
    change_part(path, f"targets/{kind}", lambda data: bytes([data[0] ^ 1]) + data[1:])
    cache, bad = open_cache(path), 1 if kind == "semantic" else 0
    assert cache.rows[bad + 2].id == f"part{bad + 2}.png"
    for used in (lambda: cache.rows[bad], lambda: getattr(cache, kind)(bad)):
        with pytest.raises(
            CacheError, match=rf"labels of row {bad}, part{bad}.png, are damaged[^@]*{path}[^@]*extract"
        ):
            used()
    assert not cache.contents.is_intact() and cache.contents.damaged_targets() == [bad]


def test_the_identity_does_not_depend_on_what_is_computed_later(tmp_path):
    empty, full = make_cache(tmp_path / "empty.h5"), filled_cache(tmp_path / "full.h5")
    assert empty.contents.identity_sha256 == full.contents.identity_sha256
    assert open_cache(full.path).contents.is_intact()


def test_a_newer_version_is_refused_with_both_versions_named(tmp_path):
    path = make_cache(tmp_path / "cache.h5").path
    with path.open("r+b") as stream:
        stream.seek(8)
        stream.write((4).to_bytes(4, "little"))
    with pytest.raises(CacheError, match="newer format") as caught:
        open_cache(path)
    assert "version 3" in str(caught.value) and "found   version 4" in str(caught.value)


def no_hdf5(path: Path) -> None:
    path.write_bytes(b"\x89PNG this is something else")


def other_hdf5(path: Path) -> None:
    h5py.File(path, "w").close()


def cut_short(path: Path) -> None:
    filled_cache(path)
    os.truncate(path, path.stat().st_size // 2)


def empty_file(path: Path) -> None:
    path.touch()


def no_version(path: Path) -> None:
    make_cache(path)
    with path.open("r+b") as stream:
        stream.seek(8)
        stream.write(bytes(4))


def no_level(path: Path) -> None:
    make_cache(path)
    change_header(path, lambda said: said["tables"].pop("features/stride8"))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (no_hdf5, "not a feature cache that can be opened"),
        (empty_file, "not a feature cache that can be opened"),
        (other_hdf5, "HDF5, but not a feature cache"),
        (cut_short, "not a feature cache that can be opened"),
        (no_version, "not a feature cache that can be opened"),
        (no_level, "not a feature cache that can be opened"),
    ],
)
def test_what_is_no_whole_cache_is_refused_by_name(tmp_path, spoil, text):
    path = tmp_path / "cache.h5"
    spoil(path)
    with pytest.raises(CacheError, match=text) as caught:
        open_cache(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(CacheError, match=r"There is no cache .*nothing\.h5"):
        open_cache(tmp_path / "nothing.h5")


# The header


def beside(path: Path, name: str = "rows/weight", size: int = 0, required: bool = False) -> None:
    """Have a header name one more part."""
    part = {"offset": path.stat().st_size - size, "bytes": size, "dtype": "u1", "shape": [size], "sha256": "0" * 64}

    def change(said: dict[str, Any]) -> None:
        said["parts"][name] = part | {"required": required}
        said["mood"] = "good"
        said["identity_sha256"] = Index.of(said, 3).identity()

    change_header(path, change)


def test_what_a_later_writer_adds_is_ignored_unless_it_is_required(tmp_path):
    path = filled_cache(tmp_path / "cache.h5").path
    beside(path)
    assert len(open_cache(path).usable()) == 4 and open_cache(path).contents.is_intact()
    beside(path, required=True)
    with pytest.raises(CacheError, match="newer format") as caught:
        open_cache(path)
    assert "rows/weight" in str(caught.value) and "Update featprobe" in str(caught.value)


# Where it can't be written


def say_what_happens(action: str, path: str, line: Connection) -> None:
    become_nobody()
    try:
        if action == "create":
            create_file(Path(path), recipe_of(), data_info(), rows_of(1), {})
        else:
            CacheWriter(Path(path))
        line.send("nothing")
    except CacheError as error:
        line.send(str(error))
    except BaseException as error:
        line.send(repr(error))


def as_nobody(action: str, path: Path) -> str:
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=say_what_happens, args=(action, str(path), theirs))
    child.start()
    assert ours.poll(60)
    child.join()
    return ours.recv()


@pytest.fixture
def open_folder():
    """A folder that others may enter (pytest's own are closed to them)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(open_folder):
    text = as_nobody("create", open_folder / "cache.h5")
    assert f"{open_folder}/cache.h5 can't be made: its folder can't be written (Permission denied)" in text
    assert "--workspace" in text
    assert not os.listdir(open_folder)


def test_a_file_that_cannot_be_written_is_named(open_folder):
    path = make_cache(open_folder / "cache.h5").path
    assert f"{path} can't be written: Permission denied" in as_nobody("write", path)


# Reading ahead


@pytest.fixture
def long_cache(tmp_path):
    """A cache of 64 rows of 66 kB."""
    recipe = recipe_of([FeatureLevel("stride4", 128, 4), FeatureLevel("stride32", 3, 32)], (64, 64))
    return filled_cache(tmp_path / "cache.h5", recipe, rows_of(64, (64, 64)))


@pytest.mark.parametrize("mode", ["memmap", "preadv", "direct"])
def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_crash(long_cache, mode):
    if mode == "direct" and not _direct_works(long_cache):
        pytest.skip("this file system has no O_DIRECT")
    orders = [np.array([i]) for i in range(64)]
    seen = 0
    with FeatureLoader(long_cache, mode=mode) as loader, pytest.raises(CacheError, match="cut short"):
        for _ in loader.batches(orders):
            seen += 1
            if seen == 2:
                time.sleep(0.05)  # the thread waits for a buffer by now; a map that is cut short in its hands is fatal
                os.truncate(long_cache.path, 200_000)
    assert 2 <= seen < 64


def test_a_cache_that_the_process_may_not_hold_in_memory_is_read_past_the_page_cache(long_cache, monkeypatch):
    assert choose_mode(long_cache, long_cache.levels) == "memmap"
    size = long_cache.recipe.row_bytes * len(long_cache)
    monkeypatch.setattr(machine, "_left_to_process", lambda: size)
    mode = "direct" if _direct_works(long_cache) else "preadv"
    assert choose_mode(long_cache, long_cache.levels) == mode
    assert choose_mode(long_cache, long_cache.levels[1:]) == "memmap", "of the last level there is little"


def test_a_file_cut_short_before_it_is_read_is_an_error(long_cache):
    os.truncate(long_cache.path, 200_000)
    with pytest.raises(CacheError, match="cut short"):
        FeatureLoader(long_cache, mode="memmap")
    with pytest.raises(CacheError, match="ended while it was read"):
        long_cache.read_row(60, long_cache.levels[0])


def test_an_error_in_the_order_of_rows_reaches_the_one_who_reads(long_cache):
    def orders():
        yield np.array([0])
        raise ValueError("no more")

    with FeatureLoader(long_cache) as loader, pytest.raises(ValueError, match="no more"):
        list(loader.batches(orders()))


def test_leaving_early_ends_the_reading_thread_even_of_an_endless_order(long_cache):
    asked = []

    def orders():
        while True:
            asked.append(1)
            yield np.array([len(asked) % 64])

    with FeatureLoader(long_cache) as loader:
        batches = loader.batches(orders())
        for _ in range(5):
            next(batches)
        batches.close()
    assert 5 <= len(asked) <= 10


def test_batches_of_other_sizes_follow_each_other(long_cache):
    expected = random_maps(long_cache.recipe, 64)["stride4"].view(np.float16)
    orders = [np.arange(3), np.arange(9, 2, -1), np.array([63])]
    with FeatureLoader(long_cache) as loader:
        for rows, features in loader.batches(orders):
            np.testing.assert_array_equal(features.maps["stride4"].numpy(), expected[rows])


# On another device: the same code with the machine's own memory in the device's place


def staged(cache, mode=None):
    """A loader that copies each batch out of its ring, as for a GPU, with several reading threads."""
    loader = FeatureLoader(cache, mode=mode)
    loader.staged = True
    loader.reader = RowReader(cache, mode=mode, threads=3)
    return loader


@pytest.fixture
def letterboxed(tmp_path):
    """A cache of 40 rows, whose images fill other parts of the frame."""
    recipe = recipe_of([FeatureLevel("stride4", 16, 4), FeatureLevel("stride32", 3, 32)], (64, 64))
    rows = [rows_of(40, (64, 64), content=(64 - k, 10 + k))[k] for k in range(40)]
    return filled_cache(tmp_path / "cache.h5", recipe, rows)


@pytest.mark.parametrize("mode", ["memmap", "preadv", "direct"])
def test_batches_on_their_way_to_a_device_are_those_of_the_file_and_last_until_the_next(letterboxed, mode):
    if mode == "direct" and not _direct_works(letterboxed):
        pytest.skip("this file system has no O_DIRECT")
    expected = {n: m.view(np.float16) for n, m in random_maps(letterboxed.recipe, 40).items()}
    random = np.random.default_rng(3)
    orders = [random.integers(0, 40, size) for size in (5, 1, 7, 2, 40, 0, 3, 7, 7)]
    with staged(letterboxed, mode) as loader:
        for (rows, features), order in zip(loader.batches(orders), orders, strict=True):
            np.testing.assert_array_equal(rows, order)
            time.sleep(0.005)  # in which the next batch is read and copied
            for name, m in features.maps.items():
                np.testing.assert_array_equal(m.numpy(), expected[name][rows])
            assert features.content.tolist() == [[64 - k, 10 + k] for k in rows.tolist()]


def test_an_error_or_an_early_end_stops_the_threads_of_a_staged_ring(long_cache):
    def orders():
        yield np.array([0])
        raise ValueError("no more")

    with staged(long_cache) as loader:
        with pytest.raises(ValueError, match="no more"):
            list(loader.batches(orders()))
        endless = loader.batches(repeat(np.array([1, 2])))
        next(endless), next(endless)
        endless.close()
        os.truncate(long_cache.path, 200_000)
        with pytest.raises(CacheError, match="cut short"):
            list(loader.batches([np.arange(64)]))
    assert not [t for t in threading.enumerate() if t.name.startswith(("feature-reader", "row-reader"))]


@pytest.fixture
def roomy(monkeypatch):
    """Sets the memory that rows may take on the device."""
    return lambda size: monkeypatch.setattr(reader, "device_room", lambda device: int(size / reader.DEVICE_SHARE))


def splits_of_forty():
    order = np.random.default_rng(0).permutation(40)
    return {"train": np.sort(order[:20]), "val": np.sort(order[20:28]), "test": np.sort(order[28:])}


def test_splits_move_whole_as_long_as_there_is_room_and_the_others_stream(letterboxed, roomy, monkeypatch):
    splits, width = splits_of_forty(), letterboxed.recipe.row_bytes
    monkeypatch.setattr(reader, "PIECE", 3 * width)
    roomy(32.5 * width)  # train and the 12 of test, or train and val
    expected = {n: m.view(np.float16) for n, m in random_maps(letterboxed.recipe, 40).items()}
    with staged(letterboxed) as loader:
        said = loader.keep_on_device(splits)
        assert said.startswith("features of train, val lie on cpu (") and said.endswith("test streamed from the file")
        assert loader.resident(splits["test"]) is None and loader.resident(splits["train"][1:]) is None
        with pytest.raises(ValueError, match="do not lie"):
            loader.positions(splits["test"][:2])
        asked = []
        monkeypatch.setattr(loader.reader, "read", lambda rows, out: asked.append(rows.tolist()))
        for name in ("train", "val"):
            resident = loader.resident(splits[name])
            assert resident is not None
            shuffled = np.random.default_rng(1).permutation(splits[name])[:6]
            index = loader.positions(shuffled)
            assert index.dtype == torch.int64 and splits[name][index.numpy()].tolist() == shuffled.tolist()
            for found in (resident(index), next(loader.batches([shuffled]))[1]):
                for level, m in found.maps.items():
                    np.testing.assert_array_equal(m.numpy(), expected[level][shuffled])
                assert found.content.tolist() == [[64 - k, 10 + k] for k in shuffled.tolist()]
            in_order = splits[name][2:7]
            ((_, features),) = loader.batches([in_order])
            np.testing.assert_array_equal(features.maps["stride4"].numpy(), expected["stride4"][in_order])
            own = next(held for held in loader.held if len(held.rows) == len(splits[name]))
            assert features.maps["stride4"].data_ptr() == own.maps["stride4"][2:].data_ptr()  # not copied
        assert asked == []
        list(loader.batches([splits["test"][:2], splits["test"][2:4]]))
        assert asked == [splits["test"][:2].tolist(), splits["test"][2:4].tolist()]


def test_rows_of_several_splits_in_one_order_come_from_wherever_they_lie(letterboxed, roomy):
    splits, width = splits_of_forty(), letterboxed.recipe.row_bytes
    roomy(20 * width)
    expected = random_maps(letterboxed.recipe, 40)["stride4"].view(np.float16)
    orders = [splits["train"][:3], splits["test"][:3], splits["train"][4:9], np.arange(40)]
    with staged(letterboxed) as loader:
        loader.keep_on_device(splits)
        for (rows, features), order in zip(loader.batches(iter(orders)), orders, strict=True):
            np.testing.assert_array_equal(features.maps["stride4"].numpy(), expected[order])
            np.testing.assert_array_equal(rows, order)


def test_a_split_that_runs_out_of_memory_on_its_way_streams_with_all_that_follow(letterboxed, roomy, monkeypatch):
    splits = splits_of_forty()
    roomy(2**40)
    with staged(letterboxed) as loader:
        plain, expected = loader._moved, random_maps(letterboxed.recipe, 40)["stride4"].view(np.float16)

        def narrow(rows):
            found = plain(rows)
            if len(rows) == len(splits["val"]):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return found

        monkeypatch.setattr(loader, "_moved", narrow)
        said = loader.keep_on_device(splits)
        assert said.startswith("features of train lie on") and said.endswith("val, test streamed from the file")
        assert [len(held.rows) for held in loader.held] == [20]
        for rows, features in loader.batches([splits["train"][:4], splits["val"], splits["test"][:3]]):
            np.testing.assert_array_equal(features.maps["stride4"].numpy(), expected[rows])


def test_a_split_without_rows_neither_moves_nor_streams(letterboxed, roomy):
    roomy(2**40)
    with staged(letterboxed) as loader:
        said = loader.keep_on_device({**splits_of_forty(), "val": np.array([], dtype=np.intp)})
        assert said.startswith("features of train, test lie on") and "val" not in said and len(loader.held) == 2
        assert sum(len(rows) for rows, _ in loader.batches([np.arange(5), np.arange(30, 40)])) == 15


def test_nothing_moves_where_there_is_no_room_or_the_memory_is_the_machines_own(letterboxed, roomy):
    with FeatureLoader(letterboxed) as loader:
        assert loader.keep_on_device(splits_of_forty()) == "" and not loader.held
    roomy(0)
    with staged(letterboxed) as loader:
        assert loader.keep_on_device(splits_of_forty()) == "train, val, test streamed from the file"
        assert not loader.held


# The page


def test_the_pages_example_reads_a_real_file(tmp_path, monkeypatch):
    filled_cache(tmp_path / "parts.h5")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code_block(PAGE), str(PAGE), "exec"), names)
    expected = random_maps(recipe_of(), 4)["stride8"][2]
    assert names["features"].tobytes() == expected.tobytes()
    assert names["found"] == xxhash.xxh3_64_intdigest(expected.tobytes())


def test_the_pages_example_notices_a_damaged_row(tmp_path, monkeypatch):
    cache = filled_cache(tmp_path / "parts.h5")
    with h5py.File(cache.path, "r+") as file:
        file["features/stride8"][2, 0, 0, 0] += 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="damaged"):
        exec(compile(code_block(PAGE), str(PAGE), "exec"), {})


def test_the_page_names_every_dataset_and_attribute_of_a_real_file(tmp_path):
    page = PAGE.read_text(encoding="utf-8").partition("## Older versions")[0]
    path = filled_cache(tmp_path / "cache.h5").path
    with h5py.File(path, "r") as file:
        found = list(file.attrs)
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    said = header_of(path)
    assert {*said["parts"], *said["tables"]} == set(found) - set(file_attributes(path))
    found += said
    levels = [name for name in found if name.startswith("features/")]
    assert len(levels) == 2 and "`features/<level>`" in page
    assert [name for name in found if name not in levels and f"`{name}`" not in page] == []


def file_attributes(path: Path) -> list[str]:
    with h5py.File(path, "r") as file:
        return list(file.attrs)
