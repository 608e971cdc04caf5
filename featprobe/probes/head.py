"""The contract of heads: what each must define, for those who train, score, save and predict with them.

A new dense head is a subclass of DenseHead, a row of `kinds.KINDS` and a builder in `probes.heads`; of your own, it is
given to `kinds.register_head`. The subclass sets `levels`, `classes` and `bias`, and defines `stride` and `forward`.
All else is the same for every head: the losses, the training loop, scores, files, prediction, fine-tuning, and the
tests of `tests/probes/test_heads.py`. `probes.contract.check_head` runs those that any head can be held to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.detections import Candidates, Detections, ObjectBatch, ObjectTarget


class Head(nn.Module, ABC):
    """A model that is trained on features, whatever it finds in them.

    levels: those that it reads of the levels that there are, finest first. classes: how many, the background counted.
    Its parameters and buffers are what is saved of it: all else follows from its recipe and the levels.
    """

    levels: tuple[FeatureLevel, ...]
    classes: int

    @property
    def assignment(self) -> dict[str, str]:
        """The objects that each stride looks for, for people; empty for a head that looks for none."""
        return {}


class DenseHead(Head):
    """A head that gives each pixel a class.

    bias: (classes,), added to the logits as the last step. Before training it is set to the logarithm of the classes'
    frequencies, by `start_at`; a head that keeps its bias elsewhere defines that method instead.
    """

    bias: nn.Parameter

    @property
    @abstractmethod
    def stride(self) -> int:
        """Frame pixels per cell of the logits, along both axes. It is the stride of a level, or a divisor of one."""

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits of every cell: (batch, classes, frame height / stride, frame width / stride), the background first.

        features: with the maps of at least `levels`, on the head's device. Cells of nothing but padding must not change
        the logits of others: statistics leave them out (`Features.valid_share`), and the logits that stand there are
        those of `over_padding`.
        """

    @torch.no_grad()
    def start_at(self, prior: Tensor) -> None:
        """Begin by predicting these frequencies of the classes. prior: (classes,), > 0, of sum 1."""
        self.bias.copy_(prior.log())

    if TYPE_CHECKING:

        def __call__(self, features: Features) -> Tensor: ...


class VerdictHead(Head):
    """A head that gives each image one score of a defect, above which the image is called.

    threshold: a scalar, nan until it is chosen on validation. banks: names of buffers with a row per stored example, of
    which a saved head may have any number. Thresholds are float64 and stay with the CPU: Apple's GPUs have no float64.
    """

    banks: tuple[str, ...] = ()
    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda own: own if own.dtype == torch.float64 else fn(own), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        for name in self.banks:
            held, found = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(found, Tensor) and (found.shape[1:], found.dtype) == (held.shape[1:], held.dtype):
                setattr(self, name, held.new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *more)
        faulty = [name for name in self.banks if not getattr(self, name).isfinite().all()]
        more[-1].extend(f"{name} holds values that are not finite" for name in faulty)


class ImageHead(VerdictHead):
    """A head that gives each image a label, or several of them, from one vector per image.

    prior: (classes,), the share of the training images that has each label. A label is decided by the ratio of its
    probability to it, as if all were equally frequent.
    """

    prior: Tensor

    @abstractmethod
    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, (images, classes), of vectors as `features.Pooled.vectors` gives them: (images, values), float32.

        Their softmax, or where an image may have several labels their sigmoid, are probabilities.
        """

    @abstractmethod
    def solve(
        self, vectors: Tensor, labels: Tensor, val: Tensor, score: Callable[[Tensor], float], *, multi: bool
    ) -> dict[str, Any]:
        """Solve for the head, its prior included; returns what was decided, as a result row keeps it.

        vectors: (images, values), float32, of training. labels: (images, classes), uint8, 1 where a label holds; one
        per image unless `multi`. val: vectors of validation. score: of logits there; what is chosen scores highest.
        """

    @abstractmethod
    def begin(self, vectors: Tensor, labels: Tensor, *, multi: bool) -> None:
        """Make a new head ready for training: its prior, and its normalisation from vectors of the untouched backbone.

        vectors, labels, multi: as for `solve`. Raises ProbeError for a head that is only solved.
        """

    if TYPE_CHECKING:

        def __call__(self, vectors: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Anomalies:
    """What an anomaly head finds in a batch. It grows with the distance from good images; it has no upper bound.

    scores: (batch,). maps: (batch, rows, columns), of cells as the head has them; None for a head without maps.
    """

    scores: Tensor
    maps: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """What was decided as a head was fitted to good images.

    chosen: plain values, as a result row keeps them. notes: what people must know of it, a text each.
    """

    chosen: Mapping[str, Any]
    notes: Sequence[str]


class AnomalyHead(VerdictHead):
    """A head that knows good images alone, and says how unlike them an image is, from its maps.

    map_threshold: a scalar, of its maps at the size of images; nan until it is set on validation.
    """

    map_threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("map_threshold", torch.tensor(float("nan"), dtype=torch.float64))

    @property
    @abstractmethod
    def stride(self) -> int:
        """Frame pixels per cell of its maps, along both axes."""

    @abstractmethod
    def fit(self, passes: Callable[[], Iterable[Features]], seed: int, *, coreset: float, remove_position: bool) -> Fit:
        """Set its buffers from good images. Raises ProbeError where there are none.

        passes: gives their features, always in the same order, each time that it is called; a batch is read before the
        next is asked for. seed: of all that is drawn. coreset: the share of the cells that a bank keeps, in (0, 1].
        remove_position: whether the mean map of good images is taken from each map.
        """

    @abstractmethod
    def forward(self, features: Features) -> Anomalies:
        """What it finds in features, with the maps of at least `levels`. Cells of nothing but padding are not seen."""

    if TYPE_CHECKING:

        def __call__(self, features: Features) -> Anomalies: ...


class PooledAnomalyHead(VerdictHead):
    """The same from one vector per image, without maps."""

    @abstractmethod
    def fit(self, passes: Callable[[], Iterable[Tensor]], seed: int) -> Fit:
        """Set its buffers from the vectors of good images, (images, values) each; else as AnomalyHead.fit."""

    @abstractmethod
    def forward(self, vectors: Tensor) -> Anomalies:
        """What it finds in vectors as `features.Pooled.vectors` gives them: (images, values), float32."""

    if TYPE_CHECKING:

        def __call__(self, vectors: Tensor) -> Anomalies: ...


class ObjectHead(Head):
    """A head that finds objects: boxes with a class and a score, with or without masks."""

    @property
    @abstractmethod
    def assignment(self) -> dict[str, str]:
        """The objects that each stride looks for, for people: a head's card shows it."""

    @abstractmethod
    def forward(self, features: Features, targets: Sequence[ObjectTarget] | None = None) -> Tensor | list[Detections]:
        """The loss, a scalar, where targets are given, one per image; else what it finds in each image.

        Of several processes each gets its part of the loss: these add up to that of the whole batch.
        """

    def candidates(self, features: Features) -> Candidates:
        """What it could have found in each image, for exported graphs: `best_of` these is what `forward` finds.

        No shape or step in it may depend on values. Raises ProbeError for a head that can't say it, and so can't be
        exported.
        """
        raise ProbeError(
            f"A head of this kind can't be exported: its suppression is its own.\n  found   {type(self).__name__}\n"
            "  wanted  one that gives its candidates, see docs/add-a-head.md\nUse it with featprobe predict."
        )

    if TYPE_CHECKING:

        @overload
        def __call__(self, features: Features, targets: Sequence[ObjectTarget]) -> Tensor: ...
        @overload
        def __call__(self, features: Features) -> list[Detections]: ...
        def __call__(
            self, features: Features, targets: Sequence[ObjectTarget] | None = None
        ) -> Tensor | list[Detections]: ...


class BatchedObjectHead(ObjectHead):
    """An object head whose loss is the same work for every batch of one shape.

    On a GPU its training steps are recorded once and replayed; see `probes.train.train`. draws: whether it draws
    samples at random. Then `batch_loss` takes the random numbers from `ObjectBatch.keys`; on a CPU the head trains with
    `forward`, which draws for each image by itself.
    """

    draws: bool = False

    @abstractmethod
    def batch_loss(self, features: Features, targets: ObjectBatch) -> Tensor:
        """The loss that `forward` gives for the same objects: a scalar."""


def all_batched(heads: Sequence[ObjectHead], device: torch.device) -> list[BatchedObjectHead]:
    """The heads, where each of them has a `batch_loss` to train with on this device; else none of them."""
    whole = execution.whole_batches(device)
    found = [head for head in heads if isinstance(head, BatchedObjectHead) and (whole or not head.draws)]
    return found if len(found) == len(heads) else []


def faults_of(made: object, wanted: type[Head], levels: Sequence[FeatureLevel], classes: int) -> list[str]:
    """What a new head lacks of what its class must define; it is not run. levels: those that it may take."""
    if not isinstance(made, wanted):
        return [f"wanted a {wanted.__module__}.{wanted.__name__}, found a {type(made).__name__}"]
    faults, own = [], getattr(made, "levels", None)
    if not isinstance(own, tuple) or not own or [level for level in levels if level in own] != list(own):
        faults.append(f"levels: wanted a tuple of some of those that it may take, finest first; found {own!r}")
    if not isinstance(made, VerdictHead) or isinstance(made, ImageHead):
        found = getattr(made, "classes", None)
        if found != classes:
            faults.append(f"classes: wanted {classes}, the background counted; found {found!r}")
    if isinstance(made, DenseHead) and not faults:
        faults += _faults_of_dense(made, classes)
    return faults


def _faults_of_dense(made: DenseHead, classes: int) -> list[str]:
    faults, stride = [], made.stride
    if type(stride) is not int or stride < 1 or not any(level.stride % stride == 0 for level in made.levels):
        faults.append(f"stride: wanted the stride of one of its levels, or a divisor of one; found {stride!r}")
    bias = getattr(made, "bias", None)
    fits = isinstance(bias, nn.Parameter) and tuple(bias.shape) == (classes,)
    if not fits and type(made).start_at is DenseHead.start_at:
        found = f"one of shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
        faults.append(f"bias: wanted a parameter of shape ({classes},), or a method start_at; found {found}")
    return faults


def over_padding(logits: Tensor, content: Tensor | None, stride: int) -> Tensor:
    """Logits whose cells of nothing but padding repeat the nearest cell that holds some image.

    Else bilinear upsampling would mix padding into the image's last cells. logits: (batch, classes, rows,
    columns). content: (batch, 2), see Features; with None they are returned as they are.
    """
    if content is None:
        return logits
    for axis, cells in enumerate(logits.shape[2:]):
        last = (content[:, axis].long() - 1) // stride  # (batch,)
        index = torch.arange(cells, device=logits.device).minimum(last[:, None])  # (batch, cells)
        shape = (-1, 1, cells, 1) if axis == 0 else (-1, 1, 1, cells)
        logits = logits.gather(axis + 2, index.view(shape).expand_as(logits))
    return logits
