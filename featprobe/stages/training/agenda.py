"""Trainings one after another: how many there are, how long they take together, how much of it is gone and left."""

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence

from featprobe.errors import counted
from featprobe.machine import minutes_text, time_text
from featprobe.stages.training.fit import Say
from featprobe.stages.training.forecast import Forecast, forecast_text
from featprobe.stages.training.run import foreseen
from featprobe.stages.training.training import Training


def alike(training: Training) -> Hashable:
    """The same for trainings that take equally long: those that differ in the seed or the fold."""
    folds = training.choice.whole
    count = len(training.seeds)
    return training.partition.source.path, training.task, training.options, training.fraction, folds, count


def foreseen_each(trainings: Sequence[Training]) -> dict[Hashable, Forecast]:
    """How long trainings will take, by what they are `alike` in; without those that are solved: nothing foretells them.

    Raises ProbeError for one whose steps do not fit the memory.
    """
    first = {alike(training): training for training in reversed(trainings) if not training.is_solved}
    return {key: foreseen(training) for key, training in reversed(first.items())}


def on_the_agenda(trainings: Sequence[Training], say: Say) -> Iterator[tuple[Training, Forecast | None]]:
    """Each training with its forecast, when its turn comes; one alone says itself how long it takes.

    Raises ProbeError before the first, for one whose steps do not fit the memory.
    """
    if len(trainings) == 1:
        yield trainings[0], None
        return
    known = foreseen_each(trainings)
    agenda = Agenda.of_trainings(trainings, known, say)
    agenda.announce()
    for training in trainings:
        forecast = known.get(alike(training))
        agenda.begin(forecast_text(training, forecast) if forecast else training.label)
        yield training, forecast
        agenda.end()


class Agenda:
    """Trainings that are done one after another.

    of: for each of them, what is the same for those that take equally long. foretold: seconds of one, by that, as a few
    steps tell. What has run corrects that: seconds of its own kind count where there are some, and else what is
    foretold as many times longer as those that have run took. say: gets the whole time first, then a line before each.
    """

    def __init__(self, of: Sequence[Hashable], foretold: Mapping[Hashable, float], say: Say) -> None:
        self.of, self.foretold, self.say = of, foretold, say
        self.number, self.took = 0, dict[Hashable, list[float]]()
        self._begun = self._last = time.monotonic()

    @classmethod
    def of_trainings(cls, trainings: Sequence[Training], known: Mapping[Hashable, Forecast], say: Say) -> "Agenda":
        """That of these trainings. known: what `foreseen_each` found of them."""
        of = [alike(training) for training in trainings]
        foretold = {key: known[key].seconds(own.recipe) for key, own in zip(of, trainings, strict=True) if key in known}
        return cls(of, foretold, say)

    def announce(self, more: str = "") -> None:
        """Say how many there are, and how long they will take in all. more: words for the end of the line."""
        self.say(f"{counted(len(self.of), 'training')}, {self._text('in all')}{more}")

    def begin(self, what: str) -> None:
        """Say which one begins, and what time is gone and left."""
        self._last = time.monotonic()
        gone = f"{time_text(self._last - self._begun)} gone, " if self.number else ""
        left = self._text("left")
        self.number += 1
        self.say(f"[{self.number}/{len(self.of)}] {what}; {gone}{left}")

    def end(self) -> None:
        """Note how long the one that began took; one that failed is not noted."""
        self.took.setdefault(self.of[self.number - 1], []).append(time.monotonic() - self._last)

    def left(self) -> tuple[float, int]:
        """Seconds of those that have not begun, and the number of those of which nothing is known."""
        ran = [(sum(own), len(own) * self.foretold[key]) for key, own in self.took.items() if key in self.foretold]
        slower = sum(took for took, _ in ran) / max(sum(told for _, told in ran), 1e-9) if ran else 1.0
        seconds, unknown = 0.0, 0
        for key in self.of[self.number :]:
            if key in self.took:
                seconds += sum(self.took[key]) / len(self.took[key])
            elif key in self.foretold:
                seconds += slower * self.foretold[key]
            else:
                unknown += 1
        return seconds, unknown

    def _text(self, word: str) -> str:
        seconds, unknown = self.left()
        if unknown and unknown == len(self.of) - self.number:
            return f"time {word} is not known before one has run"
        more = f", and {counted(unknown, 'training')} whose time is not known yet" if unknown else ""
        return f"{minutes_text(seconds)} {word}{more}"
