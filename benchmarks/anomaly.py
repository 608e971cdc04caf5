"""PatchCore against anomalib's on the same images, and what a fit takes.

    python -m venv ~/anomalib && ~/anomalib/bin/pip install "anomalib[cpu]"
    python benchmarks/anomaly.py --anomalib ~/anomalib/bin/python --mt-defect ../shared/data/mt_defect

anomalib runs in a process and an environment of its own. Both get the same pixels, framed as featprobe frames them, and
the embedded backbone's weights, levels of stride 8 and 16, and a coreset of 1 %; featprobe reads its features from a
cache in fp16. Sets: the built-in `surface`, and the magnetic tiles where `--mt-defect` names them. Good images of the
training split, at most --most of them, train; all images of validation and test are scored, at the frame's size.

The coreset depends on what is drawn: a projection and the first cell. A seed moves the AUROC of either by about 0.01,
so that means over three seeds differ by more than 0.005 by chance alone. Therefore featprobe's coreset is also computed
from anomalib's draws (draws: same). There the difference of the mean AUROC over the seeds, of images and of pixels, may
be 0.005. The table has both, with intervals over groups, and the seeds' standard deviation of each.

A fit on 200 images of 256x256 may take 30 s and 1.5 GB of memory, in a process of its own, and scoring 20 ms per image
beside reading. `ratio` is the least of allowed over measured.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from _bench import positive, report
from numpy.typing import NDArray
from safetensors.torch import save_file

from featprobe.backbones.weights import read_embedded
from featprobe.cache import Cache, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.images.reading import frame_image, read_levels
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.metrics.anomalies import ScoredAnomalies, anomaly_statistic
from featprobe.metrics.intervals import Statistic, mean_of, paired_difference, score_interval
from featprobe.metrics.pixel_counts import PixelCounter, histograms
from featprobe.probes.cards import HeadRecipe
from featprobe.probes.heads import build_head
from featprobe.probes.verdicts.coreset import farthest_first
from featprobe.probes.verdicts.heat_maps import maps_at_original
from featprobe.probes.verdicts.map_heads import MapAnomalyHead
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.image_truth import defect_regions, truth_of
from featprobe.stages.workspace import Workspace

FRAME = (256, 256)
CORESET = 0.01
APART, SECONDS, GIGABYTES, MILLISECONDS = 0.005, 30.0, 1.5, 20.0  # allowed
TIMED = 200  # images
BATCH = 8
SCORES = ("image_auroc", "pixel_auroc")
TAKEN = ("seconds", "cpu_seconds", "gigabytes", "milliseconds", "cpu_milliseconds", "bank")


@dataclass(frozen=True)
class World:
    """A cache, and which of its rows train and are scored; truth of the scored ones at the frame's size."""

    cache: Cache
    train: NDArray[np.intp]
    test: NDArray[np.intp]
    good: NDArray[np.bool_]  # (scored,)
    defects: NDArray[np.bool_]  # (scored, height, width)

    def batches(self, rows: NDArray[np.intp]) -> Iterator[Features]:
        """Features of rows, in order."""
        with FeatureLoader(self.cache) as loader:
            for _, features in loader.batches([rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]):
                yield features

    def images(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Normalised pixels of rows: (rows, 3, height, width)."""
        recipe = self.cache.recipe
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (recipe.mean, recipe.std))
        found = []
        for row in rows.tolist():
            levels = read_levels(Path(self.cache.data.root) / self.cache.rows[row].image)
            found.append((frame_image(levels, self.cache.rows.placement(row), recipe) - mean) / std)
        return np.stack(found)

    def statistics(self, maps: NDArray[np.float32], scores: NDArray[np.float64]) -> dict[str, Statistic]:
        """Image and pixel AUROC over groups."""
        counter = PixelCounter()
        for unit, (own, defect) in enumerate(zip(maps, self.defects, strict=True)):
            counter.add(unit, own, defect)
        pixels = histograms(range(len(maps)), counter.units.items())
        names, groups = ([self.cache.rows.column(c)[row] for row in self.test] for c in ("id", "group"))
        threshold = np.full(len(scores), np.nan)
        found = ScoredAnomalies(tuple(names), tuple(groups), scores, self.good, threshold, pixels)
        return {name: anomaly_statistic(found, name) for name in SCORES}


def world_of(workspace: Workspace, data: str, most: int) -> World:
    """A set's cache under the embedded backbone, its good training images and all others of validation and test."""
    options = ExtractOptions(levels=("stride8", "stride16"), size=FRAME, fit="resize", quiet=True)
    cache = open_cache(extract(workspace, workspace.backbone("embedded"), data, options).path)
    good = truth_of(cache, "defect", "image").good == 1
    train = cache.usable("train")
    train = train[good[cache.image_of[train]]]
    train = train[:: -(-len(train) // most)]
    test = np.sort(np.concatenate([cache.usable("val"), cache.usable("test")]))
    defects = np.zeros((len(test), *FRAME), bool)
    for place, image in enumerate(cache.image_of[test].tolist()):
        regions = defect_regions(cache, image, "image")
        if regions is not None:
            at = [(np.arange(n) + 0.5) * size / n for n, size in zip(FRAME, regions[0].shape, strict=True)]
            defects[place] = regions[0][np.ix_(*(own.astype(int) for own in at))]
    return World(cache, train, test, good[cache.image_of[test]], defects)


def head_of(cache: Cache) -> MapAnomalyHead:
    """A new PatchCore head."""
    head = build_head(HeadRecipe("anomaly", "patchcore", ("good", "defect")), cache.levels)
    assert isinstance(head, MapAnomalyHead)
    return head.eval()


def scored(world: World, head: MapAnomalyHead) -> dict[str, Statistic]:
    """Image and pixel AUROC of a head, with maps at the frame's size."""
    maps, scores = [], []
    with torch.inference_mode():
        for features in world.batches(world.test):
            found = head(features)
            assert found.maps is not None
            maps.append(maps_at_original(found.maps, head.stride, Placement(FRAME, FRAME, FRAME)).numpy())
            scores.append(found.scores.double().numpy())
    return world.statistics(np.concatenate(maps), np.concatenate(scores))


def ours(world: World, seed: int) -> dict[str, Statistic]:
    """Scores of a head that was fitted with a seed."""
    head = head_of(world.cache)
    head.fit(lambda: world.batches(world.train), seed, coreset=CORESET, remove_position=False)
    return scored(world, head)


def ours_of(world: World, drawn: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Statistic], float]:
    """Scores of a head whose bank is chosen from anomalib's draws, and the share of the bank that is anomalib's too."""
    head = head_of(world.cache)
    cells = torch.cat([head.cells_of(features)[0] for features in world.batches(world.train)])
    projected = cells @ torch.from_numpy(drawn["projection"]).T
    chosen = farthest_first(projected, len(drawn["chosen"]), int(drawn["chosen"][0]))
    head.put("bank", cells[chosen])
    return scored(world, head), len(np.intersect1d(chosen.numpy(), drawn["chosen"])) / len(chosen)


def theirs(
    world: World, python: Path, seeds: Sequence[int], threads: int, folder: Path
) -> Iterator[Mapping[str, NDArray]]:
    """anomalib's maps, scores, size of the bank and seconds, seed by seed."""
    folder.mkdir()
    spec = Workspace().backbone("embedded").model
    model = timm.create_model(spec, pretrained=False)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in read_embedded(model).items()},
        folder / "weights.safetensors",
    )
    info = timm.create_model(spec, pretrained=False, features_only=True).feature_info
    layers = [name for name, stride in zip(info.module_name(), info.reduction(), strict=True) if stride in (8, 16)]
    for name, rows in (("train", world.train), ("test", world.test)):
        np.save(folder / f"{name}.npy", world.images(rows))
    job = {"model": spec, "layers": layers, "coreset": CORESET, "seeds": list(seeds), "threads": threads}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("_anomalib.py")
    done = subprocess.run([str(python), "-W", "ignore", str(script), str(folder)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"anomalib failed:\n{done.stderr[-3000:]}")
    for seed in seeds:
        with np.load(folder / f"seed{seed}.npz") as found:
            yield dict(found)


def compared(
    name: str, world: World, python: Path, options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Rows of the table; with the same draws the largest difference of a mean, and the share of the banks alike."""
    rivals, same, alike, seconds = [], [], [], []
    for found in theirs(world, python, range(options.seeds), options.threads, folder):
        rivals.append(world.statistics(found["maps"], found["scores"].astype(float)))
        scores, share = ours_of(world, found)
        same.append(scores)
        alike.append(share)
        seconds.append(float(found["seconds"]))
    own = [ours(world, seed) for seed in range(options.seeds)]
    rows, largest = [], 0.0
    for draws, arm in (("same", same), ("own", own)):
        for score in SCORES:
            a, b = (mean_of([found[score] for found in some]) for some in (arm, rivals))
            mean, rival, apart = score_interval(a), score_interval(b), paired_difference(a, b)
            if draws == "same":
                largest = max(largest, abs(apart.estimate))
            rows.append(
                {
                    "set": name,
                    "draws": draws,
                    "score": score,
                    "trained on": str(len(world.train)),
                    "scored (good)": f"{len(world.test)} ({world.good.sum()})",
                    "featprobe": f"{mean.estimate:.4f} [{mean.low:.3f}, {mean.high:.3f}]",
                    "anomalib": f"{rival.estimate:.4f} [{rival.low:.3f}, {rival.high:.3f}]",
                    "difference": f"{apart.estimate:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]",
                    "of seeds": f"{spread(arm, score):.4f}, {spread(rivals, score):.4f}",
                }
            )
    figures = {"apart": largest, "banks_alike": float(np.mean(alike)), "anomalib_seconds": float(np.mean(seconds))}
    return rows, {f"{name}_{key}": value for key, value in figures.items()}


def spread(runs: Sequence[Mapping[str, Statistic]], score: str) -> float:
    """Standard deviation of a score among seeds; 0 of one."""
    values = [score_interval(run[score]).estimate for run in runs]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def timed(path: Path, threads: int) -> None:
    """Fit on TIMED rows of a cache, score them, and print what it took, as JSON; a row may come again.

    milliseconds: the median over batches. Seconds of all processors show what other load on the machine added.
    """
    torch.set_num_threads(threads)
    cache = open_cache(path)
    rows = np.resize(cache.usable(), TIMED)
    orders = [rows[i : i + BATCH] for i in range(0, TIMED, BATCH)]
    head = head_of(cache)
    with FeatureLoader(cache) as loader:
        begun, cpu = time.perf_counter(), time.process_time()
        fit = head.fit(lambda: (f for _, f in loader.batches(orders)), 0, coreset=CORESET, remove_position=False)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        taken, cpu = [], 0.0
        with torch.inference_mode():
            for _, features in loader.batches(orders):
                begun, cpu_begun = time.perf_counter(), time.process_time()
                found = head(features)
                assert found.maps is not None
                maps_at_original(found.maps, head.stride, Placement(FRAME, FRAME, FRAME))
                taken.append(time.perf_counter() - begun)
                cpu += time.process_time() - cpu_begun
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())  # getrusage's is the parent's too
    assert peak is not None
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gigabytes": int(peak[1]) * 1024 / 1e9,
        "milliseconds": 1000 * float(np.median(taken)) / BATCH,
        "cpu_milliseconds": 1000 * cpu / TIMED,
    }
    print(json.dumps(found | dict(fit.chosen)))


def main() -> None:
    """Compare, time, and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--anomalib", type=Path, help="the Python of an environment with anomalib; without it only times"
    )
    parser.add_argument("--mt-defect", type=Path, help="the folder of the magnetic tile set")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--most", type=positive, default=100, help="good images to train on")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="that torch computes with")
    parser.add_argument("--workspace", type=Path, help="to keep what is made; default: a temporary folder")
    parser.add_argument("--timed", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed:
        timed(options.timed, options.threads)
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        workspace = Workspace(options.workspace or temporary)
        rows, ratios, figures = [], [], dict[str, float]()
        sets = {"surface": "surface"} | ({"mt_defect": str(options.mt_defect)} if options.mt_defect else {})
        for name, data in sets.items():
            world = world_of(workspace, data, options.most)
            if options.anomalib:
                more, found = compared(name, world, options.anomalib, options, Path(temporary) / name)
                rows += more
                figures |= found
                ratios.append(APART / max(found[f"{name}_apart"], 1e-6))
        command = [sys.executable, __file__, "--timed", str(world.cache.path), "--threads", str(options.threads)]
        taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratios += [SECONDS / taken["seconds"], GIGABYTES / taken["gigabytes"], MILLISECONDS / taken["milliseconds"]]
    figures |= {name: float(taken[name]) for name in TAKEN}
    rows = rows or [{"images": str(TIMED), **{name: f"{value:.3g}" for name, value in figures.items()}}]
    more = {"compared": bool(options.anomalib), "seeds": options.seeds, "threads": options.threads}
    report("anomaly", min(ratios), 1.0, rows, **figures, **more)


if __name__ == "__main__":
    main()
