"""Stochastic dual descent (Lin et al., ICLR 2024, arXiv:2310.20581).

Minimises the dual objective 1/2 tr V^T H V - tr V^T B, H = K + Sigma, over random
blocks I of coordinates with look-ahead momentum and iterate averaging:

    e = a + rho v
    g = D[I]^-1 (H[I, :] e - B[I])
    v <- rho v - beta (n / b) scatter_I(g)
    a <- a + v
    average <- average + w_t (e - average),   w_t = 101 / (t + 100)

Deviations from the paper:

1. Coordinates are scaled by D = diag(H), a constant for stationary kernels; step
   size and momentum come from spectral estimates (``step_size.py``).
2. The data are shuffled once and cut into fixed blocks, visited in a new random
   order on every pass: rows of a block are contiguous, so an in-memory kernel is
   never copied. Measured passes are the same as with fresh random blocks.
3. ``a`` and ``v`` are never updated densely. With c = rho / (1 - rho), z = a + c v
   and u = v / rho^t change only on the block; e = z - (c - rho) rho^t u.
4. The averaging weight needs no horizon; it equals the paper's 100 / T at t = T.
5. -D g is the residual on the block: kept, it is a running residual estimate for
   nothing. It triggers a true residual check, and only that can end the solve.
6. A residual that grows halves the step and restarts from the best iterate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_count, check_positive
from sgdgp.operators.base import KernelOperator, row_slices
from sgdgp.solvers.base import (
    Callback,
    Reason,
    Recorder,
    Solution,
    Solver,
    check_limits,
)
from sgdgp.solvers.step_size import Spectrum, StepRule, estimate_spectrum, step_rule
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import (
    System,
    accurate_residual,
    as_system,
    initial_weights,
)

_MAX_RESTARTS = 20
_UNDERFLOW = 1e-12


@dataclass(frozen=True)
class SDD(Solver):
    """Stochastic dual descent; nothing needs to be set.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Coordinates per step. Default: chosen from n.
        momentum: rho in [0, 1). Default: set from the spectrum.
        step_size: beta of the scaled dual gradient; the papers' step size is beta n
            over the kernel's diagonal. Default: half of the stability limit.
    """

    tolerance: float = 1e-2
    max_passes: float = 1000.0
    max_seconds: float | None = None
    block_size: int | None = None
    momentum: float | None = None
    step_size: float | None = None

    name = "sdd"

    def __post_init__(self) -> None:
        check_limits(self.tolerance, self.max_passes, self.max_seconds)
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected [0, 1), found {self.momentum}")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

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

        order = torch.randperm(system.n, generator=generator, device=generator.device)
        order = order.to(rhs.device)
        shuffled = system.permuted(order)
        spectrum = estimate_spectrum(shuffled, generator)
        blocks = self._blocks(system.n)
        rule = self._rule(spectrum, system.n, len(blocks))

        start = start[order]
        residual = shuffled.rhs.clone()
        passes = min(system.n, 1000) ** 2 / system.n**2
        if initial is not None:
            residual = shuffled.residual(start)
            passes += 1.0
        start_norms = residual.norm(dim=0)
        iterate = _Iterate(start, residual, rule)
        # Momentum remembers 1 / (1 - rho) steps: no verdict before that has faded.
        patience = max(300.0, 20.0 / (1.0 - rule.momentum) / len(blocks))
        monitor = Monitor(self.tolerance, start_norms, patience)
        restarts = 0

        def weights() -> Tensor:
            unshuffled = torch.empty_like(iterate.average)
            unshuffled[order] = iterate.average
            return unshuffled * system.scale

        reason: Reason | None = None
        if float(start_norms.max()) <= self.tolerance:
            reason = monitor.verdict(start_norms, passes)
        while reason is None:
            diverged = False
            for block in _shuffled(blocks, generator):
                gradient = _block_gradient(shuffled, block, iterate.lookahead)
                residual[block] = -gradient
                diverged = monitor.is_diverging(gradient, len(blocks))
                if diverged:
                    break
                gradient /= spectrum.diagonal[block]
                iterate.step(block, gradient, len(blocks))
            passes += 1.0
            norms = residual.norm(dim=0)
            exact = False
            if diverged or not bool(torch.isfinite(norms).all()):
                restarts += 1
                rule = StepRule(rule.step_size / 2, rule.momentum)
                iterate.restart(rule)
                residual = iterate.best_residual.clone()
                norms = residual.norm(dim=0)
                monitor.forget()
                if restarts > _MAX_RESTARTS:
                    reason = "diverged"
            else:
                iterate.remember(norms, residual)
                exact = monitor.wants_check(norms, passes)
            if exact:
                norms = accurate_residual(shuffled, iterate.average).to(norms.dtype)
                passes += 1.0
                reason = monitor.verdict(norms, passes)
            if record(passes, norms, exact=exact, weights=weights):
                reason = reason or "interrupted"
            # The true residual at the end is part of the budget.
            if passes + 1.0 >= self.max_passes or (
                self.max_seconds is not None and record.seconds >= self.max_seconds
            ):
                reason = reason or "budget"

        final, passes = self._final(
            shuffled, iterate, start, start_norms, monitor, passes
        )
        if float(final.max()) <= self.tolerance:
            reason = "converged"
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=weights(),
            residuals=final.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=_warnings(reason, final, self.tolerance, restarts),
            settings={
                "block_size": blocks[0].stop,
                "momentum": rule.momentum,
                "step_size": rule.step_size,
                "restarts": restarts,
                "largest_eigenvalue": spectrum.largest,
            },
        )

    def _blocks(self, n: int) -> list[slice]:
        size = self.block_size or default_block_size(n)
        count = math.ceil(n / min(size, n))
        return list(row_slices(n, math.ceil(n / count)))

    def _rule(self, spectrum: Spectrum, n: int, num_blocks: int) -> StepRule:
        rule = step_rule(
            spectrum, n, max(1, round(n / num_blocks)), momentum=self.momentum
        )
        if self.step_size is None:
            return rule
        return StepRule(self.step_size, rule.momentum)

    @staticmethod
    def _final(
        system: System,
        iterate: _Iterate,
        start: Tensor,
        start_norms: Tensor,
        monitor: Monitor,
        passes: float,
    ) -> tuple[Tensor, float]:
        """True residuals of what is returned; never worse than the start."""
        norms = monitor.checked_at(passes)
        if norms is None:
            norms = accurate_residual(system, iterate.average)
            passes += 1.0
        worse = ~(norms <= start_norms)
        if bool(worse.any()):
            iterate.average[:, worse] = start[:, worse]
            norms = torch.where(worse, start_norms.to(norms.dtype), norms)
        return norms, passes


def default_block_size(n: int) -> int:
    """Coordinates per step when none are asked for."""
    return min(512, max(64, n // 64))


class _Iterate:
    """Iterate, velocity and average, with updates only on the block."""

    def __init__(self, start: Tensor, residual: Tensor, rule: StepRule) -> None:
        self.average = start.clone()
        self.best_residual = residual.clone()
        self._best = start.clone()
        self._best_norm = float(residual.norm(dim=0).max())
        self._steps = 0
        self._start_from(start, rule)

    def _start_from(self, start: Tensor, rule: StepRule) -> None:
        self._rule = rule
        self._z = start.clone()
        self._u = torch.zeros_like(start)
        self._decay = 1.0
        self.lookahead = start.clone()

    def step(self, block: slice, gradient: Tensor, num_blocks: int) -> None:
        """One descent step from the gradient on a block."""
        rho, beta = self._rule.momentum, self._rule.step_size * num_blocks
        if rho == 0.0:
            self.lookahead[block] -= beta * gradient
        else:
            if self._decay < _UNDERFLOW:
                self._u *= self._decay
                self._decay = 1.0
            self._decay *= rho
            c = rho / (1.0 - rho)
            self._u[block].sub_(gradient, alpha=beta / self._decay)
            self._z[block].sub_(gradient, alpha=(1.0 + c) * beta)
            torch.sub(
                self._z, self._u, alpha=(c - rho) * self._decay, out=self.lookahead
            )
        self._steps += 1
        self._average()

    def _average(self) -> None:
        # The window is t / 100 steps long: averaging every t / 400 loses nothing.
        stride = max(1, self._steps // 400)
        if self._steps % stride == 0:
            weight = min(1.0, 101.0 * stride / (self._steps + 100.0))
            self.average.lerp_(self.lookahead, weight)

    def remember(self, norms: Tensor, residual: Tensor) -> None:
        """Keep the iterate if it is the best so far."""
        norm = float(norms.max())
        if norm < 0.9 * self._best_norm:
            self._best_norm = norm
            self._best.copy_(self.average)
            self.best_residual.copy_(residual)

    def restart(self, rule: StepRule) -> None:
        """Go back to the best iterate, at rest."""
        self.average.copy_(self._best)
        self._start_from(self._best, rule)


def _block_gradient(system: System, block: slice, at: Tensor) -> Tensor:
    gradient = system.operator.rows(block).matmul(at)
    gradient.addcmul_(system.noise[block], at[block])
    return gradient.sub_(system.rhs[block])


def _shuffled(blocks: list[slice], generator: torch.Generator) -> Iterator[slice]:
    order = torch.randperm(len(blocks), generator=generator, device=generator.device)
    for index in order.tolist():
        yield blocks[index]


def _warnings(
    reason: Reason, norms: Tensor, tolerance: float, restarts: int
) -> tuple[str, ...]:
    warnings = []
    if reason != "converged":
        warnings.append(
            f"SDD stopped ({reason}) with {int((norms > tolerance).sum())} of "
            f"{len(norms)} columns above the tolerance {tolerance:g}; the largest "
            f"relative residual is {float(norms.max()):.2e}. Give it more passes "
            "(max_passes), float64 data, or use CG or Cholesky."
        )
    if restarts:
        warnings.append(
            f"SDD met a growing residual and halved its step size {restarts} times."
        )
    return tuple(warnings)
