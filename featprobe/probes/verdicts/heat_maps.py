"""From a map of cells to a smooth map of the original image's pixels."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv1d, interpolate

from featprobe.geometry import Placement

SIGMA = 4.0  # frame pixels, of the Gaussian that smooths a map, as PatchCore has it


def maps_at_original(maps: Tensor, stride: int, placement: Placement) -> Tensor:
    """Maps of images (or tiles) of one placement at every pixel of the originals.

    maps: (batch, rows, columns) of the frame's cells, `stride` frame pixels each; cells of padding only do not count.
    Returns (batch, original height, original width), float32. A map is upsampled bilinearly to the image's part of the
    frame, smoothed there by a Gaussian of SIGMA that is reflected at the image's border and cut at 4 SIGMA, and then
    taken bilinearly at the original's pixel centres. anomalib 2.7 does the same, but repeats cells and does not
    interpolate between them, and shows no other size than the frame's. All three steps go along rows and columns
    separately, so that each axis is one product.
    """
    rows, columns = (
        _operator(content, original, stride).to(maps.device)
        for content, original in zip(placement.content, placement.original, strict=True)
    )
    shown = maps[:, : rows.shape[1], : columns.shape[1]].float()
    return rows @ shown @ columns.T


@lru_cache(64)
def _operator(content: int, original: int, stride: int) -> Tensor:
    """(original, cells): what a row of cells becomes along one axis. content, original: pixels."""
    with torch.inference_mode(False):
        cells = -(-content // stride)
        each = torch.eye(cells)[:, None]  # (cells, 1, cells)
        frame = interpolate(each, size=cells * stride, mode="linear", align_corners=False)[..., :content]
        radius = int(4 * SIGMA + 0.5)
        places = torch.arange(-radius, content + radius) % max(1, 2 * content - 2)
        reflected = torch.minimum(places, (2 * content - 2 - places).abs())
        steps = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = (-(steps**2) / (2 * SIGMA**2)).exp()
        smooth = conv1d(frame[..., reflected], (kernel / kernel.sum())[None, None])
        return interpolate(smooth, size=original, mode="linear", align_corners=False)[:, 0].T.contiguous()
