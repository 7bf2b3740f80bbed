"""Kernels with uneven parameters, and points, that the tests of this room share."""

from __future__ import annotations

import math
from typing import Any

import torch
from botorch.models.kernels.positive_index import PositiveIndexKernel
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    IndexKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)
from torch import Tensor

from sgdgp.features import FeatureMap, random_features
from sgdgp.gpytorch_adapter.multitask import on_columns
from tests.models import uneven


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


def linear() -> Kernel:
    kernel = LinearKernel()
    kernel.variance = 0.6
    return kernel


def linear_ard() -> Kernel:
    kernel = LinearKernel(ard_num_dims=3)
    kernel.variance = torch.tensor([[0.3, 1.7, 0.9]])
    return kernel


def constant() -> Kernel:
    kernel = ConstantKernel()
    kernel.constant = torch.tensor(1.8)
    return kernel


def polynomial(power: int) -> Kernel:
    kernel = PolynomialKernel(power)
    kernel.offset = 0.7
    return kernel


EXACT = {
    "linear": linear,
    "linear with ARD": linear_ard,
    "constant": constant,
    "polynomial 0": lambda: polynomial(0),
    "polynomial 1": lambda: polynomial(1),
    "polynomial 2": lambda: polynomial(2),
    "polynomial 5": lambda: polynomial(5),
}


def scaled(kernel: Kernel, value: float, **settings: Any) -> Kernel:
    outer = ScaleKernel(kernel, **settings)
    outer.outputscale = value
    return outer


def restricted(kernel: Kernel, dims: list[int]) -> Kernel:
    kernel.register_buffer("active_dims", torch.tensor(dims))
    return kernel


COMPOSITES = {
    "scale": lambda: scaled(rbf(3), 2.5),
    "scale of scale": lambda: scaled(scaled(rbf(3), 0.5), 3.0),
    "active dims": lambda: restricted(matern(1.5, 2), [2, 0]),
    "scale of active dims": lambda: scaled(restricted(rbf(2), [2, 0]), 1.5),
    "scale with active dims": lambda: scaled(rbf(2), 1.5, active_dims=(2, 0)),
    "scale and base with other active dims": lambda: restricted(
        scaled(restricted(rbf(2), [2, 0]), 1.5), [0, 1]
    ),
    "outer and inner active dims": lambda: restricted(
        AdditiveKernel(restricted(rbf(1), [1]), restricted(LinearKernel(), [0])),
        [2, 0],
    ),
    "sum": lambda: scaled(rbf(3), 0.8) + scaled(matern(0.5, 3), 0.5) + LinearKernel(),
    "scale of sum": lambda: scaled(rbf(3) + periodic(3), 0.4),
    "stationary product": lambda: rbf(3) * periodic(3),
    "product over dimensions": lambda: (
        restricted(rbf(1), [0]) * restricted(matern(2.5, 2), [2, 1])
    ),
    "product that leaves a dimension out": lambda: (
        restricted(rbf(1), [2]) * restricted(periodic(1), [0])
    ),
    "product of scales": lambda: scaled(rbf(3), 2.0) * scaled(matern(1.5, 3), 0.3),
    "linear times stationary": lambda: LinearKernel() * rbf(3),
    "linear times two stationary": lambda: LinearKernel() * rbf(3) * periodic(3),
    "stationary times polynomial": lambda: rbf(3) * scaled(PolynomialKernel(2), 0.1),
    "two exact and one stationary": lambda: (
        restricted(LinearKernel(), [1]) * rbf(3) * PolynomialKernel(1)
    ),
    "constant times stationary": lambda: ConstantKernel() * rbf(3),
    "product of sums": lambda: (
        AdditiveKernel(scaled(rbf(3), 0.5), LinearKernel())
        * AdditiveKernel(matern(2.5, 3), ConstantKernel())
    ),
    "exact sum times stationary": lambda: (
        AdditiveKernel(LinearKernel(), ConstantKernel()) * rbf(3)
    ),
}


TABLES = {
    "rank 1": lambda: uneven(IndexKernel(4, rank=1)),
    "rank 4": lambda: uneven(IndexKernel(4, rank=4)),
    "scaled": lambda: uneven(ScaleKernel(IndexKernel(4, rank=2))),
    "positive": lambda: PositiveIndexKernel(4, rank=2).double(),
}


def products_with_tables() -> dict[str, Kernel]:
    """Kernels of two continuous columns and a task in the third."""
    data = rbf(2)
    data.active_dims = torch.tensor([0, 1])
    task = uneven(IndexKernel(4, rank=2, active_dims=[2]))
    other = uneven(IndexKernel(4, rank=1, active_dims=[2]))
    slope = LinearKernel(active_dims=[0])
    inner = rbf(1) * IndexKernel(4, active_dims=[0])
    inner.kernels[0].active_dims = torch.tensor([1])
    return {
        "stationary": data * task,
        "first": task * data,
        "scaled": ScaleKernel(task) * ScaleKernel(data),
        "two tables": task * data * other,
        "tables alone": task * other,
        "sum": (data + slope) * task,
        "three": slope * task * data,
        "nested": ScaleKernel(on_columns(inner, torch.tensor([2, 0]))) + data,
    }


PRODUCTS_WITH_TABLES = tuple(products_with_tables())


def tasks(n: int, seed: int = 0) -> Tensor:
    """Tasks 0 to 3 (n, 1) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, 1), generator=generator).double()


def points(n: int, dim: int, seed: int = 1) -> Tensor:
    """Standard normal inputs (n, dim) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def dense(kernel: Kernel, x: Tensor, z: Tensor | None = None) -> Tensor:
    """The closed-form kernel matrix in float64."""
    with torch.no_grad():
        return kernel.double()(x, x if z is None else z).to_dense().detach()


def features(
    kernel: Kernel,
    dim: int = 3,
    num_features: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> FeatureMap:
    """A map of the kernel, whose parameters become float64."""
    return random_features(
        kernel.double(),
        dim=dim,
        num_features=num_features,
        generator=torch.Generator().manual_seed(seed),
        dtype=dtype,
    )
