"""Tile form of GPyTorch's index kernel: a table of covariances between tasks.

k(t, t') = B[t, t'] is written as an inner product of B[t, :] and the t'-th unit
vector, so that the derivative with respect to B is that of an inner product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpytorch.kernels import IndexKernel
from torch import Tensor
from torch.nn.functional import one_hot

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest, register_features
from sgdgp.features.tasks import IndexFeatures
from sgdgp.kernels.gradient_terms import LiveInnerProduct
from sgdgp.kernels.keops_formulas import Lazy, keops_formula, keops_inputs
from sgdgp.kernels.registry import Forms, TileKernel, register_tile_kernel
from sgdgp.kernels.slopes import Identity
from sgdgp.kernels.stationary import select
from sgdgp.kernels.tile_gradients import LiveTile, register_tile_gradient


@dataclass(frozen=True)
class IndexTile(TileKernel):
    """B[t, t'].

    Attributes:
        dims: The one column of the inputs that holds tasks, or None if it is alone.
        covariance: B (T, T).
    """

    dims: Tensor | None
    covariance: Tensor

    def tasks(self, x: Tensor) -> Tensor:
        """Task of each point (n,).

        Raises:
            ValueError: There is more than one column, or a task that B has not.
        """
        chosen = select(x, self.dims)
        if chosen.shape[1] != 1:
            raise ValueError(
                f"IndexKernel: expected one column of tasks, found {chosen.shape[1]}"
            )
        tasks = chosen[:, 0].detach().long()
        count = len(self.covariance)
        if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
            raise ValueError(
                f"IndexKernel: expected tasks from 0 to {count - 1}, found "
                f"{int(tasks.min())} to {int(tasks.max())}"
            )
        return tasks

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return (self.covariance.to(x)[self.tasks(x)],)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return (one_hot(self.tasks(x), len(self.covariance)).to(x),)

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        torch.mm(left[0], right[0].T, out=out)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return self.covariance.to(x).diagonal()[self.tasks(x)]


def _covariance(kernel: IndexKernel) -> Tensor:
    """B with its graph, as the kernel's own forward takes it."""
    found: Tensor = kernel._eval_covar_matrix()
    return found


@register_tile_kernel(IndexKernel, same_forward=True)
def _(kernel: IndexKernel, dims: Tensor | None) -> TileKernel:
    return IndexTile(1.0, dims, _covariance(kernel).detach())


@register_tile_gradient(IndexKernel, same_forward=True)
def _(kernel: IndexKernel, dims: Tensor | None) -> LiveTile:
    return LiveInnerProduct(1.0, IndexTile(1.0, dims, _covariance(kernel)), Identity())


@keops_inputs.register
def _(tile: IndexTile, x: Tensor, origin: Tensor) -> Forms:
    # Rows and columns get the same: the symmetric root of B.
    values, vectors = torch.linalg.eigh(tile.covariance.double())
    root = vectors * values.clamp_min(0).sqrt()
    return (root.to(x)[tile.tasks(x)].contiguous(),)


@keops_formula.register
def _(tile: IndexTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    return (rows[0] * columns[0]).sum(-1)


@register_features(IndexKernel, reads={"forward"})
def index_features(kernel: IndexKernel, request: FeatureRequest) -> FeatureMap:
    """The symmetric root of the table, whatever a subclass makes it of."""
    covariance = request.parameter(kernel._eval_covar_matrix())
    values, vectors = torch.linalg.eigh(covariance)
    return IndexFeatures((vectors * values.clamp_min(0).sqrt()).to(request.like))
