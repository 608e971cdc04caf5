"""defects.parquet holds records as they are; what is damaged, foreign or claims too much ends in words."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

from featprobe.errors import ProbeError
from featprobe.io import parquet
from featprobe.metrics.defects.records import (
    SIZES,
    TOUCHES,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
    found_scores,
)
from featprobe.probes.saved import MADE_AGAIN, save_head
from featprobe.stages.recording import record_file
from featprobe.stages.recording.operating_file import OPERATING
from featprobe.stages.recording.record_file import COLUMNS, RECORDS, read_records, record_bytes, write_records

HEAD = "5e" * 32
ABOUT = About("semseg", "linear", HEAD, ("background", "crack", "pore"), FoundRule(), 0.25, "validation", parts=True)


def records(random: int, images: int = 6, about: About = ABOUT) -> Records:
    """Records with random numbers, some of them unknown, that fit together."""
    rng = np.random.default_rng(random)
    defects, calls = rng.integers(0, 4, images), rng.integers(0, 7, images)

    def numbers(rows: int, columns: int, *, gaps: bool = True) -> Any:
        found = rng.random((rows, columns)).astype(np.float32) * 50
        return np.where(rng.random((rows, columns)) < 0.2, np.nan, found).astype(np.float32) if gaps else found

    defect_image, call_image = (np.repeat(np.arange(images), own) for own in (defects, calls))
    some = np.flatnonzero((defects[call_image] > 0) & (rng.random(len(call_image)) < 0.6))
    first = np.searchsorted(defect_image, call_image[some])
    finds = np.stack([some, first + rng.integers(0, defects[call_image[some]])], axis=1).astype(np.intp)
    touched = rng.integers(0, 3, len(call_image)).astype(np.uint8)
    touched[some] = TOUCHES
    score = rng.random(len(call_image)).astype(np.float32)
    spacing = np.where(rng.random((images, 1)) < 0.5, np.nan, rng.random((images, 2)) + 0.1).astype(np.float32)
    return Records(
        about,
        Images(
            tuple(f"part {i}/ü" for i in range(images)), tuple(f"group {i // 2}" for i in range(images)),
            tuple(rng.choice(["val", "test"], images).tolist()), tuple(f"images/{i}.png" for i in range(images)),
            tuple(f"{i:064x}" for i in range(images)), rng.integers(0, 3, images).astype(np.uint8),
            numbers(images, 1)[:, 0], spacing, rng.integers(1, 99, (images, 2)),
        ),
        Defects(
            defect_image, rng.integers(1, 3, len(defect_image)).astype(np.uint8),
            numbers(len(defect_image), 4, gaps=False), numbers(len(defect_image), 4), numbers(len(defect_image), 4),
            found_scores(finds, score, len(defect_image)), numbers(len(defect_image), 1)[:, 0],
            rng.random(len(defect_image)) < 0.5,
        ),
        Calls(
            call_image, rng.integers(0, 3, len(call_image)).astype(np.uint8),
            numbers(len(call_image), 4, gaps=False), numbers(len(call_image), 4), numbers(len(call_image), 4), score,
            touched,
        ),
        finds,
    )  # fmt: skip


def check_same(found: Any, wanted: Any, name: str = "records") -> None:
    if is_dataclass(wanted):
        for field in fields(wanted):
            check_same(getattr(found, field.name), getattr(wanted, field.name), f"{name}.{field.name}")
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, name)
    else:
        assert found == wanted or (found != found and wanted != wanted), name


@settings(deadline=None, max_examples=15)
@seed(7)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, random: int, images: int) -> None:
    folder, own = tmp_path_factory.mktemp("head"), records(random, images)
    write_records(folder / RECORDS, own)
    check_same(read_records(folder, HEAD), own)


def test_rules_bases_and_pooled_heads_are_kept(tmp_path: Path) -> None:
    for about in (
        replace(ABOUT, base=float("nan"), base_from="", rule=FoundRule(0.5, same_class=True)),
        replace(ABOUT, pooled=True, parts=False, base_from="default"),
    ):
        write_records(tmp_path / RECORDS, records(1, about=about))
        check_same(read_records(tmp_path, HEAD).about, about)


def test_the_table_is_read_by_other_programs(tmp_path: Path) -> None:
    own = records(3)
    write_records(tmp_path / RECORDS, own)
    table = pd.read_parquet(tmp_path / RECORDS)
    assert list(table.columns) == list(COLUMNS)
    defects = table[table.record == "defect"]
    assert len(defects) == len(own.defects) and set(defects["class"]) <= set(ABOUT.classes[1:])
    found = table[(table.record == "call") & (table.finds.map(len) > 0)]
    assert (found.touched == "defect").all() and found.finds.map(len).sum() == len(own.finds)


def test_the_format_page_names_each_column() -> None:
    page = (Path(__file__).parents[3] / "probes" / "README.md").read_text()
    section = page.partition(f"## {RECORDS}")[2].partition("\n## ")[0]
    table = section.partition("| column |")[2]
    named = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == set(COLUMNS)
    for field in fields(record_file._Said):
        assert f"`{field.name}`" in section


def test_a_new_head_takes_the_records_and_the_operating_point_of_the_old_one_away(tmp_path: Path) -> None:
    assert MADE_AGAIN == (RECORDS, OPERATING)
    card, said = {"format": "featprobe-head", "version": 1}, list[str]()

    def beside(head_sha256: str) -> dict[str, bytes]:
        said.append(head_sha256)
        return {RECORDS: b"records"}

    save_head(tmp_path, nn.Linear(1, 1), card, {}, beside=beside)
    kept = json.loads((tmp_path / "card.json").read_text())
    assert said == [kept["head_sha256"]] and list(kept["files"]) == ["head.safetensors"]
    assert (tmp_path / RECORDS).read_bytes() == b"records"
    (tmp_path / OPERATING).write_bytes(b"{}")
    save_head(tmp_path, nn.Linear(1, 1), card, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "head.safetensors"]


SOUND = record_bytes(records(3))


def len_of_footer() -> int:
    """Bytes that describe the table, at the end of the file, before their length and four letters."""
    return int.from_bytes(SOUND[-8:-4], "little")


# ---- bad files -------------------------------------------------------------------------------------------------------


def refused(folder: Path, head: str = HEAD) -> str:
    with pytest.raises(ProbeError) as caught:
        read_records(folder, head)
    text = str(caught.value)
    assert "Nothing was computed." in text and "featprobe inspect --rescore" in text
    return text


def columns_of(own: Records) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns and the description of a sound file, to be spoilt."""
    held: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_file, "table_bytes", lambda columns, about: held.extend((dict(columns), dict(about))))
        record_bytes(own)
    return held[0], held[1]


def spoilt(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> str:
    """What is said of a file whose columns or description were changed."""
    columns, about = columns_of(records(3))
    change(columns, about)
    (folder / RECORDS).write_bytes(parquet.table_bytes(columns, about))
    return refused(folder)


def value(name: str, row: int, new: Any) -> Callable[[dict[str, Any], Any], None]:
    """Puts another value into a column, in one row of the images, defects or calls: row counts from the end of all."""

    def change(columns: dict[str, Any], about: Mapping[str, Any]) -> None:
        kind, column = columns[name]
        own = (column[0] if isinstance(column, tuple) else column).copy()
        own[row] = new
        columns[name] = kind, (own, *column[1:]) if isinstance(column, tuple) else own

    return change


def renamed(columns: dict[str, Any], about: Any) -> None:
    kind, (codes, words) = columns["split"]
    columns["split"] = kind, (codes, ("validation", *words[1:]))


LAST_CALL = -1
BAD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "another format": (lambda c, a: a.update(format="featprobe-head"), "format: wanted featprobe-records"),
    "a newer version": (lambda c, a: a.update(version=2), "version: wanted 1, found 2"),
    "a rule that is none": (lambda c, a: a.update(rule={"iou": 7.0, "same_class": False}), "IoU above 0"),
    "more classes than there can be": (
        lambda c, a: a.update(classes=[*a["classes"], *map(str, range(256))]),
        "classes: wanted each class once, at most 256",
    ),
    "a missing field": (lambda c, a: a.pop("classes"), "classes: it is missing"),
    "wrong types": (lambda c, a: a.update(parts="yes", task=3), "parts: wanted true or false"),
    "no column": (lambda c, a: c.pop("finds"), "finds: it is missing"),
    "a column of texts": (lambda c, a: c.update(score=c["image"]), "score: wanted float"),
    "a split of another name": (renamed, "split: "),
    "no score": (value("score", LAST_CALL, np.nan), "score: a call lacks it"),
    "an infinite score": (value("score", LAST_CALL, np.inf), "score: "),
    "a negative size": (value(SIZES[0], LAST_CALL, -1), "one is no size"),
    "a box of nothing": (value("x1", LAST_CALL, np.nan), "x1, y1, x2, y2: one is missing"),
    "an image of no size": (value("height", 0, 0), "height, width: an image lacks them"),
    "an image without a name": (value("image", 0, -1), "image: a row lacks it"),
    "two of one name": (value("image", 1, 0), "image: two images have the same name"),
    "an unknown image": (value("image", LAST_CALL, -1), "image: a defect or a call is of an image that is not"),
    "another group": (value("group", LAST_CALL, 0), "group: that of a defect or a call is not that of its image"),
    "a number twice": (value("number", LAST_CALL, 0), "number: "),
    "no truth": (value("truth", 0, -1), "truth: an image lacks it"),
    "rows in disorder": (value("record", 0, 2), "its rows are not images, then defects, then calls"),
    "a defect found by nothing": (value("finds", 0, 99), "finds: a call finds what is not in its image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_with_wrong_values_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    change, said = BAD[case]
    assert said in spoilt(tmp_path, change)


def test_a_score_that_no_call_gives_is_refused(tmp_path: Path) -> None:
    own = records(3)
    place = len(own.images) + int(np.flatnonzero(own.defects.score > 0)[0])
    assert "score: a defect has another" in spoilt(tmp_path, value("score", place, 0.999))


def test_records_of_another_head_and_missing_ones_are_named(tmp_path: Path) -> None:
    assert "has no defects.parquet" in refused(tmp_path)
    write_records(tmp_path / RECORDS, records(1))
    said = refused(tmp_path, "7" * 64)
    assert "of another head" in said and HEAD[:16] in said and "7777777777777777…" in said


@seed(9)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damage_always_ends_in_words(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder, spoilt = tmp_path_factory.getbasetemp(), bytearray(SOUND)
    if data.draw(st.booleans()):
        spoilt = spoilt[: data.draw(st.integers(0, len(spoilt) - 1))]
    for _ in range(data.draw(st.integers(1, 3)) if spoilt else 0):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / RECORDS).write_bytes(spoilt)
    if bytes(spoilt) != SOUND:
        refused(folder)


def resealed(data: bytes) -> bytes:
    """Bytes with a seal that fits them."""
    seal = re.search(re.escape(parquet.SEAL) + b"[0-9a-f]{64}", data)
    assert seal is not None
    bare = data.replace(seal[0], parquet.UNSEALED)
    return data.replace(seal[0], parquet.SEAL + hashlib.sha256(bare).hexdigest().encode())


@seed(10)
@settings(deadline=None, max_examples=60)
@given(st.integers(0, len_of_footer() - 1), st.integers(1, 255))
def test_a_bad_footer_with_a_seal_that_fits_ends_in_words_too(
    tmp_path_factory: pytest.TempPathFactory, place: int, other: int
) -> None:
    folder, spoilt = tmp_path_factory.getbasetemp(), bytearray(SOUND)
    spoilt[-9 - place] ^= other
    if parquet.SEAL not in spoilt or not re.search(re.escape(parquet.SEAL) + b"[0-9a-f]{64}", spoilt):
        return
    (folder / RECORDS).write_bytes(resealed(bytes(spoilt)))
    try:
        read_records(folder, HEAD)  # what was hit may be read by nobody, as the name of the program that wrote it
    except ProbeError:
        pass


def test_a_file_that_claims_too_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, about = columns_of(records(2))
    rows = 10**5  # of one value each: a small file
    small = {"text": (np.zeros(rows, np.int32), ("a",)), "ints": (np.zeros(0, np.int32), np.zeros(rows, np.int32))}
    of_kind = {
        **small,
        "int": np.zeros(rows, np.int32),
        "float": np.zeros(rows, np.float32),
        "bool": np.zeros(rows, np.int8),
    }
    data = parquet.table_bytes({name: (kind, of_kind[kind]) for name, (kind, _) in columns.items()}, about)
    (tmp_path / RECORDS).write_bytes(data)
    assert len(data) < 10**5
    monkeypatch.setattr(record_file, "available_memory", lambda: 4 * 10**6)
    assert "it claims" in refused(tmp_path)
    monkeypatch.setattr(record_file, "available_memory", lambda: 4 * 1000)
    assert "1000" in refused(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORDS)
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / RECORDS).mkdir()
    assert "not a regular file" in refused(tmp_path / "other")
