"""Tile forms of kernels of the inner product: linear, polynomial, constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpytorch.kernels import ConstantKernel, LinearKernel, PolynomialKernel
from torch import Tensor

from sgdgp.kernels.registry import Forms, TileKernel, register_tile_kernel
from sgdgp.kernels.stationary import select


@dataclass(frozen=True)
class LinearTile(TileKernel):
    """sum_i v_i x_i x'_i.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        variance: v, (d,) or (1,).
    """

    dims: Tensor | None
    variance: Tensor

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return (select(x, self.dims) * self.variance.to(x),)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return (select(x, self.dims).contiguous(),)

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        torch.mm(left[0], right[0].T, out=out)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return (select(x, self.dims).square() * self.variance.to(x)).sum(1)


@dataclass(frozen=True)
class PolynomialTile(TileKernel):
    """(x . x' + c)^p.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        offset: c.
        power: p.
    """

    dims: Tensor | None
    offset: float | Tensor
    power: float

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        chosen = select(x, self.dims)
        return (torch.cat([chosen, x.new_ones(x.shape[0], 1) * self.offset], 1),)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return (torch.cat([select(x, self.dims), x.new_ones(x.shape[0], 1)], 1),)

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        torch.mm(left[0], right[0].T, out=out).pow_(self.power)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return (select(x, self.dims).square().sum(1) + self.offset).pow(self.power)


@dataclass(frozen=True)
class ConstantTile(TileKernel):
    """The same value for every pair of points; it is all in the factor."""

    @property
    def num_forms(self) -> int:
        return 0

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return ()

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return ()

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        out.fill_(1)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])


@register_tile_kernel(LinearKernel)
def _(kernel: LinearKernel, dims: Tensor | None) -> TileKernel:
    return LinearTile(1.0, dims, kernel.variance.detach()[0])


@register_tile_kernel(PolynomialKernel)
def _(kernel: PolynomialKernel, dims: Tensor | None) -> TileKernel:
    return PolynomialTile(1.0, dims, kernel.offset.item(), float(kernel.power))


@register_tile_kernel(ConstantKernel)
def _(kernel: ConstantKernel, dims: Tensor | None) -> TileKernel:
    return ConstantTile(kernel.constant.item())
