"""The log marginal likelihood of a model, for comparing models."""

from __future__ import annotations

import math

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import generator_of, seed_of
from sgdgp.gpytorch_adapter import Inputs, prior_at, training_problems
from sgdgp.gpytorch_adapter.data import training_data
from sgdgp.training.log_determinant import (
    LogLikelihoodEstimate,
    estimate_log_likelihood,
)


def log_marginal_likelihood(
    model: ExactGP,
    x: Inputs | None = None,
    y: Tensor | None = None,
    *,
    num_probes: int = 8,
    seed: int | torch.Generator = 0,
) -> LogLikelihoodEstimate:
    """Estimate log p(y | X) of a model, without its parameters' priors.

    Args:
        model: A GPyTorch model with a Gaussian likelihood.
        x: Training inputs (n, d). Default: the model's.
        y: Training targets (n,) or (n, t). Default: the model's.
        num_probes: Lanczos runs; the standard error falls with their root.
        seed: Seed or generator of the probes.

    Returns:
        The estimate, in the units of the model's targets, not divided by n. Exact up
        to 1,000 rows.

    Raises:
        UnsupportedModelError: The prior is not a function of two points.
        ValueError: Data or settings do not fit; says which and why.
    """
    check_count("num_probes", num_probes, 2)
    x, y = training_data(model, x, y)
    number = seed_of(generator_of(seed))
    return total_log_likelihood(model, x, y, num_probes=num_probes, seed=number)


@torch.no_grad()
def total_log_likelihood(
    model: ExactGP, x: Inputs, y: Tensor, *, num_probes: int = 8, seed: int = 0
) -> LogLikelihoodEstimate:
    """The estimate for checked data, y in the model's units.

    Args:
        model: The model.
        x: Training inputs.
        y: Targets in the model's units.
        num_probes: Lanczos runs.
        seed: Seed of the probes.
    """
    found = [
        estimate_log_likelihood(problem, num_probes=num_probes, seed=seed + i)
        for i, problem in enumerate(
            training_problems(prior_at(model, x), model.likelihood, x, y)
        )
    ]
    return LogLikelihoodEstimate(
        value=sum(one.value for one in found),
        standard_error=math.sqrt(sum(one.standard_error**2 for one in found)),
        passes=sum(one.passes for one in found),
    )
