"""Learning the regressor's hyperparameters."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from sgdgp.sklearn.arguments import Settings
from sgdgp.sklearn.model import GPModel, weighted_model
from sgdgp.training import fit
from sgdgp.training.run import Fitted, Plateau


def learn(
    model: GPModel,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"] | Float[Tensor, "n t"],
    weights: Float[Tensor, " n"] | None,
    settings: Settings,
    seed: int,
) -> Fitted | None:
    """Learn the parameters of ``model`` in place.

    Args:
        model: Model to learn.
        x: Inputs (n, d).
        y: Targets (n,) or (n, t), in the model's units.
        weights: How often each row counts (n,). Default: once.
        settings: Optimiser, steps and solver.
        seed: Seed of the probes.

    Returns:
        How it went, or None if nothing was to be learned.
    """
    if settings.optimiser is None or settings.steps == 0:
        return None
    plateau = Plateau()
    learned = model
    if weights is not None:
        learned, x = weighted_model(model, x, weights, 1 if y.ndim == 1 else y.shape[1])
        # Gains count per observation, and a row is as many as its weight.
        plateau = replace(plateau, gain=plateau.gain * float(weights.mean()))
    return fit(
        learned,
        x,
        y,
        steps=settings.steps,
        optimizer=settings.optimiser,
        solver=settings.solver,
        plateau=plateau,
        seed=seed,
        progress=settings.progress,
    )
