"""Kernels of an inner product: linear, polynomial, constant.

Legend: u = left_i . right_j, an inner product of a form of rows and one of columns;
S = sum_ij W_ij k_ij, where W already holds what surrounds the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from gpytorch.kernels import ConstantKernel, LinearKernel, PolynomialKernel
from torch import Tensor

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest, NoRandomFeatures
from sgdgp.features.finite import ConstantFeatures, LinearFeatures, PolynomialFeatures
from sgdgp.kernels.registry import (
    BoundTile,
    BoundValues,
    Buffers,
    Forms,
    Gradient,
    Lazies,
    Lazy,
    Scratch,
    TileKernel,
    register_kernel,
    scalar,
    select,
)

MAX_MONOMIALS = 20_000
"""Most features that a polynomial kernel may need: every function drawn has as many
weights, and with more of them exact draws at the points are the cheaper way."""


@dataclass(frozen=True)
class InnerProductTile(TileKernel):
    """A function of the inner product u of one left and one right form.

    ``left`` and ``right`` return one tensor (n, p) each. Without a ``profile`` of its
    own the tile is the inner product itself; with one that knows no derivative,
    gradients come from GPyTorch's own forward. A subclass with attributes of its own is
    a frozen dataclass.
    """

    def profile(self, u: Tensor) -> None:
        """Replace inner products (a, b) by tile values."""

    @property
    def derivative_scale(self) -> float:
        """What the derivatives that are written are to be multiplied by."""
        return 1.0

    def profile_with_derivative(self, u: Tensor, derivative: Tensor) -> None:
        """Replace inner products by values; write derivatives over their scale.

        Args:
            u: Inner products (a, b), overwritten with values.
            derivative: Buffer (a, b) for d tile / du.
        """
        raise NotImplementedError(f"{type(self).__name__} knows no derivative")

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        self.profile(torch.mm(left[0], right[0].T, out=out))

    def keops_profile(self, u: Lazy) -> Lazy:
        """The profile as a lazy tensor of inner products of ``keops_inputs``."""
        return u

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        return self.keops_profile((rows[0] * columns[0]).sum(-1))

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile | None:
        own, base = type(self), InnerProductTile
        knows = own.profile_with_derivative is not base.profile_with_derivative
        if not knows and own.profile is not base.profile:
            return None
        (left,), (right,) = self.left(x, origin), self.right(x, origin)
        return _BoundInnerProduct(self, left, right)


class _BoundInnerProduct(BoundTile):
    """An inner product tile with forms (n, p) of rows and columns, with their graph."""

    buffers = 3

    def __init__(self, tile: InnerProductTile, left: Tensor, right: Tensor) -> None:
        self._kernel = tile
        self._is_product = type(tile).profile is InnerProductTile.profile
        self._inputs = left, right
        self.wants_gradient = left.requires_grad or right.requires_grad
        self._left, self._right = left.detach(), right.detach()
        self._left_sums = torch.zeros_like(self._left)
        self._right_sums = torch.zeros_like(self._right)
        self._where = (slice(0, 0), slice(0, 0))
        self._derivative: Tensor | None = None

    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        value = buffers.take()
        torch.mm(self._left[rows], self._right[columns].T, out=value)
        self._where, self._derivative = (rows, columns), None
        if not self._is_product:
            self._derivative = buffers.take()
            self._kernel.profile_with_derivative(value, self._derivative)
        return value

    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        rows, columns = self._where
        g = weight if self._derivative is None else self._derivative.mul_(weight)
        left, right = self._inputs
        if left.requires_grad:
            self._left_sums[rows].addmm_(g, self._right[columns])
        if right.requires_grad:
            self._right_sums[columns].addmm_(g.T, self._left[rows])

    def gradients(self, outer: float) -> Iterator[Gradient]:
        left, right = self._inputs
        scale = outer * self._kernel.derivative_scale
        if left.requires_grad:
            yield left, scale * self._left_sums
        if right.requires_grad:
            yield right, scale * self._right_sums


@dataclass(frozen=True)
class LinearTile(InnerProductTile):
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

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return (select(x, self.dims).square() * self.variance.to(x)).sum(1)

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        return ((select(x, self.dims) * self.variance.to(x).sqrt()).contiguous(),)


def _linear_tile(kernel: LinearKernel, dims: Tensor | None) -> LinearTile:
    return LinearTile(1.0, dims, kernel.variance[0])


def _linear_features(kernel: LinearKernel, request: FeatureRequest) -> FeatureMap:
    """The scaled inputs themselves."""
    variance = request.parameter(kernel.variance).reshape(-1).expand(request.dim)
    return LinearFeatures(variance.to(request.like).contiguous())


register_kernel(LinearKernel, tile=_linear_tile, features=_linear_features)


@dataclass(frozen=True)
class PolynomialTile(InnerProductTile):
    """(x . x' + c)^p.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        offset: c.
        power: p.
    """

    dims: Tensor | None
    offset: float | Tensor
    power: float

    @property
    def derivative_scale(self) -> float:
        return self.power

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        chosen = select(x, self.dims)
        return (torch.cat([chosen, x.new_ones(x.shape[0], 1) * self.offset], 1),)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return (torch.cat([select(x, self.dims), x.new_ones(x.shape[0], 1)], 1),)

    def profile(self, u: Tensor) -> None:
        u.pow_(self.power)

    def profile_with_derivative(self, u: Tensor, derivative: Tensor) -> None:
        torch.pow(u, self.power - 1, out=derivative)
        u.mul_(derivative)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return (select(x, self.dims).square().sum(1) + self.offset).pow(self.power)

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        offset = x.new_full((x.shape[0], 1), float(self.offset) ** 0.5)
        return (torch.cat([select(x, self.dims), offset], 1),)

    def keops_profile(self, u: Lazy) -> Lazy:
        # Whole powers are constants of the compiled formula and keep the sign.
        return u ** (int(self.power) if self.power.is_integer() else self.power)


def _polynomial_tile(kernel: PolynomialKernel, dims: Tensor | None) -> PolynomialTile:
    return PolynomialTile(1.0, dims, scalar(kernel.offset), float(kernel.power))


def _polynomial_features(
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
    indices = torch.tensor(monomials, dtype=torch.long, device=request.device)
    coefficients = [
        math.factorial(power) / math.prod(math.factorial(m.count(i)) for i in set(m))
        for m in monomials
    ]
    return PolynomialFeatures(
        indices.reshape(count, power),
        request.like.new_tensor(coefficients, dtype=torch.float64)
        .sqrt()
        .to(request.like),
        float(request.parameter(kernel.offset)),
        dim,
    )


register_kernel(PolynomialKernel, tile=_polynomial_tile, features=_polynomial_features)


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

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        out.fill_(1)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile:
        return BoundValues(self, x, origin, scratch=0)

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        return (x.new_ones(x.shape[0], 1),)

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        return rows[0] * columns[0]


def _constant_tile(kernel: ConstantKernel, dims: Tensor | None) -> ConstantTile:
    return ConstantTile(scalar(kernel.constant))


def _constant_features(kernel: ConstantKernel, request: FeatureRequest) -> FeatureMap:
    """One constant feature."""
    return ConstantFeatures(float(request.parameter(kernel.constant)))


register_kernel(ConstantKernel, tile=_constant_tile, features=_constant_features)
