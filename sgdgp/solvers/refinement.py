"""Mixed precision: a solver at the speed of float32, residuals in float64.

Iterative refinement (Wilkinson, 1963; Higham, 2002, chapter 12): with R the true
residual, in float64,

    solve H E = R roughly in float32,   V <- V + E,   R <- B - H V,

until R is small. Every step gains the digits that the inner solve has, so the end is
as accurate as float64 allows, while all but one pass per step runs in float32.

Deviations from the textbook:

1. A step that does not reduce a column's residual is shortened to the length that
   reduces it most, a = <r, H e> / <H e, H e>; H e is known from the two residuals.
2. Columns that are done leave, and so do columns that two steps could not improve.
3. The inner operator is one for all steps, so that K is stored at most once, and the
   inner preconditioner is prepared once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    Limits,
    Progress,
    Reason,
    Recorder,
    Solution,
    Solver,
)
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.preconditioners import CachedPreconditioner
from sgdgp.solvers.system import System, as_system, in_float64, initial_weights

_GAIN = 0.9
_EASIEST = 0.5
_PATIENCE = 4
_MOST_USES = 10**9
_SHORTEST_SECONDS = 1e-3


@register_stored_class
@dataclass(frozen=True)
class Refined(Solver):
    """Refinement in float64 of what another solver finds in float32.

    Meant for float64 data. Of float32 data the weights are rounded to float32, and
    the residual reported is the one that rounding leaves.

    Attributes:
        solver: The inner solver; its own tolerance is what every step reduces the
            residual by. Its budgets hold for one step.
        tolerance: Relative residual that every column must reach.
        max_refinements: Steps.
        max_passes: Budget in passes over K, those of the inner solver included.
        max_seconds: Budget in seconds. Default: none.
    """

    solver: Solver = field(default_factory=CG)
    tolerance: float = 1e-8
    max_refinements: int = 50
    max_passes: float = 1000.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)
        check_positive("max_passes", self.max_passes)
        check_count("max_refinements", self.max_refinements, 1)
        _ = self.limits  # which checks the seconds
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"solver: expected a Solver, found {type(self.solver).__name__}"
            )

    @property
    def limits(self) -> Limits:
        """See ``Solver.limits``."""
        return Limits(self.tolerance, self.max_passes, self.max_seconds)

    def with_limits(self, limits: Limits) -> Refined:
        """See ``Solver.with_limits``."""
        return replace(
            self,
            tolerance=limits.tolerance or self.tolerance,
            max_passes=limits.max_passes or self.max_passes,
            max_seconds=limits.max_seconds,
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner solver's name, with what is done to it."""
        return f"refined:{self.solver.name}"

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
        given = as_system(operator, noise, rhs)
        record = Recorder(callback)
        run = _Refinement(given, initial_weights(given, initial))
        inner = _InnerSolver(self.solver, given, generator)
        passes = 0.0
        if initial is not None:
            run.start()
            passes += 1.0

        reason: Reason | None = None

        def watch(progress: Progress) -> bool:
            nonlocal reason
            # The inner residuals are relative to those that the step started from.
            estimate = run.norms.clone()
            estimate[run.open] *= progress.residuals.double()
            if record(
                passes + progress.passes,
                estimate,
                exact=False,
                weights=lambda: run.corrected(progress.weights()),
            ):
                reason = "interrupted"
            return reason is not None or patience.is_over(progress)

        steps = 0
        patience = _Patience()
        found: Mapping[str, Any] = {}
        run.open = run.norms > self.tolerance
        if not bool(run.open.any()):
            reason = "converged"
        while reason is None:
            worst = float(run.norms[run.open].max())
            patience = _Patience()
            step = inner.solve(
                run.scaled_residual(),
                _EASIEST * self.tolerance / worst,
                max(1.0, self.max_passes - passes - 1.0),
                self._seconds_left(record),
                watch,
            )
            found = found or step.settings
            steps += 1
            passes += step.passes
            passes += run.advance(step.weights)
            if record(passes, run.norms, exact=True, weights=run.weights):
                reason = "interrupted"
            run.open &= run.norms > self.tolerance
            if bool((run.norms <= self.tolerance).all()):
                reason = "converged"
            elif (
                steps >= self.max_refinements
                or passes + 2.0 > self.max_passes
                or record.is_past(self.max_seconds)
            ):
                reason = reason or "budget"
            elif not bool(run.open.any()):
                reason = reason or "stagnated"
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=run.weights(),
            residuals=run.norms.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=self._warnings(reason, run.norms, rhs.dtype),
            settings={**found, "inner": repr(self.solver), "refinements": steps},
        )

    def _seconds_left(self, record: Recorder) -> float | None:
        if self.max_seconds is None:
            return None
        return max(_SHORTEST_SECONDS, self.max_seconds - record.seconds)

    def _warnings(
        self, reason: Reason, norms: Tensor, dtype: torch.dtype
    ) -> tuple[str, ...]:
        if reason == "converged":
            return ()
        sentence = (
            f"Refinement stopped ({reason}) with {int((norms > self.tolerance).sum())} "
            f"of {len(norms)} columns above the tolerance {self.tolerance:g}; the "
            f"largest relative residual is {float(norms.max()):.2e}. "
        )
        if dtype != torch.float64:
            return (
                sentence + f"The weights are rounded to {dtype}: give float64 data.",
            )
        if reason == "stagnated":
            return (
                sentence + "float32 cannot solve this system at all: solve it in "
                "float64, with CG() or Cholesky().",
            )
        return (sentence + "Give it more passes (max_passes).",)


class _Refinement:
    """Weights in the caller's dtype and their residual in float64.

    Attributes:
        norms: True relative residuals (k,).
        open: The columns that are neither done nor given up (k,).
    """

    def __init__(self, given: System, initial: Tensor) -> None:
        self._dtype = given.rhs.dtype
        self._system = in_float64(given)
        self._weights = self._rounded(initial.double())
        self._residual = self._system.rhs.clone()
        self.norms = self._residual.norm(dim=0)
        self.open = self.norms > 0.0

    def _rounded(self, v: Tensor) -> Tensor:
        # What the caller gets back is what the residual must be true of.
        scale = self._system.scale
        return (v * scale).to(self._dtype).double() / scale

    def weights(self) -> Tensor:
        """The weights in the caller's scale and dtype."""
        return (self._weights * self._system.scale).to(self._dtype)

    def start(self) -> None:
        """Take the residual of a start that is not zero; one pass."""
        self._residual = self._system.residual(self._weights)
        self.norms = self._residual.norm(dim=0)

    def scaled_residual(self) -> Tensor:
        """Residuals of the open columns, with unit norm."""
        return self._residual[:, self.open] / self.norms[self.open]

    def corrected(self, step: Tensor) -> Tensor:
        """The caller's weights after a step of the open columns."""
        weights = self._weights.clone()
        weights[:, self.open] += step.double() * self.norms[self.open]
        return (weights * self._system.scale).to(self._dtype)

    def advance(self, step: Tensor) -> float:
        """Add a step to the open columns where it helps; the passes that took."""
        step = step.double() * self.norms[self.open]
        columns = self.open.nonzero()[:, 0]
        before = self.norms[columns]
        change, after = self._try(columns, step)
        passes = 1.0
        poor = ~(after <= _GAIN * before)
        if bool(poor.any()):
            change, step, columns = change[:, poor], step[:, poor], columns[poor]
            length = (self._residual[:, columns] * change).sum(0)
            length /= change.square().sum(0).clamp_min(torch.finfo(change.dtype).tiny)
            self._try(columns, step * torch.nan_to_num(length, 0.0, 0.0, 0.0))
            passes += 1.0
            # Neither the step nor its best length helped: nor would the same again.
            self.open[columns] = self.norms[columns] <= _GAIN * before[poor]
        return passes

    def _try(self, columns: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """H times the step, and the residuals after it; kept where they are less."""
        system = self._system.columns(columns)
        weights = self._weights[:, columns] + step
        weights = (weights * system.scale).to(self._dtype).double() / system.scale
        residual = system.residual(weights)
        norms = residual.norm(dim=0)
        change = self._residual[:, columns] - residual
        better = norms < self.norms[columns]
        kept = columns[better]
        self._weights[:, kept] = weights[:, better]
        self._residual[:, kept] = residual[:, better]
        self.norms[kept] = norms[better]
        return change, norms


class _Patience:
    """Ends a step that float32 takes no further: the next one starts afresh."""

    def __init__(self) -> None:
        self._checks = [1.0]

    def is_over(self, progress: Progress) -> bool:
        """Whether the true residuals of the step have stopped falling."""
        if not progress.exact:
            return False
        self._checks.append(float(progress.residuals.max()))
        # A residual that has not fallen at all may still do so for a while.
        back = 1 if self._checks[-1] <= _EASIEST else _PATIENCE
        if len(self._checks) <= back:
            return False
        return self._checks[-1] > _GAIN * self._checks[-1 - back]


class _InnerSolver:
    """The inner solver with one operator and one preconditioner for all steps."""

    def __init__(
        self, solver: Solver, given: System, generator: torch.Generator
    ) -> None:
        operator = given.operator
        if operator.dtype != torch.float32:
            operator = operator.unfilled().to(torch.float32)
        self._operator = operator
        noise = given.noise[:, 0].float()
        self._noise = noise.clamp_min(torch.finfo(torch.float32).tiny)
        self._generator = generator
        self._solver = solver
        if isinstance(solver, CG) and solver.preconditioner is not None:
            recipe = CachedPreconditioner(solver.preconditioner, _MOST_USES)
            self._solver = replace(solver, preconditioner=recipe)

    def solve(
        self,
        rhs: Tensor,
        remaining: float,
        max_passes: float,
        max_seconds: float | None,
        callback: Callback,
    ) -> Solution:
        """One step: ``rhs`` to the inner tolerance or what remains to be done."""
        own = self._solver.limits
        seconds = [s for s in (own.max_seconds, max_seconds) if s is not None]
        limits = Limits(
            min(_EASIEST, max(own.tolerance or 1e-2, remaining)),
            min(max_passes, own.max_passes or max_passes),
            min(seconds, default=None),
        )
        return self._solver.with_limits(limits).solve(
            self._operator,
            self._noise,
            rhs.float(),
            generator=self._generator,
            callback=callback,
        )
