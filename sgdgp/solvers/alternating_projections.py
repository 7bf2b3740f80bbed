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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.memory import resolve_budget
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.blocks import (
    CholeskyInverse,
    factorise_block,
    in_random_order,
    shuffle,
)
from sgdgp.solvers.driver import Algorithm, StochasticSolver, Task, check_steps
from sgdgp.solvers.system import System, true_residual

_REPLACE_EVERY = 25.0  # passes between checks, which cost a pass: 4 % of all
_LOWER_CLAIM = 0.7  # of what counts as done, after a running residual was found to lie
_SMALLEST_BLOCK = 64  # below, a step costs more than its entries
_LARGEST_BLOCK = 4096  # equations: a float64 factor takes 0.13 GB

Picker = Callable[[Tensor], RowIndex]
"""Returns the next block for a residual (n, k)."""


class Selection(ABC):
    """Rule for which block of equations is solved next."""

    @abstractmethod
    def picker(self, blocks: Sequence[RowIndex], generator: torch.Generator) -> Picker:
        """The rule at work on a partition."""


@register_stored_class
@dataclass(frozen=True)
class Greedy(Selection):
    """The block with the largest residual norm, summed over the columns."""

    def picker(self, blocks: Sequence[RowIndex], generator: torch.Generator) -> Picker:
        def pick(residual: Tensor) -> RowIndex:
            return blocks[int(block_norms(residual, blocks).sum(1).argmax())]

        return pick


@register_stored_class
@dataclass(frozen=True)
class RandomOrder(Selection):
    """Every block once in a random order, then again in another."""

    def picker(self, blocks: Sequence[RowIndex], generator: torch.Generator) -> Picker:
        orders = (in_random_order(blocks, generator) for _ in count())
        endless = chain.from_iterable(orders)
        return lambda residual: next(endless)


def block_norms(
    residual: Float[Tensor, "n k"], blocks: Sequence[RowIndex]
) -> Float[Tensor, "m k"]:
    """Norm of every column on every block of a partition."""
    size = len(residual[blocks[0]])
    whole = len(residual) // size
    squares = residual.square()
    sums = squares[: whole * size].unflatten(0, (whole, size)).sum(1)
    if whole * size < len(residual):
        sums = torch.cat([sums, squares[whole * size :].sum(0, keepdim=True)])
    return sums.sqrt()


@register_stored_class
@dataclass(frozen=True)
class AlternatingProjections(StochasticSolver):
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
    title = "Alternating projections"
    advice = (
        "Give it more passes (max_passes), larger blocks (block_size), float64 data, "
        "or use CG or Cholesky."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.block_size)
        if not isinstance(self.selection, Selection):
            raise TypeError(f"selection: expected Greedy(), found {self.selection!r}")

    def begin(self, task: Task) -> Algorithm[Any]:
        return _Projections(self, task)


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


class _Projections(Algorithm[AlternatingProjections]):
    """Projections at work.

    The residual is up to date on all rows, for which a step needs the block's columns
    of K; with features it is up to date on the block that is visited, for which the
    block alone is enough. Columns leave the products as soon as they seem to be done,
    and come back if a check disagrees.
    """

    max_restarts, restart_warning = 0, ""  # there is no step to make smaller

    def __init__(self, solver: AlternatingProjections, task: Task) -> None:
        rhs = task.system.rhs
        n, k = rhs.shape
        # Half of what others may take is for the factors of all blocks.
        memory = resolve_budget(None, rhs.device) // 2
        affordable = memory // (n * rhs.element_size())
        size = solver.block_size or default_block_size(n, k, affordable)
        data = shuffle(task.system, size, task.generator)
        super().__init__(solver, task, data)
        self.passes += self.adjoint_cost  # the diagonal, from features
        self.check_cost = 1.0 + self.adjoint_cost  # phi^T V is renewed
        self._checked_at = self.passes
        self._has_features = self.system.operator.has_features
        self._selection = RandomOrder() if self._has_features else solver.selection
        self._pick = self._selection.picker(data.blocks, self.generator)
        self._keeps_factors = data.block_size <= affordable
        self._factors: dict[int, CholeskyInverse] = {}
        self._computed = 0
        self._claim = solver.tolerance
        self._all = self.checked.weights.clone()
        self._v = self.system.operator.tracked(self._all)
        self.watch()
        largest = max(1.0, float(self.norms.max()))
        self._limit = _largest_residual(self.system) * largest

    def blocks(self) -> Iterator[RowIndex]:
        """As many blocks as there are, or until all columns seem to be done."""
        for _ in self.data.blocks:
            if len(self.live):
                yield self._pick(self.residual)

    def visit(self, block: RowIndex) -> Tensor:
        """Solve one block; running residuals (k',)."""
        operator, noise = self.system.operator, self.system.noise[block]
        self.passes += len(noise) / self.system.n
        inverse = self._inverse(block)
        if self._has_features:
            now = operator.rows_of_product(block, self._v).neg_()
            now += self.system.rhs[block][:, self.live] - noise * self._v.values[block]
            self.residual[block] = now
        u = inverse(self.residual[block])
        self._v.move(operator.move(block, u))
        if not self._has_features:
            self.residual -= operator.columns(block).matmul(u)
            self.residual[block] -= noise * u
        running = self.residual.norm(dim=0)
        self.see(running)
        self.go_on_with(~(running <= self._claim))
        return running

    def _inverse(self, block: RowIndex) -> CholeskyInverse:
        """The factor of a block, kept where memory allows."""
        assert isinstance(block, slice)  # ``shuffle`` makes no others
        inverse = self._factors.get(block.start)
        if inverse is None:
            inverse = factorise_block(self.system, block)
            self._computed += 1
            part = (block.stop - block.start) / self.system.n
            self.passes += part * (self.adjoint_cost or part)
            if self._keeps_factors:
                self._factors[block.start] = inverse
        return inverse

    def step(self, block: RowIndex) -> None:
        """Nothing: the visit has solved the block."""

    def keep(self, rest: Tensor) -> None:
        self._all[:, self.live] = self._v.values
        self._v = self._v.columns(rest)

    def is_diverging(self, residual: Tensor) -> bool:
        """Whether a residual is larger than rounding can have made it."""
        return not float(residual.max()) <= self._limit

    def end_pass(self) -> None:
        """Nothing: ``norms`` are up to date."""

    def weights(self) -> Tensor:
        return self._v.values

    def candidate(self) -> Tensor:
        """Columns that seem to be done as they were left, though not checked."""
        weights = self._all.clone()
        weights[:, self.live] = self._v.values
        return weights

    def wants_check(self, is_last: bool) -> bool:
        """At regular intervals, and when all columns seem to be done."""
        due = self.passes - self._checked_at >= _REPLACE_EVERY
        return is_last or due or not len(self.live)

    def check(self) -> None:
        """Replace the residual by the true one and take columns back that need it."""
        self._all = self.candidate()
        residual = true_residual(self.system, self._all)
        self.take_note(self._all, residual)
        self._checked_at = self.passes
        if not len(self.live):
            # What was claimed of the columns that come back was not true.
            self._claim *= _LOWER_CLAIM
        self.live = (self.norms > self.solver.tolerance).nonzero()[:, 0]
        self.residual = residual[:, self.live].to(self._all.dtype)
        self._v = self.system.operator.tracked(self._all[:, self.live])

    def settings(self) -> dict[str, Any]:
        return {
            "block_size": self.data.block_size,
            "blocks": self.num_blocks,
            "selection": repr(self._selection),
            "factors": self._computed,
        }


def _largest_residual(system: System) -> float:
    """What the norm of a residual can grow to in exact arithmetic, from one.

    The error never grows in the norm of H: ||r||^2 <= (lambda_1 / lambda_n) ||r0||^2.
    """
    trace = float((system.operator.diagonal() + system.noise[:, 0]).sum())
    return math.sqrt(trace / float(system.noise.min()))
