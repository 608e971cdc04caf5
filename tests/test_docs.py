"""The pages: short enough, linked, complete, and right where a machine can tell."""

import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import nn

import featprobe
from featprobe import kinds
from featprobe.cli.main import cli
from featprobe.features import Features
from featprobe.io.plugins import BACKBONES, DATASETS, HEADS
from featprobe.io.schemas import check
from featprobe.kinds import TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.probes import start_at_prior
from featprobe.stages.study.study import Study
from featprobe.stages.study.study_file import faults_of, schema
from featprobe.stages.workspace import Config, make_generated

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
START = DOCS / "index.md"
FOLDERS = (".", "docs", "cache", "probes", "examples", "benchmarks", "tests/archives", "tests/golden")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
README_LINES = 160
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (?: *)(\S.*)$", re.MULTILINE)
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose_of(page: Path) -> str:
    """A page without its blocks of code, whose brackets are no links and whose # is no heading."""
    return re.sub(r"^    .*$", "", FENCED.sub("", text_of(page)), flags=re.MULTILINE)


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
    """File and heading of every link of a page that leads into the repository."""
    for link in LINK.findall(prose_of(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, heading = link.partition("#")
            yield (page.parent / path).resolve() if path else page, heading


def anchors_of(page: Path) -> set[str]:
    """Headings of a page as links name them."""
    titles = re.findall(r"^#+ +(.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def blocks(language: str) -> list[Any]:
    """Fenced blocks of one language, each with its page's name."""
    found = [(page, code) for page in PAGES for kind, code in FENCED.findall(text_of(page)) if kind == language]
    return [pytest.param(code, id=f"{named(page)}-{number}") for number, (page, code) in enumerate(found)]


Words = tuple[str, ...]


def all_commands(group: click.Group = cli, above: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    for name, command in group.commands.items():
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from all_commands(command, (*above, name))


COMMANDS = dict(all_commands())


# ---- pages and links -------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = [
        (named(page), str(file), heading)
        for file, heading in links_of(page)
        if not file.is_file() or (heading and heading not in anchors_of(file))
    ]
    assert not dead


def test_every_page_is_reached_from_the_start_page_and_the_readme() -> None:
    for start in (START, ROOT / "README.md"):
        reached, new = {start}, {start}
        while new:
            new = {file for page in new for file, _ in links_of(page) if file.suffix == ".md"} - reached
            reached |= new
        assert not {named(page) for page in PAGES} - {named(page) for page in reached}


def test_the_sites_table_of_contents_holds_every_page_once() -> None:
    tables = re.findall(r"```\{toctree\}\n(.*?)```", text_of(START), re.DOTALL)
    listed = re.findall(r"^[^:\s].*$", "\n".join(tables), re.MULTILINE)
    files = [(DOCS / f"{name}.md").resolve() for name in listed]
    assert sorted(files) == sorted(set(PAGES) - {START})


def test_every_picture_is_small_and_used() -> None:
    used = {file for page in PAGES for file, _ in links_of(page)}
    pictures = [*(DOCS / "images").iterdir()]
    assert pictures and not set(pictures) - used
    assert all(picture.stat().st_size < 150_000 for picture in pictures)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install '.[docs]'")
    build = [sys.executable, "-m", "sphinx", "-b", "html", "--quiet", "--fail-on-warning", "--keep-going"]
    done = subprocess.run(
        [*build, "-c", DOCS, ROOT, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs" / "commands.html").read_text(encoding="utf-8")
    for words in COMMANDS:
        assert f'<section id="featprobe-{"-".join(words)}">' in page


# ---- commands --------------------------------------------------------------------------------------------------------


def test_the_command_reference_holds_every_command_with_every_option() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    page = text_of(DOCS / "commands.md")
    assert conf["MARK"] in page
    text = [page]
    conf["with_commands"](None, "docs/commands", text)
    sections = dict(re.findall(r"^## featprobe ?([\w ]*)\n+```text\n(.*?)^```$", text[0], re.MULTILINE | re.DOTALL))
    assert set(sections) == {"", *map(" ".join, COMMANDS)}
    for words, command in COMMANDS.items():
        options = [name for param in command.params if isinstance(param, click.Option) for name in param.opts]
        assert all(re.search(rf"(^|[ ,/]){name}\b", sections[" ".join(words)]) for name in options), words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_stands_on_a_page_that_somebody_wrote(words: tuple[str, ...]) -> None:
    line = re.compile(rf"featprobe {' '.join(words)}\b")
    assert any(line.search(text_of(page)) for page in [ROOT / "README.md", *DOCS.glob("*.md")])


def command_lines() -> list[Any]:
    """Every line of a block that runs featprobe, from its first argument on, without its comment."""
    found = []
    for page in PAGES:
        for line in INDENTED.findall(FENCED.sub("", text_of(page))):
            start = re.match(r"(?:featprobe|\S.* -m featprobe) (.*)", line)
            if start and page.name != "CHANGELOG.md":
                found.append(pytest.param(start[1], id=f"{named(page)}: {line}"))
    return found


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_on_a_page_is_one_that_the_program_takes(line: str) -> None:
    words = shlex.split(re.sub(r"\s+#.*| > \S+$", "", line))
    command: click.Command = cli
    while isinstance(command, click.Group):
        while words and words[0].startswith("-"):
            del words[: 1 if words[0] in ("--help", "--version") else 2]
        if not words or words[0] not in command.commands:
            break
        command = command.commands[words.pop(0)]
    context = click.Context(command)
    values, _, _ = command.make_parser(context).parse_args([word for word in words if word != "…"])
    for param in command.params:
        if isinstance(param.type, click.Choice) and isinstance(given := values.get(str(param.name)), str):
            assert given in param.type.choices
        if "…" not in words and not {"--help", "--template", "--schema"} & set(words):
            assert not param.required or str(param.name) in values, param.name


# ---- studies, workspaces, code ---------------------------------------------------------------------------------------


def test_the_page_about_studies_has_every_key_with_its_default() -> None:
    page = text_of(DOCS / "studies.md")
    whole = schema(Study)

    def part(of: Any, name: str) -> Any:
        return whole["$defs"][of[name]["$ref"].rpartition("/")[2]]["properties"]

    section = {
        "## Keys": {name: own for name, own in whole["properties"].items() if "$ref" not in own},
        "### `[train.all]` and `[train.HEAD]`": part(part(whole["properties"], "train"), "linear"),
        "### `[tuning]`": part(whole["properties"], "tuning"),
    }
    assert {name for name, own in whole["properties"].items() if "$ref" in own} == {"train", "tuning"}
    for title, keys in section.items():
        lines = re.split(r"^#", page.partition(f"{title}\n")[2], flags=re.MULTILINE)[0].splitlines()
        head, _, *rows = [
            [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
        ]
        cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        assert list(cells) == list(keys)
        if "default" in head:
            usual = {name: own["default"] for name, own in keys.items() if own.get("default") not in (None, [])}
            assert {name: cells[name]["default"] for name in usual} == {n: json.dumps(own) for n, own in usual.items()}


@pytest.mark.parametrize("code", blocks("toml"))
def test_every_toml_block_is_a_study_a_workspace_or_an_entry_point(code: str) -> None:
    values = tomllib.loads(code)
    if "project" in values:
        assert set(values["project"]["entry-points"]) <= {DATASETS, BACKBONES, HEADS}
    elif "backbones" in values and isinstance(values["backbones"], list):
        assert not faults_of(Study, values)
    else:
        assert not check(Config, values)


def test_the_block_about_python_calls_functions_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function only binds its arguments: training for real is what the tests of commands do."""
    monkeypatch.chdir(tmp_path)
    called = []

    def stand_in(name: str) -> Any:
        signature = inspect.signature(getattr(featprobe, name))

        def bind(*args: object, **kwargs: object) -> SimpleNamespace:
            signature.bind(*args, **kwargs)
            called.append(name)
            return SimpleNamespace(path="cache.h5", rows=[{"folder": "head"}], page=None)

        return bind

    for name in ("extract", "probe", "finetune", "open_cache", "predict", "run_study"):
        monkeypatch.setattr(featprobe, name, stand_in(name))
    code = FENCED.findall(text_of(DOCS / "from-python.md"))[0][1]
    exec(compile(code, "from-python.md", "exec"), {})
    assert called == ["extract", "open_cache", "probe", "finetune", "probe", "predict", "run_study"]


class Blur(nn.Module):
    """A network of one level, stride8."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(batch, 3, rows, columns)."""
        return [nn.functional.avg_pool2d(images, 8)]


def test_the_block_about_arrays_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 1 << 16, (24, 32, 32), dtype=np.uint16)
    space: dict[str, Any] = {
        "images": images,
        "masks": (images > 40_000).astype(np.uint8),
        "parts": [i // 2 for i in range(24)],
        "network": Blur(),
        "workspace": featprobe.Workspace(tmp_path),
        "options": featprobe.ProbeOptions(head="ridge", seeds=1, quiet=True),
    }
    exec(compile(python_of("from-python")[1], "from-python.md", "exec"), space)
    assert space["vectors"].shape == (len(space["items"]), 3) == (14, 3) and space["mask"].shape[1:] == (32, 32)
    assert len(featprobe.results(space["workspace"])) == 1 and (tmp_path / "sets" / "castings" / "images").is_dir()


def test_the_page_about_python_names_every_public_name() -> None:
    page = text_of(DOCS / "from-python.md")
    assert all(f"`{name}`" in page for name in set(featprobe.__all__) - {"__version__"})


# ---- pages for those who add something: the reader's page is run by datasets/formats/test_entry_points.py ------------


def python_of(name: str) -> list[str]:
    return [code for kind, code in FENCED.findall(text_of(DOCS / f"{name}.md")) if kind == "python"]


def test_the_documented_head_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page registers it and runs `check_head`."""
    for own in ("_kinds", "_builders"):  # what the page registers is forgotten
        monkeypatch.setattr(kinds, own, {**getattr(kinds, own)})
    space: dict[str, Any] = {}
    for code in python_of("add-a-head"):
        exec(compile(code, "add-a-head.md", "exec"), space)
    assert kinds.kind_of("semseg", "twolayer").width == 64
    levels = (FeatureLevel("stride4", 5, 4), FeatureLevel("stride8", 7, 8))
    torch.manual_seed(0)
    head = space["TwoLayerHead"](levels, 3)
    maps = {level.name: torch.randn(2, level.channels, *level.cells((32, 48))).half() for level in levels}
    content = torch.tensor([[32, 48], [23, 31]])
    found = head(Features(maps, (32, 48), content))
    assert found.shape == (2, head.classes, 32 // head.stride, 48 // head.stride) and found.dtype == torch.float32
    assert set(head.levels) <= set(levels) and head.bias.shape == (3,)
    start_at_prior(head, torch.tensor([98.0, 1.0, 1.0]))
    changed = {name: values.clone() for name, values in maps.items()}
    changed["stride4"][1, :, 6:], changed["stride4"][1, :, :, 8:] = 9, 9
    torch.testing.assert_close(head(Features(changed, (32, 48), content)), head(Features(maps, (32, 48), content)))


def test_the_documented_backbone_goes_from_images_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer images and steps than the page has."""
    monkeypatch.chdir(tmp_path)
    make_generated("xray", Path("data/xray"), images=12, size=(64, 64))
    space: dict[str, Any] = {}
    first, second = python_of("add-a-backbone")
    exec(compile(first, "add-a-backbone.md", "exec"), space)
    quick = "ProbeOptions(seeds=1, recipe=TrainRecipe(iterations=2, batch_size=4), quiet=True)"
    code = second.replace("ProbeOptions(seeds=1)", quick)
    assert code != second
    exec(compile(code, "add-a-backbone.md", "exec"), {**space, "TrainRecipe": TrainRecipe})
    assert len(list(Path("found/masks").iterdir())) == 12


def test_the_documented_metric_is_its_own_score_with_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    groups = [f"part{i // 2}" for i in range(24)]
    space: dict[str, Any] = {"groups": groups}
    space["confusions"], space["others"] = rng.integers(0, 50, (2, 24, 3, 3))
    for code in python_of("add-a-metric"):
        exec(compile(code, "add-a-metric.md", "exec"), space)
    whole = space["confusions"].sum(0)
    hit, both = np.diag(whole)[1:], (whole.sum(0) + whole.sum(1))[1:]
    assert space["DICE"].value(whole, "ignore") == pytest.approx((2 * hit / both).mean())
    assert space["DefectRecall"]().value(whole, "ignore") == pytest.approx(space["interval"].estimate)
    assert space["interval"].estimate == pytest.approx(whole[1:, 1:].sum() / whole[1:].sum())
    assert space["interval"].low < space["interval"].estimate < space["interval"].high
    assert 0 <= space["difference"].p_value <= 1 and " to " in capsys.readouterr().out


def test_every_file_of_the_project_that_a_page_names_is_there() -> None:
    parts = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    path = re.compile(rf"`((?:{parts})/[\w/.-]+\.(?:py|md|toml))`")
    known = {(page, name) for page in pages for name in path.findall(text_of(page))}
    assert len(known) > 20
    assert not [(named(page), name) for page, name in known if not (ROOT / name).is_file()]
