"""Cross-entropy of dense heads, at the finest level's grid or at the image's."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from featprobe.errors import ShapeError
from featprobe.targets import IGNORE


def level_loss(logits: Tensor, shares: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of cells against the class shares of the pixels that they cover.

    logits: (batch, classes, rows, columns). shares: the same shape, area shares as targets.cell_shares
    gives them. weights: (classes,), or None for ones.
    Returns sum w_c p_c (-log q_c) / sum w_c p_c, a scalar; 0 where no pixel counts.

    This is exactly the per-pixel loss of logits upsampled by nearest neighbour, with ignored pixels and
    class weights. torch's cross_entropy with class probabilities is not: it divides by the number of
    cells, whatever of them is ignored and however the classes are weighted.
    """
    if logits.shape != shares.shape:
        raise ShapeError(f"Logits {tuple(logits.shape)} and shares {tuple(shares.shape)} disagree.")
    if weights is not None:
        shares = shares * weights[:, None, None]
    return -(shares * torch.log_softmax(logits, 1)).sum() / shares.sum().clamp(min=1e-12)


def image_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of pixels, the logits upsampled bilinearly to the frame.

    logits: (batch, classes, rows, columns). labels: (batch, height, width), uint8; 255 is ignored.
    Returns a scalar, the mean weighted by the class weights; 0 where no pixel counts.
    """
    upsampled = interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    target = labels.long()
    if bool((target == IGNORE).all()):
        return upsampled.sum() * 0
    return cross_entropy(upsampled, target, weights, ignore_index=IGNORE)


def inverse_sqrt_weights(pixels: Tensor) -> Tensor:
    """Class weights 1 / sqrt(frequency), scaled so that a training pixel has weight 1 on average.

    pixels: (classes,), labelled pixels of each class in the training split. A class without any gets
    weight 1: it takes no part in the loss.

    >>> [round(w, 3) for w in inverse_sqrt_weights(torch.tensor([90., 10., 0.])).tolist()]
    [0.833, 2.5, 1.0]
    """
    share = pixels.double() / pixels.sum()
    weights = share.clamp(min=1e-12).rsqrt()
    weights = weights / (weights * share).sum()
    return torch.where(pixels > 0, weights, torch.ones_like(weights)).float()


@torch.no_grad()
def start_at_prior(head: nn.Module, pixels: Tensor, weights: Tensor | None = None) -> None:
    """Set a dense head's last bias so that it begins by predicting the classes' frequencies.

    pixels: (classes,), labelled pixels of each class in the training split. weights: of the loss.
    Defects fill well under a percent of most images: from a bias of 0, thousands of steps go by before
    the background's bias has grown to where it belongs (RetinaNet, Lin et al., 2017, section 4.1).
    A class without any pixel starts as if it had one.
    """
    share = pixels.double().clamp(min=1) / pixels.sum()
    if weights is not None:
        share = share * weights.to(share)
    head.bias.copy_((share / share.sum()).log())  # type: ignore[operator]
