"""`kill -9` of commands that compute and write: what returned is there, and the same command again gives what it gives.

    python benchmarks/kill_commands.py --kills 200

extract, probe, finetune and study are killed in turn, half of the times at a moment drawn over their run, half before a
write drawn among all of them (`benchmarks/_commands.py`). After a kill every cache must open, every line of
results.jsonl but the last must be whole, and a row must name a head that loads and hashes to its card. The same command
again must end well, leave no temporary file, and give the names of files, the scores and the features of a run that
nobody disturbed.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _bench import positive, report
from _commands import Bench, Fault
from tqdm import tqdm

from featprobe.errors import FeatprobeError
from featprobe.probes import load_head
from featprobe.probes.saved import read_results
from featprobe.stages.training.saved_results import is_whole

KILLED = ("extract", "probe", "finetune", "study")


def faults_after(bench: Bench) -> list[str]:
    """What is wrong with a workspace in which a command was killed."""
    found = []
    try:
        bench.features()
    except FeatprobeError as error:
        found.append(f"a cache does not open: {error}")
    probes = bench.root / "probes"
    rows, faults = read_results(probes / "results.jsonl")
    found += [fault for fault in faults if "is torn" not in fault]
    for row in rows:
        try:
            load_head(probes / row.folder)
            found += [] if is_whole(probes, row, hashes=True) else [f"{row.folder} is not what its row says"]
        except FeatprobeError as error:
            found.append(f"a row without its head: {error}")
    return found


def main() -> None:
    """Kill, look, run again, look; print a table and one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(KILLED))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no kill after so many")
    asked = parser.parse_args()
    rng, met, wrong = random.Random(asked.seed), dict[str, Counter[str]](), list[str]()
    names = asked.commands.split(",")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench")
        whole: dict[str, tuple[Any, int, float]] = {}
        for name in names:
            for _ in range(2):  # the first pays for imports
                bench.before(name)
                begun = time.perf_counter()
                ran = bench.run(name)
            whole[name] = bench.result(), len(ran.writes), time.perf_counter() - begun
            met[name] = Counter()
        kills, until = 0, time.monotonic() + 60 * asked.minutes
        for number in tqdm(range(asked.kills)):
            if time.monotonic() > until:
                break
            kills += 1
            name = names[number % len(names)]
            result, writes, seconds = whole[name]
            bench.before(name)
            if number // len(names) % 2:
                where = f"write {(at := rng.randrange(writes))}"
                bench.run(name, Fault(at, "SIGKILL"))
            else:
                where = f"second {(moment := rng.random() * seconds):.2f}"
                child = bench.start(name)
                child.join(moment)
                child.kill()
                bench.ended(child)
            found = faults_after(bench)
            early = bench.result() != result
            again = bench.run(name)
            if again.code != 0 or "Traceback" in again.err:
                found.append(f"again: {again.code}: {again.err[-1000:]}")
            found += [f"left behind: {path}" for path in bench.leftovers()]
            found += ["not the same"] if bench.result() != result else []
            met[name]["wrong" if found else "right"] += 1
            met[name]["midway"] += early
            if found:
                wrong.append(f"{name} at {where}: {found}")
    rows = [{"command": n, **{k: str(met[n][k]) for k in ("right", "wrong", "midway")}} for n in names]
    for line in wrong:
        print(line)
    midway = sum(own["midway"] for own in met.values())
    report("kill_commands", 1 - len(wrong) / kills, 1.0, rows, kills=kills, midway=midway, wrong=len(wrong))


if __name__ == "__main__":
    main()
