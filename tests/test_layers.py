"""Imports point down only, parts of one layer that must not know each other do not, one door per dependency."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "featprobe"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "levels", "features"),
    (
        "io",
        "specs",
        "image_labels",
        "intensity",
        "tiling",
        "splitting",
        "kinds",
        "scores",
        "result_rows",
        "geometry",
        "regions",
        "targets",
        "machine",
        "processes",
    ),
    ("backbones", "datasets", "cache", "probes", "metrics", "report"),
    ("stages",),
    ("cli",),
    ("__main__",),
)
APART = 2  # the layer whose parts know nothing of each other
DOORS = {
    "accelerate": ("processes",),
    "h5py": ("cache",),
    "timm": ("backbones",),
    "huggingface_hub": ("backbones",),
    "click": ("cli",),
    "pandas": ("report", "stages"),
    "jinja2": ("report",),
    "markupsafe": ("report",),
    "matplotlib": ("report", "stages"),
    "tqdm": ("stages",),
    "submitit": ("stages",),
    "wandb": ("stages",),
    "onnx": ("stages",),
    "onnxruntime": ("stages",),
    "yaml": ("datasets",),
    "tifffile": ("datasets",),
    "imagecodecs": ("datasets",),
    "pydicom": ("datasets",),
    "pydantic": ("io",),
    "pyarrow": ("io",),
    "pycocotools": ("targets", "datasets", "metrics"),
}
FROM_ROOT = {"__version__"}  # all that a module may take from the package itself
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """The part that a module of featprobe belongs to: "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax of a file, which no test changes."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Everything in the syntax of a file."""
    return tuple(ast.walk(tree_of(path)))


def imported_by(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, in functions and behind TYPE_CHECKING too."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "a relative import"
            elif node.module == "featprobe":
                yield from ((node.lineno, f"featprobe.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, str(node.module)


def violations(package: Path) -> list[str]:
    """What the files of a package import against the rules, as `file:line name`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the public names, loaded when asked for: strings, not imports
        for line, name in imported_by(path):
            root = name.split(".")[0]
            if not is_allowed(own, name) or own not in DOORS.get(root, (own,)):
                found.append(f"{relative.as_posix()}:{line} {name}")
    return found


def is_allowed(own: str, name: str) -> bool:
    """Whether a module of the part `own` may import a dotted name, as far as layers go."""
    if own not in LAYER_OF or name == "a relative import":
        return False
    if name.split(".")[0] != "featprobe":
        return True
    part = part_of(name)
    if part in FROM_ROOT:
        return True
    if part not in LAYER_OF:
        return False
    below, level = LAYER_OF[part], LAYER_OF[own]
    return below < level or part == own or (below == level != APART)


def test_imports_point_down_and_each_dependency_has_one_door() -> None:
    assert violations(PACKAGE) == []


OWN_JSON = (
    "probes/saved.py",
    "cache/legacy.py",
    "cache/hdf5_child.py",
    "datasets/images/decoder.py",
    *(f"datasets/formats/{n}.py" for n in ("coco", "folders", "gdxray", "severstal", "voc")),
)
"""Where what is parsed was written by the same process, or in a child with limits."""
CALLS = {
    r"\bImage\.open\(": {"io/pictures.py"},  # which names the formats
    r"\bclick\.s?echo\(": {"cli/options.py"},  # which shows control characters
    r"\bjson\.loads?\(": {"cache/header.py", "io/disk.py", *OWN_JSON},  # which bear deep nesting
    r"\btomllib\.loads?\(": {"io/disk.py"},
    r"\bfrom pydantic\b": {"io/schemas.py"},
    r"\bfrom tqdm\b": {"stages/progress.py"},  # which is quiet where there is no terminal
    r"\bpickle\.loads?\(": set(),
    r"\bentry_points\(": {"io/plugins.py"},
    r"\.to_csv\(": {"report/tables.py"},
    r"\bnp\.load\(": {"datasets/images/decode.py", "stages/comparison/audit.py"},
}  # fmt: skip
"""Calls that are dangerous anywhere but in these files."""


def test_dangerous_calls_have_one_door() -> None:
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    for call, doors in CALLS.items():
        found = {name for name, text in texts.items() if re.search(call, text)}
        assert found <= doors, call


def test_every_part_of_the_package_has_its_layer() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} == set(LAYER_OF)


def test_every_door_is_in_use() -> None:
    """A door that nobody goes through would be a rule that guards nothing."""
    used = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for _, name in imported_by(path)}
    assert set(DOORS) <= used


@pytest.mark.parametrize(
    ("file", "line", "culprit"),
    [
        ("levels.py", "from featprobe.specs import digest", "featprobe.specs"),
        ("geometry.py", "import featprobe.cache", "featprobe.cache"),
        ("probes/linear.py", "from featprobe.cache import Cache", "featprobe.cache"),
        ("backbones/weights.py", "from featprobe import datasets", "featprobe.datasets"),
        ("metrics/boxes.py", "def f():\n    from featprobe.report.tables import percent", "featprobe.report.tables"),
        ("cache/store.py", "from featprobe.stages.extraction.plan import plan", "featprobe.stages.extraction.plan"),
        ("stages/probe.py", "from featprobe.cli import main", "featprobe.cli"),
        ("stages/probe.py", "from featprobe import open_cache", "featprobe.open_cache"),
        ("stages/probe.py", "from .plan import plan", "a relative import"),
        ("cli/main.py", "import h5py", "h5py"),
        ("datasets/images.py", "import timm.data", "timm.data"),
        ("stages/extract.py", "from click import echo", "click"),
        ("probes/train.py", "from tqdm.auto import tqdm", "tqdm.auto"),
        ("cache/layout.py", "import pandas as pd", "pandas"),
        ("probes/paste.py", "from pycocotools import mask", "pycocotools"),
        ("stages/study.py", "from pydantic import BaseModel", "pydantic"),
        ("extra.py", "import os", "os"),
    ],
)
def test_the_check_sees_each_kind_of_violation(tmp_path: Path, file: str, line: str, culprit: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nimport numpy\nfrom featprobe.errors import FeatprobeError\n{line}\n")
    found = violations(tmp_path)
    assert culprit in [entry.split(" ", 1)[1] for entry in found]
    assert len(found) == 1 or file == "extra.py"


def test_the_check_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    lines = {
        "targets.py": "from featprobe.geometry import Size\nfrom pycocotools import mask",
        "cache/reader.py": "import h5py\nfrom featprobe.cache.store import Cache\nimport featprobe.levels",
        "stages/probe.py": "from featprobe import __version__\nfrom featprobe.cache import Cache\nimport pandas, tqdm",
        "cli/main.py": "import click\nfrom featprobe.stages.predict import predict\nfrom featprobe.specs import digest",
    }
    for file, text in lines.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


@functools.cache
def file_of(module: str) -> Path | None:
    """The file of a module of the package; None for what is none."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@functools.cache
def names_on_demand(module: str) -> dict[str, str]:
    """Names that a package loads when they are first asked for, and the modules that they come from."""
    path = file_of(module)
    body = tree_of(path).body if path and module.startswith("featprobe") else []
    tables = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC"]
    return {name: own for table in tables for name, own in ast.literal_eval(table).items()}


def loaded_with(module: str) -> set[str]:
    """All modules that are loaded when one of the package is imported, as far as the package itself names them."""
    found, coming = set[str](), [module]
    while coming:
        module = coming.pop()
        if module in found:
            continue
        found.add(module)
        path = file_of(module)
        if path is None or not module.startswith("featprobe"):
            continue
        coming += [module.rpartition(".")[0]] if "." in module else []
        for node in tree_of(path).body:
            if isinstance(node, ast.Import):
                coming += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                coming += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
                later = names_on_demand(str(node.module))
                coming += [later[alias.name] for alias in node.names if alias.name in later]
    return found


@pytest.mark.parametrize(
    ("module", "reached"),
    [
        ("featprobe.stages.training.probe", "featprobe.stages.tasks.detection"),
        ("featprobe.stages.recording.rescore", "featprobe.stages.recording.base"),
    ],
)
def test_what_reads_stored_features_loads_no_network_and_no_torchvision(module: str, reached: str) -> None:
    """torchvision loads torch's compiler, which takes as long as torch itself."""
    found = loaded_with(module)
    assert {"torch", "featprobe.probes.fcos", reached} <= found
    assert not [name for name in found if name.split(".")[0] in ("torchvision", "timm")]


@pytest.mark.parametrize(
    ("module", "reached"),
    [
        ("featprobe.stages.comparison.compare", {"featprobe.probes.saved", "featprobe.report.page"}),
        ("featprobe.stages.extraction.extract", {"featprobe.stages.extraction.settled"}),
        ("featprobe.stages.upkeep.caches", {"featprobe.cache.store"}),
    ],
)
def test_what_computes_nothing_loads_no_torch(module: str, reached: set[str]) -> None:
    """torch takes longer to load than everything else that a comparison does, or an extraction with nothing to do."""
    found = loaded_with(module)
    assert reached <= found
    assert not [name for name in found if name.split(".")[0] in ("torch", "torchvision", "timm")]
