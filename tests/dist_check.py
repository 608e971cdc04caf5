"""Build the source archive and the wheel, and run the archive's own fast tests on the wheel: `make dist-check`.

The wheel goes into an environment of its own, in a temporary folder. The packages that it needs are those of the
environment that runs this program, so no network is used. Words on the command line go to pytest, in place of all fast
tests.
"""

import os
import site
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAST = ["-n", "2", "--dist", "loadfile", "-m", "not slow and not process and not browser", "tests"]
ORIGIN = "import featprobe as f, importlib.metadata as m; print(f.__file__, f.__version__, m.version('featprobe'))"


def built(folder: Path) -> tuple[Path, Path]:
    """The source archive and the wheel of this tree; the wheel is built from the archive."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], cwd=folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


def missing(archive: Path, wheel: Path) -> list[str]:
    """Files under version control that the archive lacks, and modules that the wheel lacks."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\0")
    wanted = {name for name in listed if name and (ROOT / name).is_file()}
    with tarfile.open(archive) as opened:
        found = {member.name.partition("/")[2] for member in opened.getmembers()}
    with zipfile.ZipFile(wheel) as whole:
        modules = set(whole.namelist())
    lacking = [f"the archive lacks {name}" for name in sorted(wanted - found)]
    package = {name for name in wanted if name.startswith("featprobe/")}
    return lacking + [f"the wheel lacks {name}" for name in sorted(package - modules)]


def installed(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel; all other packages are those of this environment."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], cwd=folder)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # behind the wheel on sys.path
    return python


def run(command: list[str], cwd: Path) -> str:
    """What a command prints; ends this program where the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(words: list[str]) -> int:
    """The exit code of the tests."""
    with tempfile.TemporaryDirectory(prefix="featprobe-dist-") as name:
        folder = Path(name)
        archive, wheel = built(folder)
        if lacking := missing(archive, wheel):
            print(*lacking, sep="\n")
            return 1
        with tarfile.open(archive) as opened:
            opened.extractall(folder / "source", filter="data")
        (tree,) = (folder / "source").iterdir()
        python = installed(folder / "environment", wheel)
        print(archive.name, wheel.name, run([str(python), "-c", ORIGIN], cwd=folder), sep="\n", end="", flush=True)
        path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "PATH": path,
            "PYTHONSAFEPATH": "1",
        }  # featprobe/ of the archive must not stand in for the wheel
        tests = [str(python), "-m", "pytest", *(words or FAST)]
        return subprocess.run(tests, cwd=tree, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
