"""Preconditioned conjugate gradients for many columns at once.

Every column runs its own recurrence (Hestenes & Stiefel, 1952) with its own
scalars; all of them share each product with K.

Deviations from the textbook:

1. The recursive residual drifts from the true one in finite precision: it is
   replaced by the true residual at regular intervals, and before convergence is
   claimed; the search direction is kept.
2. Columns that are done leave the product.
3. The best iterate of every column is what is returned, so that a column that
   loses its conjugacy in float32 cannot end worse than it was.
"""

from __future__ import annotations

import copy
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
from sgdgp.solvers.preconditioners import (
    Inverse,
    PivotedCholesky,
    Preconditioner,
    inverse_of,
)
from sgdgp.solvers.system import System, as_system, initial_weights

_REPLACE_EVERY = 50
_STALLED_CHECKS = 4
_STALLED_GAIN = 1e-5


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients; one pass over K per iteration.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        preconditioner: ``PivotedCholesky()`` (default), ``Nystrom()`` or None.
    """

    tolerance: float = 1e-2
    max_passes: float = 1000.0
    max_seconds: float | None = None
    preconditioner: Preconditioner | None = field(default_factory=PivotedCholesky)

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
        passes = 0.0
        apply: Inverse | None = None
        if self.preconditioner is not None:
            factor, passes = self.preconditioner.factor(system, generator)
            apply = inverse_of(factor, system)
        residual = system.rhs.clone()
        if initial is not None:
            residual = system.residual(best)
            passes += 1.0
        norms = residual.norm(dim=0)

        reason: Reason | None = None
        if float(norms.max()) <= self.tolerance:
            reason = "converged"
        run = _Recurrence(system, best, residual, torch.arange(len(norms)), apply)

        def weights() -> Tensor:
            now = best.clone()
            now[:, run.columns] = run.weights
            return now * system.scale

        stalled = 0
        while reason is None:
            before = run.energy_gained()
            for _ in range(_REPLACE_EVERY):
                running = norms.clone()
                running[run.columns] = run.step()
                passes += 1.0
                if record(passes, running, exact=False, weights=weights):
                    reason = "interrupted"
                if reason or self._is_due(running, run.columns, passes, record):
                    break
            exact = run.replace_residual()
            passes += 1.0
            better = exact < norms[run.columns]
            best[:, run.columns[better]] = run.weights[:, better]
            norms[run.columns[better]] = exact[better]
            if record(passes, norms, exact=True, weights=weights):
                reason = "interrupted"
            # The residual may rise for hundreds of iterations while the error in the
            # norm of H still falls: only the energy tells whether CG stands still.
            gained = run.energy_gained() - before
            moves = bool((gained > _STALLED_GAIN * run.energy_gained().abs()).any())
            stalled = 0 if moves or bool(better.any()) else stalled + 1
            if float(norms.max()) <= self.tolerance:
                reason = "converged"
            elif passes >= self.max_passes or self._out_of_time(record):
                reason = reason or "budget"
            elif stalled >= _STALLED_CHECKS:
                reason = reason or "stagnated"
            run = run.without(exact <= self.tolerance)
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=best * system.scale,
            residuals=norms,
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=_warnings(reason, norms, self.tolerance),
            settings={
                "preconditioner": repr(self.preconditioner),
                "rank": 0 if apply is None else apply.basis.shape[1],
            },
        )

    def _is_due(
        self, running: Tensor, columns: Tensor, passes: float, record: Recorder
    ) -> bool:
        """Whether the recursion claims an end that a true residual must confirm."""
        claimed = running[columns]
        return (
            not bool(torch.isfinite(claimed).all())
            or float(claimed.max()) <= self.tolerance
            or passes + 1.0 >= self.max_passes
            or self._out_of_time(record)
        )

    def _out_of_time(self, record: Recorder) -> bool:
        return self.max_seconds is not None and record.seconds >= self.max_seconds


class _Recurrence:
    """The conjugate-gradient recurrences of the columns still active."""

    def __init__(
        self,
        system: System,
        weights: Tensor,
        residual: Tensor,
        columns: Tensor,
        apply: Inverse | None,
    ) -> None:
        self.columns = columns.to(weights.device)
        self.weights = weights.clone()
        self._system = system.columns(self.columns)
        self._apply = apply
        self._residual = residual.clone()
        preconditioned = self._preconditioned()
        self._direction = preconditioned.clone()
        self._energy = (self._residual * preconditioned).sum(0)

    def _preconditioned(self) -> Tensor:
        return self._residual if self._apply is None else self._apply(self._residual)

    def step(self) -> Tensor:
        """One iteration; the recursive residual norms (k,)."""
        tiny = torch.finfo(self.weights.dtype).tiny
        image = self._system.product(self._direction)
        curvature = (self._direction * image).sum(0)
        # A direction without positive curvature is rounding noise: stand still.
        step = torch.where(curvature > tiny, self._energy / curvature, 0.0)
        step = torch.nan_to_num(step, 0.0, 0.0, 0.0)
        self.weights.addcmul_(self._direction, step)
        self._residual.addcmul_(image, -step)
        self._turn()
        return self._residual.norm(dim=0)

    def _turn(self) -> None:
        preconditioned = self._preconditioned()
        energy = (self._residual * preconditioned).sum(0)
        ratio = torch.nan_to_num(energy / self._energy, 0.0, 0.0, 0.0)
        self._direction.mul_(ratio).add_(preconditioned)
        self._energy = energy

    def replace_residual(self) -> Tensor:
        """Put the true residual in the recursion's place; its norms (k,).

        The direction is kept: restarting it would throw away the conjugacy that
        ill-conditioned systems need.
        """
        self._residual = self._system.residual(self.weights)
        norms = self._residual.norm(dim=0)
        self._energy = (self._residual * self._preconditioned()).sum(0)
        return torch.where(torch.isfinite(norms), norms, torch.inf)

    def energy_gained(self) -> Tensor:
        """v^T (b + r) = -2 (1/2 v^T H v - v^T b): what CG increases, per column."""
        return (self.weights * (self._system.rhs + self._residual)).sum(0)

    def without(self, done: Tensor) -> _Recurrence:
        """The recurrences of the columns that are not done."""
        if not bool(done.any()) or bool(done.all()):
            return self
        rest = ~done
        other = copy.copy(self)
        other.columns = self.columns[rest]
        other.weights = self.weights[:, rest]
        other._system = self._system.columns(rest)
        other._residual = self._residual[:, rest]
        other._direction = self._direction[:, rest]
        other._energy = self._energy[rest]
        return other


def _warnings(reason: Reason, norms: Tensor, tolerance: float) -> tuple[str, ...]:
    if reason == "converged":
        return ()
    return (
        f"CG stopped ({reason}) with {int((norms > tolerance).sum())} of {len(norms)} "
        f"columns above the tolerance {tolerance:g}; the largest relative residual is "
        f"{float(norms.max()):.2e}. Give it more passes (max_passes), a preconditioner "
        "of higher rank, float64 data, or use Cholesky.",
    )
