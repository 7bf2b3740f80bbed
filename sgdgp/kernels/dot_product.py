"""Tile forms of kernels of the inner product: linear, polynomial, constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from gpytorch.kernels import ConstantKernel, LinearKernel, PolynomialKernel
from torch import Tensor

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest, NoRandomFeatures, register_features
from sgdgp.features.finite import ConstantFeatures, LinearFeatures, PolynomialFeatures
from sgdgp.kernels.registry import Forms, TileKernel, register_tile_kernel
from sgdgp.kernels.stationary import select

MAX_MONOMIALS = 20_000
"""Most features that a polynomial kernel may need."""


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


@register_features(LinearKernel)
def linear_features(kernel: LinearKernel, request: FeatureRequest) -> FeatureMap:
    """The scaled inputs themselves."""
    variance = request.parameter(kernel.variance).reshape(-1).expand(request.dim)
    return LinearFeatures(variance.to(request.like).contiguous())


@register_features(ConstantKernel)
def constant_features(kernel: ConstantKernel, request: FeatureRequest) -> FeatureMap:
    """One constant feature."""
    return ConstantFeatures(float(request.parameter(kernel.constant)))


@register_features(PolynomialKernel)
def polynomial_features(
    kernel: PolynomialKernel, request: FeatureRequest
) -> FeatureMap:
    """All monomials of degree at most the power.

    Raises:
        NoRandomFeatures: If the power is not a whole number, or the expansion
            has more than ``MAX_MONOMIALS`` terms.
    """
    power = kernel.power
    if power != int(power) or power < 0:
        raise NoRandomFeatures(kernel, f"with power {power} is not a polynomial")
    power, dim = int(power), request.dim
    count = math.comb(dim + power, power)
    if count > MAX_MONOMIALS:
        raise NoRandomFeatures(
            kernel,
            f"of power {power} in {dim} dimensions expands to {count} monomials, "
            f"more than the limit of {MAX_MONOMIALS}",
        )
    monomials = list(combinations_with_replacement(range(dim + 1), power))
    indices = torch.tensor(monomials, dtype=torch.long).reshape(count, power)
    coefficients = [
        math.factorial(power) / math.prod(math.factorial(m.count(i)) for i in set(m))
        for m in monomials
    ]
    return PolynomialFeatures(
        indices.to(request.device),
        torch.tensor(coefficients, dtype=torch.float64).sqrt().to(request.like),
        float(request.parameter(kernel.offset)),
        dim,
    )
