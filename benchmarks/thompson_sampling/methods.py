"""The methods: each turns data into sample functions within the same seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

import sgdgp
from benchmarks.thompson_sampling.botorch_paths import botorch_functions
from benchmarks.thompson_sampling.inducing import inducing_functions
from benchmarks.thompson_sampling.problem import Problem, stream
from benchmarks.thompson_sampling.textbook_cg import TextbookCG
from sgdgp.bayesopt import Functions
from sgdgp.posterior import PathwisePosterior
from sgdgp.solvers import CG, SDD, Cholesky, PivotedCholesky, Solution, Solver
from sgdgp.solvers.auto import Auto

RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Fitted:
    """Sample functions and what they took.

    Attributes:
        functions: One for each new point; None proposes uniform points.
        account: Seconds ("prior_draws", "solve"), passes, residuals, ...
        posterior: What the next step may go on from.
    """

    functions: Functions | None
    account: Mapping[str, Any]
    posterior: PathwisePosterior | None = None


Fit: TypeAlias = Callable[
    [Problem, Float[Tensor, "n d"], Float[Tensor, " n"], int, Fitted | None], Fitted
]
"""(problem, x, y, step, what the last step fitted) -> sample functions given (x, y)."""


def by_solver(make: Callable[[float], Solver]) -> Fit:
    """Pathwise conditioning with the solver of a budget in seconds."""

    def fit(
        problem: Problem, x: Tensor, y: Tensor, step: int, last: Fitted | None
    ) -> Fitted:
        request = problem.request
        solver = make(request.seconds)
        if request.kept and last is not None and last.posterior is not None:
            known = last.posterior.problem.x.shape[0]
            posterior = last.posterior.update(
                x[known:], y[known:], solver=solver, progress=False
            )
        else:
            found = sgdgp.condition(
                problem.model(x, y),
                x,
                y,
                solver=solver,
                num_samples=request.batch,
                seed=stream(request, "posterior", step),
                num_features=request.num_features,
                progress=False,
            )
            assert isinstance(found, PathwisePosterior)
            posterior = found
        account = {**posterior.timings, **account_of(posterior.solution)}
        return Fitted(posterior.functions, account, posterior)

    return fit


def account_of(solution: Solution) -> dict[str, Any]:
    """What is kept of a solve."""
    residuals = solution.residuals.double()
    samples = residuals[1:]
    return {
        "solver": solution.solver,
        "reason": solution.reason,
        "passes": solution.passes,
        "residual_mean": float(residuals[0]),
        "residual_samples": float(samples.mean()),
        "residual_largest": float(residuals.max()),
    }


def variational(count: int | None = None) -> Fit:
    """Inducing points; new functions in every step, kept or not.

    Args:
        count: Of them. Default: the request's.
    """

    def fit(
        problem: Problem, x: Tensor, y: Tensor, step: int, last: Fitted | None
    ) -> Fitted:
        request = problem.request
        functions = inducing_functions(
            problem.model(x, y),
            x,
            y,
            count or request.points,
            num_samples=request.batch,
            num_features=request.num_features,
            generator=stream(request, "posterior", step),
        )
        solution = functions.solution
        account = {
            "prior_draws": 0.0,
            "solve": solution.seconds,
            "solver": solution.solver,
            "passes": solution.passes,
            "reason": solution.reason,
        }
        return Fitted(functions, account)

    return fit


def botorch(
    problem: Problem, x: Tensor, y: Tensor, step: int, last: Fitted | None
) -> Fitted:
    """BoTorch's exact paths, whatever their seconds."""
    request = problem.request
    start = time.perf_counter()
    functions = botorch_functions(
        problem.model(x, y),
        x,
        y,
        num_samples=request.batch,
        num_features=request.num_features,
        seed=stream(request, "posterior", step).initial_seed(),
    )
    seconds = time.perf_counter() - start
    account = {"prior_draws": 0.0, "solve": seconds, "solver": "draw_matheron_paths"}
    return Fitted(functions, account)


def random_search(
    problem: Problem, x: Tensor, y: Tensor, step: int, last: Fitted | None
) -> Fitted:
    """Nothing is learnt."""
    return Fitted(None, {"prior_draws": 0.0, "solve": 0.0})


METHODS: dict[str, Fit] = {
    "sdd": by_solver(lambda seconds: SDD(max_seconds=seconds, tolerance=1e-3)),
    "auto": by_solver(lambda seconds: Auto(max_seconds=seconds)),
    "cg": by_solver(lambda seconds: TextbookCG(max_seconds=seconds)),
    "svgp": variational(),
    RANDOM: random_search,
    "block_cg": by_solver(
        lambda seconds: CG(
            max_seconds=seconds,
            tolerance=1e-3,
            preconditioner=PivotedCholesky(rank=100),
        )
    ),
    "svgp_1600": variational(1600),
    "exact": by_solver(lambda seconds: Cholesky()),
    "botorch": botorch,
}
"""All methods; the first five are run if none are named."""

DEFAULT_METHODS = tuple(METHODS)[:5]
