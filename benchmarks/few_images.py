"""Few training images with the defaults, against short trainings whose last weights are kept.

    python benchmarks/few_images.py

The defaults look for the number of iterations on validation and keep the weights of the best validation point. On a few
images that has to be about as good as the better of two numbers that were chosen with the test scores in sight, 60 and
200 iterations, on the same training images: no more than a point of mean test score below it. Backbone `embedded`, the
built-in set `surface` at 128x128, the linear head.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from _bench import positive, report

from featprobe.kinds import KINDS
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

SHORT = (60, 200)  # iterations
TARGET = -1.0  # points of the mean test score


def scores_of(workspace: Workspace, options: ProbeOptions) -> tuple[float, int]:
    """Mean foreground mIoU on test over the seeds, percent, and the iterations that they were trained."""
    rows = probe(workspace, options=options, say=print).rows
    (iterations,) = {row["recipe"]["iterations"] for row in rows}
    return 100 * float(np.mean([row["test"]["miou_foreground"] for row in rows])), iterations


def main() -> None:
    """Train, print a row per fraction, and the worst difference last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--workspace", type=Path, help="to keep what is made; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(options.workspace or folder)
        features = ExtractOptions(size=(128, 128), quiet=True)
        extract(workspace, workspace.backbone("embedded"), "surface", features)
        table, worst = [], np.inf
        for fraction in options.fractions:
            usual = ProbeOptions(seeds=options.seeds, fractions=(fraction,), quiet=True)
            found, iterations = scores_of(workspace, usual)
            recipe = replace(KINDS["semseg", "linear"].recipe, weights_from="end")
            short = {
                n: scores_of(workspace, replace(usual, recipe=replace(recipe, iterations=n), budget="fixed"))[0]
                for n in SHORT
            }
            difference = found - max(short.values())
            worst = min(worst, difference)
            table.append(
                {
                    "fraction": f"{fraction:g}",
                    "defaults": f"{found:.1f}",
                    "iterations found": str(iterations),
                    **{f"{n} iterations, end": f"{score:.1f}" for n, score in short.items()},
                    "difference": f"{difference:+.1f}",
                }
            )
    report("few_images: defaults less the better of short trainings, points", worst, TARGET, table, seeds=options.seeds)


if __name__ == "__main__":
    main()
