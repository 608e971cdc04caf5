"""Resuming a finished study: seconds to find that all of its trainings are there, beside the imports.

    python benchmarks/resume.py

A cache of 10,000 images with a small feature each is made, and one detection head is trained on it. Its results are
kept again for 99 other seeds, as a study of 100 trainings leaves them. Then the study is resumed: `run_cells` looks for
every training, in turn as a plan and as a run; and one training is prepared, which reads the labels of the training
images, as each of the 100 would have to if labels were needed to know that it is done. The ratio is wanted over
measured: 1 s for the slower of the two.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from _bench import interleave, positive, report, timed

from featprobe.cache import Cache, CacheWriter, Row, create_file, open_cache
from featprobe.geometry import Placement
from featprobe.kinds import TASKS
from featprobe.levels import FeatureLevel
from featprobe.probes import append_row, load_head, save_head
from featprobe.scores import SCORES
from featprobe.specs import DataInfo, FeatureRecipe
from featprobe.stages.partition import Partition
from featprobe.stages.study.grid import run_cells
from featprobe.stages.study.study import Study, cells_of
from featprobe.stages.training.prepared import prepare
from featprobe.stages.training.run import run
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace

SECONDS = 1.0  # at most, to resume a finished study
SIDE, SCORED = 64, 10  # pixels of a frame; images of val, and of test
TASK = next(task for task in TASKS if SCORES[task].on == "boxes")
LABEL = b'{"image_id":1,"objects":[{"category":1,"box_xyxy":[8,8,40,40],"rle":null,"crowd":false,"area":1024}]}'


def make_cache(path: Path, count: int) -> Cache:
    """A complete cache of images with an object each and one level of few bytes."""
    recipe = FeatureRecipe(
        label="some", backbone="some", weights_sha256="0" * 64, levels=(FeatureLevel("stride32", 1, 32),),
        final_norm=False, size=(SIDE, SIDE), frame=(SIDE, SIDE), fit="resize", intensity="none", window=None,
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", dtype="fp16",
    )  # fmt: skip
    place, splits = Placement((SIDE,) * 2, (SIDE,) * 2, (SIDE,) * 2), ["val"] * SCORED + ["test"] * SCORED
    splits += ["train"] * (count - len(splits))
    names = [f"casting{i:06}.png" for i in range(count)]
    rows = [
        Row(name, name, split, f"images/{name}", f"{i:032x}", place, b"", LABEL)
        for i, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    data = DataInfo("parts", "parts", ("background", "defect"), (TASK,), "f" * 64)
    create_file(path, recipe, data, rows, {"command": "featprobe extract"})
    with CacheWriter(path) as writer:
        writer.write(0, {"stride32": np.ones((count, 1, 2, 2), np.float16)})
    return open_cache(path)


def keep_again(training: Training, seed: int) -> None:
    """Keep the result of a training once more, as that of another seed."""
    probes, folder = training.workspace.probes, training.folder / f"seed{training.seeds[0]}"
    other = replace(training, seeds=(seed,))
    head, card = load_head(folder)
    row = {**card["result"], "seed": seed, "folder": other.folders[0]}
    files = {name: (folder / name).read_bytes() for name in card["files"] if name != "head.safetensors"}
    save_head(probes / other.folders[0], head, {**card, "result": row}, files)
    append_row(probes / "results.jsonl", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=10_000)
    parser.add_argument("--trainings", type=positive, default=100)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name))
        cache = make_cache(workspace.cache / "parts-000000" / "some-00000000.h5", options.images)
        train = {"all": {"iterations": 1, "batch_size": 2, "evaluations": 1}}
        study = Study(("parts",), ("some",), (TASK,), regimes=("frozen",), seeds=options.trainings, train=train, show=0)
        cells = cells_of(study, workspace)
        first = study.options(cells[0].task, cells[0].head, "frozen")
        training = Training(workspace, Partition(cache, cells[0].split), TASK, first, (0,))
        run(training)
        for cell in cells[1:]:
            keep_again(training, cell.seed)

        def resume(dry_run: bool) -> None:
            found = run_cells(workspace, study, open_cache(cache.path), cells, lambda line: None, dry_run=dry_run)
            if found.done != len(cells):
                raise RuntimeError(f"{found.done} of {len(cells)} trainings were found: {found.failed[:1]}")

        def read_labels() -> None:
            prepare(replace(training, partition=Partition(open_cache(cache.path), training.choice)))

        arms = {"plan": lambda: resume(True), "run": lambda: resume(False), "labels": read_labels}
        timings = interleave({name: timed(arm) for name, arm in arms.items()}, options.rounds)
    seconds = {name: timings.median(name) for name in arms}
    slower = max(seconds["plan"], seconds["run"])
    what = f"{len(cells)} trainings, {options.images} images"
    rows = [{"what": f"{what}: {name}", "seconds": f"{own:.3f}"} for name, own in seconds.items()]
    report("resume", SECONDS / slower, 1.0, rows, **seconds)


if __name__ == "__main__":
    main()
