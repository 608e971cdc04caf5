"""Curves of a training while it runs, for TensorBoard and for Weights & Biases. Their names are known without torch."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from featprobe.errors import ProbeError, nearest
from featprobe.kinds import TrainRecipe

if TYPE_CHECKING:
    from torch import Tensor

PROJECT = "featprobe"  # of runs in Weights & Biases


class Log(Protocol):
    """The destination of the curves of one head."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step to their curves; steps come in order."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in a folder. What an earlier training left there from its first step on is taken back."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.writer: Any = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step to their curves."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files lie in a folder; WANDB_MODE=offline keeps it there."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(project=PROJECT, dir=folder, name=name, config=dict(config), reinit="create_new")
        except wandb.Error as error:
            raise ProbeError(
                f"Weights & Biases takes no run: {error}\nNothing was trained. Log in (wandb login), or keep its runs "
                "here (WANDB_MODE=offline)."
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step to their curves."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


LOGS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Kind of log, which is the name of its package and of the extra that installs it -> what writes it."""


def check_logs(kinds: Sequence[str]) -> None:
    """Raise ProbeError for a kind of log that does not exist or is not installed."""
    for kind in kinds:
        if kind not in LOGS:
            raise ProbeError(f"There is no log {kind!r}. {nearest(kind, LOGS)}")
        if find_spec(kind) is None:
            raise ProbeError(
                f"--log {kind} needs {kind}, which is not installed: pip install 'featprobe[{kind}]'\n"
                "Nothing was trained."
            )


class Recorder:
    """Collects the loss of every step, and hands it on at the marks of a training with rates and validation scores.

    places: (folder, name, values that tell what it is) of each head; recipes: of each. Without any kind
    it does nothing. Of several processes the main one alone writes. Losses stay on their device until a mark, so
    that no step waits for them.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        places: Sequence[tuple[Path, str, Mapping[str, Any]]],
        recipes: Sequence[TrainRecipe],
    ) -> None:
        self.kinds, self.places, self.recipes = kinds, places, recipes
        self.losses: list[Tensor] = []  # (heads,) of each step
        self.scores: Sequence[Mapping[str, float]] = ()
        self.logs: list[list[Log]] = []  # of each head

    def __enter__(self) -> "Recorder":
        from featprobe.processes import is_main

        self.logs = [[LOGS[kind](*place) for kind in self.kinds if is_main()] for place in self.places]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for log in (log for own in self.logs for log in own):
            log.close()

    def take(self, losses: "Tensor") -> None:
        """Keep the losses of a step, (heads,)."""
        if self.kinds:
            self.losses.append(losses)

    def mark(self, step: int) -> None:
        """Hand on what was collected until a step."""
        if not self.losses:
            return
        import torch

        from featprobe.probes.train import learning_rate

        steps = torch.stack(self.losses).float().cpu()  # (steps, heads)
        self.losses.clear()
        first = step - len(steps) + 1
        for own, recipe, losses, scores in zip(self.logs, self.recipes, steps.T.tolist(), self.scores, strict=True):
            for log in own:
                for number, loss in enumerate(losses, first):
                    values = {"train/loss": loss, "train/lr": recipe.lr * learning_rate(number - 1, recipe)}
                    if number == step:
                        values |= {f"val/{name}": score for name, score in scores.items()}
                    log.add(number, values)
