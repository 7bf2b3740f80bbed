"""The GPyTorch model behind the regressor, and what sample weights mean in it.

A weight w makes an observation count w times: its likelihood to the power w. Up to a
constant that is one observation of noise variance sigma^2 / w, times a function of
sigma^2 alone,

    N(y | f, sigma^2)^w = N(y | f, sigma^2 / w) (2 pi sigma^2)^(-(w - 1) / 2) / sqrt(w),

so learning needs a noise model that divides by the weight, and a factor that GPyTorch
knows as a prior on the noise.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from gpytorch.likelihoods.noise_models import HomoskedasticNoise
from gpytorch.means import ConstantMean, Mean
from gpytorch.models import ExactGP
from gpytorch.priors import Prior
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from sgdgp.sklearn.kernels import make_kernel
from sgdgp.sklearn.scales import mean_and_spread

NOISE_BOUND = 1e-4
"""Smallest noise variance that is learned, over the variance of the targets."""


class GPModel(ExactGP):
    """Mean plus kernel; the data are handed to whoever fits or conditions it.

    Args:
        mean: Mean function.
        kernel: Covariance function.
        likelihood: Gaussian likelihood.
    """

    def __init__(self, mean: Mean, kernel: Kernel, likelihood: Likelihood) -> None:
        super().__init__(None, None, likelihood)
        self.mean_module = mean
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class WeightedGPModel(GPModel):
    """The same of inputs (n, d + 1) whose last column is the weight of the row."""

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x (n, d + 1)."""
        return super().forward(x[..., :-1])


class WeightedNoise(HomoskedasticNoise):
    """Noise variance sigma^2 / w, w the last column of the inputs."""

    def forward(self, *params: Any, **_: Any) -> DiagLinearOperator:
        """The noise at the inputs ``params``."""
        x = params[0] if torch.is_tensor(params[0]) else params[0][0]
        return DiagLinearOperator(self.noise / x[..., -1])


class WeightedLikelihood(GaussianLikelihood):
    """Gaussian likelihood with ``WeightedNoise``.

    Args:
        plain: Likelihood whose parameter it shares.
    """

    def __init__(self, plain: GaussianLikelihood) -> None:
        super().__init__()
        homoscedastic: HomoskedasticNoise = plain.noise_covar
        constraint = homoscedastic.raw_noise_constraint
        self.noise_covar = WeightedNoise(noise_constraint=constraint)
        self.noise_covar.raw_noise = homoscedastic.raw_noise


class CountedObservations(Prior):
    """(2 pi sigma^2)^(-c / 2): what c more observations without a residual add.

    Args:
        count: c, sum(w) minus the number of rows, times the number of outputs.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, count: float) -> None:
        torch.nn.Module.__init__(self)
        super().__init__(validate_args=False)
        self.count = count

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the factor at the noise variance x."""
        return -0.5 * self.count * (2.0 * math.pi * x).log()


def starting_model(
    kernel: Kernel | str,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"] | Float[Tensor, "n t"],
    weights: Float[Tensor, " n"] | None,
    noise: float,
) -> GPModel:
    """A model to learn, which starts where the data are.

    Args:
        kernel: A GPyTorch kernel, which is copied, or a name.
        x: Inputs (n, d); their spread is where named kernels start.
        y: Targets (n,) or (n, t).
        weights: How often each row counts (n,). Default: once.
        noise: Noise variance to start from.
    """
    _, spread = mean_and_spread(x, weights)
    centre, scale = mean_and_spread(y.reshape(len(x), -1), weights)
    variance = float(scale.square().mean())
    mean = ConstantMean().to(x)
    mean.initialize(constant=float(centre.mean()))
    # A smaller start is an explicit wish for little noise.
    bound = GreaterThan(min(NOISE_BOUND * variance, 0.1 * noise))
    likelihood = GaussianLikelihood(noise_constraint=bound).to(x)
    likelihood.noise = noise
    return GPModel(mean, make_kernel(kernel, spread, variance), likelihood)


def weighted_model(
    model: GPModel, x: Float[Tensor, "n d"], weights: Float[Tensor, " n"], outputs: int
) -> tuple[WeightedGPModel, Float[Tensor, "n d+1"]]:
    """The model as it is learned from weighted rows, sharing its parameters.

    Args:
        model: Mean, kernel and the likelihood of a ``starting_model``.
        x: Inputs (n, d).
        weights: Positive weights of the rows (n,).
        outputs: Number of outputs that share the noise.

    Returns:
        The model, and its inputs (n, d + 1).
    """
    likelihood = WeightedLikelihood(model.likelihood)
    learned = WeightedGPModel(model.mean_module, model.covar_module, likelihood)
    # With the model: GPyTorch counts the priors of a likelihood twice, once for the
    # objective's likelihood and once for its model's.
    count = outputs * (float(weights.sum()) - len(weights))
    learned.register_prior("counted", CountedObservations(count), _noise_of)
    return learned, torch.cat([x, weights.unsqueeze(1)], dim=1)


def conditioned_model(model: GPModel, weights: Float[Tensor, " n"] | None) -> GPModel:
    """The learned model as it is conditioned on rows with these weights."""
    if weights is None:
        return model
    noise = model.likelihood.noise.detach() / weights
    likelihood = FixedNoiseGaussianLikelihood(torch.ones_like(noise))
    # Past the constructor, which would round small variances up.
    likelihood.noise_covar.noise = noise
    return GPModel(model.mean_module, model.covar_module, likelihood)


def _noise_of(model: GPModel) -> Tensor:
    return model.likelihood.noise
