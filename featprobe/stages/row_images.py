"""Rows of a cache and the images that they show."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TypeVar

import numpy as np

from featprobe.cache import UNREADABLE, Cache
from featprobe.specs import Rows

T = TypeVar("T")


def images_of(cache: Cache, rows: Rows) -> Rows:
    """The images that rows show, each once, in order."""
    return np.array(list(dict.fromkeys(cache.image_of[rows].tolist())), dtype=np.intp)


def unreadable_images(cache: Cache) -> int:
    """How many images of a cache take no part, as they or their labels can't be used."""
    return len(set(cache.image_of[cache.done == UNREADABLE].tolist()))


def rows_showing(cache: Cache, rows: Rows, images: Rows) -> Rows:
    """The rows that show some of the images, in the order of these."""
    order = {image: place for place, image in enumerate(images.tolist())}
    places = np.array([order.get(image, -1) for image in cache.image_of[rows].tolist()], dtype=np.intp)
    shown = np.flatnonzero(places >= 0)
    return rows[shown[np.argsort(places[shown], kind="stable")]]


def by_image(cache: Cache, found: Iterable[tuple[int, T]]) -> Iterator[tuple[int, Iterator[tuple[int, T]]]]:
    """(image, its (row, what was found there)), from the same of rows in order; one row is held at a time."""
    return groupby(found, lambda pair: int(cache.image_of[pair[0]]))
