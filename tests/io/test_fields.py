"""Faults of files of others: as many as a person reads, found in time that grows with the file."""

from dataclasses import dataclass
from typing import Any

import pytest

from featprobe import errors
from featprobe.errors import FieldError
from featprobe.io import schemas
from featprobe.io.fields import MOST_SAID, Fault, made, message, shown, unknown
from featprobe.io.schemas import check


@dataclass(frozen=True)
class Inner:
    """A table in a table."""

    lr: float = 0.1


@dataclass(frozen=True)
class Outer:
    """A table."""

    classes: str
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are compared with known ones."""
    names: list[str] = []
    plain = errors.get_close_matches

    def counting(name: str, *words: Any, **named: Any) -> list[str]:
        names.append(name)
        return plain(name, *words, **named)

    monkeypatch.setattr(errors, "get_close_matches", counting)
    return names


@pytest.mark.parametrize("checked", ["made", "check"])
def test_unknown_keys_are_compared_once(compared: list[str], checked: str) -> None:
    strange = {f"odd{i}": i for i in range(300)}
    data = {**strange, "clases": "x", "inner": {"lrr": 1.0, **strange}}
    if checked == "check":
        faults = check(Outer, data)
    else:
        with pytest.raises(FieldError) as raised:
            made(Outer, data, "It")
        faults = list(raised.value.faults)
    said = {fault.place: fault.said for fault in faults}
    assert len(said) == 603 and said["classes",] == "it is missing"
    assert said["clases",].startswith("unknown. Did you mean classes?")
    assert said["inner", "lrr"].startswith("unknown. Did you mean lr?")
    assert said["odd0",] == said["odd299",] == "unknown. Known: classes, inner, sizes."
    assert len(compared) <= 602 + 2 * MOST_SAID


def test_a_message_tells_as_many_faults_as_a_person_reads() -> None:
    faults = [Fault((i,), "wrong") for i in range(MOST_SAID + 7)]
    lines = message("What.", [*faults, *faults], "Do.").splitlines()
    assert len(lines) == MOST_SAID + 3 and lines[-2:] == ["  and 7 more", "Do."]
    assert "more" not in message("What.", faults[:MOST_SAID])


def test_unknown_keys_of_a_large_table_are_named_without_the_known_ones() -> None:
    known = [f"k{i:02}" for i in range(30)]
    assert unknown(("a",), ["zzzzzzzzzz"], known) == [Fault(("a", "zzzzzzzzzz"), "unknown.")]


def test_a_list_of_many_wrong_values_is_one_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for each takes far more memory than the list."""
    data = {"classes": "x", "sizes": ["a"] * (schemas.MOST_ERRORS + 1)}
    assert check(Outer, data) == [Fault((), "10001 values in it are of wrong types, or unknown")]
    monkeypatch.setattr(schemas, "MOST_VALUES", 100)
    assert check(Outer, {"classes": "x", "sizes": [1] * 101}) == [Fault((), "it holds more than 100 values")]
    assert check(Outer, {"classes": "x", "sizes": [1] * 90}) == []


def test_a_long_value_is_shown_by_its_beginning() -> None:
    assert shown("a\x1b" * 1_000_000) == '"' + "a\\u001b" * 8 + "a\\…" or shown("a" * 100) == f'"{"a" * 58}…'
