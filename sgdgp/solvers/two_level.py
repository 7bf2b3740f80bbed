"""A two-level preconditioner: low rank for the far field, sparse for the near one.

    P = L L^T + (G^T G)^-1,   G^T G ~ (K - L L^T + Sigma)^-1 sparse,

    P^-1 = G^T (I - Q diag(s^2 / (1 + s^2)) Q^T) G,   G L = Q S W^T.

The few large eigenvalues of a kernel matrix belong to smooth functions and are
caught by L, a randomly pivoted partial Cholesky factor. What it leaves is correlation
between near neighbours: G regresses every point on a few of them
(``sparse_inverse.py``). Either alone leaves the other's part of the spectrum to the
iterations.

The split is that of adaptive factorised Nystrom (Zhao et al., 2023,
arXiv:2304.05460). Deviations: pivots are drawn at random by the residual's diagonal,
L stays a term of P and not a block of it, neighbours are chosen by correlation and
not by distance, so any kernel will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.solvers.preconditioners import (
    Inverse,
    LowRank,
    PivotedCholesky,
    Preconditioner,
    left_singular,
)
from sgdgp.solvers.sparse_inverse import SparseFactor, nearest_earlier, sparse_factor
from sgdgp.solvers.system import System


@dataclass(frozen=True)
class TwoLevel(Preconditioner):
    """Low rank plus sparse inverse; few passes where points have near neighbours.

    Attributes:
        low_rank: Recipe of the far field. Default: pivoted Cholesky of rank n / 45,
            at least 100 and at most 500: the neighbours carry most of the work.
        neighbours: Rows that each row is regressed on. Default: 40, for small n
            sqrt(n), so that their blocks cost no more than a pass over K.
    """

    low_rank: LowRank | None = None
    neighbours: int | None = None

    def __post_init__(self) -> None:
        if self.neighbours is not None:
            check_count("neighbours", self.neighbours, 1)

    def _low_rank(self, n: int) -> LowRank:
        return self.low_rank or PivotedCholesky(rank=far_rank(n))

    def _count(self, n: int) -> int:
        return min(self.neighbours or default_neighbours(n), max(1, n - 1))

    def cost(self, n: int) -> float:
        """See ``Preconditioner.cost``."""
        return self._low_rank(n).cost(n) + 1.0 + (self._count(n) + 1) ** 2 / n

    def prepare(self, system: System, generator: torch.Generator) -> TwoLevelInverse:
        """See ``Preconditioner.prepare``."""
        factor, passes = self._low_rank(system.n).factor(system, generator)
        count = self._count(system.n)
        nearest = nearest_earlier(system, count, generator)
        sparse = sparse_factor(system, factor, nearest)
        passes += 1.0 + (count + 1) ** 2 / system.n
        basis, squares = left_singular(sparse.rows.double() @ factor)
        dtype = system.rhs.dtype
        # Below its rounding, 1 - shrinkage would be noise: it stays a few digits above.
        kept = (1.0 / (1.0 + squares)).clamp_min(16.0 * torch.finfo(dtype).eps)
        return TwoLevelInverse(
            sparse=sparse,
            basis=basis.to(dtype),
            shrinkage=(1.0 - kept).unsqueeze(1).to(dtype),
            passes=passes,
            settings={"rank": basis.shape[1], "neighbours": count},
        )


@dataclass(frozen=True)
class TwoLevelInverse(Inverse):
    """The inverse of L L^T + (G^T G)^-1."""

    sparse: SparseFactor
    basis: Float[Tensor, "n r"]
    shrinkage: Float[Tensor, "r 1"]
    passes: float
    settings: Mapping[str, Any]

    def __call__(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        inner = self.sparse.rows @ r
        inner -= self.basis @ (self.shrinkage * (self.basis.mT @ inner))
        return self.sparse.transposed @ inner


def default_neighbours(n: int) -> int:
    """Neighbours whose regressions stay small beside a pass over K."""
    return max(1, min(40, math.isqrt(n) - 1))


def far_rank(n: int) -> int:
    """Rank of the far field beside neighbours."""
    return min(n, max(100, min(500, n // 45)))
