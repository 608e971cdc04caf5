"""The rows of a cache as a dataset of torch: features with the labels of their image, one row at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from featprobe.cache.contents import Contents
from featprobe.cache.rows import RowTable
from featprobe.errors import CacheError
from featprobe.image_labels import UNKNOWN
from featprobe.levels import FeatureLevel
from featprobe.scores import SCORES
from featprobe.specs import DataInfo, FeatureRecipe
from featprobe.targets import Instance, Labels, decode_rle, labels_in_frame

TargetKind = Literal["masks", "objects", "labels"]
"""What is given of an image's labels: the class of each pixel, its objects, or its labels as a whole."""


class Source(Protocol):
    """What an open cache is here."""

    path: Path
    contents: Contents
    recipe: FeatureRecipe
    data: DataInfo
    rows: RowTable
    image_of: NDArray[np.intp]

    @property
    def image_labels(self) -> NDArray[np.uint8] | None: ...
    def read_row(self, row: int, level: FeatureLevel) -> NDArray[Any]: ...
    def semantic(self, row: int) -> Labels: ...
    def instances(self, row: int) -> tuple[Instance, ...]: ...


class CachedRows(Dataset[Any]):
    """Rows of a cache for a DataLoader, with any number of workers, forked or spawned; see `Cache.torch_dataset`.

    rows: (items,), the row of the cache that each item is.
    """

    def __init__(
        self,
        cache: Source,
        reopen: Callable[[Path, str], Source],
        levels: Sequence[FeatureLevel],
        rows: NDArray[np.intp],
        targets: bool | TargetKind,
    ) -> None:
        """reopen: opens the same cache in another process, from its path and identity."""
        self.cache, self.levels, self.rows = cache, tuple(levels), rows
        self._reopen = reopen
        self.targets = _kind(cache, targets)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        names = ", ".join(level.name for level in self.levels)
        return f"CachedRows({len(self)} rows, {names}, {self.targets or 'no targets'}; {str(self.cache.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file, which the other process opens itself."""
        cache = self.cache.path.absolute(), self.cache.contents.identity_sha256
        return {**self.__dict__, "cache": cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, cache=state["_reopen"](*state["cache"]))

    def __getitem__(self, item: int) -> Any:
        """(maps, target), or the maps alone without targets; see `Cache.torch_dataset`. Raises CacheError."""
        row = int(self.rows[item])
        maps = {level.name: self._map(row, level) for level in self.levels}
        return (maps, self._target(row)) if self.targets else maps

    def _map(self, row: int, level: FeatureLevel) -> Tensor:
        values = self.cache.read_row(row, level)
        own = torch.from_numpy(values if values.flags.writeable else values.copy())
        return own.view(torch.bfloat16) if values.dtype == np.uint16 else own

    def _target(self, row: int) -> Any:
        if self.targets == "masks":
            framed = labels_in_frame(self.cache.semantic(row), self.cache.rows.placement(row))
            return torch.from_numpy(framed)
        return self._objects(row) if self.targets == "objects" else self._labels(row)

    def _objects(self, row: int) -> Mapping[str, Tensor]:
        """The objects of a row as torchvision has them, in pixels of the frame."""
        placement, found = self.cache.rows.placement(row), self.cache.instances(row)
        (scale_x, _, _), (_, scale_y, _) = placement.affine
        boxes = torch.tensor([own.box_xyxy for own in found], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y]),
            "labels": torch.tensor([own.category for own in found], dtype=torch.int64),
            "iscrowd": torch.tensor([own.crowd for own in found], dtype=torch.int64),
            "image_id": torch.tensor(int(self.cache.image_of[row])),
        }
        rles = [own.rle for own in found if own.rle is not None]
        if len(rles) < len(found):  # boxes alone
            return target
        masks = [labels_in_frame(decode_rle(rle).astype(np.uint8), placement) % UNKNOWN for rle in rles]
        drawn = np.stack(masks) if masks else np.zeros((0, *placement.frame), np.uint8)  # (objects, height, width)
        return {**target, "masks": torch.from_numpy(drawn)}

    def _labels(self, row: int) -> Tensor:
        """The labels of the whole image that a row shows."""
        names, values = self.cache.data.label_names, self.cache.image_labels
        if names is None or values is None:  # held by `_kind`
            raise _lacks(self.cache, "labels")
        own = values[self.cache.image_of[row]]
        if names.multi:
            return torch.from_numpy(np.where(own == UNKNOWN, np.float32("nan"), own.astype(np.float32)))
        return torch.tensor(-100 if UNKNOWN in own else int(own.argmax()))


def _kind(cache: Source, targets: bool | TargetKind) -> TargetKind | None:
    """What is given of labels: what was asked for, by default the first that a cache holds. Raises CacheError."""
    of = cache.data.tasks
    held: dict[TargetKind, bool] = {
        "masks": any(SCORES[task].dense for task in of),
        "labels": cache.data.label_names is not None,
        "objects": any(SCORES[task].objects for task in of),
    }
    if targets is False:
        return None
    found = next((kind for kind, there in held.items() if there and targets in (True, kind)), None)
    if found is None:
        raise _lacks(cache, targets)
    return found


def _lacks(cache: Source, targets: object) -> CacheError:
    serves = ", ".join(cache.data.serves) or "nothing"
    return CacheError(
        f"{cache.path} has no {targets if targets is not True else 'labels'} to give.\n"
        f"  wanted  True, False, 'masks', 'objects' or 'labels', of what the set has\n  found   labels for {serves}"
    )
