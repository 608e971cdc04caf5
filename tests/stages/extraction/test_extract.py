"""Extraction: whole, once, and the same bits however the work was cut; changed sets; bad images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PoolingBackbone,
    extract,
    find_file,
    opened,
    row_bytes,
    spy_on_writes,
    stored,
    write_set,
)
from numpy.typing import NDArray
from PIL import Image

import featprobe.stages.extraction.make_cache as stage
from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.cache import MISSING, UNREADABLE, WHOLE, CacheWriter, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.errors import BackboneError, CacheError, CacheIncompleteError, DataError, OverflowsDtypeError
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.make_cache import share_of
from featprobe.stages.extraction.run_log import speed_text
from featprobe.stages.workspace import Workspace, make_generated

SIZE = (32, 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven images of 32x40 pixels with masks."""
    return write_set(tmp_path / "set", 7, SIZE)


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone(BackboneSpec("lite0", "tf_efficientnet_lite0", "random"))


def values(path: Path, row: int, level: str = "stride4") -> NDArray:
    """A row of a level as numbers: (channels, height, width)."""
    cache = opened(path)
    (found,) = (known for known in cache.levels if known.name == level)
    return cache.read_row(row, found)


def ids(path: Path) -> list[str]:
    return [row.id for row in opened(path).rows]


def write_image(path: Path, levels: NDArray) -> None:
    Image.fromarray(levels).save(path)


# Whole, and once


def test_every_row_is_whole_and_the_file_lies_where_its_names_say(data, tmp_path):
    report = extract(tmp_path, data)
    assert (report.rows, report.computed, report.copied, report.missing) == (7, 7, 0, 0)
    assert report.bytes_written == sum(rows.nbytes for rows in row_bytes(opened(report.path)).values())
    cache = open_cache(report.path)
    assert (cache.done == WHOLE).all()
    assert report.path == find_file(tmp_path)
    assert report.path.parent.name.startswith("set-")
    assert report.path.stem == f"pooling-{cache.recipe.key[:8]}"


def test_a_feature_is_what_the_backbone_gives_for_the_image(data, tmp_path):
    path = extract(tmp_path, data, dtype="fp32").path
    pixels = np.asarray(Image.open(data / "images" / "part03.png"), dtype=np.float32) / 255
    cells = pixels.reshape(8, 4, 10, 4, 3).mean((1, 3)).transpose(2, 0, 1)  # (channels, rows, columns)
    np.testing.assert_allclose(values(path, 3), np.concatenate([cells, 2 * cells]), rtol=1e-5)


def test_targets_lie_in_the_file_so_that_the_images_are_not_needed(data, tmp_path):
    path = extract(tmp_path, data).path
    mask = np.asarray(Image.open(data / "masks" / "part05.png"))
    np.testing.assert_array_equal(open_cache(path).semantic(5), mask)


def test_the_same_command_again_computes_nothing_and_changes_nothing(data, tmp_path, monkeypatch):
    path = extract(tmp_path, data).path
    before = path.read_bytes()
    written = spy_on_writes(monkeypatch)
    report = extract(tmp_path, data)
    assert (report.computed, report.copied, written) == (0, 0, [])
    assert path.read_bytes() == before


def test_another_recipe_gets_a_file_of_its_own(data, tmp_path):
    paths = {
        extract(tmp_path, data).path,
        extract(tmp_path, data, dtype="fp32").path,
        extract(tmp_path, data, size=(64, 64)).path,
        extract(tmp_path, data, fit="letterbox").path,
        extract(tmp_path, data, intensity="window:10:200").path,
        extract(tmp_path, data, PoolingBackbone(gain=2)).path,
    }
    assert len(paths) == 6


def test_two_sets_of_the_same_folder_name_do_not_collide(data, tmp_path):
    other = write_set(tmp_path / "elsewhere" / "set", 5, SIZE, seed=1)
    first, second = extract(tmp_path, data), extract(tmp_path, other)
    assert first.path.parent != second.path.parent
    assert (len(opened(first.path)), len(opened(second.path))) == (7, 5)


def test_a_real_network_fills_a_cache_with_what_it_computes_live(data, tmp_path, lite0):
    path = extract(tmp_path, data, lite0, dtype="fp32").path
    cache = open_cache(path)
    assert [level.name for level in cache.levels] == ["stride4", "stride8", "stride16", "stride32"]
    assert cache.recipe.frame == (32, 64)
    images = torch.full((2, 3, 32, 64), 0.0)
    for channel, mean in enumerate(lite0.mean):
        images[:, channel] = mean
    for i in (0, 1):
        pixels = np.array(Image.open(data / "images" / f"part0{i}.png"))
        images[i, :, :, :40] = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    live = lite0(images).maps
    for level in cache.levels:
        for i in (0, 1):
            np.testing.assert_allclose(cache.read_row(i, level), live[level.name][i], rtol=1e-4, atol=1e-5)


def test_coco_sets_are_extracted_with_their_objects(tmp_path):
    data = write_set(tmp_path / "coco", 4, SIZE)
    corners = [4, 2, 12, 2, 12, 8, 4, 8]
    square = {"id": 1, "image_id": 2, "category_id": 7, "bbox": [4, 2, 8, 6], "segmentation": [corners]}
    for mask in (data / "masks").iterdir():
        mask.unlink()
    (data / "masks").rmdir()
    splits = ["train", "train", "val", "test"]
    images = [
        {"id": i, "file_name": f"part{i:02}.png", "height": 32, "width": 40, "split": split}
        for i, split in enumerate(splits)
    ]
    labels = {"images": images, "annotations": [square], "categories": [{"id": 7, "name": "pore"}]}
    (data / "labels.json").write_text(json.dumps(labels))
    cache = open_cache(extract(tmp_path, data).path)
    assert cache.data.classes == ("background", "pore") and cache.data.tasks == ("semseg", "detect", "instseg")
    assert [row.split for row in cache.rows] == splits
    assert cache.instances(2)[0].box_xyxy == (4, 2, 12, 8) and cache.instances(1) == ()
    assert cache.semantic(2)[2:8, 4:12].all() and cache.semantic(2).sum() == 48


# However the work is cut


@pytest.mark.parametrize("network", ["stand-in", "real"])
def test_shards_give_the_bits_of_a_single_run(data, tmp_path, network, lite0):
    backbone = lite0 if network == "real" else PoolingBackbone()
    single = extract(tmp_path / "single", data, backbone).path
    for i in (2, 3, 1):
        report = extract(tmp_path / "shards", data, backbone, shard=(i, 3))
    assert report.missing == 0
    assert stored(find_file(tmp_path / "shards")) == stored(single)


def test_a_shard_computes_its_own_whole_blocks_only(data, tmp_path, monkeypatch):
    written = spy_on_writes(monkeypatch)
    report = extract(tmp_path, data, shard=(2, 2))
    assert written == list(range(*share_of(7, 2, (2, 2)))) == [4, 5, 6]
    assert (report.computed, report.missing) == (3, 4)
    with pytest.raises(CacheIncompleteError, match="4 of 7 rows are missing") as caught:
        open_cache(report.path).usable()
    assert f"featprobe extract --backbone pooling --data {data} --batch-size 2" in str(caught.value)


def test_more_shards_than_blocks_leave_some_without_work(data, tmp_path):
    computed = [extract(tmp_path, data, shard=(i, 6)).computed for i in range(1, 7)]
    assert sum(computed) == 7 and 0 in computed


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_does_not_exist_is_refused(data, tmp_path, shard):
    with pytest.raises(CacheError, match=f"no shard {shard[0]}/{shard[1]}"):
        extract(tmp_path, data, shard=shard)


def test_ranks_of_torchrun_share_the_work(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    missing = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        missing.append(extract(tmp_path, data).missing)
    assert missing == [4, 0]
    monkeypatch.delenv("RANK")
    assert stored(find_file(tmp_path)) == stored(extract(tmp_path / "single", data).path)


@pytest.mark.parametrize("network", ["stand-in", "real"])
@pytest.mark.parametrize("lost", [[0], [3, 4], [6], [0, 2, 5]])
def test_only_missing_rows_are_written_and_with_the_same_bits(data, tmp_path, monkeypatch, network, lite0, lost):
    backbone = lite0 if network == "real" else PoolingBackbone()
    path = extract(tmp_path, data, backbone).path
    before = stored(path)
    with CacheWriter(path) as writer:
        for row in lost:
            writer.write(row, {n: np.zeros_like(m[None]) for n, m in zip_levels(path, row)})
            writer.mark_missing(row)
    assert stored(path) != before
    written = spy_on_writes(monkeypatch)
    assert extract(tmp_path, data, backbone).computed == len(lost)
    assert written == lost
    assert stored(path) == before


def zip_levels(path: Path, row: int) -> list[tuple[str, NDArray]]:
    cache = opened(path)
    return [(level.name, cache.read_row(row, level)) for level in cache.levels]


def test_the_number_of_decoding_threads_does_not_change_a_bit(data, tmp_path):
    first = stored(extract(tmp_path / "one", data, workers=1).path)
    assert stored(extract(tmp_path / "four", data, workers=4).path) == first


@pytest.mark.parametrize(("threads", "block"), [(2, 2), (1, 5)])
def test_other_threads_and_block_sizes_stay_within_the_stated_bound(data, tmp_path, lite0, threads, block):
    first = opened(extract(tmp_path / "first", data, lite0, dtype="fp32").path)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = opened(extract(tmp_path / "second", data, lite0, dtype="fp32", batch_size=block).path)
    finally:
        torch.set_num_threads(usual)
    for level in first.levels:
        a, b = (np.stack([cache.read_row(i, level) for i in range(7)]) for cache in (first, second))
        assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()


def test_amp_without_a_gpu_is_refused(data, tmp_path):
    with pytest.raises(BackboneError, match="CUDA"):
        extract(tmp_path, data, precision="amp")


# When the set changed


def by_id(path: Path) -> dict[str, bytes]:
    return dict(zip(ids(path), (row.tobytes() for row in row_bytes(opened(path))["stride4"]), strict=True))


def test_a_new_image_is_computed_and_the_others_are_copied(data, tmp_path, monkeypatch):
    path = extract(tmp_path, data).path
    before = by_id(path)
    write_image(data / "images" / "part02b.png", np.full((*SIZE, 3), 200, dtype=np.uint8))
    write_image(data / "masks" / "part02b.png", np.zeros(SIZE, dtype=np.uint8))
    report = extract(tmp_path, data)
    assert (report.path, report.rows, report.copied, report.computed) == (path, 8, 7, 1)
    after = by_id(path)
    assert after.keys() - before.keys() == {"part02b.png"} and before.items() <= after.items()
    assert stored(path) == stored(extract(tmp_path / "anew", data).path)
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_a_changed_image_is_computed_again(data, tmp_path):
    path = extract(tmp_path, data).path
    write_image(data / "images" / "part04.png", np.full((*SIZE, 3), 7, dtype=np.uint8))
    report = extract(tmp_path, data)
    assert (report.copied, report.computed) == (6, 1)
    assert stored(path) == stored(extract(tmp_path / "anew", data).path)


def test_when_only_an_annotation_changed_nothing_is_computed(data, tmp_path):
    path = extract(tmp_path, data).path
    before = stored(path)
    write_image(data / "masks" / "part04.png", np.ones(SIZE, dtype=np.uint8))
    report = extract(tmp_path, data)
    assert (report.copied, report.computed) == (7, 0)
    assert stored(path) == before
    assert open_cache(path).semantic(4).all()


def test_an_image_that_left_the_set_leaves_the_file(data, tmp_path):
    path = extract(tmp_path, data).path
    before = by_id(path)
    for folder in ("images", "masks"):
        (data / folder / "part00.png").unlink()
    assert extract(tmp_path, data).copied == 6
    assert by_id(path) == {name: row for name, row in before.items() if name != "part00.png"}


def test_whoever_reads_while_the_set_changes_keeps_the_old_file(data, tmp_path):
    old = open_cache(extract(tmp_path, data).path)
    before = by_id(old.path)
    with FeatureLoader(old) as loader:
        batches = loader.batches([np.array([i]) for i in range(7)])
        next(batches)
        write_image(data / "images" / "part00.png", np.zeros((*SIZE, 3), dtype=np.uint8))
        for name in ("images", "masks"):
            (data / name / "part01.png").unlink()
        assert extract(tmp_path, data).rows == 6
        for rows, features in batches:
            assert features.maps["stride4"].numpy().tobytes() == before[old.rows[rows[0]].id]


def test_an_image_that_changes_while_features_are_made_is_named(data, tmp_path, monkeypatch):
    def shrink_then_prepare(*args):
        job = prepare(*args)
        write_image(data / "images" / "part05.png", np.zeros((8, 8, 3), dtype=np.uint8))
        return job

    prepare = stage.prepare
    monkeypatch.setattr(stage, "prepare", shrink_then_prepare)
    with pytest.raises(DataError, match=r"part05\.png changed while features were made"):
        extract(tmp_path, data)


# Number formats


def test_a_feature_too_large_for_fp16_names_its_image_and_keeps_earlier_rows(data, tmp_path):
    write_image(data / "images" / "part04.png", np.full((*SIZE, 3), 255, dtype=np.uint8))
    loud = PoolingBackbone(gain=33_000)  # the second group of channels is twice that where a cell is white
    with pytest.raises(OverflowsDtypeError) as caught:
        extract(tmp_path, data, loud)
    text = str(caught.value)
    assert "part04.png" in text and "65504" in text and "--dtype bf16" in text and "fp32" in text
    assert opened(find_file(tmp_path)).done.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert extract(tmp_path, data, loud, dtype="bf16").missing == 0


def test_fp32_and_bf16_hold_the_same_features_each_in_its_precision(data, tmp_path):
    exact = values(extract(tmp_path, data, dtype="fp32").path, 2)
    bits = values(extract(tmp_path, data, dtype="bf16").path, 2)
    half = values(extract(tmp_path, data).path, 2)
    assert (exact.dtype, bits.dtype, half.dtype) == (np.float32, np.uint16, np.float16)
    rounded = torch.from_numpy(exact.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits, rounded)
    np.testing.assert_array_equal(half, exact.astype(np.float16))


# A device that fails


class Failing(PoolingBackbone):
    """Raises what torch raises when a GPU is lost, at its third batch."""

    batches = 0

    def __call__(self, images):
        self.batches += 1
        if self.batches == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")
        return super().__call__(images)


def test_a_device_that_is_lost_ends_in_one_paragraph_and_the_same_command_goes_on(data, tmp_path):
    with pytest.raises(BackboneError) as caught:
        extract(tmp_path, data, Failing())
    text = str(caught.value)
    assert "illegal memory access" in text and "kernel errors" not in text and "featprobe extract" in text
    assert opened(find_file(tmp_path)).done.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert extract(tmp_path, data).computed == 3
    assert stored(find_file(tmp_path)) == stored(extract(tmp_path / "anew", data).path)


def test_an_error_that_is_not_the_devices_is_not_called_so(data, tmp_path, monkeypatch):
    def fail(self, images):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(PoolingBackbone, "__call__", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        extract(tmp_path, data)


def test_the_closing_line_names_the_limit_and_each_parts_own_rate(data, tmp_path):
    report = extract(tmp_path, data)
    assert {"network", "decoding", "copying", "writing"} <= report.seconds.keys() and report.seconds["copying"] == 0
    slow = replace(report, seconds=report.seconds | {"network": 2.0, "decoding": 7.0, "copying": 0.5, "writing": 1.0})
    wanted = (
        "The limit was decoding at 1 img/s; try more --workers. By themselves: the backbone at 4 img/s, the disk at "
    )
    assert speed_text(slow).splitlines()[1].startswith(wanted)
    assert "copying to the host" in speed_text(slow)
    assert "copying" not in speed_text(report)  # nothing is copied on a CPU


# Images that can't be used


def truncate(data: Path, name: str) -> None:
    truncate_file(data / "images" / name)


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(data: Path, name: str) -> None:
    (data / "images" / name).write_bytes(b"")


def wrong_mask(data: Path, name: str) -> None:
    write_image(data / "masks" / name, np.zeros((5, 6), dtype=np.uint8))


BAD = [(truncate, "truncated or damaged"), (empty, "empty file"), (wrong_mask, "another size than its image")]


@pytest.mark.parametrize(("spoil", "reason"), BAD)
def test_a_bad_image_stops_extraction_by_name(data, tmp_path, spoil, reason):
    spoil(data, "part03.png")
    with pytest.raises(DataError, match=rf"(?s)part03\.png .*{reason}.*To omit what .*--skip-bad"):
        extract(tmp_path, data)


@pytest.mark.parametrize(("spoil", "reason"), BAD)
@pytest.mark.parametrize("network", ["stand-in", "real"])
def test_a_bad_image_is_set_aside_on_demand_and_changes_no_other_row(data, tmp_path, spoil, reason, network, lite0):
    backbone = lite0 if network == "real" else PoolingBackbone()
    good = by_id(extract(tmp_path / "good", data, backbone).path)
    spoil(data, "part03.png")
    report = extract(tmp_path, data, backbone, skip_bad=True)
    ((name, told),) = report.unreadable
    assert name == "part03.png" and reason in told
    assert any("part03.png" in note for note in report.notes)
    cache = open_cache(report.path)
    assert cache.done.tolist() == [1, 1, 1, UNREADABLE, 1, 1, 1]
    assert reason in cache.reason(3)
    assert 3 not in cache.usable()
    rows = by_id(report.path)
    assert {i: rows[i] for i in rows if i != name} == {i: good[i] for i in good if i != name}


def test_an_unreadable_image_that_was_mended_is_computed(data, tmp_path):
    good = (data / "images" / "part03.png").read_bytes()
    expected = stored(extract(tmp_path / "good", data).path)
    for spoil in (truncate, empty):
        spoil(data, "part03.png")
        assert extract(tmp_path, data, skip_bad=True).unreadable
        (data / "images" / "part03.png").write_bytes(good)
        assert extract(tmp_path, data).missing == 0
        assert stored(find_file(tmp_path)) == expected


def test_a_truncated_image_found_without_skip_bad_can_be_set_aside_afterwards(data, tmp_path):
    truncate(data, "part05.png")
    with pytest.raises(DataError):
        extract(tmp_path, data)
    kept = int((opened(find_file(tmp_path)).done == WHOLE).sum())
    report = extract(tmp_path, data, skip_bad=True)
    assert report.computed == 6 - kept and report.copied == 0
    assert [name for name, _ in report.unreadable] == ["part05.png"]


def test_a_truncated_16_bit_image_that_the_window_needs_is_told_with_how_to_leave_it_out(tmp_path):
    make_generated("xray", tmp_path / "xray", images=12, size=(32, 32))
    data = Workspace(tmp_path).data_set(str(tmp_path / "xray"))
    truncate_file(data.in_split("train")[0].image)
    with pytest.raises(DataError, match=r"(?s)truncated or damaged.*--skip-bad"):
        extract(tmp_path, tmp_path / "xray")


def test_a_truncated_16_bit_image_does_not_spoil_the_sets_intensity_window(data, tmp_path):
    rng = np.random.default_rng(0)
    for path in sorted((data / "images").iterdir()):
        write_image(path, rng.integers(1000, 9000, SIZE, dtype=np.uint16))
    train = next(row.id for row in opened(extract(tmp_path, data).path).rows if row.split == "train")
    truncate(data, train)
    report = extract(tmp_path, data, skip_bad=True)
    assert [name for name, _ in report.unreadable] == [train]
    low, high = opened(report.path).recipe.window
    assert 1000 <= low < high < 9000


def test_a_set_without_any_usable_image_is_refused(data, tmp_path):
    for path in (data / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No image of"):
        extract(tmp_path, data, skip_bad=True)
    assert not list(tmp_path.rglob("*.h5"))


def test_a_disk_too_small_is_refused_before_anything_is_made(data, tmp_path, monkeypatch):
    monkeypatch.setattr("featprobe.stages.extraction.job.free_disk", lambda folder: 64_000_000)
    with pytest.raises(CacheError, match=r"can't hold these features. Nothing was started") as caught:
        extract(tmp_path, data)
    assert "wanted" in str(caught.value) and "64.0 MB free" in str(caught.value)
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.rglob("*.tmp"))


# Frames


def test_an_odd_size_is_padded_right_and_below_with_the_mean_colour(tmp_path):
    data = write_set(tmp_path / "odd", 3, (20, 28))  # 28 pixels: 7 cells of 4, in a frame of 32
    path = extract(tmp_path, data, dtype="fp32").path
    assert opened(path).recipe.frame == (24, 32)
    map4 = values(path, 1)[:3]  # (channels, 6 rows, 8 columns)
    pixels = np.asarray(Image.open(data / "images" / "part01.png"), dtype=np.float32) / 255
    cells = pixels.reshape(5, 4, 7, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(map4[:, :5, :7], cells, rtol=1e-5)
    for channel, mean in enumerate(PoolingBackbone.mean):
        assert (map4[channel, 5:] == mean).all() and (map4[channel, :, 7:] == mean).all()


def test_letterboxed_images_keep_their_shape_at_the_frames_top_left(tmp_path):
    data = write_set(tmp_path / "mixed", 3, (16, 32))
    write_image(data / "images" / "part01.png", np.full((64, 16), 255, dtype=np.uint8))
    write_image(data / "masks" / "part01.png", np.zeros((64, 16), dtype=np.uint8))
    path = extract(tmp_path, data, fit="letterbox", size=(32, 32), dtype="fp32").path
    cache = open_cache(path)
    assert [row.placement.content for row in cache.rows] == [(16, 32), (32, 8), (16, 32)]
    upright = values(path, 1)[:3]
    assert (upright[:, :, :2] == 1).all()
    for channel, mean in enumerate(PoolingBackbone.mean):
        assert (upright[channel, :, 2:] == mean).all()
        assert (values(path, 0)[channel, 4:] == mean).all()


def test_blocks_of_another_size_give_the_same_features_of_the_stand_in(data, tmp_path):
    """The stand-in sees each image alone, so here the batch size must not matter at all."""
    first = stored(extract(tmp_path / "two", data).path)
    assert stored(extract(tmp_path / "five", data, batch_size=5).path) == first


def test_a_run_that_computed_something_is_noted_beside_the_file(data, tmp_path):
    path = extract(tmp_path, data).path
    extract(tmp_path, data)
    (line,) = path.with_suffix(".runs.jsonl").read_text().splitlines()
    assert json.loads(line)["computed"] == 7 and json.loads(line)["path"] == path.name


def test_a_file_of_another_recipe_under_the_same_name_is_refused(data, tmp_path):
    path = extract(tmp_path, data).path
    other = extract(tmp_path, data, PoolingBackbone(gain=2)).path
    other.replace(path)
    with pytest.raises(CacheError, match="made by another recipe"):
        extract(tmp_path, data)
    assert (opened(path).done != MISSING).all()


def test_options_reach_the_file(data, tmp_path):
    recipe = opened(extract(tmp_path, data, size=(16, 24), fit="letterbox", intensity="minmax").path).recipe
    assert (recipe.size, recipe.frame, recipe.fit, recipe.intensity) == ((16, 24), (16, 24), "letterbox", "minmax")
