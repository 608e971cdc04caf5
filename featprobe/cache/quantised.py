"""int8: a channel of a row as one byte per value, with the two numbers that turn bytes back into fp16.

    value = zero + scale * code          zero: the channel's smallest value, scale: its range / 255, both float32

Codes are made from the fp16 values that the cache would hold otherwise: an int8 cache follows from the fp16 cache. The
range is the channel's whole range, and nothing is clipped: on inspection images the rare large values are the defects.
A scale has 16 significant bits at most, and is rounded up to them. So its product with a code is exact in float32, and
every device reads the same fp16, whether it multiplies and adds in one step or in two.
"""

import threading
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

SCALES = "scales/"
"""Prefix of a level's name for its scales and zeros, in the tables of a cache and in the buffers of a reader."""
TORCH_DTYPE: Mapping[str, torch.dtype] = {
    "fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float16,
}  # fmt: skip
"""Number format of features when a head gets them, by the number format of their cache."""
TABLE_DTYPE = {"<f2": torch.float16, "<f4": torch.float32, "<u2": torch.bfloat16, "u1": torch.uint8}
"""torch's number format of a table of features or scales, by its name in the file."""
CODES = 255  # steps from a channel's smallest value to its largest
BLOCK = 1 << 19  # values that are decoded at once: 3 MB of memory in all, which the cache of all cores holds
MOST_VIEWS = 64  # shapes of blocks whose memory a thread keeps ready
TINY = 2.0**24  # 1 / the smallest fp16 > 0: a code is the bits of so many times that value
_FACTORS = torch.tensor([TINY, 1.0])  # of scale and zero


def quantise(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, (rows, channels, height, width), uint8, and scales, (rows, channels, 2), float32: scale and zero.

    m: (rows, channels, height, width), in any order in memory; every value finite in fp16 (so at most 65504 in size).
    Both results are contiguous. A channel of one value has scale 0 and is exact. In others a value differs by at most
    half a scale from the value of its code.

    >>> codes, scales = quantise(torch.tensor([[[[-1.0, 0.0, 1.0, 4.1]]]]))
    >>> codes.flatten().tolist()
    [0, 50, 100, 255]
    """
    x = m.half().float().contiguous()
    low = x.amin((2, 3), keepdim=True) + 0.0  # -0 becomes 0: which of the two is the smallest is up to the device
    scale = _rounded_up((x.amax((2, 3), keepdim=True) - low) / CODES)
    codes = x.sub_(low).div_(torch.where(scale > 0, scale, 1.0)).round_().to(torch.uint8)
    return codes, torch.stack([scale, low], dim=-1).flatten(1, 3)


def coded(maps: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Maps of all levels as an int8 cache stores them: codes under a level's name, scales under SCALES + that name."""
    found: dict[str, torch.Tensor] = {}
    for name, m in maps.items():
        found[name], found[SCALES + name] = quantise(m)
    return found


def as_read(maps: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Maps of all levels, finite in TORCH_DTYPE, as they come back from a cache of this dtype."""
    read = {name: m.to(TORCH_DTYPE[dtype]) for name, m in maps.items()}
    return {name: decode(*quantise(m)) for name, m in read.items()} if dtype == "int8" else read


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """The next float32 >= scale >= 0 of 16 significant bits."""
    return ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)


def decode(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The fp16 values of codes: (rows, channels, height, width), in `out` where it is given.

    codes: of the same shape, uint8; scales: (rows, channels, 2), float32; all contiguous.
    """
    out = torch.empty(codes.shape, dtype=torch.float16, device=codes.device) if out is None else out
    if codes.device.type == "cpu":
        if codes.numel():
            decode_parts([codes.numpy()], scales, out)
    else:
        _decode_at_once(codes, scales, out)
    return out


def _decode_at_once(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """One operation, as a GPU wants."""
    scale, zero = scales[..., None, None].unbind(2)
    torch.addcmul(zero, codes, scale, out=out)


class _Scratch(threading.local):
    """Memory of a thread that decodes. It is kept, because making it for each block would cost as much as decoding one.

    It is made outside of inference mode: tensors made in inference mode can't be changed in place outside of it.
    """

    @torch.inference_mode(False)
    def __init__(self) -> None:
        self.wide = torch.empty(0, dtype=torch.int16)
        self.mean, self.variance, self.unused = torch.zeros(0), torch.ones(0), torch.empty(0)
        self.views: dict[tuple[int, int], tuple[NDArray[np.int16], torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def of(self, channels: int, cells: int) -> tuple[NDArray[np.int16], torch.Tensor, torch.Tensor, torch.Tensor]:
        """(channels, cells), int16, of any values; the same as fp16, (1, channels, cells); (channels,) zeros; ones."""
        found = self.views.get((channels, cells))
        return self._made(channels, cells) if found is None else found

    @torch.inference_mode(False)
    def _made(self, channels: int, cells: int) -> tuple[NDArray[np.int16], torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.wide.numel() < channels * cells or len(self.mean) < channels or len(self.views) >= MOST_VIEWS:
            self.wide = torch.empty(max(channels * cells, self.wide.numel()), dtype=torch.int16)
            longest = max(channels, len(self.mean))
            self.mean, self.variance, self.views = torch.zeros(longest), torch.ones(longest), {}
        wide = self.wide[: channels * cells].view(channels, cells)
        found = wide.numpy(), wide.view(1, channels, cells).view(torch.float16)
        return self.views.setdefault((channels, cells), (*found, self.mean[:channels], self.variance[:channels]))


_scratch = _Scratch()


def decode_parts(parts: Iterable[NDArray[np.uint8]], scales: torch.Tensor, out: torch.Tensor) -> None:
    """decode() of codes that come in parts, on a CPU, in blocks that fit the cache which its cores share.

    parts: codes of one or more rows each, in any shape, until all rows of scales are there; the memory of a part may be
    used again when the next is asked for. scales, out: see decode; not empty.

    A code widened to 16 bits is the bits of an fp16 number: code / TINY. Batch norm with mean 0 and variance 1 is the
    torch operation that applies a float32 factor and summand per channel to fp16 values in one pass. Blocks are large
    and what is done for each is little: reading empties a core's caches of the program too, and threads that decode
    wait for each other whenever they come back to Python.
    """
    rows, channels = scales.shape[:2]
    values = out.view(1, rows * channels, -1)
    cells = values.shape[2]
    step = max(1, BLOCK // cells)
    factors, summands = (scales.view(-1, 2) * _FACTORS).t().contiguous()
    codes, incoming = np.empty((0, cells), dtype=np.uint8), iter(parts)
    unused = _scratch.unused
    for block, factor, summand in zip(values.split(step, 1), factors.split(step), summands.split(step), strict=True):
        bits, half, mean, variance = _scratch.of(len(factor), cells)
        filled = 0
        while filled < len(bits):
            codes = codes if len(codes) else next(incoming).reshape(-1, cells)
            taken = min(len(codes), len(bits) - filled)
            np.copyto(bits[filled : filled + taken], codes[:taken])
            codes, filled = codes[taken:], filled + taken
        torch.native_batch_norm(half, factor, summand, mean, variance, False, 0.0, 0.0, out=(block, unused, unused))
