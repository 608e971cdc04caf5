"""timm's models with their weights: as a spec names them, and as timm resizes them for a frame."""

import socket
import urllib.request
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from torch import nn

from featprobe.backbones.own import create_own
from featprobe.backbones.weight_files import HUB_FILE, hub_repository
from featprobe.backbones.weights import fits, frame_of, load_strictly, read_embedded, read_weights
from featprobe.errors import BackboneError
from featprobe.geometry import Size
from featprobe.specs import BackboneSpec


def first_line(error: Exception) -> str:
    """The first line of an error of another package, at most 200 characters."""
    return (str(error).strip() or "no reason given").splitlines()[0][:200]


def create(spec: BackboneSpec) -> tuple[nn.Module, Size | None]:
    """A model with its weights, and the size that those were made for where that is not the pretraining's.

    Raises BackboneError for a name that timm does not know itself: some (hf-hub:, local-dir:) have it fetch a model.
    """
    if spec.is_own:
        return create_own(spec), None
    if not timm.is_model(spec.model):
        raise BackboneError(f"There is no model {spec.model!r} in timm. Nothing was looked up.")
    options: dict[str, Any] = {"dynamic_img_size": True} if takes(spec.model, dynamic_img_size=True) else {}
    if spec.source == "hub":
        return _from_hub(spec, options), None
    if spec.source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            return timm.create_model(spec.model, pretrained=False, **options), None
    if spec.source == "file":
        return _from_file(spec, options)
    model = timm.create_model(spec.model, pretrained=False, **options)
    load_strictly(model, read_embedded(model), "The embedded weights file")
    return model, None


def takes(name: str, **option: Any) -> bool:
    """Whether a timm model is built with an option; raises what timm raises for a value that it can't be built with."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # without weights: that takes no time
            timm.create_model(name, pretrained=False, **option)
    except TypeError as error:
        if not any(key in str(error) for key in option):
            raise
        return False
    return True


def _from_file(spec: BackboneSpec, options: dict[str, Any]) -> tuple[nn.Module, Size | None]:
    path = Path(str(spec.weights))
    tensors, frame = read_weights(path), frame_of(path)
    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    head = tensors.get(f"{None if config is None else config.classifier}.weight")
    options["num_classes"] = 0 if head is None else head.shape[0]
    model = timm.create_model(spec.model, pretrained=False, **options)
    own = None
    if frame is not None and not fits(model, tensors) and takes(spec.model, img_size=frame):
        model, own = timm.create_model(spec.model, pretrained=False, img_size=frame, **options), frame
    load_strictly(model, tensors, str(path))
    return model, own


def _from_hub(spec: BackboneSpec, options: dict[str, Any]) -> nn.Module:
    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    try:
        if config and config.hf_hub_id and not huggingface_hub.try_to_load_from_cache(config.hf_hub_id, HUB_FILE):
            _resolve_hub()
        return timm.create_model(spec.model, pretrained=True, **options)
    except Exception as error:  # the hub's client raises many kinds; the cause is kept for --debug
        wanted = f"{config.hf_hub_id}, file {HUB_FILE}" if config and config.hf_hub_id else "no hub file is known"
        raise BackboneError(
            f"The weights of {spec.model} could not be fetched from the hub.\n"
            f"  wanted  {wanted}\n"
            f"  found   {type(error).__name__}: {first_line(error)}\n"
            "Nothing was computed. Three ways out:\n"
            "  fetch that file where there is a network, and name it:  --weights model.safetensors\n"
            "  copy a filled hub cache here, and point HF_HOME at it\n"
            "  use the weights that come from the package index:  --backbone embedded   (or --random-init as a control)"
        ) from error


def takes_named_file(spec: BackboneSpec) -> bool:
    """Whether weights come from the file that `weight_files` names: of those of the hub, timm alone knows."""
    if spec.source != "hub":
        return True
    config: Any = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    if config is None or config.hf_hub_id != hub_repository(spec.model):
        return False
    return not (config.source or config.state_dict or config.file or config.hf_hub_filename)


def _resolve_hub() -> None:
    """Raise OSError at once where the hub has no address: its client would retry for most of a minute."""
    if not urllib.request.getproxies():
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)


def built_for(spec: BackboneSpec, model: Any, own: Size, frame: Size) -> nn.Module | None:
    """timm's own model for a frame with the weights of `model`; None where timm resizes no such weights.

    own: the size that these weights were made for, (height, width) in pixels, as frame is.
    Raises what timm raises where it can't build the model for that frame at all.
    """
    if spec.is_own or not takes(spec.model, img_size=frame):
        return None
    if own[0] != own[1]:  # timm takes weights to be those of square images
        raise BackboneError("weights that were trained at a size that is not square can't be resized")
    state, config = {name: tensor.cpu() for name, tensor in model.state_dict().items()}, model.pretrained_cfg
    classes = getattr(model, "num_classes", config["num_classes"])
    source = {"state_dict": dict(state), "input_size": (3, *own), "num_classes": classes, "label_offset": 0}
    options = {} if classes == config["num_classes"] else {"num_classes": classes}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, on how timm resizes tables
            built = timm.create_model(
                spec.model, pretrained=True, img_size=frame, pretrained_cfg_overlay=source, **options
            )
    except Exception:  # of the weights: it was built without them just now
        return None
    built.pretrained_cfg = config
    now = built.state_dict()
    kept = [name for name in state if name in now and now[name].shape == state[name].shape]
    if now.keys() != state.keys() or not all(torch.equal(now[n], state[n]) for n in kept):
        raise BackboneError("timm changes weights that it should only load")
    return built
