"""GPyTorch models, their own exact posteriors, and closed forms to test against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    ConstantKernel,
    IndexKernel,
    Kernel,
    LCMKernel,
    LinearKernel,
    MaternKernel,
    MultitaskKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import (
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.models import ExactGP
from torch import Tensor


class GP(ExactGP):
    """An exact GP whose covariance is ``covariance(self, x)``, or ``kernel(x)``."""

    def __init__(
        self,
        x: Tensor | None,
        y: Tensor | None,
        kernel: Kernel,
        likelihood: Likelihood | None = None,
        mean: gpytorch.means.Mean | None = None,
        covariance: Callable[[GP, Tensor], Any] | None = None,
        **modules: torch.nn.Module,
    ) -> None:
        super().__init__(x, y, likelihood or GaussianLikelihood())
        self.mean_module = mean or gpytorch.means.ConstantMean()
        self.kernel = kernel
        self.covariance = covariance
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> MultivariateNormal:
        given = self.covariance
        covariance = self.kernel(x) if given is None else given(self, x)
        return MultivariateNormal(self.mean_module(x), covariance)


def toy_data(
    n: int, d: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Inputs (n, d) in [-1.5, 1.5] and targets (n,) of a smooth function."""
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1.5
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    y = torch.sin(2.0 * x[:, 0]) + 0.5 * x.sum(1) + 0.3 + 0.2 * noise
    return x.to(dtype), y.to(dtype)


def gp(
    kernel: Kernel | None = None,
    n: int = 30,
    *,
    d: int = 2,
    noise: float = 0.1,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> GP:
    """A GP on toy data with noise variance ``noise`` and constant mean 0.2."""
    x, y = toy_data(n, d, dtype=dtype)
    model = GP(x, y, kernel or RBFKernel(), **settings).to(dtype)
    if isinstance(model.likelihood, GaussianLikelihood):
        model.likelihood.noise = noise
    if isinstance(model.mean_module, gpytorch.means.ConstantMean):
        model.mean_module.constant = 0.2
    return model


class MultitaskGP(ExactGP):
    """Three correlated outputs, each with a mean and a noise of its own."""

    def __init__(
        self,
        x: Tensor | None,
        y: Tensor | None,
        kernel: Kernel,
        likelihood: Likelihood | None = None,
        covariance: Callable[[MultitaskGP, Tensor], Any] | None = None,
        **modules: torch.nn.Module,
    ) -> None:
        super().__init__(x, y, likelihood or MultitaskGaussianLikelihood(3))
        means = [
            gpytorch.means.ConstantMean(),
            gpytorch.means.LinearMean(2),
            gpytorch.means.ZeroMean(),
        ]
        self.mean_module = gpytorch.means.MultitaskMean(means, 3)
        self.kernel = kernel
        self.covariance = covariance
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        given = self.covariance
        covariance = self.kernel(x) if given is None else given(self, x)
        return MultitaskMultivariateNormal(self.mean_module(x), covariance)


class HadamardGP(ExactGP):
    """A function of points and task indices, as in GPyTorch's tutorial."""

    def __init__(
        self, x: Tensor, i: Tensor, y: Tensor, likelihood: Likelihood | None = None
    ) -> None:
        super().__init__((x, i), y, likelihood or GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = MaternKernel(nu=2.5)
        self.task_covar_module = IndexKernel(num_tasks=2, rank=1)

    def forward(self, x: Tensor, i: Tensor) -> MultivariateNormal:
        covar_x, covar_i = self.covar_module(x), self.task_covar_module(i)
        return MultivariateNormal(self.mean_module(x), covar_x.mul(covar_i))


def uneven(module: Any, seed: int = 0) -> Any:
    """The module in float64, its parameters moved away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        shift = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(shift - 0.3)
    return module


def multitask_data(
    n: int = 24, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Inputs (n, 2) and three targets of them (n, 3)."""
    x, y = toy_data(n, seed=seed, dtype=dtype)
    return x, torch.stack([y, y.square() - 0.5, 0.4 - y], dim=1)


def multitask_gp(kernel: Kernel | None = None, n: int = 24, **settings: Any) -> Any:
    """A multitask GP on such data, with uneven parameters."""
    x, y = multitask_data(n)
    kernel = kernel or MultitaskKernel(RBFKernel(ard_num_dims=2), 3, rank=2)
    return uneven(MultitaskGP(x, y, kernel, **settings))


def hadamard_gp(n: int = 24, likelihood: Likelihood | None = None) -> Any:
    """A Hadamard multitask GP, with uneven parameters."""
    x, y = toy_data(n)
    i = (torch.arange(n) % 2).unsqueeze(1)
    return uneven(HadamardGP(x, i, y + i.squeeze(1), likelihood))


MULTITASK_KERNELS: dict[str, Callable[[], Kernel]] = {
    "rank_1": lambda: MultitaskKernel(RBFKernel(ard_num_dims=2), 3),
    "rank_3": lambda: MultitaskKernel(MaternKernel(1.5), 3, rank=3),
    "scaled": lambda: ScaleKernel(MultitaskKernel(ScaleKernel(RBFKernel()), 3)),
    "sum_inside": lambda: MultitaskKernel(
        RBFKernel(active_dims=[1]) + MaternKernel(active_dims=[0]), 3
    ),
    "active_dims": lambda: MultitaskKernel(RBFKernel(), 3, active_dims=[1]),
    # GPyTorch calls the forward of a data kernel, past its active dims.
    "ignored_active_dims": lambda: MultitaskKernel(RBFKernel(active_dims=[1]), 3),
    "coregionalisation": lambda: LCMKernel([RBFKernel(), MaternKernel(0.5)], 3),
    "sum": lambda: (
        MultitaskKernel(RBFKernel(), 3, active_dims=[1])
        + ScaleKernel(MultitaskKernel(MaternKernel(), 3))
    ),
    "product": lambda: (
        MultitaskKernel(RBFKernel(), 3)
        * MultitaskKernel(MaternKernel(), 3, active_dims=[0])
    ),
}
"""Kernels of two inputs with three outputs."""


def own_posterior(model: ExactGP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance at x by GPyTorch's exact inference, on a copy."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        posterior = model(x)
        return posterior.mean, posterior.covariance_matrix


def closed_form(
    kernel: Kernel, x: Tensor, y: Tensor, at: Tensor, *, noise: float, mean: float
) -> tuple[Tensor, Tensor]:
    """Posterior mean (m,) and covariance (m, m) from the textbook, by dense solves."""
    with torch.no_grad():
        prior = kernel(torch.cat([x, at])).to_dense()
    n = len(x)
    system = prior[:n, :n] + noise * torch.eye(n, dtype=x.dtype)
    gain = torch.linalg.solve(system, prior[:n, n:]).T
    return mean + gain @ (y - mean), prior[n:, n:] - gain @ prior[:n, n:]


def _matern(nu: float) -> Kernel:
    kernel = MaternKernel(nu=nu, ard_num_dims=2)
    kernel.lengthscale = torch.tensor([[0.7, 1.3]])
    return kernel


def _ard_rbf(dim: int = 2, **settings: Any) -> Kernel:
    kernel = RBFKernel(ard_num_dims=dim, **settings)
    kernel.lengthscale = torch.linspace(0.6, 1.4, dim)
    return kernel


def _rational_quadratic() -> Kernel:
    kernel = RQKernel()
    kernel.alpha = 1.7
    return kernel


def _periodic(**settings: Any) -> Kernel:
    kernel = PeriodicKernel(**settings)
    kernel.period_length = 2.2
    kernel.lengthscale = 1.1
    return kernel


def _linear() -> Kernel:
    kernel = LinearKernel()
    kernel.variance = 0.6
    return kernel


def _polynomial() -> Kernel:
    kernel = PolynomialKernel(power=2)
    kernel.offset = 0.8
    return kernel


def _scale(kernel: Kernel, outputscale: float = 1.8) -> Kernel:
    scaled = ScaleKernel(kernel)
    scaled.outputscale = outputscale
    return scaled


FEATURE_KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf": RBFKernel,
    "rbf_ard": _ard_rbf,
    "matern_12": lambda: _matern(0.5),
    "matern_32": lambda: _matern(1.5),
    "matern_52": lambda: _matern(2.5),
    "rational_quadratic": _rational_quadratic,
    "periodic": _periodic,
    "linear": _linear,
    "constant": ConstantKernel,
    "polynomial": _polynomial,
    "scale": lambda: _scale(_matern(1.5)),
    "sum": lambda: _scale(_matern(2.5), 0.5) + _linear(),
    "product": lambda: _ard_rbf() * _polynomial(),
    "active_dims": lambda: (
        _scale(_ard_rbf(1, active_dims=[1])) + _periodic(active_dims=[0])
    ),
}
"""Every kernel of two inputs that has random features."""
