"""Write the exact diagonal of a square kernel matrix over its tiles.

Distances from a matrix product are off by rounding at zero distance, which is where
a Matern-1/2 kernel feels it most, and the diagonal decides whether K + Sigma is
positive definite.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor


class NoDiagonal:
    """For operators whose rows and columns are different points."""

    def write(self, tile: Tensor, columns: slice) -> None:
        """Leave the tile as it is."""


class SliceDiagonal:
    """For consecutive rows.

    Args:
        diagonal: The exact diagonal (n,).
        rows: The rows of every tile.
    """

    def __init__(self, diagonal: Tensor, rows: slice) -> None:
        self._diagonal = diagonal
        self._rows = rows

    def write(self, tile: Tensor, columns: slice) -> None:
        """Fix the tile whose columns are ``columns`` of the kernel matrix."""
        start = max(self._rows.start, columns.start)
        stop = min(self._rows.stop, columns.stop)
        if start < stop:
            square = tile[
                start - self._rows.start : stop - self._rows.start,
                start - columns.start : stop - columns.start,
            ]
            square.diagonal().copy_(self._diagonal[start:stop])


class IndexDiagonal:
    """For rows in any order; sorted once, so that a tile finds its own at once.

    Args:
        diagonal: The exact diagonal (n,).
        rows: The rows of every tile, (b,).
        edges: Where the column tiles start, (t,), the first of them 0.
    """

    def __init__(self, diagonal: Tensor, rows: Tensor, edges: Tensor) -> None:
        self._columns, self._positions = torch.sort(rows)
        self._values = diagonal[self._columns]
        starts = torch.searchsorted(self._columns, edges).tolist()
        stops = [*starts[1:], rows.shape[0]]
        self._bounds = dict(
            zip(edges.tolist(), zip(starts, stops, strict=True), strict=True)
        )

    def write(self, tile: Tensor, columns: slice) -> None:
        """Fix the tile whose columns are ``columns`` of the kernel matrix."""
        start, stop = self._bounds[columns.start]
        if start < stop:
            inside = self._columns[start:stop] - columns.start
            flat = self._positions[start:stop] * tile.shape[1] + inside
            tile.view(-1).index_copy_(0, flat, self._values[start:stop])


DiagonalWriter: TypeAlias = NoDiagonal | SliceDiagonal | IndexDiagonal
"""Overwrites the entries of a tile that lie on the diagonal."""


def write_where_equal(
    tile: Tensor, rows: Tensor | slice, columns: Tensor | slice, diagonal: Tensor
) -> None:
    """Fix the entries of a tile whose row and column are the same point.

    Args:
        tile: K[rows, columns] (a, b), overwritten.
        rows: Resolved row index.
        columns: Resolved column index.
        diagonal: The exact diagonal (n,).
    """
    if isinstance(columns, slice) and isinstance(rows, slice):
        SliceDiagonal(diagonal, rows).write(tile, columns)
        return
    i, j = (
        torch.arange(k.start, k.stop, device=tile.device) if isinstance(k, slice) else k
        for k in (rows, columns)
    )
    on_diagonal = i[:, None] == j[None, :]
    torch.where(on_diagonal, diagonal[i][:, None], tile, out=tile)
