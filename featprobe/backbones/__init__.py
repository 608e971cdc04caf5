"""Backbones from timm. The only part that imports timm."""

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.catalog import ALIASES, find_backbone, licence_of, matching_models
from featprobe.backbones.weights import weights_sha256

__all__ = ["ALIASES", "Backbone", "find_backbone", "licence_of", "load_backbone", "matching_models", "weights_sha256"]
