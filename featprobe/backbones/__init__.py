"""Backbones from timm. The only part that imports timm, which takes seconds: its modules are asked for by name."""

from featprobe.backbones.aliases import ALIASES

__all__ = ["ALIASES"]
