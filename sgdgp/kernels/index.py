"""Tile form of GPyTorch's index kernel: a table of covariances between tasks.

k(t, t') = B[t, t'] is written as an inner product of B[t, :] and the t'-th unit
vector, so that the derivative with respect to B is that of an inner product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.kernels import IndexKernel
from torch import Tensor
from torch.nn.functional import one_hot

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest
from sgdgp.features.tasks import IndexFeatures
from sgdgp.kernels.dot_product import InnerProductTile
from sgdgp.kernels.registry import Forms, register_kernel, select


@dataclass(frozen=True)
class IndexTile(InnerProductTile):
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

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return self.covariance.to(x).diagonal()[self.tasks(x)]

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        # Rows and columns get the same: the symmetric root of B.
        return (_root(self.covariance.double()).to(x)[self.tasks(x)].contiguous(),)


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = B."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _tile(kernel: IndexKernel, dims: Tensor | None) -> IndexTile:
    # B as the kernel's own forward takes it, whatever a subclass makes it of.
    return IndexTile(1.0, dims, kernel._eval_covar_matrix())


def _features(kernel: IndexKernel, request: FeatureRequest) -> FeatureMap:
    covariance = request.parameter(kernel._eval_covar_matrix())
    return IndexFeatures(_root(covariance).to(request.like))


register_kernel(IndexKernel, tile=_tile, features=_features, same_forward=True)
