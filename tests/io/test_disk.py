"""Files that are appended to and parsed: on the disk when a call returns, and no memory for what is too large."""

import errno
from pathlib import Path

import pytest

from featprobe.errors import FileKindError
from featprobe.io import disk
from featprobe.io.disk import append_line, filter_lines, parse_json
from featprobe.stages.comparison import gap_names


def test_the_name_of_a_file_of_lines_is_on_the_disk_with_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made the file may have been killed before its folder was synced."""
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync_folder", synced.append)
    (tmp_path / "rows.jsonl").write_bytes(b"1\n")
    append_line(tmp_path / "rows.jsonl", b"2")
    assert synced == [tmp_path]


@pytest.mark.parametrize(
    "text", ["[" + "[]," * 2_000_000 + "[]]", b"[" + b"0," * 3_000_000 + b"0]"], ids=["str", "bytes"]
)
def test_json_whose_values_fit_no_memory_is_not_parsed(text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "available_memory", lambda: 10 * len(text))
    with pytest.raises(ValueError, match="more memory than there is"):
        parse_json(text)
    monkeypatch.setattr(disk, "available_memory", lambda: 1)
    assert parse_json('["a, {b"]') == ["a, {b"]


def test_rows_that_fit_no_memory_are_neither_removed_nor_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"data": "a"}\n' * 3)
    assert gap_names.named_in(path) == (set(), {"a"})
    monkeypatch.setattr(disk, "available_memory", lambda: 50)
    with pytest.raises(FileKindError, match="more than fit the memory"):
        filter_lines(path, lambda line: False)
    assert path.read_bytes() == b'{"data": "a"}\n' * 3
    monkeypatch.setattr(gap_names, "available_memory", lambda: 100)
    with pytest.raises(FileKindError):
        gap_names.named_in(path)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "Make room or choose another disk"),
        (errno.EROFS, "Choose another disk"),
        (errno.EACCES, "Correct the path or its rights"),
    ],
)
def test_the_advice_is_one_that_helps(code: int, advice: str) -> None:
    assert disk.to_do(OSError(code, "")) == advice
