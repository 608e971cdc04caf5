"""int8: what a code stands for, that every way of reading gives it, and what it costs."""

import json
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    LEVELS,
    PoolingBackbone,
    extract,
    filled_cache,
    find_file,
    make_cache,
    opened,
    random_maps,
    recipe_of,
    rows_of,
    write_set,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from featprobe.cache import CacheWriter, open_cache, row_reader, verify
from featprobe.cache import reader as reader_module
from featprobe.cache.quantised import SCALES, TORCH_DTYPE, _decode_at_once, as_read, coded, decode, quantise
from featprobe.cache.reader import FeatureLoader
from featprobe.cache.row_reader import RowReader, _direct_works
from featprobe.cli.main import cli
from featprobe.errors import CacheError, OverflowsDtypeError, ProbeError
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages import predictor as predictor_module
from featprobe.stages.comparison.audit import AuditOptions, audit
from featprobe.stages.extraction.extract import extract as extract_for_real
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.predict import predict
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated

LARGEST = 65504.0  # of fp16


@st.composite
def maps(draw: st.DrawFn) -> torch.Tensor:
    """Rows of fp16 features, (rows, channels, height, width): any finite values, or many of one size, some flat."""
    shape = draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=5))
    spread = draw(st.sampled_from([1e-7, 1e-3, 1.0, 300.0, LARGEST]))
    about = draw(st.sampled_from([0.0, 1.0, -1000.0, LARGEST]))
    any_value = st.floats(-LARGEST, LARGEST, width=16)
    near = st.floats(-1, 1, width=16).map(lambda v: float(np.clip(about + spread * v, -LARGEST, LARGEST)))
    values = draw(hnp.arrays(np.float64, shape, elements=draw(st.sampled_from([any_value, near, st.just(about)]))))
    return torch.from_numpy(values.astype(np.float16))


def steps(m: torch.Tensor) -> torch.Tensor:
    """The scale of each value's channel, float64, in a shape that goes with a map's."""
    return quantise(m)[1][..., 0].double()[..., None, None]


@settings(max_examples=150, deadline=None)
@given(maps())
def test_a_value_is_half_a_step_off_at_most_and_a_flat_channel_is_exact(m):
    codes, scales = quantise(m)
    scale, zero = scales.double()[..., None, None].unbind(2)
    exact = zero + scale * codes.double()  # before reading rounds it to fp16
    assert bool(((exact - m.double()).abs() <= steps(m) * 0.5001).all())
    read = decode(codes, scales)
    assert bool(read.isfinite().all())
    spacing = (read.double().abs() * 2**-10).clamp(min=2**-24)  # of fp16, at most
    assert bool(((read.double() - m.double()).abs() <= steps(m) * 0.5001 + spacing / 2).all())
    flat = (m.amax((2, 3)) == m.amin((2, 3)))[..., None, None]
    assert bool((steps(m) == 0).eq(flat).all()) and bool(((read == m) | ~flat).all())
    assert bool((read.amin((2, 3)) == m.amin((2, 3))).all())


@settings(max_examples=100, deadline=None)
@given(maps())
def test_order_is_kept_and_what_was_read_once_is_read_again(m):
    read = decode(*quantise(m))
    for values, found in zip(m.flatten(0, 1).flatten(1), read.flatten(0, 1).flatten(1), strict=True):
        assert bool((found[values.argsort()].diff() >= 0).all())
    again = decode(*quantise(read))
    assert bool(((again.double() - read.double()).abs() <= steps(m) * 0.01).all())


@settings(max_examples=100, deadline=None)
@given(maps(), st.randoms(use_true_random=False))
def test_codes_do_not_depend_on_the_rows_beside_nor_on_the_order_in_memory(m, shuffler):
    codes, scales = quantise(m)
    order = shuffler.choices(range(len(m)), k=3)
    for form in (m[order], m[order].float(), m[order].to(memory_format=torch.channels_last)):
        found = quantise(form)
        assert torch.equal(found[0], codes[order]) and torch.equal(found[1], scales[order])
        assert all(t.is_contiguous() for t in found)


@settings(max_examples=100, deadline=None)
@given(maps(), st.integers(1, 64))
def test_both_ways_to_decode_give_the_bits_of_the_formula(m, block):
    codes, scales = quantise(m)
    scale, zero = np.moveaxis(scales.numpy()[..., None, None], 2, 0)
    wanted = (zero + scale * codes.numpy()).astype(np.float16)
    at_once = torch.empty(codes.shape, dtype=torch.float16)
    _decode_at_once(codes, scales, at_once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featprobe.cache.quantised.BLOCK", block)
        in_blocks = decode(codes, scales)
    assert at_once.numpy().tobytes() == in_blocks.numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("modes", [(True, False, True), (False, True, False)])
def test_memory_that_is_kept_for_decoding_serves_in_and_out_of_inference_mode(modes):
    def decode_growing():
        for size, mode in enumerate(modes, start=1):
            values = torch.randn(2, 3 * size, 4 * size, 5, generator=torch.Generator().manual_seed(size)).half()
            with torch.inference_mode(mode):
                codes, scales = quantise(values)
                expected = torch.empty(values.shape, dtype=torch.float16)
                _decode_at_once(codes, scales, expected)
                assert torch.equal(decode(codes, scales), expected)

    with ThreadPoolExecutor(1) as fresh:  # a thread has memory of its own
        fresh.submit(decode_growing).result()


def test_blocks_of_more_shapes_than_a_thread_keeps_ready_are_decoded_too(monkeypatch):
    monkeypatch.setattr("featprobe.cache.quantised.MOST_VIEWS", 2)
    random = torch.Generator().manual_seed(0)
    for side in (3, 5, 2, 7, 3):
        codes, scales = quantise(torch.randn(2, 4, side, side, generator=random))
        wanted = torch.empty(codes.shape, dtype=torch.float16)
        _decode_at_once(codes, scales, wanted)
        assert torch.equal(decode(codes, scales), wanted)


def test_scales_have_16_significant_bits_so_that_a_device_may_fuse_or_not():
    random = torch.Generator().manual_seed(0)
    _, scales = quantise(torch.randn(8, 64, 4, 4, generator=random) * 100)
    assert not bool((scales[..., 0].contiguous().view(torch.int32) & 0xFF).any())


def test_codes_take_half_of_fp16_and_a_recipe_of_another_dtype_keeps_its_key():
    half, codes = recipe_of(dtype="fp16"), recipe_of(dtype="int8")
    assert codes.row_bytes == half.row_bytes // 2 + 8 * sum(level.channels for level in LEVELS)
    assert FeatureRecipe.from_json(codes.to_json()) == codes and codes.key != half.key
    assert recipe_of().key == "39022db3bdd72cf34ee49b632477c19e487daab14c513e564874db453e002741"


# In a cache


@pytest.fixture
def cache(tmp_path):
    """A complete cache of int8, of any codes and scales."""
    return filled_cache(tmp_path / "cache.h5", recipe_of(dtype="int8"), rows_of(40, content=(20, 32)))


def expected(recipe: FeatureRecipe, rows: int) -> dict[str, NDArray]:
    """What the rows of `filled_cache` stand for, by the formula."""
    maps = random_maps(recipe, rows)
    found = {}
    for level in recipe.levels:
        scale, zero = np.moveaxis(maps[SCALES + level.name][..., None, None], 2, 0)
        found[level.name] = (zero + scale * maps[level.name]).astype(np.float16)
    return found


def loader_of(cache, mode=None, staged=False):
    if mode == "direct" and not _direct_works(cache):
        pytest.skip("this file system has no O_DIRECT")
    loader = FeatureLoader(cache, mode=mode)
    if staged:
        loader.staged, loader.reader = True, RowReader(cache, mode=mode, threads=3)
    return loader


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("mode", ["memmap", "preadv", "direct"])
def test_every_way_of_reading_gives_the_fp16_that_codes_stand_for(cache, monkeypatch, mode, staged):
    monkeypatch.setattr(row_reader, "SCRATCH", 3 * 6 * 64)  # of the first level three rows at a time
    monkeypatch.setattr("featprobe.cache.quantised.BLOCK", 5 * 64)  # no multiple of what is read at a time
    wanted, random = expected(cache.recipe, 40), np.random.default_rng(3)
    orders = [random.integers(0, 40, size) for size in (5, 1, 7, 40, 0, 3)]
    with loader_of(cache, mode, staged) as loader:
        for (rows, features), order in zip(loader.batches(orders), orders, strict=True):
            assert np.array_equal(rows, order) and features.content.tolist() == [[20, 32]] * len(order)
            for name, m in features.maps.items():
                assert m.dtype == torch.float16 == TORCH_DTYPE["int8"]
                np.testing.assert_array_equal(m.numpy(), wanted[name][rows])
    for row in (0, 39):
        np.testing.assert_array_equal(cache.read_row(row, LEVELS[1]), wanted["stride8"][row])


def test_rows_that_move_to_a_device_lie_there_as_codes(cache, monkeypatch):
    splits = {"train": np.arange(0, 40, 2), "val": np.arange(1, 40, 2)}
    width = cache.recipe.row_bytes
    monkeypatch.setattr(reader_module, "device_room", lambda device: int(21 * width / reader_module.DEVICE_SHARE))
    wanted = expected(cache.recipe, 40)
    with loader_of(cache, staged=True) as loader:
        assert "features of train lie on cpu" in loader.keep_on_device(splits)
        (held,) = loader.held
        assert sum(m.nbytes for m in held.maps.values()) == 20 * width
        shuffled = np.array([6, 2, 30])
        resident = loader.resident(splits["train"])
        assert resident is not None
        found = [resident(loader.positions(shuffled)), *(f for _, f in loader.batches([shuffled, splits["val"][:3]]))]
        for features, rows in zip(found, [shuffled, shuffled, splits["val"][:3]], strict=True):
            for name, m in features.maps.items():
                np.testing.assert_array_equal(m.numpy(), wanted[name][rows])


def test_threads_that_decode_leave_the_threads_of_all_others_as_they_are(cache):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with loader_of(cache) as loader:
            list(loader.batches([np.arange(40)]))
            assert loader.reader._pool is not None
            assert loader.reader._pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("verify", [True, False])
def test_large_rows_are_decoded_from_the_file_s_own_memory_once_they_are_checked(cache, monkeypatch, verify):
    monkeypatch.setattr(row_reader, "SCRATCH", 1)  # every row is large
    wanted, copied = expected(cache.recipe, 40), Counter()
    orders = [np.array([4, 9, 4]), np.array([9, 30]), np.array([30, 4, 9])]
    with FeatureLoader(cache, mode="memmap", verify=verify) as loader:
        for level in cache.levels:
            read = loader.reader._read[level.name]
            monkeypatch.setitem(
                loader.reader._read,
                level.name,
                lambda rows, out, read=read, name=level.name: (
                    copied.update((name, row) for row in rows.tolist()) or read(rows, out)
                ),
            )
        for rows, features in loader.batches(orders):
            for name, m in features.maps.items():
                np.testing.assert_array_equal(m.numpy(), wanted[name][rows])
    assert {row for _, row in copied} == ({4, 9, 30} if verify else set())
    assert len(copied) == len(cache.levels) * (3 if verify else 0)
    assert all(times <= 2 for times in copied.values()), "the batch that is read ahead may find a row unchecked still"


@pytest.mark.parametrize("scratch", [1, 1 << 18])
@pytest.mark.parametrize("table", ["features/stride8", "scales/stride8"])
@pytest.mark.parametrize("staged", [False, True])
def test_codes_and_scales_are_under_one_checksum(cache, monkeypatch, table, staged, scratch):
    monkeypatch.setattr(row_reader, "SCRATCH", scratch)
    extent = cache.contents.extents[table]
    with cache.path.open("r+b") as stream:
        stream.seek(extent.offset + 7 * extent.row_bytes)
        stream.write(bytes(3) + b"\x11")
    assert [d.row for d in verify(cache.path) if not isinstance(d, int)] == [7]
    with loader_of(open_cache(cache.path), staged=staged) as loader:
        list(loader.batches([np.arange(7)]))
        with pytest.raises(CacheError, match=r"row 7, 'part7\.png'"):
            list(loader.batches([np.array([3, 7])]))


def test_maps_of_any_kind_go_into_a_file_and_come_back_as_a_live_network_s_would():
    recipe = recipe_of(dtype="int8")
    random = torch.Generator().manual_seed(0)
    live = {v.name: torch.randn(5, v.channels, *v.cells(recipe.frame), generator=random).half() for v in LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        make_cache(path, recipe, rows_of(5))
        with CacheWriter(path) as writer:
            writer.write(0, {name: m.numpy() for name, m in coded(live).items()})
        with FeatureLoader(open_cache(path)) as loader:
            ((_, features),) = loader.batches([np.arange(5)])
            for name, m in as_read(live, "int8").items():
                assert torch.equal(features.maps[name], m)


# From images


@pytest.fixture
def data(tmp_path):
    """A set of seven images."""
    write_set(tmp_path / "set", 7)
    return tmp_path / "set"


def test_an_extraction_to_int8_is_the_same_function_of_what_fp16_holds(data, tmp_path):
    half = open_cache(extract(tmp_path, data).path)
    report = extract(tmp_path, data, dtype="int8")
    cache = open_cache(report.path)
    assert report.bytes_written == 7 * cache.recipe.row_bytes < 0.6 * 7 * half.recipe.row_bytes
    for level in cache.levels:
        maps = torch.from_numpy(np.stack([half.read_row(row, level) for row in range(7)]))
        for row, wanted in enumerate(decode(*quantise(maps)).numpy()):
            np.testing.assert_array_equal(cache.read_row(row, level), wanted)
    (data / "images" / "part03.png").unlink()
    (data / "masks" / "part03.png").unlink()
    assert extract(tmp_path, data, dtype="int8").computed == 0, (
        "rows of a set that changed are copied with their scales"
    )
    assert not [d for d in verify(cache.path) if not isinstance(d, int)]


def test_a_feature_that_fp16_could_not_hold_is_refused_for_int8_too(data, tmp_path):
    with pytest.raises(OverflowsDtypeError, match=r"not finite in int8, whose largest value is 65504.*\n(.*\n)*.*bf16"):
        extract(tmp_path, data, PoolingBackbone(gain=1e6), dtype="int8")
    assert opened(find_file(tmp_path)).done.sum() == 0


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A workspace with a small set under a real network, as int8 and as fp32."""
    workspace = Workspace(tmp_path_factory.mktemp("int8"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    spec = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
    for dtype in ("int8", "fp32"):
        extract_for_real(workspace, spec, "surface", ExtractOptions(quiet=True, dtype=dtype, device="cpu"))
    return workspace


def cache_of(space, dtype):
    return next(path for path in space.cache_files() if open_cache(path).recipe.dtype == dtype)


def test_a_head_that_was_trained_on_int8_is_fed_the_same_by_predict(space, tmp_path, monkeypatch):
    alone = Workspace(tmp_path / "alone")
    path = cache_of(space, "int8")
    (alone.cache / path.parent.name).mkdir(parents=True)
    (alone.cache / path.parent.name / path.name).hardlink_to(path)
    (row,) = probe(alone, options=ProbeOptions(head="ridge", quiet=True, device="cpu")).rows
    folder, cache = alone.probes / row["folder"], open_cache(path)
    tested = cache.usable("test").tolist()
    images = [Path(cache.data.root) / cache.rows[i].image for i in tested]
    fed = []
    monkeypatch.setattr(predictor_module, "as_read", lambda *how: fed.append(as_read(*how)) or fed[-1])
    predict(folder, images, tmp_path / "out", quiet=True, device="cpu")
    with FeatureLoader(cache) as loader:
        ((_, features),) = loader.batches([np.array(tested)])
    for name, m in features.maps.items():
        live = torch.cat([maps[name] for maps in fed])
        assert float((live == m).float().mean()) > 0.99, "but for a code that a last bit of the network moves"


# What it costs


def test_an_audit_says_what_int8_changes_and_looks_at_no_label_of_test(space, monkeypatch):
    exact = open_cache(cache_of(space, "fp32"))
    seen, plain = [], type(exact).semantic
    monkeypatch.setattr(type(exact), "semantic", lambda self, row: seen.append(row) or plain(self, row))
    how = AuditOptions(seeds=2, iterations=10, device="cpu", quiet=True)
    (found,) = audit(space, [cache_of(space, "int8"), exact.path], how)
    assert found.path == str(exact.path) and found.dtype == "fp32" and found.rows == 24
    assert not set(seen) & set(exact.usable("test").tolist())
    values = np.stack([exact.read_row(row, exact.levels[1]) for row in range(24)]).astype(np.float64)
    held = np.stack([open_cache(cache_of(space, "int8")).read_row(row, exact.levels[1]) for row in range(24)])
    wanted = np.linalg.norm(held - values) / np.linalg.norm(values)
    assert found.errors[exact.levels[1].name]["int8"] == pytest.approx(wanted, rel=1e-4)
    for own in found.errors.values():
        assert 0 < own["fp16"] < min(own["bf16"], own["int8"]) and own["int8"] < 0.02
    assert found.bytes_of["fp32"] == 24 * exact.recipe.row_bytes == 2 * found.bytes_of["fp16"]
    assert found.bytes_of["int8"] == 24 * replace(exact.recipe, dtype="int8").row_bytes
    for cost, head in zip(found.heads, ("linear", "ridge"), strict=True):
        assert cost.head == head and cost.seeds == (2 if head == "linear" else 1)
        assert cost.int8 - cost.fp16 == pytest.approx(cost.difference.estimate, abs=1e-9)
        assert cost.difference.groups == len({exact.rows[row].group for row in exact.usable("val")})
    assert not space.probes.exists(), "nothing is kept"


def test_the_command_prints_an_audit_for_people_and_machines(space):
    words = [
        "--workspace",
        str(space.root),
        "cache",
        "audit",
        "surface",
        "--iterations",
        "5",
        "--seeds",
        "1",
        "--quiet",
    ]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[2].split() == ["level", "fp16", "bf16", "int8"] and lines[3].split()[0] == "stride4"
    assert any(line.startswith("linear  1 ") for line in lines) and any(line.startswith("ridge ") for line in lines)
    (found,) = json.loads(CliRunner().invoke(cli, [*words, "--heads", "none", "--json"]).stdout)
    assert found["heads"] == [] and set(found["errors"]["stride4"]) == {"fp16", "bf16", "int8"}


def test_an_audit_of_int8_alone_says_what_it_needs(data, tmp_path):
    path = extract(tmp_path, data, dtype="int8").path
    with pytest.raises(CacheError, match="holds only int8"):
        audit(Workspace(tmp_path), [path])
    with pytest.raises(ProbeError, match="'fcos' is not a head that an audit trains"):
        audit(Workspace(tmp_path), [path], AuditOptions(heads=("fcos",)))


def test_an_audit_of_values_that_fp16_can_not_hold_says_so(data, tmp_path):
    path = extract(tmp_path, data, PoolingBackbone(gain=1e6), dtype="fp32").path
    with pytest.raises(CacheError, match="beyond 65504"):
        audit(Workspace(tmp_path), [path], AuditOptions(heads=(), device="cpu"))


def test_plan_says_what_each_dtype_would_take(space, tmp_path):
    words = ["--workspace", str(tmp_path), "plan", "--backbone", "embedded", "--random-init", "--data"]
    words += [str(space.data / "surface"), "--dtype", "int8", "--quiet"]
    assert "by dtype" in CliRunner().invoke(cli, words).stdout
    cost = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert (
        cost["feature_bytes"] == cost["bytes_of"]["int8"] and cost["bytes_of"]["fp32"] == 2 * cost["bytes_of"]["fp16"]
    )
    assert cost["epoch_cached"] > 0
