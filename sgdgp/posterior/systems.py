"""Linear systems behind data: rows that were observed, one column for each output.

Columns that were observed in the same rows share one system, hence one solve: all of
their right-hand sides meet every kernel entry together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import derived_generator, seed_of
from sgdgp.gpytorch_adapter import (
    Inputs,
    PairPrior,
    Prior,
    has_fixed_noise,
    noise_of,
    noise_of_rows,
    observed_rows,
    pairs_of,
)
from sgdgp.operators.choose import operator_by_name
from sgdgp.posterior.checkpoint import SolveCheckpoint
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.problem import (
    Problem,
    Settings,
    prior_draws,
    right_hand_sides,
    sample_targets,
)
from sgdgp.solvers.auto import choose_solver
from sgdgp.solvers.base import Solver
from sgdgp.solvers.solutions import split_solution


@dataclass(frozen=True, eq=False)
class System:
    """Observations that one linear system belongs to.

    Attributes:
        x: The prior's inputs (N, d): the user's, or pairs of those and tasks.
        inputs: Kernel inputs (N, p).
        y: Targets in the model's units (N, c).
        targets: y - m(X) (N, c).
        noise: Noise variances, with what ``forward`` adds to the diagonal (N,).
        columns: Columns of y behind those of ``targets``.
    """

    x: Float[Tensor, "N d"]
    inputs: Float[Tensor, "N p"]
    y: Float[Tensor, "N c"]
    targets: Float[Tensor, "N c"]
    noise: Float[Tensor, " N"]
    columns: tuple[int, ...]


@torch.no_grad()
def systems_of(prior: Prior, x: Inputs, y: Tensor) -> tuple[System, ...]:
    """The systems behind the data of a model.

    Args:
        prior: The model's prior.
        x: Training inputs (n, d), or several.
        y: Targets in the model's units (n,), or (n, T) with NaN where there is none.

    Raises:
        ValueError: y does not have the model's outputs, is missing altogether, or the
            noise does not fit.
    """
    points = prior.joined(x) if not isinstance(prior, PairPrior) else x
    assert isinstance(points, Tensor)
    tasks, n = prior.num_outputs, len(points)
    if tasks > 1 and y.shape != (n, tasks):
        raise ValueError(
            f"y: expected shape ({n}, {tasks}), one column for each task of the model, "
            f"found {tuple(y.shape)}"
        )
    rows = pairs_of(points, tasks) if isinstance(prior, PairPrior) else points
    noise = _noise(prior, points, rows)
    if y.ndim == 1:
        return (_system(prior, rows, y.unsqueeze(1), noise, (0,)),)
    return tuple(
        _system(prior, rows[seen.rows], seen.targets, noise[seen.rows], seen.columns)
        for seen in observed_rows(y, tasks)
    )


def _noise(prior: Prior, points: Tensor, rows: Tensor) -> Tensor:
    likelihood = prior.model.likelihood
    if isinstance(prior, PairPrior) and has_fixed_noise(likelihood):
        known = noise_of(likelihood, points)
        return noise_of_rows(known, len(points), prior.num_outputs)
    return prior.noise(rows)


def _system(
    prior: Prior, x: Tensor, y: Tensor, noise: Tensor, columns: tuple[int, ...]
) -> System:
    mean, inputs = prior.evaluate(x)
    centred = y - mean.unsqueeze(1)
    return System(x, inputs, y, centred, noise + prior.nugget, columns)


def solve_system(
    prior: Prior,
    system: System,
    solver: Solver | str,
    num_samples: int,
    settings: Settings,
    generator: torch.Generator,
    keeper: SolveCheckpoint | None = None,
) -> tuple[PathwisePosterior, ...]:
    """One posterior for each column of the targets, by one solve.

    Args:
        prior: The model's prior.
        system: What was observed.
        solver: A solver or its name.
        num_samples: Sample functions of each column.
        settings: How to draw and solve.
        generator: Source of everything random.
        keeper: Checkpoint of the solve.
    """
    operator = operator_by_name(
        settings.operator,
        prior.kernel,
        system.inputs,
        memory_budget=settings.memory_budget,
    )
    chosen = choose_solver(solver, operator, settings.memory_budget)
    start = time.perf_counter()
    problems = []
    # The targets of a multitask model are one column, whatever is behind it.
    for column, targets in zip(system.columns, system.targets.unbind(1), strict=False):
        draws = prior_draws(prior, operator, num_samples, settings, generator)
        rhs, noise_draws = right_hand_sides(
            targets, *sample_targets(draws, system.inputs, system.noise, generator)
        )
        problems.append(
            Problem(
                prior=prior,
                operator=operator,
                x=system.x,
                noise=system.noise,
                rhs=rhs,
                noise_draws=noise_draws,
                draws=draws,
                solver=chosen,
                settings=_settings_of(settings, column),
            )
        )
    drawn = time.perf_counter()
    joint = joined_problem(problems)
    solution = joint.solve(generator, keeper=keeper)
    timings = {"prior_draws": drawn - start, "solve": time.perf_counter() - drawn}
    parts = split_solution(solution, [problem.rhs.shape[1] for problem in problems])
    return tuple(
        PathwisePosterior(
            part, num_samples, timings, problem.paths(part.weights), problem
        )
        for part, problem in zip(parts, problems, strict=True)
    )


def joined_problem(problems: Sequence[Problem]) -> Problem:
    """Problems over the same rows as one: their right-hand sides side by side."""
    first, *others = problems
    if not others:
        return first
    return replace(
        first,
        rhs=torch.cat([problem.rhs for problem in problems], dim=1),
        noise_draws=torch.cat([problem.noise_draws for problem in problems], dim=1),
    )


def _settings_of(settings: Settings, column: int) -> Settings:
    """Later data of each output have noise draws of their own."""
    if column == 0:
        return settings
    own = derived_generator(settings.seed, "output", column)
    return replace(settings, seed=seed_of(own))
