"""A device whose memory is too small says what fits, one that is gone says so; nothing is lost, the command goes on."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import CPU, PoolingBackbone, extract, opened, options, stored, training_of, write_set
from pretend_card import pretended

from featprobe.backbones.backbone import load_backbone
from featprobe.cli.main import cli
from featprobe.errors import BackboneError, ProbeError
from featprobe.features import Features
from featprobe.kinds import TrainRecipe
from featprobe.probes.train import WARM_UP, _Recorded
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.extraction.plan import plan
from featprobe.stages.memory import Portions, largest_that_fits, with_batch_size
from featprobe.stages.predict import predict
from featprobe.stages.predictor import Predictor
from featprobe.stages.training import fit, run
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.run import foreseen, validated
from featprobe.stages.workspace import Workspace

NO_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB.\nMore of it."
NOT_LOCKED = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported."
GONE = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported."
QUICK = ProbeOptions(recipe=TrainRecipe(iterations=3, batch_size=2, evaluations=1), seeds=1, quiet=True, device="cpu")
SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))


class Small(PoolingBackbone):
    """A stand-in on a device that holds so many images at once, and is gone after so many batches."""

    def __init__(self, holds: int, batches: int = 1000) -> None:
        super().__init__()
        self.holds, self.left = holds, batches

    def __call__(self, images: torch.Tensor, content: torch.Tensor | None = None) -> Features:
        if len(images) > self.holds:
            raise torch.OutOfMemoryError(NO_MEMORY)
        self.left -= 1
        if self.left < 0:
            raise RuntimeError(GONE)
        return super().__call__(images, content)


def is_one_paragraph(error: BaseException) -> bool:
    """Whether a message has no empty line, and holds one line of what torch said."""
    text = str(error)
    return "\n\n" not in text and "More of it" not in text and "asynchronously" not in text


def test_an_extraction_names_the_batch_that_fits_and_goes_on_with_it(tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 9)
    whole = stored(extract(tmp_path / "plain", data).path)
    with pytest.raises(BackboneError, match="does not hold 8 images at once, under pooling") as caught:
        extract(tmp_path, data, Small(3), batch_size=8)
    said = str(caught.value)
    assert is_one_paragraph(caught.value) and said.endswith("--batch-size 2") and "2 at once fit" in said
    report = extract(tmp_path, data, Small(3), batch_size=2)
    assert report.missing == 0 and stored(report.path) == whole


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_device_too_small_for_one_image_says_so(tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(BackboneError, match="Not even one image fits"):
        extract(tmp_path, write_set(tmp_path / "parts", 4), Small(0), batch_size=batch_size)


def test_a_network_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(NO_MEMORY)

    backbone = load_backbone(SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "_maps", full)
        with pytest.raises(BackboneError, match="does not hold test_efficientnet with an image of 64x64") as caught:
            backbone.fit((64, 64))
    assert is_one_paragraph(caught.value) and backbone.frame is None
    monkeypatch.setattr(type(backbone), "to", full)
    with pytest.raises(BackboneError, match="with its weights"):
        load_backbone(SPEC)


def test_a_device_that_vanishes_costs_an_extraction_nothing_that_was_whole(tmp_path: Path) -> None:
    data = write_set(tmp_path / "parts", 8)
    with pytest.raises(BackboneError, match=r"The device cpu failed.*\nRows that were whole stay whole") as caught:
        extract(tmp_path, data, Small(8, batches=2))
    assert is_one_paragraph(caught.value) and "featprobe extract --backbone pooling" in str(caught.value)
    (path,) = Workspace(tmp_path).cache_files()
    left = 8 - len(np.flatnonzero(opened(path).done == 1))
    assert left == 4 and extract(tmp_path, data).computed == left


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a small cache."""
    folder = tmp_path_factory.mktemp("memory")
    workspace = Workspace(folder)
    data = workspace.data_set(str(write_set(folder / "parts", 24)))
    extract_with(workspace, PoolingBackbone(), data, options(), CPU)  # type: ignore[arg-type]
    return workspace


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_scoring_goes_by_fewer_images_where_more_do_not_fit_and_says_so(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    asked = replace(QUICK, head=head, recipe=None if head == "ridge" else QUICK.recipe)
    plain = probe(space, options=asked)
    real = Portions.do

    def narrow(self: Portions, work: Any, batches: Any) -> Any:
        def holding(orders: Any) -> Any:
            for rows, features in batches(orders):
                if len(rows) > 3:
                    raise torch.OutOfMemoryError(NO_MEMORY)
                yield rows, features

        return real(self, work, holding)

    monkeypatch.setattr(Portions, "do", narrow)
    report = probe(space, options=asked)
    assert any("does not hold 4 images at once; they are scored 2 at a time" in note for note in report.notes)
    assert report.rows[0]["test"]["miou"] == pytest.approx(plain.rows[0]["test"]["miou"], abs=1e-6)
    monkeypatch.setattr(Portions, "_cut", lambda self, batches: batches)  # not even one fits
    with pytest.raises(ProbeError, match="does not hold 1 image at once, to score") as caught:
        probe(space, options=asked)
    assert is_one_paragraph(caught.value)


@pytest.mark.parametrize(
    ("text", "batch_size", "said"),
    [
        (NO_MEMORY, 2, "--batch-size 1"),
        (NO_MEMORY, 1, "wanted  1 image at once\n"),
        (NO_MEMORY, 1, "stay. Take fewer --levels"),
        (GONE, 2, "begins this training again"),
        (NOT_LOCKED, 2, "Take a smaller --batch-size"),
    ],
)
def test_trouble_late_in_a_training_is_one_paragraph(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, text: str, batch_size: int, said: str
) -> None:
    kind = torch.OutOfMemoryError if text == NO_MEMORY else RuntimeError

    def late(*_: Any, **__: Any) -> Any:
        raise kind(text)

    monkeypatch.setattr(fit, "train", late)
    words = f"probe --iterations 2 --batch-size {batch_size} --seeds 1 --quiet --device cpu".split()
    result = CliRunner().invoke(cli, ["--workspace", str(space.root), *words])
    assert result.exit_code == 1 and said in result.stderr and "Traceback" not in result.stderr
    assert "\n\n" not in result.stderr.strip() and "asynchronously" not in result.stderr
    assert ("failed and can't be used" in result.stderr) == (text == GONE)


@pytest.mark.parametrize("place", ["trials_of", "keep_on_device"])
@pytest.mark.parametrize("ask", [run.run, validated, foreseen])
def test_too_little_memory_anywhere_in_a_run_is_one_paragraph(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, place: str, ask: Any
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(NO_MEMORY)

    training = training_of(space, opened(space.cache_files()[0]), "semseg", replace(QUICK, head="linear"))
    for module in (run, fit):
        monkeypatch.setattr(module, place, full, raising=False)
    with pytest.raises(ProbeError, match=r"The memory of cpu is too small\.\n  found   CUDA out of memory") as caught:
        ask(training)
    assert is_one_paragraph(caught.value) and "--device cpu" in str(caught.value)


def test_other_errors_are_not_taken_for_a_devices(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(fit, "train", wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        probe(space, options=QUICK)


def test_a_prediction_names_the_batch_that_fits(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = probe(space, options=QUICK).rows
    small = Small(3)
    monkeypatch.setattr("featprobe.stages.predictor.backbone_of", lambda *asked: small)
    head, images = space.probes / row["folder"], [space.root / "parts" / "images"]
    with pytest.raises(BackboneError, match="does not hold 8 images at once") as caught:
        predict(head, images, tmp_path / "out", quiet=True, device="cpu")
    assert is_one_paragraph(caught.value) and str(caught.value).endswith("the same command with --batch-size 2")
    assert predict(head, images, tmp_path / "out", quiet=True, device="cpu", batch_size=2).images == 24
    small.left = 3
    with pytest.raises(BackboneError, match=r"What was written stays\. Run the same command again\."):
        predict(head, images, tmp_path / "out", quiet=True, device="cpu", batch_size=2)


def test_halves_are_tried_until_one_fits() -> None:
    def step(images: int) -> None:
        if images > 5:
            raise torch.OutOfMemoryError(NO_MEMORY)

    assert [largest_that_fits(n, step) for n in (1, 2, 11, 12, 64)] == [0, 1, 5, 3, 4]
    assert with_batch_size("featprobe extract --data 'a b' --batch-size 16", 4).endswith("--data 'a b' --batch-size 4")


@pytest.mark.parametrize("text", [NO_MEMORY, GONE])
@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("extract --backbone embedded --data SPACE/parts", "featprobe.stages.extraction.make_cache.load_backbone"),
        ("plan --backbone embedded --data SPACE/parts", "featprobe.stages.extraction.plan.load_backbone"),
        ("probe --seeds 1 --quiet", "featprobe.stages.training.probe.build_head"),
        ("finetune --task semseg --quiet", "featprobe.stages.training.prepared._backbone"),
        ("predict SPACE SPACE/parts --out SPACE/out", "featprobe.stages.predict.Predictor"),
        ("try SPACE/parts --yes", "featprobe.stages.try_out.plan"),
    ],
)
def test_trouble_of_a_device_anywhere_in_a_command_is_one_paragraph(
    words: str, place: str, text: str, space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise (torch.cuda.OutOfMemoryError if text == NO_MEMORY else RuntimeError)(text)

    monkeypatch.setattr(place, failing)
    given = words.replace("SPACE", str(space.root)).split()
    result = CliRunner().invoke(cli, ["--workspace", str(space.root), *given])
    assert result.exit_code == 1 and "Traceback" not in result.output
    said = result.stderr.strip().split("featprobe: ", 1)[1]
    assert ("is too small" if text == NO_MEMORY else "can't be used by this process any more") in said
    assert "\n\n" not in said and "More of it" not in said and "asynchronously" not in said
    assert "command" in said  # which goes on, or is to be run again


def test_a_plan_names_the_batch_that_fits(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featprobe.stages.extraction.plan.load_backbone", lambda *_: Small(3))
    with pytest.raises(BackboneError, match="does not hold 8 images at once") as caught:
        plan(space, SPEC, str(space.root / "parts"), options(batch_size=8))
    assert is_one_paragraph(caught.value) and str(caught.value).endswith("the same command with --batch-size 2")


def test_a_library_that_finds_the_memory_full_is_taken_for_that(tmp_path: Path) -> None:
    class Full(Small):
        def __call__(self, images: torch.Tensor, content: torch.Tensor | None = None) -> Features:
            if len(images) > self.holds:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return super().__call__(images, content)

    with pytest.raises(BackboneError, match="2 at once fit"):
        extract(tmp_path, write_set(tmp_path / "parts", 8), Full(3), batch_size=8)


def test_a_predictor_goes_by_fewer_images_where_more_do_not_fit(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = probe(space, options=QUICK).rows
    small, images = Small(3), sorted((space.root / "parts" / "images").iterdir())[:8]
    monkeypatch.setattr("featprobe.stages.predictor.backbone_of", lambda *asked: small)
    with Predictor(space.probes / row["folder"], device="cpu") as predictor:
        assert len(predictor(images)) == 8
        small.holds = 0
        with pytest.raises(BackboneError, match="Not even one image fits"):
            predictor(images)
        small.holds, small.left = 3, 0
        with pytest.raises(BackboneError, match=r"device cpu failed.*\nThere are no results"):
            predictor(images[:2])


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    ("text", "said"),
    [(NO_MEMORY, NO_MEMORY), (GONE, GONE), ("CUDA error: captures nothing", "RECORD=0"), ("", "RECORD=0")],
)
def test_what_ends_a_recording_is_said_as_what_it_is(text: str, said: str) -> None:
    """A full memory and a dead device would end a step that is not recorded too."""
    kind = torch.cuda.OutOfMemoryError if text == NO_MEMORY else RuntimeError

    def step(features: Features | None) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise kind(text)

    recorded = _Recorded(step, torch.device("cuda"))
    with pytest.raises(ProbeError if said == "RECORD=0" else kind, match=re.escape(said.splitlines()[0])):
        for _ in range(WARM_UP + 1):
            recorded(None)


@pytest.fixture
def pretend() -> Iterator[None]:
    """There is a card."""
    with pretended():
        yield
