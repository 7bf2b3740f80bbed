"""Condition a model on a split, predict its test rows, and say how it went."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

import sgdgp
from benchmarks.uci.curve import Trace, curve, residuals
from benchmarks.uci.data import Split
from benchmarks.uci.memory import peak_mb
from benchmarks.uci.model import MaternGP
from benchmarks.uci.request import RunRequest
from benchmarks.uci.scores import scores
from benchmarks.uci.solvers import SOLVERS
from benchmarks.uci.trainable import Learnt, centred


class Solved(NamedTuple):
    """Test predictions (m,) and everything that a result says of them."""

    mean: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]
    figures: dict[str, Any]


def solve(
    request: RunRequest, split: Split, model: MaternGP, parameters: Learnt
) -> Solved:
    """Condition and predict as the request says.

    Args:
        request: Solver, its budget, number of samples, seed.
        split: The data.
        model: Over the training rows, with its hyperparameters.
        parameters: The same hyperparameters, for the curve.

    Raises:
        ValueError: There is no such solver.
    """
    if request.solver not in SOLVERS:
        raise ValueError(
            f"solver: found {request.solver!r}, expected one of {', '.join(SOLVERS)}"
        )
    solver = SOLVERS[request.solver](request.max_passes)
    trace = Trace(request.max_passes if request.solver == "auto" else None)
    cpu = time.process_time()
    posterior = sgdgp.condition(
        model,
        split.x,
        split.y,
        solver=solver,
        num_samples=request.num_samples,
        seed=request.seed,
        memory_budget=request.memory_budget,
        callback=trace,
        progress=False,
    )
    if posterior.solution.reason == "interrupted" and not trace.stopped:
        raise KeyboardInterrupt  # half a solve is no result
    start = time.perf_counter()
    prediction = posterior.predict(split.x_test, observation_noise=True)
    float(prediction.variance.sum())  # waits for a GPU
    seconds = time.perf_counter() - start
    # Read before the curve is computed: that is not part of what is measured.
    memory, cpu = peak_mb(split.x.device), time.process_time() - cpu
    solution = posterior.solution
    mean, variance = prediction.mean.detach(), prediction.variance.detach()
    figures = scores(mean, variance, split.y_test)
    warnings = list(solution.warnings)
    if None in figures.values():
        warnings.append("the predictions are not finite with a positive variance")
    if trace.stopped:
        warnings.append(f"stopped by --max-passes {request.max_passes}")
    return Solved(
        mean,
        variance,
        {
            **figures,
            **residuals(solution.residuals),
            "operator": solution.operator,
            "solver_used": solution.solver,
            "passes": solution.passes,
            "seconds": {
                "prior_draws": posterior.timings["prior_draws"],
                "solve": posterior.timings["solve"],
                "prediction": seconds,
            },
            "cpu_seconds": cpu,
            "peak_rss_mb": memory,
            "reason": solution.reason,
            "warnings": warnings,
            "settings": solution.settings,
            "curve": curve(
                trace,
                solution,
                centred(split, parameters.mean),
                parameters.values,
            ),
        },
    )
