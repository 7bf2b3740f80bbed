"""Leaves of a kernel's expression, with gradients: distances and inner products.

Legend: S = sum_ij W_ij k_ij, where W already holds what surrounds the leaf;
G = W * dk/d(what k is a function of), elementwise; z scaled inputs (n, d).

For a function of d2 = |z_i - z_j|^2, dS/dz_i = 2 sum_j (G_ij + G_ji) (z_i - z_j). In
more than three dimensions that is one product G [z, 1] for the rows of a tile and
one for its columns; in up to three, where lengthscales are often tiny beside the
spread of the data, the differences themselves are summed, as distances are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgdgp.kernels.distance import (
    DIRECT_DIMENSIONS,
    left_form,
    right_form,
    squared_distances,
)
from sgdgp.kernels.registry import TileKernel
from sgdgp.kernels.slopes import Identity, Slope
from sgdgp.kernels.stationary import StationaryTile
from sgdgp.kernels.tile_gradients import Gradient, LiveTile, Pad, Term


class _Displacements(ABC):
    """Accumulates dS/dz from tiles of G."""

    @abstractmethod
    def add(self, g: Tensor, rows: slice, columns: slice, scratch: Tensor) -> None:
        """Add the part of a tile."""

    @abstractmethod
    def result(self) -> Tensor:
        """dS/dz (n, d)."""


class _ByProducts(_Displacements):
    """Through G [z, 1]: fast, and cancels as much as the distances do."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self._augmented = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        self._sums = torch.zeros_like(self._augmented)

    def add(self, g: Tensor, rows: slice, columns: slice, scratch: Tensor) -> None:
        self._sums[rows].addmm_(g, self._augmented[columns])
        self._sums[columns].addmm_(g.T, self._augmented[rows])

    def result(self) -> Tensor:
        return 2 * (self._z * self._sums[:, -1:] - self._sums[:, :-1])


class _ByDifferences(_Displacements):
    """Through the differences themselves: exact to the last digits."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self._sums = torch.zeros_like(z)

    def add(self, g: Tensor, rows: slice, columns: slice, scratch: Tensor) -> None:
        for i in range(self._z.shape[1]):
            across = self._z[columns, i]
            torch.sub(self._z[rows, i : i + 1], across, out=scratch).mul_(g)
            self._sums[rows, i] += scratch.sum(1)
            self._sums[columns, i] -= scratch.sum(0)

    def result(self) -> Tensor:
        return 2 * self._sums


class StationaryTerm(Term):
    """A function of the squared distance of scaled inputs.

    Args:
        z: Scaled inputs (n, d), with a graph where they have one.
        slope: Values and derivatives for squared distances.
        at_zero: The value at distance zero.
    """

    buffers = 3

    def __init__(self, z: Tensor, slope: Slope, at_zero: float) -> None:
        self._live = z
        self._slope, self._at_zero = slope, at_zero
        self.wants_gradient = z.requires_grad or slope.wants_gradient
        z = z.detach().contiguous()
        self._left, self._right = left_form(z)[0], right_form(z)[0]
        direct = z.shape[1] <= DIRECT_DIMENSIONS
        # Squared distances below are rounding errors, of points that are the same.
        self._floor = (
            torch.zeros_like(z[:, :1])
            if direct
            else 8 * torch.finfo(z.dtype).eps * z.square().sum(1, keepdim=True)
        )
        self._displacements = _ByDifferences(z) if direct else _ByProducts(z)
        self._tile = (slice(0, 0), slice(0, 0))
        self._derivative = self._scratch = z

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        value, derivative, scratch = pad.take(), pad.take(), pad.take()
        squared_distances(self._left[rows], self._right[columns], value, (scratch,))
        if rows == columns:
            value.diagonal().zero_()
        self._slope.evaluate(value, derivative, scratch, self._floor[rows])
        if rows == columns:
            value.diagonal().fill_(self._at_zero)
            derivative.diagonal().zero_()
        self._tile = rows, columns
        self._derivative, self._scratch = derivative, scratch
        return value

    def pull(self, weight: Tensor, pad: Pad) -> None:
        self._slope.pull(weight, self._scratch)
        if self._live.requires_grad:
            g = self._derivative.mul_(weight)
            self._displacements.add(g, *self._tile, self._scratch)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        if self._live.requires_grad:
            scale = outer * self._slope.constant
            yield self._live, scale * self._displacements.result()
        yield from self._slope.gradients(outer)


class InnerProductTerm(Term):
    """A function of left_i . right_j.

    Args:
        left: Features of points as rows (n, p), with a graph where they have one.
        right: Features of points as columns (n, p), likewise.
        slope: Values and derivatives for inner products.
    """

    buffers = 3

    def __init__(self, left: Tensor, right: Tensor, slope: Slope) -> None:
        self._live = (left, right)
        self._slope = slope
        self.wants_gradient = (
            left.requires_grad or right.requires_grad or slope.wants_gradient
        )
        self._left, self._right = left.detach(), right.detach()
        self._left_sums = torch.zeros_like(self._left)
        self._right_sums = torch.zeros_like(self._right)
        self._tile = (slice(0, 0), slice(0, 0))
        self._derivative: Tensor | None = None
        self._scratch = self._left

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        value = pad.take()
        torch.mm(self._left[rows], self._right[columns].T, out=value)
        self._tile, self._derivative = (rows, columns), None
        if not isinstance(self._slope, Identity):
            self._derivative, self._scratch = pad.take(), pad.take()
            self._slope.evaluate(
                value, self._derivative, self._scratch, value.new_zeros(())
            )
        return value

    def pull(self, weight: Tensor, pad: Pad) -> None:
        rows, columns = self._tile
        self._slope.pull(weight, self._scratch)
        g = weight if self._derivative is None else self._derivative.mul_(weight)
        left, right = self._live
        if left.requires_grad:
            self._left_sums[rows].addmm_(g, self._right[columns])
        if right.requires_grad:
            self._right_sums[columns].addmm_(g.T, self._left[rows])

    def gradients(self, outer: float) -> Iterator[Gradient]:
        left, right = self._live
        scale = outer * self._slope.constant
        if left.requires_grad:
            yield left, scale * self._left_sums
        if right.requires_grad:
            yield right, scale * self._right_sums
        yield from self._slope.gradients(outer)


class ConstantTerm(Term):
    """The same value, one, for every pair of points."""

    buffers = 1
    wants_gradient = False

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        return pad.take().fill_(1)

    def pull(self, weight: Tensor, pad: Pad) -> None:
        """Nothing to pull."""

    def gradients(self, outer: float) -> Iterator[Gradient]:
        return iter(())


@dataclass(frozen=True)
class LiveStationary(LiveTile):
    """A stationary kernel.

    Attributes:
        tile: Its tile form, with an inverse lengthscale that keeps its graph.
        slope: Values and derivatives for squared distances of its scaled inputs.
    """

    tile: StationaryTile
    slope: Slope

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        z = self.tile.scaled(x, origin)
        return StationaryTerm(z, self.slope, self.tile.at_zero)


@dataclass(frozen=True)
class LiveInnerProduct(LiveTile):
    """A function of the inner product of one left and one right form.

    Attributes:
        tile: Its tile form, with hyperparameters that keep their graph; ``left`` and
            ``right`` return one tensor (n, p) each.
        slope: Values and derivatives for inner products. Default: the inner product
            is the value.
    """

    tile: TileKernel
    slope: Slope = field(default_factory=Identity)

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        (left,), (right,) = self.tile.left(x, origin), self.tile.right(x, origin)
        return InnerProductTerm(left, right, self.slope)


@dataclass(frozen=True)
class LiveConstant(LiveTile):
    """A constant kernel; its value is all in the factor."""

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        return ConstantTerm()
