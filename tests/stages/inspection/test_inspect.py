"""Records to an answer: points chosen on validation alone, what is counted, what is refused, what is kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected_space import drawn, keep, rows_of, stored_space, with_about, with_images

from featprobe.errors import ProbeError, UsageError
from featprobe.metrics.defects.operating import Wanted
from featprobe.metrics.defects.records import DEFECT, GOOD, NOTHING, FoundRule, Records
from featprobe.specs import digest
from featprobe.stages.inspection.inspect import Inspection, Inspections, inspect, inspect_head
from featprobe.stages.inspection.lines import Line, head_line, plain_json, tables_of, write_tables
from featprobe.stages.workspace import Workspace

RATE = Wanted("false_calls", 0.2)
WANTED = [RATE, Wanted("recall", 0.5), Wanted("cost", miss=5, call=1)]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return stored_space(tmp_path_factory.mktemp("space"))


def only_head(space: Workspace, to: Path) -> Path:
    """A copy of one head of a workspace, in a folder of its own."""
    shutil.copytree(space.probes / rows_of(space)[0].folder, to)
    return to


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: wanted.kind)
def test_the_operating_point_never_sees_test(space: Workspace, tmp_path: Path, wanted: Wanted) -> None:
    """A trap: the scores and the truth of all test images change, and nothing that is chosen changes."""
    files = []
    for number in range(3):
        head = only_head(space, tmp_path / f"head{number}")
        test = drawn(1000 + number, "test", images=10 * number + 5)
        test = test if number < 2 else with_images(test, good=np.full(len(test.images), GOOD, np.uint8))
        keep(head, drawn(7, "val"), test)
        files.append((inspect(space, [head], wanted=wanted).each[0], (head / "operating.json").read_bytes()))
    (first, chosen), *others = files
    assert first.kept and all(point.read_bytes() == chosen for point in tmp_path.glob("head*/operating.json"))
    for own, same in others:
        assert same == chosen and own.points == first.points and own.validation == first.validation
        assert own.test != first.test, "the trap is one: test differs"


def plain(records: Records, threshold: float) -> dict[str, int]:
    """Counts at a threshold, one object after another."""
    called = [k for k in range(len(records.calls)) if records.calls.score[k] >= np.float32(threshold)]
    found = {d for c, d in records.finds.tolist() if c in called}
    part: dict[str, set[int]] = {name: set() for name in records.images.groups}
    for name, good in zip(records.images.groups, records.images.good.tolist(), strict=True):
        part[name].add(good)
    rejected = {records.images.groups[records.calls.image[k]] for k in called}
    false = [k for k in called if records.calls.touched[k] == NOTHING]
    good = {name for name, states in part.items() if states == {GOOD}}
    bad = {name for name, states in part.items() if DEFECT in states}
    return {
        "found": len(found),
        "false_calls": len(false),
        "stray": sum(records.images.groups[records.calls.image[k]] in good for k in false),
        "escaped": len(bad - rejected),
        "stopped": len(good & rejected),
    }


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 60]))
@settings(max_examples=8, deadline=None)
def test_what_is_counted_agrees_with_a_plain_count(seed: int, least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test = drawn(seed, "test", images=15)
        both = Records.joined([drawn(seed + 1, "val"), test])
        patch.setattr("featprobe.stages.inspection.inspect.read_records", lambda folder, sha: both)
        head = Path(__file__).parents[2] / "golden/stored/probes" / rows_of(stored())[0].folder
        (own,) = inspect(stored(), [head], least_area=least).each
    wanted = plain(test.with_least_area(least), own.points[0].threshold)
    counts = {name: getattr(own.test, name) for name in ("found", "false_calls", "stray")}
    assert counts | {"escaped": own.parts.escaped, "stopped": own.parts.stopped} == wanted
    assert sum(each.found for each in own.by_size) == own.test.found == own.found.sum()
    assert sum(each.missed for each in own.missed) == own.test.missed == len(tables_of_one(own)["missed"])
    assert len(tables_of_one(own)["false_calls"]) == own.test.false_calls
    kept = test.with_least_area(least)
    threshold = np.float32(own.points[0].threshold)
    larger = [
        kept.calls.pixels[c, 1] / kept.defects.pixels[d, 1] for c, d in kept.finds if kept.calls.score[c] >= threshold
    ]
    assert head_line(own)["times_as_large"] == pytest.approx(np.median(larger) if larger else np.nan, nan_ok=True)


def stored() -> Workspace:
    """The stored workspace, which holds no records."""
    return Workspace(Path(__file__).parents[2] / "golden" / "stored")


def tables_of_one(own: Inspection) -> dict[str, list[Line]]:
    """The tables of one inspection."""
    return tables_of(Inspections((own,)))


def test_of_several_seeds_the_best_on_validation_is_shown(space: Workspace) -> None:
    found = inspect(space)
    rows = rows_of(space)
    for own in found.each:
        seeds = [row for row in rows if row.run == own.row.run]
        assert own.seeds == len(seeds) and own.row.validation == max(row.validation or -1 for row in seeds)
    assert not found.left and not list(space.probes.rglob("operating.json")), "nothing is kept unasked"


def test_a_point_that_is_asked_for_lies_beside_all_seeds_and_is_used_from_then_on(tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    asked = inspect(space, wanted=RATE, least_area=30)
    assert len(list(space.probes.rglob("operating.json"))) == len(rows_of(space))
    again = inspect(space)
    for own, before in zip(again.each, asked.each, strict=True):
        point, earlier = own.points[0], before.points[0]
        assert own.kept and own.test == before.test and own.validation == before.validation == point.validation
        assert point.least_area == 30 and point.threshold == earlier.threshold and str(point.wanted) == str(RATE)
    with pytest.raises(UsageError, match="--min-area 7 with --false-calls"):
        inspect(space, least_area=7)
    row = again.each[0].row
    assert inspect_head(space, row, Wanted("recall", 0.5)).points[0].wanted.kind == "recall"
    assert inspect_head(space, row).test == again.each[0].test, "inspect_head writes nothing"


def test_a_seed_that_can_not_keep_a_point_takes_nothing_from_the_best(tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    best = next(own for own in inspect(space).each if own.seeds > 1)
    other = next(row for row in rows_of(space) if row.run == best.row.run and row.seed != best.row.seed)
    (space.probes / other.folder / "defects.parquet").unlink()
    found = inspect(space, wanted=RATE)
    own = next(own for own in found.each if own.row.run == best.row.run)
    assert not found.left and own.kept and own.row == best.row and (own.folder / "operating.json").exists()
    assert any(f"no operating point was kept beside {other.folder}" in note for note in own.notes)


def test_folds_with_points_for_different_things_are_no_one_test(tmp_path: Path) -> None:
    space = stored_space(tmp_path, ("semseg-ridge-8316",))
    folders = [space.probes / row.folder for row in rows_of(space)]
    inspect(space, [folders[0]], wanted=Wanted("recall", 0.5))
    with pytest.raises(
        ProbeError, match=r"different things(.|\n)*at least 50 %(.|\n)*at most 0.1 false calls"
    ) as refused:
        inspect(space)
    assert f"featprobe inspect {folders[0].parents[1]} --false-calls" in str(refused.value)
    assert inspect(space, [folders[0].parents[1]], wanted=RATE).each[0].kept
    assert inspect(space).each[0].kept


def test_folds_whose_records_follow_different_rules_are_no_one_test(tmp_path: Path) -> None:
    space = stored_space(tmp_path, ("semseg-ridge-8316",))
    first, _ = (space.probes / row.folder for row in rows_of(space))
    keep(first, drawn(1, "val"), drawn(2, "test"), rule=FoundRule(0.5, same_class=True))
    with pytest.raises(ProbeError, match=r"different rules(.|\n)*IoU at least 0.5, classes(.|\n)*center") as refused:
        inspect(space)
    assert f"featprobe inspect --rescore --found iou:0.5 --same-class {first.parents[1]}" in str(refused.value)
    assert inspect(space, [first]).each[0].records.about.rule.iou == 0.5, "alone it has one rule"


def test_folds_are_one_test_set_each_at_its_own_threshold(tmp_path: Path) -> None:
    space = stored_space(tmp_path, ("semseg-ridge-8316",))
    first, second = rows_of(space)
    folders = [space.probes / row.folder for row in (first, second)]
    tests = [drawn(50 + i, "test") for i in range(2)]
    tests = [with_images(own, groups=tuple(f"{i}{name}" for name in own.images.groups)) for i, own in enumerate(tests)]
    for i, folder in enumerate(folders):
        keep(folder, drawn(i, "val", levels=np.linspace(0.1, 0.5 + 0.5 * i, 9, dtype=np.float32)), tests[i])
    (own,) = inspect(space).each
    alone = [inspect(space, [folder]).each[0] for folder in folders]
    assert own.points == tuple(each.points[0] for each in alone) and own.point is None
    assert own.points[0].threshold != own.points[1].threshold
    for name in ("found", "false_calls", "stray", "images", "good_parts"):
        assert getattr(own.test, name) == sum(getattr(each.test, name) for each in alone), name
        assert getattr(own.validation, name) == sum(getattr(each.validation, name) for each in alone), name
    assert own.parts.escaped == sum(each.parts.escaped for each in alone)
    assert any("2 folds" in note for note in own.notes) and any("fold 1 of 2 alone" in n for n in alone[0].notes)
    assert inspect_head(space, second).test == own.test, "a row of one fold stands for all"
    (again,) = inspect(space, [folders[0].parents[1]]).each
    assert again.test == own.test, "a folder above heads stands for the result below it"
    (space.probes / "results.jsonl").write_text((space.probes / "results.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ProbeError, match="without a result are the folds 2 of 2"):
        inspect(space)


def test_heads_that_give_each_image_one_score_are_counted_in_images(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    test = drawn(3, "test", pooled=True)
    keep(head, drawn(4, "val", pooled=True), test)
    (own,) = inspect(space, [head]).each
    called = test.images.score >= np.float32(own.points[0].threshold)
    assert own.test.found == (called & (test.images.good == DEFECT)).sum()
    assert own.test.false_calls == (called & (test.images.good == GOOD)).sum()
    assert own.by_size == () and own.test.over_images == (test.images.good == GOOD).sum()
    assert json.loads(json.dumps(plain_json(inspect(space, [head]))))["inspections"][0]["pooled"]


def refused(space: Workspace, head: Path, **asked: Any) -> str:
    """What is said instead of an answer."""
    with pytest.raises(ProbeError) as caught:
        inspect(space, [head], **asked)
    assert not (head / "operating.json").exists(), "nothing is kept"
    return str(caught.value)


def test_what_records_can_not_carry_is_refused_with_what_to_do(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    said = refused(space, head, unit="mm")
    assert "pixel_size" in said and "--unit px" in said and "test images with defects" in said
    said = refused(space, head, rule=FoundRule(0.5))
    assert "IoU at least 0.5" in said and "center covered" in said and "--rescore --found iou:0.5" in said
    said = refused(space, head, wanted=Wanted("false_calls", 0.001))
    assert "wanted  1000 or more" in said and "3000 to be 95 % sure" in said and "40 images" in said
    said = refused(space, head, wanted=Wanted("recall", 0.999))
    assert "wanted  1000 or more" in said and "defects of validation" in said
    records = [drawn(seed, split) for seed, split in ((1, "val"), (2, "test"))]
    keep(head, *records, parts=False)
    said = refused(space, head, wanted=Wanted("false_calls", 0.2, "part"))
    assert "--false-calls 0.2/image" in said and "--group-from" in said
    own = inspect(space, [head]).each[0]
    assert any("each image counts as a part" in note for note in own.notes)


def test_few_good_images_in_validation_are_named(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    val = drawn(1, "val")
    for good, named in ((5, False), (4, True)):
        states = np.array([GOOD] * good + [DEFECT] * (len(val.images) - good), np.uint8)
        keep(head, with_images(val, good=states), drawn(2, "test"))
        (own,) = inspect(space, [head], wanted=RATE).each
        assert any(f"validation has {good} good images" in note and "take 5" in note for note in own.notes) is named


def test_sizes_in_mm_are_used_where_they_are_known(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    test = drawn(5, "test")
    test = replace(test, defects=replace(test.defects, millimetres=test.defects.pixels / np.float32(8)))
    keep(head, drawn(6, "val"), test)
    (px,), (mm,) = (inspect(space, [head], unit=unit).each for unit in ("px", "mm"))
    assert [each.found for each in mm.by_size] == [each.found for each in px.by_size]
    assert [each.least for each in mm.by_size] == [each.least / 8 for each in px.by_size]
    tables = tables_of_one(mm)["by_size"]
    assert {line["unit"] for line in tables} == {"mm"}


def test_a_head_without_records_is_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    rows = rows_of(space)
    for row in rows[:-1]:
        (space.probes / row.folder / "defects.parquet").unlink()
    found = inspect(space)
    assert found.left and all("featprobe inspect --rescore" in left.reason for left in found.left)
    assert {own.folder for own in found.left} < {row.folder for row in rows}
    (space.probes / rows[-1].folder / "defects.parquet").unlink()
    with pytest.raises(ProbeError, match=r"None of the results(.|\n)*--rescore"):
        inspect(space)


def test_a_point_of_other_records_is_chosen_anew_for_the_same_and_named(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    inspect(space, [head], wanted=RATE, least_area=5)
    kept = (head / "operating.json").read_bytes()
    for val in (with_about(drawn(0, "val"), base=0.05), drawn(1, "val")):  # another base; other calls
        keep(head, val, drawn(100, "test"))
        (own,) = inspect(space, [head]).each
        assert not own.kept and str(own.points[0].wanted) == str(RATE) and own.points[0].least_area == 5
        assert "chosen from other records" in own.notes[0] and (head / "operating.json").read_bytes() == kept


def test_records_of_another_head_are_refused(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    shutil.copy(space.probes / rows_of(space)[1].folder / "defects.parquet", head)
    with pytest.raises(ProbeError, match="of another head"):
        inspect(space, [head])


def test_folders_that_hold_no_head_say_which_do(space: Workspace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree((space.probes / rows_of(space)[0].folder).parent, other)
    (tmp_path / "empty").mkdir()
    for path, said in {
        other: "holds no head itself, but seed0",
        tmp_path / "empty": "has no card.json",
        tmp_path / "nowhere": "There is no folder",
    }.items():
        with pytest.raises(ProbeError, match=said):
            inspect(space, [path])
    head = only_head(space, tmp_path / "head")
    card = json.loads((head / "card.json").read_text())
    for changed, said in (({"seed": 9}, "Was it edited"), ({}, "")):
        (head / "card.json").write_text(json.dumps({**card, "result": {**card["result"], **changed}}))
        if said:
            with pytest.raises(ProbeError, match=said):
                inspect(space, [head])
    for root in ("a\0b", 5):
        changed_card = {**card, "data": {**card["data"], "root": root}}
        changed_card.pop("card_sha256")
        (head / "card.json").write_text(json.dumps({**changed_card, "card_sha256": digest(changed_card)}))
        with pytest.raises(ProbeError, match="no saved head that can be read"):
            inspect(space, [head])
    (head / "card.json").write_text(json.dumps(card))
    with pytest.raises(ProbeError, match="another workspace"):
        inspect(space, [head], rescore=True)
    (head / "card.json").write_text("[" * 100_000)
    with pytest.raises(ProbeError, match="no saved head that can be read"):
        inspect(space, [head])


def test_records_that_could_not_be_made_anew_are_not_taken_for_new(tmp_path: Path) -> None:
    """The stored workspace has no weights of heads, so nothing can be scored again."""
    space = stored_space(tmp_path, ("semseg-ridge-15",))
    folder = space.probes / rows_of(space)[0].folder
    before = (folder / "defects.parquet").read_bytes()
    for heads in ([folder], []):
        with pytest.raises(ProbeError, match=r"not made anew(.|\n)*no records of(.|\n)*Train it again"):
            inspect(space, heads, rescore=True, quiet=True)
    assert (folder / "defects.parquet").read_bytes() == before and inspect(space, [folder]).each


def test_results_are_chosen_by_what_they_are(space: Workspace) -> None:
    assert len(inspect(space, only={"task": ["semseg"], "data": ["parts"]}).each) == len(inspect(space).each)
    with pytest.raises(UsageError, match="Did you mean parts"):
        inspect(space, only={"data": ["prats"]})
    with pytest.raises(ProbeError, match="There is no result"):
        inspect(Workspace(space.root / "empty"))


def test_tables_are_csv_files_that_a_spreadsheet_does_not_compute(space: Workspace, tmp_path: Path) -> None:
    head = only_head(space, tmp_path / "head")
    test = drawn(9, "test")
    keep(head, drawn(8, "val"), with_images(test, ids=tuple(f"=cmd{i}" for i in range(len(test.images)))))
    found = inspect(space, [head])
    files = write_tables(found, tmp_path / "tables")
    assert {path.name for path in files} >= {"heads.csv", "by_size.csv", "froc.csv", "missed.csv", "false_calls.csv"}
    lines = (tmp_path / "tables" / "missed.csv").read_text().splitlines()
    assert len(lines) == 1 + found.each[0].test.missed and ",'=cmd" in lines[1]
    keep(head, drawn(8, "val"), drawn(9, "test", most_defects=0))
    files = write_tables(inspect(space, [head]), tmp_path / "tables")
    assert set(files) == set((tmp_path / "tables").iterdir()) and tmp_path / "tables" / "missed.csv" not in files
