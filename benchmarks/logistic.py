"""The linear head of image labels: its whole path of strengths, against scikit-learn's logistic regression.

    python benchmarks/logistic.py

10,000 images of 1440 features with two labels, 40 strengths, the choice by AUROC on 2,000 validation images, in two
worlds: labels that overlap, and labels that a plane separates, where weak regularisation means huge weights. Seconds
are those of `solve`, all included, in turn with scikit-learn's default solver at its default tolerance with warm
starts. Probabilities of validation along the path, the chosen strength and its weights are compared with
scikit-learn's "newton-cholesky" at tolerance 1e-8: its default solver stops too early at weak regularisation, whatever
the tolerance. The gradient at the chosen strength says which of the two is closer. The ratio is the least of wanted
over measured, in both worlds: 15 s, 0.01, 1e-3; 0 where another strength is chosen whose score differs.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _bench import interleave, positive, report, timed
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from featprobe.levels import FeatureLevel
from featprobe.probes.verdicts.classifiers import LinearClassifier
from featprobe.probes.verdicts.logistic import STRENGTHS, Path

SECONDS, PROBABILITY, COEFFICIENTS = 15.0, 0.01, 1e-3  # at most
EQUAL = 1e-5  # of AUROC: strengths that differ by less score the same
VALIDATION = 2000
WORLDS = ("overlap", "separable")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Features, float32, (images, values), and labels, (images,), of training and of validation."""

    train: torch.Tensor
    labels: NDArray[np.uint8]
    val: torch.Tensor
    val_labels: NDArray[np.uint8]

    @property
    def one_hot(self) -> torch.Tensor:
        """(training images, 2)."""
        return torch.from_numpy(np.eye(2, dtype=np.uint8)[self.labels])

    def judge(self, logits: torch.Tensor) -> float:
        """AUROC on validation."""
        return float(roc_auc_score(self.val_labels, (logits[:, 1] - logits[:, 0]).numpy()))


def world_of(name: str, images: int, values: int) -> World:
    """Correlated, skewed features of unequal scale, whose variances fall by a power law."""
    random = np.random.default_rng(0)
    count = images + VALIDATION
    axes, _ = np.linalg.qr(random.normal(size=(values, values)))
    x = (random.normal(size=(count, values)) * np.arange(1, values + 1) ** -0.7) @ axes.T
    x = np.exp(x / x.std() / 2) * random.lognormal(0, 1, values) + random.normal(size=values)
    told = (x - x.mean(0)) / x.std(0) @ random.normal(size=values)
    told /= told.std()
    labels = told > 1 if name == "separable" else random.random(count) < expit(1.5 * told - 1)
    whole, own = torch.from_numpy(x.astype(np.float32)), labels.astype(np.uint8)
    return World(whole[:images], own[:images], whole[images:], own[images:])


def sklearns(
    x: Floats, labels: NDArray[np.uint8], solver: str, tolerance: float, took: Callable[[LogisticRegression], None]
) -> None:
    """scikit-learn's solutions along the path, each started from the one before."""
    model = LogisticRegression(solver=solver, tol=tolerance, max_iter=100_000, warm_start=True)
    for strength in STRENGTHS:
        took(model.set_params(C=strength).fit(x, labels))


def relative_gradient(x: Floats, labels: NDArray[np.uint8], weight: Floats, bias: float, strength: float) -> float:
    """The gradient's length, as a share of the weight's, which is the gradient of the penalty alone."""
    gradient = strength * x.T @ (expit(x @ weight + bias) - labels) + weight
    return float(np.linalg.norm(gradient) / np.linalg.norm(weight))


def compared(world: World, head: LinearClassifier, chosen: float) -> dict[str, float]:
    """What the head says along the path and at the chosen strength, beside scikit-learn. head: solved."""
    x, val = (head.standardised(own).double().numpy() for own in (world.train, world.val))
    path = Path(world.train, world.one_hot, head.mean, head.scale, multi=False)
    ours = [(s.weight[1] - s.weight[0]).numpy() @ val.T + float(s.bias[1] - s.bias[0]) for s in path.solutions()]
    theirs: list[tuple[Floats, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it turns to its other solver
        sklearns(
            x,
            world.labels,
            "newton-cholesky",
            1e-8,
            lambda m: theirs.append((m.coef_[0].copy(), float(m.intercept_[0]))),
        )
    apart = [float(np.abs(expit(a) - expit(val @ w + b)).max()) for a, (w, b) in zip(ours, theirs, strict=True)]
    scores = [float(roc_auc_score(world.val_labels, val @ w + b)) for w, b in theirs]
    place = STRENGTHS.index(chosen)
    weight, bias = theirs[place]
    own = (head.weight[1] - head.weight[0]).detach().double().numpy()
    own_bias = float((head.bias[1] - head.bias[0]).detach())
    return {
        "probability": max(apart),
        "coefficients": float(np.linalg.norm(own - weight) / np.linalg.norm(weight)),
        "C": chosen,
        "C of scikit-learn": STRENGTHS[int(np.argmax(scores))],
        "score lost": max(scores) - scores[place],
        "gradient": relative_gradient(x, world.labels, own, own_bias, chosen),
        "gradient of scikit-learn": relative_gradient(x, world.labels, weight, bias, chosen),
    }


def measured(name: str, images: int, values: int, rounds: int) -> dict[str, float]:
    """All figures of one world."""
    world = world_of(name, images, values)
    head = LinearClassifier((FeatureLevel("pooled", values // 2, 32),), 2)
    chosen: list[float] = []

    def solve() -> None:
        found = head.solve(world.train, world.one_hot, world.val, world.judge, multi=False)
        chosen.append(found["C"])

    begun = time.process_time()
    solve()
    cpu = time.process_time() - begun
    x = head.standardised(world.train).double().numpy()
    arms = {
        "solve": timed(solve),
        "sklearn": timed(lambda: sklearns(x, world.labels, "lbfgs", 1e-4, lambda model: None)),
    }
    timings = interleave(arms, rounds)
    return {
        "seconds": timings.median("solve"), "CPU seconds": cpu, "scikit-learn's seconds": timings.median("sklearn"),
        "times faster": timings.ratio("sklearn", "solve"), **compared(world, head, chosen[-1]),
    }  # fmt: skip


def main() -> None:
    """Measure both worlds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=10_000)
    parser.add_argument("--values", type=positive, default=1440)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--world", choices=WORLDS, action="append", help="Only this one.")
    options = parser.parse_args()
    worlds = options.world or list(WORLDS)
    found = {name: measured(name, options.images, options.values, options.rounds) for name in worlds}
    ratios = []
    for own in found.values():
        limits = {"seconds": SECONDS, "probability": PROBABILITY, "coefficients": COEFFICIENTS}
        ratios += [most / max(own[name], 1e-12) for name, most in limits.items()]
        ratios.append(np.inf if own["score lost"] <= EQUAL else 0.0)
    rows = [
        {"figure": figure, **{name: f"{own[figure]:.3g}" for name, own in found.items()}} for figure in found[worlds[0]]
    ]
    brief = {name: {figure: float(f"{x:.4g}") for figure, x in own.items()} for name, own in found.items()}
    report("logistic", float(min(ratios)), 1.0, rows, images=options.images, values=options.values, worlds=brief)


if __name__ == "__main__":
    main()
