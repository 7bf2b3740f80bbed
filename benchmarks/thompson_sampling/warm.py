"""What a step of Thompson sampling costs: passes of a warm solve against a cold one.

``python -m benchmarks.thompson_sampling.warm`` takes the benchmark's problems with a
tenth of its batch (1 % of the data), lets ``thompson_sampling`` run, and solves every
step's system from zero as well, to the same tolerance. Residuals are those of the
weights in float64, evaluated anew.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sgdgp
from benchmarks.json_file import write_json
from benchmarks.thompson_sampling.problem import make_problem
from benchmarks.thompson_sampling.request import Request
from sgdgp.bayesopt import maximise, thompson_sampling
from sgdgp.posterior import PathwisePosterior
from sgdgp.solvers.auto import Auto
from sgdgp.solvers.system import as_system, float64_residual

_MEASURED = Path(__file__).parent / "measured"


def true_residual(posterior: PathwisePosterior) -> float:
    """Largest relative residual, in float64 throughout."""
    problem = posterior.problem
    system = as_system(problem.operator, problem.noise, problem.rhs)
    left = float64_residual(system, posterior.solution.weights / system.scale)
    return float(left.norm(dim=0).max())


def measured(request: Request, tolerance: float) -> list[dict[str, Any]]:
    """Passes, seconds and residuals of each step, warm and cold.

    Args:
        request: The problem; its batch is the number of functions.
        tolerance: Relative residual of every solve.
    """
    problem = make_problem(request)
    model = problem.model(problem.x, problem.y)
    settings: dict[str, Any] = {
        "solver": Auto(tolerance=tolerance),
        "num_features": request.num_features,
    }
    few = functools.partial(maximise, num_candidates=256, rounds=4, steps=30)
    table = []
    for steps in range(1, request.steps + 1):
        # The run so far is in the posterior that proposed its last batch.
        result = thompson_sampling(
            problem.values,
            problem.bounds,
            (problem.x, problem.y),
            steps,
            request.batch,
            model=model,
            maximiser=few,
            seed=request.seed,
            progress=False,
            **settings,
        )
        warm = result.posterior
        assert warm is not None
        known = len(warm.problem.x)
        cold = sgdgp.condition(
            model,
            result.x[:known],
            result.y[:known],
            num_samples=request.batch,
            seed=request.seed,
            progress=False,
            **settings,
        )
        assert isinstance(cold, PathwisePosterior)
        table.append(
            {
                "lengthscale": request.lengthscale,
                "tolerance": tolerance,
                "step": steps,
                "known": known,
                "cold_passes": passes_to(cold, tolerance),
                "cold_seconds": cold.timings["solve"],
                "cold_residual": true_residual(cold),
                "warm_solver": warm.solution.solver,
                "warm_passes": passes_to(warm, tolerance),
                "warm_seconds": warm.timings["solve"],
                "warm_residual": true_residual(warm),
                "ratio": passes_to(warm, tolerance) / passes_to(cold, tolerance),
            }
        )
        print(line(table[-1]), flush=True)
    return table


def passes_to(posterior: PathwisePosterior, tolerance: float) -> float:
    """Passes to the tolerance; means go on from there until they are right."""
    solution = posterior.solution
    for entry in solution.history:
        if entry.exact and max(entry.residuals) <= tolerance:
            return entry.passes
    return solution.passes


def line(row: dict[str, Any]) -> str:
    """One step as text."""
    return (
        f"l {row['lengthscale']:g}, tolerance {row['tolerance']:g}, step {row['step']}"
        f" (n = {row['known']:,}): cold {row['cold_passes']:.2f} passes"
        f" ({row['cold_seconds']:.1f} s, residual {row['cold_residual']:.1e}), warm"
        f" {row['warm_passes']:.2f} ({row['warm_seconds']:.1f} s,"
        f" {row['warm_residual']:.1e}): {row['ratio']:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lengthscales", nargs="+", type=float, default=[0.1, 0.3, 0.5]
    )
    parser.add_argument("--tolerances", nargs="+", type=float, default=[1e-2, 1e-3])
    parser.add_argument("--initial", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=_MEASURED / "warm.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows = [
        row
        for tolerance in given.tolerances
        for lengthscale in given.lengthscales
        for row in measured(
            Request(
                "auto",
                given.seed,
                lengthscale,
                1.0,
                initial=given.initial,
                batch=given.batch,
                steps=given.steps,
            ),
            tolerance,
        )
    ]
    report = {"threads": given.threads, "batch": given.batch, "steps": rows}
    print(write_json(given.output, report))


if __name__ == "__main__":
    main()
