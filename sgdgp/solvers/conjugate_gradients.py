"""Preconditioned block conjugate gradients.

All columns share one Krylov space (O'Leary, 1980): with H-orthonormal directions D,
Z = P^-1 R, and one product Q = H D per iteration,

    V <- V + D (D^T R),   R <- R - Q (D^T R),   D <- orthonormalise(Z - D (Q^T Z)).

With one column this is the textbook recurrence (Hestenes & Stiefel, 1952); with k of
them every product with K serves all k columns, and a few extreme eigenvalues cost
one iteration instead of one each.

Deviations from the textbook:

1. Directions that depend on the others to rounding are dropped, so that a singular
   block is no breakdown.
2. The recursive residual drifts from the true one in finite precision: it is
   replaced by the true residual at regular intervals, and before convergence is
   claimed; the directions are kept. Where rounding shows in it, the true residual is
   evaluated in float64: that refines what float32 alone could not.
3. Columns that claim to be done leave the product at once, and come back should the
   true residual disagree. The directions they leave stay conjugate.
4. The best iterate of every column is what is returned, so that a column that
   loses its conjugacy in float32 cannot end worse than it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    Reason,
    Recorder,
    Solution,
    Solver,
    check_limits,
)
from sgdgp.solvers.preconditioners import Inverse, Preconditioner
from sgdgp.solvers.system import (
    System,
    as_system,
    float32_warnings,
    float64_residual,
    initial_weights,
    rounding_shows,
)
from sgdgp.solvers.two_level import TwoLevel

_REPLACE_EVERY = 50
_STALLED_CHECKS = 4
_STALLED_GAIN = 1e-5


@dataclass(frozen=True)
class CG(Solver):
    """Block conjugate gradients; one pass over K per iteration.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        preconditioner: ``TwoLevel()`` (default), ``PivotedCholesky()``,
            ``Nystrom()`` or None.
    """

    tolerance: float = 1e-2
    max_passes: float = 1000.0
    max_seconds: float | None = None
    preconditioner: Preconditioner | None = field(default_factory=TwoLevel)

    name = "cg"

    def __post_init__(self) -> None:
        check_limits(self.tolerance, self.max_passes, self.max_seconds)

    def solve(
        self,
        operator: KernelOperator,
        noise: Tensor | float,
        rhs: Float[Tensor, "n k"],
        *,
        initial: Tensor | None = None,
        noise_draws: Tensor | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve (K + Sigma) V = B; see ``Solver.solve``."""
        generator = generator or torch.Generator().manual_seed(0)
        system = as_system(operator, noise, rhs)
        record = Recorder(callback)
        best = initial_weights(system, initial)
        residual = system.rhs.clone()
        passes = 0.0
        if initial is not None:
            residual, passes = _true_residual(system, best)
        norms = residual.norm(dim=0)

        inverse: Inverse | None = None
        reason: Reason | None = None
        if float(norms.max()) <= self.tolerance:
            reason = "converged"
        elif self.preconditioner is not None and (
            # What is left must pay for an iteration and the true residual behind it.
            self.preconditioner.cost(system.n) + passes + 2.0 <= self.max_passes
        ):
            inverse = self.preconditioner.prepare(system, generator)
            passes += inverse.passes
        run = _Recurrence(system, best, residual, inverse, norms > self.tolerance)

        stalled = 0
        while reason is None:
            before = run.energy_gained()
            for _ in range(_REPLACE_EVERY):
                run.step()
                passes += 1.0
                run.release(self.tolerance)
                if record(passes, run.norms, exact=False, weights=run.scaled_weights):
                    reason = "interrupted"
                if (
                    reason
                    or run.is_done
                    or passes + 1.0 >= self.max_passes
                    or record.is_past(self.max_seconds)
                ):
                    break
            # The residual may rise for hundreds of iterations while the error in the
            # norm of H still falls: only the energy tells whether CG stands still.
            gained = run.energy_gained() - before
            moves = bool((gained > _STALLED_GAIN * run.energy_gained().abs()).any())
            passes += run.replace_residual(norms > self.tolerance)
            better = run.norms < norms
            best[:, better] = run.weights[:, better]
            norms = torch.where(better, run.norms, norms)
            if record(passes, norms, exact=True, weights=lambda: best * system.scale):
                reason = "interrupted"
            stalled = 0 if moves or bool(better.any()) else stalled + 1
            if float(norms.max()) <= self.tolerance:
                reason = "converged"
            elif passes >= self.max_passes or record.is_past(self.max_seconds):
                reason = reason or "budget"
            elif stalled >= _STALLED_CHECKS:
                reason = reason or "stagnated"
            if reason is None:
                passes += run.readmit(norms > self.tolerance, best)
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=best * system.scale,
            residuals=norms,
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=_warnings(reason, system, best, norms, self.tolerance),
            settings={
                "preconditioner": repr(self.preconditioner),
                **({} if inverse is None else inverse.settings),
            },
        )


class _Recurrence:
    """The block recurrence of the columns still active.

    Attributes:
        weights: V (n, k), all columns.
        norms: Relative residuals (k,), recursive or true.
    """

    def __init__(
        self,
        system: System,
        weights: Tensor,
        residual: Tensor,
        inverse: Inverse | None,
        active: Tensor,
    ) -> None:
        self.weights = weights.clone()
        self.norms = residual.norm(dim=0)
        self._system = system
        self._residual = residual
        self._inverse = inverse
        self._columns = active.nonzero()[:, 0]
        eps = torch.finfo(weights.dtype).eps
        self._dependent = 16.0 * eps
        self._directions = self._preconditioned()
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def is_done(self) -> bool:
        """Whether every column claims to be done."""
        return len(self._columns) == 0

    def scaled_weights(self) -> Tensor:
        """The weights in the scale of the caller."""
        return self.weights * self._system.scale

    def _preconditioned(self) -> Tensor:
        active = self._residual[:, self._columns]
        return active if self._inverse is None else self._inverse(active)

    def step(self) -> None:
        """One iteration: one product for all active columns."""
        directions = self._directions
        images = self._system.product(directions)
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
        self.norms[self._columns] = self._residual[:, self._columns].norm(dim=0)
        self._turn()

    def _turn(self) -> None:
        """The next directions, conjugate to the last ones."""
        self._directions = self._preconditioned()
        if self._last is not None:
            directions, images = self._last
            overlap = images.mT @ self._directions
            self._directions = self._directions.addmm(directions, overlap, alpha=-1.0)

    def release(self, tolerance: float) -> None:
        """Columns that claim the tolerance, or are lost to rounding, leave."""
        claimed = self.norms[self._columns]
        stay = (claimed > tolerance) & torch.isfinite(claimed)
        if not bool(stay.all()):
            self._columns = self._columns[stay]
            self._directions = self._directions[:, stay]

    def replace_residual(self, unsolved: Tensor) -> float:
        """Put true residuals in the recursion's place; the passes that took.

        Args:
            unsolved: Mask of the columns to do it for (k,).
        """
        columns = unsolved.nonzero()[:, 0]
        system, weights = self._system.columns(columns), self.weights[:, columns]
        residual, passes = _true_residual(system, weights, self.norms[columns])
        self._residual[:, columns] = residual
        norms = residual.norm(dim=0)
        self.norms[columns] = torch.where(torch.isfinite(norms), norms, torch.inf)
        return passes

    def readmit(self, unsolved: Tensor, best: Tensor) -> float:
        """Go on with the unsolved columns; the passes that took.

        The directions are kept: to restart them would throw away the conjugacy that
        ill-conditioned systems need. Columns lost to rounding start anew from the best
        weights.
        """
        self._columns = unsolved.nonzero()[:, 0]
        passes = 0.0
        lost = unsolved & ~torch.isfinite(self.norms)
        if bool(lost.any()):
            self.weights[:, lost] = best[:, lost]
            passes = self.replace_residual(lost)
            self._last = None
        if not self.is_done:
            self._turn()
        return passes

    def energy_gained(self) -> Tensor:
        """v^T (b + r) = -2 (1/2 v^T H v - v^T b): what CG increases, per column."""
        return (self.weights * (self._system.rhs + self._residual)).sum(0)


def _true_residual(
    system: System, weights: Tensor, believed: Tensor | None = None
) -> tuple[Tensor, float]:
    """B - H V, and the passes it took: in float64 where rounding shows.

    With norms ``believed`` so small that it will show, it is not tried without.
    """
    if (
        believed is not None
        and bool(torch.isfinite(believed).all())
        and rounding_shows(system, weights, believed)
    ):
        return float64_residual(system, weights).to(weights.dtype), 1.0
    residual = system.residual(weights)
    norms = residual.norm(dim=0)
    if bool(torch.isfinite(norms).all()) and rounding_shows(system, weights, norms):
        return float64_residual(system, weights).to(residual.dtype), 2.0
    return residual, 1.0


def _warnings(
    reason: Reason, system: System, weights: Tensor, norms: Tensor, tolerance: float
) -> tuple[str, ...]:
    if reason == "converged":
        return ()
    return (
        f"CG stopped ({reason}) with {int((norms > tolerance).sum())} of {len(norms)} "
        f"columns above the tolerance {tolerance:g}; the largest relative residual is "
        f"{float(norms.max()):.2e}. Give it more passes (max_passes), more neighbours "
        "or rank, or use Cholesky.",
        *float32_warnings(system, weights, tolerance),
    )
