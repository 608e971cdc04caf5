"""A study on a SLURM cluster: its missing trainings as job arrays, by submitit."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from featprobe.cache import Cache, open_cache
from featprobe.errors import DiskError, FeatprobeError, FileKindError, UsageError, counted
from featprobe.io.disk import REFUSALS, below, open_regular, read_json, sync_files, write_whole
from featprobe.io.texts import printable
from featprobe.probes import append_row
from featprobe.probes.saved import read_rows
from featprobe.specs import digest
from featprobe.stages.study.grid import StudyReport, ladder_of, make_cache, run_cells, run_grid
from featprobe.stages.study.study import Cell, Place, Study, by_cache
from featprobe.stages.training.run import Say
from featprobe.stages.workspace import Workspace

JOBS = "jobs"  # folder of a workspace: what was handed over, logs, answers of jobs
ENTRY = "featprobe.stages.study.cluster_job"  # what a job runs
JOB = re.compile(r"\d{1,20}(_\d{1,20})?", re.ASCII)  # what SLURM calls a job, or a task of an array
LONGEST_ANSWER = 1 << 16  # bytes
LONGEST_TAIL = 1 << 14  # bytes of a log that are read
USUAL = {"job_name": "featprobe", "time": 240, "requeue": True}  # minutes; submitit's own limit is 5
OURS = ("array", "dependency", "output", "error")
LISTS = ("setup", "teardown", "srun_args")


@dataclass(frozen=True)
class Handed:
    """What was handed over. plan: of the whole study. ladders: jobs that find iterations. jobs: (training, its job).
    queued: trainings that are in the queue.
    """

    plan: StudyReport
    extractions: tuple[str, ...]
    ladders: tuple[str, ...]
    jobs: tuple[tuple[Cell, str], ...]
    queued: tuple[Cell, ...]


class _Again(ABC):
    """A job that begins again, and goes on where it was, when SLURM takes its node away or its time is over.

    In the end it answers in a JSON file: {"ended": "success" or "error", "cache": path or null, "reason": text}.
    submitit's own pickle of a result, which lies beside it, is never read: who can write it could run code here.
    """

    root: Path

    @abstractmethod
    def work(self) -> Path | None:
        """Do the work of the job; returns the cache that it made, if any."""

    def __call__(self) -> None:
        import submitit

        answer = _path(Workspace(self.root), submitit.JobEnvironment().job_id, "answer.json")
        answer.unlink(missing_ok=True)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # submitit answers from here on; see cluster_job
            made = self.work()
        except submitit.core.utils.UncompletedJobError as error:  # raised where it was when its time was over
            over = FeatprobeError(f"{error} Give it more time, as --slurm time=600 (minutes); it goes on where it was.")
            write_failure(answer, over)
            raise over from error
        except Exception as error:
            write_failure(answer, error)
            raise
        write_whole(answer, json.dumps({"ended": "success", "cache": made and str(made.resolve()), "reason": ""}))

    def checkpoint(self) -> Any:
        """The job that submitit puts into the queue instead of the job that is stopped."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def write_failure(answer: Path, error: Exception) -> None:
    """Write the answer of a job that an error ended."""
    lines = str(error).strip().splitlines() or [""]
    reason = lines[0] if isinstance(error, FeatprobeError) else f"{type(error).__name__}: {lines[0]}"
    write_whole(answer, json.dumps({"ended": "error", "cache": None, "reason": reason[:1000]}))


@dataclass(frozen=True)
class Extraction(_Again):
    """Makes the cache of a place, or goes on with it; returns where it is."""

    root: Path
    place: Place

    def work(self) -> Path:
        """The cache's path."""
        return make_cache(Workspace(self.root), self.place).path


@dataclass(frozen=True)
class Climb(_Again):
    """Finds the iterations of a training on the cache that a job has made; known rungs are not trained again."""

    root: Path
    study: Study
    cell: Cell
    extraction: str

    def work(self) -> None:
        """Climbs until the iterations are found."""
        workspace = Workspace(self.root)
        ladder = ladder_of(workspace, self.study, _made(workspace, self.extraction), self.cell)
        assert ladder is not None  # the plan names none but those that climb
        ladder.climb(_log)


@dataclass(frozen=True)
class TrainingJob(_Again):
    """Does a training on the cache that a job has made."""

    root: Path
    study: Study
    cell: Cell
    extraction: str
    verify: bool = False

    def work(self) -> None:
        """Trains, and appends the row; raises FeatprobeError where that fails."""
        workspace = Workspace(self.root)
        cache = _made(workspace, self.extraction)
        report = run_cells(workspace, self.study, cache, [self.cell], _log, verify=self.verify)
        for note in report.notes:
            _log(f"note: {note}")
        if report.failed:
            raise FeatprobeError(report.failed[0][1])


def submit_study(
    workspace: Workspace, study: Study, slurm: Mapping[str, Any], say: Say, *, verify: bool = False
) -> Handed:
    """Hand what is missing of a study over to SLURM: an array of extractions, and behind it arrays of each cache.

    Each training waits for its own extraction, which ends at once where the cache is complete, and for the ladders that
    find the iterations of all backbones it is compared with. What is in the queue already is not handed over again.
    slurm: parameters of submitit's SlurmExecutor; others are handed to sbatch. say: gets the plan first. verify: as
    for `run_grid`. Raises FeatprobeError where there is no submitit or no SLURM, or SLURM refuses.
    """
    root = workspace.root.resolve()
    executor = _executor(root / JOBS, slurm)
    queue = _queue()
    plan = run_grid(workspace, study, say, dry_run=True, verify=verify)
    here_only = [(cell, reason) for cell, reason in plan.failed if cell in plan.missing]  # as for want of memory
    plan = replace(plan, failed=tuple(pair for pair in plan.failed if pair not in here_only))
    latest = _handed_over(root / JOBS / "jobs.jsonl")
    queued = [cell for cell in plan.missing if latest.get(_key(study, cell)) in queue]
    wanted = [cell for cell in plan.missing if cell not in queued]
    if queued:
        why = Counter(queue[job] for job in latest.values() if queue.get(job, "None") != "None")
        waits = "; ".join(f"{counted(count, 'job')} {reason}" for reason, count in why.items())
        say(
            f"{counted(len(queued), 'training is', 'trainings are')} in the queue already"
            + (f" (SLURM says of those that wait: {waits})" if waits else "")
        )
    for cell in wanted:
        if _key(study, cell) in latest:
            say(f"failed before: {cell}: {_reason(workspace, latest[_key(study, cell)])}")
    waiting = {cell: latest.get(_ladder_key(study, cell), "") for cell in plan.ladders}
    unknown = [cell for cell, job in waiting.items() if job not in queue]
    groups = by_cache(dict.fromkeys([*unknown, *wanted]))
    keys = {place: digest(asdict(place)) for place in groups}
    running = {place: latest[keys[place]] for place in groups if latest.get(keys[place]) in queue}
    missing = [place for place in groups if place not in running]
    made = dict[Place, str]()
    tasks = [Extraction(root, place) for place in missing]
    for place, job in zip(missing, _submit(executor, root / JOBS, tasks), strict=True):
        append_row(root / JOBS / "jobs.jsonl", {"what": keys[place], "job": job, "text": str(place)})
        made[place] = job
    extractions = running | made
    climbs = [Climb(root, study, cell, extractions[cell.place]) for cell in unknown]
    own = _hand_over(executor, root, climbs, lambda cell: _ladder_key(study, cell))
    trainings = [TrainingJob(root, study, cell, extractions[cell.place], verify) for cell in wanted]
    jobs = _hand_over(executor, root, trainings, lambda cell: _key(study, cell), waiting | dict(own))
    what = f"{counted(len(made), 'extraction')} and {counted(len(jobs), 'training')}"
    what += f", behind {counted(len(own), 'search', 'searches')} for iterations" if own else ""
    say(f"handed over: {what}; their logs: {root / JOBS}")
    return Handed(plan, tuple(made.values()), tuple(job for _, job in own), tuple(jobs), tuple(queued))


def _hand_over(
    executor: Any,
    root: Path,
    tasks: Sequence[Any],
    key: Callable[[Cell], str],
    ladders: Mapping[Cell, str] = MappingProxyType({}),
) -> list[tuple[Cell, str]]:
    """The jobs of tasks, (training, its job). Those that wait for the same jobs go over as one array.

    ladders: the jobs that find iterations, by the training that they find them for.
    """
    arrays: dict[str, list[Any]] = {}  # by the jobs that they wait for
    for task in tasks:
        behind = [task.extraction, *(job for cell, job in ladders.items() if _compared(cell) == _compared(task.cell))]
        arrays.setdefault(":".join(behind), []).append(task)
    jobs = []
    for waited, array in arrays.items():
        executor.update_parameters(dependency=f"afterany:{waited}")
        for task, job in zip(array, _submit(executor, root / JOBS, array), strict=True):
            append_row(root / JOBS / "jobs.jsonl", {"what": key(task.cell), "job": job, "text": str(task.cell)})
            jobs.append((task.cell, job))
    return jobs


def _compared(cell: Cell) -> tuple[Any, ...]:
    """The same for trainings whose backbones share a number of iterations."""
    return cell.place.data, cell.task, cell.head, cell.regime, cell.fraction, cell.split


def _log(line: str) -> None:
    """Say something in a job's log, which people read in a terminal."""
    print(printable(line))


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """The parameters of KEY=VALUE words; raises UsageError.

    >>> parameters(["partition=gpu", "time=120", "exclusive=true"])
    {'partition': 'gpu', 'time': 120, 'exclusive': True}
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key or key in OURS:
            why = "featprobe sets it" if key in OURS else "wanted: KEY=VALUE, as partition=gpu"
            raise UsageError(f"--slurm {word!r} can't be used: {why}. Nothing was handed over.")
        plain: Any = int(value) if value.isdecimal() else True if value == "true" else value
        found[key] = [*found.get(key, []), value] if key in LISTS else plain
    if not isinstance(found.get("time", 1), int):
        raise UsageError(f"--slurm time={found['time']} can't be used. wanted: minutes, as time=120.")
    return found


def _executor(folder: Path, slurm: Mapping[str, Any]) -> Any:
    """The executor that hands jobs to SLURM."""
    try:
        import submitit
    except ImportError as error:
        raise FeatprobeError(
            "--launcher slurm needs submitit, which is not installed. Nothing was handed over.\n"
            "Install it:  pip install 'featprobe[slurm]'"
        ) from error
    absent = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if absent:
        raise FeatprobeError(
            f"There is no {', '.join(absent)} on this machine. Nothing was handed over.\n"
            "wanted: a machine of a SLURM cluster, as its login node. Without one:  featprobe study FILE"
        )
    # submitit appends its own module to this command; ours does the same work, and ends in words
    executor = submitit.SlurmExecutor(folder, python=f"{shlex.quote(sys.executable)} -u -m {ENTRY}")
    values = {**USUAL, **slurm}
    if "no_requeue" in values:
        del values["requeue"]
    if "cpus_per_task" in values:  # since SLURM 22.05 srun does not take it from sbatch
        given = values.get("srun_args", [])
        values["srun_args"] = [f"--cpus-per-task={values['cpus_per_task']}", *given]
    known = {name: value for name, value in values.items() if name in submitit.SlurmExecutor._valid_parameters()}
    others = {name.replace("_", "-"): value for name, value in values.items() if name not in known}
    executor.update_parameters(**known, additional_parameters=others)
    return executor


def _submit(executor: Any, folder: Path, tasks: Sequence[Any]) -> Iterator[str]:
    """The jobs of tasks, which go over as one array, or as several where SLURM takes no longer ones.

    The jobs of an array come before the next one goes over, so that they can be noted. What jobs read, which submitit
    writes into the folder, is on the disk then, where the disk does not refuse: SLURM has them either way.
    """
    if not tasks:
        return
    longest = re.search(r"^MaxArraySize\s*=\s*(\d+)$", _ask("scontrol", "show", "config"), re.MULTILINE)
    size = max(int(longest[1]), 1) if longest else len(tasks)
    for start in range(0, len(tasks), size):
        try:
            with redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what sbatch says, and raises it
                jobs = [executor.submit(task) for task in tasks[start : start + size]]
        except Exception as error:  # what sbatch says comes in several classes
            if isinstance(error, OSError) and (error.errno in REFUSALS or _is_in(folder, error.filename)):
                raise DiskError(
                    f"{error.filename or folder} can't be written: {error.strerror}.\n"
                    "What SLURM took before is in the queue (squeue). Make room or choose another disk, then run the "
                    "same command again: nothing is handed over twice."
                ) from error
            said = dict.fromkeys(line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines())
            raise FeatprobeError(
                f"SLURM takes no job: {'; '.join(filter(None, said))}.\n"
                "What it took before is in the queue (squeue). Correct what it names, as --slurm partition=NAME, and "
                "run the same command again: nothing is handed over twice."
            ) from error
        with suppress(OSError):
            sync_files(folder / f"{job.job_id}_submitted.pkl" for job in jobs)
        yield from (job.job_id for job in jobs)


def _is_in(folder: Path, name: object) -> bool:
    """Whether a name is that of a file in a folder."""
    return isinstance(name, str | os.PathLike) and Path(name).parent == folder


def _queue() -> dict[str, str]:
    """The user's jobs that wait or run, and why they wait: SLURM's word, "None" for those that run."""
    lines = _ask("squeue", "--noheader", "--array", "--format=%i %r", "--user", str(os.getuid())).splitlines()
    return {job: reason for job, _, reason in (line.strip().partition(" ") for line in lines)}


def _ask(*command: str) -> str:
    """What a command of SLURM prints; raises FeatprobeError."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FeatprobeError(f"{command[0]} can't be run: {error}") from error
    if asked.returncode:
        raise FeatprobeError(
            f"SLURM does not answer: {' '.join(asked.stderr.split())}\nNo more was handed over. Its state:  sinfo"
        )
    return asked.stdout


def _key(study: Study, cell: Cell) -> str:
    """What distinguishes a training from those of studies that train otherwise."""
    alike = replace(study, seeds=1, log=())
    said = {**asdict(cell), "split": str(cell.split)}
    return digest([said, asdict(alike.options(cell.task, cell.head, cell.regime))])


def _ladder_key(study: Study, cell: Cell) -> str:
    """The same for the ladder of a training."""
    return digest(["ladder", _key(study, cell)])


def _handed_over(path: Path) -> dict[str, str]:
    """The latest job of each thing that was handed over; lines that name no job are passed over."""
    pairs = [(row.get("what"), row.get("job")) for row in read_rows(path)[0]]
    return {what: job for what, job in pairs if isinstance(what, str) and isinstance(job, str) and JOB.fullmatch(job)}


def _made(workspace: Workspace, extraction: str) -> Cache:
    """The cache that a job has made; raises FeatprobeError."""
    answer = _answer(workspace, extraction)
    made = answer.get("cache") if answer.get("ended") == "success" else None
    if not isinstance(made, str):
        raise FeatprobeError(f"There is no cache to train on: {_reason(workspace, extraction)}")
    return open_cache(below(workspace.cache, Path(made), f"The answer of job {extraction}"))


def _answer(workspace: Workspace, job: str) -> dict[str, Any]:
    """The last report of a job, see `_Again`; empty if it reported nothing. Raises FeatprobeError."""
    path = _path(workspace, job, "answer.json")
    try:
        found = read_json(path, LONGEST_ANSWER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, FileKindError) as error:
        raise FeatprobeError(f"{path} can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _reason(workspace: Workspace, job: str) -> str:
    """Why a job has left no result, in a line that names its log."""
    answer, log = _answer(workspace, job), _path(workspace, job, "log.err")
    said = answer.get("reason") if answer.get("ended") == "error" else "its result is gone" if answer else ""
    lines = said.strip().splitlines() if isinstance(said, str) else []
    if lines or answer:
        return f"{lines[0] if lines else f'job {job} gave no reason'} (see {log})"
    try:
        last = tail(log)
    except (OSError, FileKindError):
        return _without_log(job, log)
    if re.search(r"Can't get attribute .* on <module 'featprobe|No module named '?featprobe", last):
        return f"job {job} was handed over by another version of featprobe ({last}; see {log})"
    return f"job {job} ended without an answer{f'; its log ends: {last}' if last else ''} (see {log})"


def _without_log(job: str, log: Path) -> str:
    """Why a job has left no log, as far as SLURM still knows the job."""
    state, code, node = _end_of(job)
    if state.startswith("CANCELLED"):
        return f"job {job} was cancelled before it began"
    where = f"node {node} does" if node else "was it cancelled? Or its node does"
    slurm = f" (SLURM: {state}, exit code {code})" if state else ""
    return (
        f"job {job} left no log: {where} not see {log.parent}{slurm}. Keep the workspace in a folder that all nodes "
        "share, under the same path"
    )


def _end_of(job: str) -> tuple[str, str, str]:
    """(state, exit code, node) of a job that has ended; texts are empty where SLURM has forgotten the job."""
    with suppress(FeatprobeError):  # the controller forgets a job minutes after its end
        known = _ask("scontrol", "--oneliner", "show", "job", job)
        told = {word: value for word, _, value in (pair.partition("=") for pair in known.split())}
        return told.get("JobState", ""), told.get("ExitCode", ""), told.get("BatchHost", "")
    with suppress(FeatprobeError, ValueError):  # where accounts are kept
        known = _ask(
            "sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,NodeList"
        )
        state, code, node = known.splitlines()[0].split("|") if known.strip() else ("", "", "")
        return state, code, node.removeprefix("None assigned")
    return "", "", ""


def tail(log: Path) -> str:
    """The last line of a log that says something; raises OSError."""
    with open(log, "rb", opener=open_regular) as stream:
        stream.seek(max(os.fstat(stream.fileno()).st_size - LONGEST_TAIL, 0))
        lines = stream.read(LONGEST_TAIL).decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:300]


def _path(workspace: Workspace, job: str, end: str) -> Path:
    """A file of a job. Raises FeatprobeError for a name that is no job's."""
    if not JOB.fullmatch(job):
        raise FeatprobeError(f"{job[:80]!r} is not a job. wanted: SLURM's number, as 12 or 12_3.")
    return workspace.root.resolve() / JOBS / f"{job}_0_{end}"
