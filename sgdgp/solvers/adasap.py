"""Accelerated sketch-and-project, ADASAP (Rathore et al., 2025, arXiv:2505.13723).

Nesterov's method on random blocks I of equations, preconditioned by P ~ H[I, I],
H = K + Sigma, with the step eta = 1 / lambda_max(P^-1 H[I, I]):

    d = P^-1 (H[I, :] Y - B[I])
    W <- Y - eta scatter_I(d)
    V <- beta V + (1 - beta) Y - gamma eta scatter_I(d)
    Y <- alpha V + (1 - alpha) W

    beta = 1 - sqrt(mu / nu), gamma = 1 / sqrt(mu nu), alpha = 1 / (1 + gamma nu)
    nu = n / b, mu = min(sigma^2, 1 / nu)

P is a randomised Nystrom approximation of the block, or the block itself (SAP).

Deviations from the paper:

1. Every pass is a new random partition of the equations: no row waits for more than
   two passes. Measured (n = 3,000, Matern-3/2, sigma^2 = 0.1, exact blocks of 50): a
   residual of 1e-2 after 10 passes, 15 with independent blocks as in the paper, more
   than 40 with one fixed partition.
2. sigma^2 in mu is the mean of the noise over the diagonal of H, so that no scale of
   the kernel matters, and mu is at least a tenth of 1 / nu. Measured (n = 2,000,
   lengthscale 3, sigma^2 = 1e-4): 15 passes to 1e-2 instead of 36.
3. W, V and Y are never updated densely. With q = sqrt(mu / nu), D = V - Y decays by
   (1 - q) / (1 + q) per step and Z = Y + (1 - q) / 2 D stands still, but for the block:
   Z <- Z - (gamma + 1) / 2 eta d,  D <- ... - (gamma - 1) / (1 + q) eta d.
4. Averaging over the tail (in the paper's theory, not in its experiments) needs no
   horizon: its weights favour the last ``averaging`` of the steps.
5. -P d is the residual on the block: kept, it is a running residual for nothing. It
   triggers a true residual; only that can end the solve, and dismisses columns.
6. Where K = phi phi^T with exact features, phi^T Z and phi^T D move with Z and D: a
   step evaluates b rows forward and b back, and the features of the block.
7. A residual that grows halves the step, raises mu tenfold (less momentum) and
   restarts from the best iterate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.adasap_parameters import Acceleration, default_mu
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
)
from sgdgp.solvers.block_preconditioners import BlockPreconditioner, NystromBlocks
from sgdgp.solvers.blocks import BestChecked, fresh_partition
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import (
    System,
    accurate_residual,
    as_system,
    believed_norms,
    initial_weights,
    true_residual,
)

_MAX_RESTARTS = 20
_UNDERFLOW = 1e-12


@dataclass(frozen=True)
class ADASAP(IterativeSolver):
    """Accelerated sketch-and-project; nothing needs to be set.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Equations per step. Default: n / 100, at least 64.
        preconditioner: ``NystromBlocks()`` (default) or ``ExactBlocks()``.
        mu: Strong convexity that is assumed. Default: from the noise.
        nu: Smoothness that it assumes, at least one. Default: the number of blocks.
        averaging: Last part of the steps that is averaged, in (0, 1]. Default: none.
    """

    block_size: int | None = None
    preconditioner: BlockPreconditioner = field(default_factory=NystromBlocks)
    mu: float | None = None
    nu: float | None = None
    averaging: float | None = None

    name = "adasap"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)
        if not isinstance(self.preconditioner, BlockPreconditioner):
            raise TypeError(
                f"preconditioner: expected NystromBlocks(), found {self.preconditioner}"
            )
        if self.mu is not None:
            check_positive("mu", self.mu)
        if self.nu is not None and not 1 <= self.nu < math.inf:
            raise ValueError(f"nu: expected at least one, found {self.nu}")
        if self.averaging is not None and not 0 < self.averaging <= 1:
            raise ValueError(f"averaging: expected (0, 1], found {self.averaging}")

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
        start = initial_weights(system, initial)
        record = Recorder(callback)
        n = system.n
        size = min(n, self.block_size or default_block_size(n))
        num_blocks = math.ceil(n / size)
        nu = self.nu or float(num_blocks)
        acceleration = Acceleration(
            min(self.mu or default_mu(system, nu), 1.0 / nu), nu
        )

        residual = system.rhs
        # With features the iterate has an image: one adjoint on all rows.
        image_cost = 0.5 if operator.has_features else 0.0
        passes = image_cost  # and the diagonal is made from features
        if initial is not None:
            residual = true_residual(system, start)
            passes += 1.0 + image_cost
        best = BestChecked(start, residual.norm(dim=0))
        # Momentum remembers 1 / (2 q) steps: no verdict before that has faded.
        patience = max(300.0, 10.0 / acceleration.q / num_blocks)
        monitor = Monitor(self.tolerance, best.norms, patience)
        work = _Work(system, start, residual, acceleration, self.averaging)
        work.dismiss(best.norms <= self.tolerance)
        norms = best.norms.clone()
        scale, restarts = 1.0, 0

        def weights() -> Tensor:
            return best.with_columns(work.live, work.current()) * system.scale

        def is_out_of_budget() -> bool:
            # The true residual at the end is part of the budget.
            return passes + 1.0 >= self.max_passes or record.is_past(self.max_seconds)

        reason: Reason | None = None
        if best.is_within(self.tolerance):
            reason = "converged"
        while reason is None:
            diverged = False
            for block in fresh_partition(system, size, generator):
                gradient = work.gradient(block)
                diverged = monitor.is_diverging(gradient, num_blocks)
                if diverged or is_out_of_budget():
                    break
                step = self.preconditioner.step(system, block, generator)
                work.step(block, step(gradient).mul_(scale))
                part = len(block) / n
                passes += part * (1.0 + (0.5 if operator.has_features else part))
            norms[work.live] = work.residual.norm(dim=0).double()
            diverged = diverged or not bool(torch.isfinite(norms).all())
            exact = False
            if diverged:
                restarts += 1
                scale /= 2.0
                acceleration = acceleration.calmer()
                residual = true_residual(system, best.weights)
                passes += 1.0 + image_cost
                work = _Work(
                    system, best.weights, residual, acceleration, self.averaging
                )
                norms = best.norms.clone()
                work.dismiss(norms <= self.tolerance)
                monitor.forget()
                if restarts > _MAX_RESTARTS:
                    reason = "diverged"
            elif is_out_of_budget() or monitor.wants_check(norms[work.live], passes):
                exact = True
                candidate = best.with_columns(work.live, work.current())
                residual = true_residual(system, candidate)
                norms = believed_norms(system, candidate, residual)
                passes += 1.0
                best.offer(candidate, norms)
                reason = monitor.verdict(norms, passes)
            if record(
                passes, norms.to(rhs.dtype, copy=True), exact=exact, weights=weights
            ):
                reason = reason or "interrupted"
            if exact:
                work.dismiss(norms[work.live] <= self.tolerance)
            if is_out_of_budget():
                reason = reason or "budget"
            if reason is not None and not exact and not diverged:
                candidate = best.with_columns(work.live, work.current())
                best.offer(candidate, accurate_residual(system, candidate))
                passes += 1.0

        if best.is_within(self.tolerance):
            reason = "converged"
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=best.weights * system.scale,
            residuals=best.norms.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=_warnings(reason, best.norms, self.tolerance, restarts),
            settings={
                "block_size": size,
                "preconditioner": repr(self.preconditioner),
                "mu": acceleration.mu,
                "nu": acceleration.nu,
                "averaging": self.averaging,
                "step_scale": scale,
                "restarts": restarts,
            },
        )


class _Work:
    """Z and D of the columns still worked on, with updates only on the block."""

    def __init__(
        self,
        system: System,
        start: Tensor,
        residual: Tensor,
        acceleration: Acceleration,
        averaging: float | None,
    ) -> None:
        q, gamma = acceleration.q, acceleration.gamma
        self._system = system
        self._rho = (1.0 - q) / (1.0 + q)
        self._lag = (1.0 - q) / 2.0
        self._z_step = (gamma + 1.0) / 2.0
        self._d_step = (gamma - 1.0) / (1.0 + q)
        self._averaging = averaging
        self._steps = 0
        self._decay = 1.0
        self.live = torch.arange(start.shape[1], device=start.device)
        self._rhs = system.rhs
        self.residual = residual.to(start.dtype, copy=True)
        self._z = system.operator.tracked(start)
        self._u = self._z.zeros_like()
        self._y = self._z.clone()
        self._average = start.clone()

    def dismiss(self, done: Tensor) -> None:
        """Leave the columns that are done."""
        if not bool(done.any()):
            return
        rest = ~done
        self.live = self.live[rest]
        for name in ("_rhs", "residual", "_average"):
            setattr(self, name, getattr(self, name)[:, rest])
        for name in ("_z", "_u", "_y"):
            setattr(self, name, getattr(self, name).columns(rest))

    def gradient(self, block: Tensor) -> Tensor:
        """H[I, :] Y - B[I], minus the residual of the block."""
        system = self._system
        gradient = system.operator.rows_of_product(block, self._y)
        gradient.addcmul_(system.noise[block], self._y.values[block])
        gradient.sub_(self._rhs[block])
        self.residual[block] = -gradient
        return gradient

    def step(self, block: Tensor, direction: Tensor) -> None:
        """One accelerated step along -``direction`` (b, k) on a block."""
        move = self._system.operator.move(block, direction)
        if self._decay < _UNDERFLOW:
            self._u.scale(self._decay)
            self._decay = 1.0
        self._decay *= self._rho
        self._z.move(move, -self._z_step)
        if self._d_step > 0.0 and self._decay > 0.0:
            self._u.move(move, -self._d_step / self._decay)
        self._y.set_to_difference(self._z, self._u, self._lag * self._decay)
        self._steps += 1
        if self._averaging is not None:
            self._accumulate(1.0 / self._averaging)

    def _accumulate(self, k: float) -> None:
        # The window is t / k steps long: every t / (4 k)-th of them will do.
        stride = max(1, int(self._steps / (4.0 * k)))
        if self._steps % stride == 0:
            weight = min(1.0, k * stride / (self._steps + k - 1.0))
            self._average.lerp_(self._y.values, weight)

    def current(self) -> Tensor:
        """What would be returned now (n, k), of the columns still worked on."""
        return self._y.values if self._averaging is None else self._average


def default_block_size(n: int) -> int:
    """Equations per step when none are asked for: the paper's n / 100."""
    return min(10_000, max(64, n // 100))


def _warnings(
    reason: Reason, norms: Tensor, tolerance: float, restarts: int
) -> tuple[str, ...]:
    warnings = []
    if reason != "converged":
        warnings.append(
            f"ADASAP stopped ({reason}) with {int((norms > tolerance).sum())} of "
            f"{len(norms)} columns above the tolerance {tolerance:g}; the largest "
            f"relative residual is {float(norms.max()):.2e}. Give it more passes "
            "(max_passes), ExactBlocks(), float64 data, or use CG or Cholesky."
        )
    if restarts:
        warnings.append(
            f"ADASAP met a growing residual, halved its step size {restarts} times and "
            "lowered its momentum. A larger mu or block_size avoids it."
        )
    return tuple(warnings)
