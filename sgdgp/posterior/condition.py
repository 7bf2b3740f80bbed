"""From a model and data to a posterior: one linear solve."""

from __future__ import annotations

import os

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.deprecation import renamed_arguments
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import derived_generator, generator_of, seed_of
from sgdgp.gpytorch_adapter import Inputs, PairPrior, prior_of
from sgdgp.gpytorch_adapter.data import training_data
from sgdgp.operators import check_kernel
from sgdgp.posterior.checkpoint import SolveCheckpoint
from sgdgp.posterior.independent import IndependentPosterior
from sgdgp.posterior.multitask import MultitaskPosterior
from sgdgp.posterior.outputs import MultiOutputPosterior
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.problem import Settings
from sgdgp.posterior.systems import solve_system, systems_of
from sgdgp.solvers.base import Callback, Solver

DEFAULT_FEATURES = 16_384
"""Random features per group of samples; about one kernel row's worth of work."""


@renamed_arguments(every="checkpoint_every")
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
) -> PathwisePosterior | MultiOutputPosterior:
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
            single-output model, which share its kernel and noise. NaN in (n, T)
            is a target that was not observed. Default: the model's.
        solver: A solver such as ``SDD(tolerance=1e-2)``, its name, or "auto".
        num_samples: Posterior sample functions; 0 for the mean alone.
        seed: Seed or generator of everything random.
        num_features: Random features of each group of 64 prior draws.
        operator: "auto", "dense", "tiled", "keops" or "row_blocks".
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as the solve advances; returning True stops it.
        checkpoint: File that keeps the solve. Calling again after the process was
            killed goes on from there; after the solve has ended, it is returned at
            once. Budgets are for all runs together. See docs/checkpoints.md. Further
            solves (outputs observed in different rows) have ``checkpoint.1`` and on.
        checkpoint_every: Seconds between two writes of the checkpoint, at least.

    Returns:
        The posterior; a ``MultiOutputPosterior`` where y has several columns.
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
    check_count("num_features", num_features, 1)
    if memory_budget is not None:
        check_count("memory_budget", memory_budget, 1)
    if not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    keeper = (
        None if checkpoint is None else SolveCheckpoint(checkpoint, checkpoint_every)
    )
    generator = generator_of(seed)
    x, y = training_data(model, x, y)
    prior = prior_of(model, x)
    check_kernel(prior.kernel)
    systems = systems_of(prior, x, y)
    settings = Settings(
        num_features=num_features,
        operator=operator,
        memory_budget=resolve_budget(memory_budget, systems[0].inputs.device),
        seed=seed_of(generator),
        progress=progress,
        callback=callback,
    )
    parts: dict[int, PathwisePosterior] = {}
    for index, system in enumerate(systems):
        if index > 0:
            # A stream of its own: a solve that is found finished in its checkpoint
            # takes less from a generator than one that is run.
            generator = derived_generator(settings.seed, "system", index)
        if keeper is not None:
            keeper = (
                keeper
                if index == 0
                else SolveCheckpoint(f"{checkpoint}.{index}", checkpoint_every)
            )
            keeper.open_for(
                prior.model,
                system.x,
                system.y.flatten(),
                generator,
                num_samples=num_samples,
                num_features=num_features,
            )
        solved = solve_system(
            prior, system, solver, num_samples, settings, generator, keeper
        )
        # Of a multitask model all columns of y are one.
        parts.update(zip(system.columns, solved, strict=False))
    if isinstance(prior, PairPrior):
        return MultitaskPosterior.of(parts[0])
    if y.ndim == 1:
        return parts[0]
    return IndependentPosterior.of([parts[column] for column in sorted(parts)])
