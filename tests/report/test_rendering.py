"""Templates escape whatever they print, and say so where they are given too little."""

import re
from pathlib import Path

import pandas as pd
import pytest
from jinja2 import UndefinedError

from featprobe.report.check_page import write_check_page
from featprobe.report.rendering import TEMPLATES, Grid, Picture, render

HOSTILE = '<script>alert(\'&"1")</script>\x1b]0;owned\x07\u202e'
CHECK = {"title": HOSTILE, "facts": [HOSTILE], "findings": [(HOSTILE, [HOSTILE], 3), (HOSTILE, [], 0)],
         "tables": [(HOSTILE, Grid.of(pd.DataFrame({HOSTILE: [HOSTILE], "marks": [HOSTILE]})))],
         "sheets": [Picture(HOSTILE, fault=HOSTILE), Picture.of(HOSTILE, b"\x89PNG")], "notes": [HOSTILE]}  # fmt: skip


def test_whatever_a_page_prints_is_escaped() -> None:
    text = render("check.html", **CHECK)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert text.count("&lt;script&gt;alert(&#39;&amp;&#34;1&#34;)&lt;/script&gt;\\u001b]0;owned\\u0007\\u202e") == 16
    assert "Content-Security-Policy" in text and "default-src 'none'" in text


def test_a_value_that_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="notes"):
        render("check.html", **{name: value for name, value in CHECK.items() if name != "notes"})


def test_templates_mark_nothing_as_safe_but_plots() -> None:
    marked = re.compile(r"\|\s*safe|autoescape|Markup")
    lines = [line for path in TEMPLATES.iterdir() for line in path.read_text().splitlines() if marked.search(line)]
    assert len(lines) == 1 and "svg|safe" in lines[0]


def test_a_long_list_of_entries_is_cut_and_the_rest_counted(tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    write_check_page(page, "Set", [], [(True, "twice", [f"image{i}" for i in range(203)])], [], [], [])
    text = page.read_text()
    assert "image199" in text and "image200" not in text and "and 3 more: --json lists all" in text
    assert "Would spoil a study: twice" in text


def test_options_in_a_sentence_stay_whole_and_phrases_in_a_table_break() -> None:
    table = Grid.of(pd.DataFrame({"a": ["1"], "b": ["x y"]}), phrases={"b"})
    assert table.columns == (("a", ""), ("b", "phrases"))
    text = render(
        "check.html",
        **{
            **CHECK,
            "notes": ["it needs --seeds 3, at <script>--x: featprobe finetune --task a.", "a head--on 95 % of 3 px"],
        },
    )
    assert "needs <code>--seeds 3</code>, at &lt;script&gt;--x: <code>featprobe finetune --task a</code>." in text
    assert "a head--on 95\u00a0% of 3\u00a0px" in text
