"""Who multiplies: this package, what it was, KeOps, GPyTorch, scikit-learn.

Each is prepared once and then multiplies some rows of K(X, X), all of X, with V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import gpytorch
import numpy as np
import torch
from gpytorch.kernels import MaternKernel, RBFKernel
from torch import Tensor

from benchmarks.peers.before import Before
from sgdgp.kernels.distance import StationaryTile
from sgdgp.kernels.registry import tile_kernel
from sgdgp.operators import TiledOperator

Product = Callable[[], Tensor]

_BLOCK = 1024
"""Rows that GPyTorch and scikit-learn evaluate at a time: 80 MB at 20,000 points."""


@dataclass(frozen=True)
class Case:
    """A kernel over n points in the unit cube, and what it is multiplied with."""

    kernel: str
    x: Tensor
    v: Tensor

    @property
    def lengthscale(self) -> float:
        """A fifth of a typical distance at few dimensions, as it grows with them."""
        return 0.4 * math.sqrt(self.x.shape[1])

    def gpytorch_kernel(self) -> gpytorch.kernels.Kernel:
        """The kernel with one lengthscale for every dimension."""
        d = self.x.shape[1]
        kernel: gpytorch.kernels.Kernel = (
            RBFKernel(ard_num_dims=d)
            if self.kernel == "rbf"
            else MaternKernel(1.5, ard_num_dims=d)
        )
        kernel.lengthscale = torch.full((1, d), self.lengthscale)
        return kernel.requires_grad_(False)


def sgdgp(case: Case, rows: int) -> Product:
    """All of K, as its solvers ask for it."""
    operator = TiledOperator(case.gpytorch_kernel(), case.x)
    return lambda: operator.matmul(case.v)


def before(case: Case, rows: int) -> Product:
    tile = tile_kernel(case.gpytorch_kernel())
    assert isinstance(tile, StationaryTile)
    operator = Before(tile, case.x)
    return lambda: operator.product(slice(0, rows), case.v)


def gpytorch_rows(case: Case, rows: int) -> Product:
    kernel, x, v = case.gpytorch_kernel(), case.x, case.v

    def product() -> Tensor:
        with gpytorch.settings.lazily_evaluate_kernels(False), torch.no_grad():
            blocks = x[:rows].split(_BLOCK)
            return torch.cat([kernel(block, x).to_dense() @ v for block in blocks])

    return product


def scikit_learn(case: Case, rows: int) -> Product:
    from sklearn.gaussian_process.kernels import RBF, Matern

    kernel = (RBF if case.kernel == "rbf" else Matern)(case.lengthscale)
    x, v = case.x.numpy(), case.v.numpy()

    def product() -> Tensor:
        blocks = np.split(x[:rows], range(_BLOCK, rows, _BLOCK))
        return torch.from_numpy(np.concatenate([kernel(b, x) @ v for b in blocks]))

    return product


def keops(case: Case, rows: int) -> Product:
    from pykeops.torch import Vi, Vj

    z = case.x / case.lengthscale
    d2 = Vi(z[:rows].contiguous()).sqdist(Vj(z))
    if case.kernel == "rbf":
        entries = (-0.5 * d2).exp()
    else:
        s = (3.0 * d2).sqrt()
        entries = (1.0 + s) * (-s).exp()
    return lambda: (entries * Vj(case.v)).sum(dim=1)


RIVALS: dict[str, Callable[[Case, int], Product]] = {
    "sgdgp": sgdgp,
    "before": before,
    "gpytorch": gpytorch_rows,
    "sklearn": scikit_learn,
    "keops": keops,
}
