"""The tiled product as it was before version 0.2, frozen: a rival of what it is now.

All tiles of K, one after another, the profile in torch's passes, threads inside each
operation. Only what a plain product of a stationary kernel needs is left.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sgdgp.kernels.distance import StationaryTile, squared_distances

_TILE_ROWS = 512
_TILE_ENTRIES = 512 * 1024


class Before:
    """Rows of K(X, X) v."""

    def __init__(self, tile: StationaryTile, x: Tensor) -> None:
        origin = x.double().mean(0).to(x)
        self._tile, self._diagonal = tile, tile.tile_diagonal(x)
        (self._left,), (self._right,) = tile.left(x, origin), tile.right(x, origin)
        self._flat = x.new_empty(1 + tile.scratch, _TILE_ENTRIES)

    def product(self, rows: slice, v: Tensor) -> Tensor:
        """K[rows, :] v."""
        out = v.new_zeros(v.shape[1], rows.stop - rows.start).mT
        for strip in _slices(rows.start, rows.stop, _TILE_ROWS):
            self._add_strip(
                strip, v, out[strip.start - rows.start : strip.stop - rows.start]
            )
        return out.mul_(self._tile.factor)

    def _add_strip(self, rows: slice, v: Tensor, out: Tensor) -> None:
        height = rows.stop - rows.start
        left = self._left[rows]
        for columns in _slices(0, len(v), _TILE_ENTRIES // height):
            size = height, columns.stop - columns.start
            entry, *scratch = self._flat[:, : size[0] * size[1]].unflatten(1, size)
            squared_distances(left, self._right[columns], entry, scratch)
            self._tile.profile(entry, scratch)
            start = max(rows.start, columns.start)
            stop = min(rows.stop, columns.stop)
            if start < stop:
                square = entry[
                    start - rows.start : stop - rows.start,
                    start - columns.start : stop - columns.start,
                ]
                square.diagonal().copy_(self._diagonal[start:stop])
            out.mT.addmm_(v[columns].mT, entry.mT)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
