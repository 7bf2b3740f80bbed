"""The posterior of each step of a run, from that of the step before.

More data, and new functions or other parameters when they are due; and the model of a
run where none is given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.bayesopt.maximise import Maxima
from sgdgp.bayesopt.record import Step, read_posterior, store_posterior
from sgdgp.core.errors import CheckpointError, warn_user
from sgdgp.core.seeds import derived_generator
from sgdgp.posterior import PathwisePosterior, condition
from sgdgp.posterior.update import update_and_redraw
from sgdgp.solvers.base import Solver
from sgdgp.training import fit

_STORED_EVERY = 5
"""Steps between two posteriors in the file, at most: what is not written has to be
solved for again after an interruption."""

_ROWS = 1000
"""Rows that parameters are learned from; so many have exact gradients."""

_SMALLEST_NOISE = 1e-6
"""Noise variance over the variance of the targets, at least."""

_SMALLEST_SPREAD = 1e-3
"""Least spread of a column that a lengthscale starts from: constant ones have none."""

ModelMaker: TypeAlias = Callable[[Tensor, Tensor], ExactGP]
"""Data (n, d), (n,) to a model with parameters that suit them."""

Maximiser: TypeAlias = Callable[..., Maxima]
"""Called as ``maximiser(posterior, bounds, seed=generator)``."""


@dataclass(frozen=True)
class Options:
    """What a run is told beside data and objective; see ``thompson_sampling``."""

    batch: int
    model: ExactGP | ModelMaker | None
    solver: Solver | str
    maximiser: Maximiser
    refit_every: int | None
    redraw_every: int | None
    noise: float | None
    num_features: int
    evaluate_at_once: int | None
    seed: int
    memory_budget: int | None


class Chain:
    """The latest posterior of a run, in memory and, if asked, in a file.

    The file has the posterior of every fifth step and of those that solved from zero,
    and one beside it what its solve leaves to the next. From there the same updates
    follow whether or not the run was interrupted.

    Args:
        options: How posteriors are found.
        place: File of a recent posterior, or None.
    """

    def __init__(self, options: Options, place: Path | None) -> None:
        self.options = options
        self.place = place
        self.latest: PathwisePosterior | None = None

    def at(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, " n"],
        history: Sequence[Step] = (),
    ) -> PathwisePosterior:
        """The posterior given all data, for the step that comes next.

        Args:
            x: Observed points (n, d).
            y: Their values (n,).
            history: Finished steps.

        Raises:
            CheckpointError: The file belongs to other data.
        """
        posterior = self.latest
        if posterior is None:
            posterior = self._read(x, y, history)
        if posterior is None:
            step = 1 + (history[-1].step if history else 0)
            posterior = self._from_zero(step, self._model(x, y), x, y)
        known = len(posterior.problem.x)
        for done in history:
            count = done.num_observations
            if count > known:
                posterior = self._next(posterior, done.step + 1, x[:count], y[:count])
        return posterior

    def _next(
        self, before: PathwisePosterior, step: int, x: Tensor, y: Tensor
    ) -> PathwisePosterior:
        """The posterior of a step, from that of the step before."""
        options = self.options
        known = len(before.problem.x)
        x_new, y_new = x[known:], y[known:]
        if _is_due(options.refit_every, step):
            model = self._learn_again(before, x, y)
            return self._from_zero(step, model, x, y)
        if _is_due(options.redraw_every, step):
            generator = derived_generator(options.seed, "functions", step)
            (part,) = before.parts
            part = update_and_redraw(part, x_new, y_new, generator, noise=options.noise)
            return self._keep(replace(before, solved=(part,), later=None), store=True)
        posterior = before.update(x_new, y_new, noise=options.noise, progress=False)
        return self._keep(posterior, store=_is_due(_STORED_EVERY, step))

    def _keep(self, posterior: PathwisePosterior, *, store: bool) -> PathwisePosterior:
        if store and self.place is not None:
            posterior = store_posterior(posterior, self.place)
        self.latest = posterior
        return posterior

    def _from_zero(
        self, step: int, model: ExactGP, x: Tensor, y: Tensor
    ) -> PathwisePosterior:
        options = self.options
        posterior = condition(
            model,
            x,
            y,
            solver=options.solver,
            num_samples=options.batch,
            seed=derived_generator(options.seed, "functions", step),
            num_features=options.num_features,
            memory_budget=options.memory_budget,
            progress=False,
        )
        if not isinstance(posterior, PathwisePosterior):
            raise TypeError("model: expected a model of one output, found several")
        return self._keep(posterior, store=True)

    def _model(self, x: Tensor, y: Tensor, *, learned: bool = True) -> ExactGP:
        """The model of the first step; one read from a file did that already."""
        given = self.options.model
        if given is not None:
            return given if isinstance(given, ExactGP) else given(x, y)
        model = MaternModel(x, y)
        if learned:
            learn(model, x, y, self.options.seed)
        return model

    def _learn_again(self, before: PathwisePosterior, x: Tensor, y: Tensor) -> ExactGP:
        """The model, having learned from all data."""
        given = self.options.model
        if not isinstance(given, ExactGP):
            return self._model(x, y)
        model = copy.deepcopy(given)
        model.load_state_dict(before.problem.prior.model.state_dict())
        learn(model, x, y, self.options.seed)
        return model

    def _read(
        self, x: Tensor, y: Tensor, history: Sequence[Step]
    ) -> PathwisePosterior | None:
        """What the file has, if there is one."""
        if self.place is None:
            return None
        if not self.place.exists():
            if any(step.step > 0 for step in history):
                warn_user(
                    f"checkpoint: {self.place} is not there; the functions are drawn "
                    "anew"
                )
            return None
        model = self._model(x, y, learned=False)
        posterior = read_posterior(self.place, model, self.options.solver)
        if not torch.equal(posterior.problem.x, x[: len(posterior.problem.x)]):
            raise CheckpointError(
                f"checkpoint: {self.place} belongs to other data; delete it to have "
                "the functions drawn anew"
            )
        return posterior


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and (step - 1) % every == 0


class MaternModel(ExactGP):
    """Constant mean, Matern-5/2 kernel with a lengthscale for each input.

    Parameters start at what suits the data: their mean, variance and spread.

    Args:
        x: Inputs (n, d).
        y: Targets (n,).
    """

    def __init__(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> None:
        variance = float(y.var()) if len(y) > 1 else 1.0
        variance = variance if variance > 0 else 1.0
        least = GreaterThan(_SMALLEST_NOISE * variance)
        super().__init__(x, y, GaussianLikelihood(noise_constraint=least))
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(MaternKernel(ard_num_dims=x.shape[1]))
        self.to(x)
        spread = (x.amax(0) - x.amin(0)).clamp_min(_SMALLEST_SPREAD)
        self.mean_module.initialize(constant=y.mean())
        self.covar_module.outputscale = variance
        self.covar_module.base_kernel.lengthscale = (
            0.25 * math.sqrt(x.shape[1]) * spread
        )
        self.likelihood.noise = 1e-2 * variance

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at x."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def learn(
    model: ExactGP, x: Float[Tensor, "n d"], y: Float[Tensor, " n"], seed: int
) -> None:
    """Learn a model's parameters in place, from at most 1,000 of the data."""
    if len(x) > _ROWS:
        generator = derived_generator(seed, "learned from", len(x))
        rows = torch.randperm(len(x), generator=generator, device=generator.device)
        rows = rows[:_ROWS].to(x.device)
        x, y = x[rows], y[rows]
    fit(model, x, y, seed=seed, progress=False)
