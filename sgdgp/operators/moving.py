"""Coefficients that a solver moves a block at a time, and what goes with them.

A stochastic solver needs K[I, :] V for one block I after another, while V changes on
blocks. Where K = phi phi^T with exact features, U = phi^T V says all about V that this
takes: K[I, :] V = phi(x_I) U, and V[I] += G moves U by phi(x_I)^T G. A step then costs
one forward and one adjoint on the block, and never touches the other rows.

U is a linear function of V, so whatever a solver does to V (sums, multiples, moves) it
does to U alike. Operators without features have no U, and nothing is done for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """A change of some rows.

    Attributes:
        rows: The rows, a slice or indices (b,) without repetition.
        values: What is added to them (b, k), up to a factor.
        image: phi(x_rows)^T values (M, k), or None without features.
    """

    rows: Tensor | slice
    values: Float[Tensor, "b k"]
    image: Float[Tensor, "M k"] | None = None


@dataclass
class MovingVectors:
    """V (n, k) with U = phi^T V (M, k); made by ``KernelOperator.moving``.

    Attributes:
        values: V itself (n, k).
        image: U (M, k), or None without features.
    """

    values: Float[Tensor, "n k"]
    image: Float[Tensor, "M k"] | None = None

    def clone(self) -> MovingVectors:
        """A copy."""
        image = None if self.image is None else self.image.clone()
        return MovingVectors(self.values.clone(), image)

    def zeros_like(self) -> MovingVectors:
        """Zero."""
        image = None if self.image is None else torch.zeros_like(self.image)
        return MovingVectors(torch.zeros_like(self.values), image)

    def columns(self, chosen: Tensor) -> MovingVectors:
        """Some columns, by a mask or indices, contiguous."""
        image = self.image
        if image is not None:
            # Images of networks are stored column by column.
            image = image.mT[chosen].mT
        return MovingVectors(self.values[:, chosen].contiguous(), image)

    def move(self, move: Move, factor: float = 1.0) -> None:
        """V[rows] += factor * values."""
        if isinstance(move.rows, slice):
            self.values[move.rows].add_(move.values, alpha=factor)
        else:
            self.values.index_add_(0, move.rows, move.values, alpha=factor)
        if self.image is not None and move.image is not None:
            self.image.add_(move.image, alpha=factor)

    def add(self, other: MovingVectors, factor: float = 1.0) -> None:
        """V += factor * other."""
        self.values.add_(other.values, alpha=factor)
        if self.image is not None and other.image is not None:
            self.image.add_(other.image, alpha=factor)

    def scale(self, factor: float) -> None:
        """V *= factor."""
        self.values.mul_(factor)
        if self.image is not None:
            self.image.mul_(factor)

    def set_to_difference(
        self, a: MovingVectors, b: MovingVectors, factor: float
    ) -> None:
        """V = a - factor * b."""
        torch.sub(a.values, b.values, alpha=factor, out=self.values)
        if a.image is not None and b.image is not None:
            torch.sub(a.image, b.image, alpha=factor, out=self.image)

    def copy(self, other: MovingVectors) -> None:
        """V = other."""
        self.values.copy_(other.values)
        if self.image is not None and other.image is not None:
            self.image.copy_(other.image)
