"""A frozen multi-scale backbone: images in, feature levels out."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featprobe.backbones.adapted import Adapted
from featprobe.backbones.catalog import licence_of
from featprobe.backbones.compiled import Compiled
from featprobe.backbones.given import class_of
from featprobe.backbones.models import built_for, create, first_line
from featprobe.backbones.own import identity_of
from featprobe.backbones.precision import computing
from featprobe.backbones.weights import weights_sha256
from featprobe.errors import BackboneError, LacksError, nearest
from featprobe.features import Features
from featprobe.geometry import Size
from featprobe.levels import FeatureLevel, choose_levels
from featprobe.machine import is_of_device
from featprobe.processes import check_norms, count
from featprobe.specs import BackboneSpec

STRIDES = (4, 8, 16, 32)
UNIFORM_LEVELS = 4
SAME = 1e-4  # of a level's largest value: what two ways of computing the same features may differ by

FINAL_NORM = {"ConvNeXt": "head.norm", "VisionTransformer": "norm", "Eva": "norm"}
"""Class of timm model -> its last normalisation layer. A ViT's is applied to every level."""


class Backbone(nn.Module):
    """A model of timm, or your own behind timm's face, that yields the feature levels of a batch of images.

    It is frozen until `unfreeze`.

    levels: what `forward` returns, finest first. multiple: frames must be a multiple of this, pixels.
    mean, std: of the pretraining, per RGB channel, for images in [0, 1]. own: the size that the weights were made for;
    frame: the one that the model is set up for, (height, width) in pixels. sized: whether timm built it for that frame.
    identity: what the network is, for keys: timm's name, or the class of your own. licence: of the weights.
    compiled: whether torch is to compile what is computed in training mode.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, model: nn.Module, spec: BackboneSpec, level_names: Sequence[str] = (), own: Size | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.sha256 = weights_sha256(model)
        config: Any = model.pretrained_cfg
        self.own: Size = own or tuple(config["input_size"][1:])
        self.identity = identity_of(spec, model)
        available, indices = _available_levels(model, self.own)
        try:
            self.levels = choose_levels(available, level_names)
        except KeyError as error:
            near = nearest(error.args[0], [level.name for level in available])
            raise LacksError(f"{spec.network} has no level {error.args[0]!r}. {near}") from None
        self.multiple = max(level.stride for level in available)
        self.frame: Size | None = None
        self.sized = self.learns = False
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = str(config["interpolation"])
        self.uniform = len({level.stride for level in available}) == 1
        self.final_norm = _default_final_norm(spec) if spec.final_norm is None else spec.final_norm
        self._norm_name = FINAL_NORM.get(type(model).__name__)
        if self.final_norm and self._norm_name is None:
            raise LacksError(f"{spec.network} has no final norm that featprobe knows. Omit --final-norm.")
        self._norm_last = self.final_norm and available[-1] in self.levels and not self.uniform
        self.indices = [indices[available.index(level)] for level in self.levels]
        self.model: Any = model
        self.compiled = False
        self._by_compiler = Compiled(spec.network, self._maps)
        self._frozen: list[nn.Module] = []  # BatchNorms that keep what they have in training too
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @property
    def network(self) -> Any:
        """The network itself: timm's model, or your own module without timm's face."""
        return self.model.module if isinstance(self.model, Adapted) else self.model

    @property
    def licence(self) -> str:
        """That of the weights."""
        return str(self.model.pretrained_cfg.get("licence") or licence_of(self.spec))

    def forward(self, images: Tensor, content: Tensor | None = None) -> Features:
        """Feature levels of images.

        images: (batch, 3, height, width), values in [0, 1]; sides are multiples of `multiple` pixels.
        content: (batch, 2), see Features.
        """
        frame = (images.shape[2], images.shape[3])
        self.fit(frame)
        found = (
            self._by_compiler(self.model, images) if self.compiled and self.training else self._maps(self.model, images)
        )
        maps = [_filled(m, level.cells(frame)) for m, level in zip(found, self.levels, strict=True)]
        return Features({level.name: m for level, m in zip(self.levels, maps, strict=True)}, frame, content)

    def _maps(self, model: Any, images: Tensor) -> list[Tensor]:
        """The levels as a model gives them: each (batch, channels, rows, columns)."""
        normalised = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        maps: list[Tensor] = model.forward_intermediates(
            normalised,
            indices=self.indices,
            norm=self.final_norm and self.uniform,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if self._norm_last:
            maps[-1] = model.get_submodule(self._norm_name)(maps[-1])
        return maps

    @torch.inference_mode(False)
    def fit(self, frame: Size, sized: bool | None = None) -> None:
        """Set the model up for frames of (height, width) pixels.

        The model stays as it is where it computes at that size what timm's own, built for that size, computes from the
        same weights; otherwise timm's own takes its place. sized: which of the two it was, where that is known.
        Raises BackboneError where neither can be had; the model then stays as it was.
        """
        if frame == self.frame and sized in (None, self.sized):
            return
        model = self._placed(create(self.spec)[0]) if self.sized else self.model
        try:
            built = None if frame == self.own or sized is False else built_for(self.spec, model, self.own, frame)
            built = None if built is None else self._placed(built)
            if sized is None and built is not None and self._agree(model, built, frame):
                built = None
            if sized and built is None and frame != self.own:
                raise BackboneError("timm resized its weights once, and does so no more")
            if built is not None and self.learns:
                raise BackboneError("it is in training on another size")
            self._try(built or model, frame)
        except torch.cuda.OutOfMemoryError as error:
            raise _too_large(self.spec, f"an image of {frame[0]}x{frame[1]} pixels", self._mean.device, error) from None
        except Exception as error:  # timm refuses a size in many ways; the cause is kept for --debug
            if is_of_device(error):
                raise
            raise _refused(self.spec, self.own, frame, error) from error
        self.model, self.frame, self.sized = built or model, frame, built is not None

    def _placed(self, model: nn.Module) -> nn.Module:
        """A model of the same weights, where and as this one is."""
        model = model.requires_grad_(False).to(self._mean.device)
        return model.to(memory_format=torch.channels_last).train(self.training)

    def _agree(self, model: nn.Module, built: nn.Module, frame: Size) -> bool:
        """Whether a model as it is computes at a frame what timm's own for that frame does."""
        wanted = self._try(built, frame)
        try:
            found = self._try(model, frame)
        except Exception:  # as it is it can't take that size
            return False
        return all(bool((a - b).abs().max() <= SAME * b.abs().max()) for a, b in zip(found, wanted, strict=True))

    @torch.no_grad()
    def _try(self, model: nn.Module, frame: Size) -> list[Tensor]:
        """The levels of one image of noise; raises BackboneError where they do not lie on the cells of the frame.

        A network without padding lacks cells, as many at every size: at its own, at most half of them.
        """
        noise = torch.rand(1, 3, *frame, generator=torch.Generator().manual_seed(0)).to(self._mean.device)
        try:
            with computing("fp32", noise.device):  # so that every device decides the same
                maps = self._maps(model.eval(), noise)
        finally:
            model.train(self.training)
            self.train(self.training)
        lacking = _lacking(self.levels, maps, frame)
        if any(lacking):
            usual: Any = tuple(-(-side // self.multiple) * self.multiple for side in self.own)
            at_own = _lacking(self.levels, maps if frame == usual else self._try(model, usual), usual)
            cells = [side for level in self.levels for side in level.cells(usual)]
            if lacking != at_own or not all(0 <= n <= wanted / 2 for n, wanted in zip(at_own, cells, strict=True)):
                raise BackboneError("the cells of its maps do not follow the size of its images")
        return maps

    def unfreeze(self, *, batch_norm: Literal["frozen", "train"] = "frozen", checkpointing: bool = False) -> None:
        """Let the model be trained.

        batch_norm: "frozen" keeps the statistics, scale and shift of every BatchNorm as they were pretrained, which
        small batches need; "train" takes those of several processes together, which needs GPUs. checkpointing: compute
        activations again on the way back, to save memory. Raises BackboneError when the model can't do that, ProbeError
        for a BatchNorm that several processes on CPUs would train.
        """
        if checkpointing and batch_norm == "train":
            raise BackboneError(
                "BatchNorm would count each batch twice under activation checkpointing. Take one of them."
            )
        self.learns = True
        self.model.requires_grad_(True)
        self._frozen = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and batch_norm == "frozen"]
        for norm in self._frozen:
            norm.requires_grad_(False)
        if batch_norm == "train" and count() > 1:
            self._synchronise()
        if checkpointing:
            _checkpoint(self.network, self.spec)
        self._leave_idle_frozen()

    def _synchronise(self) -> None:
        """Let BatchNorms take the statistics of all processes' images."""
        if self._mean.device.type == "cuda":
            self.model = convert_sync_batchnorm(self.model)
        was = self.training
        check_norms(self.train())
        self.train(was)

    def _leave_idle_frozen(self) -> None:
        """Freeze what no level stands on, as the classifier: it has no gradient, and needs no state."""
        was = self.training
        self.eval()
        frame = self.frame or self.own
        with torch.enable_grad():
            maps = self._maps(self.model, torch.zeros(1, 3, *frame, device=self._mean.device))
            _check_gradient(self.spec, maps)
            torch.stack([m.float().sum() for m in maps]).sum().backward()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.train(was)

    def train(self, mode: bool = True) -> "Backbone":
        """Set training mode, in which frozen BatchNorms still take their running statistics."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def parameter_groups(self, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Parameters that may move, as an optimizer takes them; biases and norms without weight decay.

        layer_decay: factor on the learning rate from each layer to the one before it (BEiT, Bao et al., 2022).
        """
        groups = _groups(self.network, self.spec, weight_decay, layer_decay)
        return [
            {"params": list(g["params"]), "lr": lr * g["lr_scale"], "weight_decay": g["weight_decay"]} for g in groups
        ]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the model under timm's names, on the CPU, as `--weights` reads them."""
        return {name: value.detach().cpu().clone().contiguous() for name, value in self.model.state_dict().items()}


def load_backbone(spec: BackboneSpec, level_names: Sequence[str] = (), device: torch.device | str = "cpu") -> Backbone:
    """Make a backbone with the weights that its spec names, in eval mode, on a device.

    Raises BackboneError when weights can't be had or do not fit, or when a level does not exist.
    """
    model, own = create(spec)
    backbone = Backbone(model, spec, level_names, own).eval()
    try:
        backbone.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise _too_large(spec, "its weights", device, error) from None
    backbone.requires_grad_(False)
    return backbone.to(memory_format=torch.channels_last)


def _checkpoint(network: Any, spec: BackboneSpec) -> None:
    """Have a network compute activations again on the way back; raises BackboneError where it can't."""
    if not callable(getattr(network, "set_grad_checkpointing", None)):
        where = "" if spec.is_own else " in timm"
        raise BackboneError(f"{spec.network} has no activation checkpointing{where}. Omit --checkpointing.")
    network.set_grad_checkpointing(True)


def _groups(network: Any, spec: BackboneSpec, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The parameters of a network in groups of one weight decay and one `lr_scale`; raises BackboneError."""
    knows_layers = callable(getattr(network, "group_matcher", None))
    if layer_decay != 1 and spec.is_own and not knows_layers:
        raise BackboneError(
            f"{spec.label} does not say what its layers are, so no learning rate can decay by layer.\n"
            f"  wanted  a method group_matcher of {class_of(network)}, as timm's models have it\n"
            "Nothing was trained. Add it, or omit --layer-decay."
        )
    exempt = getattr(network, "no_weight_decay", None)
    how: dict[str, Any] = {"no_weight_decay_list": exempt() if callable(exempt) else ()}
    if spec.is_own and not knows_layers:
        return [{**group, "lr_scale": 1.0} for group in param_groups_weight_decay(network, weight_decay, **how)]
    groups: list[dict[str, Any]] = param_groups_layer_decay(network, weight_decay, layer_decay=layer_decay, **how)
    return groups


def _check_gradient(spec: BackboneSpec, maps: Sequence[Tensor]) -> None:
    """Raise BackboneError for maps that no parameter could be trained by."""
    if not any(m.requires_grad for m in maps):
        raise BackboneError(
            f"Nothing of {spec.label} can be trained: its maps have no gradient for any parameter.\n"
            "Let its forward compute without torch.no_grad() and detach(); or probe it frozen:  featprobe probe"
        )


def _too_large(spec: BackboneSpec, what: str, device: torch.device | str, error: Exception) -> BackboneError:
    """The error of a device whose memory does not hold a backbone and one image."""
    return BackboneError(
        f"The memory of {device} does not hold {spec.network} with {what}. Nothing was computed.\n"
        f"  found   {str(error).splitlines()[0]}\n"
        "Take a smaller --size, a smaller backbone, another device that is free, or --device cpu."
    )


def _refused(spec: BackboneSpec, own: Size, frame: Size, error: Exception) -> BackboneError:
    """The error of a frame that a network, whose own size is another, can't be had for."""
    reason, size = first_line(error), f"{own[0]}x{own[1]}"
    nor = "" if spec.is_own else ", and timm can't resize it for them"
    return BackboneError(
        f"{spec.network} can't take frames of {frame[0]}x{frame[1]} pixels{nor}. Nothing was computed.\n"
        f"  wanted  a size that it takes, such as its own, {size}\n"
        f"  found   {frame[0]}x{frame[1]}: {type(error).__name__}: {reason}\n"
        f"Take its own size, --size {size}, or another backbone."
    )


def _lacking(levels: Sequence[FeatureLevel], maps: Sequence[Tensor], frame: Size) -> list[int]:
    """How many rows, and how many columns, each level has fewer than its stride says."""
    cells = [side for level in levels for side in level.cells(frame)]
    return [wanted - found for wanted, found in zip(cells, (n for m in maps for n in m.shape[2:]), strict=True)]


def _available_levels(model: nn.Module, own: Size) -> tuple[list[FeatureLevel], list[int]]:
    """Levels that a model can give, finest first, with their index among timm's intermediates.

    own: the size that its weights were made for, (height, width) in pixels.
    """
    if isinstance(model, Adapted):
        return list(model.levels), list(range(len(model.levels)))
    info = getattr(model, "feature_info", None)
    if info is None or not callable(getattr(model, "forward_intermediates", None)):
        raise BackboneError(f"{type(model).__name__} gives no intermediate feature maps in timm. Choose another model.")
    entries = list(info)
    strides = [int(entry["reduction"]) for entry in entries]
    if len(set(strides)) == 1:  # one resolution in all blocks: evenly spaced ones, the last among them
        count = min(UNIFORM_LEVELS, len(entries))
        indices = [len(entries) * (k + 1) // count - 1 for k in range(count)]
        return [FeatureLevel(f"block{i}", entries[i]["num_chs"], strides[i]) for i in indices], indices
    usable = [s for s in STRIDES if s in strides] or [s for s in strides if not any(side % s for side in own)]
    if not usable:
        raise BackboneError(f"{type(model).__name__} gives no map whose cells tile an image. Choose another model.")
    last_of_stride = {stride: i for i, stride in enumerate(strides) if stride in usable}
    indices = sorted(last_of_stride.values())
    return [FeatureLevel(f"stride{strides[i]}", entries[i]["num_chs"], strides[i]) for i in indices], indices


def _filled(m: Tensor, cells: Size) -> Tensor:
    """A map with its outermost cells repeated up to these (rows, columns).

    Networks without padding see no cells near the border; they lack as many on either side, and the odd one at the end.
    """
    rows, columns = (wanted - found for wanted, found in zip(cells, m.shape[2:], strict=True))
    if not rows and not columns:
        return m
    return nn.functional.pad(m, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate")


def _default_final_norm(spec: BackboneSpec) -> bool:
    """DINOv2 and DINOv3 are evaluated behind their final norm; supervised models are not, nor are your own."""
    return not spec.is_own and ("dinov3" in spec.model or "dinov2" in spec.model)
