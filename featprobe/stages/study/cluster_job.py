"""The process of one job of a study on a cluster: `python -m featprobe.stages.study.cluster_job ... FOLDER`.

submitit's own process loads what was handed over and runs it. This one looks first whether that can be done here, and
what stops it is said in words, in the job's log and in its answer.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from featprobe.errors import FeatprobeError
from featprobe.io.texts import printable
from featprobe.machine import tune_memory

STOPS = {signal.SIGUSR1, signal.SIGUSR2}  # what SLURM sends before it stops a job; which one is set for submitit
WAIT = 60.0  # seconds: as long as a shared folder may take until a node sees a new file


def main() -> None:
    """Do the job of this process, as the environment names it; exits with 1 where it fails in words."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # they wait until the job can go back into the queue
    tune_memory()
    import submitit.core.submission

    from featprobe.stages.study.cluster import write_failure

    folder = Path(sys.argv[-1])  # submitit's own words for Python stand before it
    os.environ["SUBMITIT_FOLDER"] = str(folder)
    paths = submitit.JobEnvironment().paths
    try:
        try:
            loaded(paths.submitted_pickle)
        except FeatprobeError as error:
            if folder.is_dir():
                write_failure(Path(paths.result_pickle).with_name(f"{paths.job_id}_0_answer.json"), error)
            raise
        submitit.core.submission.process_job(folder)
    except FeatprobeError as error:
        sys.exit(f"featprobe: {printable(str(error))}")


def loaded(path: Path) -> Any:
    """What was handed over to a job. Raises FeatprobeError where it is not seen here, or is of another version."""
    from submitit.core.utils import DelayedSubmission

    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > WAIT:
            raise FeatprobeError(
                f"{path} is not seen on {os.uname().nodename}, after {WAIT:.0f} seconds. Nothing was computed.\n"
                "Keep the workspace in a folder that all nodes share, under the same path, and run the study again."
            )
        time.sleep(0.5)
    try:
        handed = DelayedSubmission.load(path)
        strange = sorted(set(_strange(handed.function)))
    except Exception as error:  # whatever the classes of another version come to
        strange = [" ".join(str(error).split()) or type(error).__name__]
    if strange:
        raise FeatprobeError(
            f"This job was handed over by another version of featprobe, or its file is damaged: {'; '.join(strange)}. "
            "Nothing was computed.\nRun the study again: the version that is installed hands over what is missing."
        )
    return handed


def _strange(value: Any) -> Iterator[str]:
    """Settings that a value of another version lacks, or has too many of, as words."""
    if is_dataclass(value):
        own, wanted = vars(value), {field.name for field in fields(value)}
        name = type(value).__name__
        yield from (f"its {name} has no {key}" for key in wanted - own.keys())
        yield from (f"its {name} has an unknown {key}" for key in own.keys() - wanted if not hasattr(type(value), key))
        value = tuple(own.values())
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for inner in value:
            yield from _strange(inner)


if __name__ == "__main__":
    main()
