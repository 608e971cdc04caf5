"""Datasets of torch as sets on the disk: images of each kind, targets of each kind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_from_arrays import GREY, MASKS, target_of
from torch.utils.data import Dataset, IterableDataset

from featprobe import DataSet
from featprobe.datasets.images.reading import read_levels
from featprobe.errors import DataError

LEVELS = (GREY >> 8).astype(np.uint8)
COLOURS = np.stack([LEVELS, LEVELS // 2, 255 - LEVELS], axis=-1)  # (images, height, width, 3)


class Pairs(Dataset[Any]):
    """Images and targets as they are."""

    def __init__(self, images: Any, targets: Any) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise AssertionError("a dataset with a length is asked for no more than that")
        return self.images[index], self.targets[index]


@pytest.mark.parametrize(
    ("images", "bits"),
    [
        (torch.from_numpy(COLOURS).permute(0, 3, 1, 2), None),
        (torch.from_numpy(COLOURS).permute(0, 3, 1, 2).float() / 255, 8),
        ([Image.fromarray(own) for own in COLOURS], None),
        (COLOURS, None),
    ],
    ids=["tensors", "ToTensor", "Pillow", "arrays"],
)
def test_images_keep_their_levels(tmp_path: Path, images: Any, bits: int | None) -> None:
    data = DataSet.from_torch(tmp_path / "set", Pairs(images, torch.from_numpy(MASKS)), bits=bits)
    for sample, levels, mask in zip(data.samples, COLOURS, MASKS, strict=True):
        assert np.array_equal(read_levels(sample.image), levels)
        assert np.array_equal(target_of(data, sample).semantic, mask)


def test_16_bits_and_grey_tensors(tmp_path: Path) -> None:
    grey = torch.from_numpy(GREY)[:, None]  # (images, 1, height, width)
    data = DataSet.from_torch(tmp_path / "set", Pairs(grey, torch.from_numpy(MASKS)[:, None]))
    assert all(np.array_equal(read_levels(s.image), own) for s, own in zip(data.samples, GREY, strict=True))
    with pytest.raises(DataError, match=r"float32, .*bits=8 for level / 255"):
        DataSet.from_torch(tmp_path / "other", Pairs(grey.float() / 65535, torch.from_numpy(MASKS)))


def test_a_dict_of_datasets_gives_the_splits_and_a_dataset_its_classes(tmp_path: Path) -> None:
    parts = {"train": Pairs(LEVELS[:6], [0, 1] * 3), "test": Pairs(LEVELS[6:], torch.tensor([1, 0, 1, 0]))}
    parts["train"].classes = ["good", "dent"]  # type: ignore[attr-defined]  # as torchvision's ImageFolder has them
    data = DataSet.from_torch(tmp_path / "set", parts, names=[f"n{i}" for i in range(10)])
    assert data.label_names is not None and data.label_names.names == ("dent", "good")
    assert [sample.id for sample in data.samples] == [f"n{i}.tif" for i in range(10)]
    assert [sample.split == "test" for sample in data.samples] == [False] * 6 + [True] * 4
    labels = [data.label_names.names[(target_of(data, s).labels or ())[0]] for s in data.samples]
    assert labels == ["good", "dent"] * 3 + ["dent", "good"] * 2


def test_targets_of_torchvision(tmp_path: Path) -> None:
    target = {
        "boxes": torch.tensor([[1.0, 1, 4, 5], [0, 0, 7, 6]]),
        "labels": torch.tensor([2, 1]),
        "iscrowd": torch.tensor([0, 1]),
        "image_id": 3,
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    data = DataSet.from_torch(tmp_path / "set", Pairs(LEVELS, [target, none] * 5), classes=["background", "a", "b"])
    found = [target_of(data, sample).instances for sample in data.samples]
    assert [[(o.category, o.box_xyxy, o.crowd) for o in own or ()] for own in found] == [
        [(2, (1.0, 1.0, 4.0, 5.0), False), (1, (0.0, 0.0, 7.0, 6.0), True)], [],
    ] * 5  # fmt: skip


class Stream(IterableDataset[Any]):
    """Pairs without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(LEVELS, MASKS, strict=True))


def test_an_iterable_dataset_is_read_once(tmp_path: Path) -> None:
    assert len(DataSet.from_torch(tmp_path / "set", Stream(), groups=(i // 2 for i in range(10)))) == 10


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pairs(LEVELS, [None] * 10), "neither a class, nor boxes, nor masks"),
        (lambda: Pairs(LEVELS, [0.5] * 10), "wanted: a name, or the number of a class"),
        (lambda: Pairs(LEVELS, [{}] * 10), "neither a class, nor boxes, nor masks"),
        (lambda: Pairs(LEVELS, [*MASKS[:9], 1]), "targets 0 and 9 are of different kinds"),
        (lambda: Pairs(LEVELS, [{"boxes": [[0, 0, 1, 1]], "iscrowd": 1}] * 10), "marks of crowds of the shape"),
        (lambda: list(LEVELS), "wanted: .image, target."),
        (lambda: [], "No image was given"),
    ],
)
def test_what_is_no_image_and_target_is_refused(tmp_path: Path, make: Callable[[], Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        DataSet.from_torch(tmp_path / "set", make(), classes=["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [9, 11])
def test_there_are_as_many_groups_as_images(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=r"There are (fewer|more) groups than images. Nothing was written."):
        DataSet.from_torch(tmp_path / "set", Pairs(LEVELS, MASKS), groups=range(count))
    assert list(tmp_path.iterdir()) == []
