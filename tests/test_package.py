"""The package: what it needs, what it is called, how it is cited."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from test_layers import nodes_of

import featprobe
from featprobe import processes
from featprobe.errors import BackboneError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CFF: dict[str, Any] = {
    "type": "object",
    "required": ["cff-version", "message", "title", "authors"],
    "additionalProperties": False,
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "message": {"type": "string", "minLength": 1},
        "title": {"type": "string", "minLength": 1},
        "abstract": {"type": "string", "minLength": 1},
        "type": {"enum": ["software", "dataset"]},
        "version": {"type": "string", "minLength": 1},
        "license": {"type": "string"},
        "keywords": {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
        "authors": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": {name: {"type": "string"} for name in ("name", "family-names", "given-names")},
            },
        },
    },
}
"""The part of the layout 1.2.0 of CITATION.cff that this project uses."""


def name_of(requirement: str) -> str:
    """The normalised name of a requirement."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def imported(folder: Path) -> dict[str, set[str]]:
    """Distributions that a folder's modules import -> the modules that do, in functions too."""
    owners = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in nodes_of(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"featprobe"}:
                for owner in owners.get(top, [top]):
                    found.setdefault(name_of(owner), set()).add(str(path.relative_to(folder)))
    return found


def test_each_dependency_is_imported_and_each_import_is_a_dependency_or_an_extra() -> None:
    needed = {name_of(text) for text in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    optional = {name_of(text) for name, texts in extras.items() if name not in ("dev", "docs") for text in texts}
    found = imported(Path(featprobe.__file__).parent)
    assert needed <= found.keys(), "nobody imports these"
    assert found.keys() <= needed | optional, "these are not asked for"
    assert not needed & optional


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert version("featprobe") == featprobe.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", featprobe.__version__)


def test_the_citation_is_of_this_version_and_in_the_layout() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    jsonschema.validate(citation, CFF)
    assert citation["version"] == featprobe.__version__ and citation["license"] == PROJECT["license"]
    for missing in ("authors", "title"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: value for name, value in citation.items() if name != missing}, CFF)


def test_several_processes_without_accelerate_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    cpu = torch.device("cpu")
    with pytest.raises(BackboneError, match=r"2 processes (.|\n)*'featprobe\[processes\]'"), processes.together(cpu):
        pass
    assert processes.count() == 1


def test_types_are_there_for_those_who_import_it() -> None:
    assert (Path(featprobe.__file__).parent / "py.typed").is_file()


def test_the_workflow_runs_what_the_project_runs() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    steps = flow["jobs"]["tests"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    said = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert said == set(flow["jobs"]["tests"]["strategy"]["matrix"]["python"])
