"""Wrong words of a command line are refused before torch is loaded, with exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import filled_cache

from featprobe import errors
from featprobe.backbones import timm_names
from featprobe.cli.main import cli
from featprobe.cli.stopping import KEPT
from featprobe.errors import FeatprobeError, ProbeError, UsageError, as_usage
from featprobe.machine import lacks_accelerator

PACKAGE = Path(errors.__file__).parent
ON_XRAY = ["extract", "--data", "xray", "--backbone", "embedded"]
WRONG = {
    "semseg": ["probe", "--task", "semsge"],
    "fcos": ["probe", "--task", "detect", "--head", "fcoss"],
    "linear": ["finetune", "--task", "semseg", "--head", "linaer"],
    "convnext_dinov3": ["extract", "--data", "xray", "--backbone", "convnext_dinov4"],
    "resnet18": ["plan", "--data", "xray", "--backbone", "resnet1b"],
    "convnext_tiny.fb_in22k": ["probe", "--extract", "--data", "xray", "--backbone", "convnext_tiny.fb_in22"],
    "xray": ["extract", "--data", "xrey", "--backbone", "embedded"],
    "surface": ["finetune", "--data", "surfase"],
    "embedded": ["probe", "--backbone", "embeded"],
    "as 256x640": [*ON_XRAY, "--size", "64"],
    "names as stride8": [*ON_XRAY, "--levels", "strid8"],
    "coco": [*ON_XRAY, "--format", "cocoo"],
    "hflip": [*ON_XRAY, "--views", "hflop"],
    "percentile:LO:HI": [*ON_XRAY, "--intensity", "percentil:1:2"],
    "1 <= I <= N": [*ON_XRAY, "--shard", "3/2"],
    "0 <= --overlap < T": [*ON_XRAY, "--tile", "64", "--overlap", "64"],
    "is no regular expression": [*ON_XRAY, "--group-from", "("],
    "no weights file": [*ON_XRAY, "--weights", "nowhere.safetensors"],
    "dice": ["probe", "--loss", "dise"],
    "0 < F <= 1": ["probe", "--fraction", "2"],
    "lr = -1.0": ["probe", "--lr", "-1"],
    "group:K": ["probe", "--split", "grop"],
    "one of cuda, mps, cpu": ["probe", "--device", "gpu"],
    "would change nothing": ["probe", "--task", "detect", "--loss", "dice"],
    "solved on frozen features": ["finetune", "--task", "semseg", "--head", "ridge"],
    "clip = -1.0": ["finetune", "--clip", "-1"],
    "from its frozen result": ["finetune", "--seeds", "2"],
    "belong together": ["compare", "--gap", "a,b"],
    "Did you mean some": ["compare", "--gap", "some,sone", "--on", "xray,surface"],
    "no semseg head": ["cache", "audit", "parts", "--heads", "linaer"],
    "No cache in": ["cache", "info", "prats"],
    "is not a size": ["data", "check", "xray", "--size", "64"],
    "Did you mean surface": ["data", "info", "surfac"],
    "like 0.05/part": ["inspect", "--false-calls", "0.05/tile"],
    "no number for call": ["inspect", "--cost", "miss=100"],
    "above 0 and at most 1": ["inspect", "--recall", "95"],
    "Give one of them": ["inspect", "--recall", "0.9", "--false-calls", "0.1"],
    "iou:X with 0 < X <= 1": ["inspect", "--found", "iou:50"],
    "is no time": ["try", "surface", "--minutes", "inf"],
}
"""A part of what is said -> words with one mistake."""
CODE = """
import json, sys
from click.testing import CliRunner
from featprobe.cli.main import cli
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, words)
    print(json.dumps([done.exit_code, done.stderr, done.stdout, sorted({'torch', 'timm'} & set(sys.modules))]))
"""


def test_wrong_words_end_with_2_before_torch_is_loaded(tmp_path: Path) -> None:
    filled_cache(tmp_path / "cache" / "parts-000000" / "some-00000000.h5")
    (tmp_path / "probes").mkdir()
    rows = [{"backbone": "some", "data": name} for name in ("xray", "surface")]
    (tmp_path / "probes" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(tmp_path.rglob("*"))
    environment = {**os.environ, "FEATPROBE_WORKSPACE": str(tmp_path)}
    command = [sys.executable, "-c", CODE, json.dumps(list(WRONG.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for (said, words), line in zip(WRONG.items(), done.stdout.splitlines(), strict=True):
        code, told, printed, heavy = json.loads(line)
        assert (code, printed, heavy) == (2, "", []), (words, told)
        assert told.startswith("featprobe: ") and said in told, (words, told)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not lacks_accelerator(), reason="this machine may have a GPU")
@pytest.mark.parametrize("words", [["probe"], ["finetune"], ON_XRAY, ["predict", "head", "image"]])
def test_a_gpu_that_is_not_here_is_refused_before_torch_is_loaded(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom featprobe.cli.main import cli\ntry: cli(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--workspace", str(tmp_path), *words, "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "False\n"), done.stderr
    assert "no device 'cuda' here.\n  wanted  one of cpu\n" in done.stderr


def test_a_study_with_misspelt_names_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    study = 'data = ["xrey"]\nbackbones = ["embeded"]\ntasks = ["semsge"]\nsizes = ["64"]\n'
    (tmp_path / "study.toml").write_text(study)
    words = ["--workspace", str(tmp_path), "study", str(tmp_path / "study.toml")]
    command = [sys.executable, "-c", CODE, json.dumps([words])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    code, told, _, heavy = json.loads(done.stdout)
    assert (code, heavy) == (1, []), "the command line is right, the file is not"
    assert all(name in told for name in ("Did you mean xray", "Did you mean embedded", "semseg", "256x640"))


def test_the_names_that_timm_s_files_hold_are_timm_s_own() -> None:
    import timm

    read, asked = timm_names._read(), timm_names.timm_names()
    assert read is not None, "this timm is written in another way: a misspelt backbone costs seconds"
    assert (read.models, read.former) == (asked.models, asked.former)
    assert asked.models == set(timm.list_models())
    assert asked.weights == {name for name in timm.list_models(include_tags=True) if "." in name}
    assert not [name for name in asked if name not in read], "no name of timm is refused"
    assert not read.weights - asked.weights
    assert all(timm.is_model(name) for name in read.former)
    for name in ("resnet1b", "resnet18.no_such_tag", "hf-hub:timm/resnet18", "", "."):
        assert name not in read and name not in asked


def test_a_wrong_word_is_told_from_what_is_not_there() -> None:
    with pytest.raises(UsageError, match="no such head") as caught, as_usage():
        raise ProbeError("no such head")
    assert (caught.value.exit_code, FeatprobeError.exit_code) == (2, 1)
    with pytest.raises(OSError, match="disk"), as_usage():
        raise OSError("disk")


def test_no_command_decides_on_the_exit_code_of_an_error() -> None:
    """3 is what a check found; 1, 2 and 130 are said in one place."""
    for path in (PACKAGE / "cli").glob("*.py"):
        codes = set(re.findall(r"ctx\.exit\((\d+)\)", path.read_text()))
        assert codes <= {"3"} and "sys.exit(" not in path.read_text(), path


def test_what_is_kept_is_said_of_commands_that_exist() -> None:
    assert set(KEPT) <= set(cli.commands)
