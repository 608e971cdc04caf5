"""How soon the command line answers: processor time of an import, of help, and of misspelt words.

    python benchmarks/quick.py

Each line runs in a process of its own, in an empty workspace, in turn with the others; what counts is the processor
time of the process (user and system), so that other work on the machine hardly matters. `import featprobe` may take
0.1 s beside a Python that imports nothing. The median of the rounds counts. A misspelt task, head,
backbone, set or size may take 0.5 s, with the start of Python; each must end with exit code 2 and name what was meant.
`--help` and a study with misspelt names are given beside them. The ratio is the least of wanted over measured.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _bench import positive, report

IMPORT_SECONDS, MISSPELT_SECONDS = 0.1, 0.5  # at most
EXTRACT = ("extract", "--data", "xray", "--backbone", "embedded")
STUDY = 'data = ["xrey"]\nbackbones = ["embeded"]\ntasks = ["semsge"]\nsizes = ["64"]\n'
MISSPELT: dict[str, tuple[str, ...]] = {
    "task": ("probe", "--task", "semsge"),
    "head": ("probe", "--head", "linaer"),
    "backbone": ("extract", "--data", "xray", "--backbone", "convnext_dinov4"),
    "backbone of timm": ("extract", "--data", "xray", "--backbone", "resnet51"),
    "backbone of a cache": ("probe", "--backbone", "embeded"),
    "set": ("extract", "--data", "xrey", "--backbone", "embedded"),
    "set of a cache": ("probe", "--data", "xrey"),
    "size": (*EXTRACT, "--size", "64"),
    "level": (*EXTRACT, "--levels", "strid8"),
    "loss": ("probe", "--loss", "dise"),
    "task to fine-tune": ("finetune", "--task", "detct"),
    "device": ("probe", "--device", "gpu"),
}
"""Wrong words of a command line, each with one mistake."""


@dataclass(frozen=True)
class Run:
    """A process that ended. clock, processor: seconds."""

    code: int
    said: str
    clock: float
    processor: float


def run(words: Sequence[str], folder: Path) -> Run:
    """Run Python with these words in a folder; modules are compiled once, as an installer does it.

    They go to a place of their own, where the environment names none.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", str(folder.parent / "compiled"))
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=environment)
    clock, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(done.returncode, done.stdout + done.stderr, clock, processor)


def measured(lines: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Run]]:
    """The runs of each line, in turn, in an empty workspace, which they must leave empty."""
    runs: dict[str, list[Run]] = {name: [] for name in lines}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "workspace"
        folder.mkdir()
        (folder / "study.toml").write_text(STUDY)
        for _ in range(rounds + 1):
            for name, words in lines.items():
                runs[name].append(run(words, folder))
        left = sorted(os.listdir(folder))
    if left != ["study.toml"]:
        raise SystemExit(f"A misspelt word left files behind: {left}")
    for name in MISSPELT:
        last = runs[name][-1]
        if last.code != 2 or "Traceback" in last.said:
            raise SystemExit(f"{name}: exit code {last.code}, {last.said[-500:]}")
    return {name: own[1:] or own for name, own in runs.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="after one that does not count")
    parser.add_argument("--once", action="store_true", help="count the first round, and run no other")
    asked = parser.parse_args()
    rounds = 0 if asked.once else asked.rounds
    command = ("-m", "featprobe")
    lines = {
        "nothing": ("-c", "pass"),
        "import featprobe": ("-c", "import featprobe"),
        "--help": (*command, "--help"),
        "study": (*command, "study", "study.toml"),
        **{name: (*command, *words) for name, words in MISSPELT.items()},
    }
    runs = measured(lines, rounds)
    clock = {name: statistics.median(one.clock for one in own) for name, own in runs.items()}
    processor = {name: statistics.median(one.processor for one in own) for name, own in runs.items()}
    imported = processor["import featprobe"] - processor["nothing"]
    worst = max([*MISSPELT, "study"], key=lambda name: processor[name])
    rows = [{"what": n, "processor, s": f"{processor[n]:.3f}", "clock, s": f"{clock[n]:.3f}"} for n in lines]
    ratio = min(IMPORT_SECONDS / max(imported, 1e-3), MISSPELT_SECONDS / processor[worst])
    figures = {name: round(processor[name], 3) for name in lines}
    report("quick", ratio, 1.0, rows, import_seconds=imported, slowest=worst, figures=figures)


if __name__ == "__main__":
    main()
