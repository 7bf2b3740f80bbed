"""Fits from several places, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import gpytorch
import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import Inputs
from sgdgp.training.evidence import total_log_likelihood
from sgdgp.training.history import Fitted
from sgdgp.training.model_state import put_state, state_of

_SPREAD = 1.0


def best_of(
    count: int,
    attempt: Callable[[int, Sequence[Fitted]], Fitted],
    model: ExactGP,
    x: Inputs,
    y: Tensor,
    seed: int,
) -> Fitted:
    """Fit ``count`` times, from where the model is and from scattered parameters.

    Args:
        count: Number of fits; with one, nothing is compared.
        attempt: (number of the fit, the earlier ones) to a fit, which changes the
            model in place.
        model: The model; it ends with the best fit's parameters, by the estimated log
            marginal likelihood.
        x: Training inputs.
        y: Targets in the model's units.
        seed: Seed of the scattered parameters and of the estimates.

    Returns:
        The best fit, its passes and seconds those of all.
    """
    if count == 1:
        return attempt(0, ())
    start = state_of(model)
    runs: list[Fitted] = []
    values: list[float] = []
    states: list[dict[str, Tensor]] = []
    for i in range(count):
        if i:
            put_state(model, start)
            scatter(model, derived_generator(seed, "restart", i))
        runs.append(attempt(i, runs))
        states.append(state_of(model))
        values.append(_value(model, x, y, seed))
        if runs[-1].reason in ("interrupted", "budget"):
            break
    chosen = max(range(len(runs)), key=values.__getitem__)
    put_state(model, states[chosen])
    return replace(
        runs[chosen],
        passes=sum(run.passes for run in runs),
        seconds=sum(run.seconds for run in runs),
    )


def _value(model: ExactGP, x: Inputs, y: Tensor, seed: int) -> float:
    """The estimated log marginal likelihood; of parameters without one, minus infinity.

    A fit that diverged may have left such parameters.
    """
    try:
        value = total_log_likelihood(model, x, y, seed=seed).value
    except (torch.linalg.LinAlgError, ValueError):
        return -math.inf
    return value if math.isfinite(value) else -math.inf


@torch.no_grad()
def scatter(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move a model's constrained parameters to a random place, in place.

    Positive parameters are multiplied by exp(N(0, 1)), those in an interval drawn
    uniformly from it. Parameters without a constraint (means, networks) stay.

    Args:
        model: A GPyTorch model.
        generator: Source of all randomness.
    """
    for module in model.modules():
        if not isinstance(module, gpytorch.Module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            constraint = getattr(module, f"{name}_constraint", None)
            if constraint is not None and parameter.requires_grad:
                value = _moved(constraint.transform(parameter), constraint, generator)
                parameter.copy_(constraint.inverse_transform(value))


def _moved(
    value: Tensor,
    constraint: gpytorch.constraints.Interval,
    generator: torch.Generator,
) -> Tensor:
    lower = constraint.lower_bound.to(value)
    upper = constraint.upper_bound.to(value)
    if bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        share = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(
            value
        )
        # Not onto the bounds themselves, where the gradient is zero.
        return lower + (upper - lower) * (0.05 + 0.9 * share)
    if bool((lower >= 0).all()):
        factor = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return lower + (value - lower) * (_SPREAD * factor).exp().to(value)
    return value
