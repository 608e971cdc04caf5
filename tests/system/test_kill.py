"""`kill -9` of a real extraction: what is left opens, tells the truth, and is completed bit-exactly.

The harness is the benchmark's, which kills more often: benchmarks/kill9.py.
"""

from collections import Counter
from pathlib import Path

import pytest
from kill9 import BLOCKS, IMAGES, MIDWAY_SHARE, Kill, draw_blocks, run_controls, run_kills

KILLS = 10


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> list[Kill]:
    return run_kills(tmp_path_factory.mktemp("kills"), KILLS)


def test_most_kills_meet_a_file_that_is_neither_empty_nor_complete(kills):
    assert sum(0 < kill.rows < IMAGES for kill in kills) >= MIDWAY_SHARE * KILLS


def test_a_killed_extraction_leaves_a_file_whose_whole_rows_are_whole(kills):
    assert [kill.faults for kill in kills] == [()] * KILLS


def test_the_same_command_again_completes_a_killed_extraction_bit_exactly(kills):
    assert [kill.faults_after for kill in kills] == [()] * KILLS


def test_a_writer_that_says_done_before_the_data_is_found_out(tmp_path: Path):
    found = run_controls(tmp_path, 2)
    assert all(any("says it is whole" in fault for fault in faults) for faults in found)


def test_moments_are_drawn_evenly_over_the_blocks():
    blocks = draw_blocks((BLOCKS - 1) * 5, seed=3)
    assert set(Counter(map(int, blocks)).values()) == {5}
    assert min(blocks) >= 1 and max(blocks) < BLOCKS
