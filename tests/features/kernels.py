"""Kernels with uneven parameters that the tests of this room share."""

from __future__ import annotations

import math

import torch
from gpytorch.kernels import (
    Kernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    SpectralMixtureKernel,
)
from torch import Tensor


def lengthscales(dim: int) -> Tensor:
    """(1, dim), from 0.8 to 2 and longer in more dimensions (kernels stay visible)."""
    return torch.linspace(0.8, 2.0, dim).reshape(1, -1) * math.sqrt(dim)


def ard(kernel: Kernel, dim: int) -> Kernel:
    kernel.lengthscale = lengthscales(dim)
    return kernel


def rbf(dim: int) -> Kernel:
    return ard(RBFKernel(ard_num_dims=dim), dim)


def matern(nu: float, dim: int) -> Kernel:
    return ard(MaternKernel(nu=nu, ard_num_dims=dim), dim)


def rational_quadratic(dim: int) -> Kernel:
    kernel = ard(RQKernel(ard_num_dims=dim), dim)
    kernel.alpha = 0.7
    return kernel


def periodic(dim: int) -> Kernel:
    kernel = ard(PeriodicKernel(ard_num_dims=dim), dim)
    kernel.period_length = torch.linspace(1.5, 3.5, dim).reshape(1, -1)
    return kernel


def spectral_mixture(dim: int) -> Kernel:
    kernel = SpectralMixtureKernel(num_mixtures=2, ard_num_dims=dim)
    kernel.mixture_weights = torch.tensor([0.7, 0.4])
    kernel.mixture_means = torch.stack(
        [torch.linspace(0.02, 0.08, dim), torch.linspace(0.15, 0.05, dim)]
    )[:, None, :]
    kernel.mixture_scales = torch.stack(
        [torch.linspace(0.05, 0.1, dim), torch.linspace(0.12, 0.03, dim)]
    )[:, None, :]
    return kernel


STATIONARY = {
    "rbf": rbf,
    "matern 1/2": lambda dim: matern(0.5, dim),
    "matern 3/2": lambda dim: matern(1.5, dim),
    "matern 5/2": lambda dim: matern(2.5, dim),
    "rational quadratic": rational_quadratic,
    "periodic": periodic,
    "spectral mixture": spectral_mixture,
}


def points(n: int, dim: int, seed: int = 1) -> Tensor:
    """Standard normal inputs (n, dim) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def dense(kernel: Kernel, x: Tensor, z: Tensor | None = None) -> Tensor:
    """The closed-form kernel matrix in float64."""
    with torch.no_grad():
        return kernel.double()(x, x if z is None else z).to_dense().detach()
