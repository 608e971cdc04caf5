"""Masks are decoded once, and whole batches on a device are scored as image by image on a CPU."""

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import extract, training_of, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tasks import write_coco
from torch.utils._python_dispatch import TorchDispatchMode

from featprobe.cache import Cache, open_cache, store
from featprobe.cache.reader import FeatureLoader
from featprobe.features import cell_shares
from featprobe.kinds import TrainRecipe
from featprobe.metrics import confusion_matrix
from featprobe.probes import HeadRecipe, LinearBank, build_head, execution, pixel_classes
from featprobe.probes.pixel_classes import count_pairs
from featprobe.probes.train import train
from featprobe.splitting import SplitChoice
from featprobe.stages.memory import Portions
from featprobe.stages.partition import split_notes
from featprobe.stages.tasks import labels, segmentation
from featprobe.stages.tasks.labels import LabelShelf, encode, shelf_of
from featprobe.stages.tasks.segmentation import Segmentation
from featprobe.stages.training.prepared import prepare, source_of, trials_of
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace
from featprobe.targets import labels_in_frame

DATA = Path(os.environ.get("FEATPROBE_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
CPU = torch.device("cpu")
BRIEF = TrainRecipe(iterations=6, batch_size=4, evaluations=3)


# ---- matrices of many images and heads -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.tuples(st.integers(1, 9), st.integers(1, 40)), classes=st.integers(2, 7),
       images=st.integers(1, 3), heads=st.integers(1, 3))  # fmt: skip
def test_pairs_are_counted_as_one_matrix_of_each_image_and_head(
    seed: int, size: tuple[int, int], classes: int, images: int, heads: int
) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes + 1, (images, *size)).astype(np.uint8)
    truth[truth == classes] = 255
    said = rng.integers(0, classes, (images, heads, *size)).astype(np.uint8)
    room = torch.full((images + 1, classes, heads + 1, classes), -1)
    count_pairs(torch.from_numpy(truth), torch.from_numpy(said), torch.arange(classes), room[1:, :, :heads])
    assert bool((room[0] == -1).all()) and bool((room[:, :, heads] == -1).all())
    for i in range(images):
        for k in range(heads):
            np.testing.assert_array_equal(room[i + 1, :, k].numpy(), confusion_matrix(truth[i], said[i, k], classes))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.integers(1, 3000), width=st.integers(1, 12), heads=st.integers(1, 5))
def test_pairs_are_counted_in_blocks_that_hold_few_values(seed: int, limit: int, width: int, heads: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said = rng.integers(0, 3, (2, 17, width)), rng.integers(0, 3, (2, heads, 17, width))
    out, sizes = torch.full((2, 3, heads, 3), -1), list[int]()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            sizes.extend(found.numel() for _ in [0] if found.dtype == torch.float32)
            return found

    with pytest.MonkeyPatch.context() as patch, Watched():
        patch.setattr(pixel_classes, "VALUES_AT_ONCE", limit)
        count_pairs(torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(said), torch.arange(3), out)
    assert 0 < max(sizes) <= max(limit, 2 * max(width, 3) * 3)  # at least one line of one head
    for i, k in np.ndindex(2, heads):
        np.testing.assert_array_equal(out[i, :, k].numpy(), confusion_matrix(truth[i], said[i, k], 3))


def test_counts_of_a_large_image_are_exact() -> None:
    """Beyond 2^24, where float32 no longer holds every whole number."""
    truth = torch.zeros(1, 4200, 4099, dtype=torch.uint8)
    out = torch.empty(1, 2, 1, 2, dtype=torch.int64)
    count_pairs(truth, torch.zeros(1, 1, 4200, 4099, dtype=torch.uint8), torch.arange(2), out)
    assert out.flatten().tolist() == [4200 * 4099, 0, 0, 0]


# ---- whole evaluations -----------------------------------------------------------------------------------------------


def write_sizes(root: Path, count: int) -> Path:
    """A set of images of four sizes, mixed, with square defects and with pixels to ignore."""
    rng = np.random.default_rng(5)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        size = ((64, 64), (40, 64), (90, 61), (33, 128))[i * 7 % 5 % 4]
        mask = np.zeros(size, dtype=np.uint8)
        mask[: 5 + i % 20, : size[1] // 2] = 1
        mask[-3:, -4:] = 255
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"part{i:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"part{i:02}.png")
    return root


def heads_of(cache: Cache, kind: str, count: int) -> list[Any]:
    """Heads that say something, in evaluation mode; linear ones as a bank's, with one set of statistics."""
    torch.manual_seed(0)
    heads = [build_head(HeadRecipe("semseg", kind, cache.data.classes, width=16), cache.levels) for _ in range(count)]
    for head in heads:
        for name, parameter in head.named_parameters():
            parameter.data += 0.3 * torch.randn_like(parameter) * ("bias" not in name)
    bank = LinearBank(heads) if kind == "linear" else None
    with FeatureLoader(cache) as loader, torch.no_grad():
        for _, features in loader.batches([cache.usable()[:8]] * (40 if bank else 0)):
            bank.logits(features)  # which moves the statistics that all of them use
    return [head.eval() for head in heads]


def matrices(cache: Cache, heads: list[Any], rows: Any, here: Callable[..., Any]) -> np.ndarray:
    """(heads, images, classes, classes)."""
    task = Segmentation(cache, rows, TrainRecipe(), CPU, "ignore")
    with FeatureLoader(cache, heads[0].levels) as loader:
        return here(task)(heads, loader.batches, rows)


def both_ways(cache: Cache, heads: list[Any], rows: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Confusion matrices image by image, and as a device counts them."""
    plain = matrices(cache, heads, rows, lambda task: task._counted)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "whole_batches", lambda device: True)
        return plain, matrices(cache, heads, rows, lambda task: task._counted_there)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Images of four sizes, letterboxed, so that each has padding of its own."""
    root = tmp_path_factory.mktemp("mixed")
    return open_cache(extract(root, write_sizes(root / "parts", 20), size=(64, 64), fit="letterbox").path)


@pytest.mark.parametrize("kind", ["linear", "upsample"])
@pytest.mark.parametrize(("count", "at_once"), [(1, 2**26), (3, 2**26), (3, 20_000), (3, 1)])
def test_a_device_counts_what_the_cpu_counts(
    mixed: Cache, kind: str, count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed.usable()
    for module in (segmentation, pixel_classes):
        monkeypatch.setattr(module, "VALUES_AT_ONCE", at_once)
    plain, whole = both_ways(mixed, heads_of(mixed, kind, count), rows, monkeypatch)
    assert plain.shape == (count, len(rows), 2, 2) and plain[..., 1].sum() > 1000 < plain[..., 0].sum()
    assert np.abs(plain - whole).sum() <= 2 * count  # a pixel whose classes are equal but for rounding
    np.testing.assert_array_equal(plain.sum((2, 3)), whole.sum((2, 3)))


def test_a_device_stitches_tiles_as_the_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(extract(tmp_path, write_sizes(tmp_path / "parts", 12), tile=32, overlap=8).path)
    heads = heads_of(cache, "linear", 2)
    plain, whole = both_ways(cache, heads, cache.usable(), monkeypatch)
    assert plain.shape[1] == 12 and np.abs(plain - whole).sum() <= 4


def test_a_device_counts_what_the_cpu_counts_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DATA / "mt_defect"
    if not source.is_dir():
        pytest.skip(f"{source} is missing (FEATPROBE_SHARED_DATA names another folder)")
    for folder in sorted(source.glob("MT_*")):
        own = tmp_path / "mt_defect" / folder.name / "Imgs"
        own.mkdir(parents=True)
        for image in sorted((folder / "Imgs").glob("*.jpg"))[:12]:
            for path in (image, image.with_suffix(".png")):
                shutil.copy(path, own)
    cache = open_cache(extract(tmp_path, tmp_path / "mt_defect", size=(96, 96)).path)
    plain, whole = both_ways(cache, heads_of(cache, "linear", 1), cache.usable(), monkeypatch)
    assert plain.shape == (1, 72, 6, 6) and (plain.sum((0, 1, 2)) > 0).sum() > 2
    assert np.abs(plain - whole).sum() <= 1e-5 * plain.sum()  # pixels whose best classes are equal but for rounding


def test_each_head_of_a_bank_ends_with_the_statistics_of_its_own_best_point(parts: Workspace) -> None:
    (path,) = parts.cache_files()
    recipe = TrainRecipe(iterations=12, batch_size=4, evaluations=3)
    options = ProbeOptions(recipe=recipe, lr=(1e-1, 1e-2, 1e-3), seeds=1, quiet=True, head="linear")
    ready = prepare(training_of(parts, open_cache(path), "semseg", checked("semseg", options)))
    trials = trials_of(ready)
    heads, rows = [trial.head for trial in trials], ready.rows["train"]
    seen: list[list[dict[str, torch.Tensor]]] = []

    def evaluate() -> list[dict[str, float]]:
        seen.append([{name: value.clone() for name, value in head.state_dict().items()} for head in heads])
        return [{"score": float(len(seen) - 1 == k)} for k in range(3)]  # the best points: first, second, third

    with source_of(ready, heads[0]) as source:
        train(
            heads,
            [t.recipe for t in trials],
            source.training,
            rows,
            ready.task.start(heads),
            0,
            evaluate,
            best_by="score",
        )
    for k, head in enumerate(heads):
        for name, value in head.state_dict().items():
            assert torch.equal(value, seen[k][k][name]), name
    (name,) = [name for name in heads[0].state_dict() if name.endswith("running_mean")][:1]
    assert not torch.equal(heads[0].state_dict()[name], heads[1].state_dict()[name])


# ---- masks are decoded once ------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each stored mask is decoded."""
    found: Counter[bytes] = Counter()
    plain = store.decode_semantic

    def counting(data: bytes, *claimed: Any) -> Any:
        found[data] += 1
        return plain(data, *claimed)

    monkeypatch.setattr(store, "decode_semantic", counting)
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a cache of 24 images, whose masks all differ."""
    root = tmp_path_factory.mktemp("parts")
    extract(root, write_set(root / "parts", 24))
    return Workspace(root)


@pytest.mark.parametrize("loss_at", ["level", "image"])
@pytest.mark.parametrize("together", [False, True])
def test_each_mask_is_decoded_once_for_all_seeds_trials_and_evaluation_points(
    parts: Workspace, decoded: Counter[bytes], loss_at: Any, together: bool
) -> None:
    recipe = replace(BRIEF, loss_at=loss_at)
    (cache_file,) = parts.cache_files()
    cache = open_cache(cache_file)
    split_notes(cache, SplitChoice("own"))  # looks at every mask for classes that a split lacks
    looking = Counter(decoded)
    assert set(looking.values()) == {1} and len(looking) == 24
    decoded.clear()
    report = probe(
        parts, options=ProbeOptions(recipe=recipe, seeds=3, lr=(1e-2, 1e-3), shared_order=together, quiet=True)
    )
    assert len(report.rows) == 3 and decoded == looking + looking


def test_seeds_that_train_on_other_images_share_what_is_decoded(parts: Workspace, decoded: Counter[bytes]) -> None:
    options = ProbeOptions(recipe=BRIEF, seeds=3, fractions=(0.5,), quiet=True)
    probe(parts, options=options)
    cache = open_cache(parts.cache_files()[0])
    of_split = {s: {cache.rows[r].semantic for r in cache.usable(s).tolist()} for s in ("train", "val", "test")}
    assert {decoded[mask] for mask in of_split["val"] | of_split["test"]} == {2}  # for notes, and for scores
    assert {decoded[mask] for mask in of_split["train"]} == {1, 2}  # for notes and the choice of images; the chosen


def test_objects_are_decoded_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[bytes] = Counter()
    plain = store.decode_instances

    def counting(data: bytes, *claimed: Any) -> Any:
        found[data] += 1
        return plain(data, *claimed)

    monkeypatch.setattr(store, "decode_instances", counting)
    extract(tmp_path, write_coco(tmp_path / "parts"))
    recipe = replace(BRIEF, iterations=2, evaluations=1)
    workspace = Workspace(tmp_path)
    counts = []
    for seeds in (1, 3):
        found.clear()
        probe(workspace, "detect", options=ProbeOptions(recipe=recipe, width=16, seeds=seeds, quiet=True))
        counts.append(sum(found.values()))
    assert counts[0] == counts[1]


def test_a_ridge_head_reads_each_mask_once_for_shares_and_once_for_scores(
    parts: Workspace, decoded: Counter[bytes]
) -> None:
    probe(parts, options=ProbeOptions(head="ridge", quiet=True))
    cache = open_cache(parts.cache_files()[0])
    train, val, test = ({decoded[cache.rows[r].semantic] for r in cache.usable(s)} for s in ("train", "val", "test"))
    assert (train, val, test) == ({2}, {3}, {2})  # one of them for notes


def test_what_is_decoded_of_a_cache_is_forgotten_with_it_and_for_the_next(mixed: Cache, parts: Workspace) -> None:
    first = shelf_of(mixed)
    assert shelf_of(mixed) is first
    other = open_cache(parts.cache_files()[0])
    assert shelf_of(other) is not first and shelf_of(mixed) is not first and len(labels._shelves) == 1
    del other
    shelf_of(open_cache(parts.cache_files()[0]))
    gc.collect()
    assert len(labels._shelves) == 0


@pytest.mark.parametrize("room", [0.0, 0.4, 1.0, 1.4, 9.0])
@pytest.mark.parametrize("loss_at", ["level", "image"])
def test_labels_are_those_of_the_masks_however_little_memory_there_is(
    mixed: Cache, room: float, loss_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """room: for so many times the labels of all rows."""
    rows, frame = mixed.usable(), mixed.recipe.frame
    framed = torch.from_numpy(np.stack([labels_in_frame(mixed.semantic(r), mixed.rows[r].placement) for r in rows]))
    wanted = framed if loss_at == "image" else cell_shares(framed, 2, 4)
    size = frame[0] * frame[1] * (1 if loss_at == "image" else 2 * 2 / 16)
    labels._shelves.clear()
    monkeypatch.setattr(labels, "available_memory", lambda: len(rows) * size * room / labels.MEMORY_SHARE)
    monkeypatch.setattr(labels, "PIXELS_AT_ONCE", 3 * frame[0] * frame[1])
    for subset in (rows[::2], rows[1::3], rows, rows[::2]):  # some of them evict what came before
        store = Segmentation(mixed, subset, TrainRecipe(loss_at=loss_at), CPU, "ignore").store(4)
        assert store.resident == (len(subset) <= room * len(rows))
        own = np.random.default_rng(0).permutation(subset)[:5]
        assert torch.equal(store(own), wanted[own])
        if store.resident:
            index = torch.from_numpy(np.searchsorted(subset, own))
            assert torch.equal(store.on_device(index), wanted[own])
        counts = torch.stack([(framed[subset] == c).sum() for c in range(2)])
        assert torch.equal(store.pixels, counts.double())
        assert encode(mixed, own, loss_at, 4).shape == wanted[own].shape


def test_labels_are_kept_as_few_tensors(mixed: Cache) -> None:
    """A tensor for each row would take hundreds of bytes beside the labels themselves."""
    rows = mixed.usable()
    labels._shelves.clear()
    gc.collect()
    before = sum(type(own) is torch.Tensor for own in gc.get_objects())
    stores = [Segmentation(mixed, some, TrainRecipe(), CPU, "ignore").store(4) for some in (rows[::2], rows)]
    assert sum(type(own) is torch.Tensor for own in gc.get_objects()) - before < len(rows)
    assert all(store.resident for store in stores)


def test_masks_of_a_split_are_sent_to_a_device_once_where_they_fit(
    mixed: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, heads = mixed.usable(), heads_of(mixed, "linear", 1)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    sent = []
    plain = LabelShelf.truths
    monkeypatch.setattr(
        LabelShelf, "truths", lambda self, cache, images: sent.append(len(images)) or plain(self, cache, images)
    )
    for room, times in ((2**40, 1), (0, 3)):
        monkeypatch.setattr(segmentation, "device_room", lambda device, room=room: room)
        sent.clear()
        task = Segmentation(mixed, rows, TrainRecipe(), CPU, "ignore")
        with FeatureLoader(mixed) as loader:
            scores = [task.evaluate(heads, loader.batches, rows)[0].scores for _ in range(3)]
        assert sum(sent) == times * len(rows) and scores[0] == scores[1] == scores[2]


def kept_bytes(task: Segmentation) -> int:
    """Bytes of masks that lie on the device."""
    return sum(masks.nbytes for masks in task._truths.kept.values())


def test_masks_of_all_splits_together_take_one_share_of_the_device(
    mixed: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, heads = mixed.usable(), heads_of(mixed, "linear", 1)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    share = sum(mixed.image_semantic(image).nbytes for image in mixed.image_of[rows[:8]].tolist())
    monkeypatch.setattr(segmentation, "device_room", lambda device: share / segmentation.DEVICE_MEMORY_SHARE)
    task = Segmentation(mixed, rows, TrainRecipe(), CPU, "ignore")
    with FeatureLoader(mixed) as loader:
        first = task.evaluate(heads, loader.batches, rows[:8])
        assert 0.9 * share < kept_bytes(task) <= share
        for start in (8, 9, 10):
            task.evaluate(heads, loader.batches, rows[start:])
        assert kept_bytes(task) <= share
        assert task.evaluate(heads, loader.batches, rows[:8])[0].brief == first[0].brief


def test_masks_are_given_up_where_scoring_runs_out_of_memory(mixed: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads = mixed.usable(), heads_of(mixed, "linear", 1)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    monkeypatch.setattr(segmentation, "device_room", lambda device: 2**40)
    task, notes = Segmentation(mixed, rows, TrainRecipe(), CPU, "ignore"), list[str]()
    portions = Portions(CPU, 8, "parts", notes.append)
    with FeatureLoader(mixed) as loader:
        plain = task.evaluate(heads, loader.batches, rows)[0].brief

        def beside_masks(orders: Any) -> Any:
            for found in loader.batches(orders):
                if kept_bytes(task):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                yield found

        found = portions.do(lambda batches: task.evaluate(heads, batches, rows), beside_masks)[0].brief
    assert found == pytest.approx(plain, abs=1e-4) and len(notes) == 1 and portions.images == 4


def test_masks_of_tiled_images_are_not_kept_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(extract(tmp_path, write_sizes(tmp_path / "parts", 4), tile=32, overlap=8).path)
    heads = heads_of(cache, "linear", 1)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    monkeypatch.setattr(segmentation, "device_room", lambda device: 2**40)
    task = Segmentation(cache, cache.usable(), TrainRecipe(), CPU, "ignore")
    with FeatureLoader(cache) as loader:
        assert len(task.evaluate(heads, loader.batches, cache.usable())) == 1 and kept_bytes(task) == 0
