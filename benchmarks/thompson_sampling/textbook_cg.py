"""The papers' competitor: textbook conjugate gradients, one Krylov space per column.

Preconditioned by pivoted Cholesky of rank 100 and stopped by the clock (Hestenes &
Stiefel, 1952; Gardner et al., NeurIPS 2018). GPyTorch's ``linear_cg`` is the same
recurrence, but cannot be stopped by a clock. Products with K, the copy of K in memory
and the preconditioner are sgdgp's, as for every other solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
)
from sgdgp.solvers.preconditioners import PivotedCholesky
from sgdgp.solvers.system import as_system, initial_weights


@dataclass(frozen=True)
class TextbookCG(IterativeSolver):
    """Conjugate gradients of every column on its own.

    It returns its last iterate, whatever the residual: the error in the norm of the
    matrix falls in every iteration, while the residual may rise above its start.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds; what is reported of the solve comes after.
        rank: Of the preconditioner.
    """

    tolerance: float = 1e-3
    rank: int = 100

    name = "textbook_cg"

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
        weights = initial_weights(system, initial)
        inverse = PivotedCholesky(rank=self.rank).prepare(system, generator)
        passes, iterations = inverse.passes, 0
        residual = system.rhs.clone()
        if initial is not None:
            residual, passes = system.residual(weights), passes + 1.0
        z = inverse(residual)
        direction = z.clone()
        energy = (residual * z).sum(0)
        reason: Reason | None = None
        while reason is None:
            if float(residual.norm(dim=0).max()) <= self.tolerance:
                reason = "converged"
            elif passes + 1.0 > self.max_passes or record.is_past(self.max_seconds):
                reason = "budget"
            else:
                product = system.product(direction)
                passes, iterations = passes + 1.0, iterations + 1
                length = _ratio(energy, (direction * product).sum(0))
                weights = weights.addcmul(direction, length)
                residual.addcmul_(product, length, value=-1.0)
                z = inverse(residual)
                before, energy = energy, (residual * z).sum(0)
                direction = z.addcmul_(direction, _ratio(energy, before))
        seconds = record.seconds
        norms = system.residual(weights).norm(dim=0)
        record(passes, norms, exact=True, weights=lambda: weights * system.scale)
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=weights * system.scale,
            residuals=norms,
            passes=passes,
            seconds=seconds,
            reason=reason,
            history=tuple(record.history),
            settings={"rank": self.rank, "iterations": iterations},
        )


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Quotients, zero where rounding has left nothing to divide by."""
    fits = below > 0
    return torch.where(fits, above / torch.where(fits, below, 1.0), 0.0)
