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
   claimed; the directions are kept. Where convergence is expected, it shares the
   kernel entries of the last iteration. Where rounding shows in it, the true residual
   is evaluated in float64: that refines what float32 alone could not.
3. Columns that claim to be done leave the product at once, and come back should the
   true residual disagree. The directions they leave stay conjugate.
4. The best iterate of every column is what is returned, by its error in the norm of
   H as far as the energy resolves it, so that a column that loses its conjugacy in
   float32 cannot end worse than it was, and one out of budget keeps what it gained.
   A column that ends with a residual above one, and no energy either, is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
    Task,
    columns_above,
)
from sgdgp.solvers.preconditioners import Inverse, Preconditioner
from sgdgp.solvers.recycling import Collector, Directions, Recycled
from sgdgp.solvers.system import (
    System,
    float32_warnings,
    float64_residual,
    rounding_shows,
)
from sgdgp.solvers.two_level import TwoLevel

_REPLACE_EVERY = 50  # iterations between true residuals: a pass each, 2 % of the work
_FIRST_FALL = 0.3  # of the residual in the first iteration; later as in the one before
# Times the tolerance: a residual predicted to come so near is evaluated anew in the
# same iteration, where its product shares the entries of K.
_NEAR = 2.0
# Iterations whose time must be left for another one: it, with its true residual, and
# half of one, as they do not take the same time.
_LAST_STEPS = 2.5
# CG stagnates where so many checks in a row find an energy that has grown by less than
# this part, as the residual may rise for hundreds of iterations meanwhile, and no
# residual that has fallen below this part of the best.
_STALLED_GAIN, _STALLED_CHECKS, _FALLEN = 1e-5, 4, 0.9
# Of the energy, to tell iterates apart; below, float32 rounds and the residual decides.
_CLEAR_GAIN = 1e-3
# Times the rounding unit: smaller eigenvalues of a block's curvature, scaled to unit
# diagonal, are rounding.
_DEPENDENT = 16.0
_ADVICE = "Give it more passes (max_passes), more neighbours or rank, or use Cholesky."


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
        residual: B - H V (n, k) as the recursion knows it.
        norms: Norms of the residuals (k,), recursive or true.
        last: The latest H-orthonormal directions (n, c), and their images (n, c).
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
        self.residual = residual
        self._inverse = inverse
        self._known = known
        self._stay_orthogonal(slice(None))
        self.norms = self.residual.norm(dim=0)
        self._columns = active.nonzero()[:, 0]
        self._dependent = _DEPENDENT * torch.finfo(weights.dtype).eps
        self._directions = self._preconditioned()
        self.last: tuple[Tensor, Tensor] | None = None
        self.is_fresh = False

    @property
    def is_done(self) -> bool:
        """Whether every column claims to be done."""
        return len(self._columns) == 0

    def _preconditioned(self) -> Tensor:
        active = self.residual[:, self._columns]
        found = active if self._inverse is None else self._inverse(active)
        return found if self._known is None else self._known.conjugate(found)

    def _stay_orthogonal(self, columns: Tensor | slice) -> None:
        """Take what rounding brings back of the known directions out of residuals.

        New directions are conjugate to them, so nothing else ever would.
        """
        if self._known is not None:
            inner = self._known.directions.mT @ self.residual[:, columns]
            self.weights[:, columns] += self._known.directions @ inner
            self.residual[:, columns] -= self._known.images @ inner

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
            torch.sub(rhs, both[:, directions.shape[1] :], out=self.residual)
            self._stay_orthogonal(slice(None))
            self.norms = self.residual.norm(dim=0)
        self.is_fresh = rhs is not None
        # H-orthonormal directions: M = D^T H D, scaled to unit diagonal, inverted on
        # the part that rounding leaves of its spectrum.
        curvature = (directions.mT @ images).double()
        diagonal = curvature.diagonal().clamp_min(0.0)
        # A direction lost to overflow or rounding must not spoil the others, but
        # without it the recurrence has to start anew.
        finite = torch.isfinite(diagonal)
        usable = finite & (diagonal > torch.finfo(directions.dtype).tiny)
        # Masks wait for a GPU, and mostly everything is kept.
        all_finite, all_usable = torch.stack([finite.all(), usable.all()]).tolist()
        if not all_usable:
            directions, images = directions[:, usable], images[:, usable]
            diagonal, curvature = diagonal[usable], curvature[usable][:, usable]
        # One layout, whatever was dropped: products are the same to the last bit.
        directions, images = directions.contiguous(), images.contiguous()
        scale = diagonal.rsqrt()
        curvature = torch.nan_to_num(0.5 * (curvature + curvature.mT), 0.0, 0.0, 0.0)
        correlation = scale.unsqueeze(1) * curvature * scale
        values, vectors = torch.linalg.eigh(correlation)
        kept = values > self._dependent * max(1, len(values))
        if not bool(kept.all()):
            values, vectors = values[kept], vectors[:, kept]
        vectors = vectors.contiguous()
        turn = (scale.unsqueeze(1) * vectors / values.sqrt()).to(directions.dtype)
        directions, images = directions @ turn, images @ turn
        self.last = (directions, images) if all_finite else None
        step = directions.mT @ self.residual[:, self._columns]
        self.weights[:, self._columns] += directions @ step
        self.residual[:, self._columns] -= images @ step
        self._stay_orthogonal(self._columns)
        self.norms[self._columns] = self.residual[:, self._columns].norm(dim=0)
        self._turn()

    def _turn(self) -> None:
        """The next directions, conjugate to the last ones."""
        self._directions = self._preconditioned()
        if self.last is not None:
            directions, images = self.last
            overlap = images.mT @ self._directions
            self._directions = self._directions.addmm(directions, overlap, alpha=-1.0)

    def release(self, unsolved: Tensor) -> None:
        """Leave the columns that are not ``unsolved`` (k,), or are lost to rounding."""
        stay = (unsolved & torch.isfinite(self.norms))[self._columns]
        if not bool(stay.all()):
            self._columns = self._columns[stay]
            self._directions = self._directions[:, stay]

    def adopt(self, columns: Tensor, residual: Float[Tensor, "n c"]) -> None:
        """Put true residuals (n, c) of some columns in the place of the recursion's."""
        self.residual[:, columns] = residual
        norms = residual.norm(dim=0)
        self.norms[columns] = torch.where(torch.isfinite(norms), norms, torch.inf)

    def forget(self) -> None:
        """Start the directions anew at the next ``resume``."""
        self.last = None

    def resume(self, unsolved: Tensor) -> None:
        """Go on with these columns (mask, (k,)), conjugate to the last directions."""
        self._columns = unsolved.nonzero()[:, 0]
        if not self.is_done:
            self._turn()

    def energy_gained(self, rhs: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        """v^T (b + r) = -2 (1/2 v^T H v - v^T b): what CG increases, per column."""
        return (self.weights * (rhs + self.residual)).sum(0)


@register_stored_class
@dataclass(frozen=True)
class CG(IterativeSolver):
    """Block conjugate gradients; one pass over K per iteration.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        preconditioner: ``TwoLevel()`` (default), ``PivotedCholesky()``,
            ``Nystrom()`` or None.
        recycle: Directions to keep in ``Solution.recycled``, with preconditioner and
            residuals, for the same matrix with more rows. Default: none of that.
    """

    preconditioner: Preconditioner | None = field(default_factory=TwoLevel)
    recycle: int = field(default=0, repr=False)

    name = "cg"

    @property
    def resumes(self) -> bool:
        return type(self) is CG

    def with_recycling(self, directions: int) -> CG:
        return replace(self, recycle=directions)

    def _solve(self, task: Task) -> Solution:
        record, system = Recorder(task.callback), task.system
        weights, residual = torch.zeros_like(system.rhs), system.rhs.clone()
        passes = 0.0
        if task.initial is not None:
            weights = task.initial
            residual, passes = _true_residual(system, weights)

        inverse: Inverse | None = None
        solved = float(residual.norm(dim=0).max()) <= self.tolerance
        if (
            not solved
            and self.preconditioner is not None
            # What is left must pay for an iteration and the true residual behind it.
            and self.preconditioner.cost(system.n) + passes + 2.0 <= self.max_passes
        ):
            inverse = self.preconditioner.prepare(system, task.generator)
            passes += inverse.passes
        return self._iterate(system, weights, residual, inverse, None, passes, record)

    def resume(
        self,
        system: System,
        weights: Float[Tensor, "n k"],
        residual: Float[Tensor, "n k"],
        inverse: Inverse | None,
        known: Directions | None,
        callback: Callback | None = None,
    ) -> Solution:
        """Go on from weights whose residual is known; no recipe, no product for it.

        Args:
            system: The system.
            weights: V in the system's scale (n, k).
            residual: B - H V of them (n, k).
            inverse: Preconditioner.
            known: Directions to stay conjugate to.
            callback: Called as the solve advances; True stops it.
        """
        record = Recorder(callback)
        weights, residual = weights.clone(), residual.to(weights.dtype).clone()
        return self._iterate(system, weights, residual, inverse, known, 0.0, record)

    def _iterate(
        self,
        system: System,
        best: Tensor,
        residual: Tensor,
        inverse: Inverse | None,
        known: Directions | None,
        passes: float,
        record: Recorder,
    ) -> Solution:
        """Iterate until every column is done; ``best`` becomes the solution."""
        norms = residual.norm(dim=0)
        best_residual = residual.clone() if self.recycle else None
        reason: Reason | None = None
        if float(norms.max()) <= self.tolerance:
            reason = "converged"
        collector = Collector(self.recycle, known)
        run = BlockRecurrence(
            system.product, best, residual, inverse, norms > self.tolerance, known
        )

        energy = run.energy_gained(system.rhs)
        stalled = 0
        while reason is None:
            fall, step_seconds = _FIRST_FALL, 0.0
            largest = float(run.norms.max())
            for _ in range(_REPLACE_EVERY):
                began = record.seconds
                near = largest * fall <= _NEAR * self.tolerance
                last = passes + 2.0 > self.max_passes or (
                    self.max_seconds is not None
                    and began + _LAST_STEPS * step_seconds > self.max_seconds
                )
                run.step(system.rhs if near or last else None)
                step_seconds = record.seconds - began
                before_step, largest = largest, float(run.norms.max())
                fall = min(1.0, largest / before_step)
                collector.add(run.last)
                passes += 1.0
                run.release(run.norms > self.tolerance)
                if record(
                    passes,
                    run.norms,
                    exact=False,
                    weights=lambda: run.weights * system.scale,
                ):
                    reason = "interrupted"
                if (
                    reason
                    or run.is_done
                    or last
                    or passes + 1.0 > self.max_passes
                    or record.is_past(self.max_seconds)
                ):
                    break
            passes += _replace_residual(run, system, norms > self.tolerance)
            reached = run.energy_gained(system.rhs)
            better = _better(run.norms, norms, reached, energy)
            # The residual may rise for hundreds of iterations while the error in the
            # norm of H still falls: then the energy tells that CG does not stand still.
            gains = (reached - energy) > _STALLED_GAIN * reached.abs()
            moves = bool((gains | (run.norms < _FALLEN * norms)).any())
            energy = torch.where(better, reached, energy)
            best[:, better] = run.weights[:, better]
            if best_residual is not None:
                best_residual[:, better] = run.residual[:, better]
            norms = torch.where(better, run.norms, norms)
            if record(passes, norms, exact=True, weights=lambda: best * system.scale):
                reason = "interrupted"
            stalled = 0 if moves else stalled + 1
            if float(norms.max()) <= self.tolerance:
                reason = "converged"
            elif (
                last
                or passes + 1.0 > self.max_passes
                or record.is_past(self.max_seconds)
            ):
                reason = reason or "budget"
            elif stalled >= _STALLED_CHECKS:
                reason = reason or "stagnated"
            if reason is None:
                passes += _readmit(run, system, norms > self.tolerance, best)
        norms, lost = _without_lost(system, best, norms)
        recycled = None
        if best_residual is not None:
            best_residual[:, lost] = system.rhs[:, lost]
            recycled = Recycled(best_residual * system.scale, inverse, collector.pairs)
        warnings = columns_above("CG", reason, norms, self.tolerance, _ADVICE)
        if warnings:
            warnings += float32_warnings(system, best, self.tolerance)
        return Solution(
            solver=self.name,
            operator=system.operator.name,
            weights=best * system.scale,
            residuals=norms,
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=warnings,
            settings={
                "preconditioner": repr(self.preconditioner),
                **({} if inverse is None else inverse.settings),
            },
            recycled=recycled,
        )


def _better(norms: Tensor, old: Tensor, energy: Tensor, old_energy: Tensor) -> Tensor:
    """Mask of the columns whose error has become smaller (k,).

    That is measured in the norm of H, where the energy tells it apart; the residual
    may be larger meanwhile. Close to the solution only the residual tells.
    """
    gain = energy - old_energy
    clear = _CLEAR_GAIN * torch.maximum(energy.abs(), old_energy.abs())
    by_residual = (norms < old) & (gain >= -clear)
    return (by_residual | (gain > clear)) & torch.isfinite(norms)


def _without_lost(
    system: System, weights: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Zero for columns worse than that in both norms; residuals, and a mask of them.

    The energy of a column whose residual has risen is taken anew, in float64.
    """
    risen = norms > 1.0
    if bool(risen.any()):
        v = (weights[:, risen] * system.scale[risen]).double() / system.scale[risen]
        wide = system.columns(risen).to(torch.float64)
        energy = (v * (wide.rhs + wide.residual(v))).sum(0)
        risen[risen.clone()] = ~(energy > 0.0)
        weights[:, risen] = 0.0
        norms = torch.where(risen, system.rhs.norm(dim=0), norms)
    return norms, risen


def _replace_residual(run: BlockRecurrence, system: System, unsolved: Tensor) -> float:
    """Put true residuals of unsolved columns (k,) in their place; the passes taken."""
    if run.is_fresh and not rounding_shows(system, run.weights, run.norms):
        return 0.0
    columns = unsolved.nonzero()[:, 0]
    weights = run.weights[:, columns]
    residual, passes = _true_residual(
        system.columns(columns), weights, run.norms[columns]
    )
    run.adopt(columns, residual)
    return passes


def _readmit(
    run: BlockRecurrence, system: System, unsolved: Tensor, best: Tensor
) -> float:
    """Go on with the unsolved columns; the passes that took.

    The directions are kept: to restart them would throw away the conjugacy that
    ill-conditioned systems need. Columns lost to rounding start anew from the best
    weights.
    """
    passes = 0.0
    lost = unsolved & ~torch.isfinite(run.norms)
    if bool(lost.any()):
        run.weights[:, lost] = best[:, lost]
        passes = _replace_residual(run, system, lost)
        run.forget()
    run.resume(unsolved)
    return passes


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
