"""Condition on the training molecules of one target, predict the test molecules."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

import sgdgp
from benchmarks.dockstring.exact import exact_prediction
from benchmarks.dockstring.model import build_model, values_of
from benchmarks.dockstring.targets import Target
from benchmarks.uci.memory import peak_rss_mb
from benchmarks.uci.scores import scores


@dataclass(frozen=True)
class Problem:
    """Fingerprints and scores of one target.

    Attributes:
        target: The protein and its hyperparameters.
        x: Training fingerprints (n, d).
        y: Training scores (n,).
        x_test: Test fingerprints (m, d).
        y_test: Test scores (m,).
    """

    target: Target
    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    x_test: Float[Tensor, "m d"]
    y_test: Float[Tensor, " m"]


@dataclass(frozen=True)
class Settings:
    """How to solve.

    Attributes:
        solver: Name of a solver, or "auto".
        num_samples: Posterior samples; variances come from them.
        num_features: Random features of the prior draws.
        seed: Seed of everything random.
        memory_budget: Bytes for operator and solver. Default: half of what is free.
        fit: Learn mean, amplitude and noise first, from the target's on.
        exact: Compare with the exact posterior.
    """

    solver: str = "auto"
    num_samples: int = 64
    num_features: int = 16_384
    seed: int = 0
    memory_budget: int | None = None
    fit: bool = False
    exact: bool = False


def run(problem: Problem, settings: Settings) -> dict[str, Any]:
    """Solve and score.

    Returns:
        Figures: R^2 and others on the test molecules, seconds, passes, peak memory
        before anything exact is computed, and what differs from the exact posterior.
    """
    model = build_model(problem.x, problem.y, problem.target)
    seconds = {}
    if settings.fit:
        start = time.perf_counter()
        sgdgp.fit(model, seed=settings.seed)
        seconds["fit"] = time.perf_counter() - start
    start = time.perf_counter()
    posterior = sgdgp.condition(
        model,
        solver=settings.solver,
        num_samples=settings.num_samples,
        num_features=settings.num_features,
        seed=settings.seed,
        memory_budget=settings.memory_budget,
    )
    seconds["condition"] = time.perf_counter() - start
    start = time.perf_counter()
    mean, variance = posterior.predict(problem.x_test, batch_size=4096)
    seconds["predict"] = time.perf_counter() - start
    solution = posterior.solution
    values = values_of(model)
    found = {
        "target": problem.target.name,
        "n": len(problem.x),
        "num_test": len(problem.x_test),
        "bins": problem.x.shape[1],
        "hyperparameters": values,
        "r2": r_squared(mean, problem.y_test),
        **scores(mean, variance + values["noise"], problem.y_test),
        "seconds": {**seconds, **posterior.timings},
        "passes": solution.passes,
        "solver": solution.solver,
        "operator": solution.operator,
        "reason": solution.reason,
        "residual": float(solution.residuals.max()),
        "peak_rss_mb": peak_rss_mb(),
        "settings": vars(settings),
    }
    if settings.exact:
        found["exact"] = _against_exact(problem, model, mean, variance)
    return found


def r_squared(mean: Float[Tensor, " m"], y: Float[Tensor, " m"]) -> float:
    """1 - sum (y - mean)^2 / sum (y - average)^2: scikit-learn's, biases count.

    Raises:
        ValueError: All targets are the same, or there is no target.
    """
    mean, y = mean.double(), y.double()
    total = (y - y.mean()).square().sum() if len(y) else y.new_zeros(())
    if not float(total) > 0:
        raise ValueError("y: expected at least two different scores for an R^2")
    return float(1 - (y - mean).square().sum() / total)


def _against_exact(
    problem: Problem, model: Any, mean: Tensor, variance: Tensor
) -> dict[str, float]:
    start = time.perf_counter()
    true_mean, true_variance = exact_prediction(
        model, problem.x, problem.y, problem.x_test
    )
    ratio = variance.double() / true_variance
    return {
        "seconds": time.perf_counter() - start,
        "r2": r_squared(true_mean, problem.y_test),
        "largest_difference_of_means": float((mean - true_mean).abs().max()),
        "rms_difference_of_means": float((mean - true_mean).square().mean().sqrt()),
        "mean_ratio_of_variances": float(ratio.mean()),
        "spread_of_ratio_of_variances": float(ratio.std()),
    }
