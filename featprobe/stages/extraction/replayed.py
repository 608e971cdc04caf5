"""A backbone's pass over a block of images on a CUDA device, recorded once and then replayed by a single call."""

from collections.abc import Callable

import torch
from torch import Tensor

from featprobe import cuda_graphs

WARM_UP = 2  # passes before one is recorded, in which libraries choose their ways
Found = tuple[dict[str, Tensor], Tensor]
Pass = Callable[[Tensor, Tensor | None], Found]
"""From images, (images, 3, height, width), and their content, see Features, to what is stored and whether each row of
it is finite; all on the device."""


class ReplayedPass:
    """The same as a pass. On CUDA, for blocks of one size, Python starts one graph instead of hundreds of kernels.

    A kernel that Python starts waits for its turn among all threads that decode images. The first block is computed
    by replay too, so that a row does not depend on when its extraction began. note: why nothing could be recorded;
    then the plain pass computes all.
    """

    def __init__(self, plain: Pass, images: int, device: torch.device) -> None:
        self.plain, self.device, self.note = plain, device, ""
        self.size = images if cuda_graphs.recorded(device) else 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor | None]
        self._found: Found

    def __call__(self, images: Tensor, content: Tensor | None) -> Found:
        """The pass over a block. Raises torch.OutOfMemoryError where the plain pass does."""
        if len(images) != self.size or self.note:
            return self.plain(images, content)
        if self._graph is None:
            self._record(images, content)
        if self._graph is None:
            return self.plain(images, content)
        self._given[0].copy_(images)
        if content is not None and self._given[1] is not None:
            self._given[1].copy_(content)
        self._graph.replay()
        maps, finite = self._found
        return {name: m.clone() for name, m in maps.items()}, finite.clone()

    def _record(self, images: Tensor, content: Tensor | None) -> None:
        """Record the pass over blank images; they and what is found stay where the graph has them."""
        self._given = torch.zeros_like(images), None if content is None else content.clone()
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.plain(*self._given)
        current.wait_stream(stream)

        def call() -> None:
            self._found = self.plain(*self._given)

        try:
            self._graph = cuda_graphs.record(call, self.device, stream)
        except RuntimeError as error:  # too little memory for both, or a backbone that waits for the device
            self.note = (
                f"the backbone runs kernel by kernel, which is slower: its pass could not be recorded on {self.device} "
                f"({str(error).splitlines()[0]})"
            )
