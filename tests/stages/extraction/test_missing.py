"""Caches that `probe --extract` and `finetune --extract` make in the same process."""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from forked import launch
from helpers import write_set

from featprobe.cache import WHOLE, CacheWriter, open_cache
from featprobe.errors import CacheError, CacheIncompleteError, FeatprobeError, ProbeError
from featprobe.kinds import TrainRecipe
from featprobe.stages.extraction import make_cache as extracting
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

NAME = "test_efficientnet"
QUICK = ProbeOptions(recipe=TrainRecipe(iterations=2, batch_size=2, evaluations=1), seeds=1, quiet=True, device="cpu")
CONFIG = f'[data.parts]\npath = "parts"\nsize = "64x64"\n[backbones.small]\nmodel = "{NAME}"\nrandom_init = true\n'


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """A workspace whose featprobe.toml names one small set and one small backbone, and no cache."""
    write_set(tmp_path / "parts", 12)
    (tmp_path / "featprobe.toml").write_text(CONFIG)
    return Workspace(tmp_path)


def count_extractions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that fills with the data sets that are extracted."""
    made: list[str] = []
    whole = extracting.extract_with

    def noting(workspace: Workspace, backbone: Any, data: Any, *rest: Any, **more: Any) -> Any:
        made.append(data.name)
        return whole(workspace, backbone, data, *rest, **more)

    monkeypatch.setattr(extracting, "extract_with", noting)
    return made


def test_without_the_flag_nothing_is_made_and_the_error_names_it(space: Workspace) -> None:
    for train in (probe, finetune):
        for named in ([], ["parts"]):
            with pytest.raises(CacheError, match="Or let this command make it first:  --extract"):
                train(space, "semseg", named, options=QUICK)
    assert not space.cache_files()


@pytest.mark.parametrize("named", [(["parts"], ["small"]), ([], [])], ids=["named", "configured"])
def test_a_missing_cache_is_made_once_as_extract_makes_it(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, named: tuple[list[str], list[str]]
) -> None:
    made, said = count_extractions(monkeypatch), list[str]()
    rows = probe(space, "semseg", *named, options=QUICK, say=said.append, extract=True).rows
    assert made == ["parts"] and said[0] == "extracting: small-random on parts, 12 images at 64x64" and len(rows) == 1
    (path,) = space.cache_files()
    cache = open_cache(path)
    assert cache.recipe.frame == (64, 64) and len(cache.usable()) == 12
    again = probe(space, "semseg", *named, options=QUICK, extract=True).rows  # under the same names
    assert made == ["parts"] and again[0]["test"] == rows[0]["test"]
    report = extract(space, space.backbone("small"), "parts", ExtractOptions(quiet=True, device="cpu"))
    assert report.path == path and report.computed == 0


def test_an_unfinished_cache_is_completed(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    half = ExtractOptions(quiet=True, device="cpu", batch_size=4, shard=(1, 2))
    assert extract(space, space.backbone("small"), "parts", half).missing == 8
    with pytest.raises(CacheIncompleteError, match="Or let this command make it first:  --extract"):
        probe(space, "semseg", ["parts"], options=QUICK)
    assert len(probe(space, "semseg", ["parts"], ["small"], options=QUICK, extract=True).rows) == 1
    (path,) = space.cache_files()
    assert len(open_cache(path).usable()) == 12


def test_a_plan_makes_nothing_and_says_what_would_be_made(space: Workspace) -> None:
    said: list[str] = []
    report = finetune(space, "semseg", ["parts"], options=QUICK, say=said.append, dry_run=True, extract=True)
    assert (
        said[0] == "to extract: small-random on parts, 12 images at 64x64"
        and not report.rows
        and not space.cache_files()
    )


def test_finetune_makes_what_it_lacks(space: Workspace) -> None:
    rows = finetune(space, "semseg", ["parts"], ["small"], options=QUICK, extract=True).rows
    assert [row["regime"] for row in rows] == ["full"] and len(space.cache_files()) == 1


def test_what_can_not_be_made_or_used_is_refused_before_it_is_made(space: Workspace, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: probe(space, "instseg", ["parts"], options=QUICK, extract=True), "No labels for the task instseg"),
        (lambda: probe(space, "semseg", ["part"], options=QUICK, extract=True), "Did you mean"),
        (
            lambda: finetune(space, "semseg", options=ProbeOptions(head="ridge"), extract=True),
            "is solved on frozen features",
        ),
    ]
    for call, said in cases:
        with pytest.raises(FeatprobeError, match=said):
            call()
    (tmp_path / "bare").mkdir()
    with pytest.raises(ProbeError, match="--extract has no data set and no backbone") as caught:
        probe(Workspace(tmp_path / "bare"), "semseg", options=QUICK, extract=True)
    assert "[backbones.NAME]" in str(caught.value)
    assert not space.cache_files()


def test_random_weights_are_named_as_in_a_study(space: Workspace) -> None:
    rows = probe(space, "semseg", ["parts"], [f"{NAME}-random"], options=QUICK, extract=True).rows
    assert rows[0]["backbone"] == f"{NAME}-random"


HEAVY = {"timm", "scipy.spatial", "scipy.stats", "scipy.optimize", "huggingface_hub", "pandas", "matplotlib",
         "sklearn", "accelerate", "tensorboard", "wandb", "submitit", "pydicom", "h5py", "torchvision", "torch._dynamo",
         "sympy"}  # fmt: skip
"""What training on a cache does not use: torch's compiler and sympy take as long as half of torch. Records of maps need
scipy.ndimage, for contrast, and that loads scipy.special."""


def test_a_probe_of_a_cache_imports_nothing_that_it_does_not_use(space: Workspace) -> None:
    extract(space, space.backbone("small"), "parts", ExtractOptions(quiet=True, device="cpu"))
    program = (
        "import sys\n"
        "from featprobe.cli.main import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    words = ["probe", "--iterations", "2", "--seeds", "1", "--device", "cpu", "--quiet", "--json"]
    command = [sys.executable, "-c", program, "--workspace", str(space.root), *words]
    done = run(command, capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stderr.split())
    assert len(json.loads(done.stdout)) == 1 and "torch" in loaded
    assert not (heavy := loaded & HEAVY), heavy
    assert len(loaded) < 1800  # 1700 with what records need: pyarrow and scipy.ndimage; with torch's compiler 2770


def test_processes_that_were_launched_together_make_a_part_each(space: Workspace) -> None:
    done = launch([
        "-m", "featprobe", "--workspace", space.root, "probe", "--extract", "--iterations", "2", "--batch-size", "2",
        "--seeds", "1", "--device", "cpu", "--quiet", "--json",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 1 and done.stderr.count("extracting: ") == 1
    (path,) = space.cache_files()
    runs = [json.loads(line) for line in path.with_suffix(".runs.jsonl").read_text().splitlines()]
    assert sum(run["computed"] for run in runs) == 12


def test_an_unfinished_cache_is_completed_as_it_was_begun_and_no_other_is_made(space: Workspace) -> None:
    odd = ExtractOptions(
        size=(96, 64), fit="letterbox", intensity="percentile:1:99", dtype="fp32", batch_size=4, quiet=True,
        device="cpu", tile=0, views=("hflip",),
    )  # fmt: skip
    path = extract(space, space.backbone("small"), "parts", odd).path
    whole = path.read_bytes()
    with CacheWriter(path) as writer:
        writer.mark_missing(1)
        writer.mark_missing(7)
    said: list[str] = []
    with pytest.raises(CacheIncompleteError, match="Or let this command make it first:  --extract"):
        probe(space, "semseg", ["parts"], options=QUICK)
    report = probe(space, "semseg", options=QUICK, extract=True, say=said.append)
    assert "completing" in said[0] and "2 rows" in said[0]
    assert space.cache_files() == [path] and len(report.rows) == 1
    assert (open_cache(path).done == WHOLE).all() and path.read_bytes() == whole
