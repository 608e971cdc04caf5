"""Images and masks in any folders: found by their names, described by patterns, or refused with what is lacking."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from layouts import LAYOUTS, SIZE, Builder, Layout
from PIL import Image

from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.errors import DataError


def areas_of(data: DataSet) -> dict[str, list[int]]:
    """Foreground pixels of each image, or of each of its objects."""
    found = {}
    for sample in data.samples:
        target = data.read_target(sample, SIZE)
        if target.instances is not None:
            found[sample.id] = [int(instance.area or 0) for instance in target.instances]
        else:
            assert target.semantic is not None
            found[sample.id] = [int((target.semantic > 0).sum())]
    return found


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.pairs])
def test_a_public_set_is_read_with_the_right_pairs_as_it_lies_on_the_disk(tmp_path: Path, name: str) -> None:
    layout, builder = LAYOUTS[name], Builder(tmp_path)
    layout.build(builder)
    data = read_data("set", tmp_path, complete=False)
    assert {s.id for s in data.samples} == set(layout.pairs)
    for sample in data.samples:
        masks = layout.pairs[sample.id]
        if not masks and not layout.objects:
            with pytest.raises(DataError, match="There is no mask"):
                data.read_target(sample, SIZE)
            continue
        target = data.read_target(sample, SIZE)
        if layout.objects:
            assert sorted(int(i.area or 0) for i in target.instances or ()) == sorted(builder.areas[m] for m in masks)
        else:
            assert target.semantic is not None and int((target.semantic > 0).sum()) == builder.areas[masks[0]]
        assert sample.split == next((s for start, s in layout.splits.items() if sample.id.startswith(start)), "")
    assert all(any(part in note for note in data.notes) for part in layout.noted), data.notes


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.said])
def test_a_public_set_that_can_not_be_read_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    LAYOUTS[name].build(Builder(tmp_path))
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path)
    assert all(part in str(error.value) for part in LAYOUTS[name].said), str(error.value)
