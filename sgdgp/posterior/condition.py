"""From a model and data to a posterior: one linear solve.

f(x) + K(x, X) (K + Sigma)^-1 (y - f(X) - eps),  f a prior function, eps noise
"""

from __future__ import annotations

import os

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.deprecation import renamed_arguments
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import generator_of
from sgdgp.gpytorch_adapter import Inputs, prior_of, training_data
from sgdgp.posterior.checkpoint import SolveCheckpoint
from sgdgp.posterior.posterior import Posterior, posterior_of
from sgdgp.posterior.problem import (
    Settings,
    Stopwatch,
    announce,
    joined,
    observations,
    parts_of,
    problems_of,
)
from sgdgp.solvers.base import Callback, Solver

DEFAULT_FEATURES = 16_384
"""Random features per group of samples; about one kernel row's worth of work."""


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

    The model is read, never changed: mean, kernel, noise and transforms. Its
    posterior is represented by its mean and ``num_samples`` functions.

    Args:
        model: Any ``gpytorch.models.ExactGP`` definition (BoTorch's ``SingleTaskGP``
            included) without batch shape, with a Gaussian likelihood.
        x: Training inputs (n, d) before the model's own transforms; a tuple of them
            for a model of several inputs, such as points and task indices. Default:
            the model's.
        y: Training targets (n,); or (n, T), one column for each task of a model with
            correlated outputs (``MultitaskKernel``) or for independent outputs of a
            single-output model, which share its kernel and noise. NaN is a
            target that was not observed. Default: the model's.
        solver: A solver such as ``SDD(tolerance=1e-2)``, its name, or "auto".
        num_samples: Posterior sample functions; 0 for the mean alone.
        seed: Seed or generator of everything random.
        num_features: Random features of each group of 64 prior draws.
        operator: "auto", "dense", "tiled", "keops", "row_blocks" or "features".
        memory_budget: Bytes for operator and solver. Default: half of what is free.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as the solve advances; returning True stops it.
        checkpoint: File that keeps the solve; calling again goes on from there. Further
            solves have ``checkpoint.1`` and on. See docs/checkpoints.md.
        checkpoint_every: Seconds between two writes of it, at least.

    Returns:
        A ``PathwisePosterior``; where y has several columns a ``MultiOutputPosterior``.
        ``posterior.solution.reason`` says how the solve ended.

    Raises:
        UnsupportedModelError: The prior is not a function of two points.
        CheckpointError: The checkpoint cannot be written, is damaged, or belongs to
            another problem (a ValueError).
        NoRandomFeatures: The kernel has no random features and n is too large for
            exact prior draws.
        TypeError: Data, settings or the likelihood are of the wrong kind.
        ValueError: Data, parameters or settings do not fit; says which and why.

    Example:
        >>> posterior = sgdgp.condition(model, num_samples=64, seed=0)
        >>> posterior.mean(x), posterior.variance(x), posterior.samples(x)
    """
    check_count("num_samples", num_samples, 0)
    keeper = SolveCheckpoint.at(checkpoint, checkpoint_every)
    generator = generator_of(seed)
    x, y = training_data(model, x, y)
    prior = prior_of(model, x)
    settings = Settings.resolve(
        solver, num_features, operator, memory_budget, y, generator, progress, callback
    )
    parts = {}
    for index, data in enumerate(observations(prior, x, y)):
        stream = settings.stream(index, generator)
        if keeper is not None:
            keeper.open_for(index, prior.model, data, stream, num_samples, num_features)
        clock = Stopwatch()
        problems = problems_of(prior, data, settings, num_samples, stream)
        problem = joined(problems)
        clock.end("prior_draws")
        solution = keeper.solve(problem, stream) if keeper else problem.solve(stream)
        clock.end("solve")
        parts.update(parts_of(data.columns, problems, solution, clock.seconds))
    announce("condition", parts.values())
    return posterior_of([parts[column] for column in sorted(parts)])
