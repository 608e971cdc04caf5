"""A stand-in for SLURM: `sbatch` queues a file, runs its array here when what it depends on has ended, `squeue` tells.

`scontrol requeue` has a job run again when it has ended. One file under four names on PATH; its state lies beside it.
The tasks of an array run at once, each in a real process.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(__file__).parent / "state"


def main() -> None:
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "squeue":
        print(*waiting(), sep="\n")
    elif name == "srun":
        srun(arguments)
    elif name == "scontrol":
        (STATE / f"{arguments[1]}.requeued").touch()
    elif arguments[0] == "--work":
        work(arguments[1], Path(arguments[2]))
    else:
        sbatch(Path(arguments[0]))


def waiting() -> list[str]:
    """Jobs that have not ended."""
    return sorted(path.name for path in STATE.glob("queue/*"))


def sbatch(file: Path) -> None:
    """Take a job: keep its file as it is now, and run it in the background."""
    if "--partition=nowhere" in file.read_text():
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    (STATE / "queue").mkdir(parents=True, exist_ok=True)
    job = str(len(list(STATE.glob("*.sh"))) + 1)
    kept = STATE / f"{job}.sh"
    kept.write_text(file.read_text())
    for task in tasks_of(job, kept.read_text()):
        (STATE / "queue" / task).touch()
    subprocess.Popen(
        [sys.executable, __file__, "--work", job, str(kept)], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"Submitted batch job {job}")


def tasks_of(job: str, text: str) -> list[str]:
    array = re.search(r"^#SBATCH --array=0-(\d+)%\d+$", text, re.MULTILINE)
    return [f"{job}_{index}" for index in range(int(array[1]) + 1)] if array else [job]


def work(job: str, file: Path) -> None:
    """Wait for what a job depends on, and run its tasks."""
    text = file.read_text()
    after = re.search(r"^#SBATCH --dependency=afterany:(\S+)$", text, re.MULTILINE)
    tasks = tasks_of(job, text)
    while (STATE / "held").exists() or (after and after[1] in waiting()):
        if tasks[0] not in waiting():
            return  # it was taken out of the queue
        time.sleep(0.05)
    running = {task: start(job, task, file) for task in tasks}
    while running:
        task, process = running.popitem()
        process.wait()
        if (STATE / f"{task}.requeued").exists():
            (STATE / f"{task}.requeued").unlink()
            running[task] = start(job, task, file)
        else:
            (STATE / "queue" / task).unlink()


def start(job: str, task: str, file: Path) -> subprocess.Popen[bytes]:
    """Run one task."""
    environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    if "_" in task:
        environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": task.partition("_")[2]}
    return subprocess.Popen(["bash", str(file)], env=environment)


def srun(words: list[str]) -> None:
    """Run a command with its output in files, as named by a pattern."""
    where = {}
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            where[option] = words.pop(0)
    array = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    for option, pattern in where.items():
        for sign, value in zip(("%A", "%a", "%j", "%t"), (*array, os.environ["SLURM_JOB_ID"], "0"), strict=True):
            pattern = pattern.replace(sign, value)
        where[option] = pattern
    with open(where["--output"], "a") as out, open(where["--error"], "a") as error:
        process = subprocess.Popen(words, stdout=out, stderr=error)
    Path(where["--output"]).with_suffix(".pid").write_text(str(process.pid))
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
