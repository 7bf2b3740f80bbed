"""The model of a Thompson sampling run where none is given, and how models learn."""

from __future__ import annotations

import math

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import derived_generator
from sgdgp.training.fit import fit

_ROWS = 1000
"""Rows that parameters are learned from; so many have exact gradients."""

_SMALLEST_NOISE = 1e-6
"""Noise variance over the variance of the targets, at least."""


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
        spread = (x.amax(0) - x.amin(0)).clamp_min(1e-3)
        self.mean_module.initialize(constant=y.mean())
        self.covar_module.outputscale = variance
        self.covar_module.base_kernel.lengthscale = (
            0.25 * math.sqrt(x.shape[1]) * spread
        )
        self.likelihood.noise = 1e-2 * variance

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at x."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def learned(
    model: ExactGP, x: Float[Tensor, "n d"], y: Float[Tensor, " n"], seed: int
) -> None:
    """Learn a model's parameters in place, from at most 1,000 of the data."""
    if len(x) > _ROWS:
        generator = derived_generator(seed, "learned from", len(x))
        rows = torch.randperm(len(x), generator=generator)[:_ROWS].to(x.device)
        x, y = x[rows], y[rows]
    fit(model, x, y, seed=seed, progress=False)
