"""A whole study: from its file to the page that answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featprobe.stages.comparison.compare import Comparison, compare
from featprobe.stages.study.cluster import parameters, submit_study
from featprobe.stages.study.grid import StudyReport, run_grid
from featprobe.stages.study.study import read_study
from featprobe.stages.training.run import Say
from featprobe.stages.workspace import Workspace


@dataclass(frozen=True)
class StudyAnswer:
    """The result of a study.

    report: its trainings. comparison: of the results that they have; None where there are none yet. submitted, queued:
    how many trainings were handed to a cluster now, and how many were in its queue; None where the study ran here.
    """

    report: StudyReport
    comparison: Comparison | None
    submitted: int | None = None
    queued: int | None = None

    @property
    def page(self) -> Path | None:
        """The page that compares the results, if there is one."""
        return self.comparison.files[0] if self.comparison else None


def run_study(
    workspace: Workspace,
    file: str | Path,
    say: Say = lambda line: None,
    *,
    dry_run: bool = False,
    verify: bool = False,
    log: Sequence[str] = (),
    slurm: Sequence[str] | None = None,
    quiet: bool = False,
) -> StudyAnswer:
    """Run what is missing of a study, and compare its results on a page in probes/report/STUDY.

    Run it again to continue after a stop. A training that fails is reported, and the others go on.

    file: a study file, see `featprobe study --template`. say: gets the plan first, then what is being done. dry_run:
    make the plan only. verify: check all bytes of the saved heads, not only their sizes. log: curves to write beside
    those that the file names, "tensorboard" or "wandb". slurm: None to run here, else parameters of the SLURM jobs that
    do it, as ["partition=gpu"]. quiet: show no progress bar of the comparison.

    Raises DataError that lists everything that is wrong with the file, FeatprobeError where SLURM refuses.
    """
    study = read_study(Path(file), workspace)
    study = replace(study, log=tuple(dict.fromkeys([*study.log, *log])))
    submitted = queued = None
    if slurm is None or dry_run:
        report = run_grid(workspace, study, say, dry_run=dry_run, verify=verify)
    else:
        handed = submit_study(workspace, study, parameters(slurm), say, verify=verify)
        report, submitted, queued = handed.plan, len(handed.jobs), len(handed.queued)
    page = workspace.probes / "report" / Path(file).stem
    due = report.rows or (report.folders and not (dry_run or report.missing))
    comparison = compare(workspace, page, quiet=quiet, folders=report.folders) if due else None
    return StudyAnswer(report, comparison, submitted, queued)
