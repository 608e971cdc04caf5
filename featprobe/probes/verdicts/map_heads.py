"""What anomaly heads on maps have in common: which cells are an image's, the mean map of good images, scores."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featprobe.errors import ProbeError, ShapeError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.head import Anomalies, AnomalyHead, over_padding
from featprobe.probes.pyramid import cells_inside

Passes = Callable[[], Iterable[Features]]
"""Gives the features of all good training images, in ascending order of rows, each time that it is called."""
AT_ONCE = 2**26  # values of cells
STRIDES = (8, 16)
"""Of the levels that are read where the user names none."""


def default_levels(levels: Sequence[FeatureLevel]) -> tuple[FeatureLevel, ...]:
    """Those of STRIDES; all of them where none has such a stride."""
    return tuple(level for level in levels if level.stride in STRIDES) or tuple(levels)


def few_at_once(features: Features, levels: Sequence[FeatureLevel]) -> Iterator[Features]:
    """The images of a batch, in order: on a CPU one by one, so that no result depends on how they are cut into batches;
    else as many at once as have AT_ONCE values at the cells of the finest level, or one."""
    images = 1
    if execution.whole_batches(features.maps[levels[0].name].device):
        rows, columns = levels[0].cells(features.frame)
        images = max(1, AT_ONCE // (rows * columns * sum(level.channels for level in levels)))
    for first in range(0, features.batch, images):
        part = slice(first, first + images)
        content = None if features.content is None else features.content[part]
        yield Features({level.name: features.maps[level.name][part] for level in levels}, features.frame, content)


class MapAnomalyHead(AnomalyHead):
    """An anomaly head that looks at each cell.

    levels: finest first. frame: (height, width) of the training images' frame, pixels; 0 without a mean map.
    position_LEVEL: (cells, channels), the mean over the good training images of each cell, row by row; no cells where
    it is not removed.
    """

    frame: Tensor

    def __init__(self, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.classes = 2
        self.register_buffer("frame", torch.zeros(2, dtype=torch.int64))
        for level in self.levels:
            self.register_buffer(f"position_{level.name}", torch.zeros(0, level.channels))
        self.banks = tuple(f"position_{level.name}" for level in self.levels)

    @property
    def stride(self) -> int:
        """That of the finest level."""
        return self.levels[0].stride

    def grid(self, features: Features) -> tuple[int, int]:
        """(rows, columns) of its maps."""
        return self.levels[0].cells(features.frame)

    def each(self, batches: Iterable[Features]) -> Iterator[Features]:
        """All images of some batches, `few_at_once`."""
        return (few for features in batches for few in few_at_once(features, self.levels))

    def forward(self, features: Features) -> Anomalies:
        """What `found` gives, image by image or many at once."""
        parts = [self.found(few) for few in few_at_once(features, self.levels)]
        maps = [part.maps for part in parts if part.maps is not None]
        return Anomalies(torch.cat([part.scores for part in parts]), torch.cat(maps))

    @abstractmethod
    def found(self, features: Features) -> Anomalies:
        """`forward` of few images."""

    def inside(self, features: Features, level: FeatureLevel) -> Tensor:
        """Whether each cell of a level holds a part of its image: (batch, rows, columns), bool."""
        grid = level.cells(features.frame)
        found = cells_inside(features.content, grid, level.stride)
        return torch.ones(features.batch, *grid, dtype=torch.bool, device=self.frame.device) if found is None else found

    def map_of(self, features: Features, level: FeatureLevel) -> Tensor:
        """A level's map less the mean map, 0 over padding: (batch, channels, rows, columns), float32.

        Raises ShapeError where the mean map is of another frame.
        """
        x = features.maps[level.name].float()
        position = self.get_buffer(f"position_{level.name}")  # (cells, channels)
        if len(position):
            self._check(features, level, position)
            x = x - position.T.unflatten(1, tuple(x.shape[2:]))
        inside = cells_inside(features.content, level.cells(features.frame), level.stride)
        return x if inside is None else x.masked_fill(~inside[:, None], 0)

    def filled(self, name: str) -> Tensor:
        """A bank that must not be empty; raises ProbeError where it is, as in a head that was not fitted."""
        found = self.get_buffer(name)
        if not len(found):
            raise ProbeError(f"This head knows no good image: its {name} is empty. Train it again.")
        return found

    def _check(self, features: Features, level: FeatureLevel, position: Tensor) -> None:
        rows, columns = level.cells(features.frame)
        if torch.compiler.is_compiling():  # buffers have no values there
            return
        if tuple(self.frame.tolist()) != tuple(features.frame) or len(position) != rows * columns:
            wanted, found = ("x".join(map(str, sides)) for sides in (self.frame.tolist(), features.frame))
            raise ShapeError(
                f"This head removes the mean map of frames of {wanted} pixels, and these frames have {found}.\n"
                "Extract the images at that size, or train it again without --remove-position."
            )

    def at_finest(self, x: Tensor, features: Features, level: FeatureLevel) -> Tensor:
        """A map of a level, bilinearly at the cells of the finest: (batch, channels, rows, columns)."""
        if level.cells(features.frame) == self.grid(features):
            return x
        padded = over_padding(x, features.content, level.stride)
        return interpolate(padded, self.grid(features), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def fit_position(self, passes: Passes, *, remove: bool) -> None:
        """Set the mean map of good images: one pass over them; or none, without a pass. Raises ProbeError."""
        self.frame.zero_()
        for level in self.levels:
            name = f"position_{level.name}"
            self.put(name, self.get_buffer(name)[:0])
        if not remove:
            return
        wide = torch.float32 if self.frame.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        frame = None
        for features in self.each(passes()):
            frame = features.frame
            for level in self.levels:
                total = self.map_of(features, level).sum(0, dtype=wide)
                number = self.inside(features, level).sum(0)
                sums[level.name] = sums[level.name] + total if level.name in sums else total
                counts[level.name] = counts[level.name] + number if level.name in counts else number
        if frame is None:
            raise ProbeError("There is no good image to train on.")
        self.frame.copy_(torch.tensor(frame))
        for level in self.levels:
            mean = sums[level.name] / counts[level.name].clamp(min=1)
            self.put(f"position_{level.name}", mean.flatten(1).T)

    def put(self, name: str, values: Tensor) -> None:
        """Set a buffer to other values, a bank to any number of rows."""
        setattr(self, name, values.to(self.get_buffer(name)).contiguous())
