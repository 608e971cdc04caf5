"""What a head is, as its card says it, and the checks of cards (probes/README.md). Nothing here imports torch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from featprobe.errors import FieldError
from featprobe.image_labels import MOST_NAMES
from featprobe.io.fields import MISSING_FIELD, Fault, limits, made, wrong
from featprobe.io.schemas import check
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.result_rows import result_faults
from featprobe.scores import SCORES
from featprobe.specs import MOST_CHANNELS, MOST_CLASSES, MOST_LEVELS, MOST_STRIDE, BackboneSpec, DataInfo, FeatureRecipe

HEAD_FILE = "head.safetensors"
MOST = max(MOST_CLASSES, MOST_NAMES)  # classes, of what a card may claim
MOST_WIDTH = 2**12  # channels, of what a card may claim

WHOLE = ("features", "backbone", "data", "result", "curve", "versions")
"""Fields that the card of a head trained by featprobe has, but that loading the head does not need."""


@dataclass(frozen=True)
class HeadRecipe:
    """The description of a head: its task, its kind, its classes (the background first), the levels it takes.

    levels: names; empty for every level that there is. width: channels of its pyramid or
    hidden layer, None for the kind's own, see `kinds.KINDS`. pyramid: "levels" as they are, "simple" from the last
    one, "auto": simple where all have one stride. sides: of the training objects, see detections.detection_strides.
    """

    task: str
    kind: str
    classes: tuple[str, ...]
    levels: tuple[str, ...] = ()
    width: int | None = None
    pyramid: PyramidKind = "auto"
    sides: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "HeadRecipe":
        """The recipe that `to_json` wrote; raises FieldError that names every field that is wrong."""
        return made(cls, data, "A head's recipe")

    def faults(self) -> list[Fault]:
        """Values that no head has: see `from_json`."""
        least = least_classes(self.task)
        return limits({
            "classes": (least <= len(self.classes) <= MOST, f"{least} to {MOST} names", self.classes),
            "width": (self.width is None or 1 <= self.width <= MOST_WIDTH, f"1 to {MOST_WIDTH} channels", self.width),
            "sides": (len(self.sides) in (0, 3) and min(self.sides, default=0) >= 0, "3 lengths, or none", self.sides),
        })  # fmt: skip


def least_classes(task: str) -> int:
    """The least number of classes that heads of a task tell apart: one label that images have or not is enough."""
    return 1 if task in SCORES and SCORES[task].on == "images" else 2


@dataclass(frozen=True)
class Fingerprint:
    """The values, fields of FeatureRecipe, in which features must agree with those that a head was trained on.

    A field with a default may be missing, where the recipe does not keep its usual value.
    """

    backbone: str
    weights_sha256: str
    levels: tuple[FeatureLevel, ...]
    final_norm: bool
    channels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    intensity: str


@dataclass(frozen=True)
class Point:
    """A point of a validation curve; loss: None where it was not finite."""

    iteration: int
    loss: float | None
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class SavedFile:
    """A card's entry on a file beside it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Card:
    """The fields of a card; head, features, backbone, data and result have their own checks."""

    format: str
    version: int
    head: Mapping[str, Any]
    fingerprint: Fingerprint
    head_sha256: str
    features: Mapping[str, Any] | None = None
    backbone: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    read_as: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, SavedFile] = field(default_factory=dict)


PARTS: Mapping[str, tuple[Any, Callable[[Any], object]]] = {
    "head": (HeadRecipe, HeadRecipe.from_json),
    "features": (FeatureRecipe, FeatureRecipe.from_json),
    "backbone": (BackboneSpec, BackboneSpec.from_json),
    "data": (DataInfo, DataInfo.from_json),
}


def _claims(card: Mapping[str, Any]) -> list[Fault]:
    """The faults of levels that no backbone has, and of a head's hash that is not that of its file."""
    levels, place = card["fingerprint"]["levels"], ("fingerprint", "levels")
    faults = [wrong(place, f"1 to {MOST_LEVELS} levels", len(levels))] if not 1 <= len(levels) <= MOST_LEVELS else []
    for i, level in enumerate(levels[:MOST_LEVELS]):
        for name, most in (("channels", MOST_CHANNELS), ("stride", MOST_STRIDE)):
            if not 1 <= level[name] <= most:
                faults.append(wrong((*place, i, name), f"1 to {most}", level[name]))
    stated = card.get("files", {}).get(HEAD_FILE)
    if stated and stated["sha256"] != card["head_sha256"]:
        faults.append(wrong(("files", HEAD_FILE, "sha256"), "that of head_sha256", stated["sha256"]))
    return faults


def card_faults(card: Mapping[str, Any], *, whole: bool = False) -> list[Fault]:
    """The faults of a card: fields of wrong types, out of their limits, or in conflict with each other.

    Unknown fields are ignored, because a newer featprobe may write them. whole: no field of WHOLE may be missing;
    `backbone` may be null.
    """
    faults = check(Card, card, closed=False, empty_texts=True)
    faults += [Fault((name,), MISSING_FIELD) for name in WHOLE if whole and name not in card]
    for name, (kind, parse) in PARTS.items():
        own = card.get(name)
        if not isinstance(own, Mapping):
            if own is None and name in card and name != "backbone":
                faults.append(wrong((name,), "a table", None))
            continue
        try:
            parse({key: value for key, value in own.items() if key in {known.name for known in fields(kind)}})
        except FieldError as error:
            faults += [fault.below(name) for fault in error.faults]
    faults += [] if faults else _claims(card)
    if isinstance(card.get("result"), Mapping):
        faults += [fault.below("result") for fault in result_faults(card["result"])]
    features = card.get("features")
    if not faults and features is not None:
        for name in (known.name for known in fields(Fingerprint)):
            said = card["fingerprint"].get(name)
            if said != features.get(name, said):
                faults.append(wrong(("fingerprint", name), "what features say", said))
    return list(dict.fromkeys(faults))
