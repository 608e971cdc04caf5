"""Losses of dense heads, at the finest level's grid or at the image's: cross-entropy, dice, focal, and their sums."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featprobe.errors import ProbeError, ShapeError
from featprobe.kinds import parse_loss
from featprobe.probes import execution
from featprobe.probes.head import DenseHead
from featprobe.processes import count, summed
from featprobe.targets import IGNORE

T = TypeVar("T")
FOCUS = 2.0  # exponent of the focal loss (Lin et al., 2017)


def level_loss(logits: Tensor, shares: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """Loss of cells against the class shares of the pixels that they cover.

    logits: (batch, classes, rows, columns). shares: the same shape, area shares as features.cell_shares
    gives them. weights: (classes,), or None for ones. loss: terms of parse_loss, added up.
    Returns a scalar; for "ce" sum w_c p_c (-log q_c) / sum w_c p_c; 0 where no pixel counts. With several processes
    each gets its part: the parts sum to the loss of the whole batch.

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


def level_losses(logits: Tensor, shares: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """level_loss of several heads at once, (heads,). logits: (batch, heads, classes, rows, columns)."""
    terms, every = parse_loss(loss), (0, 2, 3, 4)
    p = shares[:, None]
    weighted = p if weights is None else p * weights[:, None, None]
    log_q = torch.log_softmax(logits, 2)
    mass, found = summed(weighted.sum()).clamp(min=1e-12), []  # each (heads,)
    if "ce" in terms:
        found.append((weighted * log_q).sum(every) / -mass)
    if "focal" in terms:
        hard = (1 - log_q.exp()).clamp(min=0).pow(FOCUS)
        found.append((weighted * hard * log_q).sum(every) / -mass)
    if "dice" in terms:
        q, cells = log_q.exp(), (0, 3, 4)
        own = p.sum(cells).expand(q.shape[1], -1)  # (heads, classes)
        said, both = (q * p.sum(2, keepdim=True)).sum(cells), (q * p).sum(cells)
        own, said, both = summed(torch.stack([own, said, both]))
        present = own > 0
        scores = 1 - 2 * both / (own + said).clamp(min=1e-12)
        found.append((scores * present).sum(1) / present.sum(1).clamp(min=1) / count())
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def image_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """Loss of pixels, the logits upsampled bilinearly to the frame.

    logits: (batch, classes, rows, columns). labels: (batch, height, width), uint8; 255 is ignored. loss: as for
    level_loss.
    Returns a scalar, the mean weighted by the class weights; 0 where no pixel counts; for several processes as
    level_loss.
    """
    return image_losses(logits[:, None], labels, weights, loss)[0]


def image_losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None, loss: str = "ce") -> Tensor:
    """image_loss of several heads at once, (heads,). logits: (batch, heads, classes, rows, columns)."""
    heads, classes = logits.shape[1:3]
    if parse_loss(loss) == ("ce",):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        with execution.full_products(logits.device):
            return _ImageLoss.apply(logits, labels, logits.new_ones(classes) if weights is None else weights.to(logits))
    upsampled = interpolate(logits.flatten(1, 2), labels.shape[1:], mode="bilinear", align_corners=False)
    own = torch.arange(classes, device=labels.device, dtype=labels.dtype)[:, None, None]
    shares = (labels[:, None] == own).to(logits.dtype)
    return level_losses(upsampled.unflatten(1, (heads, classes)), shares, weights, loss)


class _ImageLoss(torch.autograd.Function):
    """Cross-entropy at the image's size with its gradient, a piece of the batch at a time.

    Upsampled logits need as much memory as everything else that a step reads, so they are not kept: each piece goes
    forward and at once back. A piece is as many rows of an image as fit a CPU's caches, or as many images as fit a
    share of a GPU's memory. Bilinear upsampling along an axis is a product with a sparse matrix; a piece uses the block
    of it that is not zero. On a CPU that is several times faster than upsampling by pixels; the adjoint, which is the
    transpose, is faster on a GPU too, and gives the same result in every run.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """logits: (batch, heads, classes, rows, columns). weights: (classes,). Returns (heads,)."""
        of_label = torch.cat([weights, weights.new_zeros(IGNORE + 1 - weights.shape[0])])
        if execution.whole_batches(logits.device):
            step = max(1, IN_MEMORY // (logits.shape[1:3].numel() * labels.shape[1:].numel()))
            parts = zip(logits.split(step), labels.split(step), strict=True)
            done = [_at_once(*part, of_label) for part in parts]
        else:
            done = _alone(lambda image: _in_caches(logits[image], labels[image], of_label), range(len(logits)))
        found, gradients, masses = zip(*done, strict=True)
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        mass = summed(reduce(torch.add, masses)).clamp(min=1e-12)
        ctx.save_for_backward(gradient, mass)
        return reduce(torch.add, found) / -mass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """upstream: (heads,)."""
        gradient, mass = ctx.saved_tensors
        return gradient * (upstream[0] / mass)[:, None, None, None], None, None


def _at_once(logits: Tensor, labels: Tensor, of_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted log-likelihood of each head, (heads,), what its loss makes of the logits, the sum of the weights.

    In few operations. logits: (images, heads, classes, rows, columns). of_label: (256,), the weight of each label. The
    gradient of a pixel, which is no larger than its weight, is in half precision where the device sums products of such
    numbers in float32.
    """
    rows, columns = logits.shape[3:]
    size, heads = labels.shape[1:], logits.shape[:3]
    label = labels.long()[:, None, None]
    weight = of_label[label]  # (images, 1, 1, height, width)
    target = label.clamp(max=heads[2] - 1).expand(-1, heads[1], -1, -1, -1)
    upsampled = interpolate(logits.flatten(1, 2), size, mode="bilinear", align_corners=False)
    q = torch.log_softmax(upsampled.unflatten(1, heads[1:]), 2)
    del upsampled
    found = (q.gather(2, target) * weight).sum((0, 2, 3, 4))
    one = execution.repeated(((1, -1.0),), logits.dtype, logits.device)
    q.exp_().scatter_add_(2, target, one.expand_as(target))
    mixed = logits.dtype == torch.float32 and execution.mixed(logits.device)
    z = q.new_empty(q.shape, dtype=torch.float16) if mixed else q
    torch.mul(q, weight, out=z)
    pixels = z.flatten(0, 2)  # (images * heads * classes, height, width)
    across = _upsampling(columns, size[1], z).expand(len(pixels), -1, -1)
    narrow = torch.bmm(pixels, across, out_dtype=logits.dtype) if mixed else torch.bmm(pixels, across)
    return found, _upsampling(rows, size[0], logits).T @ narrow.unflatten(0, heads), weight.sum()


def _in_caches(logits: Tensor, labels: Tensor, of_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one image, as many rows of it as the caches hold at a time; its gradient is (1, heads, …)."""
    heads, classes, rows, columns = logits.shape
    height, width = labels.shape
    down, across = _upsampling(rows, height, logits), _upsampling(columns, width, logits)
    mass, total = logits.new_zeros(()), logits.new_zeros(heads)
    wide = logits.new_empty(heads, classes, rows, width)
    for pixels, cells in _blocks(columns, width, COLUMNS):
        wide[..., pixels] = logits[..., cells] @ across[pixels, cells].T
    back = torch.zeros_like(wide)
    for pixels, cells in _blocks(rows, height, max(1, CACHED // (heads * classes * width * (height // rows)))):
        label = labels[pixels].long()
        weight = of_label[label]  # (pixels, width)
        target = label.clamp_(max=classes - 1).expand(heads, 1, -1, -1)
        block = down[pixels, cells]
        z = block @ wide[:, :, cells]  # (heads, classes, pixels, width)
        picked = z.gather(1, target)
        sums = z.exp_().sum(1, keepdim=True)  # torch's softmax takes ten times as long as these steps
        least, most = sums.aminmax()
        if not (float(least) > 1 / LARGEST_SUM and float(most) < LARGEST_SUM):
            torch.matmul(block, wide[:, :, cells], out=z)
            z -= z.amax(1, keepdim=True)
            picked = z.gather(1, target)
            sums = z.exp_().sum(1, keepdim=True)
        total += ((picked - sums.log()) * weight).sum((1, 2, 3))
        mass += weight.sum()
        z *= weight / sums
        z.scatter_add_(1, target, (-weight).expand_as(target))
        back[:, :, cells].add_(block.T @ z)
    gradient = torch.zeros_like(logits)
    for pixels, cells in _blocks(columns, width, COLUMNS):
        gradient[..., cells].add_(back[..., pixels] @ across[pixels, cells])
    return total, gradient[None], mass


def _blocks(cells: int, pixels: int, step: int) -> Iterator[tuple[slice, slice]]:
    """(pixels, the cells that they are upsampled from) along an axis, for `step` cells at a time."""
    stride = pixels // cells
    for start in range(0, cells, step):
        end = min(start + step, cells)
        yield slice(start * stride, end * stride), slice(max(0, start - 1), min(cells, end + 1))


COLUMNS = 32  # cells of a block across
CACHED = 2**18  # upsampled logits of a piece on a CPU
IN_MEMORY = 2**28  # on a GPU: 1 GiB, a few times
LARGEST_SUM = 1e26  # of exp() of a pixel's logits, and one over the least: beyond these float32 could leave its range


def _alone(work: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """Results of `work` for every item, by as many threads as torch has, each of which computes alone.

    Threads that share each small operation wait for each other after every one; beside other load that is most of the
    time.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]

    def quiet(item: int) -> T:
        # MKL has one number of threads for the whole process, and with another number it gives other bits
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(item)

    try:
        return list(_pool(threads, os.getpid()).map(quiet, items))
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # a process that was forked has no threads
    return ThreadPoolExecutor(threads, "loss")


@cache
def _matrix(cells: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        matrix = interpolate(torch.eye(cells, dtype=torch.float64)[None], pixels, mode="linear")[0].T.contiguous()
        return matrix.to(dtype).to(device)


def _upsampling(cells: int, pixels: int, like: Tensor) -> Tensor:
    """The matrix of linear upsampling along an axis: (pixels, cells)."""
    return _matrix(cells, pixels, like.dtype, like.device)


def inverse_sqrt_weights(pixels: Tensor) -> Tensor:
    """Class weights 1 / sqrt(frequency), scaled so that a training pixel has weight 1 on average.

    pixels: (classes,), labelled pixels per class in the training split. A class without pixels gets
    weight 1, which has no effect on the loss.

    >>> [round(w, 3) for w in inverse_sqrt_weights(torch.tensor([90., 10., 0.])).tolist()]
    [0.833, 2.5, 1.0]
    """
    share = pixels.double() / pixels.sum()
    weights = share.clamp(min=1e-12).rsqrt()
    weights = weights / (weights * share).sum()
    return torch.where(pixels > 0, weights, torch.ones_like(weights)).float()


def start_at_prior(head: DenseHead, pixels: Tensor, weights: Tensor | None = None) -> None:
    """Set a dense head's bias so that it begins by predicting the classes' frequencies.

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
    head.start_at(share / share.sum())
