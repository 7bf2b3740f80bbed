"""How good predictions are: of Gaussian targets, and of classes.

Scores of Gaussian predictions take one N(mean_i, variance_i) per point, of the
*observed* target: add the noise variance to the variance of the function first.
Scores of class predictions (``sgdgp.class_metrics``) take probabilities (n, C) and
class indices (n,).
All sums are taken in float64, and every score is a Python float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_finite
from sgdgp.class_metrics import (
    Reliability,
    accuracy,
    auroc,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_diagram,
)

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

    Args:
        mean: Predicted means (n,).
        variance: Predicted variances of the targets, noise included (n,).
        y: Observed targets (n,).
        level: Probability of the interval, strictly between 0 and 1. Default: 0.95.

    Returns:
        The fraction; ``level`` on average when the predictions are calibrated.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: ``level`` is out of range, or as in
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

    For each level p the empirical coverage c(p) is the fraction of targets inside
    their central interval of probability p; the error is mean_p |c(p) - p|. It is 0
    for perfect calibration and at most max(mean p, 1 - mean p), which is one half for
    the default levels; n calibrated points leave about 0.3 / sqrt(n) by chance.

    Args:
        mean: Predicted means (n,).
        variance: Predicted variances of the targets, noise included (n,).
        y: Observed targets (n,).
        levels: Nominal levels. Default: 0.05, 0.10, ..., 0.95.

    Returns:
        The mean absolute gap, a probability.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: No levels, one out of range, or as in
            ``negative_log_predictive_density``.
    """
    nominal = torch.tensor(_checked_levels(levels, "levels"), dtype=torch.float64)
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
    equation 21).

    Args:
        mean: Predicted means (n,).
        variance: Predicted variances of the targets, noise included (n,).
        y: Observed targets (n,).

    Returns:
        The mean score, in the units of ``y``; lower is better.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: As in ``negative_log_predictive_density``.
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
            _check_positive_entries(name, value)
    return tuple(value.detach().double() for value in arguments.values())


def _check_positive_entries(name: str, value: Tensor) -> None:
    """Refuse zeros and negative entries, saying how many and where the first is."""
    bad = value <= 0
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected positive values, found {int(bad.sum())} that are not, "
            f"the first at index {first} ({float(value[first])})"
        )
