"""Features of many rows as one array: equal to the rows one by one, a view where that can be, checked all the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LEVELS, filled_cache, flip_byte, make_cache, random_maps, recipe_of, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featprobe import open_cache
from featprobe.cache import Cache, CacheWriter, level_array
from featprobe.cache.rows import Row
from featprobe.errors import CacheError, CacheIncompleteError
from featprobe.specs import BYTES_PER_VALUE


def sorted_rows(count: int = 6) -> list[Row]:
    """Rows by split, as sets list them that name files per split."""
    return sorted(rows_of(count), key=lambda row: row.split)


def cache_of(folder: Path, dtype: str = "fp16", **changed: Any) -> Cache:
    return filled_cache(folder / f"{dtype}.h5", recipe_of(dtype=dtype, **changed), sorted_rows())


@pytest.mark.parametrize("dtype", BYTES_PER_VALUE)
@pytest.mark.parametrize("split", [None, "train", "val"])
def test_an_array_is_the_rows_one_by_one(tmp_path: Path, dtype: str, split: str | None) -> None:
    with cache_of(tmp_path, dtype) as cache:
        for level in LEVELS:
            array, tensor = cache.features(level.name, split), cache.tensor(level, split)
            each = [cache.read_row(row, level) for row in cache.usable(split).tolist()]
            assert array.shape == tuple(tensor.shape) == (len(each), level.channels, *level.cells((32, 32)))
            assert array.dtype == {"fp32": np.float32, "bf16": np.float32}.get(dtype, np.float16)
            bits = tensor.view(torch.uint8).numpy().reshape(len(each), -1)
            assert [row.tobytes() for row in bits] == [row.tobytes() for row in each]
            assert np.array_equal(array, tensor.float().numpy().astype(array.dtype), equal_nan=True)
            held = array.base is not None and dtype in ("fp16", "fp32")
            assert held == (dtype in ("fp16", "fp32"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 5), max_size=9), dtype=st.sampled_from(["fp16", "int8"]))
def test_rows_come_in_the_order_in_which_they_are_named(tmp_path: Path, rows: list[int], dtype: str) -> None:
    path = tmp_path / f"{dtype}.h5"
    cache = open_cache(path) if path.exists() else cache_of(tmp_path, dtype)
    whole, found = cache.features("stride8"), cache.features("stride8", rows=rows)
    assert found.tobytes() == whole[np.array(rows, dtype=np.intp)].tobytes() and len(found) == len(rows)


def test_nothing_that_is_done_to_an_array_reaches_the_file(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    before = cache.path.read_bytes()
    with pytest.raises(ValueError, match="read-only"):
        cache.features("stride4")[0] = 0
    tensor = cache.tensor("stride4")
    tensor.zero_()
    assert cache.path.read_bytes() == before and cache.features("stride4").any()


def test_a_view_outlives_the_open_cache(tmp_path: Path) -> None:
    with cache_of(tmp_path) as cache:
        whole, copy = cache.features("stride4"), cache.features("stride4", rows=[0, 2]).copy()
    assert np.array_equal(whole[[0, 2]], copy, equal_nan=True)
    for use in (lambda: cache.features("stride4"), lambda: cache.done, lambda: cache.torch_dataset()):
        with pytest.raises(CacheError, match="was closed"):
            use()
    cache.close()  # twice is no harm


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.features("stride8"),
        lambda cache: cache.features("stride8", "train"),
        lambda cache: cache.features("stride8", rows=[5, 2]),
        lambda cache: cache.tensor("stride8", rows=[2]),
        lambda cache: cache.torch_dataset(["stride8"], rows=[2], targets=False)[0],
    ],
)
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_damaged_row_is_found_when_it_is_first_read(
    tmp_path: Path, dtype: str, use: Callable[[Cache], object]
) -> None:
    cache = cache_of(tmp_path, dtype)
    extent = cache.contents.extents["features/stride8"]
    flip_byte(cache.path, extent.offset + 2 * extent.row_bytes + 5)
    with pytest.raises(CacheError, match=r"is damaged: the features of row 2(.|\n)*cache verify"):
        use(cache)
    assert len(cache.features("stride8", rows=[0, 1, 3])) == 3, "the others are sound"


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    with cache.path.open("r+b") as stream:
        stream.truncate(cache.contents.extents["features/stride8"].offset + 1)
    with pytest.raises(CacheError, match="Was it cut short"):
        cache.features("stride8")


def test_a_copy_that_the_memory_does_not_hold_is_refused_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, half = cache_of(tmp_path), cache_of(tmp_path, "bf16")
    monkeypatch.setattr(level_array, "available_memory", lambda: 1000)
    assert len(cache.features("stride4")) == len(half.tensor("stride4")) == 6, "a view takes none"
    with pytest.raises(CacheError, match=r"wanted  9216 bytes"):
        half.features("stride4")
    with pytest.raises(CacheError, match=r"wanted  1536 bytes \(1\.5 kB\)(.|\n)*torch_dataset\(\)"):
        cache.features("stride4", rows=[0, 2])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for use, said in (
        (lambda: cache.features("stride5"), "has no level 'stride5'. Did you mean"),
        (lambda: cache.features("stride4", "trian"), "has no split 'trian'. Did you mean train?"),
        (lambda: cache.features("stride4", rows=[6]), "numbers of rows from 0 to 5"),
        (lambda: cache.features("stride4", rows=[-1]), "numbers of rows from 0 to 5"),
        (lambda: cache.features("stride4", rows=[0.5]), "numbers of rows from 0 to 5"),
        (lambda: cache.features("stride4", "train", rows=[0]), "without split="),
    ):
        with pytest.raises(CacheError, match=said):
            use()
    part = make_cache(tmp_path / "part.h5", recipe_of(), sorted_rows())
    with CacheWriter(part.path) as writer:
        writer.write(0, random_maps(part.recipe, 2))
    with pytest.raises(CacheIncompleteError, match="4 of 6 rows are missing"):
        part.features("stride4")
    assert len(part.features("stride4", rows=[0, 1])) == 2
    with pytest.raises(CacheIncompleteError, match="row 3"):
        part.features("stride4", rows=[3])


def test_pooled_features_are_mean_and_maximum(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "pooled.h5", recipe_of(store="pooled"), sorted_rows())
    rng = np.random.default_rng(0)
    kept = {level.name: rng.random((6, 2, level.channels), np.float32) for level in LEVELS}
    with CacheWriter(cache.path) as writer:
        writer.write(0, kept)
    assert all(np.array_equal(cache.features(name), values) for name, values in kept.items())
