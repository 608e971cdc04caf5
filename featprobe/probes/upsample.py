"""The upsampling segmentation head: a light decoder of fixed width on a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from featprobe.features import Features
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.probes.execution import full_products, half_products
from featprobe.probes.head import DenseHead, over_padding
from featprobe.probes.pyramid import ConvBlock, make_pyramid


class UpsampleHead(DenseHead):
    """Per-pixel class logits from the finest map of a feature pyramid.

    Lateral 1x1 convolutions bring every level to one width, coarse ones are upsampled and added, a 3x3 convolution
    with GroupNorm mixes the sum, a 1x1 convolution classifies it (Semantic FPN, Kirillov et al., 2019, with one
    branch). Its size hardly depends on the backbone's.

    levels: its inputs, finest first. classes: the number of classes, with the background. width: channels.
    """

    def __init__(
        self, levels: Sequence[FeatureLevel], classes: int, width: int = 128, pyramid: PyramidKind = "auto"
    ) -> None:
        super().__init__()
        self.pyramid = make_pyramid(levels, width, pyramid)
        self.levels = self.pyramid.levels
        self.classes = classes
        self.mix = ConvBlock(width)
        self.weight = nn.Parameter(torch.randn(classes, width) * 0.01)
        self.bias = nn.Parameter(torch.zeros(classes))

    @property
    def stride(self) -> int:
        """Frame pixels per cell of the logits."""
        return self.pyramid.strides[0]

    def forward(self, features: Features) -> Tensor:
        """Logits at the finest grid: (batch, classes, height / stride, width / stride)."""
        device = self.weight.device
        with half_products(device, training=self.training):
            ((x, inside),) = self.pyramid.convolved(features, self.mix.conv.weight, (self.stride,))
            x = self.mix.norm.rectified(x, inside)  # (batch, width, rows, columns)
        with full_products(device):
            cells = x.permute(0, 2, 3, 1).to(self.weight.dtype)
            logits = linear(cells, self.weight, self.bias).permute(0, 3, 1, 2).contiguous()
        return over_padding(logits, features.content, self.stride)
