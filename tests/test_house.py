"""The structure of the package: no circle of modules, short functions and classes, one home for what is known."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_layers import PACKAGE, nodes_of

MOST_LINES = {ast.ClassDef: 150, ast.FunctionDef: 60}
MOST_MODULES = 18  # in a folder, without __init__
FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


def module_of(path: Path, package: Path) -> str:
    """Dotted name of a file of the package."""
    dotted = ".".join(["featprobe", *path.relative_to(package).with_suffix("").parts])
    return dotted.removesuffix(".__init__")


@functools.cache
def imports_of(package: Path) -> dict[str, set[str]]:
    """Modules of the package that each one imports, in functions and behind TYPE_CHECKING too."""
    paths = {module_of(path, package): path for path in package.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        found[name] = set()
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & paths.keys()
                others = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in paths}
                found[name] |= inner | ({node.module} & paths.keys() if others else set())
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & paths.keys()
    return found


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    reached = {name: set(direct) for name, direct in imports.items()}
    for middle in reached:
        for own in reached.values():
            if middle in own:
                own |= reached[middle]
    found = [{other for other in own if name in reached[other]} for name, own in reached.items() if name in own]
    return [circle for i, circle in enumerate(found) if circle not in found[:i]]


def test_no_modules_import_each_other() -> None:
    assert circles(imports_of(PACKAGE)) == []


def test_the_check_for_circles_sees_one(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from featprobe.b import f")
    (tmp_path / "b.py").write_text("def f():\n    from featprobe import c")
    (tmp_path / "c.py").write_text("if TYPE_CHECKING:\n    import featprobe.a")
    (tmp_path / "d.py").write_text("from featprobe.a import g")
    assert circles(imports_of(tmp_path)) == [{"featprobe.a", "featprobe.b", "featprobe.c"}]


def lines_of(node: ast.AST) -> int:
    """Lines of code of a class or function: without blank lines, comments and docstrings."""
    code: set[int] = set()
    for inner in ast.walk(node):
        docstring = isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant)
        if isinstance(inner, ast.stmt) and not docstring:
            body = getattr(inner, "body", None)  # of a statement that holds others: its head alone
            last = body[0].lineno - 1 if body else inner.end_lineno or 0
            code |= set(range(inner.lineno, max(inner.lineno, last) + 1))
    return len(code)


@pytest.mark.parametrize("kind", MOST_LINES, ids=lambda kind: kind.__name__)
def test_classes_and_functions_are_short(kind: type[ast.AST]) -> None:
    long = {
        f"{file}:{node.name}": lines_of(node)
        for file in FILES
        for node in nodes_of(PACKAGE / file)
        if isinstance(node, kind) and lines_of(node) > MOST_LINES[kind]
    }
    assert not long


def test_no_folder_is_a_warehouse() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    count = {folder.name: len([path for path in folder.glob("*.py") if path.stem[0] != "_"]) for folder in folders}
    assert {name: number for name, number in count.items() if number > MOST_MODULES} == {}


def literals(path: Path) -> Iterator[str]:
    """Every string that a file holds as a whole, docstrings included."""
    nodes = (node for node in nodes_of(path) if isinstance(node, ast.Constant))
    return (node.value for node in nodes if isinstance(node.value, str))


@pytest.mark.parametrize(
    ("words", "homes"),
    [
        ({"ridge"}, {"kinds.py", "probes/heads.py"}),
        ({"semseg", "detect", "instseg"}, {"kinds.py", "scores.py"}),
        (
            {"linear", "upsample", "fcos", "fasterrcnn", "maskrcnn"},
            {"kinds.py", "probes/heads.py", "probes/losses.py", "probes/verdicts/heat_maps.py"},
        ),
    ],
    ids=["solved heads", "tasks", "trained heads"],
)
def test_kinds_and_tasks_are_named_in_their_tables_alone(words: set[str], homes: set[str]) -> None:
    """losses.py and heat_maps.py name torch's linear interpolation."""
    assert {file for file in FILES if words & set(literals(PACKAGE / file))} <= homes


def test_no_module_name_is_doubled() -> None:
    names = [Path(file).stem for file in FILES if not Path(file).stem.startswith("__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_split_is_parsed_where_its_text_enters() -> None:
    """From a result row, or from what a user says of a training, of a study, of a split to write; splitting.py has
    examples."""
    options = {"stages/training/probe_options.py", "stages/study/study.py", "stages/upkeep/describe.py"}
    doors = {"cli", "result_rows.py", "splitting.py", *options}
    calls = {file for file in FILES if re.search(r"SplitChoice\.parse\(", (PACKAGE / file).read_text())}
    assert {file for file in calls if not {file, file.split("/")[0]} & doors} == set()


CONTRACTS = ("Segmentation", "Detection", "FeatureLoader", "LiveFeatures", "\\w*Head")
"""Classes that are known by what they define (task.Task, sources.Source, probes/head.py), and not by their names."""


def test_tasks_sources_and_heads_are_used_by_their_contracts() -> None:
    """head.py and bank.py say which heads can be computed at once."""
    asked = re.compile(rf"isinstance\([^()]*, *\(?[^()]*\b({'|'.join(CONTRACTS)})\b")
    files = {file: (PACKAGE / file).read_text() for file in FILES}
    assert {file for file, text in files.items() if asked.search(text)} <= {"probes/head.py"}
    assert {file for file, text in files.items() if re.search(r"[gh](et|as)attr\(\w*(head|task)\b", text)} == set()
    assert {file for file, text in files.items() if "# type: ignore" in text and file.startswith("probes/")} == set()


def test_an_extraction_option_is_written_in_few_modules() -> None:
    """Counted for the share of empty tiles, which a caller, featprobe.toml, a study and a recipe can name."""
    written = [file for file in FILES if re.search(r"\bempty[_-]tiles\b", (PACKAGE / file).read_text())]
    assert len(written) <= 7, written


def test_extraction_needs_nothing_of_training_comparing_or_upkeep() -> None:
    above = {f"featprobe.stages.{room}" for room in ("training", "comparison", "upkeep", "study")}
    room = "featprobe.stages.extraction"
    inside = {name: others for name, others in imports_of(PACKAGE).items() if name.startswith(room)}
    assert [(name, other) for name in inside for other in inside[name] if other.rpartition(".")[0] in above] == []
