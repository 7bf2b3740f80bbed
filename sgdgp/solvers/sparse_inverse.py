"""A sparse factor G with G^T G ~ (R + Sigma)^-1, R = K - L L^T a residual kernel.

Vecchia's approximation (Vecchia, 1988; Kolotilina & Yeremin, 1993, for general
matrices): in a random order, row i regresses on the k most correlated of the rows
before it, N(i),

    c_i = A[N, N]^-1 A[N, i],   d_i = A[i, i] - A[i, N] c_i,   A = R + Sigma,
    G[i, N] = -c_i / sqrt(d_i),   G[i, i] = 1 / sqrt(d_i).

Short-range correlation is what a low-rank factor cannot see and what a few
neighbours see best. Costs a pass over K for the neighbours and n k^3 / 3 for the
regressions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sgdgp.operators.base import row_slices
from sgdgp.solvers.system import System

_TILE_ENTRIES = 2**22
_BLOCK_ENTRIES = 2**24


@dataclass(frozen=True)
class Neighbours:
    """The most correlated earlier rows of every row, in a random order.

    Attributes:
        index: Rows (n, k); meaningless where not ``known``.
        known: Whether there is such a neighbour (n, k).
    """

    index: Int[Tensor, "n k"]
    known: Bool[Tensor, "n k"]


@dataclass(frozen=True)
class SparseFactor:
    """G and its transpose in compressed rows."""

    rows: Tensor
    transposed: Tensor
    explained: float
    """Mean logarithm of A[i, i] / d_i: what the neighbours tell of a row."""


def nearest_earlier(
    system: System, count: int, generator: torch.Generator
) -> Neighbours:
    """For every row, the ``count`` rows before it that K correlates it with most.

    Args:
        system: The system.
        count: Neighbours k.
        generator: Source of the order.
    """
    n = system.n
    device = system.rhs.device
    rank = torch.randperm(n, generator=generator, device=generator.device).to(device)
    index = torch.empty(n, count, dtype=torch.long, device=device)
    known = torch.empty(n, count, dtype=torch.bool, device=device)
    scale = system.operator.diagonal().clamp_min(torch.finfo(system.rhs.dtype).tiny)
    scale = scale.rsqrt_()
    everything = slice(0, n)
    for rows in row_slices(n, max(1, _TILE_ENTRIES // n)):
        score = (system.operator.block(rows, everything) * scale).abs_()
        score.masked_fill_(rank >= rank[rows].unsqueeze(1), -1.0)
        values, index[rows] = score.topk(count, dim=1, sorted=False)
        known[rows] = values >= 0.0
    return Neighbours(index, known)


def sparse_factor(
    system: System, factor: Float[Tensor, "n r"], neighbours: Neighbours
) -> SparseFactor:
    """G for given neighbours; regressions in float64."""
    n, count = neighbours.index.shape
    values = system.rhs.new_empty(n, count + 1)
    factor = factor.to(system.rhs.dtype).contiguous()
    diagonal = system.operator.diagonal().double()
    # Rounding of K's entries must not make a block of near-duplicates indefinite.
    jitter = 8.0 * torch.finfo(system.rhs.dtype).eps * diagonal
    explained = 0.0
    per_row = (count + 1) * max(count + 1, factor.shape[1])
    for rows in row_slices(n, max(1, _BLOCK_ENTRIES // per_row)):
        index, known = neighbours.index[rows], neighbours.known[rows]
        own = torch.arange(rows.start, rows.stop, device=index.device).unsqueeze(1)
        both = torch.cat([index, own], dim=1)
        block = system.operator.small_blocks(both)
        if factor.shape[1]:
            part = factor[both]
            block = block.baddbmm_(part, part.mT, alpha=-1.0)
        block = block.double()
        block.diagonal(dim1=1, dim2=2).add_(
            system.noise[both, 0].double() + jitter[both]
        )
        inner, cross = block[:, :-1, :-1], block[:, -1, :-1] * known
        own_variance = block[:, -1, -1]
        inner = inner * (known.unsqueeze(2) & known.unsqueeze(1))
        inner.diagonal(dim1=1, dim2=2).add_((~known).double())
        corner, info = torch.linalg.cholesky_ex(inner)
        regression = torch.cholesky_solve(cross.unsqueeze(2), corner).squeeze(2)
        left = own_variance - (regression * cross).sum(1)
        floor = 0.5 * system.noise[rows, 0].double()
        failed = (info != 0) | ~torch.isfinite(left)
        regression = torch.where(failed.unsqueeze(1), 0.0, regression)
        left = torch.where(failed, own_variance, left).clamp_min(floor)
        explained += float((own_variance.clamp_min(floor) / left).log().sum())
        root = left.rsqrt().unsqueeze(1)
        values[rows] = torch.cat([-regression * root, root], dim=1).to(values.dtype)
    return _compressed(values, neighbours, explained / n)


def _compressed(
    values: Tensor, neighbours: Neighbours, explained: float
) -> SparseFactor:
    n = len(values)
    own = torch.arange(n, device=values.device)
    known = torch.cat([neighbours.known, neighbours.known.new_ones(n, 1)], dim=1)
    columns = torch.cat([neighbours.index, own.unsqueeze(1)], dim=1)[known]
    rows = own.unsqueeze(1).expand_as(known)[known]
    values = values[known]
    return SparseFactor(
        _csr(rows, columns, values, n), _csr(columns, rows, values, n), explained
    )


def _csr(rows: Tensor, columns: Tensor, values: Tensor, n: int) -> Tensor:
    order = torch.argsort(rows * n + columns)
    counts = torch.bincount(rows, minlength=n)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings():
        # PyTorch announces on first use that compressed rows are in beta.
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            starts, columns[order], values[order], (n, n), check_invariants=False
        )
