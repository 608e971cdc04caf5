"""Exported graphs against featprobe itself: whether they say the same of real images, and how fast they say it.

    python benchmarks/export.py --shared ../shared/data

Of each set every head is trained briefly and exported, once for each size of the images that it is compared on.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from _bench import Timings, interleave, positive, quartile_text, report, timed

from featprobe.datasets.images.reading import header_of, read_levels
from featprobe.errors import ProbeError
from featprobe.geometry import Size
from featprobe.kinds import KINDS
from featprobe.stages.export.export import export
from featprobe.stages.export.graph import Differences
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.predictor import Predictor
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

BACKBONE = "embedded"
SETS = ("bsdata", "mt_defect", "xray")
BUILT_IN = ("xray",)
HEADS = (
    ("semseg", "linear"), ("semseg", "upsample"), ("detect", "fcos"), ("detect", "fasterrcnn"), ("instseg", "maskrcnn"),
    ("classify", "linear"), ("anomaly", "patchcore"), ("anomaly", "gaussian"),
)  # fmt: skip
TARGET = 1.0  # times as fast as `predict`
LOGITS = 1e-3  # largest difference, whatever their size
TOGETHER = 4  # images of a batch


@dataclass(frozen=True)
class Compared:
    """What became of one head: how it agrees, and how long both take for the same images."""

    differences: Differences
    faults: Sequence[str]
    sizes: int
    timings: Timings
    images_timed: int

    @property
    def ratio(self) -> float:
        """How many times as fast the graph is."""
        return self.timings.ratio("predict", "onnxruntime")


def chosen(workspace: Workspace, data: str, most: int) -> list[tuple[Size, list[Path]]]:
    """So many images of a set, those of the commonest sizes; size by size, the commonest first."""
    sizes = {sample.image: header_of(sample.image).size for sample in workspace.data_set(data).samples}
    found, left = list[tuple[Size, list[Path]]](), most
    for size, _ in Counter(sizes.values()).most_common():
        own = [path for path in sizes if sizes[path] == size]
        places = np.unique(np.linspace(0, len(own) - 1, min(left, len(own))).round().astype(int))
        found.append((size, [own[place] for place in places]))
        left -= len(places)
        if not left:
            break
    return found


def trained(workspace: Workspace, data: str, task: str, kind: str, iterations: int) -> Path:
    """The folder of a head that was trained briefly. Raises ProbeError where the set does not serve the task."""
    usual = KINDS[task, kind]
    recipe = usual.recipe if usual.solved else replace(usual.recipe, iterations=iterations)
    options = ProbeOptions(
        head=kind, recipe=recipe, budget="fixed", seeds=1, quiet=True, device="cpu",
        instances="components" if task in ("detect", "instseg") else "own",
        labels="defect" if task == "classify" else "own",
    )  # fmt: skip
    before = set(workspace.root.glob("probes/*/*/*/seed0"))
    probe(workspace, task, [data], options=options)
    (folder,) = set(workspace.root.glob("probes/*/*/*/seed0")) - before
    return folder


def compared(
    workspace: Workspace, folder: Path, images: Sequence[tuple[Size, list[Path]]], options: argparse.Namespace
) -> Compared | list[str]:
    """Export a head for each size, compare, and time the commonest; the faults where no size gives a graph."""
    total, faults, models = Differences(), list[str](), list[Path]()
    for size, paths in images:
        out = folder / f"{size[0]}x{size[1]}.onnx"
        try:
            found = export(folder, out, workspace, image_size=size, images=paths, test_images=len(paths))
        except ProbeError as error:
            faults.append(f"{size[0]}x{size[1]}: {' '.join(str(error).split())}")
            continue
        total += found.parity.differences
        models.append(out)
    if not models:
        return faults
    if total.logits is not None and total.logits > LOGITS:
        faults.append(f"logits differ by {total.logits:.2g}; at most {LOGITS:g} is wanted")
    size, paths = next(own for own in images if models[0].stem == f"{own[0][0]}x{own[0][1]}")
    timings = interleave(arms(folder, models[0], paths, options.threads), options.rounds)
    return Compared(total, faults, len(images), timings, len(paths))


def arms(folder: Path, model: Path, paths: Sequence[Path], threads: int) -> dict[str, Callable[[], float]]:
    """Both, from the same files in the same batches, with as many threads."""
    predictor = Predictor(folder, device="cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    batches = [paths[start : start + TOGETHER] for start in range(0, len(paths), TOGETHER)]

    def by_graph() -> None:
        for own in batches:
            session.run(None, {given.name: np.stack([read_levels(path) for path in own])})

    def by_featprobe() -> None:
        for own in batches:
            predictor.predict([(path, path.stem) for path in own])

    return {"onnxruntime": timed(by_graph), "predict": timed(by_featprobe)}


def measured(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, str, Compared | list[str] | str]]:
    """Set, head and what became of it, or why nothing did."""
    asked = {*options.heads.split(",")} - {""}
    for name in options.sets.split(","):
        data = name if name in BUILT_IN else str(options.shared / name)
        if name not in BUILT_IN and not Path(data).is_dir():
            yield name, "all", f"{options.shared} does not hold it"
            continue
        workspace = Workspace(folder / name)
        workspace.root.mkdir(parents=True)
        how = ExtractOptions(
            size=(options.size, options.size), fit="letterbox", dtype=options.dtype, quiet=True, device="cpu"
        )
        extract(workspace, workspace.backbone(BACKBONE), data, how)
        images = chosen(workspace, data, options.images)
        for task, kind in HEADS:
            head = f"{task} {kind}"
            if asked and not asked & {task, kind}:
                continue
            try:
                own = trained(workspace, data, task, kind, options.iterations)
            except ProbeError as error:
                yield name, head, " ".join(str(error).split())
                continue
            yield name, head, compared(workspace, own, images, options)


def row_of(name: str, head: str, found: Compared) -> Mapping[str, str]:
    """A line of the table."""
    own = found.differences
    each = found.images_timed
    return {
        "set": name,
        "head": head,
        "sizes": str(found.sizes),
        "logits": "" if own.logits is None else f"{own.logits:.1e}",
        "scores": "" if own.scores is None else f"{own.scores:.1e}",
        "equal pixels": f"{own.equal_pixels / own.pixels:.4%}" if own.pixels else "",
        "equal objects": f"{own.equal_objects} of {own.objects}" if own.objects else "",
        "verdicts": f"{own.equal_verdicts} of {own.verdicts}" if own.verdicts else "",
        "near": str(own.near),
        "predict, ms": f"{1000 * found.timings.median('predict') / each:.1f}",
        "onnxruntime, ms": f"{1000 * found.timings.median('onnxruntime') / each:.1f}",
        "times as fast": quartile_text(found.timings.quartiles("predict", "onnxruntime")),
        "faults": str(len(found.faults)),
    }


def main() -> None:
    """Compare, time, and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="where the real sets lie")
    parser.add_argument("--sets", default=",".join(SETS), help="separated by commas")
    parser.add_argument("--heads", default="", help="tasks or kinds, separated by commas; default: all")
    parser.add_argument("--images", type=positive, default=20, help="of each set")
    parser.add_argument("--size", type=positive, default=128, help="of the frame, pixels")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="number format of the features")
    parser.add_argument("--iterations", type=positive, default=60, help="of the heads that are trained")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2, help="of both runtimes")
    parser.add_argument("--folder", type=Path, help="where to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, ratios, faults, left_out = [], dict[str, float](), dict[str, Sequence[str]](), dict[str, str]()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, head, found in measured(Path(folder), options):
            key = f"{name}, {head}"
            if isinstance(found, str):
                left_out[key] = found
                print(f"left out: {key}: {found}", flush=True)
                continue
            if isinstance(found, list):
                faults[key] = found
                print(f"{key}: no graph: {'; '.join(found)}", flush=True)
                continue
            rows.append(row_of(name, head, found))
            ratios[key] = found.ratio
            faults |= {key: found.faults} if found.faults else {}
            print(f"{key}: {len(found.faults)} faults, {found.ratio:.2f} times as fast", flush=True)
    slowest = min(ratios.values(), default=0.0)
    rows = rows or [{"set": "no graph was made"}]
    report(
        "export", slowest, TARGET, rows, holds=slowest >= TARGET and not faults, faults=faults, left_out=left_out,
        ratios=ratios, images=options.images, size=options.size, threads=options.threads, rounds=options.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
