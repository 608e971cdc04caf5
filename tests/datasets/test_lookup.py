"""Files that rows name: found as `files.below` finds them, with one look into each folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featprobe.datasets import read_data
from featprobe.datasets.files import below, links_followed
from featprobe.datasets.formats import labelled
from featprobe.datasets.images.pages import page_of
from featprobe.datasets.lookup import Lookup
from featprobe.errors import DataError

TEXTS = (
    "a.png", "./a.png", ".//a.png", "b/../a.png", "b/c.png", "b\\c.png", "b//c.png", "b/./c.png", "gone.png",
    "gone/a.png", "b/gone/../c.png", "gone/../a.png", "a%20b.png", "a b.png", "A.png", "B/c.png", "a.png/0001",
    "0001", "b", "b/", "", ".", "..", "../a.png", "b/../../a.png", "/etc/hosts", "C:/a.png", "a\0.png", "x" * 300,
    "b/" * 40 + "c.png", "b/link.png", "b/out.png", "out/hosts", "loop.png", "Pru\u0308f.png", "Pr\xfcf.png",
    "to_b/c.png", "pipe.png", "a.png/c.png", "~/a.png",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("in") / "set"
    (made / "b").mkdir(parents=True)
    for name in ("a.png", "b/c.png", "a b.png", "Pr\xfcf.png"):
        (made / name).write_bytes(b"")
    (made / "b/link.png").symlink_to("c.png")
    (made / "b/out.png").symlink_to("/etc/hosts")
    (made / "out").symlink_to("/etc")
    (made / "loop.png").symlink_to("loop.png")
    (made / "to_b").symlink_to("b")
    os.mkfifo(made / "pipe.png")
    return made


def asked(root: Path, text: str, bases: tuple[Path, ...]) -> Path | None:
    """What is found with questions to the disk alone."""
    for base in bases:
        path = below(root, text, "row 1", base)
        if path.is_file() or page_of(path)[1] is not None:
            return path
    return None


def result(find: Any, *words: Any) -> Any:
    try:
        return find(*words)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_found_is_what_the_disk_says(root: Path, text: str, follow: bool) -> None:
    with links_followed(follow):
        for bases in ((root, root / "b"), (root / "b", root), (root / "none", root / "to_b")):
            look = Lookup(root)
            for _ in range(2):
                assert result(look.file, text, "row 1", bases) == result(asked, root, text, bases)
                assert result(look.path, text, "row 1", bases[0]) == result(below, root, text, "row 1", bases[0])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often a path is resolved, which asks the disk for each of its parts."""
    calls = [0]
    plain = os.path.realpath

    def counting(*words: Any, **named: Any) -> Any:
        calls[0] += 1
        return plain(*words, **named)

    monkeypatch.setattr(os.path, "realpath", counting)
    yield calls


def test_a_table_of_missing_images_asks_the_disk_a_few_times(tmp_path: Path, counted: list[int]) -> None:
    rows = [f"{start}{i}.png,bad" for i in range(300) for start in ("im", "gone/im", f"gone{i}/im", "./a", "b/../b")]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    with pytest.raises(DataError, match="names no image that is there"):
        read_data("set", tmp_path, "class-csv")
    assert counted[0] < 100


def test_a_million_faults_are_not_all_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suggestion for each would take longer than reading the table."""
    told: list[str] = []
    monkeypatch.setattr(labelled, "nearest", lambda name, known: told.append(name) or "")
    rows = [f"im{i}.png,bad,tr{i}" for i in range(500)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    with pytest.raises(DataError, match="and 490 more"):
        read_data("set", tmp_path, "class-csv")
    assert len(told) == 10
