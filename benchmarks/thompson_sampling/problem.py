"""The benchmark's objective: a function drawn from the prior that is to be maximised.

Hyperparameters are known: every method has the objective's own kernel and noise. The
objective's random features are its own, those of the posterior's prior functions are
others (the papers share one set between them, which makes the model's prior functions
exactly as limited as the objective).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from benchmarks.thompson_sampling.request import Request
from sgdgp.core.seeds import derived_generator
from sgdgp.features import PriorDraws, draw_prior


class KnownGP(ExactGP):
    """Zero mean, Matern-3/2 of amplitude 1, one lengthscale."""

    def __init__(self, lengthscale: float, noise: float, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, GaussianLikelihood(noise_constraint=GreaterThan(1e-12)))
        self.mean_module = ZeroMean()
        self.covar_module = ScaleKernel(MaternKernel(nu=1.5))
        self.to(x)
        self.covar_module.base_kernel.lengthscale = lengthscale
        self.covar_module.outputscale = 1.0
        self.likelihood.noise = noise
        self.requires_grad_(requires_grad=False)

    def forward(self, x: Float[Tensor, "n d"]) -> MultivariateNormal:
        """The prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@dataclass(frozen=True)
class Problem:
    """An objective on the unit cube, and what is known of it at the start.

    Attributes:
        objective: The function, without noise.
        x: Initial points (n, d).
        y: Noisy observations of them (n,).
        request: Its sizes and seed.
    """

    objective: PriorDraws
    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    request: Request

    @property
    def bounds(self) -> Float[Tensor, "2 d"]:
        """The unit cube."""
        return torch.stack([torch.zeros_like(self.x[0]), torch.ones_like(self.x[0])])

    def model(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> KnownGP:
        """The prior that the objective was drawn from, with data."""
        return KnownGP(self.request.lengthscale, self.request.noise_std**2, x, y)

    def values(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The objective without noise."""
        with torch.no_grad():
            return self.objective(x)[:, 0]

    def observed(self, x: Float[Tensor, "n d"], step: int) -> Float[Tensor, " n"]:
        """The objective with the noise of a step (0: of the initial points)."""
        noise = _normal(self.request, "noise", step, len(x)).to(x)
        return self.values(x) + self.request.noise_std * noise


def make_problem(request: Request) -> Problem:
    """The problem of a seed and lengthscale: the same for every method."""
    dtype = getattr(torch, request.dtype)
    x = uniform(request, "initial", 0, request.initial)
    empty = x.new_empty(0)
    model = KnownGP(request.lengthscale, 1.0, x[:0], empty)
    with torch.no_grad():
        objective = draw_prior(
            model.covar_module,
            1,
            dim=request.dim,
            num_features=request.objective_features,
            generator=stream(request, "objective"),
            dtype=dtype,
        )
    bare = Problem(objective, x, empty, request)
    return Problem(objective, x, bare.observed(x, 0), request)


def stream(request: Request, what: str, step: int = 0) -> torch.Generator:
    """Randomness of one purpose and step, the same for every method."""
    return derived_generator(request.seed, "thompson", request.lengthscale, what, step)


def uniform(request: Request, what: str, step: int, count: int) -> Float[Tensor, "n d"]:
    """Uniform points in the cube."""
    shape = (count, request.dim)
    # In float64 for both: the same points in either precision, but for rounding.
    x = torch.rand(shape, generator=stream(request, what, step), dtype=torch.float64)
    return x.to(getattr(torch, request.dtype))


def _normal(request: Request, what: str, step: int, count: int) -> Tensor:
    generator = stream(request, what, step)
    return torch.randn(count, generator=generator, dtype=torch.float64)
