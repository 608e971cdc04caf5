"""The computation of a backbone in training, compiled by torch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from featprobe.backbones.models import first_line
from featprobe.errors import BackboneError
from featprobe.machine import is_of_device

Maps = Callable[[nn.Module, Tensor], list[Tensor]]


class Compiled:
    """A function of a model and its images that is compiled when it is first called. name: of the model, for errors."""

    def __init__(self, name: str, function: Maps) -> None:
        self.name, self.function = name, function
        self._compiled: Maps | None = None

    def __call__(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Call the function; raises BackboneError if torch can't compile it, which the first call shows."""
        if self._compiled is not None:
            return self._compiled(model, images)
        compiled: Maps = torch.compile(self.function)
        try:
            found = compiled(model, images)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that is not there, or that gives up, raises many kinds
            if is_of_device(error):
                raise
            raise BackboneError(
                f"torch can't compile {self.name} here. Nothing was trained.\n"
                f"  wanted  what torch.compile needs: a C++ compiler, and Triton for CUDA\n"
                f"  found   {type(error).__name__}: {first_line(error)}\n"
                "Omit --compile: it changes only the speed."
            ) from error
        self._compiled = compiled
        return found
