"""A two-level preconditioner: low rank for the far field, sparse for the near one.

    P = L L^T + (G^T G)^-1,   G^T G ~ (K - L L^T + Sigma)^-1 sparse,

    P^-1 = G^T (I - Q diag(s^2 / (1 + s^2)) Q^T) G,   G L = Q S W^T.

The few large eigenvalues of a kernel matrix belong to smooth functions and are
caught by L, a randomly pivoted partial Cholesky factor. What it leaves is correlation
between near neighbours, which a low-rank factor cannot see and a few neighbours see
best. Either alone leaves the other's part of the spectrum to the iterations.

G is Vecchia's approximation (Vecchia, 1988; Kolotilina & Yeremin, 1993, for general
matrices): in a random order, row i regresses on the k most correlated of the rows
before it, N(i),

    c_i = A[N, N]^-1 A[N, i],   d_i = A[i, i] - A[i, N] c_i,   A = K - L L^T + Sigma,
    G[i, N] = -c_i / sqrt(d_i),   G[i, i] = 1 / sqrt(d_i).

It costs a pass over K for the neighbours and n k^3 / 3 for the regressions.

The split is that of adaptive factorised Nystrom (Zhao et al., 2023,
arXiv:2304.05460). Deviations: pivots are drawn at random by the residual's diagonal,
L stays a term of P and not a block of it, neighbours are chosen by correlation and
not by distance, so any kernel will do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.codec import register_stored_class
from sgdgp.core.processes import Processes
from sgdgp.core.slices import slices
from sgdgp.core.team import Found, keep
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.costs import costs_of
from sgdgp.solvers.preconditioners import (
    Inverse,
    LowRank,
    PivotedCholesky,
    Preconditioner,
    left_singular,
    low_rank_product,
)
from sgdgp.solvers.system import System

_WORTH_PASSES = 25.0  # that neighbours save where they tell: what their setup may cost
_LARGE_NOISE = 0.1  # of the prior variance: above, neighbours tell what low rank does
_MANY_ROWS = 2_000  # from which a setup takes a while
# Memory of one step: entries of a tile of correlations, and of regressions' blocks.
_TILE_ENTRIES = 2**22
_BLOCK_ENTRIES = 2**24


@register_stored_class
@dataclass(frozen=True)
class TwoLevel(Preconditioner):
    """Low rank plus sparse inverse; few passes where points have near neighbours.

    Attributes:
        low_rank: Recipe of the far field. Default: pivoted Cholesky of rank n / 45,
            at least 100 and at most 500: the neighbours carry most of the work.
        neighbours: Rows that each row is regressed on. Default: 40, for small n
            sqrt(n), so that their blocks cost no more than a pass over K. If both are
            default, no neighbours, but pivoted Cholesky of its own default rank, where
            ``neighbours_pay`` says no.
    """

    low_rank: LowRank | None = None
    neighbours: int | None = None

    def __post_init__(self) -> None:
        if self.neighbours is not None:
            check_count("neighbours", self.neighbours, 1)

    def _low_rank(self, n: int) -> LowRank:
        return self.low_rank or PivotedCholesky(rank=far_field_rank(n))

    def _count(self, n: int) -> int:
        return min(self.neighbours or default_neighbours(n), max(1, n - 1))

    def cost(self, n: int) -> float:
        return self._low_rank(n).cost(n) + 1.0 + (self._count(n) + 1) ** 2 / n

    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        if (
            self == TwoLevel()
            and system.n > _MANY_ROWS
            and not neighbours_pay(system.operator, system.noise, system.rhs.shape[1])
        ):
            return PivotedCholesky().prepare(system, generator)
        factor, passes = self._low_rank(system.n).factor(system, generator)
        count = self._count(system.n)
        nearest = nearest_earlier(system, count, generator)
        sparse = sparse_factor(system, factor, nearest)
        passes += 1.0 + (count + 1) ** 2 / system.n
        dtype = system.rhs.dtype
        inner = sparse.rows.double() @ factor
        if system.operator.is_shared:
            keep(inner)
        basis, squares = left_singular(inner, dtype)
        # Below its rounding, 1 - shrinkage would be noise: it stays a few digits above.
        kept = (1.0 / (1.0 + squares)).clamp_min(16.0 * torch.finfo(dtype).eps)
        return TwoLevelInverse(
            sparse=sparse,
            basis=basis,
            shrinkage=(1.0 - kept).unsqueeze(1).to(dtype),
            passes=passes,
            settings={"rank": basis.shape[1], "neighbours": count},
        )


@register_stored_class
@dataclass(frozen=True)
class TwoLevelInverse(Inverse):
    """The inverse of L L^T + (G^T G)^-1."""

    sparse: SparseFactor
    basis: Float[Tensor, "n r"]
    shrinkage: Float[Tensor, "r 1"]
    passes: float
    settings: Mapping[str, Any]

    def __call__(self, r: Tensor) -> Tensor:
        inner = self.sparse.rows @ r
        inner -= low_rank_product(self.basis, self.shrinkage, inner)
        return self.sparse.transposed @ inner


def neighbours_pay(
    operator: KernelOperator, noise: Tensor | float, columns: int
) -> bool:
    """Whether neighbours of n rows save more than it takes to find them.

    They tell something where the noise is less than a tenth of the prior variance and
    rows are not made of features; that is worth 25 passes, which with few columns or
    rows take less time than the setup.
    """
    if operator.outputs_per_input > 1 or operator.streaming().has_features:
        return False
    costs = costs_of(operator)
    setup = costs.regression / operator.shape[0] + costs.candidate
    setup /= costs.of_entry(columns)
    return setup <= _WORTH_PASSES and noise_ratio(operator, noise) < _LARGE_NOISE


def noise_ratio(operator: KernelOperator, noise: Tensor | float) -> float:
    """Mean noise variance over mean prior variance."""
    prior = float(operator.diagonal().mean())
    given = torch.as_tensor(noise, device=operator.device)
    return float(given.mean()) / max(prior, 1e-300)


def default_neighbours(n: int) -> int:
    """Neighbours whose regressions stay small beside a pass over K."""
    return max(1, min(40, math.isqrt(n) - 1))


def far_field_rank(n: int) -> int:
    """Rank of the far field beside neighbours."""
    return min(n, max(100, min(500, n // 45)))


@dataclass(frozen=True)
class Neighbours:
    """The most correlated earlier rows of every row, in a random order.

    Attributes:
        index: Rows (n, k); meaningless where not ``known``.
        known: Whether there is such a neighbour (n, k).
    """

    index: Int[Tensor, "n k"]
    known: Bool[Tensor, "n k"]


@register_stored_class
@dataclass(frozen=True)
class SparseFactor:
    """G and its transpose in compressed rows."""

    rows: Tensor
    transposed: Tensor
    explained: float
    """Mean logarithm of A[i, i] / d_i: what the neighbours tell of a row."""

    def stored_parts(self) -> dict[str, Any]:
        """What a file holds: the entries of G once."""
        return {**compressed_parts(self.rows), "explained": self.explained}

    @classmethod
    def from_stored_parts(
        cls, starts: Tensor, columns: Tensor, values: Tensor, explained: float
    ) -> SparseFactor:
        """The factor behind ``stored_parts``."""
        n = len(starts) - 1
        numbers = torch.arange(n, device=starts.device)
        rows = numbers.repeat_interleave(starts.diff())
        return cls(
            compressed_rows(starts, columns, values, n),
            compressed(columns, rows, values, (n, n)),
            explained,
        )


def nearest_earlier(
    system: System, count: int, generator: torch.Generator
) -> Neighbours:
    """Rows that K correlates a row with most, of those before it in a random order."""
    rank = torch.randperm(system.n, generator=generator, device=generator.device)
    return _nearest(system, rank.to(system.rhs.device), 0, count)


def _nearest(
    system: System, rank: Int[Tensor, " n"], first: int, count: int
) -> Neighbours:
    """Most correlated rows of lower rank, for the rows from ``first`` on."""
    everywhere = system.operator.everywhere
    index, known = everywhere(_most_correlated, rank, first, count)
    return Neighbours(index, known)


def _most_correlated(
    processes: Processes, operator: KernelOperator, rank: Tensor, first: int, count: int
) -> Found:
    """A share of the rows of ``Neighbours``."""
    n, device = len(rank), rank.device
    own = processes.rows(n - first)
    own = slice(first + own.start, first + own.stop)
    index = torch.empty(own.stop - own.start, count, dtype=torch.long, device=device)
    known = torch.empty(own.stop - own.start, count, dtype=torch.bool, device=device)
    scale = operator.diagonal().clamp_min(torch.finfo(operator.dtype).tiny).rsqrt_()
    for rows in slices(own.stop, max(1, _TILE_ENTRIES // n), own.start):
        score = (operator.block(rows, slice(0, n)) * scale).abs_()
        score.masked_fill_(rank >= rank[rows].unsqueeze(1), -1.0)
        part = slice(rows.start - own.start, rows.stop - own.start)
        values, index[part] = score.topk(count, dim=1, sorted=False)
        known[part] = values >= 0.0
    return index, known


def appended_rows(system: System, num_new: int, count: int) -> Tensor:
    """Compressed rows of G (m, n) for the last m rows, last in the order too.

    Whatever stands for the inverse of the earlier rows' matrix, P^-1 with these rows
    is [[P^-1, 0], [0, 0]] + G^T G: the new ones given the old, as Vecchia has it.
    """
    n, first = system.n, system.n - num_new
    count = min(count, n - 1)
    nearest = _nearest(system, torch.arange(n, device=system.rhs.device), first, count)
    nothing = system.rhs.new_zeros(n, 0)
    rows, columns, values, _ = _regressions(system, nothing, nearest, first)
    return compressed(rows - first, columns, values, (num_new, n))


def sparse_factor(
    system: System, factor: Float[Tensor, "n r"], neighbours: Neighbours
) -> SparseFactor:
    """G for given neighbours; regressions in float64."""
    rows, columns, values, explained = _regressions(system, factor, neighbours, 0)
    shape = (system.n, system.n)
    return SparseFactor(
        compressed(rows, columns, values, shape),
        compressed(columns, rows, values, shape),
        explained,
    )


def _regressions(
    system: System, factor: Tensor, neighbours: Neighbours, first: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Entries of G in the rows from ``first`` on, by rows, neighbours before the own.

    Returns:
        Their rows, columns and values, and ``SparseFactor.explained`` of these rows.
    """
    num_rows = len(neighbours.index)
    numbers = torch.arange(first, first + num_rows, device=neighbours.index.device)
    columns = torch.cat([neighbours.index, numbers.unsqueeze(1)], dim=1)
    # Of a shared factor each process has some rows, and needs the neighbours' too.
    factor = factor.to(
        system.rhs.dtype, copy=True, memory_format=torch.contiguous_format
    )
    values, explained = system.operator.everywhere(
        _regressed, factor, system.noise, columns, neighbours.known
    )
    every = torch.nn.functional.pad(neighbours.known, (0, 1), value=True)
    own = numbers.unsqueeze(1).expand_as(columns)
    told = float(explained.sum()) / max(1, num_rows)
    return own[every], columns[every], values[every], told


def _regressed(
    processes: Processes,
    operator: KernelOperator,
    factor: Tensor,
    noise: Tensor,
    columns: Tensor,
    known: Tensor,
) -> Found:
    """A share of the rows of G, and what the neighbours tell of each.

    Args:
        processes: Whose share it is.
        operator: K (n, n).
        factor: L (n, r).
        noise: Sigma's diagonal (n, 1).
        columns: Of the entries of G (m, k + 1), the row's own the last.
        known: Which neighbours there are (m, k).
    """
    share = processes.rows(len(columns))
    columns, known = columns[share], known[share]
    values = factor.new_empty(columns.shape)
    explained = values.new_empty(len(values), dtype=torch.float64)
    diagonal = operator.diagonal().double()
    # Rounding of K's entries must not make a block of near-duplicates indefinite.
    jitter = 8.0 * torch.finfo(factor.dtype).eps * diagonal
    per_row = columns.shape[1] * max(columns.shape[1], factor.shape[1])
    for rows in slices(len(columns), max(1, _BLOCK_ENTRIES // per_row)):
        both, present = columns[rows], known[rows]
        block = operator.small_blocks(both)
        if factor.shape[1]:
            part = factor[both]
            block = block.baddbmm_(part, part.mT, alpha=-1.0)
        block = block.double()
        block.diagonal(dim1=1, dim2=2).add_(noise[both, 0].double() + jitter[both])
        inner, cross = block[:, :-1, :-1], block[:, -1, :-1] * present
        own_variance = block[:, -1, -1]
        inner = inner * (present.unsqueeze(2) & present.unsqueeze(1))
        inner.diagonal(dim1=1, dim2=2).add_((~present).double())
        corner, info = torch.linalg.cholesky_ex(inner)
        regression = torch.cholesky_solve(cross.unsqueeze(2), corner).squeeze(2)
        variance = own_variance - (regression * cross).sum(1)
        floor = 0.5 * noise[both[:, -1], 0].double()
        failed = (info != 0) | ~torch.isfinite(variance)
        regression = torch.where(failed.unsqueeze(1), 0.0, regression)
        variance = torch.where(failed, own_variance, variance).clamp_min(floor)
        explained[rows] = (own_variance.clamp_min(floor) / variance).log()
        root = variance.rsqrt().unsqueeze(1)
        values[rows] = torch.cat([-regression * root, root], dim=1).to(values.dtype)
    return values, explained


def compressed(
    rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
) -> Tensor:
    """A matrix in compressed rows, of its entries in any order."""
    order = torch.argsort(rows * shape[1] + columns)
    counts = torch.bincount(rows, minlength=shape[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return compressed_rows(starts, columns[order], values[order], shape[1])


def compressed_parts(matrix: Tensor) -> dict[str, Tensor]:
    """The arguments of ``compressed_rows``, but for the width."""
    return {
        "starts": matrix.crow_indices(),
        "columns": matrix.col_indices(),
        "values": matrix.values(),
    }


def compressed_rows(
    starts: Tensor, columns: Tensor, values: Tensor, width: int
) -> Tensor:
    """A matrix of its compressed rows, sorted already."""
    shape = (len(starts) - 1, width)
    with warnings.catch_warnings():
        # PyTorch announces on first use that compressed rows are in beta.
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            starts,
            columns,
            values,
            shape,
            device=values.device,
            check_invariants=False,
        )
