"""Labels of whole images in a cache file: the optional part that cache/README.md describes."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import change_header, change_part, data_info, header_of, make_cache, opened, recipe_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featprobe.cache import Cache, create_file, open_cache, verify
from featprobe.errors import CacheError
from featprobe.geometry import Part, Placement
from featprobe.image_labels import UNKNOWN, LabelNames, encode
from featprobe.specs import DataInfo

OK_NOK = LabelNames(("good", "dent"), good="good")
Held = list[tuple[int, ...] | None]


def labelled(path: Path, held: Held, names: LabelNames = OK_NOK) -> Cache:
    """A cache whose images have these labels and no others."""
    rows = [
        replace(row, semantic=b"", instances=b"", labels=own) for row, own in zip(rows_of(len(held)), held, strict=True)
    ]
    data = DataInfo("parts", "parts", ("background",), (), "f" * 64, label_names=names)
    return make_cache(path, rows=rows, data=data)


@settings(max_examples=20, deadline=None)
@given(held=st.lists(st.none() | st.lists(st.integers(0, 2), unique=True).map(tuple), min_size=1, max_size=5))
def test_labels_come_back_and_serve_tasks_of_whole_images_alone(
    held: Held, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("labels") / "cache.h5"
    labelled(path, held, LabelNames(("a", "b", "c"), multi=True))
    cache = open_cache(path)
    assert np.array_equal(cache.image_labels, encode(held, 3)) and cache.data.label_names.multi
    assert cache.data.tasks == () and len(cache.data.serves) == 2
    assert [found for found in verify(path) if not isinstance(found, int)] == []


def test_a_reader_of_before_may_pass_over_the_part_and_any_hdf5_tool_shows_it(tmp_path: Path) -> None:
    labelled(tmp_path / "cache.h5", [(0,), (1,), None])
    entry = header_of(tmp_path / "cache.h5")["parts"]["labels"]
    assert (entry["required"], entry["dtype"], entry["shape"]) == (False, "u1", [3, 2])
    with h5py.File(tmp_path / "cache.h5") as file:
        assert file["labels"][...].tolist() == [[1, 0], [0, 1], [UNKNOWN, UNKNOWN]]


def test_a_set_without_labels_of_images_has_no_such_part(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.h5")
    said = header_of(cache.path)
    assert cache.image_labels is None and "labels" not in said["parts"]
    assert all(entry["required"] for entry in (*said["parts"].values(), *said["tables"].values()))


def test_the_identity_covers_labels_and_damage_is_found(tmp_path: Path) -> None:
    one, other = (labelled(tmp_path / f"{i}.h5", [(0,), own]) for i, own in enumerate([(0,), (1,)]))
    assert one.contents.identity_sha256 != other.contents.identity_sha256
    change_part(other.path, "labels", lambda data: data[2:] + data[:2])
    assert not opened(other.path).contents.is_intact()
    with pytest.raises(CacheError, match=r"is damaged(.|\n)*labels"):
        open_cache(other.path)


def test_labels_of_tiles_are_those_of_their_images(tmp_path: Path) -> None:
    recipe = recipe_of(version=2, tile=8, overlap=0)
    images = [
        replace(row, placement=Placement((8, 16), (8, 16), (8, 16)), semantic=b"", instances=b"", labels=own)
        for row, own in zip(rows_of(2), [(1,), (0,)], strict=True)
    ]
    rows = [
        replace(images[i // 2], id=f"tile{i}", part=Part(8 * (i % 2), 0, 8, 8), image_index=i // 2,
                placement=Placement((8, 8), (32, 32), (32, 32)))
        for i in range(4)
    ]  # fmt: skip
    assert create_file(tmp_path / "t.h5", recipe, replace(data_info(), label_names=OK_NOK), rows, {}, images)
    cache = open_cache(tmp_path / "t.h5")
    assert cache.image_labels.tolist() == [[0, 1], [1, 0]] and cache.image_of.tolist() == [0, 0, 1, 1]


def sealed_with(path: Path, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    """Give labels other values of the same shape, and seal the file anew as anybody can."""
    entry = header_of(path)["parts"]["labels"]
    held = np.zeros(entry["shape"], np.uint8)

    def other(data: bytes) -> bytes:
        held[:] = change(np.frombuffer(data, np.uint8).reshape(held.shape).copy())
        return held.tobytes()

    change_part(path, "labels", other)

    def reseal(said: dict) -> None:
        said["parts"]["labels"]["sha256"] = hashlib.sha256(held.tobytes()).hexdigest()
        parts = {n: [p["dtype"], p["shape"], p["sha256"]] for n, p in said["parts"].items() if n != "provenance"}
        known = {name: said[name] for name in ("recipe", "rows", "images")} | {"parts": parts}
        text = json.dumps(known, sort_keys=True, separators=(",", ":"))
        said["identity_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    change_header(path, reseal)


def test_any_values_of_labels_that_the_page_allows_are_read_and_no_others(tmp_path: Path) -> None:
    path = labelled(tmp_path / "cache.h5", [(0,), (1,)]).path
    sealed_with(path, lambda values: values[::-1])
    assert open_cache(path).image_labels.tolist() == [[0, 1], [1, 0]]
    for bad in ([[2, 0], [1, 0]], [[1, 1], [1, 0]], [[0, 0], [1, 0]], [[UNKNOWN, 0], [1, 0]]):
        sealed_with(path, lambda _, bad=bad: np.array(bad, np.uint8))
        with pytest.raises(CacheError, match="labels: 0 and 1, one of them 1, or 255 alone, for each image"):
            open_cache(path)
