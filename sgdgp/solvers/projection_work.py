"""Weights and residuals that alternating projections works on.

``Work`` keeps the whole residual up to date: a step needs the block's columns of K.
``ImageWork`` is for K = phi phi^T: it keeps U = phi^T V, from which the residual of the
next block comes at the price of that block alone. The residual of other blocks is then
what it was when they were last visited.
"""

from __future__ import annotations

from torch import Tensor

from sgdgp.solvers.blocks import BestChecked, CholeskyInverse
from sgdgp.solvers.system import System, believed_norms, true_residual

_LOWER_CLAIM = 0.7


class Work:
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
            self._leave(~done)
        return worst

    def _leave(self, rest: Tensor) -> None:
        """Go on with some of the columns."""
        self._live = self._live[rest]
        self._v = self._v[:, rest]
        self.residual = self.residual[:, rest]

    def weights(self) -> Tensor:
        """The current weights of all columns (n, k)."""
        now = self._all.clone()
        now[:, self._live] = self._v
        return now

    def replace_residual(self) -> Tensor:
        """Put the true residuals in the place of the running ones; norms (k,)."""
        self._all = self.weights()
        residual = self._true_residual()
        norms = believed_norms(self._system, self._all, residual)
        self._best.offer(self._all, norms)
        if self.is_done:
            # What was claimed of the columns that come back was not true.
            self._claim *= _LOWER_CLAIM
        self.norms = norms.to(self.norms.dtype)
        self._keep(norms > self._tolerance, residual)
        self.is_verified = True
        return norms

    def _true_residual(self) -> Tensor:
        return true_residual(self._system, self._all)

    def take_best(self) -> Tensor:
        """Go back to the best true residual of every column; norms (k,)."""
        self._all = self._best.weights
        self._live = self._live[:0]
        self._v = self._v[:, :0]
        return self._best.norms


class ImageWork(Work):
    """The same for an operator with features, block by block."""

    def _keep(self, columns: Tensor, residual: Tensor) -> None:
        super()._keep(columns, residual)
        self._tracked = self._system.operator.tracked(self._v)
        self._v = self._tracked.values

    def _leave(self, rest: Tensor) -> None:
        super()._leave(rest)
        self._tracked = self._tracked.columns(rest)
        self._v = self._tracked.values

    def step(self, block: slice, inverse: CholeskyInverse) -> None:
        """Solve one block, from its residual as it is now."""
        system = self._system
        now = system.operator.rows_of_product(block, self._tracked).neg_()
        now += system.rhs[block][:, self._live] - system.noise[block] * self._v[block]
        self.residual[block] = now
        self._tracked.move(system.operator.move(block, inverse(now)))
        self.is_verified = False
