"""The recurrence of block conjugate gradients, for any symmetric product."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sgdgp.solvers.preconditioners import Inverse
    from sgdgp.solvers.recycling import Directions


class BlockRecurrence:
    """The block recurrence of the columns still active (O'Leary, 1980).

    Args:
        product: H times a matrix, H symmetric and positive definite.
        weights: Starting point V (n, k).
        residual: B - H V (n, k); it is updated in place.
        inverse: Preconditioner, if there is one.
        active: Mask of the columns to work on (k,).
        known: Directions whose images are known: the residual is kept orthogonal to
            them, and new directions conjugate.

    Attributes:
        weights: V (n, k), all columns.
        norms: Norms of the residuals (k,), recursive or true.
        is_fresh: Whether the last step evaluated the residuals anew.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        weights: Float[Tensor, "n k"],
        residual: Float[Tensor, "n k"],
        inverse: Inverse | None,
        active: Tensor,
        known: Directions | None = None,
    ) -> None:
        self.weights = weights.clone()
        self._product = product
        self._residual = residual
        self._inverse = inverse
        self._known = known
        self._stay_orthogonal(slice(None))
        self.norms = self._residual.norm(dim=0)
        self._columns = active.nonzero()[:, 0]
        eps = torch.finfo(weights.dtype).eps
        self._dependent = 16.0 * eps
        self._directions = self._preconditioned()
        self._last: tuple[Tensor, Tensor] | None = None
        self.is_fresh = False

    @property
    def is_done(self) -> bool:
        """Whether every column claims to be done."""
        return len(self._columns) == 0

    @property
    def residual(self) -> Float[Tensor, "n k"]:
        """B - H V as the recursion knows it."""
        return self._residual

    @property
    def last(self) -> tuple[Tensor, Tensor] | None:
        """The latest H-orthonormal directions (n, c), and their images (n, c)."""
        return self._last

    def _preconditioned(self) -> Tensor:
        active = self._residual[:, self._columns]
        found = active if self._inverse is None else self._inverse(active)
        return found if self._known is None else self._known.conjugate(found)

    def _stay_orthogonal(self, columns: Tensor | slice) -> None:
        """Take what rounding brings back of the known directions out of residuals.

        New directions are conjugate to them, so nothing else ever would.
        """
        if self._known is not None:
            inner = self._known.directions.mT @ self._residual[:, columns]
            self.weights[:, columns] += self._known.directions @ inner
            self._residual[:, columns] -= self._known.images @ inner

    def step(self, rhs: Float[Tensor, "n k"] | None = None) -> None:
        """One iteration: one product for all active columns.

        Args:
            rhs: B, if the residuals of all columns are to be evaluated anew: their
                product shares the entries of H with that of the directions. What they
                are behind the step is then true but for the step itself.
        """
        directions = self._directions
        if rhs is None:
            images = self._product(directions)
        else:
            both = self._product(torch.cat([directions, self.weights], dim=1))
            images = both[:, : directions.shape[1]]
            torch.sub(rhs, both[:, directions.shape[1] :], out=self._residual)
            self._stay_orthogonal(slice(None))
            self.norms = self._residual.norm(dim=0)
        self.is_fresh = rhs is not None
        # H-orthonormal directions: M = D^T H D, scaled to unit diagonal, inverted on
        # the part that rounding leaves of its spectrum.
        curvature = (directions.mT @ images).double()
        diagonal = curvature.diagonal().clamp_min(0.0)
        # A direction lost to overflow or rounding must not spoil the others, but
        # without it the recurrence has to start anew.
        finite = torch.isfinite(diagonal)
        usable = finite & (diagonal > torch.finfo(directions.dtype).tiny)
        directions, images = directions[:, usable], images[:, usable]
        scale = diagonal[usable].rsqrt()
        curvature = curvature[usable][:, usable]
        curvature = torch.nan_to_num(0.5 * (curvature + curvature.mT), 0.0, 0.0, 0.0)
        correlation = scale.unsqueeze(1) * curvature * scale
        values, vectors = torch.linalg.eigh(correlation)
        kept = values > self._dependent * max(1, len(values))
        turn = (scale.unsqueeze(1) * vectors[:, kept] / values[kept].sqrt()).to(
            directions.dtype
        )
        directions, images = directions @ turn, images @ turn
        self._last = (directions, images) if bool(finite.all()) else None
        step = directions.mT @ self._residual[:, self._columns]
        self.weights[:, self._columns] += directions @ step
        self._residual[:, self._columns] -= images @ step
        self._stay_orthogonal(self._columns)
        self.norms[self._columns] = self._residual[:, self._columns].norm(dim=0)
        self._turn()

    def _turn(self) -> None:
        """The next directions, conjugate to the last ones."""
        self._directions = self._preconditioned()
        if self._last is not None:
            directions, images = self._last
            overlap = images.mT @ self._directions
            self._directions = self._directions.addmm(directions, overlap, alpha=-1.0)

    def release(self, unsolved: Tensor) -> None:
        """Columns that claim to be solved, or are lost to rounding, leave.

        Args:
            unsolved: Mask of the columns that have to stay (k,).
        """
        stay = (unsolved & torch.isfinite(self.norms))[self._columns]
        if not bool(stay.all()):
            self._columns = self._columns[stay]
            self._directions = self._directions[:, stay]

    def adopt(self, columns: Tensor, residual: Float[Tensor, "n c"]) -> None:
        """Put true residuals in the place of the recursion's.

        Args:
            columns: Indices of the columns (c,).
            residual: Theirs (n, c).
        """
        self._residual[:, columns] = residual
        norms = residual.norm(dim=0)
        self.norms[columns] = torch.where(torch.isfinite(norms), norms, torch.inf)

    def forget(self) -> None:
        """Start the directions anew at the next ``resume``."""
        self._last = None

    def resume(self, unsolved: Tensor) -> None:
        """Go on with these columns (mask, (k,)), conjugate to the last directions."""
        self._columns = unsolved.nonzero()[:, 0]
        if not self.is_done:
            self._turn()

    def energy_gained(self, rhs: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        """v^T (b + r) = -2 (1/2 v^T H v - v^T b): what CG increases, per column."""
        return (self.weights * (rhs + self._residual)).sum(0)
