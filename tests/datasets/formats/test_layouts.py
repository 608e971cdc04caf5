"""Images and masks in any folders: found by their names, described by patterns, or refused with what is lacking."""

import json
import shlex
import tomllib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from layouts import LAYOUTS, SIZE, Builder
from PIL import Image

from featprobe import open_cache
from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.layouts import find_layouts
from featprobe.errors import DataError
from featprobe.stages.extraction.command_line import command_of_card
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.workspace import Workspace


def areas_of(data: DataSet) -> dict[str, list[int]]:
    """Foreground pixels of each image, or of each of its objects."""
    found = {}
    for sample in data.samples:
        target = data.read_target(sample, SIZE)
        if target.instances is not None:
            found[sample.id] = [int(instance.area or 0) for instance in target.instances]
        else:
            assert target.semantic is not None
            found[sample.id] = [int((target.semantic > 0).sum())]
    return found


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.pairs])
def test_a_public_set_is_read_with_the_right_pairs_as_it_lies_on_the_disk(tmp_path: Path, name: str) -> None:
    layout, builder = LAYOUTS[name], Builder(tmp_path)
    layout.build(builder)
    data = read_data("set", tmp_path, complete=False)
    assert {s.id for s in data.samples} == set(layout.pairs)
    for sample in data.samples:
        masks = layout.pairs[sample.id]
        if not masks and not layout.objects:
            with pytest.raises(DataError, match="There is no mask"):
                data.read_target(sample, SIZE)
            continue
        target = data.read_target(sample, SIZE)
        if layout.objects:
            assert sorted(int(i.area or 0) for i in target.instances or ()) == sorted(builder.areas[m] for m in masks)
        else:
            assert target.semantic is not None and int((target.semantic > 0).sum()) == builder.areas[masks[0]]
        assert sample.split == next((s for start, s in layout.splits.items() if sample.id.startswith(start)), "")
    assert all(any(part in note for note in data.notes) for part in layout.noted), data.notes


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.said])
def test_a_public_set_that_can_not_be_read_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    LAYOUTS[name].build(Builder(tmp_path))
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path)
    assert all(part in str(error.value) for part in LAYOUTS[name].said), str(error.value)


# ---- folder names, splits, names of files ----------------------------------------------------------------------------

IMAGE_FOLDERS = ("image", "images", "Img", "imgs", "img_dir", "JPEGImages", "data", "src")
MASK_FOLDERS = (
    "mask", "masks", "Label", "labels", "annotation", "annotations", "ann_dir", "seg", "segmentation", "gt", "GT",
    "groundTruth", "ground_truth",
)  # fmt: skip
SPLIT_FOLDERS = (("train", "val", "test"), ("training", "validation", "testing"), ("Train", "valid", "Test"))
PLACES = ("{split}/{folder}", "{folder}/{split}", "top/{split}/{folder}", "{split}_{folder}", "{folder}/{split}/site1")
STEMS = (
    ("{}", "{}_mask"), ("{}", "{}_label"), ("{}", "{}_GT"), ("{}", "{}_seg"), ("{}", "{}_0"), ("{}", "{}_1"),
    ("{}", "{}_10"),
    ("{}", "{}-anno-v2"), ("{}_img", "{}"), ("{}_image", "{}_mask"), ("{}_sat", "{}_mask"), ("img_{}", "mask_{}"),
    ("{}", "gt_{}"), ("ISIC_00{}", "ISIC_00{}_segmentation"),
)  # fmt: skip


def paired_set(
    root: Path,
    images: str = "images",
    masks: str = "masks",
    stems: tuple[str, str] = ("{}", "{}"),
    splits: tuple[str, ...] = ("",),
    place: str = "{folder}",
) -> dict[str, int]:
    """Three images in each split with their masks; the area of each image's mask."""
    to, areas = Builder(root), {}
    for split in splits:
        for i in range(3):
            image, mask = (place.format(split=split, folder=folder) for folder in (images, masks))
            drawn = to.mask(f"{mask}/{stems[1].format(f'p{i}7')}.png")
            areas[to.image(f"{image}/{stems[0].format(f'p{i}7')}.jpg")] = to.areas[drawn]
    return areas


def check_pairs(root: Path, areas: dict[str, int], **how: str) -> DataSet:
    """That each image has the mask of this area."""
    data = read_data("set", root, complete=False, **how)  # type: ignore[arg-type]
    assert {name: own[0] for name, own in areas_of(data).items()} == areas
    return data


@pytest.mark.parametrize("masks", MASK_FOLDERS)
@pytest.mark.parametrize("images", IMAGE_FOLDERS)
def test_the_folders_of_the_field_are_found(tmp_path: Path, images: str, masks: str) -> None:
    check_pairs(tmp_path, paired_set(tmp_path, images, masks), format_name="pairs")
    assert len(read_data("set", tmp_path).samples) == 3


@pytest.mark.parametrize("splits", SPLIT_FOLDERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("folders", [("img_dir", "ann_dir"), ("images", "masks")])
def test_splits_are_found_above_and_below_the_folders_and_in_their_names(
    tmp_path: Path, folders: tuple[str, str], place: str, splits: tuple[str, ...]
) -> None:
    areas = paired_set(tmp_path, *folders, splits=splits, place=place)
    data = read_data("set", tmp_path, complete=False)
    path_of = {s.id: s.image.relative_to(tmp_path).as_posix() for s in data.samples}
    assert {path_of[own]: area for own, (area,) in areas_of(data).items()} == areas
    wanted = dict(zip(splits, ("train", "val", "test"), strict=True))
    for s in data.samples:
        first, second, *_ = path_of[s.id].split("/")
        assert s.split == wanted[next(w for w in splits if w in first or second.startswith(w))]
    assert {s.split for s in data.samples} == {"train", "val", "test"}


@pytest.mark.parametrize("colour", [None, (200, 0, 0)])
@pytest.mark.parametrize(
    ("inside", "splits"),
    [
        (("train", "testing"), {"train", "test"}),
        (("Train", "VAL", "test"), {"train", "val", "test"}),
        (("train",), {""}),
        (("train", "test", "site1"), {""}),
        (("train", "test", "."), {""}),
    ],
)
def test_folders_below_images_are_splits_where_all_of_several_are_called_so(
    tmp_path: Path, colour: tuple[int, int, int] | None, inside: tuple[str, ...], splits: set[str]
) -> None:
    to = Builder(tmp_path)
    for folder in inside:
        for i in range(2):
            to.image(f"images/{folder}/p{i}.png")
            to.mask(f"masks/{folder}/p{i}.png", 255, colour)
    data = read_data("set", tmp_path, complete=False)
    assert {s.split for s in data.samples} == splits
    before = "images/" if colour else ""
    assert {s.id for s in data.samples} == {before + (Path(f) / f"p{i}.png").as_posix() for f in inside for i in (0, 1)}
    to.text("samples.csv", "image,split\n" + "".join(f"{s.id},val\n" for s in data.samples))
    assert {s.split for s in read_data("set", tmp_path, complete=False).samples} == {"val"}


@pytest.mark.parametrize("colour", [None, (200, 0, 0)])
def test_images_in_other_folders_are_told(tmp_path: Path, colour: tuple[int, int, int] | None) -> None:
    to = Builder(tmp_path)
    for i in range(2):
        for split in ("train", "val"):
            to.image(f"{split}/images/p{i}.png")
            to.mask(f"{split}/masks/p{i}.png", 255, colour)
    assert not any("not read" in note for note in read_data("set", tmp_path, complete=False).notes)
    (tmp_path / "train/images/linked.png").symlink_to("../../pool/p2.png")
    (tmp_path / "train/masks/linked.png").symlink_to("../../pool/p2_mask.png")
    to.image("pool/p2.png")
    to.mask("pool/p2_mask.png", 255, colour)
    to.text("pool/.hidden/note.png")
    assert not any("not read" in note for note in read_data("set", tmp_path, complete=False).notes)
    for name in ("test/images/a.png", "test/images/b.png", "extra/deep/c.jpg"):
        to.image(name)
    data = read_data("set", tmp_path, "colours" if colour else "folders", complete=False)
    assert "3 other images were not read: 1 of extra/deep/, 2 of test/images/" in data.notes
    assert len(data.samples) == 5


def test_all_words_for_a_split_are_read_beside_each_other(tmp_path: Path) -> None:
    paired_set(tmp_path, splits=("train", "training", "Valid", "testing"), place="{split}/{folder}")
    data = read_data("set", tmp_path, "folders")
    assert {s.id.split("/")[0]: s.split for s in data.samples} == {
        "train": "train", "training": "train", "val": "val", "test": "test"
    }  # fmt: skip
    assert len(data.samples) == 12


@pytest.mark.parametrize("stems", STEMS)
def test_what_stands_around_the_stems_is_found_from_the_names(tmp_path: Path, stems: tuple[str, str]) -> None:
    data = check_pairs(tmp_path, paired_set(tmp_path, "imgs", "labels", stems))
    assert data.tasks == ("semseg",)


@pytest.mark.parametrize("stems", STEMS)
def test_the_folders_that_were_read_before_take_such_names_too(tmp_path: Path, stems: tuple[str, str]) -> None:
    check_pairs(tmp_path, paired_set(tmp_path, stems=stems), format_name="pairs")


@pytest.mark.parametrize(
    "stems", [("{}", "{}_mask"), ("{}", "{}_GT"), ("{}_sat", "{}_mask"), ("img_{}", "mask_{}"), ("{}", "{}")]
)
def test_images_and_masks_beside_each_other_are_told_apart(tmp_path: Path, stems: tuple[str, str]) -> None:
    check_pairs(tmp_path, paired_set(tmp_path, "shots", "shots", stems))


@pytest.mark.parametrize(
    ("folder", "name"), [("gt", "{}_{}"), ("gt", "{}_mask_{}"), ("gt", "{}_obj{}"), ("imgs", "{}_mask_{}")]
)
def test_several_masks_of_a_name_are_objects(tmp_path: Path, folder: str, name: str) -> None:
    to = Builder(tmp_path)
    wanted = {}
    for i in range(4):
        image = to.image(f"imgs/s{i}.jpg")
        wanted[image] = [to.areas[to.mask(f"{folder}/{name.format(f's{i}', k)}.png")] for k in range(i % 3 + 1)]
    data = read_data("set", tmp_path)
    assert data.tasks == ("semseg", "detect", "instseg") and areas_of(data) == wanted


def test_masks_may_be_indices_or_colours(tmp_path: Path) -> None:
    for kind, colour in (("indices", None), ("colours", (0, 128, 0))):
        to = Builder(tmp_path / kind)
        for i in range(3):
            to.image(f"img_dir/p{i}.png")
            to.mask(f"ann_dir/p{i}.png", 1, colour)
        data = read_data("set", tmp_path / kind)
        assert data.classes == (("background", "defect") if colour is None else ("#000000", "#008000"))
        assert sorted(own[0] for own in areas_of(data).values()) == [1, 2, 3]


def test_pages_of_a_stack_go_with_those_of_its_mask(tmp_path: Path) -> None:
    for folder, value in (("scans", 7), ("gt", 1)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            pages = [Image.fromarray(np.full(SIZE, value * (i == 1), np.uint8)) for i in range(2)]
            suffix = "_gt" if folder == "gt" else ""
            pages[0].save(tmp_path / folder / f"{name}{suffix}.tif", save_all=True, append_images=pages[1:])
    data = read_data("set", tmp_path)
    assert {s.id: (s.group, int(data.read_target(s, SIZE).semantic.max())) for s in data.samples} == {  # type: ignore[union-attr]
        f"scans/{name}.tif/{page:04d}": (f"scans/{name}.tif", page) for name in "abc" for page in range(2)
    }


def test_what_has_no_partner_is_told(tmp_path: Path) -> None:
    areas = paired_set(tmp_path, "imgs", "gt", splits=("train", "test"), place="{split}/{folder}")
    to = Builder(tmp_path)
    to.image("train/imgs/bare.jpg")
    to.mask("test/gt/free.png")
    for split, folder in (("val", "imgs"), ("val", "depth")):
        to.image(f"{split}/{folder}/v.jpg")
    data = read_data("set", tmp_path)
    said = "\n".join(data.notes)
    assert "1 image has no mask" in said and "train/imgs/bare.jpg" in said
    assert "1 mask has no image: test/gt/free.png" in said
    assert "no image of the split val has a mask: it is omitted, with 1 image" in said
    assert "1 of val/depth/" in said
    assert {s.id for s in data.samples} == {*areas, "train/imgs/bare.jpg"}
    with pytest.raises(DataError, match=r"no mask .*train/gt/bare\.png[\s\S]*wanted  7 masks\n  found   6"):
        data.read_target(next(s for s in data.samples if "bare" in s.id), SIZE)


# ---- sets that are described -----------------------------------------------------------------------------------------


def test_any_layout_may_be_described_instead(tmp_path: Path) -> None:
    to, wanted = Builder(tmp_path), {}
    for site in ("north", "south"):
        for i in range(3):
            image = to.image(f"shots/{site}/C{i}_a{site}.JPG")
            wanted[image] = to.areas[to.mask(f"seg/C{i}_a{site}_m.png")]
    data = check_pairs(tmp_path, wanted, images="shots/*/*.jpg", masks="seg/{stem}_m.png")
    assert not [note for note in data.notes if "found by" in note]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("**/scan_{stem}.jpg", "drawn/{stem}.*"),
        ("raw/{dir}/scan_{stem}.jpg", "drawn/{stem}.png"),
        ("raw/**/*_{stem}.jpg", "**/{stem}.png"),
        ("{dir}/scan_{stem}.jpg", "drawn/{stem}.png"),
        ("RAW/**/*.JPG", "drawn/{stem}.png"),
    ],
)
def test_descriptions_of_one_layout(tmp_path: Path, images: str, masks: str) -> None:
    to, wanted = Builder(tmp_path), {}
    for i in range(3):
        stem = f"{i}" if "{stem}" in images else f"scan_{i}"
        image = to.image(f"raw/day{i % 2}/x/scan_{i}.jpg")
        wanted[image] = to.areas[to.mask(f"drawn/{stem}.png")]
    check_pairs(tmp_path, wanted, images=images, masks=masks)


@pytest.mark.parametrize(
    ("images", "masks", "said"),
    [
        ("/etc/*.jpg", "{stem}.png", "is no path below the data folder"),
        ("../*.jpg", "{stem}.png", "is no path below the data folder"),
        ("imgs/*.jpg", "gt/../../{stem}.png", "is no path below the data folder"),
        ("C:/imgs/*.jpg", "{stem}.png", "is no path below the data folder"),
        ("imgs//*.jpg", "{stem}.png", "a part without a name"),
        ("imgs/*.jpg", "gt/{stme}.png", "a field {stme}. Did you mean stem? Known: dir, split, stem.\n"),
        ("imgs/{parent}/*.jpg", "gt/{stem}.png", "a field {parent}."),
        ("imgs/{stem.jpg", "gt/{stem}.png", "a brace without its other half"),
        ("imgs**/*.jpg", "gt/{stem}.png", "beside other text"),
        ("imgs/**", "gt/{stem}.png", "ends with folders"),
        ("{split}/{split}/*.jpg", "gt/{stem}.png", "has {split} twice"),
        ("imgs/*.jpg", "gt/*.png", "does not say to which image a mask belongs"),
        ("imgs/*.jpg", "{split}/{stem}.png", "a field {split}, and images"),
        ("", "gt/{stem}.png", "is no path below the data folder"),
        ("shots/*.jpg", "gt/{stem}.png", "fits no file of"),
        ("imgs/*.jpg", "seg/{stem}_m.png", "wanted  seg/p07_m.png for imgs/p07.jpg\n  found   no file that fits"),
        ("imgs/*.jpg", "gt/{stem}_m.*", "wanted  gt/p07_m.* for imgs/p07.jpg"),
        ("**/*.jpg", "g*/{stem}.*", "gives one image the masks"),
        ("**/*.jpg", "gt/{stem}.png", "the same masks, gt/p07.png"),
    ],
)
def test_a_description_that_can_not_be_followed_is_refused(tmp_path: Path, images: str, masks: str, said: str) -> None:
    paired_set(tmp_path, "imgs", "gt")
    if said == "gives one image the masks":
        Builder(tmp_path).mask("gt2/p07.png")
    if said.startswith("the same"):
        Builder(tmp_path).image("other/p07.jpg")
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path, images=images, masks=masks)
    assert said in str(error.value), str(error.value)


def test_a_described_set_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    paired_set(tmp_path / "set", "imgs", "gt")
    Builder(tmp_path).mask("secret.png")
    (tmp_path / "set" / "gt" / "p07.png").unlink()
    (tmp_path / "set" / "gt" / "p07.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="is a link out of the data folder"):
        read_data("set", tmp_path / "set", images="imgs/*.jpg", masks="gt/{stem}.png")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"images": "imgs/*.jpg"}, "masks is missing beside images = 'imgs/*.jpg'"),
        ({"masks": "gt/{stem}.png"}, "images is missing beside masks"),
        ({"images": "imgs/*.jpg", "masks": "gt/{stem}.png", "format_name": "coco"}, "the format coco was named too"),
    ],
)
def test_half_a_description_and_one_beside_a_format_are_refused(tmp_path: Path, how: dict[str, str], said: str) -> None:
    paired_set(tmp_path, "imgs", "gt")
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path, **how)  # type: ignore[arg-type]
    assert said in str(error.value)


def run(workspace: Path, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["--workspace", str(workspace), *words])
    assert result.exit_code == code, result.output
    return result.output


def described(data: DataSet) -> list[tuple[object, ...]]:
    samples = [(s.id, s.group, s.split, str(s.image)) for s in data.samples]
    return [*samples, data.classes, data.tasks, *sorted(areas_of(data).items())]


@pytest.mark.parametrize("name", [n for n, own in LAYOUTS.items() if own.pairs and n != "DAGM"])
def test_the_description_that_data_info_prints_reads_the_very_same(tmp_path: Path, name: str) -> None:
    root = tmp_path / "the set's"
    LAYOUTS[name].build(Builder(root))
    printed = run(tmp_path, "data", "info", str(root))
    toml = printed[printed.index("[data.") :]
    told = json.loads(run(tmp_path, "data", "info", str(root), "--json"))["description"]
    assert tomllib.loads(toml)["data"] == {"the_set_s": told} and {"path", "images", "masks"} == told.keys()
    (tmp_path / "featprobe.toml").write_text(toml.replace("[data.the_set_s]", "[data.again]"), encoding="utf-8")
    workspace = Workspace(tmp_path)
    assert described(workspace.data_set("again")) == described(workspace.data_set(str(root)))


def test_a_description_holds_groups_splits_and_classes_too(tmp_path: Path) -> None:
    paired_set(tmp_path / "set", "imgs", "gt", ("C{}_a", "C{}_a_m"))
    ids = [f"imgs/Cp{i}7_a.jpg" for i in range(3)]
    rows = "".join(f"{own},,{split}\n" for own, split in zip(ids, ("train", "val", "test"), strict=True))
    (tmp_path / "split.csv").write_text(f"id,group,split\n{rows}", encoding="utf-8")
    lines = ["path = 'set'", r"group_from = '(C\w\d)'", "split_file = 'split.csv'", 'classes = ["good", "bad"]']
    (tmp_path / "featprobe.toml").write_text("[data.one]\n" + "\n".join(lines), encoding="utf-8")
    printed = run(tmp_path, "data", "info", "one")
    toml = printed[printed.index("[data.one]") :]
    assert tomllib.loads(toml)["data"]["one"].keys() == {
        "path", "images", "masks", "group_from", "split_file", "classes",
    }  # fmt: skip
    before = described(Workspace(tmp_path).data_set("one"))
    (tmp_path / "featprobe.toml").write_text(toml, encoding="utf-8")
    assert described(Workspace(tmp_path).data_set("one")) == before
    assert [s.group for s in Workspace(tmp_path).data_set("one").samples] == ["Cp0", "Cp1", "Cp2"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("images = 'a/*.jpg'", "images without masks"),
        ("masks = 'a/{stem}.png'", "masks without images"),
        ("images = 'a/*.jpg'\nmasks = 'b/{stem}.png'\nformat = 'coco'", "omit one of the two"),
        ("images = 'a/*.jpg'\nmasks = 'b/{stme}.png'", "Did you mean stem?"),
        ("images = '../*.jpg'\nmasks = 'b/{stem}.png'", "is no path below the data folder"),
        ("images = 3\nmasks = 'b/{stem}.png'", "data.one.images: wanted a text, found 3"),
        ("groups = '(C\\d+)'", "Did you mean group_from?"),
        ("mask = 'b/{stem}.png'", "Did you mean masks"),
    ],
)
def test_a_bad_description_in_the_workspace_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "featprobe.toml").write_text(f"[data.one]\npath = 'set'\n{lines}\n", encoding="utf-8")
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "data"])
    assert result.exit_code == 1 and said in result.output and "data.one" in result.output, result.output


def test_all_faults_of_a_section_are_said_at_once(tmp_path: Path) -> None:
    lines = ["path = 'set'", "tyle = 3", "size = 'banana'", "images = 'a/*.jpg'", "masks = 'b/x.png'"]
    text = "\n".join(["[data.one]", *lines, "group_from = '(['", "overlap = 'wide'"])
    (tmp_path / "featprobe.toml").write_text(text, encoding="utf-8")
    said = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "data"]).output
    wanted = (
        "data.one.tyle: unknown",
        "banana",
        "does not say to which image a mask belongs",
        "no regular expression",
        'data.one.overlap: wanted a whole number, found "wide"',
    )
    assert all(part in said for part in wanted), said
    assert "?." not in said and ".." not in said, said


@pytest.mark.parametrize("words", [("--images", ""), ("--masks", ""), ("--group-from", "")])
def test_an_empty_text_is_refused_and_not_taken_as_none(tmp_path: Path, words: tuple[str, str]) -> None:
    paired_set(tmp_path / "set")
    said = run(tmp_path, "data", "info", str(tmp_path / "set"), *words, code=2)
    assert f"{words[0]}: an empty text" in said, said


def test_every_command_takes_a_description_and_the_cache_keeps_it(tmp_path: Path) -> None:
    root = tmp_path / "set"
    areas = paired_set(root, "shots", "drawings", ("{}", "{}_m"), splits=("a", "b"), place="{folder}/{split}")
    words = ["--images", "shots/{dir}/*.jpg", "--masks", "drawings/{dir}/{stem}_m.png"]
    assert "6 images" in run(tmp_path, "data", "info", str(root), *words)
    run(tmp_path, "data", "show", str(root), "--out", str(tmp_path / "s.png"), *words)
    run(tmp_path, "data", "check", str(root), "--quiet", *words)
    run(tmp_path, "data", "split", str(root), "--out", str(tmp_path / "s.csv"), "--split", "group", "--quiet", *words)
    run(tmp_path, "data", "convert", str(root), "--out", str(tmp_path / "coco"), "--quiet", *words)
    converted = read_data("set", tmp_path / "coco")
    assert {s.id for s in converted.samples} == {*areas}
    backbone = ["--backbone", "test_vit", "--random-init", "--data", str(root), "--size", "64x64"]
    run(tmp_path, "plan", *backbone, *words, "--quiet")
    run(tmp_path, "extract", *backbone, *words, "--quiet")
    cache = open_cache(Workspace(tmp_path).cache_files()[0])
    provenance = cache.contents.provenance
    assert provenance["read_as"] == {"images": words[1], "masks": words[3]}
    assert shlex.join(words) in provenance["command"]
    run(tmp_path, *shlex.split(provenance["command"])[1:], "--quiet")
    assert len(Workspace(tmp_path).cache_files()) == 1


# ---- what can't be told from the names -------------------------------------------------------------------------------


def said_of(root: Path) -> str:
    with pytest.raises(DataError) as error:
        read_data("set", root)
    return str(error.value)


def test_masks_of_several_kinds_are_listed_with_their_pairs(tmp_path: Path) -> None:
    """As in Cityscapes (Cordts et al., 2016)."""
    to = Builder(tmp_path)
    for split in ("train", "val"):
        for i in range(3):
            name = f"{split}/ulm/ulm_00000{i}_000019"
            to.image(f"leftImg8bit/{name}_leftImg8bit.png")
            for kind in ("labelIds", "instanceIds", "color"):
                to.mask(f"gtFine/{name}_gtFine_{kind}.png")
            to.text(f"gtFine/{name}_gtFine_polygons.json", "{}")
    said = said_of(tmp_path)
    assert said.count("6 pairs of ") == 3 and "--masks 'gtFine/{split}/{dir}/{stem}_gtFine_labelIds.png'" in said
    how = {
        "images": "leftImg8bit/{split}/{dir}/{stem}_leftImg8bit.png",
        "masks": "gtFine/{split}/{dir}/{stem}_gtFine_labelIds.png",
    }
    assert len(read_data("set", tmp_path, **how).samples) == 6  # type: ignore[arg-type]


def test_numbers_tell_images_apart_and_are_never_set_aside(tmp_path: Path) -> None:
    to = Builder(tmp_path)
    for i in range(4):
        to.image(f"imgs/{i}_000_01.png")
        to.mask(f"gt/{i}_002_00.png")
    assert "lacks   matching names" in said_of(tmp_path)


def test_two_images_of_one_mask_are_both_named(tmp_path: Path) -> None:
    to = Builder(tmp_path)
    for i in range(3):
        to.image(f"imgs/p{i}.jpg")
        to.image(f"imgs/p{i}.png")
        to.mask(f"gt/p{i}.png")
    assert "imgs/p0.jpg and imgs/p0.png the same masks, gt/p0.png" in said_of(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("imgs/train/p{}.png", "gt/p{}.png"), ("imgs/day{}/p{}.png", "gt/p{}.png"),
        ("imgs/day{}/p{}.png", "gt/day{}/p{}.png"),
        ("set/photos/p{}.png", "set/labels/p{}.png"), ("p{}.png", "label/p{}.png"), ("b{}/x.jpg", "b{}/x_mask.png"),
        ("b{}/img/x.png", "b{}/gt/x.png"), ("2{}_Nov.v1/imgs/x.png", "2{}_Nov.v1/gt/x.png"),
    ],
)  # fmt: skip
def test_places_that_are_less_alike(tmp_path: Path, image: str, mask: str) -> None:
    to, wanted = Builder(tmp_path), {}
    for i in range(4):
        drawn = to.mask(mask.format(i, i))
        wanted[to.image(image.format(i, i))] = to.areas[drawn]
    check_pairs(tmp_path, wanted)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["images/a.png", "images/b.png", "labels/a.txt", "labels/b.txt"], ["nearest yolo", "lacks   *.yaml"]),
        (["images/a.png", "masks/b.png"], ["nearest pairs", "1 image in images/", "lacks   matching names"]),
        (
            ["images/a.png", "gt/a.mat"],
            ["nearest pairs", "lacks   masks that are images; it has 1 file of .mat in gt/"],
        ),
        (["images/a.png"], ["nearest pairs", "lacks   masks: a folder called masks", "1 images in images/"]),
        (["masks/a.png"], ["lacks   images"]),
        (["Annotations/a.xml", "pictures/a.jpg"], ["nearest", "lacks"]),
        (["train/good/0.png", "test/0.png"], ["nearest mvtec-ad", "lacks   ground_truth"]),
        (["notes.txt"], ["in a format that `featprobe data` lists"]),
    ],
)
def test_a_refusal_names_the_nearest_format_and_what_it_lacks_first(
    tmp_path: Path, files: list[str], said: list[str]
) -> None:
    for file in files:
        (Builder(tmp_path).image if file.endswith(("png", "jpg")) else Builder(tmp_path).text)(file)
    found = said_of(tmp_path)
    assert all(part in found for part in said), found
    assert "severstal" not in found and len(found.splitlines()) <= 8


def test_a_set_in_a_folder_of_the_one_that_was_named_is_pointed_to(tmp_path: Path) -> None:
    for i in range(3):
        Builder(tmp_path).image(f"release/p{i}.png")
        Builder(tmp_path).text(f"release/labels/p{i}.txt", "0 0.5 0.5 0.2 0.2\n")
    Builder(tmp_path).text("release/data.yaml", "train: .\nval: .\nnames: [pore]\n")
    Builder(tmp_path).text("README.md")
    assert f"nearest yolo, in {tmp_path / 'release'}\nNothing was read. Use that folder." in said_of(tmp_path)


def test_a_refusal_of_a_named_format_says_what_that_one_lacks(tmp_path: Path) -> None:
    Builder(tmp_path).image("images/a.png")
    with pytest.raises(DataError, match=r"read as voc\.[\s\S]*wanted  Pascal VOC[\s\S]*lacks   Annotations/\*\.xml"):
        read_data("set", tmp_path, "voc")


def test_images_of_several_kinds_are_listed_too(tmp_path: Path) -> None:
    to = Builder(tmp_path)
    for i in range(3):
        for kind in ("flair", "t1"):
            to.image(f"p{i}/p{i}_{kind}.png")
        to.mask(f"p{i}/p{i}_seg.png")
    said = said_of(tmp_path)
    assert all(f"3 pairs of --images '{{dir}}/{{stem}}_{kind}.png'" in said for kind in ("flair", "t1"))


def test_a_folder_of_each_image_needs_no_names_that_meet(tmp_path: Path) -> None:
    to, wanted = Builder(tmp_path), {}
    for i in range(5):
        masks = [to.mask(f"set/s{i}/masks/{i * 31 + k:x}.png") for k in range(2)]  # one is called as its image
        wanted[to.image(f"set/s{i}/images/{i * 31 + 1:x}.png" if not i else f"set/s{i}/images/x{i}.png")] = masks
    assert areas_of(read_data("set", tmp_path)) == {name: [to.areas[m] for m in own] for name, own in wanted.items()}


def test_a_study_and_compare_keep_to_a_description() -> None:
    table = {"images": "shots/*.jpg", "masks": "seg/{stem}_m.png", "group_from": "C"}
    made = configured(ExtractOptions(), table)
    assert (made.images, made.masks, made.group_from, made.format) == (*table.values(), None)
    named = configured(ExtractOptions(format="coco"), table)
    assert (named.images, named.masks, named.format) == (None, None, "coco")
    told = configured(ExtractOptions(images="*.png", masks="{stem}_gt.png"), {"format": "coco"})
    assert (told.images, told.masks, told.format) == ("*.png", "{stem}_gt.png", None)
    features = {
        "label": "b", "size": [64, 64], "levels": [{"name": "stride4"}], "fit": "resize", "intensity": "none",
        "views": ["none"], "dtype": "fp16", "precision": "fp32",
    }  # fmt: skip
    card = {"features": features, "backbone": None, "read_as": table, "result": {"regime": "frozen"}}
    assert "--images 'shots/*.jpg' --masks 'seg/{stem}_m.png' --group-from C" in command_of_card(card, "set", {})


def test_a_set_of_which_few_images_have_masks_is_refused_with_the_first_that_has_none(tmp_path: Path) -> None:
    to = Builder(tmp_path)
    for i in range(9):
        to.image(f"imgs/p{i}.png")
        to.mask(f"gt/p{i}.png" if i < 2 else f"gt/p{i + 50}.png")
    said = said_of(tmp_path)
    assert "wanted  9 masks: imgs/p2.png needs gt/p2.png\n  found   2 pairs of --images 'imgs/{stem}.png'" in said
    how = {"images": "imgs/{stem}.png", "masks": "gt/{stem}.png"}
    assert len(read_data("set", tmp_path, **how).samples) == 9  # type: ignore[arg-type]


def test_names_of_two_forms_of_unicode_are_two_images_each_with_its_own_mask(tmp_path: Path) -> None:
    to, areas = Builder(tmp_path), {}
    for form in ("NFC", "NFD"):
        for i in range(3):
            name = unicodedata.normalize(form, f"Pr\xfcf{i}")
            drawn = to.mask(f"gt/{name}.png")
            areas[to.image(f"img/{name}.png")] = to.areas[drawn]
    assert len(areas) == 6
    check_pairs(tmp_path, areas)


@pytest.mark.parametrize("mask", ["{}", "{}_mask", "{}_{}"])
def test_a_mask_whose_name_is_percent_encoded_or_decomposed_is_its_images(tmp_path: Path, mask: str) -> None:
    to, areas = Builder(tmp_path), {}
    for i, name in enumerate(("part one %", "Pr\xfcf zwei %", "plain %")):
        name = name.replace("%", str(i))
        written = unicodedata.normalize("NFD", name).replace(" ", "%20")
        drawn = [to.mask(f"gt/{mask.format(written, n)}.png") for n in range(2 if mask == "{}_{}" else 1)]
        areas[to.image(f"img/{name}.png")] = [to.areas[each] for each in drawn]
    data = read_data("set", tmp_path)
    assert {name: sorted(own) for name, own in areas_of(data).items()} == {n: sorted(a) for n, a in areas.items()}


def test_a_mask_that_could_be_of_two_images_by_its_looks_is_refused(tmp_path: Path) -> None:
    to = Builder(tmp_path)
    for image, mask in (("a b", "a b"), ("Pr\xfcf%201", "Pr\xfcf 1"), ("c", "c"), ("Pru\u0308f%201", "Pru\u0308f 1")):
        to.image(f"img/{image}.png")
        to.mask(f"gt/{mask}.png")
    with pytest.raises(DataError, match="several names look like that"):
        read_data("set", tmp_path, images="img/{stem}.png", masks="gt/{stem}.png")


@pytest.mark.parametrize(("kind", "number"), [("u1", 1), ("?", 1), ("i8", 255), ("<u2", 1)])
def test_masks_may_be_arrays_of_whole_numbers(tmp_path: Path, kind: str, number: int) -> None:
    to, areas = Builder(tmp_path), {}
    (tmp_path / "gt").mkdir()
    for i in range(3):
        values = np.zeros(SIZE, kind)
        values[: i + 1, :3] = number
        np.save(tmp_path / f"gt/p{i}.npy", values)
        areas[to.image(f"img/p{i}.png")] = 3 * (i + 1)
    check_pairs(tmp_path, areas)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full(SIZE, 0.5), "float64"),
        (np.full((*SIZE, 3), 1), "can't be read as a mask"),
        (np.full(SIZE, -1), "labels up to -1"),
        (np.array([{}], dtype=object), "can't be read as an array of numbers"),
    ],
)
def test_an_array_that_is_no_mask_is_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    Builder(tmp_path).image("img/p0.png")
    (tmp_path / "gt").mkdir()
    np.save(tmp_path / "gt/p0.npy", values, allow_pickle=True)
    with pytest.raises(DataError) as error:
        data = read_data("set", tmp_path, complete=False)
        data.read_target(data.samples[0], SIZE)
    assert said in str(error.value) and "p0.npy" in str(error.value), str(error.value)


def test_dicom_masks_are_refused_in_words(tmp_path: Path) -> None:
    Builder(tmp_path).image("img/p0.png")
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt/p0.dcm").write_bytes(bytes(128) + b"DICM")
    assert "1 file of .dcm in gt/" in said_of(tmp_path)
    with pytest.raises(DataError, match="can only be images"):
        read_data("set", tmp_path, images="img/{stem}.png", masks="gt/{stem}.dcm")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_and_a_mask_in_a_folder_of_each_part(tmp_path: Path, suffix: str) -> None:
    to, areas = Builder(tmp_path), {}
    for i in range(3):
        drawn = to.mask(f"part{i}/mask.png")
        areas[to.image(f"part{i}/image.{suffix}")] = to.areas[drawn]
    assert check_pairs(tmp_path, areas).tasks == ("semseg",)


def test_braces_in_names_of_files_hold_nothing_up_and_those_of_folders_are_named(tmp_path: Path) -> None:
    check_pairs(tmp_path / "a", paired_set(tmp_path / "a", "img", "gt", ("{}{{1}}", "{}{{1}}")))
    paired_set(tmp_path / "b", "{x}/img", "{x}/gt")
    said = said_of(tmp_path / "b")
    assert "not searched: {x}/, {x}/gt/, {x}/img/" in said, said


def test_linked_folders_are_named_where_nothing_is_found(tmp_path: Path) -> None:
    paired_set(tmp_path / "far", "img", "gt")
    (tmp_path / "set").mkdir()
    for name in ("img", "gt"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "far" / name)
    assert "linked folders are not entered: gt, img" in said_of(tmp_path / "set")
    with pytest.raises(DataError, match="gt, img: linked folders are not entered"):
        read_data("set", tmp_path / "set", images="img/{stem}.jpg", masks="gt/{stem}.png")


def test_pictures_for_a_report_beside_images_and_masks_are_no_way_to_read_a_set(tmp_path: Path) -> None:
    areas = paired_set(tmp_path, "a", "a", ("{}", "{}_mask"))
    for name in areas:
        Builder(tmp_path).image(f"a/{Path(name).stem}_overlay.png")
    check_pairs(tmp_path, areas)


def test_objects_that_begin_late_in_a_large_set_are_objects() -> None:
    files = [f"img/p{i:05}.jpg" for i in range(1200)] + [f"gt/p{i:05}_0.png" for i in range(1200)]
    assert [own.description.of_objects for own in find_layouts(files)] == [False]
    assert [own.description.of_objects for own in find_layouts([*files, "gt/p01199_1.png"])] == [True]
