"""Everything on the built-in data sets: images, cache, probe, table, pictures."""

from collections.abc import Callable, Sequence

from featprobe.errors import counted
from featprobe.kinds import TASKS
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.training.probe import ProbeReport, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace


def demo(
    workspace: Workspace,
    say: Callable[[str], None],
    device: str | None = None,
    data: Sequence[str] = ("xray", "surface"),
) -> ProbeReport:
    """Probe both built-in sets with the embedded backbone, and with random weights as the control."""
    options = ExtractOptions(device=device)
    labels = []
    for name in data:
        for random_init in (False, True):
            spec = workspace.backbone("embedded", random_init=random_init)
            report = extract(workspace, spec, name, options)
            labels.append(spec.label)
            made = counted(report.computed, "image") if report.computed else "there already"
            say(f"{spec.label} on {name}: {made}, {report.path}")
    return probe(workspace, TASKS[0], data, sorted(set(labels)), ProbeOptions(seeds=1, device=device, show=4), say)
