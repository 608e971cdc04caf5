"""Every hostile cache of tests/hostile_caches.py, those that `make test` leaves to this as well.

    python benchmarks/attack/hostile.py

Prints JSON: how many were tried, and those that were not refused in words (or read as they are, where they harm
nobody), or that took 2 s of a processor in the process that opened them. `bad` must be 0.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cache"))
sys.path.insert(0, str(Path(__file__).parents[1]))

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
    print(json.dumps({"name": "hostile", "tried": tried, "bad": len(faults), "faults": faults}, indent=1))
    sys.exit(3 if faults else 0)


if __name__ == "__main__":
    main()
