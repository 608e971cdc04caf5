"""Rows of a cache for a DataLoader: in this process, in forked and in spawned workers, with each kind of labels."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, PoolingBackbone, extract
from torch.utils.data import DataLoader

from featprobe import DataSet, open_cache
from featprobe.cache import Cache
from featprobe.errors import CacheError
from featprobe.targets import IGNORE, labels_in_frame

RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 255, (24, 40 + 8 * (i % 2)), dtype=np.uint8) for i in range(10)]
MASKS = [(image > 200).astype(np.uint8) for image in IMAGES]
BOXES = [[[2.0, 3, 12, 9], [20, 4, 30, 20]], []] * 5


def cache_of(folder: Path, backbone: Any = None, **given: Any) -> Cache:
    data = DataSet.from_arrays(folder / "set", IMAGES, **given)
    options = {"fit": "letterbox", "size": (32, 32), "device": CPU.type}
    return open_cache(extract(folder / "space", data.root, backbone or PoolingBackbone(), **options).path)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return cache_of(tmp_path_factory.mktemp("masked"), masks=MASKS)


def test_an_item_is_the_maps_of_a_row_and_its_mask_in_the_frame(masked: Cache) -> None:
    rows = masked.torch_dataset(split="train")
    assert len(rows) == len(masked.usable("train")) == 6 and "6 rows" in repr(rows) and "masks" in repr(rows)
    for item, row in enumerate(masked.usable("train").tolist()):
        maps, mask = rows[item]
        assert set(maps) == {level.name for level in masked.levels}
        assert all(np.array_equal(maps[own.name].numpy(), masked.read_row(row, own)) for own in masked.levels)
        wanted = labels_in_frame(masked.semantic(row), masked.rows.placement(row))
        assert np.array_equal(mask.numpy(), wanted) and (mask == IGNORE).any(), "padding doesn't count"
    name = masked.levels[0].name
    alone = masked.torch_dataset([name], rows=[3, 1], targets=False)
    assert set(alone[1]) == {name} and np.array_equal(alone[1][name], masked.features(name, rows=[1])[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_this_process_gives(masked: Cache, start: str) -> None:
    rows = masked.torch_dataset()
    alone = list(DataLoader(rows, batch_size=4))
    workers = list(DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context=start))
    for (maps, mask), (others, other) in zip(alone, workers, strict=True):
        assert torch.equal(mask, other) and all(torch.equal(maps[name], others[name]) for name in maps)


def test_another_process_opens_the_same_cache_or_none(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, masks=MASKS)
    sent = pickle.dumps(cache.torch_dataset(split="test"))
    assert len(sent) < 4000, "bytes: features do not travel"
    received, here = pickle.loads(sent), cache.torch_dataset(split="test")
    assert len(received) == len(here) and torch.equal(received[0][1], here[0][1])
    other = cache_of(tmp_path / "other", masks=[1 - mask for mask in MASKS])
    cache.path.unlink()
    cache.path.hardlink_to(other.path)
    with pytest.raises(CacheError, match="was replaced by another cache"):
        pickle.loads(sent)


def test_objects_are_torchvisions_in_pixels_of_the_frame(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, boxes=BOXES)
    rows = cache.torch_dataset()
    (_, target), (_, none) = rows[0], rows[1]
    scale = torch.tensor([32 / 40, 19 / 24] * 2)  # of the width to the frame, of the height to whole pixels
    assert torch.allclose(target["boxes"], torch.tensor(BOXES[0]) * scale)
    assert target["labels"].tolist() == [1, 1] and target["iscrowd"].tolist() == [0, 0] and "masks" not in target
    assert none["boxes"].shape == (0, 4) and none["image_id"] == 1
    batches = DataLoader(rows, batch_size=4, collate_fn=lambda items: tuple(zip(*items, strict=True)))
    assert [len(targets) for _, targets in batches] == [4, 4, 2]


def test_masks_of_objects_follow_them_into_the_frame(tmp_path: Path) -> None:
    drawn = [np.stack([mask, 1 - mask]) for mask in MASKS]
    cache = cache_of(tmp_path, masks=drawn)
    _, target = cache.torch_dataset(targets="objects")[0]
    assert target["masks"].shape == (2, 32, 32) and set(target["masks"].unique().tolist()) == {0, 1}
    assert cache.torch_dataset().targets == "masks", "where a set has the class of each pixel, that is the target"
    _, mask = cache.torch_dataset()[0]
    assert torch.equal(target["masks"].any(0), mask == 1)


def test_labels_of_images_are_numbers_or_vectors(tmp_path: Path) -> None:
    one = cache_of(tmp_path / "one", labels=["good", "dent"] * 5)
    assert [int(label) for _, label in one.torch_dataset()] == [1, 0] * 5
    several = cache_of(tmp_path / "several", labels=[[], ["a", "b"]] * 5)
    assert [label.tolist() for _, label in several.torch_dataset()] == [[0, 0], [1, 1]] * 5
    with pytest.raises(CacheError, match=r"has no masks to give(.|\n)*labels for classify, anomaly"):
        one.torch_dataset(targets="masks")
