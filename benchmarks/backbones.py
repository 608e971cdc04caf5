"""Feature levels of the smallest model of every family of timm against timm's own output from the same weights.

    python benchmarks/backbones.py

A family is a module of timm and a class in it. Each level of featprobe is compared, at the size that the model was
made for and at another, with what `forward_intermediates` of timm's own model gives: the model as `timm.create_model`
builds it at its own size; at the other size the one that is built with `img_size` for it and loaded with the same
weights through timm's checkpoint filter, or, where a model takes no `img_size` or timm resizes no such weights, the
model as it is; in channels-last memory on both sides, since random weights of some families multiply what another order
of additions rounds. A size that featprobe refuses in words counts where timm fails at it too. The weights are random.
"""

import argparse
import gc
import logging
import time
import warnings
from dataclasses import dataclass

import timm
import torch
from _bench import report
from torch import Tensor, nn

from featprobe.backbones.backbone import load_backbone
from featprobe.errors import BackboneError
from featprobe.specs import BackboneSpec

TARGET = 1.0
CLOSE = 1e-5  # of a level's largest value
Size = tuple[int, int]


@dataclass(frozen=True)
class Outcome:
    """What happened to one model at one size."""

    size: Size
    text: str
    right: bool


def smallest_models() -> dict[tuple[str, str], str]:
    """The model of fewest parameters of each (module, class) of timm that offers intermediate features."""
    fewest: dict[tuple[str, str], tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            if callable(getattr(model, "forward_intermediates", None)):
                found = sum(p.numel() for p in model.parameters()), name
                family = module, type(model).__name__
                fewest[family] = min(found, fewest.get(family, found))
    return {family: name for family, (_, name) in fewest.items()}


def random_model(name: str) -> nn.Module:
    """timm's model at its own size with the weights of `--random-init`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False).eval()


def timms_own(model: nn.Module, name: str, size: Size, own: Size) -> nn.Module:
    """timm's model for a size with the weights of `model`; raises where timm can't build one."""
    if size == own:
        return model
    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return model
    overlay = {"state_dict": dict(model.state_dict()), "label_offset": 0}
    try:
        return timm.create_model(name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay).eval()
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        return model


def middle(m: Tensor, like: Tensor) -> Tensor:
    """The cells of a level that timm gives too: networks without padding give none near the border."""
    top, left = ((a - b) // 2 for a, b in zip(m.shape[2:], like.shape[2:], strict=True))
    return m[:, :, top : top + like.shape[2], left : left + like.shape[3]]


def compare(name: str) -> list[Outcome]:
    """What happens to a model at its own size and at another, which is not square where that can be."""
    spec = BackboneSpec(name, name, "random")
    model = random_model(name)
    config = model.pretrained_cfg
    own: Size = tuple(config["input_size"][1:])
    try:
        backbone = load_backbone(spec)
    except BackboneError as error:
        return [Outcome(own, str(error).splitlines()[0], False)] * 2
    multiple = backbone.multiple
    near = tuple(-(-side // multiple) * multiple for side in own)
    other = max(multiple, near[0] // 2 // multiple * multiple), max(multiple, near[1] // 2 // multiple * multiple)
    lacking: list[list[int]] = []
    outcomes = [at_size(backbone, model, name, near, own, lacking)]
    for size in ((other[0] + multiple, other[1] + 2 * multiple), other, (2 * near[0], 2 * near[1])):
        outcome = at_size(backbone, model, name, size, own, lacking)
        if not outcome.text.startswith("refused, as") or size[0] > near[0]:
            break  # where timm fails too, another size may do
    return [*outcomes, outcome]


def at_size(
    backbone: nn.Module, model: nn.Module, name: str, size: Size, own: Size, lacking: list[list[int]]
) -> Outcome:
    """Compare all levels at one size.

    lacking: gets the rows and columns that timm's levels have fewer than their strides say. A model for which they are
    not as many at each size brings its images to a size of its own, and so fails at the others.
    """
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    wanted: list[Tensor] = []
    failed = ""
    try:
        built = timms_own(model, name, size, own).to(memory_format=torch.channels_last)
        normalised = ((images - backbone._mean) / backbone._std).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = built.forward_intermediates(
                normalised, indices=backbone.indices, norm=backbone.final_norm,
                output_fmt="NCHW", intermediates_only=True,
            )  # fmt: skip
        cells = [side for level in backbone.levels for side in level.cells(size)]
        lacking.append([a - b for a, b in zip(cells, (side for m in wanted for side in m.shape[2:]), strict=True)])
        if lacking[-1] != lacking[0]:
            failed = "its maps do not follow the image"
    except Exception as error:  # timm refuses in many ways
        failed = f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"[:60]
    try:
        with torch.inference_mode():
            found = list(backbone(images).maps.values())
    except BackboneError as error:
        if failed:
            return Outcome(size, f"refused, as timm fails ({failed})", True)
        return Outcome(size, f"refused: {str(error).splitlines()[2].strip()}", False)
    if failed:
        return Outcome(size, f"computed, where timm fails ({failed})", False)
    apart = max(
        float((middle(m, w) - w).abs().max() / w.abs().max().clamp_min(1e-12)) if m.shape[1] == w.shape[1] else 1.0
        for m, w in zip(found, wanted, strict=True)
    )
    how = "as built for it" if backbone.sized else "equal"
    return Outcome(size, how if apart <= CLOSE else f"{apart:.1e} apart", apart <= CLOSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PART", default="", help="models whose name or module holds this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    begun = time.perf_counter()
    rows, right, refused = [], [], 0
    for (module, kind), name in smallest_models().items():
        if options.only not in name and options.only not in module:
            continue
        outcomes = compare(name)
        right += [outcome.right for outcome in outcomes]
        refused += sum(outcome.text.startswith("refused") for outcome in outcomes)
        texts = [f"{o.size[0]}x{o.size[1]} {o.text}" for o in outcomes]
        print(f"{module}, {kind}: {name}: {'; '.join(texts)}", flush=True)
        rows.append({"family": f"{module}, {kind}", "model": name, "own size": texts[0], "other size": texts[1]})
        gc.collect()
    report(
        "backbones", sum(right) / len(right), TARGET, rows, families=len(rows), comparisons=len(right), refused=refused,
        timm=timm.__version__, minutes=(time.perf_counter() - begun) / 60,
    )  # fmt: skip


if __name__ == "__main__":
    main()
