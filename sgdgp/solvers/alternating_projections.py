"""Alternating projections (Wu et al., AISTATS 2024, arXiv:2310.17137).

Solves (K + Sigma) V = B exactly on one block I of equations after the other, with
the Cholesky factors of the diagonal blocks of H = K + Sigma computed once:

    u = H[I, I]^-1 R[I]
    V[I] <- V[I] + u
    R <- R - H[:, I] u

The block is the one whose residual norms, summed over the columns, are the largest
(Gauss-Southwell), or the next of a random order. Each step projects the error on the
block's complement in the norm of H and needs b n kernel entries. R is the residual
itself, for nothing.

Deviations from the paper:

1. The data are shuffled once before they are cut into blocks, so that a block is a
   sample of all inputs whatever the order they came in.
2. The block size comes from n: the factors may cost a few passes, not more. A block
   whose noise is below the rounding of its dtype is factorised in float64.
3. The residual drifts in finite precision: it is replaced by the true one at regular
   intervals, and only a true one can end the solve.
4. Columns that are done leave the products; they come back if the true residual
   disagrees.
5. The 2-norm of a residual may rise while the error falls in the norm of H: the best
   true residual of every column is what is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_count
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    Reason,
    Recorder,
    Solution,
    Solver,
    check_limits,
)
from sgdgp.solvers.blocks import (
    BestChecked,
    CholeskyInverse,
    PerBlock,
    factorise_block,
    memory_for_factors,
    partition,
)
from sgdgp.solvers.selection import Greedy, Selection
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import (
    System,
    as_system,
    believed_norms,
    initial_weights,
    true_residual,
)

_REPLACE_EVERY = 25.0
_LOWER_CLAIM = 0.7
_PATIENCE = 300.0
_SMALLEST_BLOCK = 64
_LARGEST_BLOCK = 4096


@dataclass(frozen=True)
class AlternatingProjections(Solver):
    """Exact block solves; hard to beat to a loose tolerance, slow to a tight one.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Equations that are solved at a time. Default: chosen from n.
        selection: ``Greedy()`` (default) or ``RandomOrder()``.
    """

    tolerance: float = 1e-2
    max_passes: float = 1000.0
    max_seconds: float | None = None
    block_size: int | None = None
    selection: Selection = field(default_factory=Greedy)

    name = "alternating_projections"

    def __post_init__(self) -> None:
        check_limits(self.tolerance, self.max_passes, self.max_seconds)
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)
        if not isinstance(self.selection, Selection):
            raise TypeError(f"selection: expected Greedy(), found {self.selection!r}")

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
        n, k = rhs.shape

        order = torch.randperm(n, generator=generator, device=generator.device)
        order = order.to(rhs.device)
        shuffled = system.permuted(order)
        memory = memory_for_factors(rhs.device)
        affordable = memory // (n * rhs.element_size())
        size = self.block_size or default_block_size(n, k, affordable)
        blocks = partition(n, size)
        inverses = PerBlock(
            lambda block: factorise_block(shuffled, block),
            keep=blocks[0].stop <= affordable,
        )
        pick = self.selection.picker(blocks, generator)

        start = start[order]
        residual = shuffled.rhs.clone()
        passes = 0.0
        if initial is not None:
            residual = true_residual(shuffled, start)
            passes += 1.0
        work = _Work(shuffled, start, residual, self.tolerance)
        monitor = Monitor(self.tolerance, work.norms, _PATIENCE)
        limit = _largest_residual(shuffled) * max(1.0, float(work.norms.max()))

        def weights() -> Tensor:
            unshuffled = torch.empty_like(start)
            unshuffled[order] = work.weights()
            return unshuffled * system.scale

        def is_out_of_budget() -> bool:
            # The true residual at the end is part of the budget.
            return passes + 1.0 >= self.max_passes or record.is_past(self.max_seconds)

        reason: Reason | None = None
        if float(work.norms.max()) <= self.tolerance:
            reason = "converged"
        checked = passes
        while reason is None:
            for _ in blocks:
                block = pick(work.residual)
                computed = inverses.computed
                work.step(block, inverses(block))
                rows = block.stop - block.start
                passes += rows / n * (1.0 + (inverses.computed - computed) * rows / n)
                worst = work.advance()
                if work.is_done or not worst <= limit or is_out_of_budget():
                    break
            exact = (
                work.is_done or is_out_of_budget() or passes - checked >= _REPLACE_EVERY
            )
            if not worst <= limit:
                reason = "diverged"
            elif exact:
                norms = work.replace_residual()
                passes += 1.0
                checked = passes
                reason = monitor.verdict(norms, passes)
            if record(passes, work.norms.clone(), exact=exact, weights=weights):
                reason = reason or "interrupted"
            if is_out_of_budget():
                reason = reason or "budget"

        if not work.is_verified:
            work.replace_residual()
            passes += 1.0
        final = work.take_best()
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
            warnings=_warnings(reason, final, self.tolerance),
            settings={
                "block_size": blocks[0].stop,
                "blocks": len(blocks),
                "selection": repr(self.selection),
                "factors": inverses.computed,
            },
        )


class _Work:
    """Weights and residuals of all columns, and of those still worked on."""

    def __init__(
        self, system: System, start: Tensor, residual: Tensor, tolerance: float
    ) -> None:
        self._system = system
        self._tolerance = tolerance
        self._claim = tolerance
        self._all = start.clone()
        self.norms = residual.norm(dim=0).to(start.dtype)
        self._best = BestChecked(start, self.norms)
        self._keep(self.norms > tolerance, residual)
        self.is_verified = True

    def _keep(self, columns: Tensor, residual: Tensor) -> None:
        """Work on some columns, from their weights and their residual (n, k)."""
        self._live = columns.nonzero()[:, 0]
        self._v = self._all[:, self._live]
        self.residual = residual[:, self._live].to(self._v.dtype)

    @property
    def is_done(self) -> bool:
        """Whether no column is left to work on."""
        return len(self._live) == 0

    def step(self, block: slice, inverse: CholeskyInverse) -> None:
        """Solve one block."""
        u = inverse(self.residual[block])
        self._v[block] += u
        self.residual -= self._system.operator.columns(block).matmul(u)
        self.residual[block] -= self._system.noise[block] * u
        self.is_verified = False

    def advance(self) -> float:
        """Dismiss the columns that are done; the largest running residual."""
        running = self.residual.norm(dim=0)
        self.norms[self._live] = running
        worst = float(running.max())
        done = running <= self._claim
        if bool(done.any()):
            self._all[:, self._live] = self._v
            rest = ~done
            self._live = self._live[rest]
            self._v = self._v[:, rest]
            self.residual = self.residual[:, rest]
        return worst

    def weights(self) -> Tensor:
        """The current weights of all columns (n, k)."""
        now = self._all.clone()
        now[:, self._live] = self._v
        return now

    def replace_residual(self) -> Tensor:
        """Put the true residuals in the place of the running ones; norms (k,)."""
        self._all = self.weights()
        residual = true_residual(self._system, self._all)
        norms = believed_norms(self._system, self._all, residual)
        self._best.offer(self._all, norms)
        if self.is_done:
            # What was claimed of the columns that come back was not true.
            self._claim *= _LOWER_CLAIM
        self.norms = norms.to(self.norms.dtype)
        self._keep(norms > self._tolerance, residual)
        self.is_verified = True
        return norms

    def take_best(self) -> Tensor:
        """Go back to the best true residual of every column; norms (k,)."""
        self._all = self._best.weights
        self._live = self._live[:0]
        self._v = self._v[:, :0]
        return self._best.norms


def default_block_size(n: int, k: int, affordable: int) -> int:
    """Equations per step when none are asked for.

    The factors cost n b^2 / 3 multiply-adds, the kernel entry of a pass about as much
    as 16 columns of its product: b^2 = 6 n (k + 16) makes that two passes. At least
    eight blocks beyond 512 rows, and no more entries of the factors than memory has.

    Args:
        n: Number of equations.
        k: Number of columns.
        affordable: Rows of n entries that the factors may take.
    """
    worth = math.isqrt(6 * n * (k + 16))
    largest = int(min(worth, n // 8, _LARGEST_BLOCK, affordable))
    return max(_SMALLEST_BLOCK, largest)


def _largest_residual(system: System) -> float:
    """What the norm of a residual can grow to in exact arithmetic, from one.

    The error never grows in the norm of H: ||r||^2 <= (lambda_1 / lambda_n) ||r0||^2.
    """
    trace = float((system.operator.diagonal() + system.noise[:, 0]).sum())
    return math.sqrt(trace / float(system.noise.min()))


def _warnings(reason: Reason, norms: Tensor, tolerance: float) -> tuple[str, ...]:
    if reason == "converged":
        return ()
    return (
        f"Alternating projections stopped ({reason}) with "
        f"{int((norms > tolerance).sum())} of {len(norms)} columns above the tolerance "
        f"{tolerance:g}; the largest relative residual is {float(norms.max()):.2e}. "
        "Give it more passes (max_passes), larger blocks (block_size), float64 data, "
        "or use CG or Cholesky.",
    )
