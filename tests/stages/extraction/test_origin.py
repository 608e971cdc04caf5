"""What a cache says of its own making may be anything."""

from types import SimpleNamespace
from typing import Any

import pytest

from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.origin import batch_size_of


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("featprobe extract --batch-size 4 --data x", 4),
        ("featprobe extract --data x", ExtractOptions.batch_size),
        ("featprobe extract --batch-size", ExtractOptions.batch_size),
        ("featprobe extract --batch-size 0", ExtractOptions.batch_size),
        ("featprobe extract --batch-size \u00b2", ExtractOptions.batch_size),  # a digit, of no number
        (f"featprobe extract --batch-size {'9' * 5000}", ExtractOptions.batch_size),
        ("featprobe extract --batch-size 4 'unclosed", ExtractOptions.batch_size),
    ],
)
def test_the_batch_size_of_a_command_is_one_that_can_be(command: str, size: int) -> None:
    cache: Any = SimpleNamespace(contents=SimpleNamespace(command=command))
    assert batch_size_of(cache) == size
