"""The mean of the linear model: its loss minimised by Newton's method.

    vbar = argmin  sum_n l(o_n + J_n R v, y_n) + 1/2 |v|^2,

with the offset o_n = f(x_n) + J_n c of a prior that is centred at c from the network's
weights, or none.

Each step solves (phi^T phi + I) d = -slope - v, the same system as posterior samples
(``WeightSystem``), with the likelihood linearised at the current outputs, as exactly as
the step is worth (Dembo, Eisenstat and Steihaug, SIAM J. Numer. Anal. 19, 1982): to a
fifth of d, so that what is left shrinks fivefold a step. Its length is found by trying
a few. A quadratic loss expanded about trained weights is solved for vbar itself in one
step, from those weights. They never stand in for vbar: they optimise another
function (Antoran et al., ICML 2022).

At the optimum v = R^T J^T a with a = -g, g the gradient in the outputs. Where there are
fewer outputs than weights and their kernel is formed, a is what is searched for, as in
Gaussian process classification, without passes over the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.priors import WeightPrior
from sgdgp.networks.weight_solvers import WeightCholesky, WeightSolver
from sgdgp.solvers.base import Callback, Reason, Recorder

_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02)
"""Lengths of a step that are tried, all in one sweep over tables of outputs."""

_SOLVES = 5.0
"""Budget of the search in budgets of one solve; from a warm start one or two do."""

_FORCING = 0.2
"""A step's own relative error, at most: see the module's text."""

_MOST_STEPS = 100
"""Newton's steps, should they cost no pass: a dozen do from anywhere."""


@dataclass(frozen=True)
class LinearOptimum:
    """Optimum of the linear model.

    Attributes:
        mean: vbar, whitened (D, 1).
        system: The posterior precision with the likelihood linearised there.
        loss: Negative log-likelihood of the targets at it.
        passes: Passes over the data.
        converged: Whether the last one changed the mean by less than the tolerance.
    """

    mean: Float[Tensor, "D 1"]
    system: WeightSystem
    loss: float
    passes: float
    converged: bool


def optimise(
    data: TangentData,
    prior: WeightPrior,
    likelihood: Likelihood,
    mean: Float[Tensor, "D 1"],
    solver: WeightSolver,
    *,
    seed: int = 0,
    callback: Callback | None = None,
) -> LinearOptimum:
    """Newton's method from ``mean``, with a line search on the true objective.

    Args:
        data: The data set.
        prior: R.
        likelihood: Of the targets.
        mean: Starting point, whitened (D, 1).
        solver: For the linear systems. Its tolerance is also the relative change of
            the mean that ends the search, five times its passes are all there are.
        seed: Seed of everything random in the solver.
        callback: Told of the solver's advance.
    """
    rows = isinstance(solver, WeightCholesky) and data.is_wide
    space = (_Rows if rows else _Weights)(data, prior, solver, seed, callback)
    point, system = space.start(likelihood, mean)
    outputs = system.outputs
    loss = float(system.loss(outputs.unsqueeze(-1))[0])
    objective = loss + 0.5 * space.square(system, point)
    steps, converged = 0, False
    while (
        not converged
        and space.passes < _SOLVES * solver.max_passes
        and steps < _MOST_STEPS
    ):
        change, moved, reason = space.step(system, point, steps)
        steps += 1
        lengths = torch.tensor(_LENGTHS, dtype=outputs.dtype, device=outputs.device)
        losses = system.loss(outputs.unsqueeze(-1) + moved.unsqueeze(-1) * lengths)
        squares = losses.new_tensor(
            [space.square(system, point + length * change) for length in lengths]
        )
        objectives = (losses + 0.5 * squares).nan_to_num(torch.inf)
        best = int(objectives.argmin())
        gained = objective - float(objectives[best])
        if not gained > 0:
            # No length helps: the solver's error or rounding is all that is left.
            converged = reason == "converged"
            break
        length = float(lengths[best])
        point = point + length * change
        outputs = outputs + length * moved
        system = system.at(outputs)
        objective, loss = float(objectives[best]), float(losses[best])
        moves, size = space.square(system, change), space.square(system, point)
        small = length * math.sqrt(moves) <= solver.tolerance * math.sqrt(size)
        converged = small or gained <= 1e-2 * solver.tolerance**2
        if reason == "interrupted":
            break
    mean = space.weights(system, point)
    return LinearOptimum(mean, system, loss, space.passes, converged)


@dataclass
class _Weights:
    """Points are whitened weights themselves."""

    data: TangentData
    prior: WeightPrior
    solver: WeightSolver
    seed: int
    callback: Callback | None
    passes: float = 1.0

    def start(
        self, likelihood: Likelihood, mean: Tensor
    ) -> tuple[Tensor, WeightSystem]:
        """The point to begin at, and the likelihood linearised there."""
        outputs = self.data.outputs_of(self.prior.root(mean))
        return mean, WeightSystem(self.data, self.prior, likelihood, outputs)

    def square(self, system: WeightSystem, point: Tensor) -> float:
        """|v|^2."""
        return float(point.double().square().sum())

    def step(
        self, system: WeightSystem, point: Tensor, turn: int
    ) -> tuple[Tensor, Float[Tensor, "r C"], Reason]:
        """Newton's change of the point, that of the outputs, and how it was solved."""
        is_near = self.data.centre is not None and bool(point.any())
        if is_near and isinstance(system.likelihood, Gaussian):
            # The optimum itself, as exactly as it is asked for. Its change from weights
            # that fit already has outputs close to zero, of which no error is a share.
            rhs, first = system.product(point) - system.slope(), point
            tolerance, extra = self.solver.tolerance, 3.0
        else:
            rhs, first = -(system.slope() + point), torch.zeros_like(point)
            tolerance, extra = max(self.solver.tolerance, _FORCING), 2.0
        solved = replace(self.solver, tolerance=tolerance).solve(
            system, rhs, first, seed=self.seed + turn, callback=self.callback
        )
        change = solved.weights - first
        self.passes += solved.passes + extra
        moved = self.data.forward(self.prior.root(change))[..., 0]
        return change, moved, solved.reason

    def weights(self, system: WeightSystem, point: Tensor) -> Float[Tensor, "D 1"]:
        """The whitened weights of a point."""
        return point


@dataclass
class _Rows(_Weights):
    """Points are a (N, 1) in float64, of weights v = R^T J^T a."""

    def start(
        self, likelihood: Likelihood, mean: Tensor
    ) -> tuple[Tensor, WeightSystem]:
        """Zero, or minus the gradient at the outputs of ``mean`` if that is better."""
        _, near = super().start(likelihood, mean)
        self.passes += 0.0 if near.is_formed else 1.0
        self._recorder = Recorder(self.callback)
        slope = likelihood.gradient(near.outputs, self.data.targets)
        points = torch.stack([torch.zeros_like(slope), -slope]).double()
        points = points.flatten(1).unsqueeze(-1)
        outputs = torch.stack([self._images(near, a) for a in points], -1)
        if self.data.offset is not None:
            outputs = outputs + self.data.offset.unsqueeze(-1)
        squares = [self.square(near, a) for a in points]
        losses = near.loss(outputs)
        best = int((losses + 0.5 * losses.new_tensor(squares)).argmin())
        return points[best], near.at(outputs[..., best])

    def square(self, system: WeightSystem, point: Tensor) -> float:
        return max(0.0, float((point * (system.kernel @ point)).sum()))

    def step(
        self, system: WeightSystem, point: Tensor, turn: int
    ) -> tuple[Tensor, Float[Tensor, "r C"], Reason]:
        change = system.newton_step(point)
        asked_to_stop = self._recorder(
            self.passes,
            torch.zeros(1),
            exact=False,
            weights=lambda: self.weights(system, point),
        )
        reason: Reason = "interrupted" if asked_to_stop else "converged"
        return change, self._images(system, change), reason

    def weights(self, system: WeightSystem, point: Tensor) -> Float[Tensor, "D 1"]:
        return system.weights_of(point)

    def _images(self, system: WeightSystem, a: Tensor) -> Float[Tensor, "r C"]:
        return (system.kernel @ a).view_as(system.outputs).to(system.outputs)
