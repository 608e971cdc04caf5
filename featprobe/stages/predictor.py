"""A saved head behind its own backbone and preprocessing, and what it finds in images."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.given import at_hand, check_needed
from featprobe.backbones.precision import computing
from featprobe.cache.quantised import TORCH_DTYPE, as_read
from featprobe.datasets.images.pixels import counted_levels
from featprobe.datasets.images.reading import Header, header_of, read_levels, unit_of
from featprobe.errors import DataError, ProbeError
from featprobe.features import Features
from featprobe.geometry import Part, Placement, place, place_tile, tiles_of
from featprobe.io.disk import below
from featprobe.probes import load_head
from featprobe.probes.saved import check_fingerprint
from featprobe.processes import pick_device
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.outputs import OUTPUTS, Batches, Piece, Predicted


@dataclass(frozen=True)
class Prediction(Predicted[Any]):
    """What a head found in an image.

    clipped: share of its pixels outside of the head's intensity window; 0 where there is none.
    """

    clipped: float
    header: Header


class Predictor:
    """A saved head behind its own backbone and preprocessing, all of them from the head's card.

    backbone: the module whose features the head was trained on, where that was given as an object. Raises ProbeError
    when the folder holds no such head, or when the backbone that can be had now is not the one that it was trained on;
    BackboneError when that can't be had at all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        weights: str | None = None,
        device: str | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        self.device = pick_device(device)
        head, self.card = load_head(folder, whole=True)
        self.recipe = FeatureRecipe.from_json(self.card["features"])
        self.head = head.to(self.device)
        self.output = OUTPUTS[SCORES[self.card["head"]["task"]].on](self.head, self.card)
        self.backbone = self._backbone(folder, weights, backbone)
        self.framing = Framing(self.recipe, self.device)

    def predict(self, images: Sequence[tuple[Path, str]]) -> list[Prediction]:
        """Predict a batch of (image, name); raises DataError for one that does not fit."""
        headers = [header_of(path) for path, _ in images]
        read = [self._read(path, header) for (path, _), header in zip(images, headers, strict=True)]
        pieces = [
            Piece(i, levels if part is None else part.take(levels), part, self._place(levels, part))
            for i, levels in enumerate(read)
            for part in self._parts(levels)
        ]
        sizes = [(levels.shape[0], levels.shape[1]) for levels in read]
        with torch.inference_mode():
            found = list(self.output.found(self._batches(pieces, len(read)), sizes))
        return [
            Prediction(path, name, size, own, self._clipped(levels), header)
            for (path, name), size, own, levels, header in zip(images, sizes, found, read, headers, strict=True)
        ]

    def picture(self, path: Path) -> NDArray[np.float32]:
        """An image as the head's intensity policy shows it, in [0, 1]."""
        return unit_of(read_levels(path), self.recipe)

    def _batches(self, pieces: Sequence[Piece], at_once: int) -> Batches:
        """Some of the pieces and their features, again and again."""
        for start in range(0, len(pieces), at_once):
            some = pieces[start : start + at_once]
            yield some, self._features([p.levels for p in some], [p.placement for p in some])

    def _read(self, path: Path, header: Header) -> NDArray[Any]:
        bits, wanted = header.bits, self.card["data"].get("bits")
        if wanted is not None and bits != wanted:
            raise DataError(
                f"{path} is an image of {bits} bits, and the head was trained on images of {wanted}.\n"
                f"Its grey levels would mean something else. Give it images of {wanted} bits."
            )
        return read_levels(path)

    def _clipped(self, levels: NDArray[Any]) -> float:
        if self.recipe.window is None:
            return 0.0
        low, high = self.recipe.window
        own = counted_levels(levels)
        return float(np.mean((own < low) | (own > high))) if own.size else 0.0

    def _parts(self, levels: NDArray[Any]) -> list[Part] | list[None]:
        """The tiles of an image, as the head's training images were cut; None for an image that is not cut."""
        if self.recipe.tile is None:
            return [None]
        return tiles_of((levels.shape[0], levels.shape[1]), self.recipe.tile, self.recipe.overlap)

    def _place(self, levels: NDArray[Any], part: Part | None) -> Placement:
        recipe = self.recipe
        if part is None or recipe.tile is None:
            placed = place((levels.shape[0], levels.shape[1]), recipe.size, recipe.fit, 1)
        else:
            placed = place_tile(part.size, recipe.tile, recipe.size, 1)
        return replace(placed, frame=recipe.frame)

    @torch.inference_mode()
    def _features(self, images: Sequence[Any], placements: Sequence[Placement]) -> Features:
        recipe = self.recipe
        with computing(recipe.precision, self.device):
            maps = self.backbone(self.framing.together(images, placements)).maps
        stored = {name: m.to(TORCH_DTYPE[recipe.dtype]) for name, m in maps.items()}
        if not all(bool(m.isfinite().all()) for m in stored.values()):
            raise DataError(
                f"Features of an image are not finite in {recipe.dtype}, the number format that the head was trained "
                "on. Nothing can be said of it."
            )
        contents = torch.tensor([placement.content for placement in placements], dtype=torch.int32)
        whole = bool((contents == torch.tensor(recipe.frame)).all())
        return Features(as_read(stored, recipe.dtype), recipe.frame, None if whole else contents.to(self.device))

    def _backbone(self, folder: Path, weights: str | None, given: nn.Module | None) -> Backbone:
        values = self.card.get("backbone")
        if values is None:
            raise ProbeError(f"{folder} does not say where its backbone comes from. Train it again from a new cache.")
        spec = BackboneSpec.from_json(values)
        if spec.source == "file":
            named = Path(str(spec.weights))
            if weights is None and named.is_absolute():
                raise ProbeError(
                    f"{folder} was trained on your own weights file, which is elsewhere. It was not opened.\n"
                    f"Name them:  --weights {shlex.quote(str(named))}"
                )
            if weights is None:  # a fine-tuned one lies beside its head
                spec = replace(spec, weights=str(below(folder, named, f"The card of {folder}")))
        if weights is not None:
            spec = replace(spec, source="file", weights=weights)
        with at_hand([] if given is None else [given]):
            check_needed(spec)
            backbone = load_backbone(spec, [level.name for level in self.head.levels], self.device)
        now = replace(
            self.recipe, backbone=backbone.identity, weights_sha256=backbone.sha256, final_norm=backbone.final_norm,
            mean=backbone.mean, std=backbone.std, interpolation=backbone.interpolation,
        )  # fmt: skip
        check_fingerprint(folder, self.card["fingerprint"], now)
        missing = [level for level in backbone.levels if level not in self.recipe.levels]
        if missing:
            raise ProbeError(f"{folder}: the backbone's level {missing[0]} is another than the head was trained on.")
        backbone.fit(self.recipe.frame, self.recipe.sized)
        return backbone
