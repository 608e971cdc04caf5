"""A disk that is full, or fails, at each write of each command: words, nothing lost, and the same command completes.

    python benchmarks/disk_errors.py
    python benchmarks/disk_errors.py --commands probe,finetune --most 20

A first run of each command counts its writes. Then each of them fails in turn, with ENOSPC from there on and with EIO
once. The command must end in one paragraph (exit code 1; a study 3), leave no temporary file, and leave every file as
it was that the command itself does not change, and the others whole; what was there already of features and results
must be there still. The same command again must then give what it gives without errors.
"""

import argparse
import io
import random
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _bench import report
from _commands import COMMANDS, ERRORS, Bench, Fault, Ran
from tqdm import tqdm

LEAST = 0.8  # of the bytes of a file without errors, that it has if it is whole
SPARED = ".look"  # of files that cost time alone when they can't be written: no error


def faults_of(bench: Bench, name: str, fault: Fault, whole: tuple[Any, ...], changed: Mapping[str, int]) -> list[str]:
    """What is wrong with a command that meets a fault, and with the same command after it.

    "not met": it had no such write. whole: its result without errors. changed: the files that it changes, makes or
    removes, and the bytes that they have then.
    """
    bench.before(name)
    before, rows, features = bench.files(), bench.scores(), bench.rows()
    ran = bench.run(name, fault)
    if len(ran.writes) <= fault.at:
        return ["not met"]
    found = []
    completed = ran.code in (0, 3) and not ran.refused and "Traceback" not in ran.err
    if not ran.refused and not (completed and (SPARED in ran.writes[fault.at] or bench.result() == whole)):
        found.append(f"exit code {ran.code}: {ran.err[-1500:]}")
    found += [f"left behind: {path}" for path in bench.leftovers()]
    after = bench.files()
    found += [
        f"changed: {path}"
        for path in before
        if path not in changed and after.get(path) != before[path] and not path.endswith("/sheet.png")
    ]
    found += [f"half written: {path}" for path in half_written(before, after, changed)]
    lost = (features & {*whole[2]}) - bench.rows()
    found += [f"{len(lost)} rows of features are gone"] if lost else []
    kept = {folder for folder, _ in rows} & dict(whole[1]).keys()
    found += [f"the row of {folder} is gone" for folder in sorted(kept - dict(bench.scores()).keys())]
    if completed:
        return found
    again = bench.run(name)
    if again.code not in (0, 3) or "Traceback" in again.err:
        found.append(f"the same command again: exit code {again.code}: {again.err[-1500:]}")
    elif bench.result() != whole:
        found.append("the same command again does not give the same")
    return found


def half_written(before: Mapping[str, bytes], after: Mapping[str, bytes], changed: Mapping[str, int]) -> list[str]:
    """Files that are neither as they were nor whole.

    A file is whole that is about as long as without errors: times and paths vary in length. A page or an archive may
    hold less, and must then have its end.
    """
    new = [path for path in changed if path in after and after[path] != before.get(path)]
    return [path for path in new if len(after[path]) < changed[path] * LEAST and not has_end(path, after[path])]


def has_end(path: str, data: bytes) -> bool:
    """Whether a file of a kind that shows it is all there: of an archive also its checksums."""
    if path.endswith(".html"):
        return data.rstrip().endswith(b"</html>")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return path.endswith(".npz") and archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False


def counted(bench: Bench, name: str) -> tuple[Ran, tuple[Any, ...], dict[str, int]]:
    """A command without errors: how it ran, its result, and the files that it changes, makes or removes, with their
    bytes then."""
    bench.before(name)
    before = bench.files()
    ran = bench.run(name)
    if ran.code not in (0, 3) or "Traceback" in ran.err:
        raise RuntimeError(f"{name}: {ran.code}: {ran.err[-3000:]}")
    after = bench.files()
    changed = {path: len(after.get(path, b"")) for path in after | before if before.get(path) != after.get(path)}
    return ran, bench.result(), changed


def main() -> None:
    """Run all, print a table and one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--most", type=int, default=0, help="writes of each command that fail, drawn; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, rows, wrong, trials = random.Random(asked.seed), [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench")
        for name in asked.commands.split(","):
            ran, whole, changed = counted(bench, name)
            places = range(len(ran.writes))
            chosen = sorted(rng.sample(places, asked.most)) if 0 < asked.most < len(places) else list(places)
            met: Counter[str] = Counter()
            for kind in ERRORS:
                for at in tqdm(chosen, desc=f"{name}, {kind}", leave=False):
                    found = faults_of(bench, name, Fault(at, kind), whole, changed)
                    met["not met" if found == ["not met"] else "wrong" if found else "right"] += 1
                    if found and found != ["not met"]:
                        wrong.append(f"{name}, {kind} at write {at} ({ran.writes[at]}): {found}")
                        tqdm.write(wrong[-1])
            trials += met["right"] + met["wrong"]
            ways = {way: str(met[way]) for way in ("right", "wrong", "not met")}
            rows.append({"command": name, "writes": str(len(places)), **ways})
            tqdm.write(str(rows[-1]))
    report("disk_errors", (trials - len(wrong)) / max(1, trials), 1.0, rows, trials=trials, wrong=len(wrong))


if __name__ == "__main__":
    main()
