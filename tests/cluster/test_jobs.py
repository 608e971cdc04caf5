"""`study --launcher slurm` on a real SLURM, which `make cluster` starts: see slurm_here.py."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from slurm_here import SlurmHere
from test_study import CUT, SMALL, outcome, written

from featprobe.cli.main import cli
from featprobe.probes.saved import read_rows
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.study import read_study
from featprobe.stages.workspace import Workspace, make_generated

pytestmark = pytest.mark.cluster
ONE = SMALL.replace('["semseg", "detect"]', '["semseg"]').replace('"linear", "ridge"', '"linear"')
ONE = ONE.replace("seeds = 2", "seeds = 1").replace("[0.5, 1.0]", "[1.0]").replace('"frozen", "full"', '"frozen"')
TWELVE = ONE.replace("seeds = 1", "seeds = 3").replace("[1.0]", "[0.5, 1.0]").replace('"frozen"', '"frozen", "full"')
LONGEST = 600.0  # seconds: the machine may be busy with something else


@dataclass(frozen=True)
class Space:
    """A workspace, its study, and what a hand-over of it says."""

    workspace: Workspace
    study: Path

    def hand_over(self, *words: str) -> str:
        """What the command prints; it must succeed."""
        done = self.command(*words)
        assert done.exit_code == 0, done.output
        return done.stderr

    def command(self, *words: str) -> Result:
        """`featprobe study STUDY --launcher slurm`, with words for --slurm."""
        arguments = ["--workspace", str(self.workspace.root), "study", str(self.study), "--launcher", "slurm"]
        return CliRunner().invoke(cli, [*arguments, *(word for pair in words for word in ("--slurm", pair))])

    def rewrite(self, text: str) -> "Space":
        """The same workspace with another study."""
        self.study.write_text(text)
        return self

    @property
    def jobs(self) -> Path:
        """The folder of logs and answers."""
        return self.workspace.root / "jobs"

    def latest(self) -> list[str]:
        """Jobs that were handed over, in order."""
        return [str(row["job"]) for row in read_rows(self.jobs / "jobs.jsonl")[0]]


@pytest.fixture(scope="module")
def cluster() -> SlurmHere:
    """The cluster that runs."""
    if "FEATPROBE_CLUSTER" not in os.environ:
        pytest.skip("there is no cluster here: make cluster starts one, and runs these tests on it")
    return SlurmHere(Path(os.environ["FEATPROBE_CLUSTER"]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of all workspaces."""
    made = tmp_path_factory.mktemp("data")
    make_generated("surface", made / "surface", images=24, size=(64, 64))
    return made


def space(folder: Path, data: Path, text: str = ONE) -> Space:
    """A workspace of its own."""
    workspace = Workspace(folder)
    shutil.copytree(data, workspace.data)
    return Space(workspace, written(folder, text))


@pytest.fixture
def own(cluster: SlurmHere, tmp_path: Path, data: Path) -> Iterator[Space]:
    """A workspace, in a folder with a blank and a letter outside ASCII; its jobs are ended after the test."""
    made = space(tmp_path / "mein Gerät", data)
    yield made
    cluster.ask("scancel", *{job.partition("_")[0] for job in made.latest()})


@dataclass(frozen=True)
class Waiting:
    """What takes SLURM a minute: begun with the first test, looked at by the last."""

    limited: Space
    lock: Path
    unseen: Space
    other: Space

    @property
    def log(self) -> Path:
        """Of the training whose time is limited."""
        return self.limited.jobs / f"{self.limited.latest()[-1]}_0_log.out"

    def free(self) -> None:
        """Once the limited job is in the queue again, let it write: to a new file, which nobody holds."""
        until(lambda: self.log.exists() and "Requeued job" in self.log.read_text())
        self.lock.unlink()


@pytest.fixture(scope="module", autouse=True)
def waiting(cluster: SlurmHere, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Waiting]:
    """Jobs on nodes that see no workspace, and a job that waits for a file of results beyond its time limit."""
    apart = (cluster.folder / "slurmd-apart.pid").exists()
    made = Waiting(
        space(tmp_path_factory.mktemp("limited") / "space", data),
        tmp_path_factory.getbasetemp() / "limited0" / "space" / "probes" / "results.jsonl",
        space(cluster.hidden / "unseen", data),
        space(cluster.hidden / "other", data),
    )
    if apart:
        made.unseen.hand_over("partition=apart")
        cluster.ask("srun", "--partition=apart", "mkdir", "-p", str(made.other.jobs))
        made.other.hand_over("partition=apart")
    made.lock.parent.mkdir()
    with made.lock.open("a") as held:
        made.limited.hand_over("time=2", "signal_delay_s=30")  # the signal comes after 60 to 90 seconds
        fcntl.lockf(held, fcntl.LOCK_EX)  # until then the job waits to write its row
        threading.Thread(target=made.free, daemon=True).start()
        yield made


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def waits(cluster: SlurmHere, own: Space) -> dict[str, str]:
    """The jobs of a workspace in the queue, and what each waits for."""
    lines = cluster.ask("squeue", "--noheader", "--array", "--format=%i %E").splitlines()
    jobs = {job: re.sub(r"afterany:|\(\w+\)", "", what) for job, _, what in (line.partition(" ") for line in lines)}
    return {job: jobs[job] for job in own.latest() if job in jobs}


def ended(cluster: SlurmHere, own: Space) -> bool:
    return not waits(cluster, own)


def have_begun(cluster: SlurmHere, *spaces: Space) -> bool:
    """Whether what SLURM calls running has begun: a job that dies with the daemon that starts it is SLURM's matter."""
    running = cluster.ask("squeue", "--noheader", "--array", "--states=RUNNING,CONFIGURING", "--format=%i").split()
    logs = [own.jobs / f"{job}_0_log.out" for own in spaces for job in own.latest() if job in running]
    return all(log.exists() and "Starting with" in log.read_text() for log in logs)


def test_a_study_of_12_cells_ends_as_a_local_one_though_the_daemon_of_its_node_is_killed(
    cluster: SlurmHere, own: Space, waiting: Waiting, tmp_path: Path, data: Path
) -> None:
    told = own.rewrite(TWELVE).hand_over("cpus_per_task=1")
    assert "12 trainings on 1 cache" in told and "1 extraction and 12 trainings" in told
    until(lambda: list(own.jobs.glob("*_*_0_log.out")))  # a training has begun
    with cluster.no_new_jobs("main"):
        until(lambda: have_begun(cluster, own, waiting.limited))
        cluster.kill_node("main")
        with pytest.raises(ProcessLookupError):
            until(lambda: os.kill(int((cluster.folder / "slurmd-main.pid").read_text()), 0))
        time.sleep(1)
        cluster.start_node("main")
    local = space(tmp_path / "local", data)
    run_grid(local.workspace, read_study(written(tmp_path, TWELVE), local.workspace))
    until(lambda: ended(cluster, own))
    logs = [path.read_text() for path in own.jobs.glob("*_log.out")]
    assert len(logs) == 13 and all(log.count("Starting with") == 1 for log in logs), "each job ran once"
    assert outcome(own.workspace) == outcome(local.workspace) and len(outcome(local.workspace)) == 12
    again = own.hand_over()
    assert "12 trainings are there already" in again and "0 extractions and 0 trainings" in again


def test_what_waits_in_the_queue_is_not_handed_over_twice(cluster: SlurmHere, own: Space) -> None:
    own.rewrite(TWELVE).hand_over("hold=true", "time=30")
    made, *trainings = own.latest()
    arrays = {job.partition("_")[0] for job in trainings}
    assert len(trainings) == 12 and len(arrays) == 2, "this SLURM takes 8 tasks in an array"
    assert waits(cluster, own) == {made: "(null)"} | dict.fromkeys(trainings, made) or waits(cluster, own)[made] == ""
    assert {waits(cluster, own)[job] for job in trainings} == {made}
    assert "TimeLimit=00:30:00" in cluster.ask("scontrol", "show", "job", made)
    again = own.hand_over()
    assert "12 trainings are in the queue already" in again and "0 extractions and 0 trainings" in again
    assert "JobHeldUser" in again
    more = own.rewrite(TWELVE.replace("seeds = 3", "seeds = 4")).hand_over("hold=true")
    assert "0 extractions and 4 trainings" in more, "they wait for what is in the queue"
    assert {waits(cluster, own)[job] for job in own.latest()[13:]} == {made}
    cluster.ask("scancel", *arrays)
    after = own.hand_over("hold=true")
    assert "4 trainings are in the queue already" in after and "0 extractions and 12 trainings" in after
    assert f"job {trainings[0]} was cancelled before it began" in after


def test_trainings_wait_for_the_iterations_of_all_backbones(cluster: SlurmHere, own: Space) -> None:
    text = ONE.replace("iterations = 3", 'iterations = "auto"').replace("[1.0]", "[0.5]")
    own.rewrite(text.replace('-random"]', '-random", "mobilenetv2_100-random"]'))
    first = own.hand_over("hold=true")
    assert "2 extractions and 2 trainings, behind 2 searches for iterations" in first
    one, other, *ladders, last, last_other = own.latest()
    behind = waits(cluster, own)
    assert [behind[job] for job in ladders] == [one, other]
    assert [set(behind[job].split(",")) for job in (last, last_other)] == [{one, *ladders}, {other, *ladders}]
    again = own.hand_over("hold=true")
    assert "0 extractions and 0 trainings;" in again and "searches" not in again
    cluster.ask("scancel", ladders[1])
    more = own.hand_over("hold=true")
    assert "0 extractions and 0 trainings, behind 1 search for iterations" in more


def test_jobs_of_whole_images_and_of_tiles_are_not_taken_for_each_other(cluster: SlurmHere, own: Space) -> None:
    text = CUT.replace('"frozen", "full"', '"frozen"')
    own.rewrite(text.replace("[0, 32]", "[0]").replace(', "hflip, crop:1"', ""))
    assert "1 extraction and 1 training" in own.hand_over("hold=true")
    all_of_it = own.rewrite(text).hand_over("hold=true")
    assert "1 training is in the queue already" in all_of_it and "3 extractions and 3 trainings" in all_of_it
    before = own.latest()
    again = own.rewrite(text.replace("overlap = 4", "overlap = 8")).hand_over("hold=true")
    assert "2 trainings are in the queue already" in again, "those of whole images"
    assert "2 extractions and 2 trainings" in again
    cluster.ask("scancel", *{job.partition("_")[0] for job in before})
    cluster.ask("scontrol", "release", *{job.partition("_")[0] for job in own.latest()[len(before) :]})
    until(lambda: ended(cluster, own))
    rows, _ = read_rows(own.workspace.probes / "results.jsonl")
    assert sorted((r["tile"], bool(r["augmentation"])) for r in rows) == [(32, False), (32, True)]
    assert len({r["feature_key"] for r in rows}) == 2


def test_a_training_on_a_cache_that_could_not_be_made_says_so(cluster: SlurmHere, own: Space, tmp_path: Path) -> None:
    (tmp_path / "empty" / "images").mkdir(parents=True)
    own.rewrite(ONE.replace('["surface"]', f'["{tmp_path / "empty"}"]')).hand_over()
    until(lambda: ended(cluster, own))
    for job in own.latest():
        log = (own.jobs / f"{job}_0_log.err").read_text()
        assert "featprobe: " in log and "Traceback" not in log
    assert "failed before" in (said := own.hand_over("hold=true")) and "There is no cache to train on" in said


def test_what_slurm_refuses_is_told(cluster: SlurmHere, own: Space) -> None:
    for word, said in (
        ("partition=nowhere", "invalid partition specified: nowhere"),
        ("gres=gpu:1", "Invalid generic resource"),
    ):
        answer = own.command(word)
        assert answer.exit_code == 1 and said in answer.stderr, answer.stderr
        assert "Traceback" not in answer.stderr and "sbatch: error" not in answer.stderr
    assert own.latest() == [] and not own.workspace.cache_files()


def test_a_job_of_another_version_ends_in_words(cluster: SlurmHere, own: Space) -> None:
    own.rewrite(ONE.replace("seeds = 1", "seeds = 3")).hand_over("hold=true")
    _, moved, fewer, sound = (own.jobs / f"{job}_submitted.pkl" for job in own.latest())
    moved.write_bytes(moved.read_bytes().replace(b"TrainingJob", b"TrainingOld"))
    fewer.write_bytes(fewer.read_bytes().replace(b"false_calls", b"other_calls"))
    assert sound.is_file()
    cluster.ask("scontrol", "release", *{job.partition("_")[0] for job in own.latest()})
    until(lambda: ended(cluster, own))
    assert len(read_rows(own.workspace.probes / "results.jsonl")[0]) == 1
    again = own.hand_over("hold=true")
    assert again.count("handed over by another version of featprobe") == 2
    assert "TrainingOld" in again and "its Study has an unknown other_calls; its Study has no false_calls" in again
    for job in own.latest()[1:3]:
        log = (own.jobs / f"{job}_0_log.err").read_text()
        assert "another version of featprobe" in log and "Traceback" not in log


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_second_cluster_runs_beside_this_one_and_leaves_nothing_when_it_is_stopped(
    cluster: SlurmHere, stop: signal.Signals
) -> None:
    words = "echo $FEATPROBE_CLUSTER; sinfo --noheader --nodes main --format=%T; sleep 600"
    command = [sys.executable, Path(__file__).with_name("slurm_here.py"), "--required", "sh", "-c", words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as second:
        assert second.stdout is not None
        folder = Path(second.stdout.readline().strip())
        assert second.stdout.readline().strip() == "idle" and folder != cluster.folder
        daemons = [int(path.read_text()) for path in folder.glob("*.pid")]
        assert len(daemons) >= 3 and all(Path(f"/proc/{daemon}").exists() for daemon in daemons)
        second.send_signal(stop)
        assert second.wait(60) == 128 + stop
    assert not folder.exists() and not any(Path(f"/proc/{daemon}").exists() for daemon in daemons)
    assert cluster.state("main") in ("idle", "mixed", "allocated")


def test_a_job_whose_time_is_over_goes_on_in_another_turn(cluster: SlurmHere, waiting: Waiting) -> None:
    own = waiting.limited
    until(lambda: ended(cluster, own))
    log = waiting.log.read_text()
    assert log.count("Requeued job") == 1 and log.count("linear, frozen, seed 0") == 2
    assert len(read_rows(waiting.lock)[0]) == 1
    assert "1 training is there already" in own.hand_over()


def test_a_node_that_does_not_see_the_workspace_is_named(cluster: SlurmHere, waiting: Waiting) -> None:
    if not waiting.unseen.jobs.is_dir():
        pytest.skip("a node without the shared folder needs a mount, which is not allowed here")
    for own in (waiting.unseen, waiting.other):
        until(lambda own=own: ended(cluster, own))
        said = own.hand_over("partition=apart", "hold=true")
        assert f"job {own.latest()[1]} left no log: node apart does not see {own.jobs}" in said
        assert "in a folder that all nodes share" in said
    there = cluster.ask("srun", "--partition=apart", "sh", "-c", f"cat '{waiting.other.jobs}'/*.err")
    assert "is not seen on" in there and "in a folder that all nodes share" in there and "Traceback" not in there
