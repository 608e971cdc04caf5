"""The states in which a loss of power can leave the files of a head: none is ranked, each is trained again.

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --regime full

Each file of a finished head is made gone, empty, half, and zeros of its length, alone; then all files are gone, and all
but the card: 18 states. In each of them `compare` must end in words, name the command that trains the head again, and
still rank the other seed; `predict` must refuse where head or card is not what was written; the study, and for a
backbone that was trained too `finetune`, must train that head again and no other; and then everything must be what it
was before. A control is left alone: nothing may be trained again there.

Then what lies beside a head and is made again without training, its records and its operating point, in 4 states each:
nothing may be trained again, `compare` must rank both seeds, `inspect` and `predict` must refuse a file that is not
what was written and name the command that makes it again, and that command must give the same bytes.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _bench import report
from _commands import Bench

FILES = {"frozen": ("head.safetensors", "card.json", "curves.json", "scores.npz")}
FILES["full"] = (*FILES["frozen"], "backbone.safetensors")
BESIDE = {"defects.parquet": "inspect --rescore", "operating.json": "inspect"}
"""What lies beside a head without an entry in its card, and the command that makes it again."""
WAYS = ("gone", "empty", "half", "zeros")


def states(regime: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of each state, and what becomes of which file."""
    for file in FILES[regime]:
        for way in WAYS:
            yield f"{file} {way}", {file: way}
    yield "all gone", dict.fromkeys(FILES[regime], "gone")
    yield "all but the card gone", {file: "gone" for file in FILES[regime] if file != "card.json"}


def lose(folder: Path, lost: dict[str, str]) -> None:
    """Leave the files of a head as a loss of power might."""
    for file, way in lost.items():
        data = (folder / file).read_bytes()
        if way == "gone":
            (folder / file).unlink()
        else:
            (folder / file).write_bytes({"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}[way])


def faults_of(bench: Bench, state: Path, lost: dict[str, str], again: str) -> list[str]:
    """What is wrong after the files of the first seed's head are lost. state: the workspace before; again: trains."""
    shutil.rmtree(bench.root)
    shutil.copytree(state, bench.root, symlinks=True)
    head = bench.root / bench.head()
    whole, rows = bench.result(), len((bench.root / "probes" / "results.jsonl").read_text().splitlines())
    other = head.parent / "seed1" / "card.json"
    others, made = other.is_file(), other.stat().st_mtime_ns if other.is_file() else 0
    lose(head, lost)
    found = []
    compared = bench.run("compare")
    said = compared.out + compared.err
    if "Traceback" in said or "Aborted" in said or compared.code != (0 if others or not lost else 1):
        found.append(f"compare: {compared.code}: {said[-800:]}")
    if lost and "featprobe probe" not in said and "featprobe finetune" not in said:
        found.append(f"compare names no command: {said[-800:]}")
    if lost and others:
        table = (bench.root / "probes/report/results.csv").read_text().splitlines()
        seeds = table[1].split(",")[table[0].split(",").index("seeds")]
        found += [f"compare ranks {seeds} seeds"] if seeds != "1" else []
    predicted = bench.run("predict")
    needed = {"head.safetensors", "card.json", "backbone.safetensors"} & set(lost)
    if "Traceback" in predicted.err or predicted.code != (1 if needed else 0):
        found.append(f"predict: {predicted.code}: {predicted.err[-800:]}")
    shutil.rmtree(bench.root / "found", ignore_errors=True)
    shutil.rmtree(bench.root / "probes" / "report", ignore_errors=True)
    trained = bench.run(again)
    after = len((bench.root / "probes" / "results.jsonl").read_text().splitlines())
    if trained.code != 0 or after - rows != bool(lost):
        found.append(f"{again}: {trained.code}, {after - rows} trained: {trained.err[-800:]}")
    found += ["another head was trained again"] if others and other.stat().st_mtime_ns != made else []
    shutil.rmtree(bench.root / "probes" / "report", ignore_errors=True)
    found += ["not what it was"] if bench.result() != whole else []
    return found


def faults_beside(bench: Bench, state: Path, file: str, way: str) -> list[str]:
    """What is wrong after a file beside the first seed's head is lost. state: a workspace with two heads."""
    shutil.rmtree(bench.root)
    shutil.copytree(state, bench.root, symlinks=True)
    head, found = bench.root / bench.head(), []
    if bench.run("inspect").code != 0:
        return ["inspect fails before the loss"]
    whole, rows = (head / file).read_bytes(), (bench.root / "probes" / "results.jsonl").read_bytes()
    lose(head, {file: way})
    compared = bench.run("compare")
    if compared.code != 0 or "not usable" in compared.out + compared.err:
        found.append(f"compare: {compared.code}: {compared.err[-800:]}")
    reader = bench.run({"defects.parquet": "inspect", "operating.json": "predict"}[file])
    refused = (
        reader.refused and {"defects.parquet": "--rescore", "operating.json": "featprobe inspect"}[file] in reader.err
    )
    if not (reader.code == 0 if (file, way) == ("operating.json", "gone") else refused):
        found.append(f"its reader: {reader.code}: {reader.err[-800:]}")
    again = bench.run(BESIDE[file])
    if again.code != 0 or (head / file).read_bytes() != whole:
        found.append(f"{BESIDE[file]}: {again.code}, other bytes: {again.err[-800:]}")
    trained = (bench.root / "probes" / "results.jsonl").read_bytes() != rows
    return found + (["something was trained"] if trained else [])


def main() -> None:
    """Run all states, print a table and one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--regime", choices=sorted(FILES), default="frozen")
    regime = parser.parse_args().regime
    again = {"frozen": "study", "full": "finetune"}[regime]
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench")
        state = prepared(bench, again)
        for name, lost in [("control", {}), *states(regime)]:
            found = faults_of(bench, state, lost, again)
            wrong += bool(found)
            rows.append({"state": name, "faults": "; ".join(found) or "none"})
        for file in BESIDE:
            for way in WAYS:
                found = faults_beside(bench, state, file, way)
                wrong += bool(found)
                rows.append({"state": f"{file} {way}", "faults": "; ".join(found) or "none"})
    share = (len(rows) - wrong) / len(rows)
    report(f"head_loss {regime}", share, 1.0, rows, states=len(rows) - 1, wrong=wrong)


def prepared(bench: Bench, again: str) -> Path:
    """A copy of the workspace after a command that trains; what it trained is there when it runs again."""
    bench.before(again)
    ran = bench.run(again)
    if ran.code != 0:
        raise RuntimeError(f"{again}: {ran.code}: {ran.err[-2000:]}")
    shutil.rmtree(bench.root / "probes" / "report", ignore_errors=True)
    state = bench.states / f"after-{again}"
    shutil.copytree(bench.root, state, symlinks=True)
    return state


if __name__ == "__main__":
    main()
