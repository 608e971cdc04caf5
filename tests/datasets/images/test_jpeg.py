"""JPEGs are read as Pillow reads them, whichever of the two ways their header leads to."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images import decode
from featprobe.datasets.images.reading import header_of, read_levels
from featprobe.errors import DataError

SQUARES = np.kron(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
SCAN = b"\xff\xda"


def jpeg(levels: NDArray[np.uint8] = SQUARES, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "JPEG", **options)
    return stream.getvalue()


FILES = {
    "colour": jpeg(),
    "grey": jpeg(SQUARES[:, :, 0]),
    "progressive": jpeg(progressive=True, subsampling=0),
    "restarts and a comment": jpeg(restart_marker_rows=1, comment=b"of a casting", optimize=True),
    "red, green and blue": jpeg(keep_rgb=True),
    "a profile": jpeg(icc_profile=bytes(300)),
    "a header of 20 kB": jpeg(comment=bytes(20_000)),
}


def by_pillow(data: bytes) -> NDArray[Any] | None:
    """What Pillow reads, or None where it raises an error."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image) if image.mode in ("L", "RGB") else None
    except (OSError, SyntaxError, ValueError):
        return None


def agrees(path: Path, data: bytes) -> bool:
    """Whether an image is read as by Pillow, and its header says what is read; or neither reads it."""
    path.write_bytes(data)
    wanted = by_pillow(data)
    try:
        found, header = read_levels(path), header_of(path)
    except DataError:
        return wanted is None
    shape = header.size if header.channels == 1 else (*header.size, header.channels)
    return wanted is not None and np.array_equal(found, wanted) and found.shape == shape and header.bits == 8


@pytest.mark.parametrize("name", FILES)
def test_a_jpeg_is_read_as_by_pillow(tmp_path: Path, name: str) -> None:
    assert agrees(tmp_path / "a.jpg", FILES[name])
    assert agrees(tmp_path / "a.jpg", FILES[name][:-2]), "without its end marker"


def outcome(path: Path) -> object:
    """The header and the pixels of an image, or None where it is refused."""
    try:
        return header_of(path), read_levels(path).tobytes()
    except DataError:
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(FILES)), place=st.floats(0, 1), values=st.binary(min_size=1, max_size=3), data=st.data()
)
def test_a_damaged_header_ends_as_where_pillow_reads_it(
    tmp_path: Path, name: str, place: float, values: bytes, data: st.DataObject
) -> None:
    whole = bytearray(FILES[name])
    at = 2 + int(place * (whole.index(SCAN) + 10))
    kind = data.draw(st.sampled_from(("changed", "inserted", "cut")))
    whole[at : at + (len(values) if kind == "changed" else 0)] = values
    (tmp_path / "a.jpg").write_bytes(whole[: at if kind == "cut" else None])
    found = outcome(tmp_path / "a.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_plain_jpeg", lambda start: None)
        assert outcome(tmp_path / "a.jpg") == found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ways that files were opened."""
    made: list[str] = []
    for name in ("_open_pillow", "_open_plain_jpeg"):
        kept = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *given, kept=kept, name=name: made.append(name) or kept(*given))
    yield made


def test_the_common_jpeg_needs_no_second_reading_of_its_header(tmp_path: Path, calls: list[str]) -> None:
    for name in FILES:
        (tmp_path / "a.jpg").write_bytes(FILES[name])
        read_levels(tmp_path / "a.jpg")
    assert calls.count("_open_plain_jpeg") == 4, "not: Adobe's colours, a profile, and a header that goes on"
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=exif))
    assert read_levels(tmp_path / "a.jpg").shape == (48, 40, 3) and calls[-1] == "_open_pillow"


@pytest.mark.skipif(not hasattr(os, "truncate"), reason="there is no os.truncate")
def test_a_file_too_large_to_read_at_once_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.fromarray(SQUARES).save(path)
    os.truncate(path, decode.AT_ONCE * 1024)  # a hole: 64 GiB, more than there is memory
    assert np.array_equal(read_levels(path), SQUARES)
