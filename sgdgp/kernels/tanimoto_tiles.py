"""Tile form of the Tanimoto kernel: sums of minima from lists of occupied bins.

    sum_d min(x_d, y_d) = sum over the occupied bins d of x of min(x_d, y_d).

Many molecules have the same count in the same bin, so that for a tile the rows
min(c, Y_d) of all pairs (d, c) that occur in it are written down once, and each
molecule adds up those of its own pairs. A kernel entry costs one addition for each
occupied bin (about 30), where a product of unary-expanded counts would cost one for
each pair that occurs anywhere (some thousand). The sum of maxima is |x| + |y| less
the sum of minima.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sgdgp.core.slices import slices
from sgdgp.features.fingerprints import (
    by_bins,
    compact,
    distinct,
    sparse_counts,
    totals,
)
from sgdgp.kernels.registry import Forms, TileKernel
from sgdgp.kernels.stationary import select

_TABLE_CPU = 2**19
_TABLE_GPU = 2**24
"""Entries of the table of minima at a time."""


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

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        bins, counts, codes, sums = left
        others, other_sums, *_ = right
        if not out.numel():
            return
        occupied = counts > 0
        lengths = occupied.sum(1)
        starts = lengths.cumsum(0) - lengths
        one_of_each, place = distinct(codes[occupied])
        pair_bins = bins[occupied][one_of_each]
        dtype = torch.promote_types(counts.dtype, others.dtype)
        pair_counts = counts[occupied][one_of_each].unsqueeze(1).to(dtype)
        table_entries = _TABLE_CPU if out.device.type == "cpu" else _TABLE_GPU
        width = max(64, table_entries // len(pair_bins))
        for columns in slices(len(others), width):
            table = others[columns].mT.index_select(0, pair_bins).to(dtype)
            torch.minimum(table, pair_counts, out=table)
            table = table if table.is_floating_point() else table.float()
            out[:, columns] = embedding_bag(place, table, starts, mode="sum")
        either = torch.add(sums.unsqueeze(1), other_sums, out=scratch[0])
        out.div_(either.sub_(out))

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])
