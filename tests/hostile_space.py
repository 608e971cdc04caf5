"""A workspace full of files that a colleague's enemy may have made, and every command run over it under watch.

    python hostile_space.py FOLDER

makes FOLDER/space with them, and FOLDER/outside, which no command has any business with; runs the commands in this
process; and writes FOLDER/report.json: how each ended, and what Python's audit hooks saw being opened, started, looked
up or unpickled meanwhile.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from helpers import data_info, make_cache, random_maps, recipe_of, rows_of
from hostile_tables import HOSTILE, written
from layouts import Builder
from PIL import Image
from test_readers import MADE

from featprobe.cache import CacheWriter
from featprobe.cli.main import cli
from featprobe.datasets.files import FOLLOW_LINKS
from featprobe.specs import digest

SECRET = b"SECRET-8f2d"
NETWORK = ("--backbone", "test_efficientnet", "--random-init")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n0 0 moveto\nshowpage\n"
ESCAPE = "\x1b]0;owned\x07\x9b8m\u202e"
LONGEST = 40  # seconds that a command may take before the test counts it as hung
What = bytes | Path | Callable[[Path], object]
"""Of a file: its bytes, what it is a link to, or what makes it."""
FILES = ("open", "os.listdir", "os.scandir")
WATCHED = (
    *FILES, "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn",
    "socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "pickle.find_class",
)  # fmt: skip


class Runs:
    """What an unpickled file does: it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """An 8-bit grey PNG that claims to be of a size."""

    def chunk(name: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npy(shape: tuple[int, ...]) -> bytes:
    """A numpy file that claims to be of a shape and holds nothing."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def tiff(width: int, height: int) -> bytes:
    """A grey TIFF whose only strip, of four bytes, claims to be all of it."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1),
            (278, 4, height), (279, 4, 4)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)).ljust(204, b"\0")


# ---- what is hostile -------------------------------------------------------------------------------------------------


def plain_set(root: Path) -> None:
    """A folder of six images and their masks."""
    to = Builder(root)
    for i in range(6):
        to.image(f"images/p{i}.png")
        to.mask(f"masks/p{i}.png", i % 2)
    (root / "classes.txt").write_text("background\ndefect\n")
    splits = ("train", "train", "val", "val", "test", "test")
    (root / "samples.csv").write_text("image,split\n" + "".join(f"p{i}.png,{s}\n" for i, s in enumerate(splits)))


def hostile_sets(sets: Path, outside: Path) -> None:
    """Data sets, each with one thing that is wrong."""
    bad: dict[str, tuple[str, What]] = {
        "fifo_image": ("images/p0.png", os.mkfifo), "fifo_mask": ("masks/p0.png", os.mkfifo),
        "fifo_table": ("samples.csv", os.mkfifo), "fifo_classes": ("classes.txt", os.mkfifo),
        "socket": ("images/p0.png", a_socket), "zeros": ("images/p0.png", Path("/dev/zero")),
        "image_out": ("images/p0.png", outside / "secret.png"), "mask_out": ("masks/p0.png", outside / "secret.png"),
        "folder_out": ("masks", outside), "table_out": ("samples.csv", outside / "secret.txt"),
        "classes_out": ("classes.txt", outside / "secret.txt"),
        "eps_image": ("images/p0.png", EPS), "eps_mask": ("masks/p0.png", EPS),
        "bomb": ("images/p0.png", png(60000, 60000)), "bomb_mask": ("masks/p0.png", png(60000, 60000)),
        "hollow": ("images/p0.png", png(13000, 13000)), "hollow_mask": ("masks/p0.png", png(13000, 13000)),
        "npy": ("images/p0.png", npy((200000, 200000))), "npy_mask": ("masks/p0.png", npy((13000, 13000))),
        "tiff": ("images/p0.png", tiff(13000, 13000)), "tiff_mask": ("masks/p0.png", tiff(13000, 13000)),
        "colours": ("classes.txt", f"background\n{ESCAPE}\n".encode()),
    }  # fmt: skip
    for name, (file, what) in bad.items():
        plain_set(sets / name)
        put(sets / name / file, what)
    plain_set(sets / "names")
    for i, name in enumerate((f"=cmd|{ESCAPE}.png", "@sum.png", "-2+3.png")):
        for kind in ("images", "masks"):
            shutil.copy(sets / "names" / kind / "p1.png", sets / "names" / kind / name)
        with (sets / "names" / "samples.csv").open("a") as table:
            table.write(f"{name},{('train', 'val', 'test')[i]}\n")
    deep = {
        "coco": ("all.json", b'{"images": ' + b"[" * 200_000), "voc": ("Annotations/p0.xml", b"<a>" * 200_000),
        "yolo": ("data.yaml", b"train: images/train\nnames: " + b"[" * 50_000),
        "labelme": ("p0.json", b'{"shapes": ' + b"[" * 200_000), "severstal": ("train.csv", EPS),
    }  # fmt: skip
    for name, (file, data) in deep.items():
        put(MADE[name](sets / f"deep_{name}") / file, data)
    aliases = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]" for i in range(30))
    put(MADE["yolo"](sets / "aliases") / "data.yaml", f"train: images/train\n{aliases}\nnames: *a29\n".encode())


def put(path: Path, what: What) -> None:
    """Put bytes, a link, or what a function makes in a path's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif isinstance(what, Path):
        path.symlink_to(what)
    else:
        what(path)


def a_socket(path: Path) -> None:
    """A socket that nobody listens to."""
    here = Path.cwd()
    os.chdir(path.parent)  # its path may be no longer than 108 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def hostile_caches(cache: Path) -> None:
    """Caches that are sealed as they should be, and hold what none should."""
    targets = {
        "eps": {"semantic": EPS}, "bomb": {"semantic": png(60000, 60000)}, "hollow": {"semantic": png(13000, 13000)},
        "deep": {"semantic": b"", "instances": b"[" * 50_000},
        "huge": {"semantic": b"", "instances": json.dumps(a_huge_object()).encode()},
    }  # fmt: skip
    for name, what in targets.items():
        rows = [replace(row, **what) for row in rows_of(6)]
        make_cache(path := cache / f"{name}-000000" / "some.h5", rows=rows, data=replace(data_info(), name=name))
        with CacheWriter(path) as writer:
            writer.write(0, random_maps(recipe_of(), len(rows)))
    evil = replace(data_info(), name="../../../outside/evil", classes=("background", ESCAPE), notes=(ESCAPE,))
    rows = [replace(row, id=ESCAPE + row.id) for row in rows_of(6)]
    make_cache(cache / "evil-000000" / "some.h5", rows=rows, data=evil)


def odd_caches(cache: Path) -> None:
    """Files that are no caches."""
    odd = cache / "odd-000000"
    odd.mkdir()
    put(odd / "fifo.h5", os.mkfifo)
    put(odd / "zeros.h5", Path("/dev/zero"))
    put(odd / "empty.h5", b"")
    put(odd / "old.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 4096)
    put(odd / ".fifo.look", os.mkfifo)
    put(odd / "old.runs.jsonl", os.mkfifo)


def a_huge_object() -> dict[str, Any]:
    """Objects whose only mask claims to be of 10^12 pixels."""
    rle = {"size": [1_000_000, 1_000_000], "counts": "0`kTk4"}
    one = {"category": 1, "box_xyxy": [0, 0, 5, 5], "rle": rle, "crowd": False, "area": None}
    return {"image_id": None, "objects": [one]}


def other_head(space: Path, name: str, file: str = "", what: What = b"", **changed: Any) -> None:
    """A copy of the honest head and of its row, in which a file is another, sealed as if it belonged there.

    changed: fields of its card.
    """
    results = space / "probes" / "results.jsonl"
    row = json.loads(results.read_text().splitlines()[0])
    folder = space / "probes" / name
    shutil.copytree(space / "probes" / row["folder"], folder)
    said = json.loads((folder / "card.json").read_text()) | changed
    said["result"] |= {"folder": name, "seed": len(results.read_bytes()), "version": row["version"]}
    if isinstance(what, bytes) and file in said["files"]:
        said["files"][file] = {"bytes": len(what), "sha256": hashlib.sha256(what).hexdigest()}
        said["head_sha256"] = said["files"]["head.safetensors"]["sha256"]
    del said["card_sha256"]
    (folder / "card.json").write_text(json.dumps(said | {"card_sha256": digest(said)}))
    with results.open("a") as stream:
        stream.write(json.dumps(said["result"]) + "\n")
    if file:
        put(folder / file, what)


def hostile_rows(space: Path, outside: Path) -> None:
    """Rows of heads that are elsewhere, or are none; what jobs left; weights and files of settings."""
    results = space / "probes" / "results.jsonl"
    row = json.loads(results.read_text().splitlines()[0])
    shutil.copytree(space / "probes" / row["folder"], outside / "head")
    other_head(space, "card_fifo", "card.json", os.mkfifo)
    other_head(space, "card_deep", "card.json", b"[" * 200_000)
    (space / "probes" / "link").symlink_to(outside / "head")
    with results.open("ab") as stream:
        for folder in ("../../outside/head", str(outside / "head"), "link", ESCAPE):
            stream.write(json.dumps({**row, "folder": folder, "seed": 90 + len(folder)}).encode() + b"\n")
        stream.write(b"[" * 200_000 + b"\n")
    (space / "jobs").mkdir()
    for name in ("1_0_result.pkl", "1_0_answer.json"):
        (space / "jobs" / name).write_bytes(pickle.dumps(Runs(outside / "unpickled")))
    put(space / "weights.pth", pickle.dumps(Runs(outside / "unpickled")))
    put(space / "fifo.pth", os.mkfifo)
    put(space / "fifo.toml", os.mkfifo)
    put(space / "deep.toml", b"data = " + b"[" * 100_000)


def hostile_heads(space: Path, outside: Path) -> None:
    """Heads with arrays, curves, pictures and cards that are hostile, and outputs that are links."""
    row = json.loads((space / "probes" / "results.jsonl").read_bytes().splitlines()[0])
    honest = space / "probes" / row["folder"]
    backbone = json.loads((honest / "card.json").read_text())["backbone"]
    files: dict[str, tuple[str, What]] = {
        "picture_out": ("sheet.png", outside / "secret.png"), "picture_text": ("sheet.png", b"<script>"),
        "bomb": ("scores.npz", zip_bomb()), "claims": ("scores.npz", arrays(npy((1 << 20, 1 << 10, 1 << 10)))),
        "pickled": ("scores.npz", arrays(object_array(outside / "unpickled"))),
        "arrays_fifo": ("scores.npz", os.mkfifo), "arrays_out": ("scores.npz", outside / "head" / "scores.npz"),
        "curves_fifo": ("curves.json", os.mkfifo), "curves_deep": ("curves.json", b"[" * 200_000),
        "head_fifo": ("head.safetensors", os.mkfifo), "head_out": ("head.safetensors", outside / "secret.txt"),
        "records_fifo": ("defects.parquet", os.mkfifo), "records_out": ("defects.parquet", outside / "secret.txt"),
        "records_page": ("defects.parquet", written(HOSTILE["a page that claims two gigabytes"]())),
        "records_rows": ("defects.parquet", written(HOSTILE["rows that no byte stands for"]())),
        "point_out": ("operating.json", outside / "secret.txt"),
        "card_link": ("card.json", outside / "head" / "card.json"),
        "point_deep": ("operating.json", b"[" * 200_000), "point_fifo": ("operating.json", os.mkfifo),
        "head_claims": ("head.safetensors", struct.pack("<Q", 1 << 40) + b"{}"),
    }  # fmt: skip
    for name, (file, what) in files.items():
        other_head(space, name, file, what)
    cards = {
        "hub": {"source": "hub", "model": "hf-hub:evil/x"}, "local": {"model": f"local-dir:{outside}"},
        "weights": {"source": "file", "weights": str(outside / "secret.txt")},
        "weights_up": {"source": "file", "weights": "../../../outside/secret.txt"},
    }  # fmt: skip
    for name, own in cards.items():
        other_head(space, name, backbone={**backbone, **own})
    put(honest / "sheet.png", outside / "secret.png")
    (space / "probes" / "report").mkdir()
    for name in ("index.html", "results.csv", "differences.csv", "results.parquet"):
        put(space / "probes" / "report" / name, outside / "secret.txt")


def zip_bomb() -> bytes:
    """An npz of a few kilobytes whose confusions are 64 MB of zeros in one dimension."""
    return arrays(npy((1 << 26,)) + bytes(1 << 26))


def object_array(mark: Path) -> bytes:
    """A numpy file of objects, which is a pickle."""
    stream = io.BytesIO()
    np.save(stream, np.array([Runs(mark)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def arrays(confusion: bytes) -> bytes:
    """A scores.npz with this numpy file in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ids", "groups"):
            with archive.open(f"{name}.npy", "w") as held:
                np.save(held, np.array(["a"]))
        archive.writestr("confusion.npy", confusion)
    return stream.getvalue()


# ---- every command ---------------------------------------------------------------------------------------------------


def commands(space: Path) -> Iterator[tuple[str, ...]]:
    """Every command that reads a file, over everything."""
    out = space / "out"
    for root in sorted((space / "sets").iterdir()):
        yield "data", "info", str(root)
        yield "data", "check", str(root), "--html", str(out / f"{root.name}.html"), "--quiet"
    for name in ("names", "image_out", "eps_mask", "zeros", "deep_coco"):
        root = str(space / "sets" / name)
        yield "data", "show", root, "--out", str(out / f"{name}.png")
        yield "data", "split", root, "--out", str(out / f"{name}.csv"), "--quiet"
        yield "data", "convert", root, "--out", str(out / name), "--link", "--quiet"
        yield "plan", *NETWORK, "--data", root, "--quiet"
        yield "extract", *NETWORK, "--data", root, "--size", "32x32", "--quiet"
    yield "extract", *NETWORK, "--data", str(space / "sets" / "names"), "--split-file", str(space / "fifo.toml")
    for weights in ("weights.pth", "fifo.pth"):
        yield "extract", *NETWORK[:2], "--weights", str(space / weights), "--data", str(space / "sets" / "names")
    for name in ("eps", "bomb", "hollow", "deep", "huge", "../../../outside/evil"):
        yield "probe", "--data", name, "--iterations", "2", "--seeds", "1", "--quiet"
    yield "probe", "--iterations", "2", "--seeds", "1", "--quiet"
    yield "finetune", "--dry-run"
    hostile_heads(space, space.parent / "outside")
    odd_caches(space / "cache")
    yield ("cache", "ls")
    for path in sorted((space / "cache").glob("*/*.h5")):
        yield "cache", "info", str(path)
        yield "cache", "verify", str(path), "--quiet"
    yield "cache", "verify", "--quiet"
    yield "compare", "--quiet"
    yield "compare", "--quiet", "--out", str(out / "report"), "--json"
    image = str(space / "sets" / "names" / "images" / "p0.png")
    for folder in sorted({path.parent for path in (space / "probes").rglob("card.json")}):
        yield "predict", str(folder), image, "--out", str(out / "predicted"), "--quiet"
        yield "inspect", str(folder), "--out", str(out / "inspected"), "--quiet"
    for image in (space / "sets" / "fifo_image" / "images", space / "sets" / "fifo_image" / "images" / "p0.png"):
        yield "predict", str(space / "probes" / "picture_out"), str(image), "--out", str(out / "more"), "--quiet"
    for study in ("fifo.toml", "deep.toml"):
        yield "study", str(space / study), "--dry-run"
    yield "data", "info", str(space / "sets" / "image_out"), FOLLOW_LINKS
    for path in sorted((space / "cache").glob("odd*/*.h5")):
        yield "cache", "rm", str(path), "--yes"
    for name in ("names", "image_out", "eps_mask", "deep_coco"):
        root = str(space / "sets" / name)
        yield "try", root, "--backbone", f"{NETWORK[1]}-random", "--size", "32x32", "--quiet", "--no-open", "--yes"
        yield "init", root, "--quiet"
    yield ("config",)
    yield ("probes", "ls")
    for folder in sorted((space / "probes").glob("*/*/*/seed*")):
        yield "probes", "rm", str(folder), "--yes"


CONFIGS = {
    "a name that leads out": '[data."../../outside/evil"]\npath = "sets/names"\n',
    "a name of control characters": '[data."\\u001b[2J"]\npath = "sets/names"\n',
    "one that is nested deep": "data = " + "[" * 100_000,
    "a name of a hundred thousand parts": "a." * 100_000 + "a = 1",
    "a huge one": "#" * (1 << 23),
    "a pipe": "",
}
"""Hostile featprobe.toml: each stops every command that looks for a set."""


def hung(number: int, frame: object) -> None:
    """What an alarm does."""
    raise TimeoutError(f"no answer within {LONGEST} s")


def run(space: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """How a command ended."""
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(LONGEST)
    try:
        result = CliRunner().invoke(cli, ["--workspace", str(space), *words], prog_name="featprobe")
    finally:
        signal.alarm(0)
    raised = result.exception
    return {
        "words": words, "code": result.exit_code, "seconds": time.monotonic() - begun, "out": result.stdout,
        "err": result.stderr, "raised": None if raised is None or isinstance(raised, SystemExit) else repr(raised),
    }  # fmt: skip


@contextmanager
def watching(outside: Path) -> Iterator[list[tuple[str, str]]]:
    """What is opened, started, looked up and unpickled from here on."""
    seen: list[tuple[str, str]] = []
    on = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in WATCHED:
            real = os.path.realpath(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else ""
            if event not in FILES or os.fsdecode(real).startswith(str(outside)):
                seen.append((event, repr((real, *arguments))[:1000]))

    sys.addaudithook(hook)
    yield seen
    on = False


def main(folder: Path) -> None:
    space, outside = folder / "space", folder / "outside"
    outside.mkdir(parents=True)
    (outside / "secret.txt").write_bytes(SECRET)
    Image.fromarray(np.full((40, 40), 77, np.uint8)).save(outside / "secret.png")
    plain_set(space / "sets" / "honest")
    for words in (
        ("extract", *NETWORK, "--data", str(space / "sets" / "honest"), "--size", "32x32", "--quiet"),
        ("probe", "--iterations", "2", "--seeds", "1", "--show", "1", "--quiet"),
    ):
        ended = run(space, words)
        if ended["code"]:
            sys.exit(str(ended))
    hostile_sets(space / "sets", outside)
    hostile_caches(space / "cache")
    hostile_rows(space, outside)
    for path in outside.rglob("*"):
        os.utime(path, (0, path.stat().st_mtime))
    with watching(outside) as seen:
        ended = [run(space, words) for words in commands(space)]
        for name, text in CONFIGS.items():
            put(space / "featprobe.toml", text.encode() if text else os.mkfifo)
            ended += [{**run(space, ("data",)), "config": name}]
            ended += [{**run(space, ("extract", *NETWORK, "--data", "../../outside/evil")), "config": name}]
    report = {"ended": ended, "seen": seen}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
