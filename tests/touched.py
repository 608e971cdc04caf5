"""The tests that a change touches, nearest first, one path a line: what `make check` runs.

    python tests/touched.py [BASE]

A change is what differs from BASE, uncommitted and new files included; BASE is by default where the branch left
origin/main, or else main. A changed test is touched; so are the tests of a changed module (tests/a/test_b.py for
featprobe/a/b.py), the module's own doctests, and every test that imports a name of it, directly or through its package.
What reaches a test in no such way is not seen: `make test` runs everything.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/test_layers.py", "tests/test_docs.py")
"""Tests about the whole tree, in seconds."""


def git(*arguments: str) -> list[str]:
    """Lines that git prints; none where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed(base: str | None = None) -> list[str]:
    """Paths of all files that differ from the base, as git names them."""
    bases = [base] if base else ["origin/main", "main", "HEAD"]
    start = next((found[0] for name in bases if (found := git("merge-base", "HEAD", name))), None)
    if start is None:
        sys.exit(
            f"There is no commit {' or '.join(bases)} to compare with here.\nName one:  python tests/touched.py BASE"
        )
    return [*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")]


def module_of(path: str) -> str:
    """`featprobe.a.b` of featprobe/a/b.py, `featprobe.a` of featprobe/a/__init__.py.

    >>> module_of("featprobe/cache/__init__.py"), module_of("featprobe/io/disk.py")
    ('featprobe.cache', 'featprobe.io.disk')
    """
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports: of `from a.b import c` both a.b and a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def names_for(module: str) -> set[str]:
    """The module, and what its package hands on of it: `featprobe.cache.Cache` for featprobe.cache.store."""
    package = ROOT / module.rpartition(".")[0].replace(".", "/") / "__init__.py"
    taken = imports(package) if package.is_file() and module.count(".") > 1 else frozenset()
    own = {name.removeprefix(f"{module}.") for name in taken if name.startswith(f"{module}.")}
    return {module, *(f"{module.rpartition('.')[0]}.{name}" for name in own)}


def tests_of(path: str, tests: Iterable[Path]) -> Iterator[str]:
    """Paths of the tests that a changed file touches, nearest first."""
    file = ROOT / path
    if path.startswith("tests/"):
        if file.name.startswith("test_") and file.is_file():
            yield path
        elif file.suffix == ".py":
            yield from (str(test.relative_to(ROOT)) for test in tests if file.stem in imports(test))
    elif path.startswith("featprobe/") and file.suffix == ".py":
        mirrored = ROOT / "tests" / Path(path).relative_to("featprobe").parent / f"test_{file.stem}.py"
        yield from (str(found.relative_to(ROOT)) for found in (mirrored, file) if found.is_file())
        wanted = names_for(module_of(path))
        yield from (str(test.relative_to(ROOT)) for test in tests if wanted & imports(test))
    elif path.startswith(("examples/", "benchmarks/")):
        yield f"tests/system/test_{path.partition('/')[0]}.py"


def touched(paths: Iterable[str]) -> list[str]:
    """Paths of the tests of all changed files, each once, nearest first; those about the whole tree among them."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [list(tests_of(path, tests)) for path in paths]
    nearest = [names[0] for names in found if names]
    return list(dict.fromkeys([*ALWAYS, *nearest, *(name for names in found for name in names)]))


if __name__ == "__main__":
    print("\n".join(touched(changed(*sys.argv[1:2]))))
