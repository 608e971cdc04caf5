"""Files of labels that are wide, deep or false: read or refused in time and memory that grow with their size."""

import json
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from featprobe import errors
from featprobe.datasets import files, objects, read_data
from featprobe.datasets.files import other_images, rows_of
from featprobe.datasets.formats import labelme, voc
from featprobe.datasets.formats.voc import read_xml
from featprobe.datasets.formats.yolo import LARGEST, _read_yaml
from featprobe.datasets.labelmap import read_labelmap
from featprobe.datasets.objects import check_classes, drawn
from featprobe.datasets.samples import Sample, Samples
from featprobe.datasets.splits import split_by_group
from featprobe.errors import DataError, looks_like
from featprobe.splitting import SplitChoice

MOST = 10.0  # seconds of the processor; each of these takes less than one, and minutes where time grows with the square


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError inside after MOST seconds of this process on the processor."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, MOST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def coco(root: Path, **changed: Any) -> Path:
    """A set of three images of 100x100 with these parts."""
    (root / "images").mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    for image in images:
        Image.new("L", (100, 100)).save(root / "images" / str(image["file_name"]))
    parts = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "pore"}], **changed}
    (root / "all.json").write_text(json.dumps(parts))
    return root


def read_first(root: Path) -> Any:
    data = read_data("set", root, "coco")
    return data.read_target(data.samples[[s.id for s in data.samples].index("0.png")], (100, 100))


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [100, 100], "counts": "o" * 1_000_000}, "more pixels than any image"),
        ([[0, 0, 100, 100, 0, 100, 100, 0] * 15_000], "pixels long. wanted: at most"),
    ],
    ids=["run length without an end", "outline"],
)
def test_masks_that_claim_what_no_mask_holds_are_not_drawn(tmp_path: Path, segmentation: Any, said: str) -> None:
    of_image = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": segmentation}
    with bounded(), pytest.raises(DataError, match=said):
        read_first(coco(tmp_path, annotations=[of_image]))


def test_many_polygons_are_joined_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    polygons = [[i % 60, i // 60, i % 60 + 3, i // 60, i % 60, i // 60 + 3] for i in range(0, 2000, 7)]
    plain, most = coco_mask.merge, 0

    def merge(parts: list[Any]) -> Any:
        nonlocal most
        most = max(most, len(parts))
        return plain(parts)

    monkeypatch.setattr(coco_mask, "merge", merge)
    found = drawn(polygons, (70, 80), "here")
    assert most <= objects.MERGED
    assert np.array_equal(coco_mask.decode(found), coco_mask.decode(plain(coco_mask.frPyObjects(polygons, 70, 80))))


def many_categories(root: Path) -> None:
    read_first(coco(root, categories=[{"id": i, "name": f"c{i}"} for i in range(30_000)]))


def many_classes(root: Path) -> None:
    check_classes([f"c{i}" for i in range(100_000)], root)


def many_colours(root: Path) -> None:
    (root / "labelmap.txt").write_text("".join(f"n{i}:0,{i >> 8},{i & 255}::\n" for i in range(40_000)))
    read_labelmap(root)


def many_damaged(root: Path) -> None:
    here = [root / f"p{i}.json" for i in range(8_000)]
    labelme._read_drawings(root, here, [path.with_suffix(".png") for path in here])


def many_tags(root: Path) -> None:
    inner = "".join(f"<nane{i:07}/>" for i in range(100_000))
    (root / "a.xml").write_text(f"<annotation><object>{inner}</object></annotation>")
    read_xml(root / "a.xml")


def test_a_thousand_unknown_names_are_compared_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(errors, "get_close_matches", lambda name, *_, **__: compared.append(name) or [])
    box = {"image_id": 0, "category_id": 1}
    assert looks_like([*box, *(f"note {i}" for i in range(5000))], ("image_id", "category_id", "bbox")) == {}
    assert len(compared) == errors.MOST_COMPARED
    compared.clear()
    assert looks_like([*box, *(f"note {i}" for i in range(5000))], tuple(box)) == {} and not compared


WIDE: tuple[Callable[[Path], None], ...] = (
    many_categories, many_classes, many_colours, many_damaged, many_tags,
)  # fmt: skip


@pytest.mark.parametrize("read", WIDE)
def test_a_wide_file_is_answered_in_time_that_grows_with_it(tmp_path: Path, read: Callable[[Path], None]) -> None:
    with bounded(), pytest.raises(DataError):
        read(tmp_path)


def test_images_in_many_folders_and_groups_of_many_classes_take_no_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [tmp_path / f"class{i}" for i in range(1000)]
    images = [read[-1] / f"{i}.png" for i in range(10_000)]
    monkeypatch.setattr(files, "files_in", lambda root: images)
    with bounded():
        assert other_images(tmp_path, read) == []
        groups = [f"g{i}" for i in range(60_000)]
        assert len(split_by_group(groups, classes=[(i % 500,) for i in range(60_000)])) == 60_000


def test_a_row_of_a_table_holds_its_known_columns_alone() -> None:
    """A header of a thousand columns would make a small file of short rows a large one."""
    rows = rows_of(
        "a,Image,b,label,c\n1, x.png,2,good\n\n,y.png,,bad,3\n", Path("t.csv"), ("image", "label"), ("group",)
    )
    assert rows == [{"image": "x.png", "label": "good"}, {"image": "y.png", "label": "bad"}]


def test_blank_lines_of_a_table_take_no_memory() -> None:
    text = "image,label\n" + "\n" * 20_000
    tracemalloc.start()
    try:
        assert rows_of(text, Path("t.csv"), ("image", "label")) == []
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_a_table_of_more_rows_than_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROWS_BETWEEN", 10)
    monkeypatch.setattr(files, "available_memory", lambda: 1)
    with pytest.raises(DataError, match=r"more rows than fit the memory.*beyond row 11"):
        rows_of("image\n" + "a.png\n" * 12, Path("t.csv"), ("image",))


BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
OBJECT = f"<object><name>pore</name>{BOX}</object>"


def test_names_of_namespaces_are_not_copied_to_each_tag(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(f'<annotation xmlns="urn:x">{OBJECT}</annotation>')
    assert read_xml(path).boxes == (("pore", (1.0, 2.0, 3.0, 4.0), False),)
    tags = "".join(f"<p:x{i}/>" for i in range(2000))
    path.write_text(f'<annotation xmlns:p="{"u" * 20_000}">{tags}</annotation>')
    tracemalloc.start()
    try:
        assert read_xml(path).boxes == ()
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_xml_of_too_many_elements_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voc, "MOST_ELEMENTS", 100)
    (tmp_path / "a.xml").write_text(f"<annotation>{OBJECT * 12}</annotation>")
    assert len(read_xml(tmp_path / "a.xml").boxes) == 12
    (tmp_path / "a.xml").write_text(f"<annotation>{'<a/>' * 100}</annotation>")
    with pytest.raises(DataError, match="more than 100 elements"):
        read_xml(tmp_path / "a.xml")


def test_yaml_that_is_far_too_large_is_not_parsed(tmp_path: Path) -> None:
    """Its parser takes a second for 50 kB."""
    (tmp_path / "data.yaml").write_text("names: [" + "a," * (LARGEST // 2) + "]")
    with bounded(), pytest.raises(DataError, match="such a file may have"):
        _read_yaml(tmp_path / "data.yaml")


@pytest.mark.parametrize("text", ["group:" + "9" * 5000, "group:100000", "image:5/" + "1" * 5000, "x" * 1_000_000])
def test_a_split_of_any_digits_is_refused_in_words(text: str) -> None:
    with bounded(), pytest.raises(DataError, match="is not a split"):
        SplitChoice.parse(text)


def test_fields_of_samples_are_read_and_replaced_without_making_them() -> None:
    samples = Samples(Sample(f"a{i}", Path(f"a{i}.png"), f"g{i // 2}", "train", "x") for i in range(4))
    moved = samples.with_splits(["train", "val", "test", "test"])
    assert moved.texts("group") == ["g0", "g0", "g1", "g1"] and moved.texts("split") == [s.split for s in moved]
    assert [s.split for s in samples] == ["train"] * 4 and [s.id for s in moved] == samples.texts("id")
