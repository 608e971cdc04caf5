"""Operators that a training step and an evaluated batch dispatch on the path that a GPU takes.

    python benchmarks/overhead.py

A GPU waits for whoever starts its work: what costs is not arithmetic but how often something is started. Here the
product's own runs (`featprobe probe`: features and labels that lie on the device, clipping, schedule, AdamW, gathering
of losses) go step by step on a CPU, told that it is a GPU, and every operator that is dispatched is counted, backward
passes included; views, which start nothing, are left out. A fused or foreach operator counts once: it is one. Batches
of 16, of heads with regions 4, three objects in each image, four levels as ConvNeXt has them; images that fill their
frames, and others that do not. No step may ask the device for a number (`_local_scalar_dense`) or make a tensor whose
size depends on values. An evaluated batch may; `--show` prints where. What works on detections that have left the
device counts too.
"""

import argparse
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _bench import report
from _operators import WAITS, operators
from kill9 import PoolingBackbone
from PIL import Image

from featprobe.cache import Cache, reader
from featprobe.kinds import KINDS
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.train import _Loop, _steps
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.partition import Partition
from featprobe.stages.tasks import segmentation
from featprobe.stages.tasks.task import EVALUATION_BATCH
from featprobe.stages.training.prepared import Prepared, keep_on_device, placed, prepare, source_of, trials_of
from featprobe.stages.training.probe import find_caches
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace

SIDE, BATCH, OBJECTS, CLASSES = 128, 16, 3, 5  # pixels, images a step, objects an image, classes of objects
FEW = 4  # images a step of heads with regions
SPLITS = {"train": 2 * BATCH, "val": 3 * EVALUATION_BATCH, "test": 3}  # images
SIZES = {"whole": (SIDE, SIDE), "padded": (SIDE, 3 * SIDE // 4)}  # of the images, in frames of SIDE
STEPS = 2  # that come before the one that is counted: the optimizer makes its state


@dataclass(frozen=True)
class Arm:
    """What is counted, and how many operators it may dispatch: for images that fill their frames, and for others.

    count: "step" of training, or "batch" of evaluation, on validation. rates: learning rates and weight decays that
    are tried at once. loss_at: of dense heads.
    """

    name: str
    task: str
    head: str
    whole: int
    padded: int
    count: str = "step"
    rates: int = 1
    loss_at: str | None = None
    batch: int = BATCH


ARMS = (
    Arm("linear, loss at the image", "semseg", "linear", 120, 170),
    Arm("linear, loss at the level", "semseg", "linear", 120, 170, loss_at="level"),
    Arm("bank of nine, loss at the image", "semseg", "linear", 180, 230, rates=3),
    Arm("bank of nine, loss at the level", "semseg", "linear", 180, 230, rates=3, loss_at="level"),
    Arm("linear, evaluation", "semseg", "linear", 40, 40, count="batch"),
    Arm("upsample, evaluation", "semseg", "upsample", 90, 90, count="batch"),
    Arm("upsample", "semseg", "upsample", 180, 260),
    Arm("FCOS", "detect", "fcos", 700, 700),
    Arm("FCOS, evaluation", "detect", "fcos", 200, 250, count="batch"),
    Arm("Faster R-CNN", "detect", "fasterrcnn", 500, 540, batch=FEW),
    Arm("Faster R-CNN, evaluation", "detect", "fasterrcnn", 280, 290, count="batch"),
    Arm("Mask R-CNN", "instseg", "maskrcnn", 560, 600, batch=FEW),
    Arm("Mask R-CNN, evaluation", "instseg", "maskrcnn", 780, 800, count="batch"),
)


class Pyramid(PoolingBackbone):
    """The stand-in for a network with ConvNeXt's strides."""

    multiple = 32

    def __init__(self) -> None:
        super().__init__()
        self.levels = tuple(FeatureLevel(f"stride{s}", 3 * s, s) for s in (4, 8, 16, 32))


def write_set(root: Path, size: tuple[int, int]) -> None:
    """A COCO set of noise with OBJECTS rectangles in each image."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    categories = [{"id": k + 1, "name": f"kind{k}"} for k in range(CLASSES)]
    for split, count in SPLITS.items():
        images, annotations = [], []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / name)
            images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
            for k in range(OBJECTS):
                w, h = (int(v) for v in rng.integers(12, 40, 2))
                x, y = int(rng.integers(0, size[1] - w)), int(rng.integers(0, size[0] - h))
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": (number + k) % CLASSES + 1,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                })  # fmt: skip
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def extracted(folder: Path, frames: str) -> tuple[Workspace, Cache]:
    """A workspace with a cache of such a set; frames: a key of SIZES."""
    write_set(folder / "parts", SIZES[frames])
    workspace, options = Workspace(folder / "space"), ExtractOptions(size=(SIDE, SIDE), fit="letterbox", quiet=True)
    data = workspace.data_set(str(folder / "parts"))
    extract_with(workspace, Pyramid(), data, options, torch.device("cpu"))  # type: ignore[arg-type]
    return workspace, find_caches(workspace, "detect", (), ())[0][0]


def prepared(arm: Arm, workspace: Workspace, cache: Cache, width: int | None = None) -> Prepared:
    """The product's training of an arm: its own recipe, with clipping. width: of heads that have one."""
    kind = KINDS[arm.task, arm.head]
    recipe = kind.recipe
    changes: dict[str, Any] = {"iterations": STEPS + 1, "batch_size": arm.batch, "clip": recipe.clip or 1.0}
    changes |= {"loss_at": arm.loss_at} if arm.loss_at else {}
    rates = tuple(10.0**-power for power in range(2, 2 + arm.rates)) if arm.rates > 1 else ()
    options = ProbeOptions(
        head=arm.head, recipe=replace(recipe, **changes), lr=rates, weight_decay=rates, seeds=1,
        device="cpu", quiet=True, kind=kind, width=width if kind.width else None,
    )  # fmt: skip
    return prepare(Training(workspace, Partition(cache, options.choice), arm.task, options, (0,)))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The CPU takes the path of a GPU with room for all features and labels."""
    with contextlib.ExitStack() as patches:
        products = torch.library.Library("aten", "IMPL")  # which CPUs have in one number format alone
        patches.callback(products._destroy)
        products.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU", allow_override=True)
        for choice in ("whole_batches", "mixed"):
            patches.enter_context(mock.patch.object(execution, choice, lambda device: True))
        for module in (reader, segmentation):
            patches.enter_context(mock.patch.object(module, "device_room", lambda device: 2**40))
        yield


def count_step(ready: Prepared, stops: Counter[str]) -> Counter[str]:
    """Operators of one training step of all heads of a training. stops: gets the places that wait for the device."""
    trials = trials_of(ready)
    heads = [trial.head for trial in trials]
    with source_of(ready, heads[0]) as source:
        keep_on_device(ready, source)
        where, loss = placed(ready, source, heads[0]), ready.task.start(heads)
        if where.get("resident") is None:
            raise RuntimeError(f"{ready.training.kind.name} does not find its batches on the device")
        loop = _Loop(heads, [trial.recipe for trial in trials], 0, None, None, fixed=True)
        loop.mode(training=True)
        made = _steps(loop, source.training, ready.rows["train"], loss, 0, where["resident"])
        with contextlib.closing(made) as steps:
            for _ in range(STEPS):
                next(steps)
            return operators(lambda: next(steps), stops)


def count_batch(ready: Prepared, stops: Counter[str]) -> Counter[str]:
    """Operators of one evaluated batch: of three in a row the mean. stops: gets the places of all three."""
    (trial,) = trials_of(ready)
    with source_of(ready, trial.head) as source:
        keep_on_device(ready, source)
        trial.head.eval()
        rows = ready.rows["val"]
        batches = -(-len(rows) // EVALUATION_BATCH)
        once = rows if ready.training.task == "semseg" else rows[:EVALUATION_BATCH]  # labels of pixels are read once
        ready.task.evaluate([trial.head], source.batches, once)
        found = operators(lambda: ready.task.evaluate([trial.head], source.batches, rows), stops)
    return Counter({name: number / batches for name, number in found.items()})  # type: ignore[misc]


COUNTS: dict[str, Callable[[Prepared, Counter[str]], Counter[str]]] = {"step": count_step, "batch": count_batch}


def counted(
    arms: Sequence[Arm], frames: str, stops: dict[str, Counter[str]] | None = None, width: int | None = None
) -> dict[str, Counter[str]]:
    """Operators of every arm. stops: gets the places where each waits for the device. width: of heads that have one."""
    places: dict[str, Counter[str]] = {arm.name: Counter() for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        workspace, cache = extracted(Path(folder), frames)
        with as_on_a_gpu():
            found = {
                arm.name: COUNTS[arm.count](prepared(arm, workspace, cache, width), places[arm.name]) for arm in arms
            }
    if stops is not None:
        stops.update(places)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", metavar="ARM", help="print the operators of the arms whose names begin so")
    options = parser.parse_args()
    torch.manual_seed(0)
    places: dict[str, dict[str, Counter[str]]] = {frames: {} for frames in SIZES}
    every = {frames: counted(ARMS, frames, own) for frames, own in places.items()}
    rows, ratios, stops = [], {}, 0
    for arm in ARMS:
        row = {"per": f"{arm.count}: {arm.name}"}
        for frames, found in every.items():
            own, limit = found[arm.name], getattr(arm, frames)
            ratios[f"{arm.name}, {frames}"] = limit / (total := ceil(own.total() - own[WAITS]))
            stops += own[WAITS] if arm.count == "step" else 0
            row |= {frames: str(total), f"limit {frames}": str(limit), f"stops {frames}": f"{own[WAITS]:g}"}
            if options.show and arm.name.startswith(options.show):
                print(f"{arm.name}, {frames}: {dict(own.most_common())}")
                print(f"  waits at {dict(places[frames][arm.name].most_common())}")
        rows.append(row)
    # a step that waits for the device misses the target whatever it counts
    report("overhead", 0.0 if stops else min(ratios.values()), 1.0, rows, stops=stops, **ratios)


if __name__ == "__main__":
    main()
