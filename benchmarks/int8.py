"""int8 against fp16: how fast it is read, how far values are off, and what heads score.

    python benchmarks/int8.py

First the loader: random warm batches of a cache of ConvNeXt-T's levels at 512x512 pixels, in fp16 and in int8, for a
consumer that takes batches and does nothing, and one epoch of a linear head on each; `ratio` is the rows per second of
int8 over those of fp16. Both are first proved to bring the same values, to the code. Then two built-in sets
and two real ones go through the embedded backbone: bytes, relative L2 error of each level, and the foreground mIoU on
test of a linear and a ridge head, int8 - fp16 of the same seed, with two intervals of the mean: over seeds, for what
training again would give, and over the groups of test. A set that is not there is named and left out.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import scipy
import torch
from _bench import Timings, interleave, positive, print_table, quartile_text, report
from cache_read import (
    BLOCK,
    CHECKED,
    CLASSES,
    LEVELS,
    disk_bytes,
    epoch_arm,
    loader_arm,
    make_empty,
    random_batches,
    random_maps,
    warm_up,
)

from featprobe.cache import Cache, CacheWriter, open_cache
from featprobe.cache.quantised import as_read, coded
from featprobe.cache.reader import FeatureLoader
from featprobe.kinds import KINDS
from featprobe.metrics import Statistic, mean_of, paired_difference, pixel_statistic
from featprobe.specs import BackboneSpec
from featprobe.stages.comparison.audit import AuditOptions, audit
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

READ_TARGET = 0.8  # at least, rows/s of int8 over those of fp16
ERROR_TARGET = 0.010  # at most, relative L2 error of any level
BYTES_TARGET = 0.52  # at most, bytes of int8 over those of fp16, scales included
SCORE_TARGET = 0.5  # at most, points of foreground mIoU between int8 and fp16, mean over the seeds
SEEDS = 32  # of linear heads: gaps of a seed on `xray` scattered by 1.0 point, so that the mean is known to 0.36
LEVEL = 0.95  # of intervals
SETS = ("xray", "surface", "bsdata", "mt_defect")
BUILT_IN = SETS[:2]
SPEC = BackboneSpec("embedded", "tf_efficientnet_lite0", "embedded", arguments=("--backbone", "embedded"))


def write_both(folder: Path, count: int) -> dict[str, Cache]:
    """The same features in fp16 and in int8: each map random normal values, as those of a channel are."""
    paths = {"fp16": folder / "fp16.h5", "int8": folder / "int8.h5"}
    for dtype, path in paths.items():
        make_empty(path, count, dtype)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    shapes = {name: m.shape[1:] for name, m in random_maps(np.random.default_rng(0), 1).items()}
    with CacheWriter(paths["fp16"]) as half, CacheWriter(paths["int8"]) as codes:
        for start in range(0, count, BLOCK):
            rows = min(BLOCK, count - start)
            maps = {name: torch.randn(rows, *shape, generator=random).half() for name, shape in shapes.items()}
            half.write(start, {name: m.numpy() for name, m in maps.items()})
            codes.write(start, {name: m.numpy() for name, m in coded(maps).items()})
    return {dtype: open_cache(path) for dtype, path in paths.items()}


def check_equal(loaders: dict[str, FeatureLoader], rows: int, batch_size: int) -> None:
    """Raise RuntimeError where the loader of int8 brings other values than fp16's that go through int8."""
    orders = list(islice(random_batches(rows, batch_size, "check"), CHECKED))
    both = zip(*(loaders[dtype].batches(orders) for dtype in ("fp16", "int8")), strict=True)
    for (_, half), (_, codes) in both:
        for name, m in as_read(half.maps, "int8").items():
            if not torch.equal(m, codes.maps[name]):
                raise RuntimeError(f"int8 brings other values than its codes stand for: {name}")


def reading(folder: Path, options: argparse.Namespace) -> tuple[Timings, Timings, int]:
    """Seconds of the loader's batches and of first epochs, by dtype, and bytes that came from the disk meanwhile."""
    caches = write_both(folder, options.rows)
    warm_up([cache.path for cache in caches.values()])
    loaders = {dtype: FeatureLoader(cache, mode="memmap") for dtype, cache in caches.items()}
    with loaders["fp16"], loaders["int8"]:
        check_equal(loaders, options.rows, options.batch_size)
        for loader in loaders.values():  # each row is hashed once, before the clock starts
            list(loader.batches(np.array_split(np.arange(options.rows), max(1, options.rows // options.batch_size))))
        arms: dict[str, Callable[[], float]] = {
            dtype: loader_arm(loader, random_batches(options.rows, options.batch_size, dtype), options.batches)
            for dtype, loader in loaders.items()
        }
        before = disk_bytes()
        batches = interleave(arms, options.rounds)
        epochs = {dtype: epoch_arm(cache, options.batch_size, verify=False) for dtype, cache in caches.items()}
        return batches, interleave(epochs, options.epochs), disk_bytes() - before


def scores(folder: Path, data: str, options: argparse.Namespace) -> dict[str, object]:
    """Bytes, errors and differences of one data set; linear and ridge heads, int8 - fp16, points by seed."""
    size, height = options.size, options.size
    found: dict[str, dict[str, list[float]]] = {}
    scored: dict[str, dict[str, Statistic]] = {}
    sizes, errors = {}, {}
    for dtype in ("fp16", "int8"):
        workspace = Workspace(folder / Path(data).name / dtype)
        workspace.root.mkdir(parents=True)
        extract(workspace, SPEC, data, ExtractOptions(size=(height, size), dtype=dtype, quiet=True))  # type: ignore[arg-type]
        (path,) = workspace.cache_files()
        sizes[dtype] = open_cache(path).recipe.row_bytes
        if dtype == "fp16":
            (found_errors,) = audit(workspace, [path], AuditOptions(heads=(), quiet=True))
            errors = {level: own["int8"] for level, own in found_errors.errors.items()}
        found[dtype], scored[dtype] = {}, {}
        for head in ("linear", "ridge"):
            recipe = KINDS["semseg", head].recipe
            if head == "linear":
                recipe = replace(recipe, iterations=options.iterations, loss_at="level")
            how = ProbeOptions(
                head=head, recipe=recipe, budget="fixed", shared_order=True, quiet=True,
                seeds=options.seeds if head == "linear" else 1,
            )  # fmt: skip
            rows = probe(workspace, "semseg", options=how).rows
            found[dtype][head] = [100 * row["test"]["miou_foreground"] for row in rows]
            scored[dtype][head] = mean_of([statistic(workspace.probes / row["folder"]) for row in rows])
    gaps = {head: np.subtract(found["int8"][head], found["fp16"][head]).round(3).tolist() for head in found["fp16"]}
    over_groups = {head: paired_difference(scored["int8"][head], scored["fp16"][head]) for head in found["fp16"]}
    return {
        "bytes": sizes["int8"] / sizes["fp16"], "errors": errors, "fp16": found["fp16"], "gaps": gaps,
        "over_groups": over_groups,
    }  # fmt: skip


def statistic(folder: Path) -> Statistic:
    """Foreground mIoU on test of a head that was kept, as a function of how often each group counts."""
    with np.load(folder / "scores.npz", allow_pickle=False) as file:
        return pixel_statistic(file["confusion"], file["groups"].tolist())


def over_seeds(gaps: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean over seeds, points. gaps: two or more."""
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return float(np.mean(gaps) - half), float(np.mean(gaps) + half)


def interval_text(low: float, high: float) -> str:
    """An interval for a table; "-" where there is none."""
    return "-" if np.isnan(low) else f"{low:+.3f} to {high:+.3f}"


def table_of(results: dict[str, dict]) -> list[dict[str, str]]:
    """A line for each data set and head."""
    return [
        {
            "data": name,
            "bytes of fp16": f"{own['bytes']:.4f}",
            "worst level's error": f"{max(own['errors'].values()):.3%}",
            "head": head,
            "fp16, points": f"{np.mean(own['fp16'][head]):.2f}",
            "seeds": f"{len(gaps)}",
            "int8 - fp16": f"{np.mean(gaps):+.3f}",
            "over seeds": interval_text(*over_seeds(gaps)) if len(gaps) > 1 else "-",
            "over groups": interval_text(100 * own["over_groups"][head].low, 100 * own["over_groups"][head].high),
        }
        for name, own in results.items()
        for head, gaps in own["gaps"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=200, help="of the caches that are read; 9 MB each")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--batches", type=positive, default=8, help="that an arm reads in a round")
    parser.add_argument("--rounds", type=positive, default=21)
    parser.add_argument("--epochs", type=positive, default=5, help="of each dtype that are timed")
    parser.add_argument("--data", default=",".join(SETS), help="sets whose scores are compared, or none")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="where the real sets lie")
    parser.add_argument("--size", type=positive, default=256, help="of the frame, pixels")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="of the linear head")
    parser.add_argument("--iterations", type=positive, default=300, help="of the linear head")
    parser.add_argument("--folder", type=Path, help="where to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    wanted = [name for name in options.data.split(",") if name and name != "none"]
    paths = {name: name if name in BUILT_IN else str(options.shared / name) for name in wanted}
    absent = [name for name, path in paths.items() if name not in BUILT_IN and not Path(path).is_dir()]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        batches, epochs, from_disk = reading(Path(folder), options)
        results = {name: scores(Path(folder), path, options) for name, path in paths.items() if name not in absent}
    if results:
        print_table(table_of(results))  # type: ignore[arg-type]
    for name in absent:
        print(f"left out: {name} is not in {options.shared}")
    ratio, epoch = batches.quartiles("fp16", "int8"), epochs.quartiles("fp16", "int8")
    rows = [
        {
            "what": what,
            "fp16, ms": f"{1000 * timings.median('fp16') / per:.1f}",
            "int8, ms": f"{1000 * timings.median('int8') / per:.1f}",
            "int8 of fp16's rate": quartile_text(quartiles),
        }
        for what, timings, per, quartiles in (
            ("a batch", batches, options.batches, ratio),
            (f"an epoch, {CLASSES} classes", epochs, 1, epoch),
        )
    ]
    worst = {
        "bytes": max((own["bytes"] for own in results.values()), default=0.0),
        "error": max((max(own["errors"].values()) for own in results.values()), default=0.0),  # type: ignore[attr-defined]
        "gap": max(
            (abs(float(np.mean(gaps))) for own in results.values() for gaps in own["gaps"].values()),  # type: ignore[attr-defined]
            default=0.0,
        ),
    }
    held = {  # without any set nothing but reading was measured
        "read": ratio[1] >= READ_TARGET,
        "bytes": bool(results) and worst["bytes"] <= BYTES_TARGET,  # type: ignore[operator]
        "error": bool(results) and worst["error"] <= ERROR_TARGET,
        "score": bool(results) and worst["gap"] <= SCORE_TARGET,
    }
    report(
        "int8", ratio[1], READ_TARGET, rows,
        holds=all(held.values()), held=held, epoch=epoch[1],
        bytes=worst["bytes"], bytes_target=BYTES_TARGET, error=worst["error"], error_target=ERROR_TARGET,
        gap_points=worst["gap"], gap_target=SCORE_TARGET,
        gaps={name: own["gaps"] for name, own in results.items()}, sets=list(results), left_out=absent,
        levels=[level.name for level in LEVELS], rounds=options.rounds, bytes_from_disk=from_disk,
    )  # fmt: skip


if __name__ == "__main__":
    main()
