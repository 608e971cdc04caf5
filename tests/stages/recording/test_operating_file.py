"""The operating point beside a head: what is written is read; what does not fit is refused in words."""

import json
import re
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
from drawn_records import drawn_records
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from featprobe.errors import DataError, ProbeError
from featprobe.metrics.defects.operating import OperatingPoint, Wanted, choose
from featprobe.stages.recording.operating_file import OPERATING, read_point, write_point

SHA = "a" * 64
PAGE = Path(__file__).parents[3] / "probes/README.md"


def point(seed: int = 1, wanted: str = "0.5/part", **changed: Any) -> OperatingPoint:
    return replace(choose(drawn_records(seed, 30), Wanted.parse(wanted)), **changed)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["0", "0.5/part", "2"]), st.booleans(), st.integers(1, 90))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, wanted: str, pooled: bool, least_area: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        own = choose(drawn_records(seed, 30, pooled=pooled), Wanted.parse(wanted), least_area)
    except DataError:
        assume(False)
    write_point(folder, SHA, own)
    assert repr(read_point(folder, SHA)) == repr(own)  # nan is not equal to itself


def test_a_base_that_float32_rounds_down_is_no_fault(tmp_path: Path) -> None:
    silent = drawn_records(1, 30, most_calls=0)
    silent = replace(silent, about=replace(silent.about, base=0.7))
    own = choose(silent, Wanted.parse("0.5"))
    write_point(tmp_path, SHA, own)
    assert own.threshold < own.base and repr(read_point(tmp_path, SHA)) == repr(own)


def test_costs_and_recalls_are_kept_too(tmp_path: Path) -> None:
    for wanted in (Wanted.parse_cost("miss=100,call=1"), Wanted.parse_recall("0.3")):
        own = choose(drawn_records(1, 30), wanted)
        write_point(tmp_path, SHA, own)
        assert repr(read_point(tmp_path, SHA)) == repr(own)


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    assert read_point(tmp_path, SHA) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version: wanted 1, found 2"),
        ({"threshold": 0.3}, "threshold: wanted a number of the format float32"),
        ({"threshold": "0.3"}, 'threshold: wanted a number, found "0.3"'),
        ({"threshold": 1e300}, "threshold: wanted a number of the format float32"),
        ({"base": 1.5}, "base: wanted a number of at most the threshold"),
        ({"base": 1e300}, "base: wanted a number of at most the threshold"),
        ({"least_area": 0}, "least_area: wanted 1 pixel or more"),
        ({"least_area": 1.5}, "least_area: wanted a whole number"),
        ({"further": 1}, "further: unknown"),
        ({"wanted": {"kind": "false_calls", "rate": -1.0, "per": "part", "miss": None, "call": None}}, "0 or more"),
        ({"wanted": {"kind": "hope", "rate": 1.0, "per": "part", "miss": None, "call": None}}, "wanted.kind"),
        ({"head_sha256": "b" * 64}, "of another head"),
    ],
)
def test_other_values_are_refused_with_what_to_do(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_point(tmp_path, SHA, point())
    path = tmp_path / OPERATING
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProbeError, match=re.escape(said)) as refused:
        read_point(tmp_path, SHA)
    assert "featprobe inspect" in str(refused.value) and str(path) in str(refused.value)


def test_counts_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    own = point()
    counts = replace(own.validation, found=own.validation.defects + 1, calls=-1, threshold=nan)
    path = tmp_path / OPERATING
    write_point(tmp_path, SHA, replace(own, validation=replace(counts, threshold=0.5)))
    with pytest.raises(ProbeError) as refused:
        read_point(tmp_path, SHA)
    assert all(f"validation.{name}: wanted" in str(refused.value) for name in ("threshold", "found", "calls"))
    path.write_text("[" * 10**5)
    with pytest.raises(ProbeError, match="can't be used"):
        read_point(tmp_path, SHA)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ProbeError, match="can't be used"):
        read_point(tmp_path, SHA)


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"## operating\.json.*?```json\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / OPERATING).write_text(example)
    found = read_point(tmp_path, json.loads(example)["head_sha256"])
    assert found is not None and str(found.wanted) == "at most 0.05 false calls per part"
