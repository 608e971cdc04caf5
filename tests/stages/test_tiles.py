"""Tiles and views: what is cut, what comes back on whole images, and that caches without them stay what they were."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import (
    PoolingBackbone,
    change_part,
    filled_cache,
    make_cache,
    recipe_of,
    spy_on_writes,
    training_of,
    write_set,
)
from helpers import extract as extract_into
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tasks import write_coco
from torch import Tensor

from featprobe import processes
from featprobe.cache import Cache, open_cache
from featprobe.datasets.images.reading import frame_image, read_levels
from featprobe.errors import CacheError, DataError, ProbeError
from featprobe.features import Features
from featprobe.geometry import Part, Placement, place, place_tile, tile_starts, tiles_of
from featprobe.kinds import TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.metrics import confusion_matrix
from featprobe.probes import best_classes
from featprobe.probes.saved import read_card
from featprobe.specs import BackboneSpec
from featprobe.splitting import SplitChoice
from featprobe.stages.commands import commands_of
from featprobe.stages.extraction.crops import Augmentation
from featprobe.stages.extraction.extract import extract as extract_for_real
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.partition import Partition, single_splits
from featprobe.stages.predict import predict
from featprobe.stages.stitch import stitched_logits, stitched_objects, whole_logits
from featprobe.stages.tasks.task import scored_here
from featprobe.stages.training.augment import augment
from featprobe.stages.training.finetune import finetune, missing_counterparts
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.training.prepared import prepare, source_of, trials_of
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import (
    IGNORE,
    Instance,
    cut_instances,
    decode_rle,
    encode_rle,
    labels_in_frame,
    move_rle,
)
from featprobe.tiling import parse_views

BRIEF = TrainRecipe(iterations=6, batch_size=4, lr=2e-3, evaluations=2, clip=10.0)
SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# ---- geometry --------------------------------------------------------------------------------------------------------

cuts = st.integers(1, 60).flatmap(lambda tile: st.tuples(st.just(tile), st.integers(0, tile - 1)))


@given(length=st.integers(1, 300), cut=cuts)
def test_tiles_cover_a_side_overlap_as_asked_and_are_as_few_as_can_be(length: int, cut: tuple[int, int]) -> None:
    tile, overlap = cut
    starts = tile_starts(length, tile, overlap)
    own = min(tile, length)
    shown = np.zeros(length, dtype=int)
    for start in starts:
        assert 0 <= start and start + own <= length, "no tile leaves the image"
        shown[start : start + own] += 1
    assert shown.all()
    assert all(a + own - b >= overlap and a < b for a, b in pairwise(starts))
    assert len(starts) == 1 or (len(starts) - 1) * (tile - overlap) + overlap < length, "one less would not do"


@given(height=st.integers(1, 90), width=st.integers(1, 90), cut=cuts)
def test_tiles_show_every_pixel_of_an_image(height: int, width: int, cut: tuple[int, int]) -> None:
    shown = np.zeros((height, width), dtype=int)
    for part in tiles_of((height, width), *cut):
        shown[part.top : part.top + part.height, part.left : part.left + part.width] += 1
    assert shown.all()


def test_tiles_of_any_image_have_one_scale() -> None:
    assert place_tile((100, 30), 100, (50, 50), 32) == Placement((100, 30), (50, 15), (64, 64))
    assert place_tile((100, 100), 100, (100, 100), 32) == place((100, 100), (100, 100), "letterbox", 32)


views = st.sampled_from(["identity", "hflip", "vflip", "rot90", "crop1"])


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, int], Part]:
    height, width = draw(st.integers(4, 40)), draw(st.integers(4, 40))
    top, left = draw(st.integers(0, height - 2)), draw(st.integers(0, width - 2))
    part = Part(left, top, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)), draw(views))
    return (height, width), part


@given(made=parts(), data=st.data())
def test_boxes_and_masks_go_where_the_pixels_go(made: tuple[tuple[int, int], Part], data: st.DataObject) -> None:
    size, part = made
    y1, x1 = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    y2, x2 = data.draw(st.integers(y1 + 1, size[0])), data.draw(st.integers(x1 + 1, size[1]))
    mask = np.zeros(size, dtype=bool)
    mask[y1:y2, x1:x2] = True
    seen = part.take(mask)
    assert seen.shape == part.size
    box = (float(x1), float(y1), float(x2), float(y2))
    drawn = np.zeros(part.size, dtype=bool)
    a, b, c, d = (int(v) for v in part.take_box(box))
    drawn[b:d, a:c] = True
    np.testing.assert_array_equal(drawn, seen)
    found = cut_instances([Instance(1, box, encode_rle(mask), area=7.0), Instance(2, box)], part)
    assert len(found) == (2 if seen.any() else 0)
    if not seen.any():
        return
    masked, plain = found
    np.testing.assert_array_equal(decode_rle(masked.rle or {}), seen)
    assert masked.box_xyxy == plain.box_xyxy == (a, b, c, d) and masked.crowd == plain.crowd
    share = seen.sum() / mask.sum()
    assert masked.crowd == (share < 0.25 or (share < 1 and min(c - a, d - b) < 2)), "the stated rule for slivers"
    assert masked.area == (7.0 if share == 1 else None)


@given(made=parts(), turn=st.sampled_from(["hflip", "vflip"]))
def test_flipping_twice_changes_nothing(made: tuple[tuple[int, int], Part], turn: str) -> None:
    (height, width), _ = made
    pixels = np.random.default_rng(height).random((height, width, 3))
    part = Part(0, 0, height, width, turn)
    np.testing.assert_array_equal(part.take(part.take(pixels)), pixels)
    instance = Instance(1, (1.0, 0.5, width / 2, height * 1.0), encode_rle(pixels[:, :, 0] > 0.3))
    assert cut_instances(cut_instances([instance], part), part) == (instance,)


def test_four_quarter_turns_change_nothing() -> None:
    pixels = np.arange(24).reshape(4, 6)
    instance = Instance(1, (1.0, 0.0, 5.0, 3.0), encode_rle(pixels > 7))
    turned, found = pixels, (instance,)
    for _ in range(4):
        part = Part(0, 0, *turned.shape, "rot90")
        turned, found = part.take(turned), cut_instances(found, part)
    np.testing.assert_array_equal(turned, pixels)
    assert found == (instance,)


@given(made=parts(), seed=st.integers(0, 99))
def test_a_tiles_mask_moved_into_the_image_is_the_mask_drawn_there(made: Any, seed: int) -> None:
    size, part = made
    own = np.random.default_rng(seed).random((part.height, part.width)) < seed / 99
    whole = np.zeros(size, dtype=bool)
    whole[part.top : part.top + part.height, part.left : part.left + part.width] = own
    assert move_rle(encode_rle(own), part.left, part.top, size) == encode_rle(whole)


# ---- stitching -------------------------------------------------------------------------------------------------------


def pieces_of(logits: Tensor, tile: int, overlap: int, stride: int = 1) -> list[tuple[list[Tensor], Placement, Part]]:
    """A whole image's logits cut into tiles, as a head that looks at one pixel at a time gives them."""
    size = (logits.shape[1], logits.shape[2])
    return [
        ([torch.from_numpy(part.take(logits.movedim(0, 2).numpy())).movedim(2, 0)],
         place_tile(part.size, tile, (tile, tile), stride), part)
        for part in tiles_of(size, tile, overlap)
    ]  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(height=st.integers(3, 50), width=st.integers(3, 50), tile=st.integers(8, 30), overlap=st.integers(0, 5))
def test_stitched_logits_of_a_pointwise_head_are_those_of_the_whole_image(
    height: int, width: int, tile: int, overlap: int
) -> None:
    logits = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height))
    (found,) = stitched_logits(pieces_of(logits, tile, overlap), 1, (height, width))
    assert torch.allclose(found, logits, atol=1e-6)
    if overlap == 0 and height % tile == width % tile == 0:
        assert torch.equal(found, logits)
    (whole,) = whole_logits(pieces_of(logits, tile, overlap), 1, (height, width))
    classes = best_classes(whole)
    assert (classes == found.argmax(0)).all()


@settings(deadline=None, max_examples=15)
@given(stride=st.sampled_from([1, 2, 4]), overlap=st.integers(0, 7))
def test_a_constant_logit_stays_constant_across_seams(stride: int, overlap: int) -> None:
    size, tile = (37, 53), 16
    pieces = [
        ([torch.full((2, tile // stride, tile // stride), 0.3), torch.full((2, tile // stride, tile // stride), -2.0)],
         place_tile(part.size, tile, (tile, tile), stride), part)
        for part in tiles_of(size, tile, overlap)
    ]  # fmt: skip
    first, second = stitched_logits(pieces, stride, size)
    assert torch.allclose(first, torch.tensor(0.3)) and torch.allclose(second, torch.tensor(-2.0))
    assert first.shape == (2, *size)


def test_one_image_is_held_at_a_time_and_read_as_it_comes() -> None:
    seen: list[int] = []

    def coming() -> Any:
        for number, piece in enumerate(pieces_of(torch.zeros(2, 20, 20), 10, 0)):
            seen.append(number)
            yield piece

    stream = coming()
    stitched_logits(stream, 1, (20, 20))
    assert seen == [0, 1, 2, 3]


def box_in(part: Part, box: tuple[float, float, float, float], score: float, category: int = 1) -> Any:
    """A detection in a tile, of a box of the whole image."""
    mask = np.ones((part.height, part.width), dtype=bool)
    return Instance(category, part.take_box(box), encode_rle(mask)), score


def test_an_object_in_two_tiles_is_found_once_and_the_cut_one_gives_way() -> None:
    left, right = tiles_of((100, 180), 100, 20)
    whole = (70.0, 10.0, 95.0, 30.0)  # whole in the left tile, cut by the border of the right one
    found = stitched_objects([([box_in(left, whole, 0.6)], left), ([box_in(right, whole, 0.9)], right)], (100, 180))
    assert [(i.box_xyxy, score) for i, score in found] == [(whole, 0.6)]
    fragment = (80.0, 10.0, 85.0, 30.0)
    assert (
        len(stitched_objects([([box_in(left, whole, 0.6)], left), ([box_in(right, fragment, 0.9)], right)], (100, 180)))
        == 1
    )
    other = stitched_objects(
        [([box_in(left, whole, 0.6)], left), ([box_in(right, whole, 0.9, category=2)], right)], (100, 180)
    )
    assert [i.category for i, _ in other] == [2, 1], "of two classes both stay, best first"


def test_within_a_tile_nothing_is_dropped_and_masks_are_moved() -> None:
    left, right = tiles_of((100, 180), 100, 20)
    nested = [box_in(right, (120.0, 10.0, 170.0, 60.0), 0.9), box_in(right, (125.0, 15.0, 165.0, 55.0), 0.8)]
    found = stitched_objects([([], left), (nested, right)], (100, 180))
    assert [score for _, score in found] == [0.9, 0.8]
    mask = decode_rle(found[0][0].rle or {})
    assert mask.shape == (100, 180) and mask[:, 80:].all() and not mask[:, :80].any()
    assert stitched_objects([(nested, None)], (100, 180)) is nested, "what is no tile is left alone"
    assert stitched_objects([([], left), ([], right)], (100, 180)) == []


# ---- caches ----------------------------------------------------------------------------------------------------------


class PixelBackbone(PoolingBackbone):
    """A stand-in that looks at one pixel at a time: stride 1, a random 1x1 map."""

    multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.levels = (FeatureLevel("stride1", 5, 1),)
        self.weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def __call__(self, images: Tensor, content: Tensor | None = None) -> Features:
        maps = torch.einsum("oc,bchw->bohw", self.weights, images)
        return Features({"stride1": maps}, (images.shape[2], images.shape[3]), content)


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "parts")


@pytest.fixture(scope="module")
def tiled(coco_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Tiles of 40 pixels of images of 48x96 and 80x56."""
    workspace = Workspace(tmp_path_factory.mktemp("tiled"))
    extract_into(workspace.root, coco_set, tile=40, overlap=8)
    return workspace


def cache_of(workspace: Workspace) -> Cache:
    (path,) = workspace.cache_files()
    return open_cache(path)


def test_each_row_holds_its_tile_and_the_file_the_whole_images(tiled: Workspace, coco_set: Path) -> None:
    cache = cache_of(tiled)
    plain = tiled.data_set(str(coco_set))
    assert [image.id for image in cache.images] == [sample.id for sample in plain.samples]
    for index, sample in enumerate(plain.samples):
        levels = read_levels(sample.image)
        target = plain.read_target(sample, (levels.shape[0], levels.shape[1]))
        np.testing.assert_array_equal(cache.image_semantic(index), target.semantic)
        assert cache.image_instances(index) == target.instances
        own = np.flatnonzero(cache.image_of == index).tolist()
        assert [cache.rows[row].part for row in own] == tiles_of(levels.shape, 40, 8)
        for row in own:
            part, place = cache.rows[row].part, cache.rows[row].placement
            assert part is not None and place.original == (40, 40) == place.content
            np.testing.assert_array_equal(cache.semantic(row), part.take(target.semantic))
            assert cache.instances(row) == cut_instances(target.instances, part)
            framed = frame_image(part.take(levels), place, cache.recipe)
            computed = PoolingBackbone()(torch.from_numpy(framed)[None]).maps["stride4"][0]
            assert np.array_equal(cache.read_row(row, cache.levels[0]), computed.half().numpy())


def test_tiles_of_an_image_never_fall_into_two_splits(tiled: Workspace) -> None:
    cache = cache_of(tiled)
    for row, image in zip(cache.rows, cache.image_of.tolist(), strict=True):
        own = cache.images[image]
        assert (row.split, row.group, row.image, row.image_hash) == (own.split, own.group, own.image, own.image_hash)
    for split in ("own", "group", "image"):
        parts = Partition(cache, SplitChoice(split)).rows.values()
        sides = [set(cache.image_of[rows].tolist()) for rows in parts]
        assert sum(map(len, sides)) == len(set().union(*sides)) == len(cache.images)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_share_out_whole_images(count: int, tiled: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tiled)
    test = cache.usable("test")
    monkeypatch.setattr(processes, "_count", count)
    shared = []
    for rank in range(count):
        monkeypatch.setattr(processes, "_rank", rank)
        shared.append(scored_here(cache, test))
    assert np.concatenate(shared).tolist() == test.tolist()
    of = [set(cache.image_of[rows].tolist()) for rows in shared]
    assert sum(map(len, of)) == len(set.union(*of)), "no image is cut between two processes"


def test_folds_and_split_files_are_of_whole_images(tiled: Workspace, tmp_path: Path) -> None:
    cache = cache_of(tiled)
    names = {
        image.id: "test" if i % 3 == 0 else "val" if i % 3 == 1 else "train" for i, image in enumerate(cache.images)
    }
    lines = [f"{name},g{i // 2},{split}" for i, (name, split) in enumerate(names.items())]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["id,group,split", *lines]))
    mine = SplitChoice.parse(str(file))
    for split in (mine, *single_splits(SplitChoice("group", 3))):
        rows = Partition(cache, split).rows
        shown = {part: {cache.images[i].id for i in cache.image_of[own]} for part, own in rows.items()}
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(cache)))
        assert sum(map(len, shown.values())) == len(cache.images), "no image stands in two splits"
        if split == mine:
            assert {name: part for part, own in shown.items() for name in own} == names
    own = Partition(cache, mine).cache
    assert [image.group for image in own.images] == [line.split(",")[1] for line in lines]
    assert all(row.group == own.images[row.image_index].group for row in own.rows)


def options_of(task: str, **changed: Any) -> ProbeOptions:
    head = {"semseg": "linear", "detect": "fcos", "instseg": "maskrcnn"}[task]
    width = None if task == "semseg" else 16
    return ProbeOptions(**({"head": head, "recipe": BRIEF, "width": width, "seeds": 1, "quiet": True} | changed))


def test_a_cache_without_tiles_has_the_key_it_had_and_nothing_of_parts(tmp_path: Path) -> None:
    cache = filled_cache(tmp_path / "cache.h5")
    assert cache.recipe.key == "39022db3bdd72cf34ee49b632477c19e487daab14c513e564874db453e002741"
    assert cache.contents.identity_sha256 == "f345a7dc40b20fb4e17a2fef4b73a01a70c985616516ab8b2870a8443235411e"
    with h5py.File(cache.path, "r") as file:
        assert file.attrs["version"] == 3 and "images" not in file and "part" not in file["rows"]
        recipe = json.loads(file.attrs["recipe"])
        assert recipe["version"] == 1 and not {"tile", "overlap", "empty_tiles"} & set(recipe)
    assert cache.images is cache.rows and cache.image_of.tolist() == [0, 1, 2, 3]


def test_a_cache_of_tiles_keeps_the_version_of_its_recipe_and_both_views_know_its_parts(tiled: Workspace) -> None:
    cache = cache_of(tiled)
    assert cache.recipe.version == 2 and cache.contents.version == 3
    with h5py.File(cache.path, "r") as file:  # a reader of versions 1 and 2 refuses it by this attribute
        assert file.attrs["version"] == 3
        assert file["rows/part"].shape == (len(cache), 4) and len(file["images/size"]) == len(cache.images) == 21


@pytest.mark.parametrize("name", ["rows/part", "rows/image_index", "images/semantic", "images/size", "images/checksum"])
def test_a_damaged_part_or_whole_label_is_no_sound_cache(name: str, tiled: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "copy.h5"
    path.write_bytes(cache_of(tiled).path.read_bytes())
    change_part(path, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CacheError, match=r"damaged|not what was written"):
        open_cache(path).image_semantic(0)


def test_tiles_go_on_after_a_stop_and_are_copied_when_another_image_changes(
    coco_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_coco(tmp_path / "parts")
    shards = [extract_into(tmp_path / "space", own, tile=40, overlap=8, shard=(i, 3)) for i in (1, 2, 3)]
    assert [bool(report.missing) for report in shards] == [True, True, False]
    assert sum(report.computed for report in shards) == shards[-1].rows > shards[-1].images == 21
    cache = open_cache(shards[-1].path)
    before = {row.id: cache.read_row(i, cache.levels[0]).tobytes() for i, row in enumerate(cache.rows)}
    changed = own / "images" / "train0.png"
    Image.fromarray(255 - read_levels(changed)).save(changed)
    written = spy_on_writes(monkeypatch)
    report = extract_into(tmp_path / "space", own, tile=40, overlap=8)
    tiles = [row.id for row in cache.rows if row.image == "images/train0.png"]
    assert report.computed == len(tiles) == 6 and report.copied == report.rows - 6
    assert len(written) == report.rows, "every row was written once, copied or computed"
    cache = open_cache(report.path)
    after = {row.id: cache.read_row(i, cache.levels[0]).tobytes() for i, row in enumerate(cache.rows)}
    assert {name for name in before if before[name] != after[name]} == set(tiles)


def test_an_image_that_is_smaller_than_a_tile_is_one_tile_at_the_same_scale(tmp_path: Path) -> None:
    data = write_set(tmp_path / "small", 10, size=(24, 48))
    cache = open_cache(extract_into(tmp_path / "space", data, tile=32, overlap=0, size=(16, 16)).path)
    assert {row.placement for row in cache.rows} == {Placement((24, 32), (12, 16), (16, 16))}
    framed = labels_in_frame(cache.semantic(0), cache.rows[0].placement)
    assert (framed[12:] == IGNORE).all() and not (framed[:12] == IGNORE).any()
    viewed = open_cache(
        extract_into(tmp_path / "views", data, tile=32, overlap=0, size=(16, 16), views=("crop:2",)).path
    )
    contents = [row.placement.content for row in viewed.rows if row.part and row.part.view.startswith("crop")]
    assert contents and all(height <= 12 and width <= 16 for height, width in contents), "no larger than the tile lies"
    unit, random = np.zeros((24, 32), dtype=np.float32), np.random.default_rng(0)
    varied = [augment(unit, None, None, cache.recipe, Augmentation(), random).content for _ in range(8)]
    assert all(height <= 12 and width <= 16 for height, width in varied)


def test_empty_tiles_are_thinned_by_a_hash_and_only_in_training(coco_set: Path, tmp_path: Path) -> None:
    def kept(share: float) -> dict[str, bool]:
        path = extract_into(tmp_path / f"{share}", coco_set, tile=20, overlap=0, empty_tiles=share).path
        cache = open_cache(path)
        with_defect = [
            any(not i.crowd for i in cache.instances(k)) or bool((cache.semantic(k) % IGNORE).any())
            for k in range(len(cache))
        ]
        return dict(zip([row.id for row in cache.rows], with_defect, strict=True))

    every, some, none = kept(1.0), kept(0.3), kept(0.0)
    training = {name for name in every if name.startswith("train")}
    empty = {name for name in training if not every[name]}
    assert set(none) == set(every) - empty, "tiles with a defect, and all of val and test, stay"
    assert set(none) < set(some) < set(every)
    assert 0.1 < len(set(some) & empty) / len(empty) < 0.5
    assert kept(0.3) == some


def test_an_image_that_can_not_be_read_takes_no_part_with_any_of_its_tiles(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "parts")
    broken = data / "images" / "test1.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    space = Workspace(tmp_path / "space")
    report = extract_into(space.root, data, tile=40, overlap=8, skip_bad=True)
    assert [name for name, _ in report.unreadable] == ["test1.png@0,0"] and not report.missing
    told = probe(space, options=options_of("semseg"))
    assert told.rows[0]["images"]["test"] == 8 and any("1 of 21 images takes no part" in note for note in told.notes)
    card = read_card(space.probes / told.rows[0]["folder"])
    assert told.rows[0]["unreadable"] == 1 and commands_of(card, [0], "parts")[0].endswith("--skip-bad")


def test_a_colleague_without_the_images_can_probe_and_score(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "parts")
    space = Workspace(tmp_path / "space")
    extract_into(space.root, data, tile=40, overlap=8, views=("crop:1",))
    shutil.rmtree(data)
    report = probe(space, "detect", options=options_of("detect", show=1))
    assert report.rows[0]["images"] == {"train": 8, "val": 4, "test": 9}
    assert not report.sheets and any("no picture sheet" in note for note in report.notes)


# ---- scores on whole images ------------------------------------------------------------------------------------------


def test_a_pointwise_head_scores_the_same_from_tiles_as_from_whole_images(tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 10, size=(24, 40))
    recipe = replace(BRIEF, iterations=1, loss_at="level")
    matrices, groups = [], []
    for name, changed in {
        "whole": {},
        "tiles": {"tile": 16, "overlap": 0},
        "overlapping": {"tile": 16, "overlap": 5},
    }.items():
        space = Workspace(tmp_path / name)
        extract_into(space.root, data, PixelBackbone(), dtype="fp32", **changed)
        (row,) = probe(space, options=replace(options_of("semseg"), recipe=recipe)).rows
        cache = cache_of(space)
        ready = prepare(training_of(space, cache, "semseg", replace(options_of("semseg"), recipe=recipe)))
        head = trials_of(ready)[0].head.eval()  # untrained, and so the same for all three
        with source_of(ready, head) as source:
            (outcome,) = ready.task.evaluate([head], source.batches, ready.rows["test"])
        kept = np.load(space.probes / row["folder"] / "scores.npz")
        groups.append((kept["ids"].tolist(), kept["groups"].tolist(), kept["confusion"].sum((1, 2)).tolist()))
        matrices.append(outcome.scores)
    assert matrices[0] == matrices[1] == matrices[2]
    assert groups[0] == groups[1] == groups[2] and set(groups[0][2]) == {24 * 40}


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_rows_cards_and_files_are_about_whole_images(task: str, tiled: Workspace, coco_set: Path) -> None:
    recipe = replace(BRIEF, iterations=2, evaluations=1)
    (row,) = probe(tiled, task, options=options_of(task, recipe=recipe, show=2)).rows
    assert row["images"] == {"train": 8, "val": 4, "test": 9}
    folder = tiled.probes / row["folder"]
    card = json.loads((folder / "card.json").read_text())
    assert (card["features"]["tile"], card["features"]["overlap"]) == (40, 8)
    assert "--tile 40 --overlap 8" in commands_of(card, [0], "parts")[0] and row["tile"] == 40
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 700
    if task == "semseg":
        kept = np.load(folder / "scores.npz")
        truth = [np.asarray(Image.open(coco_set / "images" / f"{i}")) for i in kept["ids"].tolist()]
        masks = kept["confusion"].sum((1, 2))
        assert len(truth) == 9 and all(m <= t.size for m, t in zip(masks, truth, strict=True))
        return
    own = json.loads((coco_set / "annotations" / "instances_test.json").read_text())
    kept = json.loads((folder / "truth.json").read_text())
    assert [image["id"] for image in kept["images"]] == [image["id"] for image in own["images"]]
    assert [a["bbox"] for a in kept["annotations"]] == [a["bbox"] for a in own["annotations"]]
    found = json.loads((folder / "predictions.json").read_text())
    assert {a["category_id"] for a in found} <= {3, 7} and {a["image_id"] for a in found} <= {
        i["id"] for i in own["images"]
    }
    assert any(a["bbox"][0] > 40 for a in found), "boxes are where their tile is"


def test_fractions_take_whole_images(tiled: Workspace) -> None:
    cache = cache_of(tiled)
    rows = prepare(training_of(tiled, cache, "detect", options_of("detect"), fraction=0.3)).rows
    images = set(cache.image_of[rows["train"]].tolist())
    assert 2 <= len(images) < 8
    every = {k for k, image in enumerate(cache.image_of.tolist()) if image in images}
    assert set(rows["train"].tolist()) == every


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, dict[str, Any]]]:
    """Heads on tiles of a generated set under a real network, random weights."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    make_generated("surface", workspace.data / "surface", images=12, size=(72, 96))
    spec = BackboneSpec("lite0", "tf_efficientnet_lite0", "random", arguments=("--backbone", "lite0", "--random-init"))
    extract_for_real(workspace, spec, "surface", ExtractOptions(tile=64, overlap=16, quiet=True))
    mask_options = options_of("instseg", recipe=replace(BRIEF, iterations=10, evaluations=1))
    dense_options = options_of("semseg", recipe=TrainRecipe(iterations=60, batch_size=4, lr=2e-2, evaluations=1))
    rows = {
        "semseg": probe(workspace, "semseg", options=dense_options).rows[0],
        "instseg": probe(workspace, "instseg", options=mask_options).rows[0],
    }
    return workspace, rows


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semseg", "instseg"])
def test_predict_cuts_and_stitches_as_the_row_was_scored(task: str, trained: Any, tmp_path: Path) -> None:
    workspace, rows = trained
    folder = workspace.probes / rows[task]["folder"]
    cache = cache_of(workspace)
    tested = [k for k, image in enumerate(cache.images) if image.split == "test"]
    images = [Path(cache.data.root) / cache.images[k].image for k in tested]
    predict(folder, images, tmp_path / "out", quiet=True)
    if task == "semseg":
        kept = np.load(folder / "scores.npz")["confusion"]
        found = np.zeros_like(kept)
        for own, k, image in zip(found, tested, images, strict=True):
            with Image.open(tmp_path / "out" / "masks" / f"{image.stem}.png") as mask:
                own[:] = confusion_matrix(cache.image_semantic(k), np.asarray(mask), len(cache.data.classes))
        assert np.abs(found - kept).sum() / kept.sum() < 1e-3 and kept[:, :, 1:].sum() > 50
        return
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    kept = json.loads((folder / "predictions.json").read_text())
    assert all(a["segmentation"]["size"] == [72, 96] for a in [*kept, *written])
    assert len(kept) > 20 and abs(len(written) - len(kept)) <= 0.05 * len(kept) + 1
    ids = [cache.image_id(k) for k in tested]
    for number, image in enumerate(ids, start=1):
        ours = sorted((a["score"] for a in written if a["image_id"] == number), reverse=True)[:5]
        theirs = sorted((a["score"] for a in kept if a["image_id"] == image), reverse=True)[:5]
        assert ours == pytest.approx(theirs, abs=2e-3)


def test_fine_tuning_reads_tiles_as_the_cache_shows_them(trained: Any) -> None:
    workspace, _ = trained
    cache = cache_of(workspace)
    with LiveFeatures(cache, PoolingBackbone(), torch.device("cpu"), lambda row: (None, None)) as live:  # type: ignore[arg-type]
        rows = np.arange(6, dtype=np.intp)
        levels = [live._images.levels(row) for row in rows.tolist()]
    for row, pixels in zip(rows.tolist(), levels, strict=True):
        part = cache.rows[row].part
        assert part is not None
        np.testing.assert_array_equal(pixels, part.take(read_levels(Path(cache.data.root) / cache.rows[row].image)))
    options = options_of("semseg", tuning=Tuning(regime="frozen-online"), recipe=replace(BRIEF, iterations=2))
    (row,) = finetune(workspace, "semseg", options=options).rows
    assert row["images"] == {s: sum(i.split == s for i in cache.images) for s in ("train", "val", "test")}
    assert row["augmentation"]["defect"] == 0.7


# ---- views -----------------------------------------------------------------------------------------------------------

VIEWS = ("hflip", "vflip", "rot90", "crop:3")


@pytest.fixture(scope="module", params=[None, 40])
def viewed(request: pytest.FixtureRequest, coco_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Views of training images, whole and in tiles."""
    workspace = Workspace(tmp_path_factory.mktemp("viewed"))
    extract_into(workspace.root, coco_set, tile=request.param, views=VIEWS, size=(40, 40))
    return workspace


def test_views_are_further_rows_of_training_with_their_own_pixels_and_labels(viewed: Workspace) -> None:
    cache = cache_of(viewed)
    by_id = {row.id: i for i, row in enumerate(cache.rows)}
    assert len(by_id) == len(cache.rows)
    turns = {"hflip": np.fliplr, "vflip": np.flipud, "rot90": np.rot90}
    names: dict[str, set[str]] = {}
    for i, row in enumerate(cache.rows):
        base, _, view = row.id.partition("~")
        names.setdefault(base, set()).add(view)
        assert row.part is not None and row.part.view == (view or "identity")
        if view in turns:
            np.testing.assert_array_equal(cache.semantic(i), turns[view](cache.semantic(by_id[base])))
            for own, plain in zip(cache.instances(i), cache.instances(by_id[base]), strict=True):
                np.testing.assert_array_equal(decode_rle(own.rle or {}), turns[view](decode_rle(plain.rle or {})))
        if view:
            assert row.split == "train" and row.group == cache.rows[by_id[base]].group
            image = read_levels(Path(cache.data.root) / row.image)
            np.testing.assert_array_equal(row.show(image), row.part.take(image))
            assert row.placement.original == row.show(image).shape
    every = {"", "hflip", "vflip", "rot90", "crop1", "crop2", "crop3"}
    for base, own in names.items():
        assert own == (every if base.startswith("train") else {""})


def test_a_flipped_view_holds_the_features_of_the_flipped_image(viewed: Workspace) -> None:
    cache = cache_of(viewed)
    by_id = {row.id: i for i, row in enumerate(cache.rows)}
    compared = 0
    for name in by_id:
        if name.endswith("~hflip"):
            own, plain = (cache.read_row(by_id[n], cache.levels[0]) for n in (name, name.removesuffix("~hflip")))
            width = cache.rows[by_id[name]].placement.content[1]
            if width == cache.recipe.frame[1]:  # padding lies on the right of both
                assert np.abs(own.astype(float) - plain[:, :, ::-1]).max() < 5e-3
                compared += 1
    assert compared > 3


def test_crops_show_a_defect_seven_times_in_ten_and_where_chance_has_it_and_are_the_same_again(tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 6, size=(60, 60))
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[1:3, 1:3] = 1  # in a corner, where chance crops seldom reach
    for path in (data / "masks").glob("*.png"):
        Image.fromarray(mask).save(path)
    caches = [open_cache(extract_into(tmp_path / name, data, views=("crop:60",), size=(16, 16)).path) for name in "ab"]
    crops = [k for k, row in enumerate(caches[0].rows) if row.part and row.part.view.startswith("crop")]
    assert len({caches[0].rows[k].part for k in crops}) > 0.9 * len(crops) and len(crops) >= 180
    shown = np.mean([bool(caches[0].semantic(k).any()) for k in crops])
    assert 0.65 < shown < 0.85
    assert list(caches[0].rows) == list(caches[1].rows)


def test_heads_train_on_views_and_are_scored_without(viewed: Workspace) -> None:
    cache = cache_of(viewed)
    rows = prepare(training_of(viewed, cache, "semseg", options_of("semseg"), fraction=0.3)).rows
    images = set(cache.image_of[rows["train"]].tolist())
    every = [k for k, row in enumerate(cache.rows) if row.image_index in images]
    assert rows["train"].tolist() == every, "a fraction takes views along with their image"
    for split in ("val", "test"):
        assert all("~" not in cache.rows[row].id for row in rows[split].tolist())
    (row,) = probe(viewed, options=options_of("semseg")).rows
    assert row["augmentation"] == {"views": list(VIEWS)} and row["regime"] == "frozen" and row["tuning"] is None
    assert row["images"] == {"train": 8, "val": 4, "test": 9}
    card = json.loads((viewed.probes / row["folder"] / "card.json").read_text())
    assert "--views hflip,vflip,rot90,crop:3" in commands_of(card, [0], "parts")[0]
    plain = {**card, "features": recipe_of().to_json()}
    table = {"tile": 512, "views": "hflip"}
    command = commands_of(plain, [0], "parts", table)[0]  # on a card it names the precision, too
    assert "--tile 0 --views none" in command, "what featprobe.toml adds is not wanted"
    options = options_of("semseg", tuning=Tuning(regime="frozen-online"))
    live = prepare(training_of(viewed, cache, "semseg", options))
    assert not any("~" in cache.rows[row].id for row in live.rows["train"].tolist()), "augmentation takes their place"
    with pytest.raises(ProbeError, match="--split group"):
        probe(viewed, options=options_of("semseg", split="group"))


def test_a_cache_of_views_stands_aside_where_another_serves_the_split(coco_set: Path, tmp_path: Path) -> None:
    extract_into(tmp_path, coco_set, views=("hflip",))
    plain = open_cache(extract_into(tmp_path, coco_set).path)
    report = probe(Workspace(tmp_path), options=options_of("semseg", split="group"))
    assert [row["feature_key"] for row in report.rows] == [plain.recipe.key]
    assert any(note.startswith("left aside: ") and "views" in note for note in report.notes)
    assert len(probe(Workspace(tmp_path), options=options_of("semseg")).rows) == 2


def test_a_counterpart_that_augments_is_trained_once_for_results_with_and_without_views(
    coco_set: Path, tmp_path: Path
) -> None:
    plain, viewed = (open_cache(extract_into(tmp_path, coco_set, views=views).path) for views in ((), ("hflip",)))
    workspace = Workspace(tmp_path)

    def wanted(**tuning: Any) -> list[Cache]:
        found, _ = missing_counterparts(workspace, ProbeOptions(tuning=Tuning(**tuning)))
        return [one.partition.source for one in found]

    probe(workspace, options=options_of("semseg"))
    assert [cache.path for cache in wanted()] == [plain.path]
    assert {cache.path for cache in wanted(augment=False)} == {plain.path, viewed.path}
    plain.path.unlink()
    assert [cache.path for cache in wanted()] == [viewed.path], "there is no other"


def test_a_live_backbone_sees_what_the_rows_of_views_and_tiles_show(viewed: Workspace) -> None:
    cache = cache_of(viewed)
    rows = np.arange(0, len(cache), 3, dtype=np.intp)
    device = torch.device("cpu")
    with LiveFeatures(cache, PoolingBackbone(), device, lambda row: (None, None)) as live, torch.no_grad():  # type: ignore[arg-type]
        for batch, features in live.batches([rows]):
            for row, found in zip(batch.tolist(), features.maps["stride4"].half().numpy(), strict=True):
                np.testing.assert_array_equal(found, cache.read_row(row, cache.levels[0]))


def test_the_recipe_names_tiles_and_views_only_where_there_are_some(tmp_path: Path) -> None:
    plain = recipe_of()
    assert plain.key == replace(plain, overlap=8, empty_tiles=0.5).key, "without tiles these mean nothing"
    changed: list[dict[str, Any]] = [
        {"tile": 8}, {"tile": 8, "overlap": 2}, {"tile": 8, "empty_tiles": 0.1}, {"views": ("identity", "hflip")},
    ]  # fmt: skip
    assert len({plain.key, *(replace(plain, **own).key for own in changed)}) == 5
    assert all(type(plain).from_json(json.loads(json.dumps(r.to_json()))) == r for r in (plain, replace(plain, tile=8)))
    with pytest.raises(Exception, match="part of one of its images"):
        make_cache(tmp_path / "bare.h5", replace(plain, tile=8, version=2))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tile": 8, "overlap": 8}, "0 <= --overlap < T"),
        ({"tile": 8, "empty_tiles": 1.5}, "--empty-tiles 1.5"),
        ({"overlap": 4}, "Add --tile"),
        ({"tile": 8, "fit": "resize"}, "Tiles keep their scale"),
        ({"views": ("rot90",), "size": (16, 32)}, "rot90 would be stretched"),
        ({"views": ("hflip",), "intensity": "minmax:image"}, "a policy of the whole set"),
    ],
)
def test_what_can_not_be_cut_is_refused_before_anything_is_computed(changed: Any, told: str, tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 6, size=(16, 16))
    with pytest.raises(DataError, match=re.escape(told)):
        extract_into(tmp_path / "space", data, **changed)
    assert not list((tmp_path / "space").rglob("*.h5"))


settings_of_tiles = st.fixed_dictionaries(
    {},
    optional={
        "tile": st.sampled_from([0, 32, 64]),
        "overlap": st.sampled_from([0, 8]),
        "empty_tiles": st.sampled_from([0.0, 0.5, 1.0]),
        "views": st.sampled_from([(), ("hflip",), ("hflip", "crop:2")]),
        "size": st.sampled_from([(32, 32), (64, 96)]),
        "fit": st.just("letterbox"),
    },
)


def in_toml(asked: dict[str, Any]) -> dict[str, Any]:
    own = dict(asked)
    own |= {"size": f"{own['size'][0]}x{own['size'][1]}"} if "size" in own else {}
    return own | ({"views": ",".join(own["views"]) or "none"} if "views" in own else {})


@given(own=settings_of_tiles, asked=settings_of_tiles)
def test_the_configuration_says_what_the_caller_leaves_open(own: dict[str, Any], asked: dict[str, Any]) -> None:
    own = own if own.get("tile") else {k: v for k, v in own.items() if k not in ("overlap", "empty_tiles")}
    assert configured(ExtractOptions(), in_toml(own)) == ExtractOptions(**own), "as if the caller had said it"
    found = configured(ExtractOptions(**asked), in_toml(own))
    assert configured(found, in_toml(own)) == found
    assert all(getattr(found, name) == value for name, value in asked.items()), "the caller wins"
    if (found.tile or 0) != own.get("tile", 0):
        assert found.size == asked.get("size"), "a size of the configuration is of its own tiles"


@pytest.mark.parametrize("text", ["sideways", "crop", "crop:0", "hflip,hflip", "crop:2,crop:3", ","])
def test_unknown_views_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not a list of views"):
        parse_views(text)
