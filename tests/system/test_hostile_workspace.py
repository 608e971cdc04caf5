"""A colleague's workspace, full of files that are hostile: nothing of it is executed, nothing outside is touched."""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import run
from hostile_space import CONFIGS, FILES, FOLLOW_LINKS, LONGEST, SECRET

OWN_CHILD = "featprobe/cache/hdf5_child.py"  # the one process that is started: it reads old caches
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")


@dataclass(frozen=True)
class Ran:
    """What was left by the commands. ended: how each did; seen: audited events; folder: of it all."""

    folder: Path
    ended: list[Mapping[str, Any]]
    seen: list[list[str]]

    def of(self, *words: str) -> list[Mapping[str, Any]]:
        """The commands that hold these words, in whatever order; of paths their ends will do."""
        return [
            one
            for one in self.ended
            if all(any(word == own or own.endswith(f"/{word}") for own in one["words"]) for word in words)
        ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Every command over the hostile workspace, in a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "bin").mkdir()
    (folder / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {folder / 'outside' / 'ghostscript'}\n")
    (folder / "bin" / "gs").chmod(0o755)
    here = Path(__file__).parents[1]
    paths = ":".join([str(here.parent), *sys.path])
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": paths}
    done = run([here / "hostile_space.py", folder], timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not UNSEEN.search(done.stderr.replace("\x1b[A", "").replace("\r", ""))
    report = json.loads((folder / "report.json").read_text())
    return Ran(folder, report["ended"], report["seen"])


def test_every_command_ends_in_its_own_words(ran: Ran) -> None:
    bad = [one for one in ran.ended if one["raised"] or one["code"] not in (0, 1, 3) or one["seconds"] > LONGEST]
    assert not bad, [(one["words"], one["code"], one["raised"], one["seconds"]) for one in bad]
    assert not [one["words"] for one in ran.ended if "Traceback" in one["err"]]
    assert len(ran.ended) > 150 and {one["code"] for one in ran.ended} == {0, 1, 3}


def test_nothing_is_executed_and_nothing_looked_up(ran: Ran) -> None:
    assert not [event for event, what in ran.seen if event not in FILES and OWN_CHILD not in what]
    assert not (ran.folder / "outside" / "ghostscript").exists()
    assert not (ran.folder / "outside" / "unpickled").exists()


def test_nothing_outside_is_read_or_changed(ran: Ran) -> None:
    outside = ran.folder / "outside"
    asked = [one for one in ran.ended if FOLLOW_LINKS in one["words"]]
    assert asked, "links were followed once, as the user asked"
    opened = [what for event, what in ran.seen if event == "open"]  # names may be listed, through a linked folder
    assert all("image_out/images/p0.png" in what for what in opened) and len(opened) <= 2 * len(asked), opened
    assert sorted(path.name for path in outside.iterdir()) == ["head", "secret.png", "secret.txt"]
    assert (outside / "secret.txt").read_bytes() == SECRET
    picture = (outside / "secret.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200
    for path in sorted((ran.folder / "space").rglob("*")):
        if path.is_file() and not path.is_symlink():
            assert SECRET not in path.read_bytes(), path
    assert not [one["words"] for one in ran.ended if SECRET.decode() in one["out"] + one["err"]]


def test_nothing_of_a_file_reaches_a_terminal_a_page_or_a_spreadsheet(ran: Ran) -> None:
    for one in ran.ended:
        assert not UNSEEN.search(one["out"] + one["err"]), one["words"]
    pages = sorted((ran.folder / "space").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert not UNSEEN.search(page.read_text(encoding="utf-8")), page
    tables = sorted((ran.folder / "space" / "out").rglob("*.csv"))
    assert tables
    for table in tables:
        for line in table.read_text(encoding="utf-8-sig").splitlines():
            assert not re.search(r'(^|,)"?[=+@\t\r]', line), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("info", "fifo_image"), "not a regular file"),
        (("info", "fifo_table"), "not a regular file"),
        (("info", "fifo_classes"), "not a regular file"),
        (("info", "socket"), "not a regular file"),
        (("info", "sets/zeros"), "is a link out of the data folder"),
        (("extract", "image_out"), f"follow such links:  {FOLLOW_LINKS}"),
        (("info", "sets/mask_out"), "is a link out of the data folder"),
        (("info", "table_out"), "is a link out of the data folder"),
        (("info", "classes_out"), "is a link out of the data folder"),
        (("info", "folder_out"), "were not followed"),
        (("info", "eps_image"), "is not an image that can be read"),
        (("info", "eps_mask"), "can't be read as a mask"),
        (("info", "sets/bomb"), "is too large"),
        (("info", "sets/bomb_mask"), "is too large"),
        (("info", "hollow_mask"), "can't hold what its header claims"),
        (("info", "sets/tiff_mask"), "can't hold what its header claims"),
        (("info", "npy_mask"), "can't be read as an array"),
        (("info", "deep_coco"), "nested too deeply"),
        (("info", "deep_voc"), "nested more than 50 deep"),
        (("info", "deep_yolo"), "nested more than 50 deep"),
        (("probe", "eps"), "The mask is not an image"),
        (("probe", "bomb"), "The mask is too large"),
        (("probe", "hollow"), "featprobe never writes labels like"),
        (("cache", "info", "fifo.h5"), "not a regular file"),
        (("predict", "hub"), "There is no model 'hf-hub:evil/x' in timm"),
        (("predict", "probes/local"), "in timm. Nothing was looked up"),
        (("predict", "probes/weights_up"), "not below its folder"),
        (("predict", "card_deep"), "nested too deeply"),
        (("predict", "card_fifo"), "not a regular file"),
        (("predict", "head_fifo"), "not a regular file"),
        (("predict", "card_link"), "not below its folder"),
        (("inspect", "card_link"), "not below its folder"),
        (("inspect", "records_out"), "not below its folder"),
        (("inspect", "records_fifo"), "not a regular file"),
        (("inspect", "records_page"), "a page claims 2147483647 bytes"),
        (("inspect", "records_rows"), "bytes in memory"),
        (("predict", "point_out"), "not below its folder"),
        (("predict", "point_deep"), "nested too deeply"),
        (("predict", "point_fifo"), "not a regular file"),
        (("study", "fifo.toml"), "not a regular file"),
        (("study", "deep.toml"), "nested too deeply"),
        (("extract", "fifo.pth"), "not a regular file"),
        (("extract", "weights.pth"), "can't be read as weights"),
    ],
)
def test_what_is_wrong_is_said(ran: Ran, words: tuple[str, ...], said: str) -> None:
    found = ran.of(*words)
    assert found
    assert all(one["code"] in (1, 3) and said in one["err"] + one["out"] for one in found), found[0]["err"]


def test_a_bad_featprobe_toml_stops_what_reads_it(ran: Ran) -> None:
    for name in CONFIGS:
        found = [one for one in ran.ended if one.get("config") == name]
        assert found and all(one["code"] == 1 and "featprobe.toml" in one["err"] for one in found), name


def test_bad_rows_lose_only_themselves(ran: Ran) -> None:
    whole, again = ran.of("compare")
    assert whole["code"] == again["code"] == 0
    unusable = json.loads(again["out"])["unusable"]
    reasons = {str(one["folder"]): one["reason"] for one in unusable}
    expected = {
        **dict.fromkeys(("../../outside/head", str(ran.folder / "outside" / "head"), "link"), "not below its folder"),
        **dict.fromkeys(("arrays_out", "head_out"), "not below its folder"),
        **dict.fromkeys(("bomb", "arrays_fifo"), "scores.npz"),
        **dict.fromkeys(("claims", "pickled"), "which it does not hold"),
        **dict.fromkeys(("curves_deep", "card_deep"), "nested too deeply"),
        "curves_fifo": "curves.json",
        "card_fifo": "card.json",
    }
    for folder, said in expected.items():
        assert said in reasons[folder], (folder, reasons.get(folder))
    assert "too long or deep" in whole["out"] + whole["err"]
    page = (ran.folder / "space" / "out" / "report" / "index.html").read_text()
    assert "not shown" in page
