"""A SLURM of this machine, for the length of one command: `python tests/cluster/slurm_here.py COMMAND...`.

It starts munge, a controller and two nodes without systemd and as the user who runs it. Keys, sockets, ports and state
are its own and lie below one temporary folder, so two at once do not meet. The second node, "apart", sees an empty
folder where the others see `hidden`: a cluster without a shared folder. It is absent where the user may not mount.

The command finds SLURM_CONF in its environment, and the folder in FEATPROBE_CLUSTER. When it ends, or is stopped, every
process of the cluster is ended and the folder removed. Where there can be no cluster it says why and exits with 0; with
--required before the command, with 1.
"""

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # often not on a user's PATH
LONGEST_START = 20.0  # seconds
CHILD_SUBREAPER = 36  # of prctl(2): daemons that leave their parent become children of this process
CONF = """
ClusterName=featprobe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
JobRequeue=0
MinJobAge=3600
MaxArraySize=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=main NodeHostname={host} NodeAddr=127.0.0.1 Port={main} CPUs=3
NodeName=apart NodeHostname={host} NodeAddr=127.0.0.1 Port={apart} CPUs=4
PartitionName=main Nodes=main Default=YES
PartitionName=apart Nodes=apart
"""


class NoClusterError(Exception):
    """There can be no cluster here."""


class SlurmHere:
    """The cluster in a folder; `hidden` is the folder that node "apart" does not see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hidden = folder / "hidden"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that use the cluster."""
        path = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return own | {
            "PATH": path,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "FEATPROBE_CLUSTER": str(self.folder),
        }

    def start(self) -> None:
        """Start the daemons, and wait until the nodes can be used. Raises NoClusterError."""
        for name in ("state", "spool-main", "spool-apart", "hidden"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                folder=self.folder, host=socket.gethostname().partition(".")[0], user=getpass.getuser(),
                **dict(zip(("controller", "main", "apart"), free_ports(3), strict=True)),
            )
        )  # fmt: skip
        files = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        self._run("munged", f"--key-file={key}", *(f"--{name}={self.folder / file}" for name, file in files.items()))
        self._run("slurmctld")
        self.start_node("main")
        names = ["main"]
        try:
            self.start_node("apart")
            names.append("apart")
        except NoClusterError as error:
            print(f"Without a node that sees no shared folder: {error}")
        for name in names:
            self.wait_for_node(name)

    def wait_for_node(self, name: str) -> None:
        """Wait until jobs can run on a node. Raises NoClusterError."""
        deadline = time.monotonic() + LONGEST_START
        while (state := self.state(name)) not in ("idle", "mixed", "allocated"):
            if time.monotonic() > deadline:
                raise NoClusterError(f"node {name} is {state or 'unknown'}.\n{self.logs()}")
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        if name != "apart":
            self._run("slurmd", "-N", name)
            return
        rights, back = [], ""
        if os.getuid():  # a user may mount as the root of a namespace of its own, and is itself again in one inside it
            rights = ["--map-root-user"]
            back = f"unshare --map-user={os.getuid()} --map-group={os.getgid()} "
        hide = f'mount -t tmpfs none "{self.hidden}" && exec {back}slurmd -N apart'
        self._run("unshare", "--mount", *rights, "sh", "-c", hide)

    def kill_node(self, name: str) -> None:
        """`kill -9` of a node's daemon; its jobs stay."""
        os.kill(int((self.folder / f"slurmd-{name}.pid").read_text()), signal.SIGKILL)

    @contextlib.contextmanager
    def no_new_jobs(self, name: str) -> Iterator[None]:
        """A node begins no further job; those that run go on."""
        self.ask("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
        yield
        self.ask("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def state(self, name: str) -> str:
        """The state of a node."""
        return self.ask("sinfo", "--noheader", "--format=%T", "--nodes", name).strip()

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        ends = [(path.name, path.read_text(errors="replace").splitlines()[-6:]) for path in self.folder.glob("*.log")]
        return "\n".join(f"  {name}: {line}" for name, lines in sorted(ends) for line in lines)

    def _run(self, *command: str) -> None:
        """Start a daemon, which leaves this process."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise NoClusterError(f"{command[0]} does not start: {done.stderr.strip()}\n{self.logs()}")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]


def descendants(process: int) -> Iterator[int]:
    """The processes that a process has started, and those that these have started."""
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                yield child
                yield from descendants(child)


def finished(command: "subprocess.Popen[bytes]") -> int:
    """The exit code of a command. Until it ends, the ended daemons and jobs that became children here are let go."""
    while True:
        process, status = os.waitpid(-1, 0)
        if process == command.pid:
            command.returncode = os.waitstatus_to_exitcode(status)
            return command.returncode if command.returncode >= 0 else 128 - command.returncode


def end_all() -> None:
    """End every process below this one."""
    deadline = time.monotonic() + 10
    while (left := list(descendants(os.getpid()))) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def main(command: list[str]) -> int:
    """Run a command on a cluster; returns its exit code."""
    required = command[:1] == ["--required"]
    command = command[required:]
    path = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        print(
            f"No cluster is started: there is no {', '.join(absent)} on this machine. The tests on SLURM are skipped.\n"
            "On Debian and Ubuntu:  apt-get install slurmctld slurmd munge   (13 MB)"
        )
        return int(required)
    ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="featprobe-slurm-"))
    folder.chmod(0o755)  # munge asks for it
    cluster = SlurmHere(folder)
    try:
        cluster.start()
        return finished(subprocess.Popen(command, env=cluster.environment))
    except NoClusterError as error:
        print(f"No cluster is started: {error}\nThe tests on SLURM are skipped.")
        return int(required)
    except KeyboardInterrupt:
        return 130
    finally:
        end_all()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
