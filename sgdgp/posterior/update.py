"""New data for a posterior: the same prior functions, the old weights to start from.

The old rows keep their targets, prior values and noise draws; the new rows get theirs
from the same functions and from a stream of their own. So the larger system has the
old one as a block, and its solution is the old one but for what the new data change.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite, check_matrix, check_same
from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import has_fixed_noise
from sgdgp.operators.choose import operator_by_name
from sgdgp.posterior.functions import Points
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.problem import Problem, right_hand_sides, sample_targets
from sgdgp.solvers.auto import DIRECT_ROWS, Auto, choose_solver
from sgdgp.solvers.base import Callback, Solution, Solver, Watch, progress_bar
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.solutions import continued
from sgdgp.solvers.warm_start import warm_start

_FROM_ZERO = "passes_from_zero"

# A correction that took as long as a solve from zero would help nobody.
_WORTH = 0.75


def updated(
    posterior: PathwisePosterior,
    x_new: Points,
    y_new: Tensor,
    *,
    noise: Tensor | float | None = None,
    solver: Solver | str | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
) -> PathwisePosterior:
    """The posterior given its data and new ones; see ``PathwisePosterior.update``."""
    before = posterior.problem
    x_new, y_new = _data(before, x_new, y_new)
    if solver is not None and not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    start = time.perf_counter()
    problem = extended(before, x_new, y_new, noise, solver)
    problem = replace(
        problem,
        settings=replace(problem.settings, progress=progress, callback=callback),
    )
    drawn = time.perf_counter()
    solution = solved(problem, posterior.solution)
    timings = {"prior_draws": drawn - start, "solve": time.perf_counter() - drawn}
    return PathwisePosterior(
        solution,
        posterior.num_samples,
        timings,
        problem.paths(solution.weights),
        problem,
    )


def extended(
    before: Problem,
    x_new: Tensor,
    y_new: Tensor,
    noise: Tensor | float | None,
    solver: Solver | str | None,
) -> Problem:
    """The problem with the new rows behind the old ones."""
    prior, settings = before.prior, before.settings
    variances = _noise(before, x_new, noise)
    with torch.no_grad():
        mean, inputs = prior.evaluate(x_new)
    generator = _generator(before)
    sampled = sample_targets(before.draws, inputs, variances, generator)
    rhs, noise_draws = right_hand_sides(prior.to_model_units(y_new) - mean, *sampled)
    operator = operator_by_name(
        settings.operator,
        prior.kernel,
        torch.cat([before.operator.x, inputs]),
        memory_budget=settings.memory_budget,
    )
    chosen = before.solver
    if solver is not None:
        chosen = choose_solver(solver, operator, settings.memory_budget)
    return replace(
        before,
        operator=operator,
        x=torch.cat([before.x, x_new]),
        noise=torch.cat([before.noise, variances]),
        rhs=torch.cat([before.rhs, rhs]),
        noise_draws=torch.cat([before.noise_draws, noise_draws]),
        solver=chosen,
    )


def solved(problem: Problem, before: Solution) -> Solution:
    """Correct the old weights where the new rows are, then let the solver go on."""
    old = before.weights
    num_new = len(problem.rhs) - len(old)
    initial = torch.cat([old, old.new_zeros(num_new, old.shape[1])])
    generator = _generator(problem)
    if problem.solver.limits.tolerance is None or _is_direct(problem):
        return problem.solve(generator, initial=initial)
    # One operator for both: what the correction fills in memory, the solver finds.
    operator = problem.operator.unfilled()
    settings = problem.settings
    from_zero = max(before.passes, before.settings.get(_FROM_ZERO, 0.0))
    with (
        torch.no_grad(),
        progress_bar(settings.progress, "update", settings.callback) as callback,
    ):
        solution = warm_start(
            problem.solver,
            operator,
            problem.noise,
            problem.rhs,
            before,
            worth_passes=_WORTH * from_zero,
            memory_budget=settings.memory_budget,
            callback=callback,
        )
    if solution.reason not in ("converged", "interrupted"):
        rest = replace(
            problem,
            solver=problem.solver.with_limits(
                problem.solver.limits.less(solution.passes, solution.seconds)
            ),
            settings=replace(
                settings,
                callback=Watch.after(
                    solution.passes, solution.seconds, settings.callback
                ),
            ),
        )
        last = rest.solve(generator, initial=solution.weights, filled=operator)
        solution = replace(
            continued(solution, last),
            solver=f"{solution.solver}+{last.solver}",
            settings={**solution.settings, **last.settings},
        )
    return replace(
        solution,
        settings={**solution.settings, _FROM_ZERO: from_zero},
    )


def _is_direct(problem: Problem) -> bool:
    """Whether the whole system will be factorised, wherever that starts from."""
    solver = problem.solver
    if isinstance(solver, Auto):
        return solver.stages is None and len(problem.rhs) <= DIRECT_ROWS
    return isinstance(solver, Cholesky)


def _generator(problem: Problem) -> torch.Generator:
    """A stream of its own for every size of the data."""
    return derived_generator(problem.settings.seed, "update", len(problem.rhs))


def _data(before: Problem, x: Points, y: Tensor) -> tuple[Tensor, Tensor]:
    x = before.prior.joined(x)
    if torch.is_tensor(x) and x.ndim == 1:
        x = x.unsqueeze(-1)
    check_matrix("x_new", x, before.x.shape[1])
    if not torch.is_tensor(y):
        raise TypeError(f"y_new: expected a torch.Tensor, found {type(y)}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (x.shape[0],):
        raise ValueError(
            f"y_new: expected shape ({x.shape[0]},), found {tuple(y.shape)}"
        )
    check_same("x_new", x, "the training inputs", before.x)
    check_same("y_new", y, "x_new", x)
    check_finite("x_new", x)
    check_finite("y_new", y)
    return x.detach(), y.detach()


def _noise(
    before: Problem, x_new: Tensor, given: Tensor | float | None
) -> Float[Tensor, " m"]:
    """Noise variances of the new rows in the model's units."""
    prior = before.prior
    if given is None:
        likelihood = prior.model.likelihood
        if has_fixed_noise(likelihood):
            raise ValueError(
                "noise: the likelihood only knows the noise of its training points; "
                f"pass the {len(x_new)} noise variances of y_new"
            )
        with torch.no_grad():
            return prior.noise(x_new) + prior.nugget
    noise = torch.as_tensor(given, dtype=x_new.dtype, device=x_new.device).detach()
    if noise.ndim > 1 or (noise.ndim == 1 and len(noise) != len(x_new)):
        raise ValueError(
            f"noise: expected a number or {len(x_new)} variances, one per new point, "
            f"found shape {tuple(noise.shape)}"
        )
    noise = noise.expand(len(x_new))
    bad = ~(torch.isfinite(noise) & (noise > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            "noise: expected positive finite variances, found "
            f"{int(bad.sum())} that are not, the first at index {first}: "
            f"{float(noise[first])}"
        )
    return noise / prior.target_scale.scale**2 + prior.nugget
