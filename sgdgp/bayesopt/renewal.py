"""The posterior of the next step: more data, and new functions when they are due."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.posterior import PathwisePosterior
from sgdgp.posterior.problem import prior_draws, right_hand_sides, sample_targets
from sgdgp.posterior.update import extended
from sgdgp.solvers.warm_start import solve_new_columns


def with_new_functions(
    posterior: PathwisePosterior,
    x_new: Float[Tensor, "m d"],
    y_new: Float[Tensor, " m"],
    generator: torch.Generator,
    *,
    noise: float | None = None,
) -> PathwisePosterior:
    """The posterior given new data as well, with functions drawn anew.

    The solve of the mean starts from the old one; those of the functions start from
    zero, as nothing is known of them yet; the old preconditioner and directions serve
    all of them.

    Args:
        posterior: The posterior so far.
        x_new: New inputs (m, d), possibly none.
        y_new: New targets (m,).
        generator: Source of the new functions.
        noise: Noise variance of the new targets. Default: the likelihood's.
    """
    start = time.perf_counter()
    problem = posterior.problem
    if len(x_new):
        problem = extended(problem, x_new, y_new, noise, None)
    count = posterior.num_samples
    draws = prior_draws(
        problem.prior, problem.operator, count, problem.settings, generator
    )
    sampled = sample_targets(draws, problem.operator.x, problem.noise, generator)
    rhs, noise_draws = right_hand_sides(problem.targets, *sampled)
    problem = replace(problem, draws=draws, rhs=rhs, noise_draws=noise_draws)
    drawn = time.perf_counter()
    solution = solve_new_columns(
        problem.solver,
        problem.operator.unfilled(),
        problem.noise,
        rhs,
        posterior.solution,
        memory_budget=problem.settings.memory_budget,
    )
    if solution is None or solution.reason == "stagnated":
        mean = posterior.solution.weights[:, :1]
        initial = rhs.new_zeros(rhs.shape)
        initial[: len(mean), :1] = mean
        solution = problem.solve(generator, initial=initial)
    timings = {"prior_draws": drawn - start, "solve": time.perf_counter() - drawn}
    return PathwisePosterior(
        solution, count, timings, problem.paths(solution.weights), problem
    )
