"""Where calls and defects meet, against a plain reference that looks at every pixel and every pair."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from featprobe.metrics.defects.overlaps import AREA_SHARE, USUAL_IOU, Overlaps, finds, touched
from featprobe.metrics.defects.records import IGNORED, NOTHING, TOUCHES, FoundRule
from featprobe.stages.recording.map_calls import calls_at_bases, calls_of_map
from featprobe.stages.recording.meetings import Ground, Shape, overlaps_of_map, overlaps_of_objects
from featprobe.targets import Instance, components, encode_rle

SIZE = (9, 11)
Mask = NDArray[np.bool_]
RULES = [FoundRule(), FoundRule(same_class=True), FoundRule(0.3), FoundRule(0.5, same_class=True)]


def box_of(mask: Mask) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def masked(mask: Mask, category: int) -> Instance:
    return Instance(category, box_of(mask), encode_rle(mask))


MASKS = arrays(bool, SIZE, elements=st.booleans(), fill=st.just(False)).filter(lambda mask: bool(mask.any()))
BOXES = st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(0, 3), st.integers(0, 3)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
CATEGORIES = st.integers(1, 2)
OBJECTS = st.one_of(st.builds(masked, MASKS, CATEGORIES), st.builds(Instance, CATEGORIES, BOXES))


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def pixels(one: Instance) -> set[tuple[int, int]] | None:
    shape = Shape.of(one)
    if shape.mask is None:
        return None
    rows, columns = np.nonzero(shape.mask)
    return {
        (r + shape.window[0].start, c + shape.window[1].start)
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
    }


def meet(call: Instance, other: Instance) -> tuple[float, float, float, bool]:
    """(shared area, the areas of both, whether the call covers the center of the other), pixel by pixel."""
    own, theirs = pixels(call), pixels(other)
    if own is not None and theirs is not None:
        mean = [sum(at) / len(theirs) for at in zip(*theirs, strict=True)]
        center = min(sorted(theirs), key=lambda p: (p[0] - mean[0]) ** 2 + (p[1] - mean[1]) ** 2)
        return len(own & theirs), len(own), len(theirs), center in own
    (a, b, c, d), (e, f, g, h) = call.box_xyxy, other.box_xyxy
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    covers = a <= (e + g) / 2 <= c and b <= (f + h) / 2 <= d
    return shared, area(call.box_xyxy), area(other.box_xyxy), covers


def reference(
    calls: list[Instance], defects: list[Instance], ignored: list[Instance], rule: FoundRule
) -> tuple[list[list[int]], list[int]]:
    """The pairs that are found, and what each call touches."""
    found, touches = [], [NOTHING] * len(calls)
    for k, call in enumerate(calls):
        if any(meet(call, region)[0] > 0 for region in ignored):
            touches[k] = IGNORED
    for (k, call), (i, defect) in product(enumerate(calls), enumerate(defects)):
        shared, own, theirs, covers = meet(call, defect)
        iou = shared / (own + theirs - shared) if own + theirs - shared else 0.0
        share = shared / theirs if theirs else 0.0
        usual = covers or share >= AREA_SHARE or iou >= USUAL_IOU
        if (usual if rule.iou is None else iou >= rule.iou) and (
            not rule.same_class or call.category == defect.category
        ):
            found.append([k, i])
        if shared > 0 or covers:
            touches[k] = TOUCHES
    return found, touches


def check(overlaps: Overlaps, calls: list[Instance], defects: list[Instance], ignored: list[Instance]) -> None:
    for rule in RULES:
        found, touches = reference(calls, defects, ignored, rule)
        assert finds(overlaps, rule).tolist() == found, rule
    assert touched(overlaps).tolist() == touches


@settings(deadline=None, max_examples=150)
@seed(11)
@given(st.lists(OBJECTS, max_size=4), st.lists(OBJECTS, max_size=3), st.lists(OBJECTS, max_size=2))
def test_detections_meet_defects_as_every_pixel_says(
    calls: list[Instance], defects: list[Instance], ignored: list[Instance]
) -> None:
    check(overlaps_of_objects(calls, Ground.of(defects, ignored)), calls, defects, ignored)


@settings(deadline=None, max_examples=150)
@seed(12)
@given(
    arrays(np.uint8, SIZE, elements=st.integers(0, 2), fill=st.just(0)),
    st.lists(OBJECTS, max_size=3),
    st.lists(OBJECTS, max_size=2),
)
def test_components_of_a_map_meet_defects_as_every_pixel_says(
    classes: NDArray[np.uint8], defects: list[Instance], ignored: list[Instance]
) -> None:
    found = calls_of_map((classes > 0).astype(np.float32), 0.5, np.maximum(classes, 1))
    calls = [masked(found.labels == k, int(c)) for k, c in enumerate(found.category, start=1)]
    check(overlaps_of_map(found, Ground.of(defects, ignored)), calls, defects, ignored)


@settings(deadline=None, max_examples=80)
@seed(13)
@given(
    arrays(np.float32, SIZE, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    st.lists(OBJECTS, max_size=3),
    st.lists(OBJECTS, max_size=2),
    st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=1, max_size=3).map(sorted),
)
def test_each_base_of_a_map_meets_the_defects_for_itself(
    values: NDArray[np.float32], defects: list[Instance], ignored: list[Instance], bases: list[float]
) -> None:
    calls, ground = calls_at_bases(values, bases), Ground.of(defects, ignored)
    every = overlaps_of_map(calls, ground)
    assert every.defect_class.tolist() == [one.category for one in defects] * len(bases)
    for k, base in enumerate(bases):
        alone, own = overlaps_of_map(calls_of_map(values, base), ground), np.flatnonzero(calls.layer == k)
        for rule in (FoundRule(), FoundRule(0.3)):
            pairs = finds(every, rule)
            pairs = pairs[np.isin(pairs[:, 0], own)]
            here = [[int(np.flatnonzero(own == call)[0]), int(i) - k * len(defects)] for call, i in pairs]
            assert sorted(here) == finds(alone, rule).tolist()
        assert touched(every)[own].tolist() == touched(alone).tolist()


@pytest.mark.parametrize("box", [(0.0, 4.0, 6.0, 9.0), (0.0, -5.0, 6.0, 1.0), (1.0, -20.0, 5.0, 20.0)])
def test_a_box_that_leaves_the_image_meets_no_call_of_another_base(box: tuple[float, float, float, float]) -> None:
    values = np.zeros((6, 6), np.float32)
    values[0:2], values[5] = 0.9, 0.3
    ground = Ground.of([Instance(1, box)], [])
    calls = calls_at_bases(values, (0.2, 0.5))
    every = overlaps_of_map(calls, ground)
    assert calls.layer[every.call].tolist() == every.defect.tolist()
    alone = [overlaps_of_map(calls_of_map(values, base), ground) for base in (0.2, 0.5)]
    assert every.shared.tolist() == [shared for own in alone for shared in own.shared.tolist()]


def test_the_center_of_a_mask_lies_in_it_where_its_centroid_does_not() -> None:
    ring = np.ones((7, 7), bool)
    ring[1:-1, 1:-1] = False
    shape = Shape.of(masked(np.pad(ring, ((1, 1), (2, 2))), 1))
    row, column = shape.center
    assert np.pad(ring, ((1, 1), (2, 2)))[row, column]


def test_an_empty_mask_counts_as_its_box() -> None:
    empty = Instance(1, (1.0, 1.0, 4.0, 4.0), encode_rle(np.zeros(SIZE, bool)))
    overlaps = overlaps_of_objects([Instance(1, (1.0, 1.0, 4.0, 4.0))], Ground.of([empty], []))
    assert finds(overlaps, FoundRule(1.0)).tolist() == [[0, 0]]


def test_thousands_of_components_are_found_by_as_many() -> None:
    values = np.zeros((200, 200), np.float32)
    values[::4, ::4] = 1
    calls, defects = calls_of_map(values, 0.5), components(values.astype(np.uint8), 2)
    overlaps = overlaps_of_map(calls, Ground.of(defects, []))
    assert len(calls) == len(finds(overlaps, FoundRule(1.0))) == 2500
