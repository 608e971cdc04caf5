"""What `--launcher slurm` says without a cluster; tests/cluster has what it does on one."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from submitit.core.utils import DelayedSubmission
from test_study import SMALL, written

from featprobe.cli.main import cli
from featprobe.errors import DiskError, FeatprobeError
from featprobe.probes.saved import read_rows
from featprobe.stages.study import cluster, cluster_job
from featprobe.stages.study.cluster import TrainingJob, _reason
from featprobe.stages.study.cluster_job import loaded
from featprobe.stages.study.study import cells_of, read_study
from featprobe.stages.workspace import Workspace, make_generated


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "space")
    make_generated("surface", made.data / "surface", images=24, size=(64, 64))
    return made


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with programs of SLURM, none of which is ever to take a job."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        replace_program(folder / name, f"touch {folder / 'called'}; exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def replace_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def hand_over(workspace: Workspace, study: Path, *words: str) -> Result:
    arguments = ["--workspace", str(workspace.root), "study", str(study), "--launcher", "slurm"]
    return CliRunner().invoke(cli, [*arguments, *(word for pair in words for word in ("--slurm", pair))])


def test_words_that_can_not_be_used_are_told(workspace: Workspace, tmp_path: Path, programs: Path) -> None:
    study = written(tmp_path, SMALL)
    for word, said in (
        ("partition", "KEY=VALUE"),
        ("array=1-5", "featprobe sets it"),
        ("time=1:00:00", "minutes"),
    ):
        answer = hand_over(workspace, study, word)
        assert answer.exit_code == 2 and said in answer.stderr
    assert CliRunner().invoke(cli, ["study", str(study), "--slurm", "partition=gpu"]).exit_code == 2
    assert not (programs / "called").exists()


def test_the_absence_of_slurm_or_of_its_controller_is_told(
    workspace: Workspace, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = written(tmp_path, SMALL)
    replace_program(programs / "squeue", "echo no controller >&2; exit 1")
    answer = hand_over(workspace, study)
    assert answer.exit_code == 1 and "SLURM does not answer: no controller" in answer.stderr
    (programs / "squeue").unlink()
    monkeypatch.setenv("PATH", str(programs))
    answer = hand_over(workspace, study)
    assert answer.exit_code == 1 and "There is no squeue on this machine" in answer.stderr
    monkeypatch.setitem(sys.modules, "submitit", None)
    answer = hand_over(workspace, study)
    assert answer.exit_code == 1 and "featprobe[slurm]" in answer.stderr
    assert not workspace.cache_files() and not (programs / "called").exists()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED DUE TO TIME LIMIT ***\n\n",
            "its log ends: slurmstepd: error",
        ),
        ("", "job 7 ended without an answer (see "),
        ("x\n" * 100000 + "Detected 1 oom-kill event\n", "its log ends: Detected 1 oom-kill event"),
        (
            "Traceback\nAttributeError: Can't get attribute 'Extraction' on <module 'featprobe.stages.study.cluster'>",
            "job 7 was handed over by another version of featprobe (AttributeError",
        ),
        ("ModuleNotFoundError: No module named 'featprobe.cluster'", "job 7 was handed over by another version"),
        ("python: No module named featprobe.stages.study.cluster_job", "job 7 was handed over by another version"),
        ("\x1b[31mred\n", "its log ends: "),
    ],
)
def test_the_end_of_a_log_says_why_a_job_has_no_answer(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "7_0_log.err").write_text(log)
    reason = _reason(Workspace(tmp_path), "7")
    assert said in reason and "\x1b" not in reason and len(reason.splitlines()) == 1


@dataclass(frozen=True)
class Known:
    """What `scontrol show job` and `sacct` still know, and what is said of a job without a log."""

    scontrol: str
    sacct: str
    said: str


FORGOTTEN = "echo Invalid job id specified >&2; exit 1"


@pytest.mark.parametrize(
    "known",
    [
        Known("echo JobId=7 JobState=CANCELLED Reason=None", "exit 1", "job 7 was cancelled before it began"),
        Known(
            "echo JobId=7 JobState=FAILED Reason=JobLaunchFailure ExitCode=0:53 BatchHost=n2",
            "exit 1",
            "node n2 does not see {jobs} (SLURM: FAILED, exit code 0:53)",
        ),
        Known(FORGOTTEN, "echo 'FAILED|0:53|n2'", "node n2 does not see {jobs} (SLURM: FAILED, exit code 0:53)"),
        Known(FORGOTTEN, "echo 'CANCELLED by 1000|0:0|None assigned'", "job 7 was cancelled before it began"),
        Known(FORGOTTEN, "true", "its node does not see {jobs}. Keep"),
        Known(FORGOTTEN, "echo Slurm accounting storage is disabled >&2; exit 1", "its node does not see {jobs}. Keep"),
    ],
)
def test_a_job_without_a_log_was_cancelled_or_did_not_see_the_workspace(
    tmp_path: Path, programs: Path, known: Known
) -> None:
    replace_program(programs / "scontrol", known.scontrol)
    replace_program(programs / "sacct", known.sacct)
    reason = _reason(Workspace(tmp_path), "7")
    assert known.said.format(jobs=tmp_path / "jobs") in reason


class Full:
    """An executor of a SLURM that takes one array and no more; arrays have up to two tasks."""

    def __init__(self) -> None:
        self.tasks: list[SimpleNamespace] = []

    def update_parameters(self, **parameters: str) -> None:
        """What it is given does not matter."""

    def submit(self, task: TrainingJob) -> SimpleNamespace:
        self.tasks.append(SimpleNamespace(job_id=f"1_{len(self.tasks)}"))
        return self.tasks[-1]

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield
        if len(self.tasks) > 2:
            raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")


def test_jobs_that_slurm_took_are_noted_where_it_takes_no_more(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(written(tmp_path, SMALL), workspace)
    jobs = [TrainingJob(workspace.root, study, cell, "7") for cell in cells_of(study, workspace)[:5]]
    monkeypatch.setattr(cluster, "_ask", lambda *command: "MaxArraySize = 2\n")
    with pytest.raises(FeatprobeError, match="SLURM takes no job: QOSMaxSubmitJobPerUserLimit"):
        cluster._hand_over(Full(), workspace.root, jobs, str)
    rows, _ = read_rows(workspace.root / "jobs" / "jobs.jsonl")
    assert [(row["what"], row["job"]) for row in rows] == [(str(jobs[0].cell), "1_0"), (str(jobs[1].cell), "1_1")]


@pytest.mark.parametrize(
    ("error", "disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "JOBS/1.pkl"), True),
        (PermissionError(errno.EACCES, "Permission denied", "/usr/bin/sbatch"), False),
        (RuntimeError("sbatch: error: no such partition"), False),
    ],
    ids=str,
)
def test_a_disk_that_takes_no_job_is_not_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, disk: bool
) -> None:
    monkeypatch.setattr(cluster, "_ask", lambda *command: "")
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.replace("JOBS", str(tmp_path))

    def submit(task: object) -> None:
        raise error

    executor = SimpleNamespace(batch=nullcontext, submit=submit)
    with pytest.raises(FeatprobeError) as caught:
        list(cluster._submit(executor, tmp_path, ["task"]))
    said = str(caught.value)
    assert isinstance(caught.value, DiskError) is disk and ("Make room" in said) is disk
    assert f"{tmp_path}" in said if disk else "SLURM takes no job" in said and "--slurm partition=NAME" in said


def test_a_job_of_another_version_is_refused_in_words(workspace: Workspace, tmp_path: Path) -> None:
    study = read_study(written(tmp_path, SMALL), workspace)
    job = TrainingJob(workspace.root, study, cells_of(study, workspace)[0], "1")
    path = tmp_path / "1_submitted.pkl"
    DelayedSubmission(job).dump(path)
    whole = path.read_bytes()
    assert loaded(path).function == job
    for old, new, said in (
        (b"TrainingJob", b"TrainingOld", "Can't get attribute 'TrainingOld'"),
        (b"study.cluster", b"study.clusteX", "No module named 'featprobe.stages.study.clusteX'"),
        (b"false_calls", b"other_calls", "its Study has an unknown other_calls; its Study has no false_calls"),
        (b"fraction", b"fracture", "its Cell has an unknown fracture; its Cell has no fraction"),
    ):
        assert whole.count(old)
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(FeatprobeError, match="another version of featprobe") as caught:
            loaded(path)
        assert said in str(caught.value) and "Run the study again" in str(caught.value)
    path.write_bytes(whole[:-20])
    with pytest.raises(FeatprobeError, match="another version of featprobe"):
        loaded(path)


def test_where_there_is_no_slurm_its_tests_are_skipped_with_a_reason(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "cluster" / "slurm_here.py"
    for words, code in (([], 0), (["--required"], 1)):
        command = [sys.executable, program, *words, "touch", tmp_path / "run"]
        done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        assert done.returncode == code and "sbatch" in done.stdout and "apt-get install slurmctld" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_job_that_does_not_see_what_was_handed_over_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_job, "WAIT", 0.1)
    with pytest.raises(
        FeatprobeError, match="is not seen on .* in a folder that all nodes share".replace(" in", "(.|\n)*in")
    ):
        loaded(tmp_path / "1_submitted.pkl")
