"""Labels of whole images as values: names, and what is known of units."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featprobe.datasets import DataSet
from featprobe.errors import FieldError
from featprobe.image_labels import UNKNOWN, ImageTruth, LabelNames, encode, tasks_served
from featprobe.scores import SCORES
from featprobe.specs import DataInfo
from featprobe.targets import Target

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=6, unique=True).map(tuple)


@st.composite
def label_names(draw: st.DrawFn) -> LabelNames:
    names, multi = draw(NAMES), draw(st.booleans())
    return LabelNames(names, multi, None if multi else draw(st.sampled_from([None, *names])))


@st.composite
def truths(draw: st.DrawFn) -> tuple[LabelNames, list[tuple[int, ...] | None]]:
    """Names, and the labels of units that have such."""
    names = draw(label_names())
    numbers = st.integers(0, len(names.names) - 1)
    own = st.lists(numbers, unique=True).map(tuple) if names.multi else numbers.map(lambda number: (number,))
    return names, draw(st.lists(st.none() | own, max_size=8))


@given(label_names())
def test_names_come_back_from_json(names: LabelNames) -> None:
    assert LabelNames.from_json(names.to_json()) == names and not names.faults()
    info = DataInfo("set", "set", ("background",), (), "f" * 64, label_names=names)
    assert DataInfo.from_json(info.to_json()) == info


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"names": []}, "names"),
        ({"names": ["a", "a"]}, "names"),
        ({"names": ["a", ""]}, "names"),
        ({"names": ["a", "\ud800"]}, "names"),
        ({"names": [str(i) for i in range(1001)]}, "names"),
        ({"names": "ab"}, "names"),
        ({"names": ["a", "b"], "good": "c"}, "good"),
        ({"names": ["a", "b"], "good": "a", "multi": True}, "good"),
        ({"names": ["a", "b"], "multi": 1}, "multi"),
    ],
)
def test_names_that_no_set_has_are_refused_by_field(said: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        LabelNames.from_json(said)
    assert {fault.place[0] for fault in caught.value.faults} == {field}
    info = DataInfo("set", "set", ("background",), (), "f" * 64).to_json() | {"label_names": said}
    with pytest.raises(FieldError, match=rf"label_names\.{field}"):
        DataInfo.from_json(info)


def test_a_set_without_labels_of_images_is_written_as_ever() -> None:
    assert "label_names" not in DataInfo("set", "set", ("background", "pore"), ("semseg",), "f" * 64).to_json()


@given(truths())
def test_good_is_what_the_labels_say(found: tuple[LabelNames, list[tuple[int, ...] | None]]) -> None:
    names, held = found
    truth = ImageTruth(names, encode(held, len(names.names)))
    assert truth.known.tolist() == [own is not None for own in held]
    good = () if names.multi else None if names.good is None else (names.names.index(names.good),)
    assert truth.good.tolist() == [UNKNOWN if own is None or good is None else own == good for own in held]
    assert (truth.values[truth.known] <= 1).all() and (truth.values[~truth.known] == UNKNOWN).all()
    assert [tuple(np.flatnonzero(row)) for row in truth.values[truth.known]] == [
        tuple(sorted(own)) for own in held if own is not None
    ]


def test_any_label_serves_the_tasks_of_whole_images_and_none_serves_nothing() -> None:
    of_images = tuple(task for task, scores in SCORES.items() if scores.on in ("images", "anomalies"))
    assert len(of_images) == 2
    assert tasks_served(("semseg",), None) == ("semseg", *of_images)
    assert tasks_served((), LabelNames(("a", "b"))) == of_images and tasks_served((), None) == ()
    info = DataInfo("set", "set", ("background", "pore"), ("detect",), "f" * 64)
    data = DataSet("set", Path(), info.classes, (), info.tasks, lambda *_: Target(None, ()))
    assert info.serves == data.serves == ("detect", *of_images) and info.tasks == ("detect",)
