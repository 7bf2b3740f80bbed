"""The Tanimoto kernel of count fingerprints as a GPyTorch kernel.

Its tiles come from lists of occupied bins:

    sum_d min(x_d, y_d) = sum over the occupied bins d of x of min(x_d, y_d).

Many molecules have the same count in the same bin, so that for a tile the rows
min(c, Y_d) of all pairs (d, c) that occur in it are written down once, and each
molecule adds up those of its own pairs. A kernel entry costs one addition for each
occupied bin (about 30), where a product of unary-expanded counts would cost one for
each pair that occurs anywhere (some thousand). The sum of maxima is |x| + |y| less
the sum of minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.nn.functional import embedding_bag

from sgdgp.core.slices import slices
from sgdgp.features.dispatch import FeatureRequest
from sgdgp.features.fingerprints import (
    SparseCounts,
    TanimotoFeatures,
    by_bins,
    check_fingerprints,
    compact,
    sparse_counts,
    totals,
    with_own_bin,
)
from sgdgp.kernels.registry import (
    BoundTile,
    BoundValues,
    Forms,
    Scratch,
    TileKernel,
    register_kernel,
    select,
)

_TILE_ENTRIES = 2**19
"""Entries of a tile where GPyTorch asks for the matrix: as many as an operator's."""

_TABLE_CPU = 2**19
"""Entries of the table of minima at a time, half of which stay in a cache of 1 MB."""

_TABLE_GPU = 2**24
"""The same on a GPU, which wants larger pieces and has the memory (64 MB)."""

_NARROWEST = 64
"""Columns of a table at least: with fewer, a row of it is no vector operation."""


class TanimotoKernel(Kernel):
    """T(x, x') = sum_d min(x_d, x'_d) / sum_d max(x_d, x'_d) for counts x_d >= 0.

    The similarity of two molecules by their count fingerprints (Ralaivola et al.,
    Neural Networks 2005): 1 for the same fingerprint, 0 for no fragment in common, and
    T(0, 0) = 1. Counts need not be whole; on zeros and ones T is the Jaccard index.

    There are no parameters: put it into a ``ScaleKernel`` for an amplitude, as is
    usual for GPyTorch kernels. Inputs have no gradient, and one that is asked for is
    refused. Entries cost as much as the fingerprints have occupied bins.

    Args:
        active_dims: Columns of the inputs that hold the fingerprint. Default: all.
        batch_shape: Batch shape of the kernel; it only shapes the result.

    Example:
        >>> kernel = ScaleKernel(TanimotoKernel())
        >>> kernel(torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])).to_dense()
    """

    is_stationary = False
    has_lengthscale = False

    def __init__(
        self,
        *,
        active_dims: tuple[int, ...] | None = None,
        batch_shape: torch.Size | None = None,
    ) -> None:
        super().__init__(active_dims=active_dims, batch_shape=batch_shape)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        """T (..., n, m) of counts x1 (..., n, d) and x2 (..., m, d), or its diagonal.

        Raises:
            NoInputGradientError: An input requires a gradient.
            ValueError: A count is negative, NaN or infinite, or each column is to be
                a batch element.
        """
        if last_dim_is_batch:
            raise ValueError(
                "last_dim_is_batch: a fingerprint is compared as a whole, not column "
                "by column"
            )
        for name, x in (("x1", x1), ("x2", x2)):
            check_fingerprints(name, x)
        with torch.no_grad():
            if diag:
                found = _of_pairs(with_own_bin(x1), with_own_bin(x2))
            elif x1.ndim == x2.ndim == 2:
                found = _by_tiles(x1, x2)
            else:
                found = _by_distances(with_own_bin(x1), with_own_bin(x2))
        kept = 1 if diag else 2
        batch = torch.broadcast_shapes(self.batch_shape, found.shape[:-kept])
        return found.expand(*batch, *found.shape[-kept:])


def _of_pairs(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.minimum(x1, x2).sum(-1) / torch.maximum(x1, x2).sum(-1)


def _by_tiles(x1: Tensor, x2: Tensor) -> Tensor:
    tile = TanimotoTile(1.0, None)
    origin = x1.new_zeros(x1.shape[1])
    left, right = tile.left(x1, origin), tile.right(x2, origin)
    out = x1.new_empty(len(x1), len(x2))
    for rows in slices(len(x1), max(1, _TILE_ENTRIES // max(1, len(x2)))):
        part = out[rows]
        cut = tuple(form[rows] for form in left)
        tile.tile(cut, right, part, (torch.empty_like(part),))
    return out


def _by_distances(x1: Tensor, x2: Tensor) -> Tensor:
    """From |x - y|_1 = |x|_1 + |y|_1 - 2 sum min: takes batches, costs all bins."""
    both = x1.sum(-1).unsqueeze(-1) + x2.sum(-1).unsqueeze(-2)
    apart = torch.cdist(x1, x2, p=1.0)
    return (both - apart).clamp_min(0) / (both + apart)


@dataclass(frozen=True)
class TanimotoTile(TileKernel):
    """T(x, x') = sum_d min(x_d, x'_d) / sum_d max(x_d, x'_d).

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
    """

    dims: Tensor | None

    @property
    def num_forms(self) -> int:
        return 4

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        """Lists of occupied bins, their counts, codes of both; sums of counts."""
        chosen = select(x, self.dims)
        sparse = sparse_counts(compact("x", chosen))
        return sparse.bins, sparse.counts, sparse.codes, totals(chosen)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        """Counts, bin after bin in memory, and their sums (the rest is filling)."""
        chosen = select(x, self.dims)
        sums = totals(chosen)
        return by_bins(compact("x", chosen)), sums, sums, sums

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        *lists, sums = left
        others, other_sums, *_ = right
        if not out.numel():
            return
        sparse = SparseCounts(*lists)
        lengths = sparse.occupied.sum(1)
        starts = lengths.cumsum(0) - lengths
        pair_bins, pair_counts, place = sparse.pairs()
        dtype = torch.promote_types(pair_counts.dtype, others.dtype)
        pair_counts = pair_counts.unsqueeze(1).to(dtype)
        table_entries = _TABLE_CPU if out.device.type == "cpu" else _TABLE_GPU
        width = max(_NARROWEST, table_entries // len(pair_bins))
        for columns in slices(len(others), width):
            table = others[columns].mT.index_select(0, pair_bins).to(dtype)
            torch.minimum(table, pair_counts, out=table)
            table = table if table.is_floating_point() else table.float()
            out[:, columns] = embedding_bag(place, table, starts, mode="sum")
        either = torch.add(sums.unsqueeze(1), other_sums, out=scratch[0])
        out.div_(either.sub_(out))

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile:
        return BoundValues(self, x, origin)


def _tile(kernel: TanimotoKernel, dims: Tensor | None) -> TanimotoTile:
    return TanimotoTile(1.0, dims)


def _features(kernel: TanimotoKernel, request: FeatureRequest) -> TanimotoFeatures:
    """Signed hashes: see :class:`sgdgp.features.TanimotoFeatures`."""
    seed = torch.randint(
        2**62, (), generator=request.generator, device=request.generator.device
    )
    return TanimotoFeatures(int(seed), request.dim, request.num_features)


register_kernel(TanimotoKernel, tile=_tile, features=_features)
