"""A known function of one input, noisy observations with a gap, and a GP for them."""

from __future__ import annotations

from dataclasses import dataclass

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from jaxtyping import Bool, Float
from torch import Tensor

DOMAIN = (0.0, 16.0)
GAP = (9.2, 10.5)
NOISE_SCALE = 0.4
LENGTHSCALE = 0.5


def true_function(x: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
    """The function behind the data, at inputs (n, 1)."""
    t = x[:, 0]
    return torch.sin(1.3 * t) + 0.7 * torch.sin(3.1 * t + 1.0)


def in_gap(x: Float[Tensor, "n 1"]) -> Bool[Tensor, " n"]:
    """Which inputs lie where nothing was observed."""
    return (x[:, 0] > GAP[0]) & (x[:, 0] < GAP[1])


class DemoGP(gpytorch.models.ExactGP):
    """Zero mean and a scaled Matern-5/2 kernel: nothing but GPyTorch."""

    def __init__(
        self,
        x: Float[Tensor, "n 1"],
        y: Float[Tensor, " n"],
        likelihood: GaussianLikelihood,
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = ZeroMean()
        self.covar_module = ScaleKernel(MaternKernel(nu=2.5))

    def forward(self, x: Float[Tensor, "n 1"]) -> MultivariateNormal:
        """The prior at x (n, 1)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@dataclass(frozen=True)
class Problem:
    """Observations, the points to score at, and the model.

    Attributes:
        model: The GP over the observations, with hyperparameters set by hand.
        x: Inputs (n, 1), none of them in the gap.
        y: Noisy observations (n,).
        x_test: Evenly spaced inputs over the whole domain (m, 1).
        f_test: The true function there (m,).
        y_test: New noisy observations there (m,).
    """

    model: DemoGP
    x: Tensor
    y: Tensor
    x_test: Tensor
    f_test: Tensor
    y_test: Tensor


def make_problem(n: int, num_test: int = 500, seed: int = 0) -> Problem:
    """Draw n noisy observations outside the gap and set the model up.

    Args:
        n: Number of observations.
        num_test: Number of points to score at.
        seed: Seed of inputs and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = DOMAIN
    # Uniform over what is left of the domain: whatever reaches the gap jumps over it.
    x = low + (high - low - (GAP[1] - GAP[0])) * torch.rand(n, 1, generator=generator)
    x = torch.where(x > GAP[0], x + (GAP[1] - GAP[0]), x)
    y = true_function(x) + NOISE_SCALE * torch.randn(n, generator=generator)
    x_test = torch.linspace(low, high, num_test)[:, None]
    f_test = true_function(x_test)
    y_test = f_test + NOISE_SCALE * torch.randn(num_test, generator=generator)

    model = DemoGP(x, y, GaussianLikelihood())
    model.covar_module.outputscale = 1.0
    model.covar_module.base_kernel.lengthscale = LENGTHSCALE
    model.likelihood.noise = NOISE_SCALE**2
    return Problem(model, x, y, x_test, f_test, y_test)
