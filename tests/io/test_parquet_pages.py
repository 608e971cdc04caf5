"""Tables that are sealed as they should be, and built to take memory, time or the process, end in words at once."""

import json
import struct
import subprocess
import sys

import hostile_tables
import pytest
from hostile_tables import ALLOWED, BINARY, BYTE, HOSTILE, I32, LARGEST, LIST, STRUCT, TOO_LARGE, encoded, i32, i64
from test_record_file import record_bytes, records

from featprobe.io.parquet_pages import LISTS, PAGE, Reader, claims_of
from featprobe.stages.recording.record_file import COLUMNS

SECONDS = 2


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, int, float]]:
    """Of each table its bytes, how reading it ended, and the memory and the seconds that this took."""
    command = [sys.executable, hostile_tables.__file__, str(tmp_path_factory.mktemp("tables"))]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: tuple(found) for name, *found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [*LARGEST, *TOO_LARGE, *HOSTILE])
def test_no_table_takes_more_memory_than_its_bytes_allow(
    taken: dict[str, tuple[int, str, int, float]], name: str
) -> None:
    size, ended, memory, seconds = taken[name]
    assert ended == "read" if name in LARGEST else ended.startswith("refused: ")
    assert memory <= 2 * size + ALLOWED
    assert seconds <= SECONDS or name in LARGEST


def test_what_a_table_claims_is_what_it_holds() -> None:
    own = records(3)
    claims = claims_of(record_bytes(own), COLUMNS)
    assert claims.rows == len(own.images) + len(own.defects) + len(own.calls)
    assert claims.listed >= claims.rows  # a row without a list counts too
    assert 3 * len(own.images) <= sum(words for words, _ in claims.texts) <= 6 * len(own.images)
    assert claims.page < claims.packed < len(record_bytes(own))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 3, b"PAR1" + b"\x15" * 40 + struct.pack("<I", 40) + b"PAR1"])
def test_what_is_no_table_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="footer"):
        claims_of(data, COLUMNS)


@pytest.mark.parametrize(
    "fields",
    [
        {1: i32(2), 1.5: i32(2)},  # a second time
        {5: (STRUCT, {1: i32(7)}), 5.5: (STRUCT, {2: i32(0)})},  # which a reader joins
        {2 + (1 << 16): i32(9)},  # 2, of 16 bits
        {2: i64(9)},  # which a reader passes over
        {9: (LIST, (BYTE, [0x95, 1]))},  # of bytes, or of one number
        {0: i32(1)},
        {-3: i32(1)},
    ],
)
def test_what_a_reader_would_take_for_something_else_is_refused(fields: dict[float, object]) -> None:
    data = encoded(STRUCT, fields)
    with pytest.raises(ValueError, match=r"twice or of another type|other lists"):
        Reader(data, 0, len(data), PAGE, LISTS).struct()


def test_a_list_is_of_the_type_that_its_reader_takes_it_for() -> None:
    for inner, known in ((STRUCT, True), (BINARY, False), (I32, False), (BYTE, False)):
        values = {STRUCT: {1: i32(0)}, BINARY: b"", I32: 0, BYTE: 0}
        data = encoded(STRUCT, {4: (LIST, (inner, [values[inner]]))})
        if known:
            assert Reader(data, 0, len(data), {}, LISTS).struct() == {4: [{1: 0}]}
            continue
        with pytest.raises(ValueError, match="other lists"):
            Reader(data, 0, len(data), {}, LISTS).struct()
