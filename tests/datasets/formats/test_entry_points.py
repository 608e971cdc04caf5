"""Formats of other packages, by entry points."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_readers import ROOT, SPLITS, labelme_set, objects_of, picture, refused, text

from featprobe.cli.main import cli
from featprobe.datasets import read_data


def install(folder: Path, module: str, code: str, *entries: str) -> Path:
    """A package as an installer lays it down: a module, and what its metadata names."""
    text(folder / f"{module}.py", code)
    text(folder / f"{module}-1.0.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    named = "\n".join(["[featprobe.datasets]", *entries])
    text(folder / f"{module}-1.0.dist-info" / "entry_points.txt", named)
    return folder


def boxes_csv(folder: Path, *more: str) -> Path:
    """The package of the documented reader, with more entries, beside a set of its format in set/."""
    page = (ROOT / "docs" / "add-a-reader.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    entry = page.partition('entry-points."featprobe.datasets"]\n')[2].partition("\n")[0].strip()
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    for i in range(4):
        picture(folder / "set" / f"p{i}.png", seed=i)
    rows = "".join(f"p{i}.png,1,2,5.5,{7 + i},{'pore' if i else 'crack'}\n" for i in range(4))
    text(folder / "set" / "boxes.csv", f"image,x1,y1,x2,y2,class\n{rows}")
    install(folder / "site", "boxes_csv", code, entry.replace('"', ""), *more)
    return folder / "set"


def test_the_documented_reader_serves_as_a_package_of_its_own(tmp_path: Path) -> None:
    root = boxes_csv(tmp_path)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "featprobe",
        "data",
        "check",
        str(root),
        "--format",
        "boxes-csv",
        "--json",
        "--quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["classes"], found["instances"]) == (["background", "crack", "pore"], 4)
    assert sum(found["splits"][split]["images"] for split in SPLITS) == 4


def test_another_packages_format_is_looked_for_last_and_its_errors_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = boxes_csv(tmp_path)
    said = refused(root)
    assert re.search(
        r"holds no data set that can be read\.\n  found   boxes\.csv.*\n  nearest pairs: .*\n  there   4 images in ",
        said,
    )
    assert f"featprobe data info {root} --format NAME" in said and len(said.splitlines()) == 8
    assert "  wanted  YOLO: data.yaml" in refused(root, "yolo")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert objects_of(read_data("set", root), "p1.png")[0].box_xyxy == (1, 2, 5.5, 8)
    assert "Did you mean boxes-csv?" in refused(root, "boxes-cvs")
    text(root / "boxes.csv", "image,x1,y1,x2,y2,class\np0.png,1,2,x,7,pore\n")
    assert "boxes.csv, row 2: wanted numbers" in refused(root)
    text(root / "boxes.csv", "image,x1,y1,x2,y2,class\n../../secret.png,1,2,3,7,pore\n")
    assert "not below the data folder" in refused(root)
    labelme_set(root)  # ours are looked for first
    assert read_data("set", root).tasks == ("semseg", "detect", "instseg")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise OSError('no licence')", "OSError: no licence"),
        ("FORMAT = 3", "found   a int"),
        ("", "AttributeError"),
    ],
)
def test_a_format_that_can_not_be_loaded_matters_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    root = boxes_csv(tmp_path)
    install(tmp_path / "site", f"broken{abs(hash(code))}", code, f"broken = broken{abs(hash(code))}:FORMAT")
    monkeypatch.syspath_prepend(tmp_path / "site")
    letter = refused(root, "broken")
    assert letter.startswith("The format broken of the package broken") and said in letter
    with pytest.warns(UserWarning, match="The format broken of the package broken"):
        assert len(read_data("set", root).samples) == 4
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "data"])
    assert result.exit_code == 0 and ", boxes-csv." in result.stdout
    assert "warning: The format broken of the package broken" in result.stderr and said in result.stderr
    (root / "boxes.csv").unlink()
    assert said in refused(root)  # it may have been the one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_data("set", labelme_set(tmp_path / "labelme")).samples) == 4
        assert read_data("set", labelme_set(tmp_path / "labelme"), "labelme").tasks
