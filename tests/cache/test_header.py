"""The header of a cache of version 3: what anybody may have written there is refused before it is used."""

import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import (
    change_header,
    change_part,
    data_info,
    filled_cache,
    header_of,
    make_cache,
    opened,
    recipe_of,
    rows_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.cache import RowLocks, create_file, open_cache, read_contents, read_states
from featprobe.cache import rows as row_module
from featprobe.cache.contents import LABELS
from featprobe.cache.header import FIXED, LEAST_BLOCK, Index
from featprobe.errors import CacheError, FieldError
from featprobe.geometry import Part, Placement
from featprobe.levels import FeatureLevel
from featprobe.specs import DataInfo

Header = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache, which no test changes."""
    return filled_cache(tmp_path_factory.mktemp("header") / "cache.h5").path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "cache.h5"))


# What is written


def test_the_header_and_hdf5_say_the_same_of_every_array(path: Path) -> None:
    said, content = header_of(path), path.read_bytes()
    with h5py.File(path, "r") as file:
        assert file.userblock_size == said["user_block"] == LEAST_BLOCK
        for name, entry in (said["parts"] | said["tables"]).items():
            dataset = file[name]
            assert dataset.shape == tuple(entry["shape"]) and dataset.dtype == np.dtype(entry["dtype"])
            size = entry["bytes"] if "bytes" in entry else entry["row_bytes"] * entry["rows"]
            assert dataset[...].tobytes() == content[entry["offset"] :][:size]
            assert not size or dataset.id.get_offset() == entry["offset"]
        assert json.loads(file.attrs["recipe"]) == said["recipe"]
        assert [file.attrs[name].decode() for name in ("recipe_key", "identity_sha256")] == [
            said["recipe_key"],
            said["identity_sha256"],
        ]


def test_no_object_of_the_file_is_of_variable_length(path: Path) -> None:
    kinds = []
    with h5py.File(path, "r") as file:
        objects = [file]
        file.visititems(lambda name, item: objects.append(item))
        for item in objects:
            kinds += [item.attrs.get_id(name).dtype for name in item.attrs]
            kinds += [item.dtype] if isinstance(item, h5py.Dataset) else []
    assert len(kinds) > 20 and not any(h5py.check_dtype(vlen=kind) or kind.hasobject for kind in kinds)
    assert b"GCOL" not in path.read_bytes()  # HDF5's heap for such objects


@pytest.mark.parametrize("tool", ["h5ls", "h5dump"])
def test_tools_of_hdf5_show_the_file(path: Path, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    words = [tool, "-r", path] if tool == "h5ls" else [tool, "-d", "/done", path]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert "features/stride8" in done.stdout or "DATASPACE" in done.stdout


def test_the_block_grows_with_the_index(tmp_path: Path) -> None:
    levels = [FeatureLevel(f"block{i}", 2, 16) for i in range(48)]
    cache = filled_cache(tmp_path / "cache.h5", recipe_of(levels))
    said = header_of(cache.path)
    assert said["user_block"] > LEAST_BLOCK and len(json.dumps(said)) < said["user_block"]
    assert len(open_cache(cache.path).usable()) == 4


def test_two_makings_of_one_cache_have_one_identity(tmp_path: Path) -> None:
    for name, made in (("a.h5", {}), ("b.h5", {"command": "featprobe extract " + "x" * 9000})):
        assert create_file(tmp_path / name, recipe_of(), data_info(), rows_of(4), made)
    a, b = (read_contents(tmp_path / name) for name in ("a.h5", "b.h5"))
    assert a.identity_sha256 == b.identity_sha256 and a.extents != b.extents
    assert create_file(tmp_path / "c.h5", recipe_of(), data_info(), rows_of(5), {})
    assert read_contents(tmp_path / "c.h5").identity_sha256 != a.identity_sha256


def test_texts_full_of_marks_of_json_are_kept_and_bounded(tmp_path: Path) -> None:
    rows = [
        replace(row, id=f"{i}" + '[{,"\\é' * 9000, group="[" * 9000, image="," * 9000)
        for i, row in enumerate(rows_of(5))
    ]
    cache = make_cache(tmp_path / "cache.h5", rows=rows)
    assert list(open_cache(cache.path).rows) == rows


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_mode_of_a_cache_and_its_lock_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = make_cache(tmp_path / "cache.h5").path
        with RowLocks(path):
            pass
    finally:
        os.umask(before)
    modes = {own.name: own.stat().st_mode & 0o777 for own in tmp_path.iterdir()}
    assert modes == {"cache.h5": 0o666 & ~umask, ".cache.lock": 0o666 & ~umask}


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".cache.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="can't be written"):
        RowLocks(tmp_path / "cache.h5")
    assert not (tmp_path / "elsewhere").exists()


# What is refused


def places(path: Path) -> list[tuple[int, int]]:
    """Bytes [start, stop) of the header and of each part but labels, which are hashed when a file is opened."""
    _, _, size, _ = FIXED.unpack(path.read_bytes()[: FIXED.size])
    parts = [entry for name, entry in header_of(path)["parts"].items() if name not in LABELS]
    return [(0, FIXED.size + size), *((e["offset"], e["offset"] + e["bytes"]) for e in parts)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_in_header_or_parts_is_refused(whole: Path, data: st.DataObject) -> None:
    start, stop = data.draw(st.sampled_from(places(whole)))
    offset, bit = data.draw(st.integers(start, stop - 1)), data.draw(st.integers(0, 7))
    path = whole.with_name("flipped.h5")
    content = bytearray(whole.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CacheError) as caught:
        open_cache(path)
    assert str(path) in str(caught.value)


def entry(name: str, **changed: Any) -> Callable[[Header], None]:
    """Change an entry of the header."""
    kind = "tables" if name.startswith(("features", "done", "checksum", "reason")) else "parts"
    return lambda said: said[kind][name].update(changed)


def recipe(**changed: Any) -> Callable[[Header], None]:
    def change(said: Header) -> None:
        said["recipe"].update(changed)

    return change


def both(*changes: Callable[[Header], None]) -> Callable[[Header], None]:
    return lambda said: [change(said) for change in changes] and None  # type: ignore[return-value]


LEVEL = {"name": "stride4", "channels": 6, "stride": 4}
HOSTILE: dict[str, Callable[[Header], object]] = {
    "a level in the header": entry("features/stride4", offset=0),
    "a level in the middle of the texts": lambda said: said["tables"]["features/stride4"].update(
        offset=said["parts"]["texts"]["offset"] + 9
    ),
    "a level past the end": entry("features/stride8", offset=1 << 40),
    "a level at the end": entry("features/stride8", offset=1 << 62),
    "a negative offset": entry("done", offset=-1),
    "an offset of a fraction": entry("done", offset=4096.0),
    "an offset that is true": entry("done", offset=True),
    "an offset of text": entry("done", offset="4096"),
    "an offset beyond 64 bits": entry("done", offset=1 << 70),
    "two parts in one place": lambda said: said["parts"]["rows/original_size"].update(
        offset=said["parts"]["rows/content_size"]["offset"]
    ),
    "too few rows of a level": entry("features/stride4", rows=2, shape=[2, 6, 8, 8]),
    "a narrow level": entry("features/stride4", row_bytes=8),
    "huge rows": entry("features/stride4", row_bytes=1 << 50),
    "another shape": entry("features/stride4", shape=[4, 8, 8, 6]),
    "another type": entry("features/stride4", dtype="object"),
    "done of three": entry("done", rows=3, shape=[3]),
    "checksums of one level": entry("checksum", row_bytes=8, shape=[4, 1]),
    "no checksum": lambda said: said["tables"].pop("checksum"),
    "no texts": lambda said: said["parts"].pop("texts"),
    "a hash that is no text": entry("texts", sha256=5),
    "a place that is a list": lambda said: said["parts"].update(texts=[1, 2]),
    "parts that are a list": lambda said: said.update(parts=[]),
    "many rows": lambda said: said.update(rows=1 << 40),
    "no rows": lambda said: said.update(rows=0),
    "rows that are null": lambda said: said.update(rows=None),
    "images of a cache without parts": lambda said: said.update(images=4),
    "a block that is no power of two": lambda said: said.update(user_block=5000),
    "a block smaller than the header": lambda said: said.update(user_block=512),
    "another key": lambda said: said.update(recipe_key="0" * 64),
    "an identity that is no text": lambda said: said.update(identity_sha256=None),
    "a recipe that is a list": lambda said: said.update(recipe=[1]),
    "a stride of 0": recipe(levels=[LEVEL | {"stride": 0}]),
    "a negative stride": recipe(levels=[LEVEL | {"stride": -4}]),
    "no levels": recipe(levels=[]),
    "a level twice": recipe(levels=[LEVEL, LEVEL]),
    "a level outside": recipe(levels=[LEVEL | {"name": "../done"}]),
    "channels of a fraction": recipe(levels=[LEVEL | {"channels": 2.5}]),
    "a huge frame": recipe(frame=[1 << 40, 1 << 40]),
    "a negative frame": recipe(frame=[-32, -32]),
    "a frame of one side": recipe(frame=[32]),
    "a frame between strides": recipe(frame=[33, 32]),
    "a dtype of another kind": recipe(dtype=["fp16"]),
    "an unknown dtype": recipe(dtype="object"),
    "an unknown fit": recipe(fit="crop"),
    "an unknown field": recipe(colour="red"),
    "an unknown intensity": recipe(intensity="brightness"),
    "a mean that is text": recipe(mean="0.5"),
    "a window of one": recipe(window=[1]),
    "an unknown view": recipe(views=["identity", "spin"]),
    "version 7 of the recipe": recipe(version=7),
    "a tile of nothing": recipe(tile=0),
    "a label that is null": recipe(label=None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_sealed_header_that_is_wrong_is_refused_in_words(path: Path, what: str) -> None:
    change_header(path, HOSTILE[what])
    for read in (open_cache, read_states):
        with pytest.raises(CacheError, match="not a feature cache that can be opened") as caught:
            read(path)
        text = str(caught.value)
        assert str(path) in text and "  wanted  " in text and "  found   " in text and len(text) < 2000


TEXTS: dict[str, Callable[[Any], object]] = {
    "a group too few": lambda said: said["rows"]["group"].pop(),
    "a number as an id": lambda said: said["rows"].update(id=[1, 2, 3, 4]),
    "ids that are text": lambda said: said["rows"].update(id="abcd"),
    "one id twice": lambda said: said["rows"].update(id=["a"] * 4),
    "half a character": lambda said: said["rows"].update(group=["\ud800", "b", "c", "d"]),
    "no rows": lambda said: said.pop("rows"),
    "no data": lambda said: said.pop("data"),
    "classes that are a number": lambda said: said["data"].update(classes=3),
    "no class": lambda said: said["data"].update(classes=[]),
    "300 classes": lambda said: said["data"].update(classes=["a"] * 300),
    "a name that is null": lambda said: said["data"].update(name=None),
    "category ids of text": lambda said: said["data"].update(category_ids=["a"]),
    "a list": lambda said: said.clear(),
}


def sealed(path: Path, name: str, data: bytes) -> None:
    """Give a part other bytes, at the end of the file, and have all hashes hold."""
    offset = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(data)

    def change(said: Header) -> None:
        own = {"offset": offset, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        said["parts"][name].update(own)
        if name in ("texts", "provenance"):
            said["parts"][name]["shape"] = [len(data)]
        said["identity_sha256"] = Index.of(said, 3).identity()

    change_header(path, change)


def part_of(path: Path, name: str) -> bytes:
    place = header_of(path)["parts"][name]
    return path.read_bytes()[place["offset"] :][: place["bytes"]]


@pytest.mark.parametrize("what", TEXTS)
def test_sealed_texts_that_are_wrong_are_refused_in_words(path: Path, what: str) -> None:
    said = json.loads(part_of(path, "texts"))
    sealed(path, "texts", json.dumps(said).encode())
    assert len(open_cache(path)) == 4, "what is only moved is sound"
    TEXTS[what](said)
    sealed(path, "texts", json.dumps(said).encode())
    with pytest.raises(CacheError, match="not a feature cache that can be opened"):
        open_cache(path)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000_000,
        b"[" * 90_000,
        b"[],[]," * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"NaN",
        b'{"rows": 1e999}',
        b"",
    ],
    ids=["deep", "less deep", "wide", "objects", "no text", "no number", "infinite", "empty"],
)
@pytest.mark.parametrize("name", ["texts", "provenance"])
def test_json_that_is_none_or_endless_is_refused(path: Path, name: str, data: bytes) -> None:
    sealed(path, name, data)
    with pytest.raises(CacheError, match="not a feature cache that can be opened"):
        open_cache(path)


PARTS: dict[str, tuple[str, Any]] = {
    "an image of no height": ("rows/original_size", np.zeros((4, 2), "<i4")),
    "an image of 2^31 pixels": ("rows/original_size", np.full((4, 2), 2**31 - 1, "<i4")),
    "more than the frame": ("rows/content_size", np.full((4, 2), 33, "<i4")),
    "negative content": ("rows/content_size", np.full((4, 2), -1, "<i4")),
    "offsets that fall": ("targets/semantic_offset", np.array([0, 9, 5, 9, 9], "<u8")),
    "offsets past the end": ("targets/instances_offset", np.array([0, 1, 2, 3, 2**63], "<u8")),
    "offsets that begin late": ("targets/instances_offset", np.array([1, 1, 1, 1, 1], "<u8")),
}


@pytest.mark.parametrize("what", PARTS)
def test_sealed_arrays_that_make_no_sense_are_refused(path: Path, what: str) -> None:
    name, array = PARTS[what]
    sealed(path, name, array.tobytes())
    with pytest.raises(CacheError, match="not a feature cache that can be opened"):
        open_cache(path)


BOXES: dict[str, tuple[str, Any]] = {
    "a part outside of its image": ("rows/part", np.array([[40, 0, 32, 32], [32, 0, 32, 32]], "<i4")),
    "a part without height": ("rows/part", np.array([[0, 0, 0, 32], [32, 0, 32, 32]], "<i4")),
    "a part of another size": ("rows/part", np.array([[0, 0, 16, 32], [32, 0, 32, 32]], "<i4")),
    "an image that is none": ("rows/image_index", np.array([0, 7], "<i4")),
    "a negative image": ("rows/image_index", np.array([-1, 0], "<i4")),
}


@pytest.mark.parametrize("what", BOXES)
def test_parts_that_are_none_of_their_images_are_refused(tmp_path: Path, what: str) -> None:
    frame = Placement((32, 32), (32, 32), (32, 32))
    image = replace(rows_of(1)[0], placement=Placement((32, 64), (32, 64), (32, 64)))
    rows = [replace(image, id=f"p@{x}", placement=frame, part=Part(x, 0, 32, 32), image_index=0) for x in (0, 32)]
    tiled = replace(recipe_of(), tile=32, version=2)
    path = tmp_path / "cache.h5"
    assert create_file(path, tiled, data_info(), rows, {}, [image])
    assert list(open_cache(path).rows) == rows and list(open_cache(path).images) == [image]
    name, array = BOXES[what]
    sealed(path, name, array.tobytes())
    with pytest.raises(CacheError, match="not a feature cache that can be opened"):
        open_cache(path)


@pytest.mark.parametrize("size", [1 << 25, 1 << 40])
def test_a_file_that_claims_long_texts_is_refused_without_memory(path: Path, size: int) -> None:
    os.truncate(path, 1 << 42)  # a hole: no byte of it is on the disk

    def change(said: Header) -> None:
        said["parts"]["texts"].update(offset=1 << 30, bytes=size, shape=[size])

    change_header(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CacheError, match="texts of at most"):
        open_cache(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


@pytest.mark.parametrize("length", [struct.pack("<I", 1 << 31), struct.pack("<I", 1 << 20), bytes(4)])
def test_a_header_of_another_length_is_refused(path: Path, length: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(12)
        stream.write(length)
    with pytest.raises(CacheError, match=r"not a feature cache that can be opened|ended while"):
        open_cache(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cache.h5"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to nothing": lambda p: os.symlink("/nowhere/else", p)}[kind](path)
    with pytest.raises(CacheError, match=r"cache\.h5"):
        open_cache(path)


# What it takes


def test_reading_enters_neither_hdf5_nor_looking_after_caches_torch(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "parts-000000"
    folder.mkdir(parents=True)
    path.rename(folder / "some-00000000.h5")
    code = (
        "import sys\nfrom featprobe.cli.main import cli\n"
        "for words in (['ls'], ['info', 'some'], ['verify', '--quiet'], ['rm', 'some', '--yes']):\n"
        "    cli(['--workspace', sys.argv[1], 'cache', *words], standalone_mode=False)\n"
        "    print(words[0], 'HEAVY', sorted({'h5py', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heavy = [line for line in done.stdout.splitlines() if " HEAVY " in line]
    assert heavy == [f"{name} HEAVY []" for name in ("ls", "info", "verify", "rm")]


def test_labels_read_in_pieces_are_those_of_each_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = opened(path).rows, []
    for piece in (1, 60, 1 << 22):
        monkeypatch.setattr(row_module, "PIECE", piece)
        for kind in ("semantic", "instances"):
            assert list(rows.targets[kind].each()) == [getattr(row, kind) for row in rows]
            counts.append(sum(map(len, rows.targets[kind].each())))
    assert all(counts)


def test_rows_are_made_one_by_one_and_columns_need_no_labels(path: Path) -> None:
    change_part(path, "targets/instances", lambda data: bytes(len(data)))
    rows = opened(path).rows
    assert rows.column("id") == [f"part{i}.png" for i in range(4)] and rows.placement(0).frame == (32, 32)
    assert rows.texts["split"][-1] == "train" and rows.texts["split"][1:3] == ["val", "test"]
    with pytest.raises(CacheError, match=r"labels of row 0, part0\.png"):
        rows[0]
    assert rows.damaged() == [0, 2] and rows[1] == rows.unchecked(-3 % 4)
    with pytest.raises(IndexError):
        rows[4]
    assert [row.id for row in rows[1::2]] == ["part1.png", "part3.png"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("root", "a\0b"),
        ("root", "\ud800"),
        ("name", "\udcff"),
        ("classes", ("background", "\ud800")),
        ("notes", ("\ud800",)),
    ],
)
def test_texts_that_no_file_can_hold_are_refused_before_anything_is_trained(field: str, value: object) -> None:
    with pytest.raises(FieldError, match=f"{field}: wanted"):
        DataInfo.from_json({**data_info().to_json(), field: value})
