"""The scores of each task: names, labels, order, places in a result row. Only this module lists them.

The first score of a task is the main one: trials and weights are chosen by it on validation, backbones are compared by
it, and validation curves are read for it. Of objects it is AP50. Inspection asks whether a flaw is found; the outline
of a flaw that is a few pixels wide is not known to an IoU of 0.75, so AP over ten thresholds is also about the labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

FEW_GROUPS = 20  # test groups; with fewer, every interval rests on guesses about groups that nobody has seen
On = Literal["pixels", "boxes", "masks", "images", "anomalies"]
"""The labels that a task's scores are compared with: of images, their labels; of anomalies, which images are good, and
the pixels of defects where these are known."""


@dataclass(frozen=True)
class Score:
    """One score of a task.

    name: in a row's `val`, in a comparison and in its files. label: for people. place: keys below a row's `test`.
    column: in the table of results, where it is not the label. how: how it is taken, where this needs a word.
    """

    name: str
    label: str
    place: tuple[str, ...]
    column: str = ""
    how: str = ""

    @property
    def title(self) -> str:
        """The title of its column in the table of results."""
        return self.column or self.label

    def is_stated(self, test: Mapping[str, Any]) -> bool:
        """Whether a row's `test` names the score: one from before the score came does not."""
        try:
            at(test, self.place)
        except KeyError:
            return False
        return True

    def of(self, test: Mapping[str, Any]) -> float | None:
        """The value in a row's `test`; None where the score does not exist, or is not named."""
        return at(test, self.place) if self.is_stated(test) else None


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task.

    on: what is compared with the labels. compared: the scores of a comparison, the main one first. shown: the scores of
    the table of results, in its order. per_class: what a score of one class is called, and its place in a row's `test`;
    both empty where classes have none.
    resamples: of the groups of a test split, for an interval; those of average precision are dear, as each leaves every
    group out once. chosen_before: the score that trials were chosen by where a row does not say. how: how scores are
    taken, in few words. why: what a reader of a comparison should know of them, and of the main one. lacks: what a test
    split is that gives no main score. ranked: the score that ranks what the heads of all folds found; "" for none.
    chance: the main score of a head that knows nothing.
    """

    on: On
    compared: tuple[Score, ...]
    shown: tuple[Score, ...]
    per_class: tuple[str, tuple[str, ...]]
    resamples: int
    chosen_before: str
    how: str
    why: str
    lacks: str = "holds no object to find"
    ranked: str = ""
    chance: float = 0.0

    @property
    def main(self) -> Score:
        """The score that chooses and is compared."""
        return self.compared[0]

    @property
    def every(self) -> tuple[Score, ...]:
        """The scores that are compared, then those that are only shown."""
        return tuple({score.name: score for score in (*self.compared, *self.shown)}.values())

    def how_of(self, test: Mapping[str, Any]) -> tuple[str, ...]:
        """How the scores of a row's `test` are taken, without what concerns only scores that it lacks."""
        own = (score.how for score in self.shown if score.how and score.of(test) is not None)
        return *own, self.how

    def of_classes(self, test: Mapping[str, Any]) -> Mapping[str, float | None]:
        """The score of each class in a row's `test`; empty where the task has none."""
        _, place = self.per_class
        found: Mapping[str, float | None] = at(test, place) if place else {}
        return found

    @property
    def dense(self) -> bool:
        """Whether each pixel gets a class."""
        return self.on == "pixels"

    @property
    def objects(self) -> bool:
        """Whether objects are found."""
        return self.on in ("boxes", "masks")


def at(values: Any, place: Sequence[str]) -> Any:
    """The value under these keys, one below the other.

    >>> at({"box": {"ap50": 0.5}}, ("box", "ap50"))
    0.5
    """
    for name in place:
        values = values[name]
    return values


_FOREGROUND = Score("miou_foreground", "fg mIoU", ("miou_foreground",))
_MIOU = Score("miou", "mIoU", ("miou",))
_BOX_AP50 = Score("box_ap50", "box AP50", ("box", "ap50"))
_BOX_AP = Score("box_ap", "box AP", ("box", "ap"))
_MASK_AP50 = Score("mask_ap50", "mask AP50", ("mask", "ap50"))
_MASK_AP = Score("mask_ap", "mask AP", ("mask", "ap"))

_AUROC = Score("auroc", "AUROC", ("auroc",))
_IMAGE_AUROC = Score("image_auroc", "image AUROC", ("image_auroc",))
_FALSE_CALLS = Score("false_calls", "false calls", ("false_calls",))
_IMAGE_SCORES = (
    _AUROC,
    Score("average_precision", "AP", ("average_precision",)),
    Score("balanced_accuracy", "balanced accuracy", ("balanced_accuracy",), "bal. acc."),
    Score("macro_f1", "macro F1", ("macro_f1",)),
    Score("recall", "recall", ("recall",)),
    _FALSE_CALLS,
)
_ANOMALY_SCORES = (
    _IMAGE_AUROC,
    Score("pixel_auroc", "pixel AUROC", ("pixel_auroc",)),
    Score("aupro", "AUPRO", ("aupro",), how="AUPRO to 30 % of false positives"),
    Score("image_f1", "image F1", ("image_f1",)),
    Score("image_recall", "image recall", ("image_recall",)),
    _FALSE_CALLS,
)

_COCO = "AP as COCO defines it"
_WHY_AP50 = (
    "AP50 is the score of detection and instance segmentation: trials are chosen by it, and it is compared. "
    "Inspection asks whether a flaw is found, and labels of flaws that are a few pixels wide do not tell outlines "
    "apart at an IoU of 0.75 and more."
)
_RECALL = "recall and false calls at the threshold that was set on good validation images"
_WHY_RECALL = (
    "Recall is the share of defect images that are called, and false calls the share of good ones, at a threshold that "
    "lets a wanted share of the good validation images be called; the test images had no part in it."
)

SCORES: Mapping[str, TaskScores] = {
    "semseg": TaskScores(
        on="pixels",
        compared=(_FOREGROUND, _MIOU),
        shown=(_MIOU, _FOREGROUND),
        per_class=("IoU", ("iou",)),
        resamples=10_000,
        chosen_before="miou_foreground",
        how="IoU over all its pixels",
        why="The classes are those of the test split's truth; a pixel that was given another class counts against the "
        "one that it was taken from.",
    ),
    "detect": TaskScores(
        on="boxes",
        compared=(_BOX_AP50, _BOX_AP),
        shown=(
            replace(_BOX_AP, column="AP"),
            replace(_BOX_AP50, column="AP50"),
            Score("box_ap75", "box AP75", ("box", "ap75"), "AP75"),
            Score("box_ar100", "box AR100", ("box", "ar100"), "AR100"),
        ),
        per_class=("AP", ("box", "per_class")),
        resamples=1_000,
        chosen_before="box_ap",
        how=_COCO,
        why=_WHY_AP50,
        ranked="AP",
    ),
    "instseg": TaskScores(
        on="masks",
        compared=(_MASK_AP50, _MASK_AP),
        shown=(_MASK_AP, _MASK_AP50, _BOX_AP, _BOX_AP50),
        per_class=("AP", ("mask", "per_class")),
        resamples=1_000,
        chosen_before="mask_ap",
        how=_COCO,
        why=_WHY_AP50,
        ranked="AP",
    ),
    "classify": TaskScores(
        on="images",
        compared=_IMAGE_SCORES,
        shown=_IMAGE_SCORES,
        per_class=("AUROC", ("per_class",)),
        resamples=10_000,
        chosen_before="auroc",
        how=f"AUROC and AP as means over labels; {_RECALL}",
        why="AUROC is the share of pairs of an image with a label and one without it in which the first is ranked "
        "higher, as a mean over labels; 50 % is chance. It needs no threshold, so trials are chosen by it, and it is "
        "compared. AP of images is the mean precision over the images with a label, without interpolation. Where one "
        "of two labels says good, both are of the other one. Labels that the test split lacks take no part. "
        + _WHY_RECALL,
        lacks="does not hold images both with and without any label",
        ranked="AUROC",
        chance=0.5,
    ),
    "anomaly": TaskScores(
        on="anomalies",
        compared=_ANOMALY_SCORES,
        shown=_ANOMALY_SCORES,
        per_class=("", ()),
        resamples=1_000,
        chosen_before="image_auroc",
        how=_RECALL,
        why="Image AUROC is the share of pairs of a defect image and a good one in which the first is ranked higher; "
        "50 % is chance. It is compared. Pixel AUROC is the same of pixels, and AUPRO the mean share of each defect "
        "region that is found, over all shares of good pixels up to 30 %; both need the truth of pixels. "
        + _WHY_RECALL,
        lacks="does not hold both good and defect images",
        ranked="AUROC",
        chance=0.5,
    ),
}
"""The scores of each task."""
LABELS: Mapping[str, str] = {score.name: score.label for task in SCORES.values() for score in task.compared}
"""The printed name of each score that is compared; of the scores in one line the first is the main one."""
