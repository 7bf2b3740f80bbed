"""Stochastic dual descent (Lin et al., ICLR 2024, arXiv:2310.20581).

Minimises the dual objective 1/2 tr V^T H V - tr V^T B, H = K + Sigma, over random
blocks I of coordinates with look-ahead momentum and iterate averaging:

    e = a + rho v
    g = D[I]^-1 (H[I, :] e - B[I])
    v <- rho v - beta (n / b) scatter_I(g)
    a <- a + v
    average <- average + w_t (e - average),   w_t = (k + 1) / (t + k),  k = 100

Deviations from the paper:

1. Coordinates are scaled by D = diag(H), a constant for stationary kernels; step
   size and momentum come from spectral estimates. Momentum grows during the solve,
   and the step shrinks with it (``step_size.py``).
2. The data are shuffled once and cut into fixed blocks, visited in a new random
   order on every pass: rows of a block are contiguous, so an in-memory kernel is
   never copied, and a memory of a pass or more hardly sees the sampling noise.
3. ``a`` and ``v`` are never updated densely. With c = rho / (1 - rho), z = a + c v
   and u = v / rho^t change only on the block; e = z - (c - rho) rho^t u.
4. The averaging weight needs no horizon; it equals the paper's 100 / T at t = T.
5. -D g is the residual on the block: its norm over the last quarter of a pass is an
   estimate of the residual for nothing. It triggers a true residual check; only that
   can end the solve, and dismisses the columns that are done.
6. A residual that grows halves the step and restarts from the best iterate.
7. Where K = phi phi^T with exact features, phi^T z and phi^T u move with z and u: a
   step evaluates b rows forward and b rows back, and a pass is n of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.checks import check_number
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.base import Reason
from sgdgp.solvers.blocks import shuffle
from sgdgp.solvers.driver import Algorithm, StochasticSolver, Task, check_steps
from sgdgp.solvers.iterates import PROGRESS, BlockIterate
from sgdgp.solvers.step_size import StepRule, estimate_spectrum, step_rule
from sgdgp.solvers.stopping import rounding_floor

_GROWTH = 5.0  # of the residual beyond the best, as a reason to restart
_FEWEST_RECENT = 4  # blocks behind a running residual: fewer are a small sample


@register_stored_class
@dataclass(frozen=True)
class SDD(StochasticSolver):
    """Stochastic dual descent; nothing needs to be set.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Coordinates per step. Default: chosen from n.
        momentum: rho in [0, 1). Default: from the spectrum, growing with the passes.
        step_size: beta of the scaled dual gradient; the papers' step size is beta n
            over the kernel's diagonal. Default: a fraction of the stability limit.
        averaging: Window of the iterate average, as a fraction of the steps so far.
    """

    block_size: int | None = None
    momentum: float | None = None
    step_size: float | None = None
    averaging: float = 0.01

    name = "sdd"
    title = "SDD"
    advice = "Give it more passes (max_passes), float64 data, or use CG or Cholesky."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.block_size, self.momentum, self.step_size)
        check_number("averaging", self.averaging)
        if not 0 < self.averaging <= 1:
            raise ValueError(f"averaging: expected (0, 1], found {self.averaging}")

    def begin(self, task: Task) -> Algorithm[Any]:
        return _DualDescent(self, task)


def default_block_size(n: int) -> int:
    """Points per step when none are asked for, of n."""
    return min(512, max(64, n // 64))


class _DualDescent(Algorithm[SDD]):
    """The recurrence of this module at work, in Z = A + c V and U = V / rho^t."""

    def __init__(self, solver: SDD, task: Task) -> None:
        n, outputs = task.system.n, task.system.operator.outputs_per_input
        size = solver.block_size or outputs * default_block_size(n // outputs)
        data = shuffle(task.system, size, task.generator)
        self._spectrum = estimate_spectrum(data.system, task.generator)
        super().__init__(solver, task, data, self._spectrum.passes)
        start = self.checked.weights
        self._iterate = BlockIterate(self.system, start)
        self._best, self._best_norms = start.clone(), self.residual.norm(dim=0)
        self._passes_since_start = 0
        self._rule = self._rule_after(1.0)
        last = self._rule_after(solver.max_passes)
        self.watch(1.0 / (1.0 - last.momentum) / self.num_blocks)

    def _rule_after(self, passes: float) -> StepRule:
        """Step size and momentum after some passes since the start."""
        size, momentum = self.data.block_size, self.solver.momentum
        rule = step_rule(self._spectrum, size, passes, momentum=momentum)
        step_size = self.solver.step_size or rule.step_size
        return StepRule(step_size / 2.0**self.restarts, rule.momentum)

    def blocks(self) -> Iterator[RowIndex]:
        """Every block once, with the step and momentum of this pass."""
        self._passes_since_start += 1
        old = self._rule.momentum
        self._rule = self._rule_after(float(self._passes_since_start))
        new = self._rule.momentum
        if new != old:
            self._iterate.shift(_ahead(new) - _ahead(old), _ahead(new) - new)
        self._visited: list[RowIndex] = []
        return super().blocks()

    def visit(self, block: RowIndex) -> Tensor:
        self._visited.append(block)
        self._gradient = self._iterate.gradient(block)
        self.residual[block] = -self._gradient
        self.passes += len(self._gradient) / self.system.n
        return self._gradient

    def step(self, block: RowIndex) -> None:
        rho, beta = self._rule.momentum, self._rule.step_size * self.num_blocks
        self._iterate.step(
            block,
            self._gradient / self._spectrum.diagonal[block],
            z_step=beta / (1.0 - rho),
            u_step=beta,
            momentum=rho,
            lag=_ahead(rho) - rho,
        )
        averaging = self.solver.averaging
        self._iterate.accumulate(averaging, power=1.0 / averaging)

    def end_pass(self) -> None:
        """Residual norms as the last quarter of a pass has seen them."""
        last = self._visited[-max(_FEWEST_RECENT, len(self._visited) // 4) :]
        seen = [self.residual[block] for block in last]
        squares = torch.stack([part.square().sum(0) for part in seen]).sum(0)
        rows = sum(len(part) for part in seen)
        self.see((squares * (self.system.n / rows)).sqrt())

    def has_grown(self) -> bool:
        """Whether the residual is far above the best; keeps the best iterate."""
        norms = self.residual.norm(dim=0)
        now, best = float(norms.norm()), float(self._best_norms.norm())
        if now < PROGRESS * best:
            self._best_norms = norms
            self._best.copy_(self._iterate.average)
        return not now <= _GROWTH * best

    def restart(self) -> None:
        """Half the step from the best iterate, at rest."""
        super().restart()
        self._passes_since_start = 0
        self.passes += self.adjoint_cost
        self._iterate.restart(self._best)
        self.see(self._best_norms)

    def weights(self) -> Tensor:
        return self._iterate.average

    def keep(self, rest: Tensor) -> None:
        self._iterate.keep(rest)
        self._best = self._best[:, rest].contiguous()
        self._best_norms = self._best_norms[rest]

    def settings(self) -> dict[str, Any]:
        return {
            "block_size": self.data.block_size,
            "momentum": self._rule.momentum,
            "step_size": self._rule.step_size,
            "averaging": self.solver.averaging,
            "restarts": self.restarts,
            "largest_eigenvalue": self._spectrum.largest,
        }

    def column_warnings(self, reason: Reason) -> tuple[str, ...]:
        """See ``Algorithm.column_warnings``; says so where rounding is to blame."""
        sentences = super().column_warnings(reason)
        spectrum, tolerance = self._spectrum, self.solver.tolerance
        weights = self.checked.weights
        floor = rounding_floor(spectrum.largest, spectrum.diagonal, weights)
        if sentences and tolerance < floor:
            sentences += (
                f"Rounding alone leaves a relative residual of about {floor:.0e} in "
                f"this precision, above the tolerance {tolerance:g}: give float64 "
                "data or a larger tolerance.",
            )
        return sentences


def _ahead(momentum: float) -> float:
    """The c = rho / (1 - rho) of Z."""
    return momentum / (1.0 - momentum)
