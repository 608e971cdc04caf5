"""The whole time of several trainings, and what is gone and left of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featprobe.stages.training.agenda import Agenda


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("featprobe.stages.training.agenda.time.monotonic", clock)
    return clock


def test_the_whole_time_comes_first_and_what_has_run_corrects_it(clock: Clock) -> None:
    said: list[str] = []
    agenda = Agenda(["a", "a", "b"], {"a": 60.0, "b": 120.0}, said.append)
    agenda.announce()
    for what, seconds in (("one", 120.0), ("two", 120.0), ("three", 240.0)):
        agenda.begin(what)
        clock.now += seconds
        agenda.end()
    assert said == [
        "3 trainings, about 4.0 min in all",
        "[1/3] one; about 4.0 min left",
        "[2/3] two; 2.0 min gone, about 6.0 min left",  # one more as the first, and b twice as slow as foretold
        "[3/3] three; 4.0 min gone, about 4.0 min left",
    ]
    assert agenda.left() == (0.0, 0)


def test_nothing_is_invented_where_nothing_is_known(clock: Clock) -> None:
    said: list[str] = []
    agenda = Agenda(["solved", "solved", "trained"], {"trained": 90.0}, said.append)
    agenda.announce()
    agenda.begin("one")
    clock.now += 30
    agenda.end()
    agenda.begin("two")
    assert said[0] == "3 trainings, about 1.5 min in all, and 2 trainings whose time is not known yet"
    assert said[2] == "[2/3] two; 30 s gone, about 2.0 min left"
    said.clear()
    Agenda(["x", "y"], {}, said.append).announce()
    assert said == ["2 trainings, time in all is not known before one has run"]


def test_a_training_that_failed_tells_nothing_of_the_others(clock: Clock) -> None:
    agenda = Agenda(["a", "a"], {"a": 60.0}, lambda line: None)
    agenda.begin("fails at once")
    agenda.begin("the other")
    assert agenda.took == {}
    clock.now += 50
    agenda.end()
    assert agenda.took == {"a": [50.0]}


@given(
    of=st.lists(st.sampled_from("abc"), min_size=1, max_size=8),
    foretold=st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 1000)),
    slower=st.floats(0.1, 10),
)
def test_where_all_are_foretold_alike_wrong_the_rest_is_right(
    of: list[str], foretold: dict[str, float], slower: float
) -> None:
    """After the first, what is left is the true time of what is foretold, if every forecast errs by the same factor."""
    agenda = Agenda(of, foretold, lambda line: None)
    agenda.number = 1
    if of[0] in foretold:
        agenda.took[of[0]] = [slower * foretold[of[0]]]
    seconds, unknown = agenda.left()
    factor = slower if of[0] in foretold else 1.0
    assert seconds == pytest.approx(sum(factor * foretold[key] for key in of[1:] if key in foretold))
    assert unknown == sum(key not in foretold for key in of[1:])
