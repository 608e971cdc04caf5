"""Losses of dense heads, at the finest level's grid or at the image's: cross-entropy, dice, focal, and their sums."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, one_hot

from featprobe.errors import ProbeError, ShapeError, nearest
from featprobe.processes import count, summed
from featprobe.targets import IGNORE

LOSSES = ("ce", "dice", "focal")
FOCUS = 2.0  # exponent of the focal loss (Lin et al., 2017)


def parse_loss(text: str) -> tuple[str, ...]:
    """The terms of a loss written as a sum; raises ProbeError for one that does not exist.

    >>> parse_loss("ce+dice")
    ('ce', 'dice')
    """
    terms = tuple(part.strip() for part in text.split("+"))
    for term in terms:
        if term not in LOSSES:
            raise ProbeError(f"There is no loss {term!r}. {nearest(term, LOSSES)} Sums are written as ce+dice.")
    return terms


def level_loss(logits: Tensor, shares: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """Loss of cells against the class shares of the pixels that they cover.

    logits: (batch, classes, rows, columns). shares: the same shape, area shares as targets.cell_shares
    gives them. weights: (classes,), or None for ones. loss: terms of parse_loss, added up.
    Returns a scalar; for "ce" sum w_c p_c (-log q_c) / sum w_c p_c; 0 where no pixel counts. Of several processes each
    gets its part: these add up to the loss of the whole batch.

    "ce" is exactly the per-pixel loss of logits upsampled by nearest neighbour, with ignored pixels and
    class weights, and so are the others. torch's cross_entropy with class probabilities is not: it divides by the
    number of cells, whatever of them is ignored and however the classes are weighted.

    "focal" multiplies -log q_c by (1 - q_c)^2. "dice" is 1 - 2 sum q_c p_c / (sum q_c v + sum p_c), v being the share
    of a cell that is labelled, averaged over the classes that the batch holds; it takes no class weights.
    """
    if logits.shape != shares.shape:
        raise ShapeError(f"Logits {tuple(logits.shape)} and shares {tuple(shares.shape)} disagree.")
    terms = parse_loss(loss)
    weighted = shares if weights is None else shares * weights[:, None, None]
    log_q = torch.log_softmax(logits, 1)
    total, mass = logits.new_zeros(()), summed(weighted.sum()).clamp(min=1e-12)
    if "ce" in terms:
        total = total - (weighted * log_q).sum() / mass
    if "focal" in terms:
        hard = (1 - log_q.exp()).clamp(min=0).pow(FOCUS)
        total = total - (weighted * hard * log_q).sum() / mass
    if "dice" in terms:
        total = total + _dice(log_q.exp(), shares)
    return total


def _dice(q: Tensor, shares: Tensor) -> Tensor:
    own = shares.sum((0, 2, 3))  # (classes,)
    said = (q * shares.sum(1, keepdim=True)).sum((0, 2, 3))
    both = (q * shares).sum((0, 2, 3))
    own, said, both = summed(torch.stack([own, said, both]))
    present = own > 0
    scores = 1 - 2 * both / (own + said).clamp(min=1e-12)
    return (scores * present).sum() / present.sum().clamp(min=1) / count()  # which all of them have alike


def image_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """Loss of pixels, the logits upsampled bilinearly to the frame.

    logits: (batch, classes, rows, columns). labels: (batch, height, width), uint8; 255 is ignored. loss: as for
    level_loss.
    Returns a scalar, the mean weighted by the class weights; 0 where no pixel counts; for several processes as
    level_loss.
    """
    upsampled = interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    target = labels.long()
    if count() == 1 and bool((target == IGNORE).all()):
        return upsampled.sum() * 0
    if parse_loss(loss) == ("ce",) and count() == 1:
        return cross_entropy(upsampled, target, weights, ignore_index=IGNORE)
    if parse_loss(loss) == ("ce",):
        of_class = logits.new_ones(logits.shape[1]) if weights is None else weights
        mass = torch.cat([of_class, of_class.new_zeros(IGNORE + 1 - len(of_class))])[target].sum()
        total = cross_entropy(upsampled, target, weights, ignore_index=IGNORE, reduction="sum")
        return total / summed(mass).clamp(min=1e-12)
    classes = logits.shape[1]
    shares = one_hot(target.clamp(max=classes), classes + 1)[..., :classes].movedim(-1, 1).to(logits.dtype)
    return level_loss(upsampled, shares, weights, loss)


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
    A class without any pixel starts as if it had one. Raises ProbeError when no class has any.
    """
    if not pixels.sum() > 0:
        raise ProbeError("The training split holds no labelled pixel: all of its masks are 255. Nothing was trained.")
    share = pixels.double().clamp(min=1) / pixels.sum()
    if weights is not None:
        share = share * weights.to(share)
    head.bias.copy_((share / share.sum()).log())  # type: ignore[operator]
