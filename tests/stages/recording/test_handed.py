"""Findings are handed to each watch as scoring hands them over, from memory or by another pass."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from featprobe.stages.recording import handed
from featprobe.stages.recording.handed import Findings
from featprobe.stages.recording.watch import Watch

MAPS = {
    (head, image): (np.full((4, 6), head + image, np.float32), np.full((4, 6), 1 + head, np.uint8) if head else None)
    for image in range(3)
    for head in range(2)
}
BYTES = sum(values.nbytes + (0 if classes is None else classes.nbytes) for values, classes in MAPS.values())


class Seen(Watch):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Any] = {}

    def pixels(self, head: int, image: int, values: Any, classes: Any) -> None:
        self.found[head, image] = values, classes

    def objects(self, head: int, image: int, objects: Any) -> None:
        self.found[head, image] = objects

    def image_score(self, head: int, image: int, score: float) -> None:
        self.found[head, image] = score


def findings(passes: list[int], maps: bool = True) -> Findings:
    """Those of a stand-in for a task, which counts its passes, and hands the first image over twice, as after too
    little memory of a device."""

    def evaluate(heads: Any, source: Any, rows: list[int], watch: Watch) -> None:
        passes.append(len(rows))
        for image in (0, *rows):
            for head in range(2):
                if maps:
                    watch.pixels(head, image, *MAPS[head, image])
                elif head:
                    watch.objects(head, image, ())
                else:
                    watch.image_score(head, image, 0.5)

    prepared: Any = SimpleNamespace(rows={"val": [0, 1, 2]}, evaluate=evaluate)
    return Findings(prepared, [], None, "val")  # type: ignore[arg-type]


@pytest.mark.parametrize(("room", "wanted"), [(BYTES, 1), (BYTES - 1, 3), (0, 3)])
def test_images_are_read_once_where_memory_holds_all_maps(
    room: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handed, "available_memory", lambda: room / handed.MEMORY_SHARE)
    passes: list[int] = []
    own = findings(passes)
    for last in (False, False, True):
        watch = Seen()
        own.hand_to(watch, last=last)
        assert watch.found.keys() == MAPS.keys()
        for key, wanted_maps in MAPS.items():
            for found, own_map in zip(watch.found[key], wanted_maps, strict=True):
                np.testing.assert_array_equal(found, own_map, strict=True)
    assert len(passes) == wanted


def test_maps_that_are_kept_lie_in_pieces_and_are_those_of_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed, "PIECE", 300)
    monkeypatch.setattr(handed, "available_memory", lambda: 10**6)
    rng, own = np.random.default_rng(0), dict[int, tuple[Any, Any]]()

    def evaluate(heads: Any, source: Any, rows: Any, watch: Watch) -> None:
        for image in (*range(5), 1):  # one of them is larger than a piece
            size = 3 + 2 * image, 5
            own[image] = rng.random(size, np.float32), rng.integers(1, 4, size, np.uint8)
            watch.pixels(0, image, own[image][0].copy(), own[image][1].copy())

    prepared: Any = SimpleNamespace(rows={"val": []}, evaluate=evaluate)
    found = Findings(prepared, [], None, "val")  # type: ignore[arg-type]
    for last in (False, True):
        watch = Seen()
        found.hand_to(watch, last=last)
    for image, (values, classes) in own.items():
        np.testing.assert_array_equal(watch.found[0, image][0], values, strict=True)
        np.testing.assert_array_equal(watch.found[0, image][1], classes, strict=True)
    bases = {id(watch.found[0, image][i].base) for image in own for i in (0, 1)}
    assert 1 < len(bases) < 10


def test_a_single_watch_keeps_nothing_and_sees_objects_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> int:
        raise AssertionError("no memory is asked for")

    passes: list[int] = []
    other = Seen()
    findings(passes, maps=False).hand_to(other)
    assert other.found == {(head, image): () if head else 0.5 for head in range(2) for image in range(3)}
    monkeypatch.setattr(handed, "available_memory", never)
    watch = Seen()
    findings(passes).hand_to(watch, last=True)
    assert watch.found.keys() == MAPS.keys() and passes == [3, 3]
