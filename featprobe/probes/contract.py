"""The contract of heads, run on a head: shapes, padding, gradients, saving and loading."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.kinds import PAGE, HeadKind, kind_of
from featprobe.levels import FeatureLevel
from featprobe.probes.cards import HeadRecipe
from featprobe.probes.detections import ObjectTarget
from featprobe.probes.heads import build_head
from featprobe.scores import SCORES, On

PYRAMID = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 6), (8, 9), (16, 12), (32, 15)))
ONE = PYRAMID[1:2]
BLOCKS = tuple(FeatureLevel(f"block{b}", 10, 16) for b in (2, 5, 8, 11))
FRAMES = {"four levels": (PYRAMID, (64, 96)), "one level": (ONE, (56, 40)), "one stride": (BLOCKS, (48, 80))}
"""Levels that a head meets, and a frame, (height, width) in pixels, for each of these."""
CLASSES = ("background", "pore", "crack")
SAME = 1e-4  # absolute and relative: what two ways to the same values may differ by
IMAGES = 12  # of the sets that heads are solved on
Check = Callable[["Trial"], str]


class Trial:
    """A new head of a kind for some levels, and what it is given. Each trial of a kind begins with the same values."""

    def __init__(self, kind: HeadKind, levels: Sequence[FeatureLevel], frame: tuple[int, int]) -> None:
        self.kind, self.available, self.frame = kind, levels, frame
        objects = SCORES[kind.task].objects
        self.recipe = HeadRecipe(kind.task, kind.name, CLASSES, sides=(9.0, 15.0, 50.0) if objects else ())
        self.head: Any = self.new(0)

    def new(self, seed: int) -> Any:
        """A new head, whose random values follow from a seed."""
        torch.manual_seed(seed)
        return build_head(self.recipe, self.available)

    def features(self, *, padded: bool = False, other: bool = False, dtype: torch.dtype = torch.float32) -> Features:
        """Features of two images. other: with other values in the padding."""
        rng = torch.Generator().manual_seed(1)
        height, width = self.frame
        content = torch.tensor([[height, width // 2], [height // 2, width]], dtype=torch.int32)
        maps = {}
        for level in self.available:
            rows, columns = level.cells(self.frame)
            m = torch.randn(2, level.channels, rows, columns, generator=rng)
            for i, (high, wide) in enumerate(content.tolist() if other else ()):
                m[i, :, -(-high // level.stride) :], m[i, :, :, -(-wide // level.stride) :] = 1000.0, 1000.0
            maps[level.name] = m.to(dtype)
        return Features(maps, self.frame, content if padded else None)

    def targets(self, *, empty: bool = False) -> list[ObjectTarget]:
        """Two objects in the first image, none in the second; or none at all."""
        masks = torch.zeros(2, *self.frame, dtype=torch.uint8)
        masks[0, 4:20, 3:21], masks[1, 16:34, 12:30] = 1, 1
        boxes, nothing = torch.tensor([[3.0, 4.0, 21.0, 20.0], [12.0, 16.0, 30.0, 34.0]]), torch.zeros(0, 4)
        none = ObjectTarget(nothing, torch.zeros(0, dtype=torch.int64), masks[:0], nothing)
        return [none, none] if empty else [ObjectTarget(boxes, torch.tensor([1, 2]), masks, nothing), none]

    def vectors(self) -> Tensor:
        """Pooled features of some images, (images, values)."""
        values = 2 * sum(level.channels for level in self.head.levels)
        return torch.randn(IMAGES, values, generator=torch.Generator().manual_seed(2))


def check_head(task: str, name: str) -> None:
    """Hold a head to the contract of `probes.head`, on made-up features; it takes seconds.

    The head is one of featprobe's, one that was registered, or one of another package. It is built for a pyramid of
    four levels, for one level, and for four levels of one stride. Raises ProbeError with all that it does not keep.
    """
    kind = kind_of(task, name)
    faults: list[str] = []
    for called, (levels, frame) in FRAMES.items():
        for check in CHECKS[SCORES[task].on]:
            with torch.random.fork_rng(devices=[]):
                said = _said_by(check, kind, levels, frame)
            faults += [f"{said} ({called})"] if said else []
    if faults:
        raise ProbeError(
            "\n  ".join([f"The {task} head {name} does not keep the contract of heads.", *faults]) + f"\n{PAGE}"
        )


def _said_by(check: Check, kind: HeadKind, levels: Sequence[FeatureLevel], frame: tuple[int, int]) -> str:
    try:
        return check(Trial(kind, levels, frame))
    except ProbeError:
        raise
    except Exception as error:  # a head of others may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"{check.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {lines[0][:200]}"


# ---- what any head can be held to ------------------------------------------------------------------------------------


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=SAME, atol=SAME)


def _saved_and_loaded(trial: Trial, found: Callable[[Any], list[Tensor]]) -> str:
    """Whether the state of a head is all that is to be saved of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "head.safetensors"
        save_file({name: value.clone().contiguous() for name, value in trial.head.state_dict().items()}, file)
        other = trial.new(1)
        other.load_state_dict(load_file(file), strict=True)
    same = all(_close(a, b) for a, b in zip(found(trial.head.eval()), found(other.eval()), strict=True))
    return "" if same else "loaded from what was saved of it, it finds something else: keep all of it in its state_dict"


def _seeded(trial: Trial) -> str:
    first, again = trial.new(3).state_dict(), trial.new(3).state_dict()
    same = first.keys() == again.keys() and all(
        torch.equal(value.nan_to_num(), again[name].nan_to_num()) for name, value in first.items()
    )
    return "" if same else "a seed does not give the same head again: draw its values from torch's generator"


def _moved(trial: Trial, loss: Tensor) -> str:
    """Whether a loss is a finite scalar that moves every parameter."""
    if loss.ndim or not loss.isfinite():
        return f"wanted a loss that is a finite scalar, found {loss}"
    loss.backward()
    still = [
        name for name, p in trial.head.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    if still:
        return f"no gradient reaches {', '.join(still[:4])}: remove them, or use them"
    broken = [name for name, p in trial.head.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {', '.join(broken[:4])} is not finite" if broken else ""


class _Watching(TorchDispatchMode):
    """Notes operators that wait for a GPU: those that need a value, or have a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.waits.add(func.name())
        return func(*args, **(kwargs or {}))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _logits(trial: Trial) -> str:
    head = trial.head.eval()
    wanted = (2, len(CLASSES), trial.frame[0] // head.stride, trial.frame[1] // head.stride)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.inference_mode():
            found = head(trial.features(dtype=dtype))
        if tuple(found.shape) != wanted or found.dtype != torch.float32 or not found.isfinite().all():
            return (
                f"wanted finite logits {wanted}, float32, of maps of {dtype}; found {tuple(found.shape)}, {found.dtype}"
            )
    return ""


def _beginning(trial: Trial) -> str:
    before = {name: value.clone() for name, value in trial.head.state_dict().items()}
    trial.head.start_at(torch.tensor([0.9, 0.06, 0.04]))
    after = trial.head.state_dict()
    changed = any(not torch.equal(before[name], after[name]) for name in before)
    return "" if changed else "start_at changes nothing: it sets the bias to the logarithm of the frequencies"


def _dense_loss(trial: Trial) -> str:
    logits = trial.head.train()(trial.features())
    truth = torch.arange(logits[:, 0].numel()).view(logits[:, 0].shape) % len(CLASSES)
    return _moved(trial, torch.nn.functional.cross_entropy(logits, truth))


def _no_waiting(trial: Trial) -> str:
    """Steps are recorded on a GPU, so none may look at a value; what is kept for later steps is made by the first.

    Of images that fill their frames: what is computed of others differs between a CPU and a GPU.
    """
    watching = _Watching()
    trial.head.train()(trial.features()).sum().backward()
    with watching:
        trial.head(trial.features()).sum().backward()
    said = "a step would wait for a GPU: no .item(), no bool of a tensor, no shape that depends on values"
    return f"{said} ({', '.join(sorted(watching.waits))})" if watching.waits else ""


def _padding_of_maps(trial: Trial) -> str:
    """In training and in evaluation, the second of which repeats the image's last cells in the padding."""
    start = {name: value.clone() for name, value in trial.head.state_dict().items()}
    for training in (True, False):
        found = []
        for other in (False, True):
            trial.head.load_state_dict(start)
            torch.manual_seed(4)
            with torch.inference_mode():
                found.append(trial.head.train(training)(trial.features(padded=True, other=other)))
        if not _close(*found):
            return "what lies in the padding changes its logits: see Features.valid_share and over_padding"
    return ""


def _saved_dense(trial: Trial) -> str:
    trial.head.start_at(torch.tensor([0.9, 0.06, 0.04]))
    with torch.inference_mode():
        return _saved_and_loaded(trial, lambda head: [head(trial.features())])


# ---- objects ---------------------------------------------------------------------------------------------------------


def _object_loss(trial: Trial) -> str:
    return _moved(trial, trial.head.train()(trial.features(), trial.targets()))


def _loss_of_nothing(trial: Trial) -> str:
    loss = trial.head.train()(trial.features(), trial.targets(empty=True))
    return "" if loss.ndim == 0 and loss.isfinite() else f"wanted a finite loss of images without objects, found {loss}"


def _parts(found: Any) -> list[Tensor]:
    return [part for own in found for part in (own.boxes, own.scores, own.labels)]


def _detections(trial: Trial) -> str:
    with torch.inference_mode():
        found = trial.head.eval()(trial.features())
    if not isinstance(found, list) or len(found) != 2:
        return f"wanted Detections of each of two images, found {type(found).__name__}"
    height, width = trial.frame
    for own in found:
        count, masks = len(own.scores), SCORES[trial.kind.task].on == "masks"
        inside = (own.boxes >= 0).all() and (own.boxes <= torch.tensor([width, height, width, height])).all()
        sound = own.boxes.shape == (count, 4) and own.labels.shape == (count,) and bool(inside)
        if not sound or not set(own.labels.tolist()) <= {1, 2} or (own.masks is not None) != masks:
            return "wanted boxes (n, 4) within the frame, labels from 1 on, scores, and masks for masks alone"
        if not (own.scores[:-1] >= own.scores[1:]).all():
            return "wanted the highest score first"
    return ""


def _padding_of_objects(trial: Trial) -> str:
    with torch.inference_mode():
        found = [_parts(trial.head.eval()(trial.features(padded=True, other=other))) for other in (False, True)]
    same = all(_close(a, b) for a, b in zip(*found, strict=True))
    return "" if same else "what lies in the padding changes what it finds: see Features.valid_share"


def _saved_objects(trial: Trial) -> str:
    with torch.inference_mode():
        return _saved_and_loaded(trial, lambda head: _parts(head(trial.features())))


# ---- whole images ----------------------------------------------------------------------------------------------------


def _solved(trial: Trial) -> str:
    """Solved where its kind says so, else begun; then its logits, saved and loaded."""
    labels = torch.nn.functional.one_hot(torch.arange(IMAGES) % len(CLASSES)).to(torch.uint8)
    if trial.kind.solved:
        vectors = trial.vectors()
        trial.head.solve(vectors, labels, vectors, lambda logits: -float(logits.float().var()), multi=False)
    if trial.kind.live:
        trial.head.begin(trial.vectors(), labels, multi=False)
        said = _moved(trial, torch.nn.functional.cross_entropy(trial.head.train()(trial.vectors()), labels.float()))
        if said:
            return said
    with torch.inference_mode():
        found = trial.head.eval()(trial.vectors())
        if tuple(found.shape) != labels.shape or not found.isfinite().all():
            return f"wanted finite logits {tuple(labels.shape)}, found {tuple(found.shape)}"
        return _saved_and_loaded(trial, lambda head: [head(trial.vectors())])


def _fitted(trial: Trial) -> str:
    """Fitted to good images; then scores and maps, saved and loaded."""
    if trial.kind.pooled:
        given: Any = trial.vectors()
        trial.head.fit(lambda: iter([given]), 0)
    else:
        given = trial.features()
        trial.head.fit(lambda: iter([given, given]), 0, coreset=0.5, remove_position=False)
    with torch.inference_mode():
        found = trial.head.eval()(given)
        count = IMAGES if trial.kind.pooled else 2
        if tuple(found.scores.shape) != (count,) or not found.scores.isfinite().all():
            return f"wanted {count} finite scores, found {tuple(found.scores.shape)}"
        cells = None if found.maps is None else tuple(found.maps.shape)
        wanted = None if trial.kind.pooled else (2, *(side // trial.head.stride for side in trial.frame))
        if cells != wanted:
            return f"wanted maps {wanted}, found {cells}"
        return _saved_and_loaded(trial, lambda head: [head(given).scores])


_OBJECTS = (_object_loss, _loss_of_nothing, _detections, _padding_of_objects, _saved_objects, _seeded)
CHECKS: Mapping[On, Sequence[Check]] = {
    "pixels": (_logits, _beginning, _dense_loss, _no_waiting, _padding_of_maps, _saved_dense, _seeded),
    "boxes": _OBJECTS,
    "masks": _OBJECTS,
    "images": (_solved, _seeded),
    "anomalies": (_fitted, _seeded),
}
"""What a task is scored on -> what its heads are held to: each says what is wrong, "" for nothing."""
