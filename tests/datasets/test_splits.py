"""Splits that users choose: by classes, in folds, from a file, by groups from a pattern; and how they are scored."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import (
    CPU,
    PoolingBackbone,
    data_info,
    opened,
    options,
    random_maps,
    recipe_of,
    rows_of,
    spy_on_writes,
    write_set,
)
from helpers import extract as extract_into
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.cache import CacheWriter, create_file
from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.samples import Sample
from featprobe.datasets.split_file import SplitFile, pin, read_split_file, write_split_file
from featprobe.datasets.splits import (
    complete_splits,
    fold_splits,
    folds_by_group,
    regroup,
    split_by_group,
    starved,
)
from featprobe.errors import DataError, FeatprobeError
from featprobe.kinds import TrainRecipe
from featprobe.metrics import average_precision, iou_scores
from featprobe.probes.saved import read_card, read_rows
from featprobe.result_rows import ResultRow
from featprobe.splitting import SplitChoice
from featprobe.stages.commands import commands_of
from featprobe.stages.comparison.compare import compare
from featprobe.stages.comparison.results import load_results
from featprobe.stages.comparison.tested import ObjectTest
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.partition import SCARCE_FIRST, Partition, classes_of, single_splits, split_notes
from featprobe.stages.training.finetune import missing_counterparts
from featprobe.stages.training.probe import notes_of, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.upkeep.describe import write_split
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import Target

images = st.lists(
    st.tuples(st.integers(0, 12).map(lambda n: f"g{n}"), st.frozensets(st.integers(1, 4))), min_size=1, max_size=60
)


# ---- folds and classes -----------------------------------------------------------------------------------------------


@given(images=images, folds=st.integers(2, 5), heeded=st.booleans(), seed=st.integers(0, 3), data=st.data())
def test_folds_part_no_group_and_test_everything_once(
    images: list[tuple[str, frozenset[int]]], folds: int, heeded: bool, seed: int, data: st.DataObject
) -> None:
    groups, classes = [group for group, _ in images], [own for _, own in images] if heeded else None
    if len(set(groups)) < folds:
        with pytest.raises(DataError, match=f"can't be split into {folds} folds(.|\n)*at least {folds} groups"):
            folds_by_group(groups, folds, classes, seed)
        return
    fold_of = folds_by_group(groups, folds, classes, seed)
    rest = [{g for g, own in zip(groups, fold_of, strict=True) if own != str(f)} for f in range(1, folds + 1)]
    if any(len(left) < 2 for left in rest):
        with pytest.raises(DataError, match="can't be split into train, val"):
            [fold_splits(groups, folds, fold, classes, seed) for fold in range(1, folds + 1)]
        return
    every = [fold_splits(groups, folds, fold, classes, seed) for fold in range(1, folds + 1)]
    assert all([splits[i] for splits in every].count("test") == 1 for i in range(len(images)))
    order = data.draw(st.permutations(range(len(images))))
    for fold, splits in enumerate(every, start=1):
        parts: dict[str, set[str]] = defaultdict(set)
        for group, split in zip(groups, splits, strict=True):
            parts[group].add(split)
        assert all(len(found) == 1 for found in parts.values())
        own = [classes[i] for i in order] if classes else None
        assert fold_splits([groups[i] for i in order], folds, fold, own, seed) == [splits[i] for i in order]


@given(kinds=st.lists(st.integers(0, 4), min_size=3, max_size=40), seed=st.integers(0, 3))
def test_a_stratified_split_gives_every_split_a_class_that_enough_groups_hold(kinds: list[int], seed: int) -> None:
    groups, classes = [f"g{i}" for i in range(len(kinds))], [{kind} - {0} for kind in kinds]
    splits = split_by_group(groups, SCARCE_FIRST, classes, seed)
    assert set(splits) == {"train", "val", "test"}
    for kind in set(kinds) - {0}:
        held = {split for split, own in zip(splits, kinds, strict=True) if own == kind}
        assert len(held) == min(3, kinds.count(kind))


def test_a_class_of_two_groups_is_trained_on_and_tested() -> None:
    groups, classes = [f"g{i}" for i in range(30)], [{1} if i in (3, 17) else {2} for i in range(30)]
    splits = split_by_group(groups, SCARCE_FIRST, classes)
    assert {splits[3], splits[17]} == {"train", "test"}
    assert starved(splits, classes, groups, ["ground", "dent", "pore"]) == ["no val image holds dent (2 groups in all)"]
    assert abs(splits.count("train") - 18) <= 1


def test_folds_and_stratified_splits_are_the_same_on_every_machine_and_day() -> None:
    groups, classes = [f"part{i}" for i in range(20)], [{1 + i % 3} for i in range(20)]
    assert "".join(folds_by_group(groups, 4)) == FOLDS
    assert "".join(split[1] for split in split_by_group(groups, SCARCE_FIRST, classes)) == STRATIFIED
    assert split_by_group(groups, seed=1) != split_by_group(groups, seed=0) == split_by_group(groups)


FOLDS = "11241414342324313232"
STRATIFIED = "arraaarrerrreereerrr"


def test_more_folds_than_groups_are_an_error() -> None:
    with pytest.raises(DataError, match="at least 3 groups"):
        folds_by_group(["a", "a", "b"], 3)


@pytest.mark.parametrize("text", ["own", "group", "image:3", "stratified:5/2", "a#b/ö:x.csv", "f.csv#0a1b2c3d:4/4"])
def test_a_choice_of_split_is_read_as_it_is_written(text: str) -> None:
    assert str(SplitChoice.parse(text)) == text


@pytest.mark.parametrize("text", ["", "grup", "own:3", "group:1", "group:3/4", "group:3/0", "group:x", "mine.txt"])
def test_what_is_no_choice_of_split_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not a split"):
        SplitChoice.parse(text)


def test_a_fold_beyond_the_last_is_told_which_there_are() -> None:
    with pytest.raises(DataError, match=r"no fold 9 of 3\.\n  wanted  group:3/1 to group:3/3, or group:3 for all"):
        SplitChoice.parse("group:3/9")


# ---- groups from a pattern -------------------------------------------------------------------------------------------


def set_of(*ids: str) -> DataSet:
    samples = tuple(Sample(name, Path(name), name) for name in ids)
    return DataSet("set", Path("set"), ("ground", "x"), samples, ("semseg",), lambda s, size: Target(None, None))


@pytest.mark.parametrize(
    ("pattern", "groups", "alone"),
    [
        (r"(C\d+)_", ["C1", "C1", "C2", "d.png"], 1),
        (r"C\d+_", ["C1_", "C1_", "C2_", "d.png"], 1),
        (r"_(a)?", ["a", "a", "C2_b.png", "d.png"], 2),
        (r".*", ["C1_a.png", "C1_a2.png", "C2_b.png", "d.png"], 0),
    ],
)
def test_groups_are_what_a_pattern_finds_in_the_ids(pattern: str, groups: list[str], alone: int) -> None:
    data = regroup(set_of("C1_a.png", "C1_a2.png", "C2_b.png", "d.png"), pattern)
    assert [sample.group for sample in data.samples] == groups
    (note,) = data.notes
    assert (f"{alone} of 4 images do not match and are groups of their own: " in note) == bool(alone)


@pytest.mark.parametrize(
    ("pattern", "said"), [("(C", "no regular expression: missing"), ("Z", "matches no image of set")]
)
def test_a_pattern_that_gives_no_groups_is_an_error(pattern: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        regroup(set_of("C1_a.png"), pattern)


def test_groups_from_a_pattern_show_the_leak_of_an_official_split(tmp_path: Path) -> None:
    write_set(tmp_path, 6)
    rows = [f"part0{i}.png,{split}" for i, split in enumerate(["train", "train", "val", "val", "test", "test"])]
    (tmp_path / "samples.csv").write_text("image,split\n" + "\n".join(rows))
    assert not any("leak" in note for note in read_data("set", tmp_path).notes)
    data = read_data("set", tmp_path, group_from=r"(part0)[12]")
    assert any("its own split leaks: 1 of 5 groups" in note for note in data.notes)


# ---- the file --------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip)
texts = texts.filter(bool)  # blanks around a cell are no part of it


@settings(max_examples=60)
@given(
    places=st.dictionaries(texts, st.tuples(texts, st.sampled_from(["train", "val", "test"])), min_size=2, max_size=12),
    data=st.data(),
)
def test_a_split_file_is_read_as_it_was_written(
    places: dict[str, tuple[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = list(places)
    places = {**places, ids[0]: (places[ids[0]][0], "train"), ids[1]: (places[ids[1]][0], "test")}
    path, other = (tmp_path_factory.mktemp("file") / "split.csv" for _ in range(2))
    write_split_file(path, ids, *zip(*places.values(), strict=True))
    file = read_split_file(path)
    assert file.places == places and file.folds == 0
    assert file.placed(ids, [""] * len(ids)) == tuple(map(list, zip(*places.values(), strict=True)))
    shuffled = data.draw(st.permutations(ids))
    write_split_file(other, shuffled, *zip(*(places[name] for name in shuffled), strict=True))
    assert read_split_file(other).digest == file.digest


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_what_spreadsheets_write_is_read(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "split.csv"
    rows = [["split", "id", "note", "group"], ["train", "ä.png", "mine", ""], ["test ", "b.png", "", "p"]]
    path.write_bytes(("\ufeff" + "\r\n".join(mark.join(row) for row in rows) + "\r\n").encode())
    file = read_split_file(path)
    assert file.placed(["b.png", "ä.png"], ["q", "r"]) == (["p", "r"], ["test", "train"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,group\na,g\n", "is no split file"),
        ("id,group,split\n", "is no split file"),
        ("id,split\na,train\na,test\n", "image 2: a is there twice"),
        ("id,split\na,train\n,test\n", "image 2: it has no id"),
        ("id,split\na,train\nb,tset\n", "names the splits tset. Did you mean test"),
        ("id,split\na,train\nb\n", r"row 3 can't be read. wanted: id, split"),
        ("id,split\na,train\nb,\n", r"names the splits \(empty\)"),
        ("id,split\na,1\nb,test\n", "names the splits 1"),
        ("id,split\na,val\nb,test\n", "no image into the split train"),
        ("id,split\na,train\nb,val\n", "no image into the split test"),
        ("id,split\na,1\nb,3\n", "no image into the fold 2"),
        ("id,split\na,1\nb,1\n", "no image into the fold 2"),
    ],
)
def test_a_split_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_split_file(path)


def test_a_split_file_must_list_the_images_that_are_there() -> None:
    file = SplitFile(Path("split.csv"), {"a": ("", "train"), "b": ("", "test"), "x": ("", "val")}, 0)
    with pytest.raises(DataError) as caught:
        file.placed(["a", "b", "c", "d"], list("abcd"))
    assert "2 images that the file does not list: c, d" in str(caught.value)
    assert "1 image that it lists and the set lacks: x" in str(caught.value)


def test_another_split_is_not_told_what_the_own_one_lacks(tmp_path: Path) -> None:
    places = {name: ("", "val" if name == "c" else "train") for name in "abc"}
    path = tmp_path / "a.h5"
    own = complete_splits(pin(set_of(*"abc"), SplitFile(Path("mine.csv"), places, 0)))
    assert [note.split(",")[0].split(":")[0] for note in own.notes] == [
        "the set has the splits train and val only", "validation was carved from train by group"
    ]  # fmt: skip
    assert create_file(path, recipe_of(), replace(data_info(), notes=own.notes), rows_of(4), {})
    with CacheWriter(path) as writer:
        writer.write(0, random_maps(recipe_of(), 4))
    assert notes_of(opened(path), "semseg", SplitChoice("own"))[:2] == list(own.notes)
    assert not set(own.notes) & set(notes_of(opened(path), "semseg", SplitChoice("image")))


def test_a_file_that_leaks_is_used_and_told_and_one_without_val_gets_it_from_train() -> None:
    places = {name: ("p" if name in "ab" else "", "test" if name in "ag" else "train") for name in "abcdefg"}
    data = complete_splits(pin(set_of(*"abcdefg"), SplitFile(Path("mine.csv"), places, 0)), "the split of mine.csv")
    assert [sample.id for sample in data.in_split("test")] == ["a", "g"] and data.in_split("val")
    assert any("the split of mine.csv leaks: 1 of 6 groups" in note for note in data.notes)


# ---- a set, its file, its caches -------------------------------------------------------------------------------------

BRIEF = TrainRecipe(iterations=3, batch_size=4, lr=2e-3, evaluations=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a generated set of nine parts and its cache under a stand-in for a network."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    make_generated("surface", workspace.data / "surface", images=36, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    return workspace


@pytest.fixture
def space(made: Workspace, tmp_path: Path) -> Workspace:
    """The same, to be changed."""
    shutil.copytree(made.root, tmp_path / "space")
    return Workspace(tmp_path / "space")


def cache_of(workspace: Workspace) -> Any:
    (path,) = workspace.cache_files()
    return opened(path)


def brief(split: str, **more: Any) -> ProbeOptions:
    return ProbeOptions(**{"recipe": BRIEF, "seeds": 1, "quiet": True, "split": split} | more)


@pytest.mark.parametrize("split", ["own", "group", "stratified", "image"])
def test_a_written_split_is_the_one_that_probing_takes(made: Workspace, tmp_path: Path, split: str) -> None:
    out = tmp_path / "split.csv"
    report = write_split(made.data_set("surface"), out, SplitChoice.parse(split))
    cache = cache_of(made)
    wanted = Partition(cache, SplitChoice(split)).rows
    assert {name: len(rows) for name, rows in wanted.items()} == report.images
    (pinned,) = single_splits(SplitChoice.parse(str(out)))
    assert str(pinned) == f"{out}#{read_split_file(out).digest}"
    found = Partition(cache, pinned).rows
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    held = {c: sum(c in classes_of(cache)[r] for r in wanted["test"].tolist()) for c in range(1, 4)}
    assert [*report.holders["test"].values()] == [*held.values()][: len(report.holders["test"])]


def test_written_folds_are_the_ones_that_probing_takes(made: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "folds.csv"
    report = write_split(made.data_set("surface"), out, SplitChoice.parse("group:3"))
    assert list(report.images) == ["1", "2", "3"]
    cache = cache_of(made)
    every = zip(*(single_splits(SplitChoice.parse(text)) for text in (str(out), "group:3")), strict=True)
    for pinned, plain in every:
        found, wanted = Partition(cache, pinned).rows, Partition(cache, plain).rows
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_file_is_never_written_over(made: Workspace, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("mine")
    with pytest.raises(DataError, match=r"is there already. Nothing was changed"):
        write_split(made.data_set("surface"), tmp_path / "split.csv", SplitChoice.parse("own"))
    assert (tmp_path / "split.csv").read_text() == "mine"


def edited(path: Path, change: Callable[[list[str]], list[str]]) -> Path:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    return path


def test_probing_on_a_file_scores_its_test_images_in_its_groups(space: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "split.csv"
    write_split(space.data_set("surface"), out, SplitChoice.parse("group"))

    def regrouped(lines: list[str]) -> list[str]:
        rows = [line.split(",") for line in lines]
        return [",".join([name, "one" if split == "test" else group, split]) for name, group, split in rows]

    edited(out, regrouped)
    (row,) = probe(space, options=brief(str(out))).rows
    scores = np.load(space.probes / row["folder"] / "scores.npz")
    assert set(scores["groups"].tolist()) == {"one"}
    assert set(scores["ids"].tolist()) == {n for n, place in read_split_file(out).places.items() if place[1] == "test"}
    assert row["split"] == f"{out}#{read_split_file(out).digest}" and row["groups"]["test"] == 1
    moved = tmp_path / "elsewhere" / "other.csv"
    moved.parent.mkdir()
    moved.write_bytes(out.read_bytes())
    (again,) = probe(space, options=brief(str(moved))).rows
    assert (again["recipe_key"], again["folder"]) == (row["recipe_key"], row["folder"]), "the same split, wherever"
    assert len(compare(space, quiet=True).sets) == 1
    first = next(i for i, line in enumerate(out.read_text().splitlines()) if line.endswith(",one,test"))
    edited(out, lambda lines: [line.replace(",test", ",train") if i == first else line for i, line in enumerate(lines)])
    with pytest.raises(DataError, match="says something else than it did"):
        _ = Partition(cache_of(space), SplitChoice.parse(row["split"])).rows
    now = SplitChoice.parse(str(out))
    assert any("the split of split.csv leaks: 1 of" in note for note in split_notes(cache_of(space), now))


def test_a_class_that_a_split_lacks_is_told(space: Workspace, tmp_path: Path) -> None:
    out, cache = tmp_path / "split.csv", cache_of(space)
    held = {row.id: own for row, own in zip(cache.rows, classes_of(cache), strict=True)}
    bare = [name for name, own in held.items() if 1 not in own]
    rest = [name for name in held if name not in bare]
    splits = ["test" if name in bare else "val" if name in rest[:2] else "train" for name in held]
    write_split_file(out, list(held), list(held), splits)
    notes = split_notes(cache, SplitChoice.parse(str(out)))
    assert any(note.startswith(f"no test image holds {cache.data.classes[1]} (") for note in notes)


def test_extracting_with_another_split_or_groups_copies_the_features(tmp_path: Path, monkeypatch: Any) -> None:
    workspace = Workspace(tmp_path)
    data = write_set(tmp_path / "set", 12)
    (tmp_path / "featprobe.toml").write_text('[data.parts]\npath = "set"\nsplit_file = "mine.csv"\n')
    first = extract_into(tmp_path, data)
    assert first.computed == 12
    out = tmp_path / "mine.csv"
    write_split(workspace.data_set(str(data)), out, SplitChoice.parse("group"), seed=7)
    computed = spy_on_writes(monkeypatch)
    pinned = workspace.data_set(str(data), split_file=str(out))
    report = extract_with(workspace, PoolingBackbone(), pinned, options(), CPU)
    assert (report.computed, report.copied, len(computed)) == (0, 12, 12), "copied rows are written, none is computed"
    assert {row.id: row.split for row in opened(report.path).rows} == {
        name: split for name, (_, split) in read_split_file(out).places.items()
    }
    named = Workspace(tmp_path).data_set("parts")
    assert [(s.id, s.split) for s in named.samples] == [(s.id, s.split) for s in pinned.samples]
    grouped = workspace.data_set(str(data), group_from=r"(\d)\.png")
    again = extract_with(workspace, PoolingBackbone(), grouped, options(), CPU)
    assert again.copied == 12
    assert {row.group for row in opened(again.path).rows} == set("0123456789")


# ---- cross-validation ------------------------------------------------------------------------------------------------


def test_all_folds_are_one_test_set_of_a_comparison(space: Workspace) -> None:
    report = probe(space, options=brief("group:3", seeds=2))
    assert [(row["fold"], row["seed"]) for row in report.rows] == [(f, s) for f in (1, 2, 3) for s in (0, 1)]
    assert len({row["recipe_key"] for row in report.rows}) == 1 and len({row["folder"] for row in report.rows}) == 6
    (one,) = compare(space, quiet=True).sets
    (line,) = one.lines
    kept = [np.load(space.probes / row["folder"] / "scores.npz") for row in report.rows]
    by_hand = [iou_scores(sum(k["confusion"].sum(0) for k in kept[seed::2])).miou_foreground for seed in (0, 1)]
    assert line["miou_foreground"] == pytest.approx(np.mean(by_hand), abs=1e-12)
    cache = cache_of(space)
    assert sorted(name for k in kept[::2] for name in k["ids"].tolist()) == sorted(row.id for row in cache.rows)
    assert line["test_images"] == len(cache) and line["groups"] == len({row.group for row in cache.rows})
    assert line["seeds"] == 2 and "3 folds, split by group" in one.title and "--split group:3 " in f"{one.commands[1]} "


def test_another_version_of_a_set_has_heads_of_its_own_and_commands_say_how_it_was_read(tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 12)
    workspace = Workspace(tmp_path / "space")
    for pattern in (None, r"(\d)\.png"):
        named = workspace.data_set(str(data), group_from=pattern)
        extract_with(workspace, PoolingBackbone(), named, options(group_from=pattern), CPU)
        probe(workspace, options=brief("own"))
    rows, _ = read_rows(workspace.probes / "results.jsonl")
    assert len({row["folder"] for row in rows}) == 2 and len({row["recipe_key"] for row in rows}) == 1
    cards = [read_card(workspace.probes / row["folder"]) for row in rows]
    said = [commands_of(card, [0], str(data))[0] for card in cards]
    assert "--group-from" not in said[0] and "--group-from '(\\d)\\.png'" in said[1]


def test_one_partition_of_several_names_is_one_table_as_long_as_a_cache_tells(tmp_path: Path) -> None:
    """A set whose images are groups of their own and that names no splits: its own, by group and by image are one."""
    data = write_set(tmp_path / "parts", 12)
    workspace = Workspace(tmp_path / "space")
    extract_with(workspace, PoolingBackbone(), workspace.data_set(str(data)), options(), CPU)
    ids, groups = zip(*((row.id, row.group) for row in cache_of(workspace).rows), strict=True)
    placed = split_by_group(groups)
    write_split_file(tmp_path / "same.csv", ids, groups, placed)
    moved = [{"train": "val", "val": "train"}.get(split, split) for split in placed]  # the same test images
    write_split_file(tmp_path / "other.csv", ids, groups, moved)
    for split in ("own", "group", "image", str(tmp_path / "same.csv"), str(tmp_path / "other.csv")):
        probe(workspace, options=brief(split))
    one, other = sorted(compare(workspace, quiet=True).sets, key=lambda item: -len(item.lines))
    assert [line["split"].partition("#")[0] for line in one.lines] == [
        str(tmp_path / "same.csv"), "group", "image", "own",
    ]  # fmt: skip
    assert "also" in one.title and "its own split" in one.title and len(other.lines) == 1
    assert other.lines[0]["split"].startswith(str(tmp_path / "other.csv"))
    assert sum(line["chosen"] for line in one.lines) == 1
    cache_of(workspace).path.unlink()
    assert len(compare(workspace, quiet=True).sets) == 5


def test_folds_that_are_missing_make_a_cross_validation_unusable(space: Workspace) -> None:
    probe(space, options=brief("group"))
    report = probe(space, options=brief("group:3/2"))
    assert any("fold 2 of 3 alone" in note for note in report.notes)
    compared = compare(space, quiet=True)
    assert [one.title for one in compared.sets] == ["surface, semseg, split by group"]
    (unusable,) = compared.unusable
    assert "needs all 3 folds; without a usable result: 1, 3" in unusable.reason
    probe(space, options=brief("group:3/1"))
    probe(space, options=brief("group:3/3"))
    assert len(compare(space, quiet=True).sets) == 2


def test_each_fold_has_its_own_counterpart(space: Workspace) -> None:
    probe(space, options=brief("group:3"))
    found, _ = missing_counterparts(space, ProbeOptions(tuning=Tuning()))
    assert sorted(one.options.split for one in found) == ["group:3/1", "group:3/2", "group:3/3"]


def test_objects_of_several_heads_are_ranked_as_one_test_set(space: Workspace) -> None:
    (row,) = probe(space, "detect", options=brief("own", width=16)).rows
    whole = ObjectTest.read(space.probes / row["folder"], {})
    assert whole.predictions and whole.truth["annotations"]
    parts = []
    for own in (whole.truth["images"][::2], whole.truth["images"][1::2]):
        ids = {image["id"] for image in own}
        objects = [a for a in whole.truth["annotations"] if a["image_id"] in ids]
        objects = [{**a, "id": number} for number, a in enumerate(objects, start=1)]
        parts.append(ObjectTest({**whole.truth, "images": own, "annotations": objects},
                                [p for p in whole.predictions if p["image_id"] in ids]))  # fmt: skip
    joined = ObjectTest.joined(parts)
    assert sorted(joined.ids) == sorted(whole.ids)
    assert joined.scores(ResultRow.from_json(row))["box"]["ap"] == pytest.approx(
        average_precision(whole.truth, whole.predictions, "bbox").ap
    )
    results, _, _ = load_results(space.probes)
    assert results[0].row.test["box"]["ap"] == row["test"]["box"]["ap"]


def test_detection_in_folds_is_compared(space: Workspace) -> None:
    rows = probe(space, "detect", options=brief("stratified:2", width=16)).rows
    (one,) = compare(space, quiet=True).sets
    parts = [ObjectTest.read(space.probes / row["folder"], {}) for row in rows]
    scores = ObjectTest.joined(parts).scores(ResultRow.from_json(rows[0]))
    assert one.lines[0]["box_ap50"] == pytest.approx(scores["box"]["ap50"])
    assert one.lines[0]["test_images"] == len(cache_of(space))


# ---- the commands ----------------------------------------------------------------------------------------------------


def call(workspace: Workspace, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["--workspace", str(workspace.root), *arguments], prog_name="featprobe")


def test_a_split_is_written_edited_and_used_from_the_command_line(space: Workspace, tmp_path: Path) -> None:
    out = str(tmp_path / "split.csv")
    written = call(space, "data", "split", "surface", "--out", out, "--split", "stratified", "--seed", "3")
    assert written.exit_code == 0 and f"--split {out}" in written.stdout, written.output
    assert json.loads(call(space, "data", "info", "surface", "--split-file", out, "--json").stdout)["images"] == {
        split: sum(place[1] == split for place in read_split_file(Path(out)).places.values())
        for split in ("train", "val", "test")
    }
    used = call(space, "probe", "--split", out, "--head", "ridge", "--quiet")
    assert used.exit_code == 0 and f"split of {out}" in used.stdout, used.output
    (row,), _ = read_rows(space.probes / "results.jsonl")
    again = call(space, "probe", "--split", row["split"], "--head", "ridge", "--quiet", "--json")
    assert json.loads(again.stdout)[0]["test"] == row["test"]
    for wrong in (("--split", "own:3"), ("--split", "nowhere.csv")):
        refused = call(space, "probe", *wrong)
        assert refused.exit_code == 2 and refused.stderr.startswith("featprobe: ") and "Traceback" not in refused.stderr
    groups = json.loads(call(space, "data", "info", "surface", "--group-from", "part", "--json").stdout)
    assert sum(groups["groups"].values()) == 3


def test_a_study_runs_every_fold(made: Workspace) -> None:
    from featprobe.stages.study.study import Study, cells_of

    cells = cells_of(Study(("surface",), ("pooling",), regimes=("frozen",), seeds=2, split="group:3"), made)
    assert [(str(cell.split), cell.seed) for cell in cells] == [(f"group:3/{f}", s) for s in (0, 1) for f in (1, 2, 3)]
    with pytest.raises(FeatprobeError):
        cells_of(Study(("surface",), ("pooling",), split="grup"), made)


@pytest.mark.parametrize("name", ["dir#1/x.csv", "X.CSV", "a.csv#b.csv"])
def test_a_split_files_path_may_hold_the_mark_of_a_digest(name: str) -> None:
    plain, pinned = SplitChoice.parse(name), SplitChoice.parse(f"{name}#0a1b2c3d:5/2")
    assert (plain.file, plain.pinned) == (name, "") and (pinned.file, pinned.pinned) == (name, "0a1b2c3d")
