"""From a model and data to a posterior: one linear solve.

f(x) + K(x, X) (K + Sigma)^-1 (y - f(X) - eps),  f a prior function, eps noise
"""

from __future__ import annotations

import os
from functools import partial

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.deprecation import renamed_arguments
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import generator_of
from sgdgp.gpytorch_adapter import Inputs, Prior, prior_of, training_data
from sgdgp.posterior.checkpoint import SolveCheckpoint
from sgdgp.posterior.posterior import Posterior, posterior_of
from sgdgp.posterior.problem import (
    DEFAULT_FEATURES,
    Observations,
    Part,
    Settings,
    Stopwatch,
    announce,
    joined,
    observations,
    parts_of,
    problems_of,
)
from sgdgp.solvers.base import Callback, Solver


@renamed_arguments(every="checkpoint_every")
@outside_inference_mode
def condition(
    model: ExactGP,
    x: Inputs | None = None,
    y: Float[Tensor, " n"] | Float[Tensor, "n t"] | None = None,
    *,
    solver: Solver | str = "auto",
    num_samples: int = 64,
    seed: int | torch.Generator = 0,
    num_features: int = DEFAULT_FEATURES,
    operator: str = "auto",
    memory_budget: int | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | float = 60,
) -> Posterior:
    """Condition a GPyTorch model on data by one stochastic linear solve.

    The model is read, never changed. Its posterior is its mean and ``num_samples``
    functions, which up to 2,000 rows wait until they are asked for.

    Args:
        model: Any ``ExactGP`` without batch shape, with a Gaussian likelihood.
        x: Inputs (n, d), or a tuple of several. Default: x and y are the model's.
        y: Targets (n,); or (n, T) of tasks of a ``MultitaskKernel``, or of independent
            outputs with one kernel and noise. NaN where there is none.
        solver: A solver such as ``SDD(tolerance=1e-2)``, its name, or "auto".
        num_samples: Posterior sample functions; 0 for the mean alone.
        seed: Seed or generator of everything random.
        num_features: Random features of each group of 64 prior draws.
        operator: "auto", "dense", "tiled", "triton", "triton_medium", "keops",
            "row_blocks", "features" or "sharded" (see ``sgdgp.distribute``).
        memory_budget: Bytes for operator and solver. Default: half of what is free.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as the solve advances; returning True stops it.
        checkpoint: File that keeps the solve; calling again goes on from there.
        checkpoint_every: Seconds between two writes of it, at least.

    Returns:
        A ``PathwisePosterior``; where y has several columns a ``MultiOutputPosterior``.

    Raises:
        NoRandomFeatures: There are none, and n is too large for exact prior draws.
        ValueError: Data, model or settings do not fit (TypeError: in kind); says why.
    """
    keeper = SolveCheckpoint.at(checkpoint, checkpoint_every)
    x, y = training_data(model, x, y)
    prior = prior_of(model, x)
    settings = Settings.resolve(
        solver, num_features, operator, memory_budget, y, seed, progress, callback
    )
    data = observations(prior, x, y)
    solve = partial(solved, prior, data, settings, num_samples)
    if keeper is None and settings.functions_can_wait(prior, data, num_samples, seed):
        means = solve(seed, functions=False)
        if all(part.needs_no_functions for part in means):
            return posterior_of(means, later=partial(solve, seed))
    return posterior_of(announce("condition", solve(seed, keeper)))


def solved(
    prior: Prior,
    data: tuple[Observations, ...],
    settings: Settings,
    num_samples: int,
    seed: int | torch.Generator,
    keeper: SolveCheckpoint | None = None,
    functions: bool = True,
) -> list[Part]:
    """All outputs, by one solve for each set of rows that they were observed in."""
    generator, parts = generator_of(seed), {}
    for index, rows in enumerate(data):
        stream = settings.stream(index, generator)
        if keeper is not None:
            keeper.open_for(index, prior.model, rows, stream, num_samples, settings)
        clock = Stopwatch()
        problems = problems_of(prior, rows, settings, num_samples, stream, functions)
        problem = joined(problems)
        clock.end("prior_draws")
        solution = keeper.solve(problem, stream) if keeper else problem.solve(stream)
        clock.end("solve")
        parts.update(parts_of(rows.columns, problems, solution, clock.seconds))
    return [parts[column] for column in sorted(parts)]
