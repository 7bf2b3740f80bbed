"""Thompson sampling: propose the maxima of sample functions, observe, condition."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

import sgdgp.bayesopt.record as records
from sgdgp.bayesopt.chain import Maximiser, ModelMaker, Options
from sgdgp.bayesopt.kept import remove_posterior
from sgdgp.bayesopt.maximise import check_bounds, maximise
from sgdgp.bayesopt.record import Pending, Record, Step
from sgdgp.bayesopt.run import Objective, Result, Run, posterior_file
from sgdgp.core.checks import check_count, check_finite, check_matrix, check_same
from sgdgp.core.hashes import digest
from sgdgp.core.seeds import derived_generator
from sgdgp.posterior.checkpoint_file import checked_place
from sgdgp.posterior.condition import DEFAULT_FEATURES
from sgdgp.solvers.base import Solver


def thompson_sampling(
    objective: Objective,
    bounds: Float[Tensor, "2 d"],
    initial: int | tuple[Float[Tensor, "n d"], Float[Tensor, " n"]],
    steps: int,
    batch: int,
    *,
    model: ExactGP | ModelMaker | None = None,
    solver: Solver | str = "auto",
    maximiser: Maximiser = maximise,
    refit_every: int | None = None,
    redraw_every: int | None = None,
    noise: float | None = None,
    num_features: int = DEFAULT_FEATURES,
    evaluate_at_once: int | None = None,
    callback: Callable[[Step], bool | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool | None = None,
) -> Result:
    """Maximise an objective by Thompson sampling with ``batch`` points at a time.

    In every step each of ``batch`` posterior functions proposes its maximum, the
    proposals are evaluated, and the functions conditioned on the results.

    Args:
        objective: Points (b, d) to values (b,), noisy or not; larger is better.
        bounds: Lower and upper corner of the box (2, d).
        initial: Observations (n, d) and (n,) to begin with; or a number of points to
            draw uniformly and evaluate first.
        steps: Steps in all, those of earlier calls with the same checkpoint included.
        batch: Functions, and so points in each step.
        model: A GPyTorch model whose parameters are right already; or a function of
            the data that makes one. Default: a Matern-5/2 kernel with a lengthscale
            for each input, learned from up to 1,000 of the initial observations.
        solver: A solver, its name, or "auto".
        maximiser: How functions are maximised, such as
            ``functools.partial(sgdgp.bayesopt.maximise, rounds=10)``.
        refit_every: Steps after which the model learns again. Default: never.
        redraw_every: Steps after which functions are drawn anew. Default: never; the
            same functions are conditioned on and on, which is ensemble sampling (Lu
            & Van Roy, 2017), and every solve starts from the one before. With 1 all
            steps have independent functions, as in the papers, and only the solve of
            the mean starts from the one before.
        noise: Noise variance of new observations. Default: the likelihood's.
        num_features: Random features of the prior draws.
        evaluate_at_once: Points given to the objective at a time. Default: all.
        callback: Called after every step; returning True stops the run.
        checkpoint: File that keeps the run (with ".posterior" behind its name: its
            functions). Calling again with it goes on where the run was, whatever
            ended it: proposals are written before they are evaluated, results right
            after. Only a call of the objective that was under way is made again.
        seed: Seed of everything random.
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.
        progress: Show a progress bar. Default: on a terminal.

    Returns:
        All observations, the best of them, and what each step took.

    Raises:
        CheckpointError: The checkpoint cannot be written, is damaged, or belongs to
            another run (a ValueError).
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit, or the objective returned something that
            is no value; nothing of that call has entered the data.

    Example:
        >>> result = sgdgp.bayesopt.thompson_sampling(
        ...     objective, bounds, initial=1000, steps=10, batch=100,
        ...     checkpoint="run.safetensors",
        ... )
        >>> result.best_x, result.best_y
    """
    check_bounds(bounds)
    check_count("steps", steps, 0)
    check_count("batch", batch, 1)
    for name, value in (
        ("refit_every", refit_every),
        ("redraw_every", redraw_every),
        ("evaluate_at_once", evaluate_at_once),
    ):
        if value is not None:
            check_count(name, value, 1)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, found {type(seed).__name__}")
    options = Options(
        batch=batch,
        model=model,
        solver=solver,
        maximiser=maximiser,
        refit_every=refit_every,
        redraw_every=redraw_every,
        noise=noise,
        num_features=num_features,
        evaluate_at_once=evaluate_at_once,
        seed=seed,
        memory_budget=memory_budget,
    )
    settings = {
        "bounds": digest(bounds),
        "initial": digest(initial),
        "batch": str(batch),
        "seed": str(seed),
        "noise": str(noise),
        "refit_every": str(refit_every),
        "redraw_every": str(redraw_every),
        "num_features": str(num_features),
    }
    place = None if checkpoint is None else checked_place(checkpoint, 1)
    if place is not None and place.exists():
        record = records.read(place, bounds.device)
        records.check_same_run(place, record, settings)
    else:
        record = replace(_beginning(bounds, initial, seed), settings=settings)
        if place is not None:
            # What an earlier run left must not be taken for this one's.
            remove_posterior(posterior_file(place))
            records.write(place, record)
    run = Run(objective, bounds, options, record, place)
    return run.until(steps, callback, progress)


def _beginning(
    bounds: Tensor, initial: int | tuple[Tensor, Tensor], seed: int
) -> Record:
    """The record of a run that has observed nothing yet."""
    if isinstance(initial, tuple):
        x, y = initial
        check_matrix("initial[0]", x, bounds.shape[1])
        check_same("initial[0]", x, "bounds", bounds)
        if y.shape != (len(x),):
            raise ValueError(
                f"initial[1]: expected shape ({len(x)},), found {tuple(y.shape)}"
            )
        check_same("initial[1]", y, "bounds", bounds)
        check_finite("initial[0]", x)
        check_finite("initial[1]", y)
        return Record(x.detach(), y.detach())
    check_count("initial", initial, 1)
    generator = derived_generator(seed, "initial")
    uniform = torch.rand(
        initial, bounds.shape[1], generator=generator, dtype=torch.float64
    )
    proposals = bounds[0] + (bounds[1] - bounds[0]) * uniform.to(bounds)
    none = bounds.new_zeros(0)
    pending = Pending(Step(0, 0, float("nan")), proposals, none)
    return Record(bounds.new_zeros(0, bounds.shape[1]), none, pending=pending)
