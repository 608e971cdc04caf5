"""Cache files that a colleague made on purpose: whole by the rules of HDF5, and sealed anew, as anybody can seal them.

Each variant is a function of a sound file; `OLD` are of versions 1 and 2, `NEW` of version 3. A reader must refuse them
all, or serve what is true.
"""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from helpers import data_info, random_maps, recipe_of, rows_of
from numpy.typing import NDArray
from old_caches import contiguous, seal, write_old
from PIL import Image

from featprobe.cache import CacheWriter, Row, create_file
from featprobe.geometry import Part, Placement
from featprobe.specs import FeatureRecipe
from featprobe.targets import encode_instances, encode_semantic

ROWS = 12
SECRET = b"the-canary-that-nobody-may-read!" * 64
"""What lies in a file beside the cache, of which no byte may come out."""
Change = Callable[[Path], None]
OLD: dict[str, Change] = {}
"""By name; those that end in `of parts` are made of a file of version 2."""
NEW: dict[str, Change] = {}
LONG: set[str] = set()
"""Variants of OLD that are like others, and that `make attack` alone runs: each takes a process of its own."""
HARMLESS: set[str] = set()
"""Variants that must be read as if nothing were."""


# Sound files


def labelled(rows: list[Row]) -> list[Row]:
    """Each row with a mask and a list of objects."""
    mask = encode_semantic(np.eye(8, dtype=np.uint8))
    return [replace(row, semantic=mask, instances=encode_instances(())) for row in rows]


def parts_of(rows: list[Row]) -> tuple[FeatureRecipe, list[Row], list[Row]]:
    """A recipe of tiles, rows that are two tiles of each image, and the images."""
    recipe = replace(recipe_of(), version=2, tile=8, overlap=0, fit="letterbox")
    images = [
        replace(row, id=f"image{i}", image=f"images/{i}.png", placement=Placement((8, 16), (8, 16), (8, 16)),
                semantic=encode_semantic(np.zeros((8, 16), np.uint8)))
        for i, row in enumerate(rows[: ROWS // 2])
    ]  # fmt: skip
    owned = [
        replace(row, group=images[i // 2].group, split=images[i // 2].split, image=images[i // 2].image,
                part=Part(8 * (i % 2), 0, 8, 8), image_index=i // 2)
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return recipe, owned, images


def write_sound(path: Path, version: int, parts: bool = False) -> None:
    """A complete cache of twelve rows."""
    rows, recipe, images = labelled(rows_of(ROWS)), recipe_of(), []
    if parts:
        recipe, rows, images = parts_of(rows)
    maps = random_maps(recipe, ROWS)
    made = {"command": "featprobe extract", "created": "2026", "featprobe": "0.1.0"}
    if version < 3:
        write_old(path, recipe, data_info(), rows, made, images, maps)
        return
    create_file(path, recipe, data_info(), rows, made, images)
    with CacheWriter(path) as writer:
        writer.write(0, maps)


# Versions 1 and 2: how files are changed


def old(name: str, sealed: bool = True) -> Callable[[Change], Change]:
    """Register a change of an old file, after which it is sealed where that is still possible."""

    def register(change: Change) -> Change:
        def both(path: Path) -> None:
            change(path)
            if sealed:
                try:
                    seal(path)
                except Exception:  # what can't be read can't be sealed: the old seal stays
                    return

        OLD[name] = both
        return change

    return register


def edit(work: Callable[[h5py.File], None]) -> Change:
    """A change through h5py."""

    def change(path: Path) -> None:
        with h5py.File(path, "r+", locking=False) as file:
            work(file)

    return change


def instead(name: str, make: Callable[[h5py.File, str, NDArray[Any], Path], None]) -> Change:
    """A change that deletes a dataset and makes another in its place, of its content."""

    def change(path: Path) -> None:
        with h5py.File(path, "r+", locking=False) as file:
            held = file[name][...]
            del file[name]
            make(file, name, held, path)

    return change


def secret_beside(path: Path) -> Path:
    """The file that nobody may read."""
    secret = path.parent / "secret"
    secret.write_bytes(SECRET)
    return secret


def external(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    dtype = held.dtype if held.dtype != object else np.dtype("S16")
    size = int(np.prod(held.shape, dtype=np.int64)) * dtype.itemsize
    file.create_dataset(name, shape=held.shape, dtype=dtype, external=[(str(secret_beside(path)), 0, size)])


def external_pipe(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    file.create_dataset(name, shape=held.shape, dtype=held.dtype, external=[("pipe", 0, held.nbytes)])


def beside(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> Path:
    """Another HDF5 file with a dataset that would do."""
    other = path.parent / "other.h5"
    with h5py.File(other, "w") as made:
        if held.dtype == object:
            made.create_dataset("x", data=[SECRET.decode()[:16]] * len(held), dtype=h5py.string_dtype("utf-8"))
        else:
            made["x"] = held
    return other


def linked_outside(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    beside(file, name, held, path)
    file[name] = h5py.ExternalLink("other.h5", "/x")


def linked_to_a_pipe(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    file[name] = h5py.ExternalLink("pipe", "/x")


def linked_softly(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file["elsewhere"] = held if held.dtype != object else [str(own, "utf-8") for own in held]
    file[name] = h5py.SoftLink("/elsewhere")


def dangling(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file[name] = h5py.SoftLink("/nowhere")


def to_itself(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file[name] = h5py.SoftLink(f"/{name}")


def virtual(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    other = beside(file, name, held, path)
    layout = h5py.VirtualLayout(shape=held.shape, dtype=held.dtype)
    layout[...] = h5py.VirtualSource(str(other), "x", shape=held.shape)
    file.create_virtual_dataset(name, layout)


def chunked(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_dataset(name, data=held, chunks=True)


def compressed(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_dataset(name, data=held, compression="gzip")


def compact(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.py_create(held.dtype), h5py.h5s.create_simple(held.shape)
    group, _, leaf = name.rpartition("/")
    h5py.Dataset(h5py.h5d.create(file[group or "/"].id, leaf.encode(), kind, space, plist))[...] = held


def as_array(make: Callable[[NDArray[Any]], Any]) -> Callable[[h5py.File, str, NDArray[Any], Path], None]:
    """Another array of the same name."""

    def build(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
        file[name] = make(held)

    return build


def as_type(dtype: Any) -> Callable[[h5py.File, str, NDArray[Any], Path], None]:
    """The same shape of another type, zeros."""

    def build(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
        file.create_dataset(name, shape=held.shape, dtype=dtype)

    return build


def as_shape(*shape: int, dtype: str = "u1", **how: Any) -> Callable[[h5py.File, str, NDArray[Any], Path], None]:
    """An array that claims a size and takes no room."""

    def build(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
        file.create_dataset(name, shape=shape, dtype=dtype, **how)

    return build


def unallocated(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    group, _, leaf = name.rpartition("/")
    kind, space = h5py.h5t.py_create(held.dtype), h5py.h5s.create_simple((1 << 40, *held.shape[1:]))
    h5py.h5d.create(file[group or "/"].id, leaf.encode(), kind, space, plist)


def a_group(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_group(name)


def a_named_type(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file[name] = np.dtype("u1")


def no_shape(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file[name] = h5py.Empty("f4")


def one_value(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file[name] = 7


def references(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_dataset(name, shape=held.shape, dtype=h5py.ref_dtype)


def opaque(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_dataset(name, shape=held.shape, dtype=h5py.opaque_dtype(np.dtype("V4")))


def of_lists(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
    file.create_dataset(name, shape=held.shape[:1], dtype=h5py.vlen_dtype(np.dtype("i4")))


def features_of(rows: int, channels: int, height: int, width: int) -> Callable[..., None]:
    def build(file: h5py.File, name: str, held: NDArray[Any], path: Path) -> None:
        contiguous(file, name, (rows, channels, height, width), "<f2")

    return build


LEVEL = "features/stride4"
for name_ in ("rows/id", "rows/original_size", "rows/affine", "targets/semantic", "targets/checksum", LEVEL, "done"):
    old(f"{name_} in another file")(instead(name_, external))
for name_ in ("rows/id", "rows/split", "targets/semantic", "targets/semantic_offset", LEVEL, "done", "reason"):
    old(f"{name_} linked outside")(instead(name_, linked_outside))
for name_ in ("rows/original_size", "targets/checksum", "targets/instances", LEVEL):
    old(f"{name_} virtual")(instead(name_, virtual))
for name_ in ("rows/id", "rows/content_size", "checksum"):
    old(f"{name_} linked softly")(instead(name_, linked_softly))
for name_ in ("rows/content_size", "targets/semantic", LEVEL, "done"):
    old(f"{name_} in chunks")(instead(name_, chunked))
for name_, make_ in {
    "rows/original_size": external_pipe,
    "rows/group": linked_to_a_pipe,
    "rows/image": dangling,
    "rows/image_hash": to_itself,
}.items():
    old(f"{name_}: {make_.__name__}")(instead(name_, make_))
for name_, make_ in {"targets/semantic": compressed, "rows/original_size": compact, "checksum": compact}.items():
    old(f"{name_} {make_.__name__}")(instead(name_, make_))
for name_ in ("rows/original_size", "done", LEVEL, "rows/id", "targets/semantic"):
    for make_ in (a_group, a_named_type, no_shape, one_value):
        old(f"{name_}: {make_.__name__}")(instead(name_, make_))
        LONG.add(f"{name_}: {make_.__name__}")
LONG -= {"rows/original_size: a_group", "done: a_named_type", "rows/id: no_shape", f"{LEVEL}: one_value"}
for name_ in ("rows/original_size", "targets/semantic_offset"):
    for make_ in (references, opaque, of_lists):
        LONG |= {f"{name_}: {make_.__name__}"} if name_ == "targets/semantic_offset" else set()
        old(f"{name_}: {make_.__name__}")(instead(name_, make_))
for name_, dtype_ in {
    "rows/original_size": "<f4", "rows/content_size": ">i4", "rows/affine": "<f4", "targets/checksum": "<i8",
    "targets/semantic_offset": "<i8", "targets/semantic": "S1", LEVEL: "<i2", "done": "?", "checksum": ">u8",
    "reason": "S100", "rows/id": "S16", "rows/group": "<i4",
}.items():  # fmt: skip
    old(f"{name_} of the type {dtype_}")(instead(name_, as_type(dtype_)))
    LONG.add(f"{name_} of the type {dtype_}")
LONG -= {
    "rows/content_size of the type >i4",
    "rows/id of the type S16",
    f"{LEVEL} of the type <i2",
    "reason of the type S100",
}
old("checksum of a compound type")(instead("checksum", as_type([("a", "u4"), ("b", "u4")])))
for name_, make_ in {
    "2 rows": features_of(2, 6, 8, 8), "more rows": features_of(40, 6, 8, 8), "too narrow": features_of(ROWS, 6, 8, 4),
    "too wide": features_of(ROWS, 6, 8, 16), "more channels": features_of(ROWS, 7, 8, 8),
}.items():  # fmt: skip
    old(f"features of {name_}")(instead(LEVEL, make_))
old("features that claim 2^40 rows")(instead(LEVEL, unallocated))
old("features in one row")(instead(LEVEL, as_array(lambda held: held.reshape(-1))))
for name_ in ("done", "reason", "checksum", "rows/group", "rows/original_size", "targets/checksum", "rows/affine"):
    LONG |= {f"{name_} of 3 rows"} - {"done of 3 rows", "rows/group of 3 rows"}
    old(f"{name_} of 3 rows")(
        instead(name_, as_array(lambda held: held[:3] if held.dtype != object else [own.decode() for own in held[:3]]))
    )
old("checksum of one level")(instead("checksum", as_array(lambda held: held[:, :1])))
old("offsets too few")(instead("targets/semantic_offset", as_array(lambda held: held[:-1])))
old("offsets too many")(instead("targets/semantic_offset", as_array(lambda held: np.append(held, held[-1]))))
old("offsets that fall")(instead("targets/semantic_offset", as_array(lambda held: held[::-1].copy())))
old("offsets past the end")(instead("targets/semantic_offset", as_array(lambda held: held + np.uint64(1 << 40))))
old("offsets of 2^64 - 1")(instead("targets/semantic_offset", as_array(lambda held: np.full_like(held, 2**64 - 1))))
old("sizes of 2^40 rows")(instead("rows/original_size", as_shape(1 << 40, 2, dtype="<i4", chunks=(1024, 2))))
old("targets of 2^36 bytes")(instead("targets/semantic", as_shape(1 << 36, chunks=(1 << 20,))))
old("targets of 6 GiB in a few kB")(
    instead("targets/semantic", as_shape(6 << 30, chunks=(1 << 20,), compression="gzip"))
)
old("targets that have no room")(instead("targets/semantic", unallocated))
old("sizes that have no room")(instead("rows/original_size", unallocated))
for name_, other_ in {
    "done": "targets/semantic",
    LEVEL: "features/other",
    "rows/original_size": "rows/content_size",
}.items():

    def same_(file: h5py.File, name: str, held: NDArray[Any], path: Path, other: str = other_) -> None:
        if other not in file:
            other = "checksum"
        file[name] = file[other]

    old(f"{name_} is {other_} once more")(instead(name_, same_))


@old("no rows")
@edit
def _(file: h5py.File) -> None:
    for group in ("rows", "targets"):
        for name in list(file[group]):
            held = file[group][name]
            dtype, shape = held.dtype, (0, *held.shape[1:])
            del file[group][name]
            file[group].create_dataset(name, shape=shape, dtype=dtype)


def attribute(name: str, make: Callable[[Any], Any]) -> Change:
    """Another value of an attribute at the root."""

    @edit
    def change(file: h5py.File) -> None:
        file.attrs[name] = make(file.attrs[name])

    return change


def json_of(attribute_name: str, /, **changed: Any) -> Change:
    """An attribute that is JSON, with other fields."""
    return attribute(attribute_name, lambda text: json.dumps(json.loads(text) | changed))


def without(name: str) -> Change:
    @edit
    def change(file: h5py.File) -> None:
        del file.attrs[name]

    return change


DEEP = "[" * 50_000 + "]" * 50_000
HUGE = "[" + "[]," * 500_000 + "[]]"
LEVELS = [{"name": "stride4", "channels": 6, "stride": 4}, {"name": "stride8", "channels": 9, "stride": 8}]
RECIPES: dict[str, dict[str, Any]] = {
    "a huge frame": {"frame": [1 << 40, 1 << 40]},
    "a negative frame": {"frame": [-32, -32]},
    "a frame of texts": {"frame": ["32", "32"]},
    "a frame of one side": {"frame": [32]},
    "a frame of fractions": {"frame": [32.5, 32]},
    "a dtype object": {"dtype": "object"},
    "a dtype that is a list": {"dtype": ["fp16"]},
    "stride 0": {"levels": [LEVELS[0] | {"stride": 0}, LEVELS[1]]},
    "a stride of -4": {"levels": [LEVELS[0] | {"stride": -4}, LEVELS[1]]},
    "channels of 2^62": {"levels": [LEVELS[0] | {"channels": 1 << 62}, LEVELS[1]]},
    "levels of one name": {"levels": [LEVELS[0]] * 2},
    "a level named done": {"levels": [LEVELS[0] | {"name": "../done"}, LEVELS[1]]},
    "no levels": {"levels": []},
    "levels that are numbers": {"levels": [1, 2]},
    "a level too many": {"levels": [*LEVELS, LEVELS[0] | {"name": "more"}]},
    "100,000 levels": {"levels": LEVELS * 50_000},
    "an intensity that is none": {"intensity": "window:1:0"},
    "an unknown view": {"views": ["identity", "spin"]},
    "tiles of version 1": {"tile": 8},
    "a mean of one": {"mean": "x"},
    "an unknown field": {"strange": 1},
    "a size of nothing": {"size": None},
    "pooled features beside maps": {"store": "pooled"},
    "pooled features of codes": {"store": "pooled", "dtype": "int8"},
    "an unknown store": {"store": "vectors"},
    "a window of texts": {"window": ["a", "b"]},
}
"""What a recipe says that none can."""
DATA: dict[str, dict[str, Any]] = {
    "classes that are a number": {"classes": 7},
    "classes that are numbers": {"classes": [1, 2]},
    "tasks that are a text": {"tasks": 3},
    "a name that is a list": {"name": []},
    "notes that are a number": {"notes": 1},
    "bits that are a text": {"bits": "many"},
    "no classes": {"classes": []},
    "a fingerprint that is null": {"fingerprint": None},
    "ids that are texts": {"category_ids": ["x"]},
}
for name_, fields_ in RECIPES.items():
    old(f"recipe: {name_}")(json_of("recipe", **fields_))
    LONG.add(f"recipe: {name_}")
for name_, fields_ in DATA.items():
    old(f"data: {name_}")(json_of("data", **fields_))
    LONG.add(f"data: {name_}")
LONG -= {
    "recipe: a huge frame",
    "recipe: 100,000 levels",
    "recipe: a level named done",
    "data: classes that are a number",
}
for name_ in ("recipe", "data", "provenance"):
    old(f"{name_} a list")(attribute(name_, lambda _: "[1, 2]"))
    old(f"{name_} nested deep")(attribute(name_, lambda _: DEEP))
    old(f"{name_} of half a million lists")(attribute(name_, lambda _: HUGE))
    old(f"{name_} no JSON")(attribute(name_, lambda _: "{"))
for name_ in ("format", "version", "recipe", "data", "provenance", "identity_sha256", "recipe_key"):
    old(f"{name_} missing", sealed=False)(without(name_))
    LONG.add(f"{name_} missing")
LONG -= {"version missing", "data missing"}
old("version a text")(attribute("version", lambda _: "one"))
old("version to come")(attribute("version", lambda _: 99))
old("version negative")(attribute("version", lambda _: -1))
old("version of an array")(attribute("version", lambda _: np.arange(4)))
old("version 2 without parts")(attribute("version", lambda _: 2))
old("recipe of an array")(attribute("recipe", lambda text: [text] * 3))
old("format of a list", sealed=False)(attribute("format", lambda _: h5py.Empty("f4")))
old("provenance: a command that is a list")(json_of("provenance", command=[1]))


def stored_sizes(name: str, value: int) -> Change:
    @edit
    def change(file: h5py.File) -> None:
        file[name][3] = value

    return change


for name_ in ("rows/original_size", "rows/content_size"):
    for value_ in (2**31 - 1, 0, -5):
        old(f"{name_} of {value_}")(stored_sizes(name_, value_))


def long_texts(path: Path) -> None:
    """One text of a megabyte to which every row points: many times the file in memory."""
    with h5py.File(path, "r+", locking=False) as file:
        del file["rows/id"]
        file.create_dataset("rows/id", data=["x" * (1 << 20)] + ["y"] * (ROWS - 1), dtype=h5py.string_dtype("utf-8"))
        offset = file["rows/id"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset : offset + 16 * ROWS] = data[offset : offset + 16] * ROWS
    path.write_bytes(data)


def zeroed_sector(path: Path) -> None:
    """One sector of the global heap of HDF5, where texts lie: HDF5 walks in circles."""
    data = bytearray(path.read_bytes())
    start = data.index(b"GCOL")
    data[start + 272 : start + 784] = bytes(512)
    path.write_bytes(data)


old("one long text for all rows", sealed=False)(long_texts)
old("a zeroed sector", sealed=False)(zeroed_sector)


def for_parts(name: str, make: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return instead(name, as_array(make))


for name_, make_ in {
    "rows/part": lambda held: held + (1 << 20), "rows/image_index": lambda held: held + 100,
    "images/size": lambda held: held * 0, "images/semantic_offset": lambda held: held[::-1].copy(),
}.items():  # fmt: skip
    old(f"{name_} elsewhere, of parts")(for_parts(name_, make_))
old("image_index negative, of parts")(for_parts("rows/image_index", lambda held: held * 0 - 1))
old("images/id linked outside, of parts")(instead("images/id", linked_outside))
old("images/semantic in another file, of parts")(instead("images/semantic", external))
old("rows/view unknown, of parts")(
    instead("rows/view", lambda file, name, held, path: file.create_dataset(
        name, data=["spin"] * len(held), dtype=h5py.string_dtype("utf-8")))
)  # fmt: skip
old("images fewer, of parts")(for_parts("images/size", lambda held: held[:2]))


# Labels, in files of every version


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def gif_of() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "GIF")
    return stream.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
LABELS: dict[str, tuple[str, bytes]] = {
    "a PNG of 60000x60000": ("semantic", png_of(60000, 60000)),
    "a GIF": ("semantic", gif_of()),
    "EPS": ("semantic", EPS),
    "no image": ("semantic", b"\x00" * 40),
    "a PNG of another size": ("semantic", encode_semantic(np.zeros((5, 5), np.uint8))),
    "JSON nested deep": ("instances", DEEP.encode()),
    "JSON of another form": ("instances", b'{"objects": 3}'),
    "objects that are numbers": ("instances", b'{"image_id": null, "objects": [1, 2]}'),
    "no JSON": ("instances", b"{"),
    "a box of texts": ("instances", b'{"image_id": 1, "objects": [{"category": 1, "box_xyxy": "ab", "crowd": false}]}'),
    "half a million objects": ("instances", b'{"image_id": 1, "objects": [' + b"{}," * 500_000 + b"{}]}"),
}
"""Bytes that are no label, by kind of label."""


def relabelled(kind: str, blob: bytes) -> Change:
    """The labels of all rows replaced in a file of version 1, under checksums that hold."""

    @edit
    def change(file: h5py.File) -> None:
        for leaf in (kind, f"{kind}_offset"):
            del file[f"targets/{leaf}"]
        file[f"targets/{kind}"] = np.frombuffer(blob * ROWS, dtype="u1")
        file[f"targets/{kind}_offset"] = np.arange(ROWS + 1, dtype="<u8") * len(blob)
        sums = file["targets/checksum"][...]
        sums[:, ("semantic", "instances").index(kind)] = xxhash.xxh3_64_intdigest(blob)
        file["targets/checksum"][...] = sums

    return change


for name_, (kind_, blob_) in LABELS.items():
    old(f"labels: {name_}")(relabelled(kind_, blob_))


# Version 3


def new(name: str) -> Callable[[Callable[[dict[str, Any], bytearray], Any]], Any]:
    """Register a change of the header's JSON and of the file's bytes, after which both are sealed.

    A change may return what stands for the header's JSON instead.
    """

    def register(work: Callable[[dict[str, Any], bytearray], Any]) -> Any:
        def change(path: Path) -> None:
            data = bytearray(path.read_bytes())
            header = header_of(data)
            said = work(header, data)
            path.write_bytes(sealed(said if said is not None else header, data))

        NEW[name] = change
        return work

    return register


FIXED = struct.Struct("<8sII32s")


def header_of(data: bytes) -> dict[str, Any]:
    """The JSON of a header."""
    size = FIXED.unpack_from(data)[2]
    found: dict[str, Any] = json.loads(data[FIXED.size : FIXED.size + size])
    return found


def sealed(header: Any, data: bytearray, version: int = 3) -> bytes:
    """A file with this header, whose identity and sha256 hold."""
    if isinstance(header, dict):
        try:
            parts = {n: [p["dtype"], p["shape"], p["sha256"]] for n, p in header["parts"].items() if n != "provenance"}
            said = {name: header[name] for name in ("recipe", "rows", "images")} | {"parts": parts}
            text = json.dumps(said, sort_keys=True, separators=(",", ":"))
            header["identity_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        except (KeyError, TypeError, AttributeError):
            pass
    body = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    start = struct.pack("<8sII", b"\x89fpcach\n", version, len(body))
    front = start + hashlib.sha256(start + body).digest() + body
    data[: len(front)] = front
    return bytes(data)


def put_part(header: dict[str, Any], data: bytearray, name: str, blob: bytes) -> None:
    """Give a part of bytes another content, behind the file's end."""
    data += bytes(-len(data) % 4096)
    entry = header["parts"][name]
    entry |= {"offset": len(data), "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    entry["shape"] = [len(blob) // np.dtype(entry["dtype"]).itemsize, *entry["shape"][1:]]
    data += blob


def bytes_of(header: dict[str, Any], data: bytes, name: str) -> bytes:
    """What a part holds."""
    entry = header["parts"][name]
    return bytes(data[entry["offset"] : entry["offset"] + entry["bytes"]])


def entry_change(kind: str, name: str, **changed: Any) -> None:
    """Variants that say something else of a part or a table."""
    for field, value in changed.items():

        def work(header: dict[str, Any], data: bytearray, field: str = field, value: Any = value) -> None:
            header[kind][name][field] = value

        new(f"{name}: {field} {str(value)[:30]}")(work)


for kind_, name_ in (("parts", "rows/original_size"), ("parts", "texts"), ("tables", LEVEL), ("tables", "done")):
    entry_change(kind_, name_, dtype="object", required="yes")
    for field_, values_ in {
        "offset": (0, 8, -4096, 1 << 62, 1 << 64, "8", 1.5, None), "dtype": ("<f8", ["<i4"], ""),
        "shape": ([], [1 << 40, 2], [-1], "x", [ROWS, -2], [2**62, 2**62], [True, 2], [1.0]),
    }.items():  # fmt: skip
        for value_ in values_:
            entry_change(kind_, name_, **{field_: value_})
for value_ in (0, 1, 1 << 40, -1, None):
    entry_change("parts", "rows/original_size", bytes=value_)
    entry_change("tables", LEVEL, row_bytes=value_)
    entry_change("tables", "done", rows=value_)
entry_change("parts", "targets/checksum", sha256=7)
for name_, make_ in {
    "rows of 2^40": lambda h, d: h.update(rows=1 << 40),
    "rows of 3": lambda h, d: h.update(rows=3),
    "rows of 0": lambda h, d: h.update(rows=0),
    "rows of -1": lambda h, d: h.update(rows=-1),
    "rows that are a text": lambda h, d: h.update(rows="12"),
    "images of 5": lambda h, d: h.update(images=5),
    "images of 2^60": lambda h, d: h.update(images=1 << 60),
    "no parts": lambda h, d: h.update(parts={}),
    "parts a list": lambda h, d: h.update(parts=[]),
    "tables null": lambda h, d: h.update(tables=None),
    "another key": lambda h, d: h.update(recipe_key="0" * 64),
    "a block of 0": lambda h, d: h.update(user_block=0),
    "a block past the end": lambda h, d: h.update(user_block=1 << 40),
    "a block of no power of two": lambda h, d: h.update(user_block=5000),
    "a part of a number": lambda h, d: h["parts"].update({"texts": 7}),
    "no done": lambda h, d: h["tables"].pop("done") and None,
    "no texts": lambda h, d: h["parts"].pop("texts") and None,
    "a level that is missing": lambda h, d: h["tables"].pop(LEVEL) and None,
    "a part that must be known": lambda h, d: h["parts"].update({"new": h["parts"]["texts"] | {"required": True}}),
    "two parts in one place": lambda h, d: h["parts"]["rows/content_size"].update(
        offset=h["parts"]["rows/original_size"]["offset"]
    ),
    "done over features": lambda h, d: h["tables"]["done"].update(offset=h["tables"][LEVEL]["offset"]),
    "features over labels": lambda h, d: h["tables"][LEVEL].update(offset=h["parts"]["targets/semantic"]["offset"]),
    "features one row on": lambda h, d: h["tables"][LEVEL].update(
        offset=h["tables"][LEVEL]["offset"] + h["tables"][LEVEL]["row_bytes"]
    ),
    "the header a list": lambda h, d: [h],
    "the header nested deep": lambda h, d: DEEP.encode(),
    "the header of half a million lists": lambda h, d: HUGE.encode(),
    "the header no JSON": lambda h, d: b"{",
    "the header no UTF-8": lambda h, d: b"\xff\xfe{}",
    "a number of 5000 digits": lambda h, d: b'{"rows": ' + b"9" * 5000 + b"}",
    "NaN": lambda h, d: b'{"rows": NaN}',
}.items():
    new(name_)(make_)


@new("a part that need not be known")
def _(header: dict[str, Any], data: bytearray) -> None:
    header["parts"]["new"] = header["parts"]["texts"] | {"required": False}
    put_part(header, data, "new", b"of a version to come")


HARMLESS.add("a part that need not be known")
for name_, fields_ in RECIPES.items():

    def recipe_(header: dict[str, Any], data: bytearray, fields: dict[str, Any] = fields_) -> None:
        header["recipe"] |= fields
        said = {k: v for k, v in header["recipe"].items() if k != "label"}
        header["recipe_key"] = hashlib.sha256(
            json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    new(f"recipe: {name_}")(recipe_)


def texts_change(name: str, work: Callable[[dict[str, Any]], Any]) -> None:
    """A variant of the texts, whose hash holds."""

    @new(name)
    def _(header: dict[str, Any], data: bytearray) -> None:
        said = json.loads(bytes_of(header, data, "texts"))
        changed = work(said)
        blob = changed if isinstance(changed, bytes) else json.dumps(said if changed is None else changed).encode()
        put_part(header, data, "texts", blob)


for name_, fields_ in DATA.items():
    texts_change(f"data: {name_}", lambda said, fields=fields_: said["data"].update(fields))
for name_, make_ in {
    "ids too few": lambda said: said["rows"].update(id=said["rows"]["id"][:3]),
    "ids that are numbers": lambda said: said["rows"].update(id=list(range(ROWS))),
    "a million ids": lambda said: said["rows"].update(id=["x"] * 1_000_000),
    "rows a list": lambda said: said.update(rows=[]),
    "no groups": lambda said: said["rows"].pop("group") and None,
    "texts a list": lambda said: [said],
    "texts nested deep": lambda said: DEEP.encode(),
    "texts of half a million lists": lambda said: HUGE.encode(),
    "texts no UTF-8": lambda said: b"\xff",
    "texts empty": lambda said: b"",
}.items():
    texts_change(name_, make_)
for name_, blob_ in {
    "a list": b"[1, 2]",
    "nested deep": DEEP.encode(),
    "of half a million lists": HUGE.encode(),
}.items():

    def provenance_(header: dict[str, Any], data: bytearray, blob: bytes = blob_) -> None:
        put_part(header, data, "provenance", blob)

    new(f"provenance {name_}")(provenance_)
for name_ in ("rows/original_size", "rows/content_size"):
    for value_ in (2**31 - 1, 0, -5):

        def sizes_(header: dict[str, Any], data: bytearray, name: str = name_, value: int = value_) -> None:
            sizes = np.frombuffer(bytes_of(header, data, name), "<i4").copy()
            sizes[6] = value
            put_part(header, data, name, sizes.tobytes())
            header["parts"][name]["shape"] = [ROWS, 2]

        new(f"{name_} of {value_}")(sizes_)
for name_, make_ in {
    "that fall": lambda held: held[::-1].copy(), "past the end": lambda held: held + np.uint64(1 << 40),
    "of 2^64 - 1": lambda held: np.full_like(held, 2**64 - 1),
}.items():  # fmt: skip

    def offsets_(header: dict[str, Any], data: bytearray, make: Callable[..., NDArray[Any]] = make_) -> None:
        held = np.frombuffer(bytes_of(header, data, "targets/semantic_offset"), "<u8")
        put_part(header, data, "targets/semantic_offset", make(held).tobytes())

    new(f"offsets {name_}")(offsets_)
for name_, (kind_, blob_) in LABELS.items():

    def labels_(header: dict[str, Any], data: bytearray, kind: str = kind_, blob: bytes = blob_) -> None:
        put_part(header, data, f"targets/{kind}", blob * ROWS)
        offsets = np.arange(ROWS + 1, dtype="<u8") * np.uint64(len(blob))
        put_part(header, data, f"targets/{kind}_offset", offsets.tobytes())
        sums = np.frombuffer(bytes_of(header, data, "targets/checksum"), "<u8").reshape(-1, 2).copy()
        sums[:, ("semantic", "instances").index(kind)] = xxhash.xxh3_64_intdigest(blob)
        put_part(header, data, "targets/checksum", sums.tobytes())
        header["parts"]["targets/checksum"]["shape"] = [ROWS, 2]

    new(f"labels: {name_}")(labels_)


TWO_NAMES = {"names": ["good", "dent"], "multi": False, "good": "good"}
ONE_EACH = np.tile(np.array([1, 0], np.uint8), (ROWS, 1))


def image_labels(name: str, names: Any, values: NDArray[Any] | None, **changed: Any) -> None:
    """A variant with labels of images: what texts say of them, what the part holds, and what its entry says else."""

    @new(f"labels of images: {name}")
    def _(header: dict[str, Any], data: bytearray) -> None:
        said = json.loads(bytes_of(header, data, "texts"))
        said["data"] |= {} if names is None else {"label_names": names}
        put_part(header, data, "texts", json.dumps(said).encode())
        if values is not None:
            entry = {"dtype": "u1", "shape": [0, *values.shape[1:]], "required": False}
            header["parts"]["labels"] = entry
            put_part(header, data, "labels", values.tobytes())
            entry |= {"shape": list(values.shape)} | changed


def with_first(*values: int) -> NDArray[Any]:
    """Labels of two names, of which the first image has these."""
    return np.concatenate([np.array([values], np.uint8), ONE_EACH[1:]])


image_labels("without names", None, ONE_EACH)
image_labels("names without labels", TWO_NAMES, None)
image_labels("of three names", TWO_NAMES, np.eye(3, dtype=np.uint8)[[0] * ROWS])
image_labels("a value of 2", TWO_NAMES, with_first(2, 0))
image_labels("known by half", TWO_NAMES, with_first(1, 255))
image_labels("two where one is meant", TWO_NAMES, with_first(1, 1))
image_labels("none where one is meant", TWO_NAMES, with_first(0, 0))
image_labels("good is no name", TWO_NAMES | {"good": "fine"}, ONE_EACH)
image_labels("several beside good", TWO_NAMES | {"multi": True}, ONE_EACH)
image_labels("a name twice", TWO_NAMES | {"names": ["good", "good"]}, ONE_EACH)
image_labels("names of numbers", TWO_NAMES | {"names": [1, 2]}, ONE_EACH)
image_labels("names a list", ["good", "dent"], ONE_EACH)
image_labels("no names", TWO_NAMES | {"names": []}, None)
image_labels("of 2^40 names", TWO_NAMES, ONE_EACH, shape=[ROWS, 1 << 40])
image_labels("of 4000 names", {"names": list(map(str, range(4000))), "multi": True}, np.zeros((ROWS, 4000), np.uint8))
image_labels("in a row", TWO_NAMES, ONE_EACH, shape=[2 * ROWS])
image_labels("of three images", TWO_NAMES, ONE_EACH[:3])
image_labels("fractions", TWO_NAMES, ONE_EACH, dtype="<f8")


def raw(name: str) -> Callable[[Callable[[bytearray], bytes]], Any]:
    """Register a change of a file's bytes that nothing seals."""

    def register(work: Callable[[bytearray], bytes]) -> Any:
        NEW[name] = lambda path: (path.write_bytes(work(bytearray(path.read_bytes()))), None)[1]
        return work

    return register


raw("cut to its header")(lambda data: data[:4096])
raw("cut in the header")(lambda data: data[:100])
raw("cut in the magic")(lambda data: data[:5])
raw("empty")(lambda data: b"")
raw("a version to come")(lambda data: sealed(header_of(data), data, version=4))
raw("version 2 in a header")(lambda data: sealed(header_of(data), data, version=2))
raw("a length of 2^32 - 1")(lambda data: data[:12] + b"\xff" * 4 + data[16:])
raw("a sha256 that does not hold")(lambda data: data[:16] + bytes(32) + data[48:])
raw("half of it gone")(lambda data: data[: len(data) // 2])
