"""Anomaly heads: fitted to good units alone, scored on units and pixels, drawn, saved, and applied to new images."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from helpers import CPU, PoolingBackbone, options
from numpy.typing import NDArray
from PIL import Image

from featprobe.cache import Cache, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.formats import read_data
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.image_labels import Unit
from featprobe.kinds import kinds_of
from featprobe.metrics.anomalies import ScoredAnomalies, aupro, pixel_auroc
from featprobe.metrics.defects.records import GOOD, NOTHING, Records
from featprobe.probes import load_head
from featprobe.probes.saved import read_card
from featprobe.scores import SCORES
from featprobe.stages import predictor as stage
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.image_truth import defect_regions, truth_of
from featprobe.stages.predict import predict
from featprobe.stages.recording.record_file import read_records
from featprobe.stages.tasks.seen import seen_on_maps
from featprobe.stages.tasks.settle import settled
from featprobe.stages.training import run as running
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import ProbeReport, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

SIZE = (40, 56)
SPLITS = ("train", "val", "test")
Pixels = NDArray[np.uint8]


def picture(random: np.random.Generator, spot: tuple[int, int] | None = None, size: tuple[int, int] = SIZE) -> Pixels:
    """Grey noise; with a bright spot of 8 x 8 pixels at (row, column) that has colours of its own."""
    pixels = random.integers(90, 130, (*size, 3), dtype=np.uint8)
    if spot is not None:
        pixels[spot[0] : spot[0] + 8, spot[1] : spot[1] + 8] = (250, 20, 240)
    return pixels


def write_pairs(
    root: Path, good: dict[str, int], defect: dict[str, int], ignored: dict[str, int] | None = None
) -> Path:
    """images/ and masks/ with a split file: so many good images, with a defect, and with an ignored region alone."""
    random = np.random.default_rng(5)
    lines = ["id,split,group"]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for kind, counts in (("good", good), ("defect", defect), ("ignored", ignored or {})):
        for split in SPLITS:
            for i in range(counts.get(split, 0)):
                name = f"{split}_{kind}{i:02}"
                spot = (8 * int(random.integers(0, 4)), 8 * int(random.integers(0, 6)))
                mask = np.zeros(SIZE, dtype=np.uint8)
                mask[spot[0] : spot[0] + 8, spot[1] : spot[1] + 8] = {"good": 0, "defect": 1, "ignored": 255}[kind]
                mask[-1, -1] = 255 if ignored and kind == "defect" else mask[-1, -1]  # so 255 is no class
                pixels = picture(random, spot if kind == "defect" else None)
                Image.fromarray(pixels).save(root / "images" / f"{name}.png")
                Image.fromarray(mask).save(root / "masks" / f"{name}.png")
                lines.append(f"images/{name}.png,{split},{name}")
    (root / "split.csv").write_text("\n".join(lines) + "\n")
    return root


def store(root: Path, name: str = "", **changed: Any) -> Workspace:
    """A workspace with a cache of root / "set", in its split; of another set where it has a name and a format."""
    name, _, format_name = name.partition(" ")
    file = None if name else root / "set" / "split.csv"
    data = read_data(name or "set", root / (name or "set"), format_name or "pairs", split_file=file)
    extract_with(Workspace(root), PoolingBackbone(), data, options(**changed), CPU)
    return Workspace(root)


def write_mvtec(root: Path) -> Path:
    """A category as MVTec AD has it: good images train, the others test."""
    random = np.random.default_rng(3)
    counts = {"train/good": 30, "test/good": 6, "test/spot": 6}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            spot = (8 * (i % 4), 8 * (i % 6)) if folder.endswith("spot") else None
            Image.fromarray(picture(random, spot)).save(root / folder / f"{i:03}.png")
            if spot:
                mask = np.zeros(SIZE, dtype=np.uint8)
                mask[spot[0] : spot[0] + 8, spot[1] : spot[1] + 8] = 255
                (root / "ground_truth" / "spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / "ground_truth" / "spot" / f"{i:03}_mask.png")
    return root


def run(workspace: Workspace, head: str = "patchcore", **changed: Any) -> ProbeReport:
    return probe(workspace, "anomaly", [], [], ProbeOptions(head=head, quiet=True, device="cpu", **changed))


def scored(workspace: Workspace, row: dict[str, Any]) -> ScoredAnomalies:
    with np.load(workspace.probes / row["folder"] / "scores.npz") as arrays:
        return ScoredAnomalies.from_arrays(dict(arrays))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a cache of 24 / 22 / 8 good images, and some with defects in each split."""
    root = tmp_path_factory.mktemp("parts")
    write_pairs(root / "set", {"train": 24, "val": 22, "test": 8}, {"train": 3, "val": 4, "test": 8})
    store(root, size=SIZE)
    return Workspace(root)


def cache_in(workspace: Workspace) -> Cache:
    (path,) = workspace.cache_files()
    return open_cache(path)


@pytest.mark.parametrize("head", kinds_of("anomaly"))
def test_a_head_of_good_images_finds_what_they_do_not_have(parts: Workspace, head: str) -> None:
    report = run(parts, head)
    row = report.rows[0]
    assert row["images"] == {"train": 24, "val": 26, "test": 16}
    assert row["train_counts"] == {"good": 24} and row["classes"] == ["good", "defect"]
    assert row["test"]["image_auroc"] == 1.0 and row["test"]["image_recall"] == 1.0
    assert row["test"]["confusion"][1] == [0, 8]
    assert any("24 good images" in note and "3 images with a defect are left aside" in note for note in report.notes)
    if head == "knn":
        assert row["test"]["pixel_auroc"] is None and row["test"]["aupro"] is None
        assert not any("AUPRO" in own for own in SCORES["anomaly"].how_of(row["test"]))
    else:
        assert row["test"]["pixel_auroc"] > 0.95 and row["test"]["aupro"] > 0.8 and row["test"]["regions"] == 8
        assert "AUPRO to 30 % of false positives" in SCORES["anomaly"].how_of(row["test"])


@pytest.mark.parametrize("head", ["patchcore", "gaussian"])
def test_pixel_scores_are_those_of_the_whole_maps(parts: Workspace, head: str) -> None:
    """Counts of pixels against all maps at once, as the metrics' plain forms take them."""
    row = run(parts, head, seeds=1).rows[0]
    cache = cache_in(parts)
    loaded, _ = load_head(parts.probes / row["folder"], cache.recipe)
    rows = cache.usable("test")
    with FeatureLoader(cache, loaded.levels) as source:
        seen = {image: one for image, (one,) in seen_on_maps(cache, [loaded], source.batches, rows, "image")}
    truth = {image: defect_regions(cache, image, "image") for image in seen}
    maps = [one.map.numpy() for one in seen.values() if one.map is not None]
    defects = [regions[0] for regions in truth.values() if regions]
    assert len(maps) == len(defects) == 16 and maps[0].shape == SIZE
    assert row["test"]["pixel_auroc"] == pytest.approx(pixel_auroc(maps, defects), abs=1e-4)
    assert row["test"]["aupro"] == pytest.approx(aupro(maps, defects), abs=1e-4)
    kept = scored(parts, row)
    ids = cache.images.column("id")
    assert dict(zip(kept.ids, kept.scores.tolist(), strict=True)) == {ids[i]: one.score for i, one in seen.items()}


def test_the_threshold_lets_the_wanted_share_of_good_validation_images_through(parts: Workspace) -> None:
    row = run(parts, seeds=1, false_calls=0.1).rows[0]
    cache = cache_in(parts)
    head, card = load_head(parts.probes / row["folder"], cache.recipe)
    with FeatureLoader(cache, head.levels) as source:
        seen = list(seen_on_maps(cache, [head], source.batches, cache.usable("val"), "image"))
    good = [one for image, (one,) in seen if "good" in cache.images.column("id")[image]]
    assert len(good) == 22
    assert sum(one.score > float(head.threshold) for one in good) == 2  # of 22, one in ten
    peaks = [float(one.map.max()) for one in good if one.map is not None]
    assert sum(peak > float(head.get_buffer("map_threshold")) for peak in peaks) == 2
    assert card["result"]["settings"]["false_calls"] == 0.1
    assert set(np.unique(scored(parts, row).thresholds)) == {float(head.threshold)}


def test_few_good_images_in_validation_are_said_with_how_many_it_takes(parts: Workspace) -> None:
    (few,) = [note for note in run(parts, seeds=1, false_calls=0.01).notes if "false-call rate" in note]
    assert "22 good validation images" in few and "100" in few and "300" in few and "--false-calls" in few
    (unsure,) = [note for note in run(parts, seeds=1, false_calls=0.05).notes if "false-call rate" in note]
    assert "60" in unsure
    assert not [note for note in run(parts, seeds=1, false_calls=0.2).notes if "false-call rate" in note]


def test_a_threshold_without_any_good_unit_does_not_exist() -> None:
    value, note = settled([], 0.05, "tile")
    assert np.isnan(value) and "good tiles of validation" in note
    assert settled([3.0, 1.0, 2.0], 0.05, "image")[0] == 3.0
    assert settled([3.0, 1.0, 2.0], 0.4, "image")[0] == 2.0


def test_the_seed_decides_patchcore_alone(parts: Workspace) -> None:
    banks = []
    for row in run(parts, coreset=0.1).rows:
        head, _ = load_head(parts.probes / row["folder"])
        banks.append(head.get_buffer("bank"))
    assert len(banks) == 3 and not torch.equal(banks[0], banks[1])
    assert [len(run(parts, head).rows) for head in ("gaussian", "knn")] == [1, 1]


def test_a_share_of_the_training_split_is_a_share_of_good_images(parts: Workspace) -> None:
    row = run(parts, seeds=1, fractions=(0.5,)).rows[0]
    assert row["images"]["train"] == 12 and row["train_counts"] == {"good": 12}


@pytest.mark.parametrize("head", kinds_of("anomaly"))
def test_predictions_are_those_of_the_test(
    parts: Workspace, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved heads, loaded again, on the files: the scores of the result, a map and a verdict for each image."""
    row = run(parts, head, seeds=1).rows[0]
    monkeypatch.setattr(stage, "load_backbone", lambda *_: PoolingBackbone())
    images = sorted((parts.root / "set" / "images").glob("test_*.png"))
    report = predict(parts.probes / row["folder"], images, tmp_path / "out", device="cpu", quiet=True)
    with (tmp_path / "out" / "scores.csv").open(newline="") as stream:
        lines = {line["image"].removesuffix(".png"): line for line in csv.DictReader(stream)}
    kept = scored(parts, row)
    assert {name: float(line["score"]) for name, line in lines.items()} == pytest.approx(
        dict(zip((Path(name).stem for name in kept.ids), kept.scores.tolist(), strict=True)), rel=1e-4
    )
    assert kept.called is not None
    assert [line["verdict"] for line in lines.values()].count("called") == kept.called.sum()
    assert report.images == 16 and (tmp_path / "out" / "overlays" / "test_good00.png").is_file()
    if head != "knn":
        values = tifffile.imread(tmp_path / "out" / "maps" / "test_defect00.tif")
        assert values.dtype == np.float32 and values.shape == SIZE and values.max() > 0


@pytest.mark.parametrize("head", kinds_of("anomaly"))
def test_a_sheet_shows_the_worst_mistakes_first(parts: Workspace, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those lead whose score is farthest on the wrong side of the threshold, good and defect images alike."""
    drawn: list[Any] = []
    monkeypatch.setattr(running, "save_sheet", lambda path, rows, *_: drawn.extend(rows))
    report = run(parts, head, seeds=1, show=16)
    kept = scored(parts, report.rows[0])
    right = np.where(kept.good, 1, -1) * (kept.scores - kept.thresholds)
    assert [name for name, _ in drawn] == [kept.ids[i] for i in np.argsort(-right, kind="stable")]
    for name, (_, truth, said) in drawn:
        place = kept.ids.index(name)
        assert kept.called is not None and said.wrong == (kept.called[place] == kept.good[place])
        assert truth.text == ("good" if kept.good[place] else "defect",)
        assert said.text[0].startswith("called" if kept.called[place] else "passed")
        assert (said.heat is None) == (head == "knn") and truth.labels is not None


def test_without_good_images_in_validation_there_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "test": 4}, {"val": 4, "test": 4})
    workspace = store(tmp_path, size=SIZE)
    report = run(workspace, "gaussian", show=4)
    row = report.rows[0]
    assert row["test"]["image_auroc"] == 1.0 and row["val"]["image_auroc"] is None
    assert [row["test"][name] for name in ("image_f1", "image_recall", "false_calls")] == [None] * 3
    assert any("no threshold" in note for note in report.notes) and report.sheets[0].is_file()
    monkeypatch.setattr(stage, "load_backbone", lambda *_: PoolingBackbone())
    images = [tmp_path / "set" / "images" / "test_good00.png"]
    found = predict(workspace.probes / row["folder"], images, tmp_path / "out", device="cpu", quiet=True)
    assert any("no threshold" in note for note in found.notes)
    assert (tmp_path / "out" / "scores.csv").read_text().splitlines()[1].endswith(",,")


def test_tiles_are_judged_each_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose images all have a defect has good tiles."""
    write_pairs(tmp_path / "set", {}, {"train": 8, "val": 8, "test": 6})
    store(tmp_path, tile=24, overlap=8, size=(24, 24))
    workspace = Workspace(tmp_path)
    with pytest.raises(ProbeError, match=r"no image of the training split is good(.|\n)*have no defect:  --unit tile"):
        run(workspace)
    cache = cache_in(workspace)
    good = sum(not cache.semantic(row).any() for row in cache.usable("train").tolist())
    for head in kinds_of("anomaly"):
        more = {"coreset": 0.3} if head == "patchcore" else {}
        report = run(workspace, head, seeds=1, unit="tile", show=6, **more)
        row = report.rows[0]
        kept = scored(workspace, row)
        assert row["settings"]["unit"] == "tile" and row["images"]["test"] == 6
        assert len(kept.ids) == len(cache.usable("test")) and 0 < kept.good.sum() < len(kept.ids)
        assert row["test"]["image_auroc"] > 0.9 and row["train_counts"] == {"good": good}
        assert any("tiles with a defect are left aside" in note for note in report.notes)
        monkeypatch.setattr(stage, "load_backbone", lambda *_: PoolingBackbone())
        images = sorted((tmp_path / "set" / "images").glob("test_*.png"))
        out = tmp_path / "out" / head
        predict(workspace.probes / row["folder"], images, out, device="cpu", quiet=True)
        with (out / "scores.csv").open(newline="") as stream:
            said = {f"images/{line['image']}": float(line["score"]) for line in csv.DictReader(stream)}
        highest = dict.fromkeys(said, 0.0)
        for name, score in zip(kept.ids, kept.scores.tolist(), strict=True):
            image = next(image for image in highest if name.startswith(image))
            highest[image] = max(highest[image], score)
        assert said == pytest.approx(highest, rel=1e-4)


@pytest.mark.parametrize("unit", ["image", "tile"])
def test_a_sheet_of_tiles_says_what_is_known_of_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: Unit
) -> None:
    """A tile with an ignored region alone takes no part: where it lies, the heat map is clear."""
    write_pairs(tmp_path / "set", {"train": 4, "val": 3, "test": 1}, {"test": 2}, dict.fromkeys(SPLITS, 1))
    workspace = store(tmp_path, tile=24, overlap=8, size=(24, 24))
    drawn: list[Any] = []
    monkeypatch.setattr(running, "save_sheet", lambda path, rows, *_: drawn.extend(rows))
    run(workspace, "gaussian", unit=unit, show=4)
    good = truth_of(cache_in(workspace), "defect", unit).good
    assert (good == 255).any() and len(drawn) == (3 if unit == "image" else 4)
    for name, (_, truth, said) in drawn:
        (text,) = truth.text
        assert text == ("good" if "good" in name else "defect") if unit == "image" else "tiles with a defect" in text
        assert np.isfinite(said.heat.values).all()


def test_tiles_of_an_image_give_it_the_highest_score_and_one_map(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "val": 8, "test": 4}, {"test": 4})
    store(tmp_path, tile=24, overlap=8, size=(24, 24))
    workspace = Workspace(tmp_path)
    row = run(workspace, "gaussian").rows[0]
    cache = cache_in(workspace)
    head, _ = load_head(workspace.probes / row["folder"], cache.recipe)
    rows = cache.usable("test")
    with FeatureLoader(cache, head.levels) as source:
        tiles = {row: one for row, (one,) in seen_on_maps(cache, [head], source.batches, rows, "tile")}
        whole = {image: one for image, (one,) in seen_on_maps(cache, [head], source.batches, rows, "image")}
    for image, one in whole.items():
        own = [row for row in rows.tolist() if cache.image_of[row] == image]
        assert one.score == max(tiles[row].score for row in own)
        total, shown = torch.zeros(SIZE), torch.zeros(SIZE)
        for number in own:
            part, cells = cache.rows.part_of(number), tiles[number].map
            assert part is not None and cells is not None and one.map is not None
            window = (slice(part.top, part.top + part.height), slice(part.left, part.left + part.width))
            total[window] += cells
            shown[window] += 1
        torch.testing.assert_close(one.map, total / shown)
    assert row["test"]["regions"] == 4 and len(scored(workspace, row).ids) == 8


def test_mvtec_in_its_published_split_trains_on_its_good_images(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "bottle")
    workspace = store(tmp_path, "bottle mvtec-ad:published", size=SIZE)
    report = run(workspace, "gaussian", false_calls=0.25)
    row = report.rows[0]
    assert row["images"]["train"] + row["images"]["val"] == 30 and row["images"]["test"] == 12
    assert row["val"]["image_auroc"] is None  # validation has good images alone
    assert row["test"]["image_auroc"] == 1.0 and row["test"]["image_recall"] == 1.0 and row["test"]["regions"] == 6


def test_labels_of_images_alone_give_no_scores_of_pixels(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 8), ("test", 6)):
        for name in ("good", "scratched"):
            folder = tmp_path / "lots" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(random, (8, 8) if name != "good" else None)).save(folder / f"{split}{i}.png")
    workspace = store(tmp_path, "lots class-folders", size=SIZE)
    row = run(workspace, "gaussian").rows[0]
    assert row["test"]["image_auroc"] == 1.0 and row["train_counts"] == {"good": 12}
    assert [row["test"][name] for name in ("pixel_auroc", "aupro", "regions")] == [None, None, None]
    assert scored(workspace, row).pixels is None
    with pytest.raises(ProbeError, match="holds whole images"):
        run(workspace, "gaussian", unit="tile")


def test_good_images_alone_give_a_head_its_threshold_and_false_calls(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 8), ("test", 6)):
        folder = tmp_path / "lots" / split / "ok"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(random)).save(folder / f"{split}{i}.png")
    workspace = store(tmp_path, "lots class-folders", size=SIZE)
    row = run(workspace, "gaussian").rows[0]
    assert row["test"]["image_auroc"] is None and row["test"]["false_calls"] is not None
    assert row["train_counts"] == {"good": 12}
    head, _ = load_head(workspace.probes / row["folder"], cache_in(workspace).recipe)
    assert np.isfinite(float(head.threshold))
    with pytest.raises(ProbeError, match=r"one kind of image only(.|\n)*--task anomaly"):
        probe(workspace, next(task for task, own in SCORES.items() if own.on == "images"))


def test_a_cache_of_pooled_features_serves_the_head_without_maps_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "val": 6, "test": 4}, {"test": 4})
    dense, pooled = tmp_path / "dense", tmp_path / "pooled"
    rows = []
    for root, kept in ((dense, "maps"), (pooled, "pooled")):
        root.mkdir()
        (root / "set").symlink_to(tmp_path / "set")
        rows.append(run(store(root, size=SIZE, store=kept), "knn").rows[0])
    assert rows[0]["test"] == rows[1]["test"] and rows[0]["test"]["image_auroc"] == 1.0
    for head in ("patchcore", "gaussian"):
        with pytest.raises(FeatprobeError, match="pooled"):
            run(Workspace(pooled), head)


def test_an_image_with_an_ignored_region_alone_takes_no_part(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "val": 6, "test": 4}, {"test": 4}, {"train": 2, "test": 3})
    store(tmp_path, size=SIZE)
    workspace = Workspace(tmp_path)
    report = run(workspace, "gaussian")
    kept = scored(workspace, report.rows[0])
    assert len(kept.ids) == 8 and not any("ignored" in name for name in kept.ids)
    assert report.rows[0]["train_counts"] == {"good": 8}
    assert any("3 images of test" in note for note in report.notes)


def test_views_of_training_images_take_no_part(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "val": 6, "test": 4}, {"test": 4})
    store(tmp_path, size=SIZE, views=("hflip",))
    workspace = Workspace(tmp_path)
    for head in kinds_of("anomaly"):
        report = run(workspace, head, seeds=1)
        assert report.rows[0]["train_counts"] == {"good": 8} and report.rows[0]["images"]["train"] == 8
        assert any("views" in note for note in report.notes)


def test_no_good_image_to_train_on_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"val": 4, "test": 4}, {"train": 5, "test": 4})
    store(tmp_path, size=SIZE)
    with pytest.raises(ProbeError) as refused:
        run(Workspace(tmp_path))
    assert "5 images" in str(refused.value) and "--tile N" in str(refused.value)
    assert not (tmp_path / "probes" / "results.jsonl").exists()


def test_an_anomaly_head_is_not_fine_tuned(parts: Workspace) -> None:
    with pytest.raises(ProbeError, match="fine-tuned"):
        finetune(parts, "anomaly", [], [], ProbeOptions(head="gaussian", device="cpu"))


# ---- records of defects ----------------------------------------------------------------------------------------------


def records_of(workspace: Workspace, row: dict[str, Any]) -> Records:
    folder = workspace.probes / row["folder"]
    return read_records(folder, read_card(folder)["head_sha256"])


def test_calls_of_maps_are_components_at_a_base_that_finds_all_spots(parts: Workspace) -> None:
    row = run(parts, "patchcore", seeds=1).rows[0]
    found = records_of(parts, row)
    about, test = found.about, found.of("test")
    assert about.base_from == "validation" and not about.pooled and about.parts, "its split file names groups"
    assert about.base > 0 and (found.calls.score >= np.float32(about.base)).all()
    assert len(test.defects) == 8 and np.isfinite(test.defects.score).all(), "each of the 8 spots is found"
    assert test.defects.score.min() > test.calls.score[test.calls.touched == NOTHING].max(initial=0)
    assert (test.defects.size() == 8).all() and test.images.good.tolist().count(GOOD) == 8


def test_without_a_defect_in_validation_the_base_is_the_usual_quantile(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", {"train": 8, "val": 6, "test": 2}, {"test": 2})
    workspace = store(tmp_path, size=SIZE)
    report = run(workspace, "gaussian", seeds=1)
    about = records_of(workspace, report.rows[0]).about
    (said,) = [note for note in report.notes if "base threshold" in note]
    assert "validation has no defect" in said and f"({about.base:.3g})" in said and about.base_from == "default"
    cache = cache_in(workspace)
    head, _ = load_head(workspace.probes / report.rows[0]["folder"], cache.recipe)
    with FeatureLoader(cache, head.levels) as source:
        seen = seen_on_maps(cache, [head], source.batches, cache.usable("val"), "image")
        maps = [one.map.numpy().ravel() for _, (one,) in seen if one.map is not None]
    assert about.base == np.quantile(np.concatenate(maps), 0.99, method="higher"), "these few pixels are all looked at"


def test_where_only_images_are_labelled_an_image_is_scored_as_a_whole(tmp_path: Path) -> None:
    """No one knows where the defect is, so a component of the map could be neither right nor wrong."""
    random = np.random.default_rng(1)
    for kind, count in (("good", 14), ("bad", 8)):
        (tmp_path / "set" / kind).mkdir(parents=True)
        for i in range(count):
            spot = (8 * (i % 4), 8 * (i % 5)) if kind == "bad" else None
            Image.fromarray(picture(random, spot)).save(tmp_path / "set" / kind / f"{i:02}.png")
    data = read_data("set", tmp_path / "set")
    extract_with(Workspace(tmp_path), PoolingBackbone(), data, options(size=SIZE), CPU)
    row = run(Workspace(tmp_path), "patchcore", seeds=1, split="stratified").rows[0]
    found = records_of(Workspace(tmp_path), row)
    assert found.about.pooled and np.isnan(found.about.base) and not len(found.calls) and not len(found.defects)
    test, kept = found.of("test"), scored(Workspace(tmp_path), row)
    assert dict(zip(test.images.ids, test.images.score.tolist(), strict=True)) == pytest.approx(
        dict(zip(kept.ids, kept.scores.tolist(), strict=True))
    )
    assert [good == GOOD for good in test.images.good] == kept.good.tolist()
