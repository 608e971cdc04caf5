"""L2-regularised logistic regression of image labels, over a path of strengths."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from featprobe.errors import ProbeError, ShapeError

STRENGTHS = tuple(10 ** (-6 + 11 * place / 39) for place in range(40))
"""Values of C, from the strongest regularisation to the weakest: see `Path`."""
TOLERANCE, FINE = 1e-12, 1e-24
"""Newton decrement, as a share of the objective, at which a solution of the path stands, and a polished one."""
CONSTANT = 1e-6  # of its largest value: a feature whose standard deviation is no more does not change
RANK = 1e-13  # of the largest eigenvalue: directions below are rounding
NEVER = 1e4  # minus the logit of a label that no training image has
MOST_STEPS = 60  # of Newton's method, per strength
PATIENCE = 40  # conjugate steps at one strength, after which the Hessian is computed
HALVINGS = 30  # of a step
ROUNDING = 1e-9  # of an objective, whose change along a step is computed in float32
EXACT = 0.01  # of the squared residual, left by the conjugate gradients of a Newton step
MOST_HELD = 2**30  # bytes of Hessians
ROWS = 4096  # that are converted at once


@dataclass(frozen=True)
class Solution:
    """Logistic regression at one strength: logits are standardised vectors @ weight.T + bias.

    c: see `Path`. weight: (labels, values). bias: (labels,). Both float64. point: the same in the path's own basis.
    """

    c: float
    weight: Tensor
    bias: Tensor
    point: Tensor


def standard(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each value, float32; the latter is 0 for a value that does not change.

    vectors: (images, values). Raises ProbeError for values that are not finite.
    """
    if not vectors.isfinite().all():
        raise ProbeError("Features of training images are not finite. Extract them again, in float32.")
    precise = torch.float32 if vectors.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = torch.zeros(vectors.shape[1], dtype=precise, device=vectors.device)
    for part in vectors.split(ROWS):
        total += part.to(precise).sum(0)
    mean = (total / max(len(vectors), 1)).float()
    squares, largest = torch.zeros_like(total), torch.zeros_like(total)
    for part in vectors.split(ROWS):
        squares += (part.to(precise) - mean).square().sum(0)
        largest = largest.maximum(part.abs().amax(0).to(precise))
    deviation = (squares / max(len(vectors), 1)).sqrt()
    changes = deviation > (CONSTANT * largest).clamp(min=1e-30)
    return mean, torch.where(changes, 1 / deviation, 0).float()


class Path:
    """Solutions for one set of training images, from strong to weak regularisation, each from the one before.

    Minimises 1/2 |weight|^2 + C x the sum of log losses, as LogisticRegression of scikit-learn does on standardised
    vectors: the intercept is free. C is the inverse of the strength. Labels that exclude each other get a softmax; two
    of them a sigmoid, whose weight is shared out as -1/2 and 1/2. Where an image may have several labels each has a
    sigmoid of its own.

    Newton's method with conjugate gradients, in the basis in which the training vectors are white: there the Hessian
    is nearly diagonal where labels are hard to tell, for any strength. Where that takes too long, as with labels that
    can be separated, the Hessian is computed and factorised, and serves the strengths after it. All on the CPU, in
    float64 but for the products of the conjugate gradients; nothing is drawn at random.

    vectors: (images, values). labels: (images, labels), 1 where a label holds; one per image unless `multi`. mean,
    scale: of `standard`. Raises ShapeError where they disagree, ProbeError where no two labels can be told apart.
    """

    def __init__(self, vectors: Tensor, labels: Tensor, mean: Tensor, scale: Tensor, *, multi: bool) -> None:
        if labels.dim() != 2 or len(labels) != len(vectors) or not ((labels == 0) | (labels == 1)).all():
            raise ShapeError(
                f"wanted labels of {len(vectors)} images, 0 or 1. found: shape {tuple(labels.shape)}, "
                f"values {labels.unique().tolist()[:5]}"
            )
        if not multi and not (labels.sum(1) == 1).all():
            raise ShapeError("wanted one label per image. found: images with several labels, or none.")
        own = labels.cpu().double()
        self.prior = own.mean(0) if len(own) else own.sum(0)  # (labels,)
        self.known = (self.prior > 0) & ((self.prior < 1) | (not multi))
        if int(self.known.sum()) < (1 if multi else 2):
            raise ProbeError(
                "All training images have the same labels. Nothing can be learnt from them.\n"
                f"wanted: images with and without a label. found: {len(own)} images."
            )
        self.pair = not multi and int(self.known.sum()) == 2
        self.labels = own[:, self.known][:, int(self.pair) :]  # (images, columns)
        self.sigmoid = multi or self.pair
        self.rows, self.penalty, self.back = _white(vectors, mean, scale)
        self.brief = self.rows.float()
        self.hessians: Tensor | None = None

    def solutions(self, strengths: Sequence[float] = STRENGTHS) -> Iterator[Solution]:
        """The solution at each C. strengths: > 0, ascending: from the strongest regularisation to the weakest."""
        mean = self.labels.mean(0)
        point = torch.zeros(self.rows.shape[1], len(mean), dtype=torch.float64)
        point[-1] = mean.logit() if self.sigmoid else mean.log() - mean.log().mean()
        before, last = None, None  # (log C, point)
        for c in strengths:
            here = point
            if before is not None and last is not None:  # along the secant of the last two
                here = point + (point - before[1]) * (math.log(c) - last[0]) / (last[0] - before[0])
            point = self._minimum(here, point, c, TOLERANCE)
            before, last = last, (math.log(c), point)
            yield self._solution(point, c)

    def polished(self, solution: Solution) -> Solution:
        """The same solution as exactly as float64 has it."""
        return self._solution(self._minimum(solution.point, solution.point, solution.c, FINE), solution.c)

    def _solution(self, point: Tensor, c: float) -> Solution:
        weight, bias = (self.back @ point[:-1]).T, point[-1]
        if self.pair:
            weight, bias = (torch.cat([-x / 2, x / 2]) for x in (weight, bias))
        every = weight.new_zeros(len(self.prior), weight.shape[1])
        every[self.known] = weight
        biases = torch.where(self.prior > 0, NEVER, -NEVER).double()
        biases[self.known] = bias
        return Solution(c, every, biases, point)

    def _total(self, x: Tensor) -> Tensor:
        """Sums over what is solved for together: (1, columns), or (1, 1) where a softmax joins the columns."""
        return x.sum(0, keepdim=True) if self.sigmoid else x.sum().reshape(1, 1)

    def _value(self, logits: Tensor, point: Tensor, penalty: Tensor) -> Tensor:
        """The objective over C, (1, columns) or (1, 1)."""
        wanted = self.labels * logits
        if self.sigmoid:
            loss = (softplus(logits, threshold=50) - wanted).sum(0, keepdim=True)
        else:
            loss = (logits.logsumexp(1) - wanted.sum(1)).sum().reshape(1, 1)
        return loss + self._total(penalty * point.square()) / 2

    def _minimum(self, here: Tensor, point: Tensor, c: float, tolerance: float) -> Tensor:
        """The point of least objective, from the better of two points."""
        penalty = self.penalty / c
        logits, others = self.rows @ here, self.rows @ point
        value, least = self._value(logits, here, penalty), self._value(others, point, penalty)
        worse = value > least
        point, logits, value = torch.where(worse, point, here), torch.where(worse, others, logits), value.minimum(least)
        factors, spent = self._factors(penalty), 0
        for _ in range(MOST_STEPS):
            shares = logits.sigmoid() if self.sigmoid else logits.softmax(1)
            gradient = self.rows.T @ (shares - self.labels) + penalty * point
            if spent >= PATIENCE and self._refresh(shares):
                factors, spent = self._factors(penalty), 0
            curve = (shares * (1 - shares)).sum(0) + penalty
            solve = partial(self._preconditioned, curve if factors is None else factors)
            open_ = self._total(gradient * solve(gradient)) > tolerance * value
            if not open_.any():
                break
            step, moves, count = self._newton(gradient * open_, shares, penalty, solve, PATIENCE - min(spent, 20))
            spent += count
            size = self._searched(point, logits, step, moves, self._total(gradient * step), value, penalty)
            if not (size > 0).any():
                break
            point = point + size * step
            logits = self.rows @ point
            value = self._value(logits, point, penalty)
        return point

    def _newton(
        self, gradient: Tensor, shares: Tensor, penalty: Tensor, solve: Callable[[Tensor], Tensor], most: int
    ) -> tuple[Tensor, Tensor, int]:
        """(Newton's step by preconditioned conjugate gradients, what it adds to the logits, steps that it took)."""
        step, moves = torch.zeros_like(gradient), torch.zeros_like(shares)
        left, along = -gradient, solve(-gradient)
        before = first = self._total(left * along)
        count = 0
        for count in range(1, most + 1):  # noqa: B007
            ahead = (self.brief @ along.float()).double()  # its rounding is corrected by the next step
            curved = shares * (1 - shares) * ahead if self.sigmoid else _curved(shares, ahead)
            bent = (self.brief.T @ curved.float()).double() + penalty * along
            size = _ratio(before, self._total(along * bent))
            step, moves, left = step + size * along, moves + size * ahead, left - size * bent
            direction = solve(left)
            after = self._total(left * direction)
            if (after <= EXACT * first).all():
                break
            along, before = direction + _ratio(after, before) * along, after
        return step, moves, count

    def _preconditioned(self, hessian: Tensor, x: Tensor) -> Tensor:
        """The solution of hessian @ solution = x, (parameters, columns).

        hessian: its diagonal, (parameters, columns), or a Cholesky factor for each column: see `_factors`. What all
        columns of a softmax have in common changes nothing but the penalty, so it stays 0.
        """
        if hessian.dim() == 2:
            found = x / hessian
        else:
            found = torch.cholesky_solve(x.T[:, :, None], hessian)[:, :, 0].T
        return found if self.sigmoid else found - found.mean(1, keepdim=True)

    def _searched(
        self, point: Tensor, logits: Tensor, step: Tensor, moves: Tensor, slope: Tensor, value: Tensor, penalty: Tensor
    ) -> Tensor:
        """The largest of 1, 1/2, 1/4 … of a step that lowers the objective enough, (1, columns) or (1, 1); else 0."""
        size = torch.ones_like(value)
        for _ in range(HALVINGS):
            found = self._value(logits + size * moves, point + size * step, penalty)
            enough = found <= value + 1e-4 * size * slope + ROUNDING * value
            if enough.all():
                break
            size = torch.where(enough, size, size / 2)
        return size * enough

    def _refresh(self, shares: Tensor) -> bool:
        """Compute each column's Hessian of the loss, where memory allows."""
        wide, columns = self.rows.shape[1], shares.shape[1]
        if 8 * columns * wide**2 > MOST_HELD:
            return False
        self.hessians = torch.zeros(columns, wide, wide, dtype=torch.float64)
        for rows, own in zip(self.rows.split(ROWS), shares.split(ROWS), strict=True):
            for column, hessian in zip((own * (1 - own)).T, self.hessians, strict=True):
                hessian.addmm_((rows * column[:, None]).T, rows)
        return True

    def _factors(self, penalty: Tensor) -> Tensor | None:
        """Cholesky factors of the Hessians, (columns, parameters, parameters); None without, or where they fail."""
        if self.hessians is None:
            return None
        factors, failed = torch.linalg.cholesky_ex(self.hessians + penalty[:, 0].diag())
        return None if failed.any() else factors


def _white(vectors: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A basis in which the standardised training vectors are white.

    Returns (rows: (images, rank + 1), the vectors there and a 1; penalty: (rank + 1, 1), what each squared coordinate
    counts in |weight|^2; back: (values, rank), from coordinates to a weight). float64.
    """
    mean, scale, vectors = mean.cpu().double(), scale.cpu().double(), vectors.cpu()
    count, wide = vectors.shape

    def parts() -> Iterator[Tensor]:
        return ((part.double() - mean) * scale for part in vectors.split(ROWS))

    if count > wide:
        gram = torch.zeros(wide, wide, dtype=torch.float64)
        for part in parts():
            gram.addmm_(part.T, part)
    else:
        every = torch.cat(list(parts()))
        gram = every @ every.T
    values, axes = torch.linalg.eigh(gram)
    kept = values > RANK * values[-1]
    values, axes = values[kept], axes[:, kept]
    rows = torch.ones(count, len(values) + 1, dtype=torch.float64)
    if count > wide:
        back = axes * (count / values).sqrt()
        for place, part in zip(rows.split(ROWS), parts(), strict=True):
            place[:, :-1] = part @ back
    else:
        rows[:, :-1] = axes * count**0.5
        back = every.T @ axes * (count**0.5 / values)
    return rows, torch.cat([count / values, values.new_zeros(1)])[:, None], back * (scale > 0)[:, None]


def _curved(shares: Tensor, ahead: Tensor) -> Tensor:
    """The Hessian of a softmax's loss times a change of its logits, (images, columns)."""
    return shares * (ahead - (shares * ahead).sum(1, keepdim=True))


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """Their ratio; 0 where there is nothing to divide by: a column that is solved."""
    return torch.where(under > 0, over / under, 0)


def choose(
    path: Path, score: Callable[[Solution], float], strengths: Sequence[float] = STRENGTHS
) -> tuple[Solution, dict[str, Any]]:
    """The solution that scores highest, polished: of equals that of the strongest regularisation.

    score: nan counts as worst; where all are nan the C nearest to 1 is chosen. Returns it and what was decided, as a
    result row keeps it: C, how many were tried, and at which end of the path it lies, "strongest" or "weakest", if at
    one.
    """
    best: tuple[tuple[bool, float], Solution] | None = None
    for solution in path.solutions(strengths):
        value = score(solution)
        rank = (False, -abs(math.log(solution.c))) if math.isnan(value) else (True, value)
        if best is None or rank > best[0]:
            best = rank, solution
    if best is None:
        raise ProbeError("No strength of regularisation to choose from.")
    chosen = best[1]
    ends = {strengths[0]: "strongest", strengths[-1]: "weakest"}
    decided = {"C": chosen.c, "tried": len(strengths), "end": ends.get(chosen.c)}
    return path.polished(chosen), decided
