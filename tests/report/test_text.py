"""Tables for a terminal: nothing is lost when they are made to fit, and class columns are in the set's own order."""

import re

import pandas as pd
from helpers import result_row
from hypothesis import given
from hypothesis import strategies as st

from featprobe.report.tables import result_table, result_text
from featprobe.report.text import table_text
from featprobe.result_rows import ResultRow

WORDS = st.text("abcdefg0123456789.", min_size=1, max_size=9)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    names = draw(st.lists(WORDS, min_size=1, max_size=7, unique=True))
    rows = draw(st.integers(1, 4))
    cells = [draw(st.one_of(st.lists(WORDS, min_size=rows, max_size=rows), st.just(["same"] * rows))) for _ in names]
    return pd.DataFrame(dict(zip(names, cells, strict=True)))


@given(table=tables(), width=st.integers(40, 70))
def test_a_table_that_is_made_to_fit_says_all_that_it_said(table: pd.DataFrame, width: int) -> None:
    text = table_text(table, width)
    assert max(map(len, text.splitlines())) <= width  # two of these columns fit, and those that name the rows may not
    said = set(re.split(r"\s+|[:,]", text))
    for name in table:
        assert name in said and set(table[name]) <= said
    whole = table_text(table)
    assert len(whole.splitlines()) == len(table) + 1
    if max(map(len, whole.splitlines())) <= width:
        assert text == whole


def test_what_is_the_same_in_all_rows_is_said_once_and_parts_name_their_rows() -> None:
    table = pd.DataFrame({
        "backbone": ["small", "small"], "regime": ["frozen", "full"], "seeds": ["3", "3"], "marks": ["", ""],
        "first": ["11111", "22222"], "second": ["33333", "44444"],
    })  # fmt: skip
    assert table_text(table, 26).splitlines() == [
        "seeds: 3", "",
        "backbone  regime  first", "   small  frozen  11111", "   small    full  22222", "",
        "backbone  regime  second", "   small  frozen   33333", "   small    full   44444",
    ]  # fmt: skip


def row_of(data: str, classes: list[str], folder: str = "") -> ResultRow:
    test = {"miou": 0.5, "miou_foreground": 0.5, "iou": dict.fromkeys(classes, 0.5)}
    folder = f"{folder or f'{data}-0'}/some-1/semseg-linear-2/seed0"
    return result_row(data=data, classes=tuple(classes), test=test, folder=folder, split="own", fraction=1.0)


def test_sets_of_one_name_are_told_apart() -> None:
    rows = [row_of("set", ["ground", "pore"], folder) for folder in ("", "", "set-9")]
    blocks = result_text(rows).split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["set-0", "set-9"]
    assert result_table(rows)["n"].tolist() == [2, 1]


def test_each_sets_classes_are_in_its_own_order() -> None:
    orders = {"first": ["ground", "pore", "dent"], "second": ["ground", "dent", "crack", "pore"]}
    text = result_text([row_of(data, classes) for data, classes in orders.items()])
    for block, classes in zip(text.split("\n\n"), orders.values(), strict=True):
        assert re.findall(r"IoU (?!fg)(\w+)", block.splitlines()[1].partition("head params")[2]) == classes
