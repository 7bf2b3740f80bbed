"""Models, networks and data of the golden tests; they depend on no other helper.

Hashes of these classes are in stored files: names and attributes must stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import IndexKernel, Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor, nn


def standard(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def points(n: int, d: int = 2, seed: int = 0) -> Tensor:
    """Points (n, d), uniform in [-1.5, 1.5]."""
    generator = torch.Generator().manual_seed(100 + seed)
    return 3.0 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1.5


def waves(n: int) -> Tensor:
    """A fixed vector (n,): 1, cos 1, cos 2, ..."""
    return torch.arange(n, dtype=torch.float64).cos()


def targets(x: Tensor, seed: int = 0) -> Tensor:
    """Noisy values (n,) of a smooth function."""
    smooth = torch.sin(2.0 * x[:, 0]) + 0.5 * x.sum(1) + 0.3
    return smooth + 0.2 * standard((len(x),), 200 + seed)


def bits(n: int, d: int = 24, seed: int = 0) -> Tensor:
    """Fingerprints (n, d) of counts 0, 1 and 2."""
    generator = torch.Generator().manual_seed(300 + seed)
    dense = torch.randint(0, 3, (n, d), generator=generator)
    return (dense * (torch.rand(n, d, generator=generator) < 0.5)).double()


def network_of(widths: Sequence[int], seed: int = 0) -> nn.Sequential:
    """A network of tanh layers in float64, in evaluation mode."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    network = nn.Sequential(*layers[:-1]).double()
    for i, parameter in enumerate(network.parameters()):
        parameter.data = 0.7 * standard(parameter.shape, 400 + 10 * seed + i)
    return network.eval()


class GP(gpytorch.models.ExactGP):
    """A constant mean and one kernel."""

    def __init__(
        self, x: Tensor, y: Tensor, kernel: Kernel, *, noise: float = 0.1
    ) -> None:
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.kernel = kernel
        self.to(x.dtype)
        self.likelihood.noise = noise
        self.mean_module.constant = 0.2

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at x."""
        return MultivariateNormal(self.mean_module(x), self.kernel(x))


class FixedNoiseGP(gpytorch.models.ExactGP):
    """A noise variance for every row."""

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel, noise: Tensor) -> None:
        super().__init__(x, y, FixedNoiseGaussianLikelihood(noise))
        self.mean_module = gpytorch.means.LinearMean(x.shape[1])
        self.kernel = kernel
        self.to(x.dtype)
        uneven(self)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at x."""
        return MultivariateNormal(self.mean_module(x), self.kernel(x))


class NetworkGP(gpytorch.models.ExactGP):
    """A network in front of a kernel."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = gpytorch.means.ZeroMean()
        self.network = network_of([x.shape[1], 3, 2], seed=2)
        self.kernel = ScaleKernel(MaternKernel(nu=2.5))
        self.to(x.dtype)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at x."""
        return MultivariateNormal(self.mean_module(x), self.kernel(self.network(x)))


class TaskGP(gpytorch.models.ExactGP):
    """Several correlated outputs."""

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel) -> None:
        tasks = y.shape[1]
        super().__init__(x, y, MultitaskGaussianLikelihood(tasks))
        mean = gpytorch.means.ConstantMean()
        self.mean_module = gpytorch.means.MultitaskMean(mean, tasks)
        self.kernel = kernel
        self.to(x.dtype)
        uneven(self)

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        """The prior at x."""
        return MultitaskMultivariateNormal(self.mean_module(x), self.kernel(x))


class HadamardGP(gpytorch.models.ExactGP):
    """A function of points and task numbers: a product with an index kernel."""

    def __init__(self, x: Tensor, i: Tensor, y: Tensor) -> None:
        super().__init__((x, i), y, GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = MaternKernel(nu=2.5)
        self.task_covar_module = IndexKernel(num_tasks=2, rank=1)
        self.to(x.dtype)
        uneven(self)

    def forward(self, x: Tensor, i: Tensor) -> MultivariateNormal:
        """The prior at points x and tasks i."""
        covariance = self.covar_module(x).mul(self.task_covar_module(i))
        return MultivariateNormal(self.mean_module(x), covariance)


def uneven(module: Any) -> Any:
    """The module with its parameters moved away from their defaults, each by a wave."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            shift = 0.3 * waves(parameter.numel() + i)[i:] + 0.1
            parameter.copy_(shift.reshape(parameter.shape))
    return module


def shifted(module: Any) -> Any:
    """The module with all parameters a little larger, as after a fit of another run."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05)
    return module
