"""Files of others, one kind at a time: what they claim, where they lead, what they say to a reader."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import PoolingBackbone, extract, recipe_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from test_readers import MADE

from featprobe.backbones.weights import read_weights
from featprobe.datasets import read_data
from featprobe.datasets.images import pages
from featprobe.datasets.split_file import read_split_file, write_split_file
from featprobe.errors import BackboneError, CacheError, DataError, DiskError, FeatprobeError, FileKindError
from featprobe.io.disk import below, open_regular, parse_json, plain_name, read_toml
from featprobe.io.texts import cell, printable, uncell
from featprobe.kinds import TrainRecipe
from featprobe.probes.saved import append_row, read_rows
from featprobe.report.tables import csv_text
from featprobe.stages.extraction.cache_precision import cache_path
from featprobe.stages.study import cluster
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.upkeep.describe import summarise
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import (
    Instance,
    decode_instances,
    decode_semantic,
    encode_instances,
    encode_rle,
    encode_semantic,
    run_lengths,
)

MASKS = st.integers(1, 9).flatmap(
    lambda height: st.lists(st.lists(st.booleans(), min_size=height, max_size=height), min_size=1, max_size=9)
)
TEXTS = st.text(st.sampled_from("=+-@'\t\r\na1.e \x1b\x9b\u202e,\"é"), max_size=8)


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_links_out_of_a_set_are_followed_only_when_that_is_asked_for(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a set, and then every folder at its top, is a link to a place outside of it."""
    store = MADE[name](tmp_path / "store" / "set").resolve()
    whole = summarise(read_data("set", store))
    of_files, of_folders = tmp_path / "files" / "set", tmp_path / "folders" / "set"
    shutil.copytree(store, of_files, copy_function=os.symlink)
    of_folders.mkdir(parents=True)
    for path in store.iterdir():
        (of_folders / path.name).symlink_to(path)
    opened: list[str] = []

    def noting(path: Any, flags: int = os.O_RDONLY) -> int:
        opened.append(os.path.realpath(path))
        return open_regular(path, flags)

    monkeypatch.setattr(pages, "open_regular", noting)
    monkeypatch.setattr("featprobe.io.pictures.open_regular", noting)
    for root in (of_files, of_folders):
        for named in (None, name.split()[0]):
            with pytest.raises(DataError, match=r"link out of the data folder|were not followed"):
                read_data("set", root, named)
        assert not opened, "nothing out there was opened to be told what it is"
    data = read_data("set", of_files, name.split()[0], follow_links=True)
    found = summarise(data)
    assert (found.images, found.pixels, found.instances) == (whole.images, whole.pixels, whole.instances)
    assert "follow_links = true" in found.toml and opened


def test_links_inside_of_a_set_and_to_a_set_are_followed(tmp_path: Path) -> None:
    root = MADE["folders"](tmp_path / "set")
    whole = summarise(read_data("set", root))
    (root / "store").mkdir()
    for path in sorted((root / "masks").iterdir()):
        path.rename(root / "store" / path.name)
        path.symlink_to(Path("..") / "store" / path.name)
    (tmp_path / "link").symlink_to(root)
    assert summarise(read_data("set", tmp_path / "link")).pixels == whole.pixels


def test_paths_stay_below_their_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    (tmp_path / "in" / "loop").symlink_to("loop")
    for path in ("../x", "a/../../x", "/etc", "out", "out/x", "loop", "a\0b"):
        with pytest.raises(FileKindError, match="not below"):
            below(tmp_path / "in", path, "a row")
    assert below(tmp_path / "in", "a/b", "a row") == tmp_path / "in" / "a" / "b"
    for name in ("", ".", "..", "a/b", "a\\b", "a\nb", "a\x9bb", "x" * 201):
        assert not plain_name(name)


def test_no_cache_is_called_by_a_name_that_leads_out(tmp_path: Path) -> None:
    for label in ("../../x", "/x", "a/b", "..", "\x1b"):
        with pytest.raises(CacheError, match="can't be called"):
            cache_path(tmp_path, replace(recipe_of(), label=label))
    assert cache_path(tmp_path, recipe_of()).parent == tmp_path


def test_no_pipe_is_waited_for_and_no_link_is_written_through(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    (tmp_path / "aim").write_bytes(b"")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileKindError, match="not a regular file"):
            open_regular(path)
    for path in (tmp_path / "fifo", tmp_path / "link"):
        with pytest.raises((FileKindError, DiskError)):
            append_row(path, {"what": "x"})
    assert not (tmp_path / "aim").read_bytes()


# ---- what is parsed --------------------------------------------------------------------------------------------------


def test_deep_and_huge_texts_are_refused(tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000, "[" * 100_000 + "]" * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    (tmp_path / "a.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_toml(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("#" * 100)
    with pytest.raises(FileKindError, match="more than the 10"):
        read_toml(tmp_path / "b.toml", 10)


@pytest.mark.parametrize("part", ["a.", '"=".', "','. ", '"#".', '"\\"".', "'\"'.", ' "" .'])
@pytest.mark.parametrize("before", ["", "[", "x = {", "x = ['''a'''', ", 'x = ["""a"""", {', 'x = """"\\""""\n'])
def test_names_of_many_parts_are_refused_however_they_are_quoted(tmp_path: Path, before: str, part: str) -> None:
    (tmp_path / "a.toml").write_text(before + part * 300 + "a = 1\n")
    with pytest.raises(ValueError, match="more than 200 parts"):
        read_toml(tmp_path / "a.toml")


def test_dots_in_texts_and_comments_are_no_parts_of_a_name(tmp_path: Path) -> None:
    dots = "." * 300
    lines = [
        f"# {dots}",
        f"a = '{dots}' # '{dots}",
        f'b = "\\"{dots}"',
        f'c = """"{dots}',
        '"""""',
        f"d = ''''{dots}''''",
    ]
    text = "\n".join(lines)
    (tmp_path / "a.toml").write_text(text)
    assert set(read_toml(tmp_path / "a.toml")) == set("abcd")


def test_bad_lines_of_rows_lose_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"what": "first"})
    with path.open("ab") as stream:
        stream.write(b"[" * 200_000 + b"\n" + b'"' + b"x" * (1 << 24) + b'"\n[1]\n')
    append_row(path, {"what": "last"})
    rows, faults = read_rows(path)
    assert [row["what"] for row in rows] == ["first", "last"] and len(faults) == 3


@given(MASKS)
def test_run_lengths_are_those_that_were_encoded(mask: list[list[bool]]) -> None:
    drawn = np.array(mask).T  # (height, width)
    others = [np.eye(3, dtype=bool), drawn, ~drawn, drawn]
    found = run_lengths([str(encode_rle(one)["counts"]) for one in others])
    assert found is not None
    for runs, one in zip(np.split(found[0], found[1][1:]), others, strict=True):
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), one.T.ravel())


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30), st.integers(1, 40))
def test_only_run_lengths_that_fit_reach_the_decoder(counts: str, side: int) -> None:
    value = [{"category": 1, "box_xyxy": [0, 0, 1, 1], "rle": {"size": [side, side], "counts": counts}}]
    try:
        (instance,), _ = decode_instances(json.dumps({"image_id": 1, "objects": value}).encode(), (side, side), 2)
    except DataError:
        return
    assert coco_mask.decode(instance.rle).shape == (side, side)


def test_labels_of_a_cache_are_what_featprobe_writes_or_an_error() -> None:
    labels = np.eye(8, dtype=np.uint8)
    assert np.array_equal(decode_semantic(encode_semantic(labels), (8, 8), 2), labels)
    others = {"grey of 16 bits": labels.astype(np.uint16), "a palette": None, "RGB": np.zeros((8, 8, 3), np.uint8)}
    streams = {name: io.BytesIO() for name in others}
    for name, values in others.items():
        image = Image.new("P", (8, 8)) if values is None else Image.fromarray(values)
        image.save(streams[name], "PNG")
    bad = [stream.getvalue() for stream in streams.values()]
    gif = io.BytesIO()
    Image.fromarray(labels).save(gif, "GIF")
    bad += [
        gif.getvalue(),
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encode_semantic(labels)[:40],
        encode_semantic(labels * 9),
    ]
    for data in bad:
        with pytest.raises(DataError):
            decode_semantic(data, (8, 8), 2)
    with pytest.raises(DataError, match="wanted  9x8"):
        decode_semantic(encode_semantic(labels), (9, 8), 2)
    box, mask = Instance(1, (0, 0, 5, 5)), Instance(1, (0.0, 0.0, 8.0, 8.0), encode_rle(labels > 0), True, 3.0)
    assert decode_instances(encode_instances([box, mask], "a"), (8, 8), 2) == ((box, mask), "a")
    good = json.loads(encode_instances([mask], "a"))
    for change in (
        {"category": 0}, {"category": 2}, {"category": True}, {"category": "1"}, {"box_xyxy": [0, 0, 9, 5]},
        {"box_xyxy": [0, 0, float("nan"), 5]}, {"box_xyxy": [5, 0, 0, 5]}, {"box_xyxy": [0, 0, 1]}, {"box_xyxy": 3},
        {"box_xyxy": ["0", 0, 1, 1]}, {"crowd": 1}, {"area": "x"}, {"area": float("inf")}, {"rle": []},
        {"rle": {"size": [8, 9], "counts": "1"}}, {"rle": {"size": [10**6, 10**6], "counts": "1"}},
        {"rle": {"size": [8, 8], "counts": [64]}}, {"rle": {"size": [8, 8], "counts": "T2"}}, {"more": 1},
        {"rle": {"size": [8, 8], "counts": "é"}}, {"rle": {"size": [8, 8], "counts": "oooooooooooooooo0"}},
    ):  # fmt: skip
        data = json.dumps({**good, "objects": [{**good["objects"][0], **change}]}).encode()
        with pytest.raises(DataError):
            decode_instances(data, (8, 8), 2)
    for data in (b"", b"[" * 100_000, b"[]", b"3", b'{"objects": 3}', b'{"objects": [3], "image_id": 1}',
                 b'{"objects": [], "image_id": [1]}', b'{"objects": []}', b"\xff"):  # fmt: skip
        with pytest.raises(DataError):
            decode_instances(data, (8, 8), 2)


def test_packed_weights_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    assert read_weights(tmp_path / "plain.pth")["a"].numel() == 1 << 20
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with pytest.raises(BackboneError, match="would unpack to"):
        read_weights(tmp_path / "packed.pth")


def test_a_sheet_shows_no_image_but_those_that_the_cache_was_made_from(tmp_path: Path) -> None:
    """A cache of others may name any file as its image."""
    workspace = Workspace(tmp_path)
    data = make_generated("surface", workspace.data / "surface", images=12, size=(64, 64))
    extract(tmp_path, data, PoolingBackbone())
    recipe = TrainRecipe(iterations=2, batch_size=4, evaluations=1)
    options = ProbeOptions(recipe=recipe, seeds=1, show=2, quiet=True)
    assert len(probe(workspace, options=options).sheets) == 1
    for path in (data / "images").iterdir():
        Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(path)
    shutil.rmtree(workspace.probes)
    again = probe(workspace, options=options)
    assert not again.sheets and any("is not the image" in note for note in again.notes)
    assert not list(workspace.probes.rglob("sheet.png"))


# ---- jobs ------------------------------------------------------------------------------------------------------------


class Mark:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_jobs_answer_in_json_and_nothing_of_theirs_is_unpickled(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "1_0_result.pkl").write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    assert "left no log" in cluster._reason(workspace, "1")
    answers = {
        "2": (b'{"ended": "error", "reason": "no room\\nmore", "cache": null}', "no room (see"),
        "3_4": (b'{"ended": "success", "cache": "/etc/passwd", "reason": ""}', "its result is gone"),
        "5": (b"[" * 50_000, "nested too deeply"),
        "6": (pickle.dumps(Mark(tmp_path / "ran")), "can't be read"),
        "7": (b'{"ended": "error", "reason": 3}', "gave no reason"),
    }
    for job, (answer, said) in answers.items():
        (tmp_path / "jobs" / f"{job}_0_answer.json").write_bytes(answer)
        try:
            assert said in cluster._reason(workspace, job)
        except FeatprobeError as error:
            assert said in str(error)
    with pytest.raises(FileKindError, match="not below"):
        cluster._made(workspace, "3_4")
    for job in ("../1", "1_0_0", "", "1\n", "x"):
        with pytest.raises(FeatprobeError, match="is not a job"):
            cluster._reason(workspace, job)
        append_row(tmp_path / "jobs" / "jobs.jsonl", {"what": f"of {job!r}", "job": job})
    append_row(tmp_path / "jobs" / "jobs.jsonl", {"what": ["x"], "job": "1"})
    append_row(tmp_path / "jobs" / "jobs.jsonl", {"what": "good", "job": "12_3"})
    assert cluster._handed_over(tmp_path / "jobs" / "jobs.jsonl") == {"good": "12_3"}
    assert not (tmp_path / "ran").exists()


# ---- texts on their way out ------------------------------------------------------------------------------------------


@given(TEXTS)
def test_a_cell_is_no_formula_and_comes_back(text: str) -> None:
    safe = str(cell(text))
    assert uncell(safe) == text
    assert not re.match(r"[=+\-@\t\r]", safe) or re.fullmatch(r"[+-]?[\d.e+-]+", safe)


@given(TEXTS)
def test_nothing_unseen_is_printed_and_the_rest_is_as_it_was(text: str) -> None:
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert json.loads(f'"{shown.replace(chr(34), "").replace(chr(10), "").replace(chr(9), "")}"') == re.sub(
        '["\n\t]', "", text
    )


def test_a_split_file_is_safe_in_a_spreadsheet_and_is_read_back(tmp_path: Path) -> None:
    ids = ["=1+1.png", "-a.png", "@x.png", "'=x.png", "+4.png", "plain.png", "-5"]
    groups = ["=g", "-2", "'t", "@", "+", "g", "h"]
    splits = ["train", "val", "test", "train", "val", "test", "train"]
    write_split_file(tmp_path / "split.csv", ids, groups, splits)
    with (tmp_path / "split.csv").open(newline="") as stream:
        cells = [text for row in csv.reader(stream) for text in row]
    assert [text for text in cells if text[:1] in "=+-@"] == ["-2", "-5"], "numbers stay numbers"
    found = read_split_file(tmp_path / "split.csv")
    assert found.placed(ids, [""] * len(ids)) == (groups, splits)


def test_tables_are_safe_in_a_spreadsheet_and_keep_their_numbers() -> None:
    table = pd.DataFrame({"=name": ["=cmd|' /C calc'!A0", "-x"], "gain": [-0.5, float("nan")], "count": [-1, 2]})
    text = csv_text(table)
    assert text.splitlines() == ["'=name,gain,count", "'=cmd|' /C calc'!A0,-0.5,-1", "'-x,,2"]
    plain: NDArray[Any] = table[["gain", "count"]].to_numpy()
    assert np.array_equal(pd.read_csv(io.StringIO(text))[["gain", "count"]].to_numpy(), plain, equal_nan=True)
