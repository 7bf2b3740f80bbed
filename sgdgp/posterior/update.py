"""New data and new functions for a posterior that was solved for already.

With new data the old rows keep their targets, prior values and noise draws; the new
rows get theirs from the same functions and from a stream of their own. So the larger
system has the old one as a block, and its solution is the old one but for what the new
data change. New functions are other right-hand sides of the same system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import (
    check_finite,
    check_matrix,
    check_number,
    check_same,
    check_targets,
    check_variances,
)
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import MultitaskPrior, Prior, has_fixed_noise
from sgdgp.operators.base import KernelOperator
from sgdgp.posterior.paths import ConditionedPaths, Points
from sgdgp.posterior.problem import (
    Part,
    Problem,
    Stopwatch,
    groups_of,
    joined,
    parts_of,
    right_hand_sides,
    sample_targets,
)
from sgdgp.solvers.auto import DIRECT_ROWS, Auto, choose_solver
from sgdgp.solvers.base import Callback, Solution, Solver, progress_bar
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.prediction_error import settle_means
from sgdgp.solvers.recycling import Recycled
from sgdgp.solvers.solutions import merged_solution, split_solution
from sgdgp.solvers.warm_start import solve_again, solve_new_columns, warm_start

Variances: TypeAlias = Tensor | float
"""Noise variances (m,), (m, T), or one for all."""

_WORTH = 0.75
"""Most passes of a correction, of those of a solve from zero: one that took as long
would help nobody."""


@outside_inference_mode
def update_parts(
    parts: Sequence[Part],
    x_new: Points,
    y_new: Tensor,
    *,
    noise: Variances | None = None,
    solver: Solver | str | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
) -> tuple[Part, ...]:
    """The parts of a posterior given new data; see ``Posterior.update``.

    Outputs of one system whose new data have the same gaps and noise stay in one.
    """
    settings: dict[str, Any] = {"progress": progress, "callback": callback}
    if solver is not None:
        budget = parts[0].problem.settings.memory_budget
        settings["solver"] = choose_solver(solver, None, budget)
    x, y, variances = _new_rows(parts, x_new, y_new, noise)
    after = dict(enumerate(parts))
    for group in _divide(groups_of(parts), torch.isnan(y), variances):
        rows = (~torch.isnan(y[:, group[0]])).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        clock = Stopwatch()
        old = [parts[number] for number in group]
        problems = extend_problems(
            [part.problem for part in old],
            x[rows],
            y[rows][:, group],
            None if variances is None else variances[rows, group[0]],
            **settings,
        )
        problem = joined(problems)
        clock.end("prior_draws")
        from_zero = 0.0
        if not _is_direct(problem):
            from_zero = max(old[0].solution.passes, old[0].passes_from_zero)
        before = merged_solution([part.solution for part in old], [range(len(old))])
        solution = _solve_larger(problem, before, _WORTH * from_zero)
        clock.end("solve")
        after.update(parts_of(group, problems, solution, clock.seconds, from_zero))
    return tuple(after[number] for number in range(len(parts)))


def extend_problems(
    before: Sequence[Problem],
    x: Float[Tensor, "m d"],
    y: Float[Tensor, "m c"],
    noise: Float[Tensor, " m"] | None,
    **settings: Any,
) -> list[Problem]:
    """The problems of one system with new rows behind the old ones.

    Args:
        before: The problems.
        x: New inputs of the prior.
        y: Their targets in the model's units, one column for each problem.
        noise: Their noise variances in the model's units. Default: the likelihood's.
        **settings: Settings that change.
    """
    first = before[0]
    prior = first.prior
    with torch.no_grad():
        variances = (prior.noise(x) if noise is None else noise) + prior.nugget
        mean, inputs = prior.evaluate(x)
    operator = first.settings.operator_over(
        prior.kernel, torch.cat([first.operator.x, inputs])
    )
    known, all_variances = torch.cat([first.x, x]), torch.cat([first.noise, variances])
    problems = []
    for problem, targets in zip(before, y.unbind(1), strict=True):
        rhs, noise_draws = right_hand_sides(
            targets - mean, problem.draws, inputs, variances, _generator(problem)
        )
        problems.append(
            Problem(
                prior,
                operator,
                known,
                all_variances,
                problem.draws,
                torch.cat([problem.rhs, rhs]),
                torch.cat([problem.noise_draws, noise_draws]),
                replace(problem.settings, **settings),
            )
        )
    return problems


@outside_inference_mode
def draw_functions(
    parts: Sequence[Part],
    k: int,
    generator: torch.Generator,
    progress: bool | None = None,
) -> list[tuple[ConditionedPaths, Solution]]:
    """K new functions of every part around the same mean, and their solutions.

    Args:
        parts: Parts of a posterior; those of one system cost one solve.
        k: Number of functions.
        generator: Source of their prior draws and noise.
        progress: Show a progress bar. Default: as it was conditioned.
    """
    drawn: dict[int, tuple[ConditionedPaths, Solution]] = {}
    for group in groups_of(parts):
        problems = []
        for number in group:
            problem = parts[number].problem
            if progress is not None:
                settings = replace(problem.settings, progress=progress)
                problem = replace(problem, settings=settings)
            inputs = problem.operator.x
            draws = problem.settings.draw_prior(
                problem.prior.kernel, inputs, k, generator
            )
            rhs, noise_draws = sample_targets(draws, inputs, problem.noise, generator)
            problems.append(
                replace(problem, draws=draws, rhs=rhs, noise_draws=noise_draws)
            )
        # Several outputs start anew.
        recycled = parts[0].solution.recycled if len(parts) == 1 else None
        solution = _solve_again(joined(problems), generator, recycled)
        solutions = split_solution(solution, [k] * len(group))
        for number, problem, own in zip(group, problems, solutions, strict=True):
            mean = parts[number].solution.weights[:, :1]
            weights = torch.cat([mean, own.weights], dim=1)
            drawn[number] = problem.paths(weights), own
    return [drawn[number] for number in range(len(parts))]


def update_and_redraw(
    part: Part,
    x: Float[Tensor, "m d"],
    y: Float[Tensor, " m"],
    generator: torch.Generator,
    *,
    noise: float | None = None,
) -> Part:
    """One output given new data as well, with functions drawn anew.

    The solve of the mean starts from the old one; those of the functions start from
    zero, as nothing is known of them yet; the old preconditioner and directions serve
    all of them.

    Args:
        part: The output so far.
        x: New inputs, possibly none.
        y: New targets, in the units of the user.
        generator: Source of the new functions.
        noise: Noise variance of the new targets. Default: the likelihood's.
    """
    clock = Stopwatch()
    problem, before = part.problem, part.solution
    if len(x):
        x, y, variances = _new_rows([part], x, y, noise)
        if variances is not None:
            variances = variances[:, 0]
        (problem,) = extend_problems([problem], x, y, variances)
    inputs, count = problem.operator.x, before.weights.shape[1] - 1
    draws = problem.settings.draw_prior(problem.prior.kernel, inputs, count, generator)
    rhs, noise_draws = right_hand_sides(
        problem.targets, draws, inputs, problem.noise, generator
    )
    problem = replace(problem, draws=draws, rhs=rhs, noise_draws=noise_draws)
    clock.end("prior_draws")
    operator = problem.operator.unfilled()
    solution = solve_new_columns(
        problem.solver,
        operator,
        problem.noise,
        problem.rhs,
        before,
        memory_budget=problem.settings.memory_budget,
    )
    if solution is None or solution.reason == "stagnated":
        initial = torch.zeros_like(problem.rhs)
        initial[: len(before.weights), :1] = before.weights[:, :1]
        solution = problem.solve(generator, initial=initial)
    else:
        solution = _settled(problem, operator, solution, None)
    clock.end("solve")
    return Part(problem, solution, clock.seconds)


def _solve_larger(problem: Problem, before: Solution, factor_passes: float) -> Solution:
    """Correct the old weights where the new rows are, then let the solver go on.

    Args:
        problem: The problem, its new rows last.
        before: The solution of the old rows.
        factor_passes: Passes in whose time a part of the system may be factorised.
    """
    generator, settings = _generator(problem), problem.settings
    if _is_direct(problem):
        initial = torch.zeros_like(problem.rhs)
        initial[: len(before.weights)] = before.weights
        return problem.solve(generator, initial=initial)
    # One operator for both: what the correction fills in memory, the solver finds.
    operator = problem.operator.unfilled()
    with progress_bar(settings.progress, "update", settings.callback) as callback:
        corrected = warm_start(
            problem.solver,
            operator,
            problem.noise,
            problem.rhs,
            before,
            factor_passes=factor_passes,
            memory_budget=settings.memory_budget,
            callback=callback,
        )
        corrected = _settled(problem, operator, corrected, callback)
    if corrected.reason in ("converged", "interrupted"):
        return corrected
    solution = problem.solve(generator, after=corrected, operator=operator)
    return replace(
        solution,
        solver=f"{corrected.solver}+{solution.solver}",
        settings={**corrected.settings, **solution.settings},
    )


@torch.no_grad()
def _settled(
    problem: Problem,
    operator: KernelOperator,
    solution: Solution,
    callback: Callback | None,
) -> Solution:
    """The solution, its means as exact as a solve from zero would have them."""
    return settle_means(
        solution,
        operator,
        problem.noise,
        problem.rhs,
        problem.noise_draws,
        problem.solver.limits,
        callback,
    )


def _solve_again(
    problem: Problem, generator: torch.Generator, recycled: Recycled | None
) -> Solution:
    """Other right-hand sides, with preconditioner and directions of a solve."""
    solver, settings, initial = problem.solver, problem.settings, None
    if recycled is not None and solver.resumes:
        operator = problem.operator.unfilled()
        with progress_bar(settings.progress, "cg", settings.callback) as callback:
            solution = solve_again(
                solver, operator, problem.noise, problem.rhs, recycled, callback
            )
        if solution.reason != "stagnated":
            return solution
        initial = solution.weights
    return problem.solve(generator, initial=initial, for_updates=False)


def _is_direct(problem: Problem) -> bool:
    """Whether it is all the same to the solver where it starts from."""
    solver = problem.solver
    if isinstance(solver, Auto):
        return solver.stages is None and len(problem.rhs) <= DIRECT_ROWS
    return isinstance(solver, Cholesky) or solver.limits.tolerance is None


def _generator(problem: Problem) -> torch.Generator:
    """A stream of its own for every size of the data."""
    return derived_generator(problem.settings.seed, "update", len(problem.rhs))


def _divide(
    groups: list[list[int]], missing: Tensor, noise: Tensor | None
) -> list[list[int]]:
    """Groups divided where new data differ in their gaps or in their noise."""
    divided: list[list[int]] = []
    for group in groups:
        kinds: dict[object, list[int]] = {}
        for output in group:
            gaps = tuple(missing[:, output].tolist())
            own = None if noise is None else tuple(noise[:, output].tolist())
            kinds.setdefault((gaps, own), []).append(output)
        divided.extend(kinds.values())
    return divided


def _new_rows(
    parts: Sequence[Part], x: Points, y: Tensor, noise: Variances | None
) -> tuple[Float[Tensor, "N p"], Float[Tensor, "N c"], Float[Tensor, "N c"] | None]:
    """New data, checked, as rows of the prior with a column for each part.

    Of a multitask model rows are pairs of input and task.

    Returns:
        Inputs (N, p), targets (N, c) with NaN where there is none, and noise variances
        (N, c) if they are given, both in the model's units.
    """
    first = parts[0].problem
    prior, known, outputs = first.prior, first.x, len(parts)
    is_multitask = isinstance(prior, MultitaskPrior)
    if is_multitask:
        outputs, known = prior.num_outputs, known[:, :-1]
    shape = (outputs,) if is_multitask or outputs > 1 else ()
    x = _new_inputs(prior, x, known)
    y = prior.to_model_units(_new_targets(x, y, shape))
    if noise is not None:
        given = variances_of("noise", noise, (len(x), *shape), x)
        noise = prior.to_model_variances(given.detach())
    elif has_fixed_noise(prior.model.likelihood):
        raise ValueError(
            "noise: the likelihood only knows the noise of its training points; "
            f"pass the {len(x)} noise variances of y_new"
        )
    x = prior.rows(x)
    n = len(x)
    return x, y.reshape(n, -1), None if noise is None else noise.reshape(n, -1)


def _new_inputs(prior: Prior, x: Points, known: Tensor) -> Tensor:
    x = prior.joined(x)
    if torch.is_tensor(x) and x.ndim == 1:
        x = x.unsqueeze(-1)
    check_matrix("x_new", x, known.shape[1])
    check_same("x_new", x, "the training inputs", known)
    check_finite("x_new", x)
    return x.detach()


def _new_targets(x: Tensor, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not torch.is_tensor(y):
        raise TypeError(f"y_new: expected a torch.Tensor, found {type(y).__name__}")
    if not shape and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (len(x), *shape):
        raise ValueError(
            f"y_new: expected shape {(len(x), *shape)}, found {tuple(y.shape)}"
        )
    check_same("y_new", y, "x_new", x)
    check_targets("y_new", y)
    return y.detach()


def variances_of(
    name: str, noise: Variances, shape: tuple[int, ...], like: Tensor
) -> Float[Tensor, ...]:
    """Noise variances of that shape, (n,) or (n, T), checked.

    Args:
        name: What they are called.
        noise: One for all; one for each point; or for each of several outputs too.
        shape: The shape that is wanted.
        like: Of the dtype and on the device that are wanted.
    """
    if not isinstance(noise, Tensor):
        check_number(name, noise, "a number or a torch.Tensor")
    noise = torch.as_tensor(noise, dtype=like.dtype, device=like.device)
    if len(shape) == 2 and noise.shape == shape[:1]:
        noise = noise.unsqueeze(1)
    elif noise.ndim != 0 and noise.shape != shape:
        also = f" or {shape[:1]}" if len(shape) == 2 else ""
        raise ValueError(
            f"{name}: expected a number, or {shape[0]} variances of shape {shape}"
            f"{also}, found shape {tuple(noise.shape)}"
        )
    check_variances(name, noise)
    return noise.expand(shape)
