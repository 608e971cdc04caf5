"""An extraction, settled before anything is computed: its recipe, its rows, its file, the command that repeats it."""

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from featprobe import __version__
from featprobe.backbones.backbone import Backbone
from featprobe.backbones.precision import resolve
from featprobe.cache import Row
from featprobe.datasets import DataSet
from featprobe.datasets.images.reading import Header
from featprobe.errors import CacheError
from featprobe.geometry import Size
from featprobe.machine import free_disk, human_bytes
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe
from featprobe.stages.extraction.cache_precision import cache_path, settle_precision
from featprobe.stages.extraction.command_line import command_of, with_links
from featprobe.stages.extraction.extract_options import READ_AS, ExtractOptions, check_thinned, check_turns
from featprobe.stages.extraction.survey import Survey, describe, make_recipe, make_rows, survey
from featprobe.stages.workspace import Workspace

DISK_RESERVE = 64_000_000  # bytes left free beside the features


@dataclass(frozen=True)
class Job:
    """All that is known of an extraction before anything is computed.

    images: the file of each row. whole: the images that rows are parts of; none where rows are images. read_as: options
    that say how the data set was read, of those that were given. notes: what to know of other caches of the same.
    """

    path: Path
    recipe: FeatureRecipe
    info: DataInfo
    rows: tuple[Row, ...]
    images: tuple[Path, ...]
    surveyed: Survey
    command: str
    spec: BackboneSpec
    device: torch.device
    whole: tuple[Row, ...] = ()
    read_as: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def size_of(self, row: int) -> Size:
        """(height, width) of the whole image that a row shows."""
        return (self.whole[self.rows[row].image_index] if self.whole else self.rows[row]).placement.original

    def header_of(self, row: int) -> Header:
        """The header of the whole image that a row shows."""
        return self.surveyed.found[self.rows[row].image_index if self.whole else row].header

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features."""
        return self.recipe.row_bytes * len(self.rows)


def prepare(
    workspace: Workspace, backbone: Backbone, data: DataSet, options: ExtractOptions, device: torch.device
) -> Job:
    """Look at the whole data set and settle the recipe, the rows and the file's name. device: that computes."""
    options.check()
    check_thinned(options.tiling, data)
    resolve(options.precision, device.type)  # refuses before anything is read
    surveyed = survey(data, workers=options.workers, skip_bad=options.skip_bad, quiet=options.quiet)
    recipe = make_recipe(surveyed, backbone, options)
    check_turns(recipe.views, recipe.size, recipe.fit)
    backbone.fit(recipe.frame)
    folder = workspace.cache_folder(data.name, data.root)
    recipe = replace(recipe, sized=backbone.sized)
    recipe, notes = settle_precision(recipe, options.precision, device.type, folder, surveyed.fingerprint)
    if recipe.precision != "fp32":
        options = replace(options, precision=recipe.precision)  # the command is to make this very file
    rows, whole = make_rows(surveyed, recipe, backbone.multiple)
    images = [data.samples[row.image_index if whole else i].image for i, row in enumerate(rows)]
    command = command_of(backbone.spec.words, workspace.data_argument(data.name, data.root), options)
    command = with_links(command, bool(data.description.get("follow_links")))
    how = {name: getattr(options, name) for name in READ_AS}
    return Job(
        cache_path(folder, recipe), recipe, describe(surveyed, recipe), tuple(rows), tuple(images), surveyed, command,
        _placed(backbone.spec), device, tuple(whole), {name: value for name, value in how.items() if value}, notes,
    )  # fmt: skip


def read_set(workspace: Workspace, name: str, options: ExtractOptions) -> DataSet:
    """The data set of a name, read as options say."""
    how = {name: getattr(options, name) for name in READ_AS if name != "format"}
    return workspace.data_set(name, options.format, **how)


def _placed(spec: BackboneSpec) -> BackboneSpec:
    """The spec with a weights file's whole path, so that it can be found from anywhere."""
    return spec if spec.weights is None else replace(spec, weights=str(Path(spec.weights).resolve()))


def check_disk(job: Job) -> None:
    """Raise CacheError when the disk can't hold the features of a job."""
    free = free_disk(job.path.parent)
    if job.feature_bytes + DISK_RESERVE > free:
        raise CacheError(
            f"The disk of {job.path.parent} can't hold these features. Nothing was started.\n"
            f"  wanted  {human_bytes(job.feature_bytes)} for {len(job.rows)} images at "
            f"{job.recipe.frame[0]}x{job.recipe.frame[1]}, {job.recipe.kept_as}, "
            f"and {human_bytes(DISK_RESERVE)} to spare\n"
            f"  found   {human_bytes(free)} free\n"
            "Choose fewer levels (--levels), a smaller --size, or another disk (featprobe --workspace DIR extract …).\n"
            "Where only whole images get a verdict, --store pooled keeps no maps."
        )


def provenance(job: Job) -> dict[str, Any]:
    """The origin of a cache, for people.

    device: on which it was begun; a file without it is older than this entry. tf32: whether TF32 was allowed there.
    """
    packages = ("torch", "timm", "numpy", "h5py")
    return {
        "command": job.command,
        "read_as": dict(job.read_as),
        "backbone": asdict(job.spec),
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type,
        "tf32": job.device.type == "cuda" and job.recipe.precision != "fp32",
        "featprobe": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
