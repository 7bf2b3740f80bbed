"""The mean of the linear model: its loss minimised by Newton's method.

    vbar = argmin  sum_n l(o_n + J_n R v, y_n) + 1/2 |v|^2,

with the offset o_n = f(x_n) + J_n c of a prior that is centred at c from the network's
weights, or none.

Each step solves (phi^T phi + I) d = -slope - v, the same system as posterior samples
(``WeightSystem``), with the likelihood linearised at the current outputs, as exactly as
the step is worth (Dembo, Eisenstat and Steihaug, SIAM J. Numer. Anal. 19, 1982): to a
fifth of d, so that what is left shrinks fivefold a step. Its length is found by trying
a few. The network's trained weights never stand in for vbar:
they optimise another function (Antoran et al., ICML 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.priors import WeightPrior
from sgdgp.networks.weight_solvers import WeightSolver
from sgdgp.solvers.base import Callback

_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02)
"""Lengths of a step that are tried, all in one sweep over tables of outputs."""

_SOLVES = 5.0
"""Budget of the search in budgets of one solve; from a warm start one or two do."""

_FORCING = 0.2
"""A step's own relative error, at most: see the module's text."""


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
    loose = replace(solver, tolerance=max(solver.tolerance, _FORCING))
    outputs = data.outputs_of(prior.root(mean))
    system = WeightSystem(data, prior, likelihood, outputs)
    loss = float(system.loss(outputs.unsqueeze(-1))[0])
    objective = loss + 0.5 * float(mean.double().square().sum())
    passes, steps, converged = 1.0, 0, False
    while not converged and passes < _SOLVES * solver.max_passes:
        descent = -(system.slope() + mean)
        solved = loose.solve(
            system,
            descent,
            torch.zeros_like(mean),
            seed=seed + steps,
            callback=callback,
        )
        steps += 1
        passes += solved.passes + 2.0
        change = solved.weights
        moved = data.forward(prior.root(change))[..., 0]
        lengths = torch.tensor(_LENGTHS, dtype=outputs.dtype, device=outputs.device)
        losses = system.loss(outputs.unsqueeze(-1) + moved.unsqueeze(-1) * lengths)
        squares = torch.stack(
            [(mean + length * change).double().square().sum() for length in lengths]
        )
        objectives = (losses + 0.5 * squares).nan_to_num(torch.inf)
        best = int(objectives.argmin())
        gained = objective - float(objectives[best])
        if not gained > 0:
            # No length helps: the solver's error or rounding is all that is left.
            converged = solved.reason == "converged"
            break
        length = float(lengths[best])
        mean = mean + length * change
        outputs = outputs + length * moved
        system = system.at(outputs)
        objective, loss = float(objectives[best]), float(losses[best])
        small = float((length * change).norm()) <= solver.tolerance * float(mean.norm())
        converged = small or gained <= 1e-2 * solver.tolerance**2
        if solved.reason == "interrupted":
            break
    return LinearOptimum(mean, system, loss, passes, converged)
