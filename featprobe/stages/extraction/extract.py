"""The door of extraction: a cache that is complete is known by its files; all else is made, which loads the network."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from featprobe.backbones.given import at_hand
from featprobe.backbones.precision import resolve
from featprobe.datasets import DataSet
from featprobe.machine import lacks_accelerator, launched
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract_options import ExtractOptions, configured, read_already
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.extraction.settled import ask, without_a_network
from featprobe.stages.workspace import AnySet, Workspace

if TYPE_CHECKING:
    from torch import nn


def extract(
    workspace: Workspace,
    backbone: "BackboneSpec | nn.Module | str",
    data: AnySet,
    options: ExtractOptions | None = None,
) -> ExtractReport:
    """Make, go on with, repair or refresh the cache of a data set under a backbone.

    backbone: a name, what `Workspace.backbone` gives, or a module of your own, see `backbones.adapted.OwnBackbone`. A
    copy of the module is used: it stays as it is. data: a name, a path, or a data set, which is taken as it is. Raises
    FeatprobeError; whatever was whole before stays whole.
    """
    if isinstance(backbone, BackboneSpec):
        return _extract(workspace, backbone, data, options)
    with at_hand(backbone) as (name,):
        return _extract(workspace, workspace.backbone(name), data, options)


def _extract(workspace: Workspace, spec: BackboneSpec, data: AnySet, options: ExtractOptions | None) -> ExtractReport:
    data_name, options = workspace.data_called(data), options or ExtractOptions()
    if isinstance(data, DataSet):
        options = read_already(options, data)
    options = configured(options, workspace.data_options(data_name))
    if launched()[0]:
        options = replace(options, quiet=True)  # one progress bar is enough
    begun, asked, device = time.perf_counter(), None, _device(options.device)
    kind = device.partition(":")[0]
    resolve(options.precision, kind)  # what the device can't compute is refused before anything is read
    if not isinstance(data, DataSet):
        asked = ask(workspace, spec, data_name, options, kind)
        if not options.rehash and (report := without_a_network(asked, options.precision, device, begun)):
            return report
    from featprobe.stages.extraction.make_cache import make  # torch and timm take seconds

    return make(workspace, spec, data, options, asked, begun)


def _device(name: str | None) -> str:
    """The device that computes; torch, which takes seconds to load, is asked unless it surely is the CPU."""
    if name == "cpu" or (name is None and lacks_accelerator()):
        return "cpu"
    from featprobe.processes import pick_device

    return str(pick_device(name))
