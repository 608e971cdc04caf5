"""Copies among images: the same bytes (exact), and the same picture saved again, resized, brighter or darker (near).

Near copies are found in two steps: a perceptual hash proposes pairs, fine detail confirms them. The hash alone
confuses pictures of one scene with copies: among BSData's 145 crops it proposes 1411 pairs; detail confirms 6 of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import uniform_filter

from featprobe.datasets.images.reading import Levels
from featprobe.datasets.samples import DataSet, Sample, listed
from featprobe.errors import counted
from featprobe.image_labels import LabelNames

HASH_SIDE, DETAIL_SIDE = 32, 64  # pixels of the thumbnails
BITS = 64
NEAR = 6  # most bits in which the hashes of near copies differ
DETAIL_AGREES = 0.95  # least correlation of the details, after the set's mean is subtracted
ENOUGH = 20  # least images for which the mean detail shows the scene of a set and not single pictures
HUGE = 1e30
CHUNK = 1024  # images of a block: blocks of this size are compared with each other


@dataclass(frozen=True)
class Look:
    """How an image looks. hash: (64,) bits as -1 and 1, int8; detail: (4096,) of mean 0 and norm 1, float16."""

    hash: NDArray[np.int8]
    detail: NDArray[np.float16]


def look_of(levels: Levels) -> Look:
    """The look of an image's raw levels, (height, width) or (height, width, 3).

    Colours are summed; empty pixels get the mean of the others. The hash is pHash: for the 8x8 lowest frequencies of a
    32x32 thumbnail, whether each is above their median. The detail is a 64x64 thumbnail minus its mean over 5x5 pixels;
    zeros for a picture of one grey.
    """
    planes = [levels] if levels.ndim == 2 else [levels[..., channel] for channel in range(3)]
    grey = planes[0].astype(np.float32)
    for plane in planes[1:]:  # several times faster than a mean over the last axis
        grey += plane
    if isinstance(grey, np.ma.MaskedArray):
        grey = grey.filled(0.0 if grey.mask.all() else grey.mean(dtype=np.float64))
    peak = float(max(grey.max(), -grey.min()))
    if peak > HUGE:  # float32 could not sum such values
        grey /= np.float32(peak)
    image = Image.fromarray(grey)
    low = dctn(_thumbnail(image, HASH_SIDE), norm="ortho")[:8, :8].ravel()
    fine = _thumbnail(image, DETAIL_SIDE)
    fine = (fine - uniform_filter(fine, 5)).ravel()
    bits = np.where(low > np.median(low[1:]), 1, -1)
    return Look(bits.astype(np.int8), _normed(fine - fine.mean()).astype(np.float16))


def exact_copies(samples: Sequence[Sample], hashes: Sequence[str]) -> list[list[Sample]]:
    """Lists of two or more samples with the same bytes. hashes: of each sample's file; "" for an unreadable file."""
    same: dict[str, list[Sample]] = defaultdict(list)
    for sample, image_hash in zip(samples, hashes, strict=True):
        if image_hash:
            same[image_hash].append(sample)
    return [copies for copies in same.values() if len(copies) > 1]


def in_several_splits(samples: Sequence[Sample]) -> bool:
    """Whether samples are in more than one split."""
    return len({sample.split for sample in samples}) > 1


def two_labels(
    samples: Sequence[Sample], hashes: Sequence[str], held: Sequence[tuple[int, ...] | None], names: LabelNames | None
) -> list[list[tuple[str, str]]]:
    """(id, label) of the samples that are the same bytes and have different labels where an image has one.

    hashes: of each sample's file, "" for an unreadable file. held: the labels of each.
    """
    if names is None or names.multi:
        return []
    label_of = {s.id: names.names[own[0]] for s, own in zip(samples, held, strict=True) if own}
    each = [[(s.id, label_of[s.id]) for s in same if s.id in label_of] for same in exact_copies(samples, hashes)]
    return [own for own in each if len({label for _, label in own}) > 1]


def two_labels_text(data: DataSet, found: Sequence[Sequence[tuple[str, str]]]) -> str:
    """The error text for images that `two_labels` finds."""
    each = [" and ".join(f"{own} ({label})" for own, label in same) for same in found]
    return (
        f"{data.root} has {counted(len(found), 'image')} in two classes, byte for byte.\n"
        f"  wanted  one label for an image\n  found   {listed(each, 3)}\n"
        "Nothing was computed. Remove the wrong copy of each, or give images several labels: labels.csv with a|b."
    )


def near_copies(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of images that look the same. Rotated and cropped copies are not found.

    From 20 images on the mean detail is subtracted first, so that the background of a fixed camera makes no copies.
    A picture of one grey is a copy of none.
    """
    if len(looks) < 2:
        return []
    hashes = np.stack([look.hash for look in looks]).astype(np.float32)  # (images, bits)
    scene = np.zeros(DETAIL_SIDE**2, np.float32)
    if len(looks) >= ENOUGH:
        for look in looks:
            scene += look.detail / np.float32(len(looks))
    found: list[tuple[int, int]] = []
    starts = range(0, len(looks), CHUNK)
    for top, left in ((top, left) for top in starts for left in starts if top <= left):
        alike = hashes[top : top + CHUNK] @ hashes[left : left + CHUNK].T >= BITS - 2 * NEAR
        rows, columns = np.nonzero(np.triu(alike, k=1) if top == left else alike)
        if rows.size:
            first, second = np.unique(rows), np.unique(columns)
            agree = _detail_beside(looks, first + top, scene) @ _detail_beside(looks, second + left, scene).T
            sure = agree[np.searchsorted(first, rows), np.searchsorted(second, columns)] >= DETAIL_AGREES
            found += [(top + int(i), left + int(j)) for i, j in zip(rows[sure], columns[sure], strict=True)]
    return sorted(found)


def _detail_beside(looks: Sequence[Look], chosen: NDArray[np.intp], scene: NDArray[np.float32]) -> NDArray[np.float32]:
    """(chosen, pixels) details of norm 1 without the scene; zeros for pictures of one grey."""
    details = np.stack([looks[i].detail for i in chosen])
    return _normed((details - scene) * details.any(axis=1, keepdims=True))


def _thumbnail(image: Image.Image, side: int) -> NDArray[np.float32]:
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _normed(rows: NDArray) -> NDArray[np.float32]:
    """Rows of norm 1; zeros stay."""
    values = rows.astype(np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-6))
