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
5. Where K = phi phi^T with exact features, blocks come in random order and R[I] is
   found from phi^T V when the block is visited: a step evaluates b rows, not n.
6. The 2-norm of a residual may rise while the error falls in the norm of H: the best
   true residual of every column is what is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
)
from sgdgp.solvers.blocks import (
    PerBlock,
    factorise_block,
    memory_for_factors,
    partition,
)
from sgdgp.solvers.projection_work import ImageWork, Work
from sgdgp.solvers.selection import Greedy, RandomOrder, Selection
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import System, as_system, initial_weights, true_residual

_REPLACE_EVERY = 25.0
_PATIENCE = 300.0
_SMALLEST_BLOCK = 64
_LARGEST_BLOCK = 4096


@register_stored_class
@dataclass(frozen=True)
class AlternatingProjections(IterativeSolver):
    """Exact block solves; hard to beat to a loose tolerance, slow to a tight one.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Equations that are solved at a time. Default: chosen from n.
        selection: ``Greedy()`` (default) or ``RandomOrder()``, which operators with
            features always use.
    """

    block_size: int | None = None
    selection: Selection = field(default_factory=Greedy)

    name = "alternating_projections"

    def __post_init__(self) -> None:
        super().__post_init__()
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

        order = operator.random_order(generator)
        shuffled = system.permuted(order)
        memory = memory_for_factors(rhs.device)
        affordable = memory // (n * rhs.element_size())
        size = self.block_size or default_block_size(n, k, affordable)
        blocks = partition(n, size, operator.outputs_per_input)
        inverses = PerBlock(
            lambda block: factorise_block(shuffled, block),
            keep=blocks[0].stop <= affordable,
        )
        selection = RandomOrder() if operator.has_features else self.selection
        pick = selection.picker(blocks, generator)

        start = start[order]
        residual = shuffled.rhs.clone()
        passes = 0.0
        # With features the image of the iterate is renewed, by one adjoint on all rows.
        check_cost = 1.5 if operator.has_features else 1.0
        if initial is not None:
            residual = true_residual(shuffled, start)
            passes += check_cost
        kind = ImageWork if operator.has_features else Work
        work = kind(shuffled, start, residual, self.tolerance)
        monitor = Monitor(self.tolerance, work.norms, _PATIENCE)
        limit = _largest_residual(shuffled) * max(1.0, float(work.norms.max()))
        passes += check_cost - 1.0  # the diagonal, from features

        def weights() -> Tensor:
            unshuffled = torch.empty_like(start)
            unshuffled[order] = work.weights()
            return unshuffled * system.scale

        def is_out_of_budget() -> bool:
            # The true residual at the end is part of the budget.
            return passes + check_cost >= self.max_passes or record.is_past(
                self.max_seconds
            )

        reason: Reason | None = None
        if float(work.norms.max()) <= self.tolerance:
            reason = "converged"
        checked = passes
        while reason is None:
            for _ in blocks:
                block = pick(work.residual)
                computed = inverses.computed
                work.step(block, inverses(block))
                part = (block.stop - block.start) / n
                factor = 0.5 if operator.has_features else part
                passes += part * (1.0 + (inverses.computed - computed) * factor)
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
                passes += check_cost
                checked = passes
                reason = monitor.verdict(norms, passes)
            if record(passes, work.norms.clone(), exact=exact, weights=weights):
                reason = reason or "interrupted"
            if is_out_of_budget():
                reason = reason or "budget"

        if not work.is_verified:
            work.replace_residual()
            passes += check_cost
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
                "selection": repr(selection),
                "factors": inverses.computed,
            },
        )


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
