"""The posterior of each step of a run, from that of the step before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.bayesopt.default_model import MaternModel, learned
from sgdgp.bayesopt.kept import store_posterior, stored_posterior
from sgdgp.bayesopt.maximise import Maxima
from sgdgp.bayesopt.record import Step
from sgdgp.bayesopt.renewal import with_new_functions
from sgdgp.core.errors import CheckpointError
from sgdgp.core.seeds import derived_generator
from sgdgp.posterior import PathwisePosterior, condition
from sgdgp.solvers.base import Solver

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


_STORED_EVERY = 5
"""Steps between two posteriors in the file, at most."""


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
        found = self.latest
        if found is None:
            found = self._stored(x, y, history)
        if found is None:
            step = 1 + (history[-1].step if history else 0)
            found = self._kept(self._cold(step, self._model(x, y), x, y), store=True)
        known = len(found.problem.x)
        for done in history:
            count = done.num_observations
            if count > known:
                found = self._next(found, done.step + 1, x[:count], y[:count])
        return found

    def _next(
        self, before: PathwisePosterior, step: int, x: Tensor, y: Tensor
    ) -> PathwisePosterior:
        """The posterior of a step, from that of the step before."""
        options = self.options
        known = len(before.problem.x)
        x_new, y_new = x[known:], y[known:]
        if _is_due(options.refit_every, step):
            model = self._refitted(before, x, y)
            return self._kept(self._cold(step, model, x, y), store=True)
        if _is_due(options.redraw_every, step):
            generator = derived_generator(options.seed, "functions", step)
            found = with_new_functions(
                before, x_new, y_new, generator, noise=options.noise
            )
            return self._kept(found, store=True)
        found = before.update(x_new, y_new, noise=options.noise, progress=False)
        return self._kept(found, store=_is_due(_STORED_EVERY, step))

    def _kept(self, found: PathwisePosterior, *, store: bool) -> PathwisePosterior:
        if store and self.place is not None:
            found = store_posterior(found, self.place)
        self.latest = found
        return found

    def _cold(
        self, step: int, model: ExactGP, x: Tensor, y: Tensor
    ) -> PathwisePosterior:
        options = self.options
        found = condition(
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
        if not isinstance(found, PathwisePosterior):
            raise TypeError("model: expected a model of one output, found several")
        return found

    def _model(self, x: Tensor, y: Tensor) -> ExactGP:
        """The model of the first step."""
        given = self.options.model
        if isinstance(given, ExactGP):
            return given
        if given is not None:
            return given(x, y)
        model = MaternModel(x, y)
        learned(model, x, y, self.options.seed)
        return model

    def _refitted(self, before: PathwisePosterior, x: Tensor, y: Tensor) -> ExactGP:
        """The model, having learned from all data."""
        given = self.options.model
        if not isinstance(given, ExactGP):
            return self._model(x, y)
        model = copy.deepcopy(given)
        model.load_state_dict(before.problem.prior.model.state_dict())
        learned(model, x, y, self.options.seed)
        return model

    def _stored(
        self, x: Tensor, y: Tensor, history: Sequence[Step]
    ) -> PathwisePosterior | None:
        """What the file has, if there is one."""
        if self.place is None:
            return None
        if not self.place.exists():
            if any(step.step > 0 for step in history):
                warnings.warn(
                    f"checkpoint: {self.place} is not there; the functions are drawn "
                    "anew",
                    stacklevel=2,
                )
            return None
        given = self.options.model
        if given is None:
            model: ExactGP = MaternModel(x, y)
        else:
            model = given if isinstance(given, ExactGP) else given(x, y)
        found = stored_posterior(self.place, model, self.options.solver)
        if not torch.equal(found.problem.x, x[: len(found.problem.x)]):
            raise CheckpointError(
                f"checkpoint: {self.place} belongs to other data; delete it to have "
                "the functions drawn anew"
            )
        return found


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and (step - 1) % every == 0
