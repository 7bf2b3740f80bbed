"""New data for several posteriors over the same rows, by one solve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.systems import joined_problem
from sgdgp.posterior.update import extended, solved
from sgdgp.solvers.base import Callback, Solver
from sgdgp.solvers.solutions import merged_solution, split_solution


def updated_together(
    posteriors: Sequence[PathwisePosterior],
    x_new: Float[Tensor, "m d"],
    y_new: Float[Tensor, "m c"],
    *,
    noise: Float[Tensor, " m"] | None = None,
    solver: Solver | str | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
) -> tuple[PathwisePosterior, ...]:
    """The posteriors given new data of all of them.

    Args:
        posteriors: Posteriors that share an operator and its noise.
        x_new: New inputs (m, d), checked.
        y_new: Their targets, one column for each posterior, none of them missing.
        noise: Noise variances of the new targets. Default: the likelihood's.
        solver: A solver or a name. Default: that of the posteriors.
        progress: Show a progress bar.
        callback: Called as the solve advances.
    """
    if len(posteriors) == 1:
        alone = posteriors[0].update(
            x_new,
            y_new[:, 0],
            noise=noise,
            solver=solver,
            progress=progress,
            callback=callback,
        )
        return (alone,)
    start = time.perf_counter()
    problems = [
        extended(posterior.problem, x_new, targets, noise, solver)
        for posterior, targets in zip(posteriors, y_new.unbind(1), strict=True)
    ]
    shared = problems[0].operator
    problems = [
        replace(
            problem,
            operator=shared,
            settings=replace(problem.settings, progress=progress, callback=callback),
        )
        for problem in problems
    ]
    drawn = time.perf_counter()
    everything = [range(len(posteriors))]
    before = merged_solution([old.solution for old in posteriors], everything)
    solution = solved(joined_problem(problems), before)
    timings = {"prior_draws": drawn - start, "solve": time.perf_counter() - drawn}
    parts = split_solution(solution, [problem.rhs.shape[1] for problem in problems])
    return tuple(
        PathwisePosterior(
            part, old.num_samples, timings, problem.paths(part.weights), problem
        )
        for old, problem, part in zip(posteriors, problems, parts, strict=True)
    )
