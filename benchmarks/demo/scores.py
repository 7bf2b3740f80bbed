"""What the demo measures of a posterior, and the bounds it has to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import sgdgp
from benchmarks.demo.problem import NOISE_SCALE, Problem, in_gap
from benchmarks.demo.reference import Reference


@dataclass(frozen=True)
class Scores:
    """A posterior against the truth.

    Attributes:
        rmse: Error of the mean against the true function (outside, inside the gap).
        deviation: Root mean posterior variance (outside, inside the gap).
        coverage: Part of the true function in its 95 % band (outside, inside).
        coverage_observed: The same for new noisy observations, everywhere.
        nll: Negative log predictive density of the new observations.
    """

    rmse: tuple[float, float]
    deviation: tuple[float, float]
    coverage: tuple[float, float]
    coverage_observed: float
    nll: float


@dataclass(frozen=True)
class Differences:
    """A posterior against the exact one, at the scored points.

    Attributes:
        mean_max: Largest absolute difference of the means.
        mean_rms: Root mean square of the same.
        variance_max: Largest absolute difference of the variances.
        variance_rms: Root mean square of the same.
        mean_in_deviations: Largest difference of the means, in exact posterior
            standard deviations.
        variance_relative: Root mean square of the relative differences of variances.
        sampling_error: What S samples leave of that in expectation, sqrt(2 / S).
    """

    mean_max: float
    mean_rms: float
    variance_max: float
    variance_rms: float
    mean_in_deviations: float
    variance_relative: float
    sampling_error: float


@dataclass(frozen=True)
class Check:
    """One number and the bounds it has to keep."""

    name: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the number is where it should be; NaN never is."""
        return self.low <= self.value <= self.high


def score(mean: Tensor, variance: Tensor, problem: Problem) -> Scores:
    """Score mean (m,) and function variance (m,) at the problem's test points."""
    inside = in_gap(problem.x_test)
    parts = (~inside, inside)
    noisy = variance + NOISE_SCALE**2
    metrics = sgdgp.metrics
    rmse = [metrics.rmse(mean[p], problem.f_test.to(mean)[p]) for p in parts]
    coverage = [
        metrics.interval_coverage(mean[p], variance[p], problem.f_test.to(mean)[p])
        for p in parts
    ]
    deviation = [float(variance[p].mean().sqrt()) for p in parts]
    y = problem.y_test.to(mean)
    return Scores(
        rmse=(rmse[0], rmse[1]),
        deviation=(deviation[0], deviation[1]),
        coverage=(coverage[0], coverage[1]),
        coverage_observed=metrics.interval_coverage(mean, noisy, y),
        nll=metrics.negative_log_predictive_density(mean, noisy, y),
    )


def compare(
    mean: Tensor, variance: Tensor, exact: Reference, num_samples: int
) -> Differences:
    """Compare mean (m,) and function variance (m,) with the exact posterior."""
    off_mean = (mean.double() - exact.mean).abs()
    off_variance = (variance.double() - exact.variance).abs()
    return Differences(
        mean_max=float(off_mean.max()),
        mean_rms=_rms(off_mean),
        variance_max=float(off_variance.max()),
        variance_rms=_rms(off_variance),
        mean_in_deviations=float((off_mean / exact.variance.sqrt()).max()),
        variance_relative=_rms(off_variance / exact.variance),
        sampling_error=math.sqrt(2.0 / num_samples),
    )


def checks(
    solution: sgdgp.Solution, scores: Scores, differences: Differences | None
) -> list[Check]:
    """Everything that has to hold of one posterior.

    The bounds are what theory leaves room for: a calibrated mean errs by its own
    standard deviation, 500 new observations have a coverage of 95 % within three
    standard errors of 1 %, S samples give variances within sqrt(2 / S). A smooth
    function under a rougher prior may be covered more often than 95 %.
    """
    converged = float(solution.reason == "converged")
    result = [
        Check("solve converged (1 = yes)", converged, 1.0, 1.0),
        Check(
            "RMSE outside the gap, in its own standard deviations",
            scores.rmse[0] / scores.deviation[0],
            0.0,
            1.5,
        ),
        Check("coverage of f outside the gap", scores.coverage[0], 0.85, 1.0),
        Check("coverage of f inside the gap", scores.coverage[1], 0.85, 1.0),
        Check("coverage of observations", scores.coverage_observed, 0.92, 0.98),
        Check(
            "standard deviation inside the gap over outside",
            scores.deviation[1] / scores.deviation[0],
            3.0,
            math.inf,
        ),
    ]
    if differences is None:
        return result
    return [
        *result,
        Check(
            "largest error of the mean, in exact standard deviations",
            differences.mean_in_deviations,
            0.0,
            0.5,
        ),
        Check(
            "relative error of the variance over sqrt(2 / S)",
            differences.variance_relative / differences.sampling_error,
            0.0,
            1.6,
        ),
    ]


def _rms(values: Tensor) -> float:
    return float(torch.sqrt(values.square().mean()))
