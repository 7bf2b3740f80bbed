"""Tiles of functions of a distance, and what they pull back.

Legend: z, z' scaled and centred inputs (a, d) and (b, d), d2 = |z - z'|^2;
S = sum_ij W_ij k_ij, where W already holds what surrounds the kernel; G = W * dk/d(d2),
elementwise.

In more than three dimensions the distances come from one matrix product of
augmented inputs, |z - z'|^2 = [z, |z|^2, 1] . [-2 z', 1, |z'|^2], whose rounding
error is about machine epsilon times |z|^2. Entries that are not far above it (pairs of
duplicates and near neighbours, or all where lengthscales are tiny) are taken anew from
differences. Compiled tiles of up to ten dimensions make that product themselves
(``fused.cpp``). In up to three dimensions the differences themselves are squared: no
cancellation, and no more time than the product takes.

Gradients are dS/dz_i = 2 sum_j (G_ij + G_ji) (z_i - z_j). In more than three dimensions
that is one product G [z, 1] for the rows of a tile and one for its columns; in up to
three the differences themselves are summed, as distances are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.kernels import fused
from sgdgp.kernels.registry import (
    BoundTile,
    Buffers,
    Forms,
    Gradient,
    Lazies,
    Lazy,
    Scratch,
    TileKernel,
    select,
    wants_gradient,
)

DIRECT_DIMENSIONS = 3
"""Up to so many dimensions distances come from differences: there these take no more
time than a matrix product, which has next to nothing to multiply."""

_SAME_POINT = 8
"""Squared distances up to so many machine epsilons times |z|^2 are taken for those of
equal points: of the terms of size |z|^2 that cancel then, a few epsilons are left."""


_CANCELLED = 1e3
"""Squared distances below so many machine epsilons times |z|^2 + |z'|^2 have lost more
than three digits of their own, and come from differences instead."""

_EPSILON = torch.finfo(torch.float32).eps

_NARROW = 128
"""Columns that are searched for such entries at a time: mostly few rows have any."""


def left_form(z: Tensor) -> tuple[Tensor]:
    """What the rows of a tile need: z (n, d) itself or augmented (n, d + 2)."""
    if z.shape[1] <= DIRECT_DIMENSIONS:
        return (z.contiguous(),)  # as compiled passes need it
    squares = (z * z).sum(1, keepdim=True)
    return (torch.cat([z, squares, torch.ones_like(squares)], 1),)


def right_form(z: Tensor) -> tuple[Tensor]:
    """What the columns of a tile need: z (n, d) itself or augmented (n, d + 2)."""
    if z.shape[1] <= DIRECT_DIMENSIONS:
        return (z.contiguous(),)  # as compiled passes need it
    squares = (z * z).sum(1, keepdim=True)
    return (torch.cat([-2 * z, torch.ones_like(squares), squares], 1),)


def squared_distances(
    left: Tensor, right: Tensor, out: Tensor, scratch: Scratch
) -> None:
    """Write |z - z'|^2 of a left and a right form into ``out`` (a, b).

    Rounding may leave it slightly negative. A buffer of ``scratch`` is used in two and
    three dimensions.
    """
    dimensions = left.shape[1]
    if dimensions > DIRECT_DIMENSIONS:
        torch.mm(left, right.T, out=out)
        _undo_cancellation(left, right, out)
        return
    if dimensions == 0:
        out.zero_()
        return
    torch.sub(left[:, :1], right[:, 0], out=out)
    out.mul_(out)
    for i in range(1, dimensions):
        difference = torch.sub(left[:, i : i + 1], right[:, i], out=scratch[0])
        out.addcmul_(difference, difference)


def _undo_cancellation(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Take squared distances (a, b) near their rounding error from differences."""
    if out.numel() == 0:
        return
    level = _CANCELLED * torch.finfo(out.dtype).eps
    squares, across = level * left[:, -2:-1], level * right[:, -1]
    # What is too far for any pair of the tile, as most are, is known by one number.
    if bool(out.amin() > squares.amax() + across.amax()):
        return
    for columns in slices(out.shape[1], _NARROW):
        part, other = out[:, columns], right[columns, :-2]
        bound = squares + across[columns].amax()
        near = (part.amin(1, keepdim=True) <= bound).nonzero()[:, 0]
        i, j = (part[near] <= squares[near] + across[columns]).nonzero(as_tuple=True)
        rows = near[i]
        difference = left[rows, :-2].add_(other[j], alpha=0.5)
        part[rows, j] = difference.square_().sum(1)


def rounding_of_distances(z: Tensor) -> Tensor:
    """Squared distances (n, 1) up to which points are the same as z (n, d)."""
    if z.shape[1] <= DIRECT_DIMENSIONS:
        return torch.zeros_like(z[:, :1])
    return _SAME_POINT * torch.finfo(z.dtype).eps * z.square().sum(1, keepdim=True)


@dataclass(frozen=True)
class StationaryTile(TileKernel):
    """A function of the squared distance d2 between scaled inputs.

    Without ``profile_with_derivative`` gradients come from GPyTorch's own forward. A
    subclass with attributes of its own is a frozen dataclass, as this one is.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        inverse_lengthscale: 1 / l, (d,) or (1,).
    """

    dims: Tensor | None
    inverse_lengthscale: Tensor

    @property
    def input_scale(self) -> float | Tensor:
        """Inputs are multiplied by input_scale / l before distances are taken."""
        return 1.0

    @property
    def at_zero(self) -> float:
        """The tile at distance zero."""
        return 1.0

    @property
    def shape_parameter(self) -> float | Tensor | None:
        """A hyperparameter of the profile beside the lengthscale, as ``scalar`` has it.

        ``profile_with_derivative`` has to differentiate with respect to it too.
        """
        return None

    @abstractmethod
    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        """Replace squared distances, some slightly negative, by tile values."""

    @property
    def derivative_scale(self) -> float:
        """What the derivatives that are written are to be multiplied by."""
        return 1.0

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        """Replace squared distances by values; write derivatives over their scale.

        Args:
            d2: Squared distances (a, b), overwritten with values.
            derivative: Buffer (a, b) for d tile / d d2.
            scratch: Buffer (a, b); where the profile has a shape parameter, d tile / d
                shape is left in it, not over any scale.
            same: (a, 1): squared distances up to it are rounding errors.
        """
        raise NotImplementedError(f"{type(self).__name__} knows no derivative")

    def keops_profile(self, d2: Lazy) -> Lazy:
        """The profile as a lazy tensor of exact squared distances."""
        raise ValueError(f"{type(self).__name__} has no KeOps formula")

    def scaled(self, x: Tensor, origin: Tensor) -> Tensor:
        """Centred inputs over the lengthscale, times ``input_scale``: (n, d')."""
        weight = self.inverse_lengthscale.to(x) * self.input_scale
        return (select(x, self.dims) - select(origin, self.dims)) * weight

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return left_form(self.scaled(x, origin))

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return right_form(self.scaled(x, origin))

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        if not self._write_fused(left[0], right[0], out):
            squared_distances(left[0], right[0], out, scratch)
            self.profile(out, scratch)

    def is_compiled(self, like: Tensor) -> bool:
        return fused.serves(type(self).profile, like)

    def _write_fused(self, left: Tensor, right: Tensor, out: Tensor) -> bool:
        """Write the tile in one compiled pass; whether that was possible."""
        profile = type(self).profile
        if not (fused.pays(out) and fused.serves(profile, out)):
            return False
        if left.shape[1] > fused.MOST_DIMENSIONS + 2:  # augmented by two columns
            torch.mm(left, right.T, out=out)
        return fused.written(profile, left, right, out, _CANCELLED * _EPSILON)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[0],), self.at_zero)

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile | None:
        derivative = type(self).profile_with_derivative
        if derivative is StationaryTile.profile_with_derivative:
            return None
        return _BoundStationary(self, self.scaled(x, origin))

    @property
    def has_keops(self) -> bool:
        return type(self).keops_profile is not StationaryTile.keops_profile

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        return (self.scaled(x, origin).contiguous(),)

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        return self.keops_profile(rows[0].sqdist(columns[0]))


class _BoundStationary(BoundTile):
    """A stationary tile kernel at scaled inputs z (n, d), with their graph."""

    buffers = 3

    def __init__(self, tile: StationaryTile, z: Tensor) -> None:
        self._kernel, self._inputs = tile, z
        self._shape = tile.shape_parameter
        self._shape_sum = z.new_zeros((), dtype=torch.float64)
        self._wants_shape = wants_gradient(self._shape)
        self.wants_gradient = z.requires_grad or self._wants_shape
        z = z.detach().contiguous()
        self._left, self._right = left_form(z)[0], right_form(z)[0]
        self._same = rounding_of_distances(z)
        direct = z.shape[1] <= DIRECT_DIMENSIONS
        self._displacements = _ByDifferences(z) if direct else _ByProducts(z)
        self._where = (slice(0, 0), slice(0, 0))
        self._derivative = self._scratch = z

    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        value, derivative, scratch = (buffers.take() for _ in range(3))
        squared_distances(self._left[rows], self._right[columns], value, (scratch,))
        if rows == columns:
            value.diagonal().zero_()
        self._kernel.profile_with_derivative(
            value, derivative, scratch, self._same[rows]
        )
        if rows == columns:
            value.diagonal().fill_(self._kernel.at_zero)
            derivative.diagonal().zero_()
        self._where = rows, columns
        self._derivative, self._scratch = derivative, scratch
        return value

    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        if self._wants_shape:
            self._shape_sum += torch.dot(weight.view(-1), self._scratch.view(-1))
        if self._inputs.requires_grad:
            g = self._derivative.mul_(weight)
            self._displacements.add(g, *self._where, self._scratch)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        if self._inputs.requires_grad:
            scale = outer * self._kernel.derivative_scale
            yield self._inputs, scale * self._displacements.result()
        if self._wants_shape:
            assert isinstance(self._shape, Tensor)
            yield self._shape, outer * self._shape_sum


class _ByProducts:
    """dS/dz through G [z, 1]: fast, and cancels as much as the distances do."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self._augmented = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        self._sums = torch.zeros_like(self._augmented)

    def add(self, g: Tensor, rows: slice, columns: slice, scratch: Tensor) -> None:
        """Add the part of a tile of G."""
        self._sums[rows].addmm_(g, self._augmented[columns])
        self._sums[columns].addmm_(g.T, self._augmented[rows])

    def result(self) -> Tensor:
        """dS/dz (n, d)."""
        return 2 * (self._z * self._sums[:, -1:] - self._sums[:, :-1])


class _ByDifferences:
    """dS/dz through the differences themselves: exact to the last digits."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self._sums = torch.zeros_like(z)

    def add(self, g: Tensor, rows: slice, columns: slice, scratch: Tensor) -> None:
        """Add the part of a tile of G."""
        for i in range(self._z.shape[1]):
            across = self._z[columns, i]
            torch.sub(self._z[rows, i : i + 1], across, out=scratch).mul_(g)
            self._sums[rows, i] += scratch.sum(1)
            self._sums[columns, i] -= scratch.sum(0)

    def result(self) -> Tensor:
        """dS/dz (n, d)."""
        return 2 * self._sums
