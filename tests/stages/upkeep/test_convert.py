"""Data sets as COCO and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from test_readers import (
    BOX,
    HEIGHT,
    MADE,
    POLYGON,
    PORE,
    RING,
    SIZE,
    SPLITS,
    WIDTH,
    YAML,
    coco_set,
    colour_set,
    labelme_set,
    objects_of,
    picture,
    refused,
    shape,
    square,
    target_of,
    text,
    voc_set,
    xml,
    yolo_set,
)

from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.images.reading import image_size
from featprobe.datasets.samples import Sample
from featprobe.errors import DataError, FeatprobeError
from featprobe.stages.upkeep.convert import convert
from featprobe.stages.workspace import Workspace
from featprobe.targets import Instance, Target, encode_rle, semantic_from_instances

IGNORED = [shape("__ignore__", RING), shape("crack", [[9, 1], [14, 6]], "rectangle")]
TO_COCO = {
    **MADE,
    "labelme, an ignored region": lambda root: labelme_set(root, IGNORED),
    "voc, a difficult object": lambda root: voc_set(root, xml([PORE], difficult=1)),
    "yolo, boxes and polygons": lambda root: yolo_set(root, BOX + POLYGON),
    "yolo, polygons": lambda root: yolo_set(root, POLYGON + POLYGON.replace("0.75", "0.9"), POLYGON),
    "yolo, an image in two splits": lambda root: yolo_set(root, data=YAML.replace("images/val", "images/train")),
    "colours, one ignored": lambda root: colour_set(root, classes="0,0,255 rock\n1,1,1 pore\n255,0,0 ignore\n"),
}


def labels_of(data: DataSet) -> dict[str, Any]:
    """All that a set says of each image, and of itself; areas and the annotation's own numbers left out."""
    found: dict[str, Any] = {"": (data.classes, data.tasks, data.label_names)}
    for sample in data.samples:
        target = data.read_target(sample, image_size(sample.image))
        semantic = None if target.semantic is None else target.semantic.tolist()
        objects = target.instances and [(i.category, i.box_xyxy, i.rle, i.crowd) for i in target.instances]
        found[sample.id] = sample.split, sample.group, sample.image.read_bytes(), semantic, objects, target.labels
    return found


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("folders", ["ground", "flaw", "other"]),
        ("colours", ["255,0,0 rock", "0,0,255 open pore", "1,1,1 ignore"]),
        ("labelme", ["ground", "spare", "pore", "crack"]),
        ("voc", ["ground", "spare", "pore"]),
        ("voc-segmentation", ["ground", "flaw", "other"]),
    ],
)
def test_classes_named_in_the_workspace_stand_for_a_classes_txt(tmp_path: Path, name: str, lines: list[str]) -> None:
    root = MADE[name](tmp_path / "parts")
    (root / "classes.txt").unlink(missing_ok=True)
    plain = read_data("parts", root).classes
    text(tmp_path / "featprobe.toml", f"[data.parts]\npath = 'parts'\nclasses = {json.dumps(lines)}\n")
    named = Workspace(tmp_path).data_set("parts")
    text(root / "classes.txt", "\n".join(lines))
    assert labels_of(named) == labels_of(read_data("parts", root)) and named.classes != plain
    text(root / "classes.txt", "nothing\nof this\n")
    assert labels_of(Workspace(tmp_path).data_set("parts")) == labels_of(named)


def test_classes_can_not_be_named_where_the_format_names_them(tmp_path: Path) -> None:
    coco_set(tmp_path / "parts")
    text(tmp_path / "featprobe.toml", "[data.parts]\npath = 'parts'\nclasses = ['ground', 'pore']\n")
    with pytest.raises(DataError, match="its format coco names its classes itself"):
        Workspace(tmp_path).data_set("parts")
    text(tmp_path / "featprobe.toml", "[data.parts]\npath = 'parts'\nclasses = ['ground', 1]\n")
    with pytest.raises(FeatprobeError, match=r"data.parts.classes\[1\]: wanted a text, found 1"):
        Workspace(tmp_path)


@pytest.mark.parametrize("name", TO_COCO)
def test_a_set_comes_back_from_coco_as_it_was(tmp_path: Path, name: str) -> None:
    data = read_data("set", TO_COCO[name](tmp_path / "set"))
    out = tmp_path / "out"
    arguments = ["data", "convert", str(tmp_path / "set"), "--out", str(out), "--json", "--quiet"]
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sum(json.loads(result.stdout)["images"].values()) == len(data.samples)
    of_images = data.label_names is not None
    wanted = {"labels.csv", *({s.id.split("/")[0] for s in data.samples})} if of_images else {"annotations", "images"}
    assert {path.name for path in out.iterdir()} == wanted
    assert labels_of(read_data("set", out, "class-csv" if of_images else "coco")) == labels_of(data)
    assert labels_of(read_data("set", out)) == labels_of(data)
    if any(task == "detect" for task in data.tasks):
        loaded = COCO(str(out / "annotations" / "instances_train.json"))  # stock pycocotools reads it too
        assert len(loaded.imgs) == len(data.in_split("train")) and all("area" in a for a in loaded.anns.values())


def test_images_may_be_linked_and_nothing_is_written_over(tmp_path: Path) -> None:
    data = read_data("set", labelme_set(tmp_path / "set"))
    convert(data, tmp_path / "out", link=True, quiet=True)
    image = tmp_path / "out" / "images" / "p0.png"
    assert image.is_symlink() and labels_of(read_data("set", tmp_path / "out", follow_links=True)) == labels_of(data)
    with pytest.raises(DataError, match=r"is a link out of the data folder (.|\n)* follow such links:  --follow-links"):
        read_data("set", tmp_path / "out")
    with pytest.raises(DataError, match="Nothing was changed"):
        convert(data, tmp_path / "out", quiet=True)
    with pytest.raises(DataError, match="Nothing was changed"):
        convert(data, image, quiet=True)


def test_a_set_that_can_not_be_converted_leaves_nothing_behind(tmp_path: Path) -> None:
    data = read_data("set", labelme_set(tmp_path / "set"))
    text(tmp_path / "set" / "p3.json", "{")
    with pytest.raises(DataError, match=r"p3\.json"):
        convert(data, tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@given(
    seed=st.integers(0, 1 << 32),
    kind=st.sampled_from(["masks", "objects", "boxes", "both"]),
    background=st.sampled_from(["background", "Background", "rock"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_labels_come_back_from_coco(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str, background: str
) -> None:
    """Masks of classes, objects, boxes, and objects beside a mask of classes that is not what they make."""
    rng, root = np.random.default_rng(seed), tmp_path_factory.mktemp("any")
    objects = []
    for _ in range(rng.integers(1, 5)):
        corners = (np.sort(rng.choice(64 * side + 1, 2, replace=False)) / 64 for side in (WIDTH, HEIGHT))
        (x1, x2), (y1, y2) = corners
        levels = rng.random(SIZE)
        drawn = None if kind == "boxes" else encode_rle(levels <= rng.choice([levels.min(), 0.1, 0.9]))
        objects.append(Instance(int(rng.integers(1, 3)), (x1, y1, x2, y2), drawn, crowd=bool(rng.random() < 0.2)))
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), SIZE)
    semantic = {"boxes": None, "objects": semantic_from_instances(objects, SIZE)}.get(kind, labels)
    target = Target(semantic, None if kind == "masks" else tuple(objects))
    image = picture(root / "p.png")
    samples = tuple(Sample(f"{split}.png", image, split, split) for split in SPLITS)
    tasks = {"masks": ("semseg",), "boxes": ("detect",)}.get(kind, ("semseg", "detect", "instseg"))
    data = DataSet("any", root, (background, "pore", "crack"), samples, tasks, lambda *_: target)
    convert(data, root / "out", quiet=True)
    assert labels_of(read_data("any", root / "out")) == labels_of(data)


def test_a_boxs_far_side_comes_back_to_one_rounding(tmp_path: Path) -> None:
    """COCO keeps its width: 1.5172704676178888 + w is 5.987802490493094 for no number w of 64 bits."""
    box = (1.5172704676178888, 2.0, 5.987802490493094, 6.0)
    samples = tuple(Sample(f"{split}.png", picture(tmp_path / "p.png"), split, split) for split in SPLITS)
    target = Target(None, (Instance(1, box),))
    data = DataSet("any", tmp_path, ("background", "pore"), samples, ("detect",), lambda *_: target)
    convert(data, tmp_path / "out", quiet=True)
    found = objects_of(read_data("any", tmp_path / "out"), "train.png")[0].box_xyxy
    assert found != box and found == pytest.approx(box, rel=2**-52, abs=0)


def test_masks_beside_objects_without_masks_are_refused(tmp_path: Path) -> None:
    target = Target(square(0, 0, 2).astype(np.uint8), (Instance(1, (0, 0, 2, 2)),))
    sample = Sample("p.png", picture(tmp_path / "p.png"), "p", "train")
    data = DataSet("any", tmp_path, ("background", "pore"), (sample,), ("semseg", "detect"), lambda *_: target)
    with pytest.raises(DataError, match="which COCO can't hold"):
        convert(data, tmp_path / "out", quiet=True)


def test_regions_of_a_coco_file_are_no_objects(tmp_path: Path) -> None:
    """COCO's `isthing`: of a category, or of one annotation."""
    value = json.loads((coco_set(tmp_path) / "all.json").read_text(encoding="utf-8"))
    value["categories"][1]["isthing"] = 0
    text(tmp_path / "all.json", json.dumps(value))
    found = target_of(read_data("set", tmp_path), "p0.png")
    assert [i.category for i in found.instances or ()] == [2]
    assert found.semantic is not None and np.array_equal(found.semantic == 1, square(2, 3, 5))
    value["categories"][0]["isthing"] = 0
    text(tmp_path / "all.json", json.dumps(value))
    assert read_data("set", tmp_path).tasks == ("semseg",)
    del value["annotations"][0]["segmentation"]
    text(tmp_path / "all.json", json.dumps(value))
    assert "without a segmentation, and no objects" in refused(tmp_path)
