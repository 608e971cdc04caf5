"""A decoder that only waits, to measure Python's lock by; loaded in processes that decode too."""

import time
from types import SimpleNamespace
from typing import Any

SECONDS = 0.0018  # that a core needs for a JPEG of 512x512 pixels


def begin() -> None:
    """Have JPEGs and PNGs be waited for in place of being decoded."""
    from featprobe.datasets.images import decode

    def waiting(_: bytes, out: Any) -> Any:
        time.sleep(SECONDS)
        return out

    decode.imagecodecs = SimpleNamespace(jpeg8_decode=waiting, png_decode=waiting)  # type: ignore[assignment]
