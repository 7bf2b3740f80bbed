"""How good class predictions are: likelihood, accuracy, calibration, ranking.

Every function takes probabilities (n, C) and the observed classes (n,). All sums are
taken in float64, and every score is a Python float.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgdgp.checks import check_count


def negative_log_likelihood(
    probabilities: Float[Tensor, "n C"], y: Int[Tensor, " n"]
) -> float:
    """Mean over points of -log p(y_i), in nats; infinite where p(y_i) is zero.

    Args:
        probabilities: Predicted class probabilities (n, C), rows sum to one.
        y: Observed classes (n,).

    Raises:
        TypeError: Probabilities that are not floating-point, or classes no integers.
        ValueError: Shapes differ, nothing to average, rows that do not sum to one, or
            classes out of range.
    """
    _check_classes(probabilities, y)
    return -float(_of_target(probabilities, y).log().mean())


def accuracy(probabilities: Float[Tensor, "n C"], y: Int[Tensor, " n"]) -> float:
    """Fraction of points whose likeliest class is the observed one.

    Args and errors: as ``negative_log_likelihood``.
    """
    _check_classes(probabilities, y)
    return float((probabilities.argmax(1) == y).double().mean())


def brier_score(probabilities: Float[Tensor, "n C"], y: Int[Tensor, " n"]) -> float:
    """Mean squared distance to the one-hot target, sum_c (p_c - 1[c = y])^2.

    Between 0 and 2 (Brier, 1950; half of it, for two classes, is what some call so).
    Args and errors: as ``negative_log_likelihood``.
    """
    _check_classes(probabilities, y)
    norms = torch.linalg.vector_norm(probabilities, dim=1, dtype=torch.float64)
    return float((norms.square() - 2 * _of_target(probabilities, y) + 1).mean())


def expected_calibration_error(
    probabilities: Float[Tensor, "n C"], y: Int[Tensor, " n"], bins: int = 15
) -> float:
    """Mean gap between the likeliest class's probability and how often it is right.

    Over bins of equal width of that probability, weighted by their counts (Guo et al.,
    2017, equation 3). Args and errors: as ``reliability_diagram``.
    """
    return reliability_diagram(probabilities, y, bins).error


@dataclass(frozen=True)
class Reliability:
    """Reliability diagram: how often predictions of a given confidence are right.

    Attributes:
        confidence: Mean probability of the likeliest class in each bin; NaN if empty.
        accuracy: Fraction of right predictions in each bin; NaN if empty.
        counts: Points in each bin.
    """

    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    counts: Int[Tensor, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error, the mean gap over all points."""
        gaps = (self.confidence - self.accuracy).abs().nan_to_num(0.0)
        return float((gaps * self.counts).sum() / self.counts.sum())


def reliability_diagram(
    probabilities: Float[Tensor, "n C"], y: Int[Tensor, " n"], bins: int = 15
) -> Reliability:
    """Confidence and accuracy in bins of equal width, ((b - 1) / bins, b / bins].

    Args:
        probabilities: Predicted class probabilities (n, C), rows sum to one.
        y: Observed classes (n,).
        bins: How many. Default: 15.

    Raises:
        TypeError: As ``negative_log_likelihood``, or ``bins`` is no integer.
        ValueError: As ``negative_log_likelihood``, or fewer than one bin.
    """
    check_count("bins", bins, 1)
    _check_classes(probabilities, y)
    confidence, predicted = probabilities.max(1)
    return reliability_of(confidence, predicted == y, bins)


def reliability_of(
    confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"], bins: int = 15
) -> Reliability:
    """Reliability diagram from confidences and whether the predictions were right."""
    confidence = confidence.detach().double()
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [
        torch.bincount(place, weights=values, minlength=bins)
        for values in (confidence, correct.double())
    ]
    return Reliability(sums[0] / counts, sums[1] / counts, counts)


def auroc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """Probability that a score from outside exceeds one from inside; ties count half.

    The area under the receiver operating characteristic, by the rank statistic of
    Mann and Whitney: one half when the scores tell nothing, one when they separate.

    Args:
        inside: Scores of points like the training data (n,).
        outside: Scores of points that should score higher (m,).

    Raises:
        TypeError: A score that is not floating-point.
        ValueError: No points on one side, or scores that are NaN.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if not scores.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor, found {scores.dtype}"
            )
        if scores.ndim != 1 or scores.numel() == 0:
            raise ValueError(
                f"{name}: expected shape (n,) with n > 0, found {tuple(scores.shape)}"
            )
        if bool(scores.isnan().any()):
            raise ValueError(f"{name}: expected scores, found NaN")
    ordered = inside.sort().values
    outside = outside.to(ordered)
    below = torch.searchsorted(ordered, outside, right=False)
    up_to = torch.searchsorted(ordered, outside, right=True)
    return float((below + up_to).double().mean()) / (2 * len(ordered))


def _of_target(probabilities: Tensor, y: Tensor) -> Tensor:
    """Probabilities of the observed classes (n,), in float64."""
    return probabilities.detach().gather(1, y.long().unsqueeze(1)).squeeze(1).double()


def _check_classes(probabilities: Tensor, y: Tensor) -> None:
    """Refuse what is no class prediction, naming what is wrong with it."""
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        found = getattr(probabilities, "dtype", type(probabilities).__name__)
        raise TypeError(
            f"probabilities: expected a floating-point tensor, found {found}"
        )
    if probabilities.ndim != 2 or probabilities.numel() == 0:
        raise ValueError(
            f"probabilities: expected shape (n, C) with n > 0, found "
            f"{tuple(probabilities.shape)}"
        )
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        found = getattr(y, "dtype", type(y).__name__)
        raise TypeError(f"y: expected class indices as integers, found {found}")
    n, classes = probabilities.shape
    if y.shape != (n,):
        raise ValueError(f"y: expected shape ({n},), found {tuple(y.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"y: expected class indices from 0 to {classes - 1}, found "
            f"{low if low < 0 else high}"
        )
    sums = probabilities.sum(1, dtype=torch.float64)
    if not bool(((sums - 1).abs() < 1e-2).all()) or bool((probabilities < 0).any()):
        raise ValueError(
            "probabilities: expected non-negative rows that sum to one; apply softmax "
            "to logits first"
        )
