"""Modules of your own behind the face of timm's models, once a trial pass has shown that they keep the contract."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featprobe.backbones.precision import computing
from featprobe.errors import BackboneError
from featprobe.geometry import Size
from featprobe.levels import FeatureLevel
from featprobe.specs import INTERPOLATIONS

TRIAL: Size = (448, 224)  # frame of the trial pass of a network that does not say its size; not square on purpose
USUAL: Size = (224, 224)
SAME = 1e-3  # of a map's largest value: what an image's maps may differ by, alone or in a batch
WANTED = "images (batch, 3, height, width) -> a list of maps (batch, channels, rows, columns), finest first"
PAGE = "docs/add-a-backbone.md has the contract."


class OwnBackbone(Protocol):
    """What a module must be to serve as a backbone.

    Called with images it returns its maps, finest first: a list of (batch, channels, rows, columns), from images
    (batch, 3, height, width) that are normalised by `mean` and `std`. A grey image comes as three equal channels.
    mean, std: three numbers each, for images in [0, 1].

    A module may also have: `levels`, a FeatureLevel for each map, where a trial pass should not find them; `size`,
    (height, width) in pixels, that the weights were made for; `interpolation`, of images that are resized, "bilinear"
    where it is absent; `licence`, of the weights, a text; `name`, for tables and files, where that of the class does
    not do. For fine-tuning it may have what timm's models have: `group_matcher` (for the decay of learning rates by
    layer), `no_weight_decay` and `set_grad_checkpointing`.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor, /) -> Sequence[Tensor]: ...


class Adapted(nn.Module):
    """A module of your own with the face of timm's models. Its tensors keep the names that they have in the module."""

    def __init__(self, module: nn.Module, levels: Sequence[FeatureLevel], config: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.levels, self.pretrained_cfg = module, tuple(levels), config
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], **how: Any) -> list[Tensor]:
        """Some of its maps; timm's other options have no meaning here."""
        maps = self.module(images)
        return [maps[i] for i in indices]


def _without_prefix(adapted: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)


def _with_prefix(adapted: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)


def adapted(module: nn.Module, name: str) -> Adapted:
    """A module in eval mode with timm's face, once a trial pass has shown that it keeps the contract."""
    config = _config(module, name)
    given = _given_levels(module, name)
    own: Size = config["input_size"][1:]
    frame = own if getattr(module, "size", None) else TRIAL
    if given:
        multiple = max(level.stride for level in given)
        frame = -(-frame[0] // multiple) * multiple, -(-frame[1] // multiple) * multiple
    maps = _trial(module, name, frame)
    levels = _checked(given, maps, frame, name) if given else _found(maps, frame, name)
    return Adapted(module, levels, config)


def _config(module: nn.Module, name: str) -> dict[str, Any]:
    """What a module says of its images, as timm says it; raises BackboneError with all that is wrong."""
    wrong = []
    for key in ("mean", "std"):
        value = getattr(module, key, None)
        numbers = _numbers(value)
        if numbers is None or len(numbers) != 3 or (key == "std" and min(numbers) <= 0):
            wrong.append(f"{key}: wanted three numbers{' above 0' if key == 'std' else ''}, found {_said(value)}")
    size = getattr(module, "size", None)
    if size is not None and not (_is_whole(size, 2) and min(size) >= 1):
        wrong.append(f"size: wanted (height, width) in pixels, found {_said(size)}")
    interpolation = getattr(module, "interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        wrong.append(f"interpolation: wanted one of {', '.join(INTERPOLATIONS)}, found {_said(interpolation)}")
    loose = [
        f"{place}.{key}" if place else key
        for place, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    ]
    if loose:
        wrong.append(
            f"{', '.join(loose[:4])}: a tensor that is no parameter and no buffer is not hashed, not saved and not "
            f"moved to a device; write self.register_buffer({loose[0].rpartition('.')[2]!r}, …)"
        )
    if wrong:
        raise BackboneError(
            "\n  ".join([f"{name} can't serve as a backbone. Nothing was computed.", *wrong])
            + "\nThose of ImageNet are mean = (0.485, 0.456, 0.406) and std = (0.229, 0.224, 0.225); (0, 0, 0) and "
            f"(1, 1, 1) leave images as they are. {PAGE}"
        )
    own = tuple(size) if size is not None else USUAL
    return {
        "input_size": (3, *own), "mean": _numbers(module.mean), "std": _numbers(module.std),
        "interpolation": interpolation, "licence": str(getattr(module, "licence", "")),
    }  # fmt: skip


def _numbers(value: object) -> tuple[float, ...] | None:
    """Finite numbers of a sequence or a tensor, as floats; None for anything else."""
    try:
        found = tuple(float(number) for number in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    return found if all(map(math.isfinite, found)) else None


def _is_whole(value: object, count: int) -> bool:
    return isinstance(value, (tuple, list)) and [type(number) for number in value] == [int] * count


def _said(value: object) -> str:
    """A value in a message, short."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"


def _given_levels(module: nn.Module, name: str) -> tuple[FeatureLevel, ...]:
    """The levels that a module states; none where it states none."""
    levels = getattr(module, "levels", None)
    if levels is None:
        return ()
    fits = isinstance(levels, (tuple, list)) and bool(levels) and all(isinstance(lv, FeatureLevel) for lv in levels)
    if not fits or len({level.name for level in levels}) < len(levels):
        raise BackboneError(
            f"{name} can't serve as a backbone: its attribute `levels` means something else. Nothing was computed.\n"
            "  wanted  a list of featprobe.FeatureLevel(name, channels, stride), one per map, each with its own name\n"
            f"  found   {_said(levels)}\nOmit it, and a trial pass finds the levels. {PAGE}"
        )
    _check_order(levels, name)
    return tuple(levels)


def _refused(name: str, found: str, to_do: str) -> BackboneError:
    return BackboneError(
        f"{name} can't serve as a backbone. Nothing was computed.\n"
        f"  wanted  {WANTED}\n  found   {found}\n{to_do} {PAGE}"
    )


@torch.no_grad()
def _trial(module: nn.Module, name: str, frame: Size) -> list[Tensor]:
    """The maps of two images of noise; raises BackboneError unless each image has its own maps, the same each time."""
    tensors = [*module.parameters(), *module.buffers()]
    if len({tensor.device for tensor in tensors}) > 1:
        module.cpu()
    device = tensors[0].device if tensors else torch.device("cpu")
    noise = torch.rand(2, 3, *frame, generator=torch.Generator().manual_seed(0))
    images = noise.to(device).contiguous(memory_format=torch.channels_last)
    with computing("fp32", device):
        maps = _maps(module, name, images)
        alone, again = _maps(module, name, images[:1]), None
        for i, (a, b) in enumerate(zip(maps, alone, strict=False)):
            if a[:1].shape == b.shape and _alike(a[:1], b):
                continue
            again = again or _maps(module, name, images)
            if a.shape != again[i].shape or not _alike(a, again[i]):
                raise _refused(
                    name,
                    f"other values in map {i} each time, for the same images in evaluation mode",
                    "Let chance work in training mode alone: nn.Dropout, or dropout(x, p, self.training).",
                )
            raise _refused(
                name,
                f"map {i} of an image changes with the other images of its batch",
                "Take statistics that are stored (BatchNorm in evaluation mode), or those of each image.",
            )
    return maps


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * b.abs().max())


def _maps(module: nn.Module, name: str, images: Tensor) -> list[Tensor]:
    """A module's maps of images of noise; raises BackboneError where they are none."""
    frame = tuple(images.shape[2:])
    at = f"on images {tuple(images.shape)}"
    try:
        maps: Any = module(images)
    except Exception as error:  # a network of others may raise anything
        raise _refused(
            name, f"{type(error).__name__} {at}: {(str(error).strip() or 'no reason given').splitlines()[0][:300]}",
            "Images always have three channels, in float32: a network of one channel takes images[:, :1], one of half "
            "precision becomes module.float(). A network that "
            f"can't take {frame[0]}x{frame[1]} pixels says which size it takes: size = (height, width).",
        ) from error  # fmt: skip
    if isinstance(maps, Tensor):
        raise _refused(name, f"one tensor {tuple(maps.shape)}", "Return a list, [map], also of one map; of a model of "
                       "timm give its name instead, or make it with features_only=True.")  # fmt: skip
    if not isinstance(maps, (list, tuple)) or not maps:
        keys = f" with {', '.join(map(str, maps))}" if isinstance(maps, dict) else ""
        raise _refused(name, f"a {type(maps).__name__}{keys}" if maps else "no map at all",
                       "Return a list of maps: list(maps.values()), finest first.")  # fmt: skip
    for i, m in enumerate(maps):
        if (
            not isinstance(m, Tensor)
            or m.ndim != 4
            or len(m) != len(images)
            or not m.is_floating_point()
            or not m.numel()
        ):
            what = f"{tuple(m.shape)}, {m.dtype}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
            raise _refused(name, f"map {i} is {what}, {at}", "Tokens become a map: without the class token, "
                           "tokens.transpose(1, 2).reshape(batch, channels, rows, columns).")  # fmt: skip
        if not m.isfinite().all():
            raise _refused(name, f"map {i} holds values that are not finite, {at} of noise in float32",
                           "Look for a division by 0, or weights that were never set.")  # fmt: skip
    return list(maps)


def _strides(maps: Sequence[Tensor], frame: Size) -> list[tuple[float, float]]:
    """Frame pixels per cell of each map, along rows and columns."""
    return [(frame[0] / m.shape[2], frame[1] / m.shape[3]) for m in maps]


def _found(maps: Sequence[Tensor], frame: Size, name: str) -> tuple[FeatureLevel, ...]:
    """The levels of a trial pass: `stride8` where each stride is there once, `map0`, `map1`, … where all have one."""
    strides = _strides(maps, frame)
    if any(rows != columns or rows != int(rows) for rows, columns in strides):
        shown = "; ".join(f"map {i} {tuple(m.shape[2:])}" for i, m in enumerate(maps))
        raise _refused(
            name, f"for {frame[0]}x{frame[1]} pixels rows and columns {shown}, which have no common stride",
            "Each cell must show a square of as many pixels, at every size of image: rows = height / stride, columns = "
            "width / stride. Pad the convolutions; give the network a `size` that is a multiple of its largest stride; "
            "or state its `levels`, if it lacks cells at the border.",
        )  # fmt: skip
    one = len(maps) > 1 and len(set(strides)) == 1
    levels = [
        FeatureLevel(f"map{i}" if one else f"stride{int(stride)}", m.shape[1], int(stride))
        for i, (m, (stride, _)) in enumerate(zip(maps, strides, strict=True))
    ]
    _check_order(levels, name)
    return tuple(levels)


def _check_order(levels: Sequence[FeatureLevel], name: str) -> None:
    """Raise BackboneError unless strides grow, each a divisor of the last, or all are one."""
    strides = [level.stride for level in levels]
    if len(set(strides)) == 1:
        return
    said = f"strides {', '.join(map(str, strides))}"
    if strides != sorted(strides):
        raise _refused(name, f"maps of {said}, in this order", "Return them finest first: maps[::-1], or sorted.")
    if len(set(strides)) < len(strides):
        raise _refused(name, f"maps of {said}", "Return one map of each stride, or maps that all have one: join those "
                       "of one stride with torch.cat(maps, 1).")  # fmt: skip
    if any(strides[-1] % stride for stride in strides):
        raise _refused(
            name, f"maps of {said}: no frame fits them all", f"Let each stride divide the last, {strides[-1]}."
        )


def _checked(
    levels: tuple[FeatureLevel, ...], maps: Sequence[Tensor], frame: Size, name: str
) -> tuple[FeatureLevel, ...]:
    """The levels that a module states; raises BackboneError where the maps of a trial pass are others."""
    found = [f"{m.shape[1]} channels, {m.shape[2]}x{m.shape[3]} cells" for m in maps]
    wanted = [f"{lv.channels} channels, {'x'.join(map(str, lv.cells(frame)))} cells" for lv in levels]
    fits = len(levels) == len(maps) and all(
        m.shape[1] == level.channels
        and all(0 <= want - has <= want / 2 for has, want in zip(m.shape[2:], level.cells(frame), strict=True))
        for level, m in zip(levels, maps, strict=True)
    )
    if not fits:
        raise _refused(
            name, f"maps of {'; '.join(found)} for {frame[0]}x{frame[1]} pixels, where its `levels` say "
            f"{'; '.join(wanted)}", "Correct `levels`, or the order of the maps.",
        )  # fmt: skip
    return levels
