"""What heads find on the images of a split, handed to one watch after another; memory holds it where it can."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.machine import available_memory
from featprobe.probes import Head
from featprobe.processes import count, gathered
from featprobe.stages.recording.watch import Watch
from featprobe.stages.stitch import Objects
from featprobe.stages.tasks.task import Source
from featprobe.stages.training.prepared import Prepared
from featprobe.targets import Labels

MEMORY_SHARE = 0.125  # of the available memory, for maps that are kept
PIECE, ALIGNED = 1 << 25, 64  # bytes that maps are kept in together, of which the system gives what is filled
NOTHING = np.empty(0, np.uint8)


class Findings:
    """What heads find on the images of a split, which are read once where memory holds all maps, else for each watch.

    Several processes hand over together, each what it scores.
    """

    def __init__(self, prepared: Prepared, heads: Sequence[Head], source: Source, split: str) -> None:
        self.prepared, self.heads, self.source, self.rows = prepared, heads, source, prepared.rows[split]
        self._kept: _Kept | None = None
        self._fit = True

    def hand_to(self, watch: Watch, *, last: bool = False) -> None:
        """Let a watch see all. last: none comes after it, so that nothing needs to be kept."""
        if self._kept is not None:
            for (head, image), (values, classes) in self._kept.maps.items():
                watch.pixels(head, image, values, classes)
            return
        keeping = _Kept(watch, MEMORY_SHARE * available_memory() / count()) if self._fit and not last else None
        self.prepared.evaluate(self.heads, self.source, self.rows, keeping or watch)
        if keeping is not None:
            self._fit = all(gathered([keeping.left >= 0]))
            self._kept = keeping if self._fit else None


class _Kept(Watch):
    """Hands all on to another watch, and keeps maps: none once they would take more than `room` bytes."""

    def __init__(self, watch: Watch, room: float) -> None:
        self.watch, self.left = watch, room
        self.maps: dict[tuple[int, int], tuple[NDArray[np.float32], Labels | None]] = {}
        self._piece = NOTHING  # what is free of the memory in which the maps lie

    def pixels(self, head: int, image: int, values: NDArray[np.float32], classes: Labels | None) -> None:
        """See `Watch`."""
        self.watch.pixels(head, image, values, classes)
        there = self.maps.get((head, image))
        if there is not None:  # it is handed over again, and as large
            for own, now in zip(there, (values, classes), strict=True):
                if own is not None and now is not None:
                    own[...] = now
            return
        self.left -= values.nbytes + (0 if classes is None else classes.nbytes)
        if self.left >= 0:
            self.maps[head, image] = self._copied(values), None if classes is None else self._copied(classes)
        else:
            self.maps.clear()
            self._piece = NOTHING

    def _copied(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same values in the piece, or in a new one: many small arrays would leave holes between what stays."""
        size = -(-values.nbytes // ALIGNED) * ALIGNED
        if size > len(self._piece):
            self._piece = np.empty(max(size, PIECE), np.uint8)
        own, self._piece = self._piece[: values.nbytes], self._piece[size:]
        copied = own.view(values.dtype).reshape(values.shape)
        copied[...] = values
        return copied

    def objects(self, head: int, image: int, objects: Objects) -> None:
        """See `Watch`."""
        self.watch.objects(head, image, objects)

    def image_score(self, head: int, image: int, score: float) -> None:
        """See `Watch`."""
        self.watch.image_score(head, image, score)
