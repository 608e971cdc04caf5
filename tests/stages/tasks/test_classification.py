"""Labels of images: from a cache or from images to rows, pictures and files; what is decided; bad input."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PoolingBackbone
from helpers import extract as extract_into
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from featprobe import kinds
from featprobe.errors import CacheError, ProbeError
from featprobe.image_labels import LabelNames
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.metrics.images import ScoredImages, decide, image_scores
from featprobe.probes import load_head
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.partition import Partition
from featprobe.stages.predict import predict
from featprobe.stages.row_images import images_of
from featprobe.stages.tasks.classification import balanced, label_text, labels_seen, probabilities_of
from featprobe.stages.training.finetune import finetune, missing_counterparts
from featprobe.stages.training.prepared import prepare, source_of, trials_of
from featprobe.stages.training.probe import checked, find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace, make_generated

SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
NAMES = ("crack", "dent", "ok")
FEW = TrainRecipe(iterations=4, batch_size=4, evaluations=2)
HEADS = [name for task, name in KINDS if SCORES[task].on == "images"]
TASK = next(task for task in SCORES if SCORES[task].on == "images")


def picture(kind: str, rng: np.random.Generator) -> Image.Image:
    """Grey noise; with a dark line, a bright spot, or neither."""
    pixels = rng.normal(128, 12, (48, 48))
    if kind == "crack":
        pixels[rng.integers(8, 40), :] = 10
    if kind == "dent":
        y, x = rng.integers(4, 34, 2)
        pixels[y : y + 10, x : x + 10] = 245
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def class_folders(root: Path, counts: dict[str, int] | None = None, kinds: tuple[str, ...] = NAMES) -> Path:
    """{train,val,test}/CLASS/NAME.png; so many of each class."""
    rng = np.random.default_rng(3)
    for split, count in (counts or {"train": 8, "val": 6, "test": 6}).items():
        for kind in kinds:
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                picture(kind, rng).save(root / split / kind / f"{split}_{kind}{i}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A cache of folders of classes under a real network, which `predict` and `finetune` can load."""
    workspace = Workspace(tmp_path_factory.mktemp("folders"))
    data = class_folders(workspace.root / "parts")
    extract(workspace, SPEC, str(data), ExtractOptions(batch_size=6, dtype="fp32", quiet=True, device="cpu"))
    return workspace


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A cache of a set with masks of several classes, under a stand-in for a network."""
    workspace = Workspace(tmp_path_factory.mktemp("masks"))
    make_generated("surface", workspace.data / "surface", images=60, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    return workspace


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same in tiles, under a real network."""
    workspace = Workspace(tmp_path_factory.mktemp("tiles"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    options = ExtractOptions(tile=32, overlap=0, batch_size=8, dtype="fp32", quiet=True, device="cpu")
    extract(workspace, SPEC, "surface", options)
    return workspace


def brief(**changed: Any) -> ProbeOptions:
    return ProbeOptions(**{"seeds": 1, "quiet": True, "device": "cpu"} | changed)


def scored(workspace: Workspace, row: dict[str, Any]) -> ScoredImages:
    with np.load(workspace.probes / row["folder"] / "scores.npz") as found:
        return ScoredImages.from_arrays(dict(found))


# ---- from a cache to files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_head_goes_from_a_cache_to_a_row_a_sheet_and_labels_of_new_images(
    head: str, folders: Workspace, tmp_path: Path
) -> None:
    report = probe(folders, TASK, options=brief(head=head, show=3))
    (row,) = report.rows
    assert row["classes"] == list(NAMES) and row["train_counts"] == dict.fromkeys(NAMES, 8)
    assert row["weights_from"] == "closed form" and row["solution"]["tried"] > 1
    kept = scored(folders, row)
    assert image_scores(kept, NAMES) == row["test"]
    assert row["test"]["auroc"] > 0.8, "a line and a spot are easy to see"
    (sheet,) = report.sheets
    with Image.open(sheet) as shown:
        assert shown.height > 3 * 256
    tested = folders.root / "parts" / "test"
    predict(folders.probes / row["folder"], [tested], tmp_path / "found", quiet=True)
    with (tmp_path / "found" / "labels.csv").open(newline="") as lines:
        found = {Path(line["image"]).stem: line for line in csv.DictReader(lines)}
    assert len(found) == 18 == len(list((tmp_path / "found" / "overlays").rglob("*.png")))
    said = np.array([[float(found[Path(i).stem][f"probability of {n}"]) for n in NAMES] for i in kept.ids])
    assert said == pytest.approx(kept.probabilities, abs=2e-3)
    labels = [found[Path(i).stem]["labels"] for i in kept.ids]
    assert labels == [NAMES[own.argmax()] for own in kept.decided], "predict says what the row was scored on"


def test_the_threshold_of_a_saved_head_is_the_one_that_its_row_was_scored_at(
    folders: Workspace, tmp_path: Path
) -> None:
    (row,) = probe(folders, TASK, options=brief(labels="defect", false_calls=0.2)).rows
    head, _ = load_head(folders.probes / row["folder"])
    kept = scored(folders, row)
    assert np.isfinite(float(head.threshold)) and set(kept.thresholds) == {float(head.threshold)}
    predict(folders.probes / row["folder"], [folders.root / "parts" / "test"], tmp_path / "found", quiet=True)
    with (tmp_path / "found" / "labels.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    called = {Path(line["image"]).stem: line["verdict"] == "called" for line in found}
    assert {line["threshold"] for line in found} == {f"{float(head.threshold):.6f}"}
    assert kept.called is not None
    assert [called[Path(i).stem] for i in kept.ids] == kept.called.tolist()
    assert row["settings"] == {"unit": "image", "false_calls": 0.2, "labels": "defect", **unsaid(row)}


def unsaid(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None for name, value in row["settings"].items() if value is None}


def test_classes_of_masks_become_several_labels_of_an_image(masks: Workspace) -> None:
    (row,) = probe(masks, TASK, options=brief(labels="classes")).rows
    (cache,), _ = find_caches(masks, TASK, (), ())
    kept = scored(masks, row)
    assert row["classes"] == list(cache.data.classes[1:]) and kept.multi and kept.truth.sum(1).max() > 1
    image = {cache.images.texts["id"][i]: i for i in range(len(cache.images))}
    for name, own in zip(kept.ids, kept.truth, strict=True):
        held = set(np.unique(cache.image_semantic(image[name])).tolist()) - {0, 255}
        assert held == set((1 + np.flatnonzero(own)).tolist())


def test_parts_of_the_training_split_and_seeds(masks: Workspace) -> None:
    rows = probe(masks, TASK, options=brief(labels="defect", fractions=(0.5, 1.0), seeds=2)).rows
    assert [(row["fraction"], row["seed"]) for row in rows] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    half, whole = rows[0], rows[-1]
    assert sum(half["train_counts"].values()) == pytest.approx(0.5 * sum(whole["train_counts"].values()), abs=2)
    folds = probe(masks, TASK, options=brief(labels="defect", split="group:3")).rows
    assert [row["fold"] for row in folds] == [1, 2, 3]


def test_tiles_get_labels_of_their_own(tiles: Workspace, tmp_path: Path) -> None:
    options = brief(labels="defect", unit="tile", show=2, split="group")
    report = probe(tiles, TASK, options=options)
    (row,) = report.rows
    kept = scored(tiles, row)
    assert len(kept.ids) == 4 * row["images"]["test"] and report.sheets[0].is_file()
    whole = probe(tiles, TASK, options=replace(options, unit="image", show=0)).rows[0]
    assert len(scored(tiles, whole).ids) == row["images"]["test"]
    (cache,), _ = find_caches(tiles, TASK, (), ())
    test = images_of(cache, Partition(cache, options.choice).rows["test"])
    paths = [Path(cache.data.root) / cache.images.texts["image"][i] for i in test.tolist()]
    for one, wanted in ((row, kept), (whole, scored(tiles, whole))):
        out = tmp_path / one["folder"]
        predict(tiles.probes / one["folder"], paths, out, quiet=True)
        with (out / "labels.csv").open(newline="") as lines:
            found = [float(line["score of a defect"]) for line in csv.DictReader(lines)]
        assert sorted(found) == pytest.approx(sorted(wanted.probabilities[:, 1].tolist()), abs=2e-3)


# ---- with a live backbone --------------------------------------------------------------------------------------------


def test_a_live_backbone_that_stays_as_it_is_scores_heads_as_its_cache_does(folders: Workspace) -> None:
    (cache,), _ = find_caches(folders, TASK, (), ())
    found = []
    for tuning in (None, Tuning(regime="frozen-online", augment=False)):
        options = checked(TASK, brief(tuning=tuning, recipe=FEW))
        prepared = prepare(Training(folders, Partition(cache, options.choice), TASK, options, (0,)))
        (trial,) = trials_of(prepared)
        with source_of(prepared, trial.head) as source:
            if tuning is None:
                assert prepared.solver is not None
                rows = prepared.rows
                prepared.solver(trial.head, 0, source.batches, rows["train"], rows["val"])
                state = {name: value.clone() for name, value in trial.head.state_dict().items()}
            trial.head.load_state_dict(state)
            found.append(prepared.evaluate([trial.head], source, prepared.rows["test"])[0])
    assert found[0].brief == pytest.approx(found[1].brief, abs=1e-3, nan_ok=True)


def test_who_asks_for_another_task_reads_which_ones_the_same_command_serves(folders: Workspace) -> None:
    with pytest.raises(ProbeError, match=r"featprobe finetune --task classify$"):
        finetune(folders, "semseg", options=ProbeOptions(tuning=Tuning(), quiet=True))
    with pytest.raises(ProbeError, match=r"featprobe probe --task classify \| anomaly$"):
        probe(folders, "semseg", options=ProbeOptions(quiet=True))


def test_the_same_head_is_fine_tuned_with_its_backbone(folders: Workspace, tmp_path: Path) -> None:
    (row,) = finetune(folders, TASK, options=brief(tuning=Tuning(), recipe=FEW, show=1)).rows
    assert row["regime"] == "full" and row["backbone_parameters"] > 7e4 and "solution" not in row
    assert row["weights_from"] == "best validation" and np.isfinite(row["test"]["auroc"])
    kept = scored(folders, row)
    predict(folders.probes / row["folder"], [folders.root / "parts" / "test"], tmp_path / "found", quiet=True)
    with (tmp_path / "found" / "labels.csv").open(newline="") as lines:
        found = {Path(line["image"]).stem: line["labels"] for line in csv.DictReader(lines)}
    assert [found[Path(i).stem] for i in kept.ids] == [NAMES[own.argmax()] for own in kept.decided]


def test_a_frozen_result_has_a_counterpart_that_starts_where_the_set_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head begins at the mean, the scale and the prior of the cache's training images."""
    workspace = Workspace(tmp_path)
    data = class_folders(tmp_path / "parts", {"train": 4, "val": 3, "test": 3})
    extract(workspace, SPEC, str(data), ExtractOptions(batch_size=6, dtype="fp32", quiet=True, device="cpu"))
    (frozen,) = probe(workspace, TASK, options=brief()).rows
    monkeypatch.setitem(kinds._kinds, (TASK, "linear"), replace(KINDS[TASK, "linear"], recipe=FEW))
    (full,) = finetune(workspace, options=ProbeOptions(tuning=Tuning(), quiet=True, device="cpu")).rows
    assert (full["regime"], full["head"], full["settings"]) == ("full", frozen["head"], frozen["settings"])
    one, other = (load_head(workspace.probes / row["folder"])[0].state_dict() for row in (frozen, full))
    for name in ("mean", "scale", "prior"):
        assert one[name].numpy() == pytest.approx(other[name].numpy(), rel=1e-4, abs=1e-5), name


def test_a_head_that_goes_on_is_decided_by_the_prior_of_what_it_is_trained_on(folders: Workspace) -> None:
    (cache,), _ = find_caches(folders, TASK, (), ())
    options = checked(TASK, brief(tuning=Tuning(), recipe=FEW))
    prepared = prepare(Training(folders, Partition(cache, options.choice), TASK, options, (0,)))
    (trial,) = trials_of(prepared)
    trial.head.load_state_dict(dict(trial.head.state_dict(), prior=torch.tensor([0.9, 0.1, 0.0])))
    scale = trial.head.scale.clone().fill_(2.0)
    trial.head.scale.copy_(scale)
    prepared.task.start([trial.head], fresh=False)
    assert trial.head.prior.tolist() == pytest.approx([1 / 3] * 3) and torch.equal(trial.head.scale, scale)


def test_each_kind_of_labels_of_a_cache_has_its_counterpart(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    extract_into(tmp_path, workspace.data / "surface", PoolingBackbone())
    for labels in ("defect", "classes"):
        probe(workspace, TASK, options=brief(labels=labels))
    found, _ = missing_counterparts(workspace, ProbeOptions(tuning=Tuning()))
    assert [one.options.labels for one in found] == ["defect", "classes"]


# ---- what is decided -------------------------------------------------------------------------------------------------

SHARE = st.floats(0.0078125, 0.9921875, width=32)


@given(st.booleans(), arrays(np.float32, (5, 3), elements=SHARE), arrays(np.float32, 3, elements=SHARE))
def test_labels_are_decided_as_if_all_were_equally_frequent(multi: bool, shares: Any, prior: Any) -> None:
    names = LabelNames(("a", "b", "c"), multi=multi)
    if not multi:
        shares, prior = shares / shares.sum(1, keepdims=True), prior / prior.sum()
    said = decide(shares, prior, multi)
    even = balanced(shares, prior, names)
    if multi:
        sure = np.abs(shares - prior) > 1e-5
        assert (said[sure] == (shares >= prior)[sure]).all()
    else:
        assert (said.sum(1) == 1).all() and even.sum(1) == pytest.approx(1, abs=1e-5)
        ratio = shares / prior
        assert (ratio[np.arange(5), said.argmax(1)] >= ratio.max(1) * (1 - 1e-5)).all()


@pytest.mark.parametrize("multi", [False, True])
def test_a_label_that_no_training_image_has_is_never_found(multi: bool) -> None:
    shares = np.array([[0.2, 0.8], [0.9, 0.1]], dtype=np.float32)
    said = decide(shares, np.array([1.0, 0.0], dtype=np.float32), multi)
    assert said[:, 1].tolist() == [0, 0]


def test_logits_of_several_labels_do_not_exclude_each_other() -> None:
    logits = torch.tensor([[3.0, 3.0]])
    assert probabilities_of(logits, LabelNames(("a", "b"))).tolist() == [[0.5, 0.5]]
    assert (probabilities_of(logits, LabelNames(("a", "b"), multi=True)) > 0.9).all()


@pytest.mark.parametrize("multi", [False, True])
def test_a_view_that_leaves_the_defect_out_is_good(multi: bool) -> None:
    masks = torch.zeros((4, 6, 6), dtype=torch.uint8)
    masks[0, 1, 1] = 2
    masks[1, :3] = 255
    masks[2, :3], masks[2, 4] = 255, 1
    names = LabelNames(("crack", "dent"), multi=True) if multi else LabelNames(("good", "defect"), good="good")
    image = torch.tensor([[1, 1] if multi else [0, 1]], dtype=torch.uint8).expand(4, 2)
    found = labels_seen(masks, image, 3, names).tolist()
    assert found == ([[0, 1], [1, 1], [1, 0], [0, 0]] if multi else [[0, 1], [0, 1], [0, 1], [1, 0]])


def test_labels_of_augmented_views_follow_what_they_show(tiles: Workspace) -> None:
    (cache,), _ = find_caches(tiles, TASK, (), ())
    for labels in ("defect", "classes"):
        options = checked(TASK, brief(labels=labels, unit="tile", tuning=Tuning(), recipe=FEW, split="group"))
        prepared = prepare(Training(tiles, Partition(cache, options.choice), TASK, options, (0,)))
        row = int(prepared.rows["train"][0])
        mask, objects = prepared.task.truth_of(row)
        assert objects is None and mask is not None and np.array_equal(mask, cache.semantic(row))
        (done,) = finetune(tiles, TASK, options=brief(labels=labels, unit="tile", tuning=Tuning(), recipe=FEW)).rows
        assert done["regime"] == "full" and done["settings"]["unit"] == "tile"


def test_a_sheet_begins_with_the_worst_mistake(folders: Workspace) -> None:
    (cache,), _ = find_caches(folders, TASK, (), ())
    options = checked(TASK, brief())
    prepared = prepare(Training(folders, Partition(cache, options.choice), TASK, options, (0,)))
    (trial,) = trials_of(prepared)
    with source_of(prepared, trial.head) as source:
        assert prepared.solver is not None
        prepared.solver(trial.head, 0, source.batches, prepared.rows["train"], prepared.rows["val"])
        trial.head.bias.data[NAMES.index("ok")] += 100  # whatever is no ok is a mistake, the less it looks so the worse
        test = prepared.rows["test"]
        (first, *_) = prepared.task.shown(trial.head, source.batches, test, 3).tolist()
        truth = prepared.task.truth.values
    assert truth[first, NAMES.index("ok")] == 0


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_validation_could_not_choose_says_so(head: str, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "parts", {"train": 4, "val": 3, "test": 3})
    for kind in ("crack", "dent"):
        shutil.rmtree(data / "val" / kind)
    workspace = Workspace(tmp_path)
    extract(workspace, SPEC, str(data), ExtractOptions(batch_size=6, dtype="fp32", quiet=True, device="cpu"))
    report = probe(workspace, TASK, options=brief(head=head))
    assert report.rows[0]["val"]["auroc"] is None
    assert any("so it has no AUROC, and the head was not chosen by it" in note for note in report.notes)


def test_the_text_of_a_picture_gives_the_share_of_the_true_label_too() -> None:
    names = LabelNames(("blowhole", "break", "crack", "fray", "uneven"), multi=True)
    shares = np.array([0.03, 0.01, 0.21, 0.02, 0.28], np.float32)
    none, true = np.zeros(5, np.uint8), np.array([0, 1, 0, 0, 0], np.uint8)
    assert label_text(none, shares, names, true) == ("good", "(break 1%, uneven 28%, crack 21%)")
    assert label_text(none, shares, names) == ("good", "(uneven 28%, crack 21%, blowhole 3%)")
    three = np.array([1, 0, 1, 1, 0], np.uint8)
    assert label_text(three, shares, names, true)[1] == "(blowhole 3%, crack 21%, fray 2%, break 1%)"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"recipe": TrainRecipe(iterations=300, lr=1e-3, loss="dice")}, "--loss would change nothing"),
        ({"width": 64}, "--width would change nothing"),
        ({"pyramid": "simple"}, "--pyramid would change nothing"),
        ({"instances": "components"}, "--instances would change nothing"),
        ({"coreset": 0.1}, "--coreset would change nothing"),
        ({"remove_position": True}, "--remove-position would change nothing"),
        ({"absent": "zero"}, "--absent-classes would change nothing"),
        ({"lr": (0.1,)}, "it has no --lr"),
        ({"budget": "auto"}, "it has no iterations to look for"),
        ({"unit": "tile", "labels": "defect"}, "whole images, and no tiles"),
        ({}, "--labels defect"),
    ],
)
def test_what_means_nothing_for_labels_of_images_is_refused(
    options: dict[str, Any], wanted: str, masks: Workspace
) -> None:
    with pytest.raises(ProbeError, match=wanted):
        probe(masks, TASK, options=brief(**options))


@pytest.mark.parametrize("task", [task for task in SCORES if SCORES[task].dense or SCORES[task].objects])
@pytest.mark.parametrize("options", [{"labels": "defect"}, {"unit": "tile"}, {"false_calls": 0.1}])
def test_other_tasks_refuse_what_is_about_labels_of_images(
    task: str, options: dict[str, Any], masks: Workspace
) -> None:
    with pytest.raises(ProbeError, match="would change nothing"):
        probe(masks, task, options=brief(**options))


def test_a_set_without_masks_serves_no_task_of_pixels(folders: Workspace) -> None:
    with pytest.raises(ProbeError, match="labels of images") as raised:
        probe(folders, "semseg", options=brief())
    assert str(raised.value).endswith("--task classify | anomaly")
    with pytest.raises(ProbeError, match="no masks and no objects"):
        probe(folders, TASK, options=brief(labels="classes"))


def test_labels_of_images_are_none_of_tiles_and_images_of_tiles_are_not_fine_tuned(
    tmp_path: Path, tiles: Workspace
) -> None:
    data = class_folders(tmp_path / "parts", {"train": 2, "val": 2, "test": 2})
    extract_into(tmp_path / "space", data, tile=24)
    with pytest.raises(ProbeError, match="Omit --unit tile"):
        probe(Workspace(tmp_path / "space"), TASK, options=brief(unit="tile"))
    with pytest.raises(ProbeError, match="none is whole"):
        finetune(tiles, TASK, options=brief(tuning=Tuning(), recipe=FEW, labels="defect"))


def test_training_images_of_one_kind_are_refused(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "parts", {"train": 3, "val": 3, "test": 3})
    for split in ("train",):
        for kind in ("crack", "dent"):
            for path in (data / split / kind).iterdir():
                path.unlink()
    extract_into(tmp_path / "space", data)
    with pytest.raises(ProbeError, match="all of them ok") as raised:
        probe(Workspace(tmp_path / "space"), TASK, options=brief())
    assert "--task anomaly" in str(raised.value)


def table(root: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A table of labels, and its images, which look like their label."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for name, label, _ in rows:
        picture(label, rng).save(root / name)
    text = "".join(f"{name},{label},{split}\n" for name, label, split in rows)
    (root / "labels.csv").write_text(f"image,label,split\n{text}")
    return root


def test_few_good_validation_images_are_told_how_many_it_takes(tmp_path: Path) -> None:
    rows = [(f"{s}{k}{i}.png", k, s) for s in ("train", "val", "test") for k in ("ok", "crack") for i in range(4)]
    extract_into(tmp_path / "space", table(tmp_path / "parts", rows))
    report = probe(Workspace(tmp_path / "space"), TASK, options=brief())
    assert any("4 good validation images" in note and "takes 20, and 60" in note for note in report.notes)
    assert report.rows[0]["test"]["recall"] is not None
    report = probe(Workspace(tmp_path / "space"), TASK, options=brief(false_calls=0.25))
    assert any("12" in note for note in report.notes)


def test_where_nothing_is_known_of_good_images_there_is_no_recall(tmp_path: Path) -> None:
    rows = [(f"{s}{k}{i}.png", k, s) for s in ("train", "val", "test") for k in ("dent", "crack") for i in range(4)]
    extract_into(tmp_path / "space", table(tmp_path / "parts", rows))
    report = probe(Workspace(tmp_path / "space"), TASK, options=brief())
    (row,) = report.rows
    assert row["test"]["recall"] is None and any("no label says which images are good" in n for n in report.notes)
    assert row["test"]["auroc"] is not None


def test_a_cache_of_pooled_features_serves_labels_of_images_and_no_masks(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_generated("surface", workspace.data / "surface", images=60, size=(64, 64))
    extract_into(tmp_path, workspace.data / "surface", PoolingBackbone(), store="pooled")
    (row,) = probe(workspace, TASK, options=brief(labels="defect")).rows
    assert row["test"]["auroc"] is not None
    with pytest.raises(CacheError, match="pooled"):
        probe(workspace, "semseg", options=brief())
