"""How good predictions are: of Gaussian targets, and of classes.

Scores of Gaussian predictions take one N(mean_i, variance_i) per point, of the
*observed* target: add the noise variance to the variance of the function first.
Scores of class predictions take probabilities (n, C) and class indices (n,).
All sums are taken in float64, and every score is a Python float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite, check_variances

__all__ = [
    "CALIBRATION_LEVELS",
    "Reliability",
    "accuracy",
    "auroc",
    "brier_score",
    "calibration_error",
    "crps",
    "expected_calibration_error",
    "interval_coverage",
    "negative_log_likelihood",
    "negative_log_predictive_density",
    "reliability_diagram",
    "rmse",
]

CALIBRATION_LEVELS: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))
"""Nominal levels of ``calibration_error``: 0.05, 0.10, ..., 0.95."""


def rmse(mean: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Root mean squared error, sqrt(mean_i (y_i - mean_i)^2).

    Args:
        mean: Predicted means (n,).
        y: Observed targets (n,).

    Returns:
        The error, in the units of ``y``.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices differ, nothing to average, or non-finite values.
    """
    mean, y = _checked(mean=mean, y=y)
    return float((y - mean).square().mean().sqrt())


def negative_log_predictive_density(
    mean: Float[Tensor, " n"], variance: Float[Tensor, " n"], y: Float[Tensor, " n"]
) -> float:
    """Mean over points of -log N(y_i | mean_i, variance_i), in nats.

    Args:
        mean: Predicted means (n,).
        variance: Predicted variances of the targets, noise included (n,).
        y: Observed targets (n,).

    Returns:
        The mean negative log density; lower is better.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices differ, nothing to average, non-finite values,
            or a variance that is not positive.
    """
    mean, variance, y = _checked(mean=mean, variance=variance, y=y)
    density = (2 * math.pi * variance).log() + (y - mean).square() / variance
    return float(0.5 * density.mean())


def interval_coverage(
    mean: Float[Tensor, " n"],
    variance: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    level: float = 0.95,
) -> float:
    """Fraction of targets inside their central predictive interval.

    ``level`` is the probability of the interval, strictly between 0 and 1, and what is
    returned on average when the predictions are calibrated. Other args and errors: as
    ``negative_log_predictive_density``.
    """
    (level,) = _checked_levels([level], "level")
    reached = _smallest_level(*_checked(mean=mean, variance=variance, y=y))
    return float((reached <= level).double().mean())


def calibration_error(
    mean: Float[Tensor, " n"],
    variance: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    levels: Sequence[float] = CALIBRATION_LEVELS,
) -> float:
    """Mean gap between nominal and empirical coverage of central intervals.

    For each of the levels p, strictly between 0 and 1, the empirical coverage c(p) is
    the fraction of targets inside their central interval of probability p; the error is
    mean_p |c(p) - p|. It is 0 for perfect calibration and at most
    max(mean p, 1 - mean p), which is one half for the default levels; n calibrated
    points leave about 0.3 / sqrt(n) by chance. Other args and errors: as
    ``negative_log_predictive_density``.
    """
    nominal = torch.tensor(
        _checked_levels(levels, "levels"), dtype=torch.float64, device="cpu"
    )
    reached = _smallest_level(*_checked(mean=mean, variance=variance, y=y))
    # Counting sorted values keeps the cost at n log n, however many levels.
    counts = torch.searchsorted(reached.sort().values.cpu(), nominal, right=True)
    return float((counts.double() / reached.numel() - nominal).abs().mean())


def crps(
    mean: Float[Tensor, " n"], variance: Float[Tensor, " n"], y: Float[Tensor, " n"]
) -> float:
    """Mean continuous ranked probability score of Gaussian predictions.

    The score of one point is the integral over t of (F_i(t) - 1[t >= y_i])^2 with F_i
    the predictive distribution function. With z = (y - mean) / s it is
    s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) (Gneiting and Raftery, 2007,
    equation 21). In the units of ``y``; lower is better. Args and errors: as
    ``negative_log_predictive_density``.
    """
    mean, variance, y = _checked(mean=mean, variance=variance, y=y)
    scale = variance.sqrt()
    z = (y - mean) / scale
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    centred = torch.erf(z / math.sqrt(2.0))
    score = scale * (z * centred + 2 * density - 1 / math.sqrt(math.pi))
    return float(score.mean())


def _smallest_level(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Level of the smallest central interval that holds each target (n,)."""
    return torch.erf((y - mean).abs() / (2 * variance).sqrt())


def _checked_levels(levels: Sequence[float], name: str) -> list[float]:
    """The levels as floats, each strictly between 0 and 1."""
    values = [float(level) for level in levels]
    if not values:
        raise ValueError(f"{name}: expected probabilities, found none")
    for value in values:
        if not 0.0 < value < 1.0:
            raise ValueError(
                f"{name}: expected probabilities strictly between 0 and 1, "
                f"found {value}"
            )
    return values


def _checked(**arguments: Tensor) -> tuple[Tensor, ...]:
    """The arguments in float64, after all that can be wrong with them was named."""
    first_name, first = next(iter(arguments.items()))
    for name, value in arguments.items():
        _check_vector(name, value)
        if value.shape != first.shape:
            raise ValueError(
                f"{name}: expected one value per point as in {first_name}, "
                f"{len(first)}, found {len(value)}"
            )
        if value.device != first.device:
            raise ValueError(
                f"{name}: expected the device of {first_name}, {first.device}, "
                f"found {value.device}"
            )
        check_finite(name, value)
        if name == "variance":
            check_variances(name, value)
    return tuple(value.detach().double() for value in arguments.values())


def _check_vector(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        found = type(value).__name__
        raise TypeError(f"{name}: expected a torch.Tensor, found {found}")
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, found {value.dtype}"
        )
    if value.ndim != 1 or value.numel() == 0:
        raise ValueError(
            f"{name}: expected shape (n,) with n > 0, found {tuple(value.shape)}"
        )


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
        _check_vector(name, scores)
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
