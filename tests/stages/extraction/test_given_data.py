"""Data sets as objects: what is extracted, trained on and said of them is what their paths would give."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featprobe import (
    Cache,
    DataSet,
    ExtractOptions,
    Features,
    ProbeOptions,
    Workspace,
    compare,
    extract,
    finetune,
    open_cache,
    probe,
)
from featprobe.errors import CacheError, DataError
from featprobe.features import pool
from featprobe.kinds import TrainRecipe
from featprobe.splitting import SplitChoice
from featprobe.stages.partition import Partition

QUIET = ExtractOptions(quiet=True, workers=1)
RIDGE = ProbeOptions(head="ridge", seeds=1, quiet=True)
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 255, (12, 32, 32), dtype=np.uint8)
MASKS = (IMAGES > 150).astype(np.uint8)


class Blur(nn.Module):
    """Two levels, and one weight."""

    mean, std, name = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "blur"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(batch, 3, rows, columns) each."""
        shown = images * self.gain
        return [nn.functional.avg_pool2d(shown, 4), nn.functional.max_pool2d(shown, 8)]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("given") / "space")


@pytest.fixture(scope="module")
def data(space: Workspace) -> DataSet:
    return DataSet.from_arrays(space.root.parent / "parts", IMAGES, masks=MASKS)


def test_an_object_and_its_path_have_one_cache(space: Workspace, data: DataSet) -> None:
    first = extract(space, Blur(), data, QUIET)
    assert (first.rows, first.computed, first.by_times) == (12, 12, False)
    for other in (data.root, str(data.root), replace(data)):
        again = extract(space, Blur(), other, QUIET)
        assert again.path == first.path and again.computed == 0
    assert "--format coco" in open_cache(first.path).contents.command
    assert extract(space, Blur(), space.data_set(str(data.root)), QUIET).path == first.path


def test_a_part_of_a_set_is_no_answer_for_the_whole(tmp_path: Path, data: DataSet) -> None:
    """What is kept of sizes and times is of files, and does not tell which of them an object has."""
    space = Workspace(tmp_path)
    part = replace(data, samples=[sample for sample in data.samples if sample.id != "000003.tif"])
    assert extract(space, Blur(), part, QUIET).rows == 11
    assert extract(space, Blur(), data.root, QUIET).rows == 12
    assert extract(space, Blur(), part, QUIET).rows == 11


def test_an_object_is_not_read_in_another_way(space: Workspace, data: DataSet) -> None:
    with pytest.raises(DataError, match="was read already, so format, group_from would change nothing"):
        extract(space, Blur(), data, replace(QUIET, format="folders", group_from="(.)"))


@pytest.mark.parametrize("data", [IMAGES, None, 5])
def test_what_is_no_data_set_is_refused_in_words(space: Workspace, data: object) -> None:
    with pytest.raises(DataError, match=r"is no data set(.|\n)*DataSet\.from_arrays"):
        extract(space, Blur(), data, QUIET)  # type: ignore[arg-type]
    if data is not IMAGES:
        with pytest.raises(DataError, match="is no data set"):
            probe(space, "semseg", data, options=RIDGE)  # type: ignore[arg-type]


def test_heads_are_trained_on_objects_and_on_one_as_well_as_on_several(space: Workspace, data: DataSet) -> None:
    extract(space, Blur(), data, QUIET)
    rows = [probe(space, "semseg", own, [Blur()], RIDGE).rows for own in (data, [data], data.root, [str(data.root)])]
    assert len({row["folder"] for (row,) in rows}) == 1
    with pytest.raises(CacheError, match="There is no cache of the data set 'xray'"):
        probe(space, "semseg", "xray", options=RIDGE)
    options = ProbeOptions(seeds=1, quiet=True, recipe=TrainRecipe(iterations=2, evaluations=1))
    (row,) = finetune(space, "semseg", data, [Blur()], options).rows
    assert (row["data"], row["regime"]) == ("parts", "full")


def test_objects_say_what_they_are_in_one_line(space: Workspace, data: DataSet) -> None:
    report = extract(space, Blur(), data, QUIET)
    cache: Cache = open_cache(report.path)
    done = probe(space, "semseg", data, [Blur()], RIDGE)
    features = Features({own.name: cache.tensor(own) for own in cache.levels}, (32, 32))
    sample = data.samples[0]
    said = {
        "12 images": data, "Samples(12)": data.samples, "1 cache": space, "12 rows": cache, "12 rows: nothing": report,
        "1 row (semseg of blur on parts)": done, "(12, 3, 8, 8)": features, "(12, 3)": pool(features, cache.levels),
        "mask of 32x32": data.read_target(sample, (32, 32)), "id='000000.tif'": cache.rows[0],
        "RowTable(12": cache.rows, "version 3": cache.contents,
        "in 1 table": compare(space, quiet=True), "masks": cache.torch_dataset(),
        "'group'": Partition(cache, SplitChoice.parse("group")),
    }  # fmt: skip
    for part, value in said.items():
        text = repr(value)
        assert part in text and "\n" not in text and len(text.replace(str(space.root.parent), "")) < 400, text
    assert torch.equal(features.maps["stride4"], cache.tensor("stride4"))
