"""The index of a data set: one array a field, from which samples come back as they were."""

import gc
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_datasets import grid, mask_set

from featprobe.datasets import Sample, read_data
from featprobe.datasets.samples import Samples
from featprobe.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PATHS = st.lists(st.from_regex(r"[^/\0]{1,8}", fullmatch=True).filter(str.isprintable), min_size=1).map(
    lambda parts: Path("/", *parts)
)


@given(st.lists(st.builds(Sample, TEXTS, PATHS, TEXTS, TEXTS, TEXTS)))
def test_samples_come_back_as_they_were(samples: list[Sample]) -> None:
    index = Samples(samples)
    assert list(index) == samples and len(index) == len(samples)
    assert list(index[1::2]) == samples[1::2] and index[:] == index
    assert [index[i - len(samples)] for i in range(len(samples))] == samples
    with pytest.raises(IndexError):
        index[len(samples)]


def test_an_index_holds_no_object_an_image() -> None:
    images, indices, held = 5000, [], []
    tracemalloc.start()
    for _ in range(2):  # the first also grows tables of the interpreter's own
        indices.append(
            Samples(
                Sample(f"p{i}", Path(f"/set/images/p{i}.png"), f"p{i}", "", f"masks/p{i}.png") for i in range(images)
            )
        )
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert (held[1] - held[0]) / images < 150 and len(indices[1]) == images


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX alone")
def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(6)}, "background\nscratch\n")
    os.link(tmp_path / "images" / "p0.png", os.fsencode(tmp_path / "images") + b"/\xff.png")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        read_data("set", tmp_path)
