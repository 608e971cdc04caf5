"""How the pixels' scores of anomaly maps are spread, image by image, without the maps: histograms with equal bins.

Scores are float32. The order of such numbers is that of a code of 32 bits, of which only the first are kept once there
are too many different ones: all images then lose the same bits, so equal scores stay equal, and the order stays. When
all images are counted, neighbouring codes are put together to bins, each with as much of all good pixels, defect pixels
and regions; a code that has more than that has a bin of its own. There are so many bins, FEWEST or a multiple of it,
that the areas of all images together are within CLOSE of those by single codes. With at most FEWEST different scores
each has a bin, and all areas are exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import NDArray

from featprobe.errors import DataError, ShapeError
from featprobe.metrics.intervals import Floats
from featprobe.metrics.ranked import area_to

LIMIT = 0.3  # share of good pixels called, up to which AUPRO goes
FEWEST, MOST = 500, 16_000  # bins
CLOSE = 5e-5  # of an area
MOST_KEPT = 2**22  # codes of all images together, 20 bytes each
WIDEST = 18  # bits of codes within one image of more pixels than FEW: counted in one table of at most that size
FEW = 2**14  # pixels
TOUCHING = np.ones((3, 3))  # pixels that touch at a corner are one region, as in targets.components

Codes = NDArray[np.uint32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class UnitPixels:
    """The pixels of one image by the first bits of the codes of their scores.

    codes: ascending, without the last `dropped` bits. normal, defect: pixels of each. overlap: the sum over regions of
    the share of the region's pixels; all (codes,). regions: their number.
    """

    codes: Codes
    normal: NDArray[np.uint32]
    defect: NDArray[np.uint32]
    overlap: Floats
    regions: int
    dropped: int = 0

    def coarser(self, dropped: int) -> "UnitPixels":
        """The same with more bits dropped."""
        if dropped <= self.dropped or not len(self.codes):
            return self if dropped <= self.dropped else replace(self, dropped=dropped)
        codes = self.codes >> np.uint32(dropped - self.dropped)
        first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        normal, defect, overlap = (np.add.reduceat(own, first) for own in (self.normal, self.defect, self.overlap))
        return UnitPixels(codes[first], normal, defect, overlap, self.regions, dropped)

    @property
    def columns(self) -> tuple[Codes, NDArray[np.uint32], NDArray[np.uint32], Floats]:
        """Codes and what is counted of each."""
        return self.codes, self.normal, self.defect, self.overlap


@dataclass(frozen=True)
class PixelHistograms:
    """The pixels of images by score: bins ascend, and are the same for all images.

    normal, defect: (images, bins), pixels that are good, and of defects. overlap: (images, bins), the sum over an
    image's regions of the share of the region's pixels in each bin. regions: (images,). edges: (bins,), the lowest
    score of each bin. Raises ShapeError when they disagree.
    """

    normal: NDArray[np.uint32]
    defect: NDArray[np.uint32]
    overlap: Floats
    regions: NDArray[np.int32]
    edges: Floats

    def __post_init__(self) -> None:
        shape = self.normal.shape
        if {self.defect.shape, self.overlap.shape, (len(self.regions), len(self.edges))} != {shape}:
            raise ShapeError(f"Histograms of {shape} images and bins do not fit together.")
        if (np.diff(self.edges) <= 0).any() or not np.isfinite(self.overlap).all():
            raise ShapeError("Bins do not ascend, or shares of regions are not finite.")
        if (np.abs(self.overlap.sum(1) - self.regions) > 1e-6 * (1 + self.regions)).any():
            raise ShapeError("Shares of regions do not add up to their number.")

    @classmethod
    def joined(cls, parts: Sequence["PixelHistograms"]) -> "PixelHistograms":
        """The images of several heads, whose bins differ, as one test set.

        The pixels of a bin are taken to have its lowest score: nothing is known of their order within it.
        """
        edges = np.unique(np.concatenate([part.edges for part in parts]))
        rows = [0, *np.cumsum([len(part.regions) for part in parts]).tolist()]
        place = [np.searchsorted(edges, part.edges) for part in parts]
        names = ("normal", "defect", "overlap")
        tables = {name: np.zeros((rows[-1], len(edges)), getattr(parts[0], name).dtype) for name in names}
        for part, first, end, own in zip(parts, rows, rows[1:], place, strict=False):
            for name, table in tables.items():
                table[first:end, own] = getattr(part, name)
        bins = _bins(np.stack([table.sum(0, dtype=float) for table in tables.values()]))
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        normal, defect, overlap = (np.add.reduceat(tables[name], starts, axis=1) for name in names)
        return cls(normal, defect, overlap, np.concatenate([part.regions for part in parts]), edges[starts])


class PixelCounter:
    """Counts the pixels of one image after another; `histograms` makes bins of what it, or several of it, hold.

    units: number of the image -> its pixels. Each of several processes counts its own; all are gathered then.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.units: dict[int, UnitPixels] = {}
        self._most, self._kept, self._dropped = most, 0, 0

    def add(self, unit: int, scores: NDArray[np.float32], defect: Mask, ignored: Mask | None = None) -> None:
        """Count an image. scores: (height, width). defect: its regions. ignored: what is not counted; same shapes.

        Raises DataError for scores that are not finite, ShapeError for shapes that differ.
        """
        found = counted_pixels(scores, defect, ignored, self._dropped)
        self.units[unit] = found
        self._dropped, self._kept = found.dropped, self._kept + len(found.codes)
        while self._kept > self._most and self._dropped < 32:
            self._dropped += 1
            self.units = {number: own.coarser(self._dropped) for number, own in self.units.items()}
            self._kept = sum(len(own.codes) for own in self.units.values())


def counted_pixels(
    scores: NDArray[np.float32], defect: Mask, ignored: Mask | None = None, dropped: int = 0
) -> UnitPixels:
    """The pixels of one image. dropped: bits that are dropped at least. See `PixelCounter.add`."""
    if scores.shape != defect.shape or (ignored is not None and ignored.shape != scores.shape):
        raise ShapeError(f"Scores of {scores.shape} pixels do not fit a truth of {defect.shape}.")
    if not np.isfinite(scores).all():
        raise DataError("An anomaly map holds scores that are not finite.")
    seen = np.ones(scores.shape, bool) if ignored is None else ~ignored
    numbered, regions = scipy.ndimage.label(defect & seen, structure=TOUCHING)
    region, codes = numbered[seen], _codes(scores[seen])
    if len(codes) > FEW:
        span = int(codes.max() >> np.uint32(dropped)) - int(codes.min() >> np.uint32(dropped))
        dropped += max(0, span.bit_length() - WIDEST)
    codes >>= np.uint32(dropped)
    if len(codes) > FEW:
        low = codes.min()
        own, place = None, (codes - low).astype(np.intp)
    else:
        own, place = np.unique(codes, return_inverse=True)
    size = 1 / np.maximum(np.bincount(region, minlength=regions + 1), 1)
    inside = region > 0
    length = int(place.max(initial=-1)) + 1
    every = np.bincount(place, minlength=length)
    found = np.bincount(place[inside], minlength=length)
    overlap = np.bincount(place[inside], size[region[inside]], minlength=length)
    if own is None:
        filled = np.flatnonzero(every)
        own, every, found, overlap = filled.astype(np.uint32) + low, every[filled], found[filled], overlap[filled]
    return UnitPixels(
        own, (every - found).astype(np.uint32), found.astype(np.uint32), overlap.astype(float), regions, dropped
    )


def histograms(units: Sequence[int], found: Iterable[tuple[int, UnitPixels]]) -> PixelHistograms:
    """The pixels of these images, in this order, in bins of one kind. found: number of an image and its pixels.

    An image that was not counted has no pixels. Raises ShapeError for an image that is not among the units.
    """
    place = {unit: i for i, unit in enumerate(units)}
    every = list(found)
    if any(unit not in place for unit, _ in every):
        raise ShapeError("Pixels of images were counted that are not asked for.")
    dropped = max((own.dropped for _, own in every), default=0)
    alike = [(place[unit], own.coarser(dropped)) for unit, own in every]
    image = np.repeat([number for number, _ in alike], [len(own.codes) for _, own in alike]).astype(np.intp)
    codes = np.concatenate([np.empty(0, np.uint32), *(own.codes for _, own in alike)])
    counts = [np.concatenate([np.empty(0), *(own.columns[i] for _, own in alike)]) for i in (1, 2, 3)]
    distinct, atom = np.unique(codes, return_inverse=True)
    bins = _bins(np.stack([np.bincount(atom, own, minlength=len(distinct)) for own in counts]))
    width = int(bins.max(initial=-1)) + 1
    cell = image * width + (bins[atom] if len(atom) else atom)
    normal, defect, overlap = (
        np.bincount(cell, own, minlength=len(units) * width).reshape(len(units), width) for own in counts
    )
    regions = np.zeros(len(units), dtype=np.int32)
    for number, own in alike:
        regions[number] = own.regions
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    edges = _scores(distinct[starts].astype(np.uint32) << np.uint32(dropped))
    return PixelHistograms(normal.astype(np.uint32), defect.astype(np.uint32), overlap.astype(float), regions, edges)


def _bins(counts: Floats) -> NDArray[np.intp]:
    """The bin of each of some ascending scores: (scores,), from 0, without a gap.

    counts: (3, scores), good pixels, defect pixels, shares of regions.
    """
    shares = [own / own.sum() for own in counts if own.sum() > 0]
    if counts.shape[1] <= FEWEST or not shares:
        return np.arange(counts.shape[1])
    share, wanted, number = np.mean(shares, axis=0), _areas(counts), FEWEST
    while True:
        bins = _of_share(share, number)
        found = _areas(np.add.reduceat(counts, np.flatnonzero(np.diff(bins, prepend=-1)), axis=1))
        if number >= MOST or np.abs(found - wanted).max() <= CLOSE:
            return bins
        number *= 2


def _of_share(share: Floats, number: int) -> NDArray[np.intp]:
    """Neighbours put together to about so many bins of equal share, those with more than that alone."""
    place = np.floor((share.cumsum() - share) * number)
    alone = share > 1 / number
    new = (np.diff(place, prepend=-1) > 0) | alone | np.concatenate([[False], alone[:-1]])
    return new.cumsum() - 1


def _areas(counts: Floats) -> Floats:
    """AUROC and AUPRO from good pixels, defect pixels and shares of regions by ascending score: (3, scores)."""
    normal, defect, overlap = counts[:, ::-1, None]
    if not normal.sum() or not defect.sum():
        return np.zeros(2)
    return np.concatenate([area_to(1.0)(defect, normal)[0], area_to(LIMIT)(overlap, normal)[0]])


def _codes(scores: NDArray[np.float32]) -> Codes:
    """32 bits in the order of the scores: the bits of a float32, turned round where it is negative."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: -0 is 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _scores(codes: Codes) -> Floats:
    """The scores of codes."""
    bits = np.where(codes >> 31, codes ^ np.uint32(1 << 31), ~codes).astype(np.uint32)
    return bits.view(np.float32).astype(float)
