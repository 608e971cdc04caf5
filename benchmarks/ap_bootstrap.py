"""A bootstrap of average precision: 1000 resamples of 1000 images, against the minute that it may take.

    python benchmarks/ap_bootstrap.py

Six classes, 100 predictions an image, up to ten objects, some of them crowds; scores have three decimals, so that many
tie, in one image too. One arm matches predictions to truth, the other takes AP, AP50 and AP75, in the mean and of each
class, of all resamples. Before the clock starts, resamples must have the scores that stock pycocotools gives for the
data set in which each image really stands as often as it was drawn.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from _bench import interleave, positive, report, timed
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featprobe.metrics import ResampledAp

ALLOWED = 60.0  # seconds for matching and all resamples
TARGET = 1.0
TOLERANCE = 1e-6  # absolute, of each score
COMPARED, SMALL = 20, 50  # resamples held against pycocotools: all but the last of the first so many images
SIDE = 512  # pixels of an image
LEAST, MOST = 12, 96  # pixels, sides of the objects
CROWDS = 0.05  # share of the objects

Record = dict[str, Any]


def random_boxes(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """(count, 4): x, y, width, height in pixels."""
    sides = rng.uniform(LEAST, MOST, (count, 2))
    return np.concatenate([rng.uniform(0, SIDE - sides), sides], axis=1)


def objects_of(rng: np.random.Generator, image: int, classes: int) -> list[Record]:
    """Up to ten objects of an image; the n-th class is 1/n as frequent as the first."""
    share = 1 / np.arange(1, classes + 1)
    boxes = random_boxes(rng, int(rng.integers(0, 11)))
    return [
        {"image_id": image, "category_id": int(category), "bbox": box.tolist(), "area": float(box[2] * box[3])}
        | {"iscrowd": int(rng.random() < CROWDS)}
        for box, category in zip(boxes, rng.choice(classes, len(boxes), p=share / share.sum()) + 1, strict=True)
    ]


def predictions_of(
    rng: np.random.Generator, objects: Sequence[Record], image: int, sizes: argparse.Namespace
) -> list[Record]:
    """Each object found once or twice, more or less well, and false alarms of lower scores for the rest."""
    every = [(o["category_id"], o["bbox"] + rng.normal(0, 4, 4), rng.beta(3, 2)) for o in objects for _ in range(2)]
    every = [one for one in every if rng.random() < 0.8]
    alarms = random_boxes(rng, sizes.detections - len(every))
    every += [(int(rng.integers(1, sizes.classes + 1)), box, rng.beta(1.5, 3)) for box in alarms]
    return [
        {"image_id": image, "category_id": category, "bbox": np.maximum(box, 1).tolist(), "score": round(score, 3)}
        for category, box, score in every
    ]


def make_case(sizes: argparse.Namespace) -> tuple[Record, list[Record]]:
    """Truth and predictions of all images."""
    rng = np.random.default_rng(0)
    objects = [objects_of(rng, image, sizes.classes) for image in range(sizes.images)]
    truth = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(sizes.images)],
        "annotations": [o | {"id": i} for i, o in enumerate((o for own in objects for o in own), start=1)],
        "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(sizes.classes)],
    }
    return truth, [p for image, own in enumerate(objects) for p in predictions_of(rng, own, image, sizes)]


def first_images(truth: Record, found: Sequence[Record], count: int) -> tuple[Record, list[Record]]:
    """The part of a data set that its first images make."""
    part = truth | {
        "images": truth["images"][:count],
        "annotations": [a for a in truth["annotations"] if a["image_id"] < count],
    }
    return part, [p for p in found if p["image_id"] < count]


def repeated(truth: Record, found: Sequence[Record], weights: NDArray[np.int64]) -> tuple[Record, list[Record]]:
    """The data set in which each image stands as often as its weight says, its copies side by side."""
    start = np.cumsum(weights) - weights  # the number of the first copy of each image

    def copies(records: Sequence[Record]) -> list[Record]:
        return [
            record | {"image_id": int(start[record["image_id"]]) + copy}
            for record in records
            for copy in range(weights[record["image_id"]])
        ]

    images = [truth["images"][i] | {"id": number} for number, i in enumerate(np.arange(len(weights)).repeat(weights))]
    annotations = [a | {"id": i} for i, a in enumerate(copies(truth["annotations"]), start=1)]
    return truth | {"images": images, "annotations": annotations}, copies(found)


def stock(truth: Record, found: list[Record]) -> list[float]:
    """AP, AP50 and AP75 by pycocotools as its own demo runs it."""
    with redirect_stdout(StringIO()):
        true = COCO()
        true.dataset = truth
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3].tolist()


def draw(rng: np.random.Generator, images: int, resamples: int) -> NDArray[np.int64]:
    """How often each image is drawn: (resamples, images)."""
    return rng.multinomial(images, np.full(images, 1 / images), resamples)


def largest_difference(truth: Record, found: Sequence[Record], weights: NDArray[np.int64]) -> float:
    """The largest distance of a score of these resamples from pycocotools' on the repeated images.

    Raises RuntimeError when it passes what is tolerated.
    """
    scores = ResampledAp(truth, found, "bbox").scores(weights)
    ours = np.stack([scores.ap, scores.ap50, scores.ap75], axis=1)  # (resamples, scores)
    worst = float(np.abs(ours - [stock(*repeated(truth, found, own)) for own in weights]).max())
    if not worst < TOLERANCE:
        raise RuntimeError(f"Resamples of {len(truth['images'])} images are {worst:.1e} away from pycocotools.")
    return worst


def compare(truth: Record, found: Sequence[Record]) -> tuple[float, float]:
    """The largest difference over all resamples that are compared, and the seconds that pycocotools takes for one.

    The last is one of all images, and it is what is timed: matching and accumulating, the images repeated before.
    """
    rng = np.random.default_rng(1)
    part = first_images(truth, found, SMALL)
    small = largest_difference(*part, draw(rng, len(part[0]["images"]), COMPARED - 1))
    weights = draw(rng, len(truth["images"]), 1)
    large = largest_difference(truth, found, weights)
    again = repeated(truth, found, weights[0])
    begun = time.perf_counter()
    stock(*again)
    return max(small, large), time.perf_counter() - begun


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=1000)
    parser.add_argument("--classes", type=positive, default=6)
    parser.add_argument(
        "--detections", type=positive, default=100, help="of an image, of all classes together, from 20"
    )
    parser.add_argument("--resamples", type=positive, default=1000)
    parser.add_argument("--rounds", type=positive, default=5)
    return parser.parse_args()


def rows_of(seconds: Mapping[str, float]) -> list[dict[str, str]]:
    """The table: one line for each thing that was timed."""
    return [{"what": name, "seconds": f"{value:.2f}"} for name, value in seconds.items()]


def main() -> None:
    sizes = parse_arguments()
    truth, found = make_case(sizes)
    worst, one = compare(truth, found)
    matched = ResampledAp(truth, found, "bbox")
    weights = draw(np.random.default_rng(2), sizes.images, sizes.resamples)
    arms = {
        "matching": timed(lambda: ResampledAp(truth, found, "bbox")),
        "resamples": timed(lambda: matched.scores(weights)),
    }
    timings = interleave(arms, sizes.rounds)
    whole = float(np.median(np.add(timings.seconds["matching"], timings.seconds["resamples"])))
    seconds = {
        "matching": timings.median("matching"),
        f"{sizes.resamples} resamples": timings.median("resamples"),
        "both": whole,
        "pycocotools, one resample": one,
    }
    report(
        "ap_bootstrap", ALLOWED / whole, TARGET, rows_of(seconds), seconds=whole,
        matching_seconds=timings.median("matching"), resamples_seconds=timings.median("resamples"),
        pycocotools_seconds=one, largest_difference=worst, compared=COMPARED, detections=len(found),
        images=sizes.images, classes=sizes.classes, resamples=sizes.resamples,
    )  # fmt: skip


if __name__ == "__main__":
    main()
