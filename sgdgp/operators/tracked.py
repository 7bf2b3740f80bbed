"""Coefficients V that a solver changes a block at a time, with phi^T V beside them.

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
        phi_t_v: phi(x_rows)^T values (M, k), or None without features.
    """

    rows: Tensor | slice
    values: Float[Tensor, "b k"]
    phi_t_v: Float[Tensor, "M k"] | None = None


@dataclass
class TrackedVectors:
    """V (n, k) with U = phi^T V (M, k); made by ``KernelOperator.tracked``.

    Attributes:
        values: V itself (n, k).
        phi_t_v: U (M, k), or None without features.
    """

    values: Float[Tensor, "n k"]
    phi_t_v: Float[Tensor, "M k"] | None = None

    def clone(self) -> TrackedVectors:
        """A copy."""
        phi_t_v = None if self.phi_t_v is None else self.phi_t_v.clone()
        return TrackedVectors(self.values.clone(), phi_t_v)

    def zeros_like(self) -> TrackedVectors:
        """Zero."""
        phi_t_v = None if self.phi_t_v is None else torch.zeros_like(self.phi_t_v)
        return TrackedVectors(torch.zeros_like(self.values), phi_t_v)

    def columns(self, chosen: Tensor) -> TrackedVectors:
        """Some columns, by a mask or indices, contiguous."""
        phi_t_v = self.phi_t_v
        if phi_t_v is not None:
            # Features of networks are stored column by column.
            phi_t_v = phi_t_v.mT[chosen].mT
        return TrackedVectors(self.values[:, chosen].contiguous(), phi_t_v)

    def move(self, move: Move, factor: float = 1.0) -> None:
        """V[rows] += factor * values."""
        if isinstance(move.rows, slice):
            self.values[move.rows].add_(move.values, alpha=factor)
        else:
            self.values.index_add_(0, move.rows, move.values, alpha=factor)
        if self.phi_t_v is not None and move.phi_t_v is not None:
            self.phi_t_v.add_(move.phi_t_v, alpha=factor)

    def add(self, other: TrackedVectors, factor: float = 1.0) -> None:
        """V += factor * other."""
        self.values.add_(other.values, alpha=factor)
        if self.phi_t_v is not None and other.phi_t_v is not None:
            self.phi_t_v.add_(other.phi_t_v, alpha=factor)

    def scale(self, factor: float) -> None:
        """V *= factor."""
        self.values.mul_(factor)
        if self.phi_t_v is not None:
            self.phi_t_v.mul_(factor)

    def set_to_difference(
        self, a: TrackedVectors, b: TrackedVectors, factor: float
    ) -> None:
        """V = a - factor * b."""
        torch.sub(a.values, b.values, alpha=factor, out=self.values)
        if a.phi_t_v is not None and b.phi_t_v is not None:
            torch.sub(a.phi_t_v, b.phi_t_v, alpha=factor, out=self.phi_t_v)

    def copy(self, other: TrackedVectors) -> None:
        """V = other."""
        self.values.copy_(other.values)
        if self.phi_t_v is not None and other.phi_t_v is not None:
            self.phi_t_v.copy_(other.phi_t_v)
