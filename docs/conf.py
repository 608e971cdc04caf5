"""How Sphinx builds the site: `make docs`. The sources are the Markdown files of the repository, where they lie.

So that links work on the site as they do in the repository, the source folder is the repository's root.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from featprobe import __version__  # noqa: E402
from featprobe.cli.main import cli  # noqa: E402

project = "featprobe"
release = __version__
extensions = ["myst_parser"]
root_doc = "docs/index"
FOLDERS = ("", "docs/", "cache/", "probes/", "examples/", "benchmarks/", "tests/archives/", "tests/golden/")
include_patterns = [f"{folder}*.md" for folder in FOLDERS]
exclude_patterns = [".*", "build"]
html_theme = "furo"
html_title = "featprobe"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_start.html"}  # the site's first page leads to the start page
templates_path = ["."]
myst_heading_anchors = 4
MARK = "<!-- commands -->"
"""Where the page about commands gets its help texts."""


def helps(command: click.Command, words: str, parent: click.Context | None = None) -> Iterator[str]:
    """A heading and the help of a command, then those of its subcommands."""
    settings = {**command.context_settings, "terminal_width": 88}
    context = click.Context(command, parent=parent, info_name=words.rpartition(" ")[2], **settings)
    yield f"## {words}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from helps(command.commands[name], f"{words} {name}", context)


def with_commands(app: Any, name: str, text: list[str]) -> None:
    """Put the help of all commands into the page that has a place for it."""
    text[0] = text[0].replace(MARK, "\n".join(helps(cli, "featprobe")))


def setup(app: Any) -> None:
    """Sphinx calls this before it reads the pages."""
    app.connect("source-read", with_commands)
