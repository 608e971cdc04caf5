"""What trainings are called and what is written of them, as golden files: keys, folders, rows, cards, caches.

    python tests/golden/make_golden.py          # golden files that are not there
    python tests/golden/make_golden.py NAME …   # these, also where they are there

A configuration is a few commands in a new workspace that holds one of the caches of `SPACES`. What its rows and cards
say is kept as it is written, in that order, but for what differs from run to run and from machine to machine: times,
devices, versions, scores, sums of trained weights, paths. `"any"` stands there, and null where there is no value.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from featprobe.cli.main import cli

HERE = Path(__file__).parent
ARCHIVES = HERE.parent / "archives"
OLD = tuple(sorted(path.name for path in ARCHIVES.glob("*-*") if path.is_dir()))
"""Names of the archives."""
ANY = "any"
EXTRACT = ("extract", "--backbone", "embedded", "--data", "parts", "--precision", "fp32", "--device", "cpu")
SPACES: Mapping[str, tuple[str, ...]] = {
    "images": (*EXTRACT, "--levels", "stride8,stride16"),
    "views": (*EXTRACT, "--levels", "stride16", "--size", "24x32", "--views", "hflip,crop:1"),
    "letterbox": (*EXTRACT, "--levels", "stride16", "--size", "32x64", "--fit", "letterbox", "--intensity", "minmax"),
    "tiles": (
        *EXTRACT, "--levels", "stride16", "--tile", "24", "--overlap", "8", "--empty-tiles", "0.5", "--views", "vflip",
        "--dtype", "int8",
    ),
    "plain-tiles": (*EXTRACT, "--levels", "stride16", "--tile", "24", "--intensity", "window:20:230:log"),
}  # fmt: skip
"""Workspace -> the extraction that fills its cache."""
FEW = ("--data", "parts", "--iterations", "4", "--device", "cpu")
ONE = (*FEW, "--seeds", "1")
CONFIGURATIONS: Mapping[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "semseg-linear": ("images", (("probe", *FEW, "--seeds", "2"),)),
    "semseg-linear-shared-order": (
        "images",
        (("probe", *FEW, "--seeds", "2", "--shared-order", "--fraction", "0.5", "--absent-classes", "zero",
          "--class-weights", "none", "--loss", "ce+dice", "--loss-at", "level", "--split", "stratified"),),
    ),
    "semseg-linear-split-file": (
        "images", (("probe", *FEW, "--seeds", "2", "--fraction", "0.4,1", "--split", "split.csv"),)
    ),
    "semseg-linear-views": ("views", (("probe", *ONE, "--weights-from", "end", "--batch-size", "3"),)),
    "semseg-ridge": ("letterbox", (("probe", "--data", "parts", "--head", "ridge", "--device", "cpu"),)),
    "semseg-ridge-fractions": (
        "images",
        (("probe", "--data", "parts", "--head", "ridge", "--fraction", "0.5", "--seeds", "2", "--split", "group",
          "--class-weights", "none", "--device", "cpu"),),
    ),
    "semseg-upsample-folds": (
        "images",
        (("probe", *ONE, "--head", "upsample", "--width", "8", "--levels", "stride8", "--loss", "focal",
          "--split", "group:2"),),
    ),
    "semseg-upsample-ladder": (
        "images",
        (("probe", "--data", "parts", "--head", "upsample", "--width", "4", "--levels", "stride16", "--seeds", "1",
          "--iterations", "auto", "--device", "cpu"),),
    ),
    "semseg-grid-and-counterpart": (
        "tiles",
        (("probe", *ONE, "--lr", "1e-3,5e-3", "--weight-decay", "1e-4,1e-3"), ("finetune", "--device", "cpu"),
         ("finetune", "--device", "cpu")),
    ),
    "semseg-full": (
        "images",
        (("finetune", *ONE, "--backbone-lr", "0.3", "--layer-decay", "0.9", "--ema", "0.5", "--accumulate", "2",
          "--clip", "0.5", "--bn", "train", "--no-augment", "--levels", "stride16"),),
    ),
    "semseg-online": ("plain-tiles", (("finetune", *ONE, "--regime", "frozen-online"),)),
    "semseg-online-fold": (
        "images", (("finetune", *ONE, "--regime", "frozen-online", "--no-augment", "--split", "stratified:2/2"),)
    ),
    "detect-fcos": ("images", (("probe", *ONE, "--task", "detect", "--width", "8", "--pyramid", "levels"),)),
    "detect-fcos-full": (
        "views", (("finetune", *ONE, "--task", "detect", "--width", "8", "--fraction", "0.5"),)
    ),
    "detect-rcnn-components": (
        "images",
        (("probe", *ONE, "--task", "detect", "--head", "fasterrcnn", "--width", "8", "--pyramid", "simple",
          "--levels", "stride16", "--instances", "components", "--split", "image"),),
    ),
    "instseg-rcnn": (
        "images",
        (("probe", *ONE, "--task", "instseg", "--width", "8", "--fraction", "0.5", "--absent-classes", "zero"),),
    ),
}  # fmt: skip
"""Golden file -> the workspace that its commands begin in, and they."""
STUDIES = {
    "dense": """data = ["parts"]
backbones = ["embedded"]
heads = ["linear", "ridge"]
regimes = ["frozen", "frozen-online", "full"]
seeds = 2
fractions = [0.5, 1.0]
show = 0
train.all.iterations = 4
tuning.precision = "fp32"
""",
    "folds": """data = ["parts"]
backbones = ["embedded"]
tasks = ["semseg", "detect"]
heads = ["ridge", "fcos"]
regimes = ["frozen"]
seeds = 1
split = "group:2"
lr = [0.001, 0.002]
show = 0
train.all.iterations = 4
train.fcos.weights_from = "end"
""",
    "objects": """data = ["parts"]
backbones = ["embedded"]
tasks = ["detect", "instseg"]
heads = ["fcos", "fasterrcnn", "maskrcnn"]
regimes = ["frozen", "full"]
seeds = 1
show = 0
train.all.iterations = 4
tuning.precision = "fp32"
""",
}
"""The studies that the stored workspace, `stored/`, holds the results of."""
WORKPLACE = Path(tempfile.gettempdir()) / "featprobe-golden"  # cards keep where their set lay
CONFIG = '[data.parts]\npath = "set"\n'
RUNGS = (19, 38, 75, 150, 300, 600)
"""Of the ladder in `ladders.jsonl`. All score alike: it has ended, and the first is enough."""
TITLE = re.compile(r"^(?:\[\d+/\d+\] )?(.*?) \(cache/\S+\): ", re.MULTILINE)
"""Of a training, in what is said before it begins, behind its number where there are several."""
AGAIN = re.compile(r"^  (\S+): .*  (featprobe \w+.*)$", re.MULTILINE)
"""Folder and command of a result whose head is gone, in what `compare` says of it."""
WIDTH = 118
OF_EVERY_RUN = ("time", "val", "test", "seconds", "device", "weights_at")
"""Fields of a row that another run writes otherwise."""


def make_set(folder: Path) -> None:
    """Twenty grey images of 32x32 pixels, two of each part, with a bright square and, most of them, a dark bar."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(20):
        pixels = rng.integers(90, 110, (32, 32), dtype=np.uint8)
        (left, top), side = rng.integers(1, 12, 2).tolist(), 8 + i % 3
        objects = [(7, left, top, side, side, 100), (9, left, top + 16, 16, 3, -80)][: 2 if i % 3 else 1]
        for category, x, y, width, height, change in objects:
            pixels[y : y + height, x : x + width] = (pixels[y : y + height, x : x + width].astype(int) + change).clip(0)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {"id": 1 + len(annotations), "image_id": 100 + i, "category_id": category, "area": width * height,
                 "bbox": [x, y, width, height], "iscrowd": 0, "segmentation": [polygon]}
            )  # fmt: skip
        name = f"part{i // 2}_{i % 2}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        split = "train" if i < 10 else "val" if i < 14 else "test"
        images.append(
            {"id": 100 + i, "file_name": name, "height": 32, "width": 32, "split": split, "group": f"part{i // 2}"}
        )
    categories = [{"id": 7, "name": "pore"}, {"id": 9, "name": "crack"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(coco))


def call(space: Path, *command: str) -> Result:
    """Run a command in this process, where a workspace is."""
    before = Path.cwd()
    os.chdir(space)  # split.csv and the set are found from there
    try:
        result = CliRunner().invoke(cli, command, prog_name="featprobe")
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(space: Path, *command: str) -> Result:
    """The same of a command that must succeed."""
    result = call(space, *command)
    assert result.exit_code == 0, result.output
    return result


def make_space(space: Path, name: str) -> Path:
    """A new workspace with the cache of one of `SPACES`."""
    space.mkdir(parents=True)
    (space / "featprobe.toml").write_text(CONFIG)
    shutil.copytree(HERE / "set", space / "set")
    shutil.copy(HERE / "split.csv", space)
    done(space, *SPACES[name], "--quiet")
    (space / "probes").mkdir()
    if (HERE / "ladders.jsonl").is_file():
        shutil.copy(HERE / "ladders.jsonl", space / "probes")
    return space


def hidden(value: Any) -> Any:
    """A value whose parts are all ANY, but for null."""
    if isinstance(value, dict):
        return {name: hidden(own) for name, own in value.items()}
    if isinstance(value, list):
        return [hidden(own) for own in value]
    return None if value is None else ANY


def row_said(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result row as golden files have it."""
    said = {name: hidden(own) if name in OF_EVERY_RUN else own for name, own in row.items()}
    if "ridge" in said:
        said["ridge"] = {**said["ridge"], **{name: hidden(said["ridge"][name]) for name in ("strength", "offsets")}}
    tried = [name for values in (row["grid"], row["chosen_from"] or {}) for name, own in values.items() if own]
    return {**said, "recipe": {name: ANY if name in tried else own for name, own in row["recipe"].items()}}


def card_said(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card as golden files have it; its result is the row's."""
    result, said = card["result"], dict(card)
    for name in ("versions", "head_sha256", "card_sha256", "files"):
        if name in said:
            said[name] = hidden(said[name])
    said["data"] = {**card["data"], "root": ANY}
    said["curve"] = [
        {n: own if n == "iteration" else hidden(own) for n, own in point.items()} for point in card["curve"]
    ]
    for name in ("fingerprint", "features"):
        if card[name]["weights_sha256"] != result["weights_sha256"]:
            said[name] = {**card[name], "weights_sha256": "of the trained backbone"}
    return {**said, "result": row_said(result)}


def rows_in(space: Path) -> list[dict[str, Any]]:
    """The result rows of a workspace, in their order."""
    path = space / "probes" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trained(space: Path, commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the commands of a configuration say and leave. The cards are gone afterwards."""
    results = [call(space, *command, "--quiet") for command in commands]
    rows, probes = rows_in(space), space / "probes"
    heads = [head_said(probes / row["folder"], row) for row in rows]
    left = sorted(path.name for path in probes.iterdir() if path.is_file() and not path.name.startswith("."))
    return {
        "commands": [" ".join(command) for command in commands],
        "exit codes": [result.exit_code for result in results],
        "titles": [title for result in results for title in TITLE.findall(result.stderr)],
        "files": left,
        "heads": heads,
        "trained again by": again_commands(space),
    }


def again_commands(space: Path) -> dict[str, str]:
    """The command that trains each result of a workspace again, by its folder. The cards are gone afterwards."""
    for row in rows_in(space):
        (space / "probes" / row["folder"] / "card.json").unlink()
    return dict(AGAIN.findall(call(space, "compare").output))


def head_said(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of a head, as golden files have it."""
    card = json.loads((folder / "card.json").read_text())
    said = card_said(card)
    if {"version": row["version"], **card["result"]} == row:
        said["result"] = "the row, but for its version"
    curves = json.loads((folder / "curves.json").read_text())
    trials = [{n: own for n, own in trial.items() if n in ("lr", "weight_decay")} for trial in curves]
    if (folder / "scores.npz").is_file():
        scores = np.load(folder / "scores.npz")
        tested: Any = {name: own.tolist() if name in ("ids", "groups") else own.shape for name, own in scores.items()}
    else:
        tested = json.loads((folder / "truth.json").read_text())
    files = sorted(path.name for path in folder.iterdir())
    return {"row": row_said(row), "card": said, "files": files, "trials": trials, "tested": tested}


def extracted(space: Path) -> dict[str, Any]:
    """What is said of the cache of a workspace, and what its header says, as cache/README.md has it."""
    (described,) = json.loads(done(space, "cache", "info", "parts", "--json").stdout)
    header = header_of(space / described["path"])
    written = {
        name: [own["dtype"], own["shape"], own["sha256"]]
        for name, own in header["parts"].items()
        if name != "provenance"
    }
    once = {"recipe": header["recipe"], "rows": header["rows"], "images": header["images"], "parts": written}
    whole = json.dumps(once, sort_keys=True, separators=(",", ":")).encode()
    assert header["identity_sha256"] == sha256(whole), "the identity is not the one of cache/README.md"
    with (space / described["path"]).open("rb") as file:

        def part(name: str) -> bytes:
            file.seek(header["parts"][name]["offset"])
            return file.read(header["parts"][name]["bytes"])

        texts = json.loads(part("texts"))
        texts["data"]["root"] = ANY
        written["texts"] = sha256(json.dumps(texts, separators=(",", ":")).encode())
        for name in [name for name in written if name.endswith("/semantic")]:  # PNGs, as this zlib packs them
            places = np.frombuffer(part(f"{name}_offset"), "<u8").tolist()
            data = part(name)
            masks = [np.array(Image.open(BytesIO(data[i:j]))) for i, j in pairwise(places) if i < j]
            written[name] = [len(masks), sha256(b"".join(mask.tobytes() for mask in masks))]
            written[f"{name}_offset"][2] = written[name.replace("semantic", "checksum")][2] = ANY
    tables = {name: [own["dtype"], own["shape"], own["row_bytes"]] for name, own in header["tables"].items()}
    kept = {"fields": list(header), "recipe_key": header["recipe_key"], "parts": written, "tables": tables}
    described["bytes"] = ANY  # texts on versions are in it
    described["data"]["root"] = ANY
    same = ("command", "read_as", "backbone", "device", "tf32")
    made = {name: own if name in same else hidden(own) for name, own in described["provenance"].items()}
    (log,) = space.glob("cache/*/*.runs.jsonl")
    runs = [hidden(json.loads(line)) for line in log.read_text().splitlines()]
    return {"described": {**described, "provenance": made}, "header": kept, "log": [log.name, runs]}


def sha256(data: bytes) -> str:
    """As 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def header_of(path: Path) -> dict[str, Any]:
    """The JSON in the header of a cache file."""
    with path.open("rb") as stream:
        _, _, size, _ = struct.unpack("<8sII32s", stream.read(48))
        found: dict[str, Any] = json.loads(stream.read(size))
    return found


def text_of(value: Any) -> str:
    """A golden file's text: a line for each value, but for lists and tables that hold little."""
    return _lines(value, "") + "\n"


def _lines(value: Any, indent: str) -> str:
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(short) <= WIDTH:
        return short
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _lines(own, inner) for own in value) + f"\n{indent}]"
    parts = [f"{inner}{json.dumps(name, ensure_ascii=False)}: {_lines(own, inner)}" for name, own in value.items()]
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def make_trained(name: str, folder: Path) -> str:
    """The golden text of a configuration, made in a new folder."""
    base, commands = CONFIGURATIONS[name]
    space = make_space(folder / name, base)
    return text_of(trained(space, commands))


def make_ladders(folder: Path) -> str:
    """Rungs of the ladder of a configuration, as this state of featprobe calls it, all with one score."""
    base, commands = CONFIGURATIONS["semseg-upsample-ladder"]
    space = make_space(folder / "ladders", base)
    (space / "probes" / "ladders.jsonl").unlink(missing_ok=True)
    done(space, *commands[0], "--quiet")
    first = json.loads((space / "probes" / "ladders.jsonl").read_text().splitlines()[0])
    alike = {"score": 0.5, "seed_scores": [0.5] * len(first["seed_scores"])}
    rungs = [{**first, "iterations": rung, **alike} for rung in RUNGS]
    return "".join(json.dumps(rung, separators=(",", ":")) + "\n" for rung in rungs)


def make_stored(folder: Path) -> None:
    """A workspace with the results of all `STUDIES`, but without the tensors of their heads."""
    space = folder / "stored"
    space.mkdir(parents=True)
    (space / "featprobe.toml").write_text(CONFIG)
    shutil.copytree(HERE / "set", space / "set")
    for name, text in STUDIES.items():
        (space / f"{name}.toml").write_text(text)
        done(space, "study", f"{name}.toml")
    shutil.rmtree(space / "set")
    shutil.rmtree(space / "probes" / "report")
    for left in (*space.rglob(".*.lock"), *space.rglob(".*.look"), *space.rglob("*.safetensors")):
        left.unlink()
    shutil.rmtree(HERE / "stored", ignore_errors=True)
    shutil.copytree(space, HERE / "stored")


def restored(space: Path) -> Path:
    """A copy of the stored workspace, with its set; files of the right size stand for the tensors of its heads."""
    shutil.copytree(HERE / "stored", space)
    shutil.copytree(HERE / "set", space / "set")
    stand_in(space)
    return space


def stand_in(space: Path) -> None:
    """Put files of the right size where the tensors of the heads of a workspace are missing."""
    for path in space.glob("probes/**/card.json"):
        for name, said in json.loads(path.read_text())["files"].items():
            if name.endswith(".safetensors"):
                (path.parent / name).write_bytes(b"stand-in")
                os.truncate(path.parent / name, said["bytes"])


def compared(space: Path) -> dict[str, Any]:
    """What `compare` finds in a workspace: figures and commands, no sentences."""
    found: dict[str, Any] = json.loads(done(space, "compare", "--json", "--quiet").stdout)
    tables = {path.name: path.read_text().partition("\n")[0] for path in sorted(space.glob("probes/report/*.csv"))}
    figures = {name: own for name, own in found.items() if name not in ("answer", "notes")}
    return {**figures, "columns": tables, "trained again by": again_commands(space)}


def archived(name: str, space: Path) -> Path:
    """A copy of an archive (../archives)."""
    return shutil.copytree(ARCHIVES / name, space)


def golden_files() -> dict[str, Callable[[Path], str]]:
    """Name of each golden file -> what makes its text in a new folder."""
    made: dict[str, Callable[[Path], str]] = {"ladders.jsonl": make_ladders}
    for name in SPACES:
        made[f"cache-{name}.json"] = lambda folder, name=name: text_of(extracted(make_space(folder / name, name)))
    for name in CONFIGURATIONS:
        made[f"{name}.json"] = lambda folder, name=name: make_trained(name, folder)
    for name in OLD:
        made[f"compare-{name}.json"] = lambda folder, name=name: text_of(compared(archived(name, folder)))
    return {**made, "compare.json": lambda folder: text_of(compared(restored(folder / "restored")))}


if __name__ == "__main__":
    asked = [name.removesuffix(".json") for name in sys.argv[1:]]
    shutil.rmtree(WORKPLACE, ignore_errors=True)
    WORKPLACE.mkdir()
    try:
        if not (HERE / "set").is_dir():
            make_set(HERE / "set")
        if "stored" in asked or not (HERE / "stored").is_dir():
            make_stored(WORKPLACE)
        for name, make in golden_files().items():
            if name.removesuffix(".json") in asked or not (HERE / name).is_file():
                (HERE / name).write_text(make(WORKPLACE / Path(name).stem), encoding="utf-8")
    finally:
        shutil.rmtree(WORKPLACE)
