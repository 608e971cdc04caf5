"""An extraction with nothing to do goes by sizes and times of files: what it saves, and that no change goes unseen."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers import write_set
from PIL import Image

from featprobe.cache import CacheWriter
from featprobe.errors import DataError
from featprobe.stages.extraction import extract as extract_module
from featprobe.stages.extraction import make_cache as stage
from featprobe.stages.extraction import settled as settled_module
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.run_log import ExtractReport, speed_text
from featprobe.stages.extraction.settled import listing_of, look_path
from featprobe.stages.upkeep.caches import remove_caches
from featprobe.stages.workspace import Workspace

COUNT = 5
load_once = cache(stage.load_backbone)
OPTIONS = ExtractOptions(size=(32, 32), device="cpu", workers=1, quiet=True)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now count as old; each backbone is loaded once."""
    monkeypatch.setattr(settled_module, "RACY_SECONDS", 0.0)
    monkeypatch.setattr(stage, "load_backbone", load_once)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", COUNT, (32, 32))


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Callable[..., ExtractReport]:
    def call(root: Path = data, space: Workspace | None = None, **changed: object) -> ExtractReport:
        time.sleep(0.01)  # a tick of the file system's clock
        space = space or Workspace(tmp_path / "workspace")
        options = replace(OPTIONS, **changed)  # type: ignore[arg-type]
        return extract(space, space.backbone("embedded"), str(root), options)

    return call


def test_a_set_that_lies_as_it_lay_is_not_read_again(run, monkeypatch):
    first = run()
    monkeypatch.setattr(stage, "read_set", lambda *_: pytest.fail("the set was read"))
    again = run()
    assert (first.by_times, again.by_times) == (False, True)
    assert (again.rows, again.images, again.computed, again.missing) == (COUNT, COUNT, 0, 0)
    assert (again.path, again.notes, again.unreadable) == (first.path, first.notes, ())
    assert "nothing to do: files have the sizes and times of last time (--rehash reads them)" in speed_text(again)
    assert run(workers=2, batch_size=3, shard=(1, 2)).by_times  # what changes no file


def test_rehash_reads_every_file(run):
    run()
    again = run(rehash=True)
    assert (again.by_times, again.computed) == (False, 0)


def change_image(data: Path) -> int:
    Image.new("RGB", (32, 32), (9, 9, 9)).save(data / "images" / "part01.png")
    return 1


def change_label(data: Path) -> int:
    Image.new("L", (32, 32), 1).save(data / "masks" / "part01.png")
    return 0


def same_size_and_modification_time(data: Path) -> int:
    """Only the time of change, which nobody can set, tells."""
    path = data / "masks" / "part01.png"
    status, content = path.stat(), path.read_bytes()
    change_label(data)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0")[: len(content)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.read_bytes() != content
    return 0


def touch(data: Path) -> int:
    os.utime(data / "masks" / "part01.png")
    return 0


def add(data: Path) -> int:
    for folder in ("images", "masks"):
        shutil.copy(data / folder / "part01.png", data / folder / "part99.png")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(data / "images" / "part99.png")
    return 1


def swap(data: Path) -> int:
    """Two labels of one size change names; each file is as it was."""
    one, two = (data / "masks" / f"part0{i}.png" for i in (1, 2))
    one.rename(data / "x")
    two.rename(one)
    (data / "x").rename(two)
    return 0


def take_away(data: Path) -> int:
    for folder in ("images", "masks"):
        (data / folder / "part01.png").unlink()
    return 0


def add_table(data: Path) -> int:
    splits = zip(range(COUNT), ("test", "test", "val", "train", "train"), strict=True)
    (data / "samples.csv").write_text("image,split\n" + "".join(f"part0{i}.png,{split}\n" for i, split in splits))
    return 0


def link_elsewhere(data: Path) -> int:
    """A folder that becomes a link is followed, and what is changed behind it is seen."""
    (data / "masks").rename(data / "drawn")
    (data / "masks").symlink_to("drawn")
    return 0


CHANGES = [change_image, change_label, same_size_and_modification_time, touch, add, swap, take_away, add_table]


@pytest.mark.parametrize("change", [*CHANGES, link_elsewhere], ids=lambda change: change.__name__)
def test_whatever_changes_is_seen_and_then_known(run, data, change):
    run()
    assert run().by_times
    computed = change(data)
    report = run()
    assert (report.by_times, report.computed, report.missing) == (False, computed, 0)
    assert run().by_times


def test_labels_that_changed_are_in_the_cache_afterwards(run, data):
    first = run()
    change_label(data)
    assert run().path == first.path
    assert (stage.Cache(first.path, stage.read_contents(first.path)).semantic(1) == 1).all()


@pytest.mark.parametrize("other", [{"size": (64, 64)}, {"dtype": "fp32"}, {"levels": ("stride8",)}, {"tile": 16}])
def test_another_question_is_not_answered_by_it(run, other):
    first = run()
    report = run(**other)
    assert not report.by_times and report.path != first.path
    assert run().by_times and run(**other).by_times


def test_a_set_whose_links_may_lead_elsewhere_is_another_question(run, data, tmp_path):
    """Without leave it is refused, whatever was answered with it."""
    outside = tmp_path / "outside.png"
    (data / "images" / "part01.png").rename(outside)
    (data / "images" / "part01.png").symlink_to(outside)
    with_leave = Workspace(tmp_path / "workspace", follow_links=True)
    assert not run(space=with_leave).by_times and run(space=with_leave).by_times
    with pytest.raises(DataError, match="follow-links"):
        run()


def test_auto_by_times_takes_the_cache_and_says_the_notes_that_a_full_look_does(run, data, monkeypatch):
    """On a device that chooses amp before fp32: what is there alone, then what is chosen first, then what is whole."""

    def resolve(asked: str, device: object) -> str:
        return "amp" if asked == "auto" else asked

    (data / "masks" / "alone.png").write_bytes((data / "masks" / "part01.png").read_bytes())  # a note on the set
    exact = run().path
    for place in ("extract", "cache_precision", "job"):
        monkeypatch.setattr(f"featprobe.stages.extraction.{place}.resolve", resolve)
    alone = run()
    fast = run(precision="amp").path
    both = run()
    assert (alone.path, alone.by_times, both.path, both.by_times) == (exact, True, fast, False)
    for _ in range(2):
        again, full = run(), run(rehash=True)
        assert (again.by_times, full.by_times, again.path, again.notes) == (True, False, full.path, full.notes)
        assert any("masks have no image" in note for note in again.notes)
        with CacheWriter(fast) as writer:
            writer.mark_missing(2)
    assert again.path == exact and f"{fast} is not complete" in again.notes[-1]


def test_a_split_file_is_among_the_files(run, tmp_path):
    path = tmp_path / "split.csv"

    def pin(first: str) -> None:
        splits = [first, "train", "train", "val", "test"]
        path.write_text("id,group,split\n" + "".join(f"part0{i}.png,part0{i},{s}\n" for i, s in enumerate(splits)))

    pin("train")
    run(split_file=str(path))
    assert run(split_file=str(path)).by_times
    pin("test ")
    assert not run(split_file=str(path)).by_times


def test_another_backbone_of_the_name_is_not_answered_by_it(run, monkeypatch):
    run()
    monkeypatch.setattr(load_once(Workspace().backbone("embedded"), (), stage.pick_device("cpu")), "sha256", "0" * 64)
    assert not run().by_times


def test_a_row_that_was_set_back_is_computed(run):
    with CacheWriter(run().path) as writer:
        writer.mark_missing(2)
    assert run().computed == 1
    assert run().by_times


def test_nothing_is_kept_of_a_set_that_changed_while_it_was_read(run, data, monkeypatch):
    read = stage.read_set

    def and_change(*arguments: object) -> object:
        found = read(*arguments)
        change_label(data)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stage, "read_set", and_change)
        run()
    assert not run().by_times


def test_nothing_is_kept_of_files_that_changed_just_now_or_in_the_future(run, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(settled_module, "RACY_SECONDS", 60.0)
        run()
        assert not run().by_times
    assert not run().by_times and run().by_times
    later = time.time() + 3600
    os.utime(data / "images" / "part01.png", (later, later))
    assert not run().by_times and not run().by_times


def test_a_set_that_was_made_just_before_is_known_if_it_is_read_later(run, monkeypatch):
    own = extract_module.ask

    def just_now(*arguments: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(settled_module, "RACY_SECONDS", 60.0)
            return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "ask", just_now)
        run()
    assert run().by_times


def test_nothing_is_kept_where_an_image_cannot_be_read(run, data):
    (data / "images" / "part01.png").write_bytes(b"no image")
    assert [len(run(skip_bad=True).unreadable) for _ in range(2)] == [1, 1]
    assert not run(skip_bad=True).by_times


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 3}', "[" * 100_000, "\xff"])
def test_what_cannot_be_understood_is_ignored_and_made_anew(run, text):
    look = look_path(run().path)
    look.write_text(text, encoding="latin-1")
    assert not run().by_times
    assert json.loads(look.read_text())["version"] == 2 and run().by_times


@pytest.mark.parametrize("note", ["harmless\nfeatprobe: error", "\x1b]0;owned\x07", "\u202eback", 7])
def test_notes_that_could_pass_for_other_lines_are_ignored(run, note):
    look = look_path(run().path)
    kept = json.loads(look.read_text())
    look.write_text(json.dumps(kept | {"notes": ["plain"]}))
    assert run().notes[0] == "plain"
    look.write_text(json.dumps(kept | {"notes": [note]}))
    again = run()
    assert note not in again.notes and not again.by_times


def test_a_cache_that_is_damaged_or_gone_is_made_anew(run):
    path = run().path
    content = path.read_bytes()
    path.write_bytes(content.replace(b"part01", b"part91"))
    assert not run().by_times
    assert run().by_times
    path.unlink()
    assert run().computed == COUNT


def test_removing_a_cache_leaves_nothing_of_it_but_its_lock_file(run):
    path = run().path
    remove_caches([path])
    assert [own.name for own in path.parent.iterdir()] == [f".{path.stem}.lock"]


def test_a_folder_that_holds_itself_is_listed_once_and_what_leads_nowhere_not_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    before = listing_of([tmp_path])
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert listing_of([tmp_path]) not in ("", before)
    (tmp_path / "a" / "broken").symlink_to("nothing")
    assert listing_of([tmp_path]) == ""
    assert listing_of([]) == ""


def test_a_link_that_is_turned_to_another_file_or_folder_of_the_set_is_seen(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    listings = set()
    for name, target in (("z", "a"), ("z", "b"), ("file", "a/file"), ("file", "b/file")):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        time.sleep(0.01)
        listings.add(listing_of([tmp_path]))
    assert len(listings) == 4 and "" not in listings


def test_a_set_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(DataError, match="There is no data set"):
        run(tmp_path / "nothing")
