"""Small systems with known answers, for the tests of the solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpytorch.kernels import (
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import Tensor

from sgdgp.operators import DenseOperator, KernelOperator, TiledOperator
from sgdgp.solvers import Solution, Solver

D = 3


def rbf(lengthscale: float = 1.0, **settings) -> Kernel:
    """A Gaussian kernel with a given lengthscale."""
    kernel = RBFKernel(**settings)
    kernel.lengthscale = lengthscale
    return kernel


def _with(kernel: Kernel, **values) -> Kernel:
    for name, value in values.items():
        setattr(kernel, name, value)
    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf": rbf,
    "matern12": lambda: MaternKernel(0.5),
    "matern32": lambda: MaternKernel(1.5),
    "matern52": lambda: MaternKernel(2.5),
    "rq": lambda: _with(RQKernel(), alpha=1.5),
    "periodic": lambda: _with(PeriodicKernel(), period_length=1.7),
    "linear": lambda: _with(LinearKernel(), variance=0.7),
    "constant": lambda: _with(ConstantKernel(), constant=torch.tensor([0.8])),
    "polynomial": lambda: _with(PolynomialKernel(power=2), offset=1.0),
    "scale": lambda: _with(ScaleKernel(MaternKernel(1.5)), outputscale=2.5),
    "sum": lambda: rbf() + MaternKernel(0.5),
    "product": lambda: MaternKernel(1.5) * rbf(2.0),
    "ard": lambda: _with(
        MaternKernel(2.5, ard_num_dims=D),
        lengthscale=torch.tensor([[0.5, 1.0, 2.0]]),
    ),
    "active_dims": lambda: (
        rbf(active_dims=(0,)) + MaternKernel(1.5, active_dims=(1, 2))
    ),
}
"""Every kernel that Step A names."""

OPERATORS = {"dense": DenseOperator, "tiled": TiledOperator}


@dataclass(frozen=True)
class Problem:
    """K over random points, noise variances and right-hand sides."""

    operator: KernelOperator
    noise: Tensor
    rhs: Tensor

    @property
    def matrix(self) -> Tensor:
        """K + Sigma in float64, of the entries that the operator has."""
        n = len(self.rhs)
        entries = self.operator.block(slice(0, n), slice(0, n)).double()
        return entries + torch.diag(self.noise.double().expand(n))

    @property
    def exact_matrix(self) -> Tensor:
        """K + Sigma with the kernel itself evaluated in float64."""
        n = len(self.rhs)
        everything = slice(0, n)
        entries = self.operator.to(torch.float64).block(everything, everything)
        return entries + torch.diag(self.noise.double().expand(n))

    @property
    def answer(self) -> Tensor:
        """The dense solution in float64."""
        return torch.linalg.solve(self.matrix, self.rhs.double())

    def residuals(self, weights: Tensor, matrix: Tensor | None = None) -> Tensor:
        """||b - (K + Sigma) v|| / ||b|| of every column, in float64."""
        rhs = self.rhs.double()
        matrix = self.matrix if matrix is None else matrix
        return (rhs - matrix @ weights.double()).norm(dim=0) / _norms(rhs)

    def errors(self, weights: Tensor) -> Tensor:
        """(v - v*)^T (K + Sigma) (v - v*) of every column, which descent makes less."""
        gap = weights.double() - self.answer
        return (gap * (self.matrix @ gap)).sum(0)

    def rounding(self, weights: Tensor) -> Tensor:
        """What rounding of one product in the data's dtype does to a residual (k,)."""
        size = self.matrix.abs() @ weights.double().abs()
        eps = torch.finfo(self.rhs.dtype).eps
        return 8 * eps * (1.0 + size.norm(dim=0) / _norms(self.rhs.double()))

    def solve(self, solver: Solver, **arguments) -> Solution:
        """Solve this system."""
        return solver.solve(self.operator, self.noise, self.rhs, **arguments)


def _norms(rhs: Tensor) -> Tensor:
    norms = rhs.norm(dim=0)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def problem(
    kernel: Kernel | str = "matern32",
    n: int = 100,
    *,
    k: int = 2,
    noise: float | Tensor = 0.05,
    operator: str = "dense",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A system over n Gaussian points, with k columns of Gaussian targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype)
    rhs = torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)
    if isinstance(kernel, str):
        kernel = KERNELS[kernel]()
    built = OPERATORS[operator](kernel.to(dtype), x)
    return Problem(built, torch.as_tensor(noise, dtype=dtype), rhs)


def relative_error(weights: Tensor, answer: Tensor) -> float:
    """Largest relative error of a column, ||v - v*|| / ||v*||."""
    return float(((weights.double() - answer).norm(dim=0) / answer.norm(dim=0)).max())
