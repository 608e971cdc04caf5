"""What suits a data set first, and the files to begin with: of whatever labels a set has."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import write_set
from PIL import Image
from test_cli import call, refusal

from featprobe.datasets import DataSet
from featprobe.errors import DataError
from featprobe.stages.upkeep.check import check
from featprobe.stages.upkeep.first_look import Aim, aim_at
from featprobe.stages.upkeep.in_force import in_force, line_of
from featprobe.stages.workspace import Workspace


def image(path: Path, seed: int) -> None:
    """A small grey image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)).save(path)


def of_masks(root: Path) -> None:
    """Every image has a mask with a defect."""
    write_set(root, 12, (24, 24))


def of_labels(root: Path) -> None:
    """A folder of images for each label."""
    for i in range(30):
        image(root / ("good", "crack", "dent")[i % 3] / f"p{i}.png", i)


def of_good_images(root: Path) -> None:
    """Train holds good images alone, test also others: labels of images can't be learned."""
    for i in range(40):
        image(root / "train" / "good" / f"g{i}.png", i)
        image(root / "val" / "good" / f"v{i}.png", 100 + i)
        image(root / "test" / ("good" if i % 2 else "bad") / f"t{i}.png", 200 + i)


def boxes(root: Path, without: int) -> None:
    """COCO boxes on every image but some."""
    images, annotations = [], []
    for i in range(60):
        image(root / f"p{i}.png", i)
        images.append({"id": i, "file_name": f"p{i}.png", "height": 24, "width": 24})
        if i >= without:
            annotations.append(
                {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 4, 9, 9], "area": 81, "iscrowd": 0}
            )
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "pore"}]}
    (root / "all.json").write_text(json.dumps(found))


def of_boxes(root: Path) -> None:
    """Boxes on every image."""
    boxes(root, 0)


def of_some_boxes(root: Path) -> None:
    """Boxes on half of the images: the others are good."""
    boxes(root, 30)


def look(root: Path) -> tuple[DataSet, Aim]:
    """The set in a folder, and what suits it."""
    data = Workspace(root.parent).data_set(str(root), complete=False)
    return data, aim_at(check(data, quiet=True), data)


@pytest.mark.parametrize(
    ("build", "aim"),
    [
        (of_masks, ("semseg", "ridge", "own", "stratified:5")),
        (of_labels, ("classify", "linear", "own", "stratified:5")),
        (of_good_images, ("anomaly", "gaussian", "own", "own")),
        (of_boxes, ("detect", "fcos", "own", "stratified")),
        (of_some_boxes, ("classify", "linear", "defect", "stratified:5")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_task_follows_from_the_labels(tmp_path: Path, build: Callable[[Path], None], aim: tuple[str, ...]) -> None:
    build(tmp_path / "parts")
    _, found = look(tmp_path / "parts")
    assert (found.kind.task, found.kind.name, found.labels, found.split) == aim, found.reasons


def test_a_set_that_teaches_nothing_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    for i in range(30):
        image(tmp_path / "parts" / ("train", "val", "test")[i % 3] / "good" / f"p{i}.png", i)
        image(tmp_path / "parts" / ("train", "val", "test")[i % 3] / "good" / f"q{i}.png", 50 + i)
    with pytest.raises(DataError, match=r"nothing that a head could learn[\s\S]*found   60 images"):
        look(tmp_path / "parts")


@pytest.mark.parametrize("build", [of_masks, of_labels, of_some_boxes], ids=lambda build: build.__name__)
def test_what_init_writes_is_a_study_that_runs(tmp_path: Path, build: Callable[[Path], None]) -> None:
    build(tmp_path / "my parts")
    said = call(tmp_path, "init", tmp_path / "my parts", "--quiet")
    assert said.exit_code == 0, said.output
    config = tomllib.loads((tmp_path / "featprobe.toml").read_text())
    assert config["data"]["my_parts"]["path"] == "my parts", "relative, so that both can be moved"
    planned = call(tmp_path, "study", tmp_path / "study.toml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "to extract: embedded on my_parts" in planned.output and "embedded-random on my_parts" in planned.output
    switched_on = (
        (tmp_path / "featprobe.toml").read_text().replace("# fit =", "fit =").replace("# intensity =", "intensity =")
    )
    (tmp_path / "featprobe.toml").write_text(switched_on)
    assert call(tmp_path, "data", "info", "my_parts").exit_code == 0


def test_init_overwrites_nothing_and_refuses_a_folder_without_a_set(tmp_path: Path) -> None:
    of_masks(tmp_path / "parts")
    (tmp_path / "empty").mkdir()
    for folder, code in ((tmp_path / "empty", 1), (tmp_path / "nowhere", 2)):
        said = refusal(tmp_path, "init", folder, "--quiet", code=code)
        assert str(folder) in said and "wanted" in said
    assert not (tmp_path / "featprobe.toml").exists() and not (tmp_path / "study.toml").exists()
    (tmp_path / "study.toml").write_text("mine")
    assert "study.toml is there already. Nothing was written" in refusal(
        tmp_path, "init", tmp_path / "parts", "--quiet"
    )
    assert (tmp_path / "study.toml").read_text() == "mine" and not (tmp_path / "featprobe.toml").exists()


def test_config_names_the_place_of_each_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '\n[data.a]\npath = "x"  # here\n\n[ data . "b c" ]\n# size = "1x1"\npath = "y"\nsize = "32x32"\n'
    (tmp_path / "featprobe.toml").write_text(text)
    monkeypatch.setenv("HF_HOME", "/weights")
    found = {own.name: (own.value, own.source) for own in in_force(Workspace(tmp_path), "--workspace")}
    assert found["data.a.path"] == ('"x"', "featprobe.toml:3")
    assert found['data."b c".size'] == ('"32x32"', "featprobe.toml:8")
    assert found["HF_HOME"][0] == "/weights" and found["workspace"] == (str(tmp_path), "--workspace")
    assert line_of(text.splitlines(), ("data", "c"), "path") is None
    said = call(tmp_path, "config", env={"FEATPROBE_WORKSPACE": "elsewhere"})
    assert said.exit_code == 0 and "--workspace" in said.stdout.splitlines()[1]
