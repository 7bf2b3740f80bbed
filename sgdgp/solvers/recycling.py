"""What a solve leaves for the next one: its last residuals, directions, preconditioner.

With D such that D^T H D = I and the images Q = H D known, the part of a solution in
the span of D costs no product, and directions made conjugate to D by Z - D (Q^T Z)
never go there again (deflated conjugate gradients: Saad et al., 2000; recycling for
sequences of systems: Parks et al., 2006). Of all directions that conjugate gradients
took, the span of the few with the largest Ritz values of H is kept: the smooth
functions that all data share.

All of it is worth as much when the system gains rows. D has zeros there, its images
gain the rows K(new, old) D, and new rows enter the preconditioner one by one
(``two_level.appended_rows``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import slices
from sgdgp.solvers.preconditioners import Inverse
from sgdgp.solvers.system import System
from sgdgp.solvers.two_level import (
    appended_rows,
    compressed_parts,
    compressed_rows,
    default_neighbours,
)

KEPT = 256
"""Directions that the next solve starts with: two products with n x 256 matrices in
every iteration, little beside one with K."""

# Latest directions of a solve out of which they are chosen: three times as many as are
# kept, so that there is a choice, and at least those of so many iterations.
COLLECTED, _ITERATIONS = 768, 8
_GRAM_ROWS = 1024  # at a time, when inner products of directions are added up
# Of the largest inner product of directions in the norm of H: what is below was made of
# rounding in float32.
_DEPENDENT = 1e-4
# New rows, of those a preconditioner was built for. They are known by a few neighbours
# only: with more of them building it again pays.
_MOST_NEW = 0.25


@dataclass(frozen=True, eq=False)
class Directions:
    """H-orthonormal directions and their images.

    Attributes:
        directions: D (n, r).
        images: Q = H D (n, r).
    """

    directions: Float[Tensor, "n r"]
    images: Float[Tensor, "n r"]

    def conjugate(self, z: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Z - D (Q^T Z)."""
        return torch.addmm(z, self.directions, self.images.mT @ z, alpha=-1.0)

    def with_rows(self, images: Float[Tensor, "m r"]) -> Directions:
        """The same in a system with more rows, where their images are K(new, old) D."""
        zeros = images.new_zeros(images.shape)
        return Directions(
            torch.cat([self.directions, zeros]), torch.cat([self.images, images])
        )


@register_stored_class
@dataclass(frozen=True, eq=False)
class ExtendedInverse(Inverse):
    """[[P^-1, 0], [0, 0]] + c G^T G: a preconditioner that has gained rows.

    Attributes:
        inverse: P^-1 of the first rows.
        first: Number of these.
        rows: G, one sparse row for each new equation (m, n).
        passes: Kernel entries that the new rows took, divided by n^2.
        settings: Those of P^-1.
    """

    inverse: Inverse
    first: int
    rows: Tensor
    passes: float
    settings: Mapping[str, Any]

    def stored_parts(self) -> dict[str, Any]:
        """What a file holds: the entries of G."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {**parts, "rows": compressed_parts(self.rows)}

    @classmethod
    def from_stored_parts(cls, **parts: Any) -> ExtendedInverse:
        """The preconditioner behind ``stored_parts``."""
        entries, first = parts["rows"], parts["first"]
        width = first + len(entries["starts"]) - 1
        return cls(**{**parts, "rows": compressed_rows(**entries, width=width)})

    @property
    def is_outgrown(self) -> bool:
        """Whether so many rows are new by now that it should be built again."""
        return self.rows.shape[0] > _MOST_NEW * self.first

    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        out = torch.zeros_like(r)
        out[: self.first] = self.inverse(r[: self.first])
        size = self.inverse.magnitude
        return out.add_(self.rows.mT @ (self.rows @ r), alpha=size)


def extend_inverse(inverse: Inverse, system: System, num_new: int) -> ExtendedInverse:
    """The preconditioner of a system that has gained ``num_new`` rows at its end."""
    first = system.n - num_new
    rows = appended_rows(system, num_new, default_neighbours(system.n))
    if isinstance(inverse, ExtendedInverse):
        rows = _stacked(inverse.rows, rows)
        first, inverse = inverse.first, inverse.inverse
    entries = num_new * (system.n + (default_neighbours(system.n) + 1) ** 2)
    return ExtendedInverse(
        inverse, first, rows, entries / system.n**2, inverse.settings
    )


def _stacked(above: Tensor, below: Tensor) -> Tensor:
    """Two compressed matrices, one above the other, as wide as the lower one."""
    starts = above.crow_indices()
    return compressed_rows(
        torch.cat([starts, starts[-1] + below.crow_indices()[1:]]),
        torch.cat([above.col_indices(), below.col_indices()]),
        torch.cat([above.values(), below.values()]),
        below.shape[1],
    )


@register_stored_class
@dataclass(frozen=True, eq=False)
class Recycled:
    """What a finished solve leaves for one of the same matrix with more rows.

    Attributes:
        residual: B - H V, in the scale of the right-hand sides (n, k).
        inverse: The preconditioner.
        collected: Directions and images, in pairs.
    """

    residual: Float[Tensor, "n k"]
    inverse: Inverse | None
    collected: tuple[tuple[Tensor, Tensor], ...]

    def leading(self) -> Directions | None:
        """The ``KEPT`` directions of the largest Ritz values, if there are any."""
        if not self.collected:
            return None
        if len(self.collected) == 1 and self.collected[0][0].shape[1] <= KEPT:
            return Directions(*self.collected[0])
        return leading_directions(self.collected, KEPT)

    def reduced(self) -> Recycled:
        """The same with its leading directions only, which are all that is used."""
        known = self.leading()
        if known is None:
            return self
        return replace(self, collected=((known.directions, known.images),))


def leading_directions(
    pairs: tuple[tuple[Tensor, Tensor], ...], rank: int
) -> Directions | None:
    """H-orthonormal directions in the span of all, with the largest Ritz values of H.

    At most ``rank`` of them, from pairs of directions (n, r_i) and their images.
    """
    widths = sum(directions.shape[1] for directions, _ in pairs)
    n = pairs[0][0].shape[0]
    inner = pairs[0][0].new_zeros(widths, widths, dtype=torch.float64)
    outer = inner.clone()
    for rows in slices(n, _GRAM_ROWS):
        d = torch.cat([directions[rows] for directions, _ in pairs], dim=1)
        q = torch.cat([images[rows] for _, images in pairs], dim=1)
        inner += d.mT @ q
        outer += q.mT @ q
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
    kept = values > _DEPENDENT * values[-1].clamp_min(torch.finfo(inner.dtype).tiny)
    if not bool(kept.any()):
        return None
    turn = vectors[:, kept] / values[kept].sqrt()
    turn = turn @ torch.linalg.eigh(turn.mT @ outer @ turn).eigenvectors[:, -rank:]
    parts = turn.to(pairs[0][0].dtype).split([pair[0].shape[1] for pair in pairs])
    found = [
        sum((pair[i] @ part for pair, part in zip(pairs, parts, strict=True)), start=0)
        for i in range(2)
    ]
    return Directions(*found)


class Collector:
    """The latest directions of a solve, at most ``limit`` of them.

    Args:
        limit: Most directions; nothing is kept with zero.
        known: Directions from before the solve, which are always kept.
    """

    def __init__(self, limit: int, known: Directions | None = None) -> None:
        self._limit = limit
        self._first = () if known is None else ((known.directions, known.images),)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def add(self, pair: tuple[Tensor, Tensor] | None) -> None:
        """Keep directions and their images; the oldest leave."""
        if pair is None or not self._limit:
            return
        self._pairs.append(pair)
        self._count += pair[0].shape[1]
        while self._count > self._limit:
            self._count -= self._pairs.pop(0)[0].shape[1]

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Directions and images, those from before the solve first."""
        return (*self._first, *self._pairs)


def directions_to_keep(rhs: Float[Tensor, "n k"], memory_budget: int) -> int:
    """Directions a solve should keep: what fits a sixteenth of the memory budget."""
    affordable = memory_budget // (16 * 2 * len(rhs) * rhs.element_size())
    return min(max(COLLECTED, _ITERATIONS * rhs.shape[1]), affordable)
