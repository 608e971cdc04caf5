"""Make archives: workspaces of featprobe as it was, each by the commands of one commit.

    python tests/archives/make.py          # those that are not there
    python tests/archives/make.py NAME …   # these, also where they are there

Each commit is taken out of this repository's history, and its own commands run on the set in `set/`. `HEAD` is this
working tree, for a format that no commit wrote before. What a cache holds is written down beside it, as h5py alone
reads it. The sums of all files then go into sums.txt, which a test compares: no archive is made anew unseen.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKPLACE = Path(tempfile.gettempdir()) / "featprobe-archives"  # caches and cards keep where their set lay
EXTRACT = ("extract", "--backbone", "embedded", "--data", "parts", "--skip-bad", "--quiet")
TILES = (*EXTRACT, "--levels", "stride16,stride32", "--tile", "24", "--overlap", "8", "--views", "hflip")
PROBE = ("probe", "--data", "parts", "--seeds", "1", "--iterations", "30", "--task", "semseg", "--quiet")
STUDY = """data = ["parts"]
backbones = ["embedded"]
heads = ["linear"]
regimes = ["frozen"]
seeds = 1
sizes = ["32x32"]
show = 0
views = ["{views}"]
train.all.iterations = 30
"""
MADE: dict[str, tuple[str, str, tuple[tuple[str, ...], ...]]] = {
    "images-bfa62e1": ("bfa62e1", "", ((*EXTRACT, "--size", "32x32"), PROBE)),
    "tiles-9f0d5d9": ("9f0d5d9", "", (TILES, PROBE)),
    "images-8775eda": ("8775eda", "none", ((*EXTRACT, "--size", "32x32"), ("study", "study.toml"))),
    "views-8775eda": (
        "8775eda", "hflip", ((*EXTRACT, "--size", "32x32", "--views", "hflip"), ("study", "study.toml"))
    ),
    "views-version3": (
        "HEAD", "hflip", ((*EXTRACT, "--size", "32x32", "--views", "hflip"), ("study", "study.toml"))
    ),
}  # fmt: skip
"""Archive -> the commit that made it, the views of its study (or ""), and the commands that it ran."""
CONFIG = '[data.parts]\npath = "set"\n'
TEXTS = ("id", "group", "split", "image", "image_hash")


def make_set(folder: Path) -> None:
    """Seven grey images of 32x32 pixels with a bright square each, boxes and masks of which COCO's JSON tells.

    The last is cut off, and can't be read.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations = []
    for i, split in enumerate(("train", "train", "train", "val", "test", "test", "test")):
        (left, top), side = rng.integers(4, 20, 2).tolist(), 8 + i % 3
        pixels = rng.integers(90, 110, (32, 32), dtype=np.uint8)
        pixels[top : top + side, left : left + side] += 100
        Image.fromarray(pixels).save(folder / "images" / f"part{i}.png")
        right, bottom = left + side, top + side
        polygon = [left, top, right, top, right, bottom, left, bottom]
        images.append({"id": 10 + i, "file_name": f"part{i}.png", "height": 32, "width": 32, "split": split})
        annotations.append(
            {"id": 1 + i, "image_id": 10 + i, "category_id": 7, "bbox": [left, top, side, side], "area": side * side,
             "iscrowd": 0, "segmentation": [polygon]}
        )  # fmt: skip
    broken = folder / "images" / "part6.png"
    broken.write_bytes(broken.read_bytes()[:400])
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "pore"}]}
    (folder / "all.json").write_text(json.dumps(coco))


def source_of(commit: str, folder: Path) -> Path:
    """The package as it was at a commit; the working tree for HEAD."""
    if commit == "HEAD":
        return ROOT
    packed = subprocess.run(["git", "-C", ROOT, "archive", commit, "featprobe"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def make(name: str) -> None:
    """Run an archive's commands in a new workspace, and keep what they left."""
    commit, views, commands = MADE[name]
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.rmtree(WORKPLACE, ignore_errors=True)
    try:
        source, space = source_of(commit, WORKPLACE / "source"), WORKPLACE / name
        space.mkdir(parents=True)
        (space / "featprobe.toml").write_text(CONFIG)
        if views:
            (space / "study.toml").write_text(STUDY.format(views=views))
        shutil.copytree(HERE / "set", space / "set")
        for command in commands:
            run(source, space, *command)
        (card,) = space.glob("probes/*/*/*/*/card.json")
        run(
            source,
            space,
            "predict",
            str(card.parent.relative_to(space)),
            "set/images",
            "--out",
            "predicted",
            "--skip-bad",
            "--quiet",
        )
        (cache,) = space.glob("cache/*/*.h5")
        (space / "expected.json").write_text(json.dumps(held_by(cache), indent=1))
        shutil.rmtree(space / "set")
        for left in (*space.rglob(".*.lock"), *space.rglob(".*.look")):
            left.unlink()
        for folder in (*space.glob("predicted/overlays"), *space.glob("probes/report")):
            shutil.rmtree(folder)
        shutil.copytree(space, HERE / name)
    finally:
        shutil.rmtree(WORKPLACE)


def run(source: Path, space: Path, *command: str) -> None:
    """Run a command of the package in `source` in a workspace."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "featprobe", *command], cwd=space, env=environment, check=True)


def held_by(path: Path) -> dict[str, Any]:
    """What a cache file holds: of each row its texts, and sums of its features and labels."""
    with h5py.File(path, "r", locking=False) as file:
        version = int(file.attrs["version"])
        texts = json.loads(file["texts"][...].tobytes())["rows"] if "texts" in file else {
            name: file[f"rows/{name}"].asstr()[...].tolist() for name in TEXTS
        }  # fmt: skip
        rows = [dict(zip(TEXTS, values, strict=True)) for values in zip(*(texts[name] for name in TEXTS), strict=True)]
        for i, row in enumerate(rows):
            row["done"] = int(file["done"][i])
            row["features"] = {
                name: hashlib.sha256(level[i].tobytes()).hexdigest() for name, level in file["features"].items()
            }
            for kind in ("semantic", "instances"):
                start, stop = file[f"targets/{kind}_offset"][i : i + 2].tolist()
                row[kind] = hashlib.sha256(file[f"targets/{kind}"][start:stop].tobytes()).hexdigest()
    return {"version": version, "rows": rows}


def sums() -> str:
    """sha256 of every file that is kept, by name; as sha256sum writes it."""
    kept = [path for name in ("set", *MADE) for path in (HERE / name).rglob("*") if path.is_file()]
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(HERE).as_posix()}\n"
        for path in sorted(kept)
    )


if __name__ == "__main__":
    if not (HERE / "set").is_dir():
        make_set(HERE / "set")
    for name in sys.argv[1:] or [name for name in MADE if not (HERE / name).is_dir()]:
        make(name)
    (HERE / "sums.txt").write_text(sums())
