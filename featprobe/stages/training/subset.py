"""Parts of a training split for label efficiency: nested, by group, with every class in the smallest."""

from collections.abc import Collection, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray


def training_subset(
    ids: Sequence[str], groups: Sequence[str], classes: Sequence[Collection[int]], fraction: float, seed: int | None
) -> NDArray[np.intp]:
    """Indices of the images that stand for a fraction of a training split, ascending.

    First, for each class from the rarest on, an image that holds it; then group after group, in the order of a hash of
    their names and a seed, as if fewer parts had been annotated. So of two fractions of one seed the smaller is
    contained in the larger, and no subset lacks a class, even where that takes more images than the fraction says.
    Other seeds draw other images: the spread over seeds holds the choice of images.

    classes: of each image. seed: None for the one subset that seeds of a shared order have in common.

    >>> training_subset(["a", "b", "c", "d"], ["p", "p", "q", "q"], [{0}, {0, 1}, {0}, {0}], 0.5, 0).tolist()
    [1, 2]
    """
    salt = "" if seed is None else f"{seed}/"
    order = sorted(range(len(ids)), key=lambda i: (_hash(salt + groups[i]), groups[i], _hash(salt + ids[i]), ids[i]))
    every = sorted(set().union(*classes), key=lambda c: (sum(c in own for own in classes), c))
    cover: list[int] = []
    for wanted in every:
        if not any(wanted in classes[i] for i in cover):
            cover.append(next(i for i in order if wanted in classes[i]))
    count = max(len(cover), round(fraction * len(ids)), 1)
    ranked = cover + [i for i in order if i not in set(cover)]
    return np.array(sorted(ranked[:count]), dtype=np.intp)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
