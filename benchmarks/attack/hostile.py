"""Every hostile cache of tests/hostile_caches.py, those that `make test` leaves to this as well, and every hostile file
of tests/hostile_tables.py.

    python benchmarks/attack/hostile.py

Prints JSON: how many were tried, and those that were not refused in words (or read as they are, where they harm
nobody), or that took 2 s of a processor in the process that opened them; of tables also those that took more memory
than twice the file and 256 MB. `bad` must be 0.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cache"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import hostile_tables
from hostile_caches import HARMLESS, NEW, OLD
from test_hostile_caches import SECONDS, run


def main() -> None:
    faults, tried = {}, 0
    for version, variants in ((1, OLD), (3, NEW)):
        with tempfile.TemporaryDirectory() as folder:
            taken = run(Path(folder), version, sorted(variants))
        tried += len(taken)
        for name, how, seconds in taken:
            if how != ("right" if name in HARMLESS else "refused") or seconds > SECONDS:
                faults[f"version {version}: {name}"] = [how, seconds]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, hostile_tables.__file__, folder]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    tried += len(lines)
    for name, size, how, memory, seconds in map(json.loads, lines):
        ended = how == "read" if name in hostile_tables.LARGEST else how.startswith("refused: ") and seconds <= SECONDS
        if not ended or memory > 2 * size + hostile_tables.ALLOWED:
            faults[f"table: {name}"] = [how, seconds, memory]
    print(json.dumps({"name": "hostile", "tried": tried, "bad": len(faults), "faults": faults}, indent=1))
    sys.exit(3 if faults else 0)


if __name__ == "__main__":
    main()
