"""Records that are drawn at random, with ties, defects that no call finds, and images without anything."""

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    NOTHING,
    TOUCHES,
    UNKNOWN,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
    found_scores,
)

LEVELS = np.linspace(0.1, 1, 10, dtype=np.float32)  # few scores, so that many tie


def drawn_records(
    seed: int,
    images: int = 12,
    groups: int = 5,
    most_defects: int = 3,
    most_calls: int = 5,
    *,
    pooled: bool = False,
    split: str = "val",
    levels: NDArray[np.float32] = LEVELS,
) -> Records:
    """Images of groups, each with up to so many defects and calls; each call finds any of its image's defects."""
    rng = np.random.default_rng(seed)
    of_defect = np.repeat(np.arange(images), rng.integers(0, most_defects + 1, images) * (rng.random(images) < 0.6))
    of_call = np.repeat(np.arange(images), rng.integers(0, most_calls + 1, images))
    if pooled:
        of_call = of_call[:0]
    same = of_call[:, None] == of_defect[None]
    finds = np.argwhere(same & (rng.random(same.shape) < 0.4))
    touched = rng.integers(0, 3, len(of_call)).astype(np.uint8)
    touched[finds[:, 0]] = TOUCHES
    score = rng.choice(levels, len(of_call)).astype(np.float32)
    good = np.where(rng.random(images) < 0.2, UNKNOWN, GOOD).astype(np.uint8)
    good[of_defect] = DEFECT
    whole = rng.choice(levels, images).astype(np.float32)
    ids = tuple(f"image{i:03}" for i in range(images))
    about = About("semseg", "linear", "0" * 64, ("background", "crack"), FoundRule(), 0.1, "validation", True, pooled)
    return Records(
        about,
        Images(
            ids,
            tuple(f"part{i}" for i in rng.integers(0, groups, images)),
            (split,) * images,
            tuple(f"{name}.png" for name in ids),
            ("0" * 64,) * images,
            good,
            whole if pooled else np.full(images, np.nan, dtype=np.float32),
            np.full((images, 2), np.nan, dtype=np.float32),
            np.full((images, 2), 64),
        ),
        Defects(
            **_objects(rng, of_defect),
            score=np.repeat(np.float32(-np.inf), len(of_defect))
            if pooled
            else found_scores(finds, score, len(of_defect)),
            contrast=np.full(len(of_defect), np.nan, dtype=np.float32),
            cut=np.zeros(len(of_defect), dtype=bool),
        ),
        Calls(**_objects(rng, of_call), score=score, touched=touched),
        finds,
    )


def _objects(rng: np.random.Generator, image: NDArray[np.intp]) -> dict[str, NDArray[np.generic]]:
    area = rng.integers(1, 200, len(image)).astype(np.float32)
    pixels = np.stack([np.sqrt(area), area, 2 * np.sqrt(area), np.sqrt(area) / 2], axis=1)
    boxes = np.tile(np.array([0, 0, 8, 8], dtype=np.float32), (len(image), 1))
    category = np.ones(len(image), dtype=np.uint8)
    return {
        "image": image,
        "category": category,
        "boxes": boxes,
        "pixels": pixels,
        "millimetres": np.full_like(pixels, np.nan),
    }


def plain_counts(records: Records, threshold: float) -> tuple[int, int, int]:
    """Found defects, false calls and calls at a threshold, one object at a time, of records with calls."""
    calls = [k for k in range(len(records.calls)) if records.calls.score[k] >= threshold]
    found = sum(any(c == k and d == j for c, d in records.finds for k in calls) for j in range(len(records.defects)))
    return found, sum(records.calls.touched[k] == NOTHING for k in calls), len(calls)
