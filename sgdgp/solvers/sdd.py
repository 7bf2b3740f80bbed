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

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
)
from sgdgp.solvers.blocks import BestChecked, in_random_order, partition
from sgdgp.solvers.dual_iterate import DualIterate
from sgdgp.solvers.step_size import Spectrum, StepRule, estimate_spectrum, step_rule
from sgdgp.solvers.stopping import Monitor, rounding_floor
from sgdgp.solvers.system import (
    accurate_residual,
    as_system,
    initial_weights,
    true_residual,
)

_MAX_RESTARTS = 20


@dataclass(frozen=True)
class SDD(IterativeSolver):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected [0, 1), found {self.momentum}")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        if not 0 < self.averaging <= 1:
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

        order = operator.random_order(generator)
        shuffled = system.permuted(order)
        spectrum = estimate_spectrum(shuffled, generator)
        outputs = operator.outputs_per_input
        size = self.block_size or outputs * default_block_size(n // outputs)
        blocks = partition(n, size, outputs)

        start = start[order]
        residual = shuffled.rhs.double()
        passes = spectrum.passes
        # With features the iterate has an image: one adjoint on all rows.
        image_cost = 0.5 if operator.has_features else 0.0
        if initial is not None:
            residual = true_residual(shuffled, start)
            passes += 1.0 + image_cost
        best = BestChecked(start, residual.norm(dim=0))
        norms = best.norms.clone()
        work = DualIterate(shuffled, spectrum.diagonal, start, residual, self.averaging)
        work.dismiss(norms <= self.tolerance)
        # Momentum remembers 1 / (1 - rho) steps: no verdict before that has faded.
        last = self._rule(spectrum, blocks[0].stop, self.max_passes)
        patience = max(300.0, 20.0 / (1.0 - last.momentum) / len(blocks))
        monitor = Monitor(self.tolerance, best.norms, patience)
        restarts, since_start = 0, 0

        def weights() -> Tensor:
            unshuffled = torch.empty_like(start)
            unshuffled[order] = best.with_columns(work.live, work.average)
            return unshuffled * system.scale

        def is_out_of_budget() -> bool:
            # The true residual at the end is part of the budget.
            return passes + 1.0 >= self.max_passes or record.is_past(self.max_seconds)

        reason: Reason | None = "converged" if best.is_within(self.tolerance) else None
        rule = self._rule(spectrum, blocks[0].stop, 1.0)
        while reason is None:
            since_start += 1
            rule = self._rule(spectrum, blocks[0].stop, float(since_start))
            rule = StepRule(rule.step_size / 2.0**restarts, rule.momentum)
            work.adopt(rule)
            diverged = False
            visited: list[slice] = []
            for block in in_random_order(blocks, generator):
                gradient = work.gradient(block)
                visited.append(block)
                passes += (block.stop - block.start) / n
                diverged = monitor.is_diverging(gradient, len(blocks))
                if diverged or is_out_of_budget():
                    break
                work.step(block, gradient, len(blocks))
            running = work.recent(visited)
            diverged = diverged or work.has_grown()
            norms = norms.index_copy(0, work.live, running.double())
            exact = False
            if diverged:
                restarts += 1
                since_start = 0
                passes += image_cost
                norms = norms.index_copy(0, work.live, work.restart())
                monitor.forget()
                if restarts > _MAX_RESTARTS:
                    reason = "diverged"
            elif is_out_of_budget() or monitor.wants_check(running, passes):
                exact = True
                candidate = best.with_columns(work.live, work.average)
                norms = accurate_residual(shuffled, candidate)
                passes += 1.0
                best.offer(candidate, norms)
                reason = monitor.verdict(norms, passes)
            if record(passes, norms.to(rhs.dtype), exact=exact, weights=weights):
                reason = reason or "interrupted"
            if exact:
                work.dismiss(norms[work.live] <= self.tolerance)
            if is_out_of_budget():
                reason = reason or "budget"
            if reason is not None and not exact:
                candidate = best.with_columns(work.live, work.average)
                best.offer(candidate, accurate_residual(shuffled, candidate))
                passes += 1.0

        if best.is_within(self.tolerance):
            reason = "converged"
        found = torch.empty_like(start)
        found[order] = best.weights
        floor = rounding_floor(spectrum.largest, spectrum.diagonal, best.weights)
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=found * system.scale,
            residuals=best.norms.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=_warnings(reason, best.norms, self.tolerance, restarts, floor),
            settings={
                "block_size": blocks[0].stop,
                "momentum": rule.momentum,
                "step_size": rule.step_size,
                "averaging": self.averaging,
                "restarts": restarts,
                "largest_eigenvalue": spectrum.largest,
            },
        )

    def _rule(self, spectrum: Spectrum, block_size: int, passes: float) -> StepRule:
        rule = step_rule(spectrum, block_size, passes, momentum=self.momentum)
        if self.step_size is None:
            return rule
        return StepRule(self.step_size, rule.momentum)


def default_block_size(n: int) -> int:
    """Points per step when none are asked for, of n."""
    return min(512, max(64, n // 64))


def _warnings(
    reason: Reason, norms: Tensor, tolerance: float, restarts: int, floor: float
) -> tuple[str, ...]:
    warnings = []
    if reason != "converged":
        warnings.append(
            f"SDD stopped ({reason}) with {int((norms > tolerance).sum())} of "
            f"{len(norms)} columns above the tolerance {tolerance:g}; the largest "
            f"relative residual is {float(norms.max()):.2e}. Give it more passes "
            "(max_passes), float64 data, or use CG or Cholesky."
        )
        if tolerance < floor:
            warnings.append(
                f"Rounding alone leaves a relative residual of about {floor:.0e} in "
                f"this precision, above the tolerance {tolerance:g}: give float64 "
                "data or a larger tolerance."
            )
    if restarts:
        warnings.append(
            f"SDD met a growing residual and halved its step size {restarts} times."
        )
    return tuple(warnings)
