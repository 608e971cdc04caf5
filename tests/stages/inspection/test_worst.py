"""The worst misses and false calls in pictures: which are shown, what is said of them, what can't be read."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inspected_space import drawn, keep, rows_of, stored_space, with_about, with_images
from PIL import Image

from featprobe.datasets.images.reading import hash_image
from featprobe.metrics.defects.operating import Wanted
from featprobe.metrics.defects.records import NOTHING, Records
from featprobe.report.closeups import Drawn
from featprobe.stages.inspection import worst as stage
from featprobe.stages.inspection.inspect import Inspection, inspect
from featprobe.stages.inspection.worst import spread, worst
from featprobe.stages.workspace import Workspace

SIZE = (90, 120)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return stored_space(tmp_path_factory.mktemp("space"))


def on_disk(records: Records, root: Path) -> Records:
    """The same records, of images that are there."""
    files, hashes = [], []
    for number in range(len(records.images)):
        path = root / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 255, SIZE).astype(np.uint8)).save(path)
        files.append(path.name)
        hashes.append(hash_image(path))
    sizes = np.array([SIZE] * len(files), np.intp)
    boxes = {
        name: np.float32([(i % 90, i % 50, i % 90 + 9, i % 50 + 7) for i in range(len(getattr(records, name)))])
        for name in ("defects", "calls")
    }
    records = replace(
        records,
        defects=replace(records.defects, boxes=boxes["defects"].reshape(-1, 4)),
        calls=replace(records.calls, boxes=boxes["calls"].reshape(-1, 4)),
    )
    return with_images(records, files=tuple(files), hashes=tuple(hashes), sizes=sizes)


@pytest.fixture
def inspected(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspection:
    """An inspection of images that lie in the test's folder."""
    head = space.probes / rows_of(space)[0].folder
    keep(head, drawn(3, "val"), on_disk(drawn(4, "test"), tmp_path))
    own = stage.head_in
    monkeypatch.setattr(stage, "head_in", lambda folder: replace(own(folder), root=tmp_path))
    (found,) = inspect(space, [head], wanted=Wanted("recall", 0.6)).each
    assert found.test.missed > 3 and found.test.false_calls > 1, "there is something to show"
    return found


def shown(inspection: Inspection, count: int) -> tuple[list[str], list[str]]:
    """The captions of misses, and of false calls."""
    captions = [own.caption for own in worst(inspection, count)]
    missed = [text for text in captions if text.startswith("Missed")]
    assert captions[: len(missed)] == missed and all(text.startswith("False call") for text in captions[len(missed) :])
    return missed, captions[len(missed) :]


def test_each_picture_shows_the_image_that_its_caption_names(inspected: Inspection, tmp_path: Path) -> None:
    ids = inspected.records.images.ids
    for own in worst(inspected, 3):
        picture = Image.open(io.BytesIO(own.png))
        number = next(i for i, name in enumerate(ids) if f" in {name}:" in own.caption)
        whole = np.asarray(picture.crop((0, 0, 320, 240)).convert("L").resize(SIZE[::-1])).astype(float)
        source = np.asarray(Image.open(tmp_path / f"{number}.png")).astype(float)
        assert np.corrcoef(whole.ravel(), source.ravel())[0, 1] > 0.7
        assert not own.fault and own.caption.endswith(".")


def test_misses_are_the_largest_and_the_clearest_and_false_calls_the_highest(inspected: Inspection) -> None:
    records = inspected.records
    missed, false = shown(inspected, 2)
    assert len(missed) == 2 and len(false) == min(2, inspected.test.false_calls)
    lost = np.flatnonzero(~inspected.found)
    largest = lost[np.argmax(records.defects.size()[lost])]
    assert f"in {records.images.ids[records.defects.image[largest]]}: " in missed[0]
    assert f"{records.defects.size()[largest]:.3g} px (square root of its area)" in missed[0]
    stray = np.flatnonzero(records.called(inspected.thresholds) & (records.calls.touched == NOTHING))
    highest = stray[np.argmax(records.calls.score[stray])]
    assert f"score {records.calls.score[highest]:.3g}, threshold" in false[0]
    assert f"in {records.images.ids[records.calls.image[highest]]}: " in false[0]


def test_every_miss_is_shown_once_where_there_is_room(inspected: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "draw_closeup", lambda image, box: Drawn(b"a picture"))  # drawing takes time
    missed, false = shown(inspected, 1000)
    assert (len(missed), len(false)) == (inspected.test.missed, inspected.test.false_calls)
    assert worst(inspected, 0) == []


def test_images_are_shown_in_turn() -> None:
    images = np.array([5, 5, 6, 7, 6])
    assert spread([0, 1, 2, 4, 3], images) == [0, 2, 3, 1, 4]


def test_an_image_that_changed_is_passed_over_and_where_none_is_left_the_reason_is_said(
    inspected: Inspection, tmp_path: Path
) -> None:
    before = [own.caption for own in worst(inspected, 2)]
    first = next(i for i, name in enumerate(inspected.records.images.ids) if f" in {name}:" in before[0])
    (tmp_path / f"{first}.png").write_bytes(b"none")
    after = [own.caption for own in worst(inspected, 2)]
    assert before[0] not in after and len(after) == len(before)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    found = worst(inspected, 2)
    assert [own.caption.split(" of ")[0] for own in found] == ["No picture"] * 2
    assert all(own.png == b"" and "can't be read" in own.fault for own in found), [own.fault for own in found]


def test_whole_images_are_shown_where_each_has_one_score(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = space.probes / rows_of(space)[-1].folder
    rng = np.random.default_rng(5)
    val, test = (
        with_about(drawn(n, split), pooled=True, base=float("nan"), base_from="")
        for n, split in ((5, "val"), (6, "test"))
    )
    val, test = (
        with_images(own, score=rng.random(len(own.images)).astype(np.float32)) for own in (val, on_disk(test, tmp_path))
    )
    keep(head, val, test, pooled=True, base=float("nan"), base_from="")
    own = stage.head_in
    monkeypatch.setattr(stage, "head_in", lambda folder: replace(own(folder), root=tmp_path))
    (found,) = inspect(space, [head]).each
    missed, _ = shown(found, 3)
    scores = [float(text.split("image score ")[1].split(",")[0]) for text in missed]
    assert len(scores) == 3 and scores == sorted(scores)
