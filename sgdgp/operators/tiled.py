"""K in tiles that stay in cache: distance, profile and product fused per tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.kernels.registry import FactoredTile, Forms, differentiable_tile, tile_kernel
from sgdgp.operators.arguments import index_length, piece, take
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.gradients import form_by_tiles, misses_a_gradient

_TILE_ROWS = 512
"""Rows of a tile: enough for fast products with both sides of it."""

_TILE_ENTRIES_CPU = 512 * 1024
"""Entries of a tile: 2 MB in float32, so that it stays in the cache between passes."""

_TILE_ENTRIES_GPU = 1024 * 8192
"""Entries of a tile on a GPU: 32 MB in float32, so that few launches fill it."""

_MEAN_ROWS = 4096
"""Rows that are copied to float64 at a time to find their mean."""


@dataclass(frozen=True)
class _ColumnTiles:
    """All columns cut into tiles of one width, with their prepared inputs."""

    width: int
    tiles: tuple[tuple[slice, Forms], ...]
    edges: Tensor


class TiledOperator(KernelOperator):
    """K(X1, X2) streamed in tiles; memory O(n d) and one small workspace.

    A tile is one matrix product (the distances), a few in-place passes (the
    profile) and one matrix product with the right factor. Hyperparameters are those
    at construction.

    Args:
        kernel: A GPyTorch kernel that has a tile form (see ``tile_kernel``).
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes that the workspace may take. Default: half of what is
            free; far less is used in any case.

    Raises:
        ValueError: The kernel has no tile form.

    Example:
        >>> operator = TiledOperator(gpytorch.kernels.RBFKernel(), torch.randn(100, 3))
        >>> operator.rows(slice(0, 10)).matmul(torch.randn(100, 2)).shape
        torch.Size([10, 2])
    """

    name = "tiled"

    def _prepare(self) -> None:
        tile = tile_kernel(self.kernel)
        if tile is None:
            raise ValueError(
                f"{type(self.kernel).__name__} has no tile form; use the row_blocks "
                "operator, or register_kernel"
            )
        self.tile = tile
        with torch.no_grad():
            self.origin = _mean(self.x)
            self._left = tile.left(self.x_rows, self.origin)
            self._right = tile.right(self.x, self.origin)
            self._diagonal = tile.tile_diagonal(self.x) if self.is_square else None
        self._entries = self._tile_entries()
        self._strip_rows = max(1, min(_TILE_ROWS, self._entries))
        self._column_tiles: dict[int, _ColumnTiles] = {}
        self._spare_workspaces: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickles hold what the operator is, not what it works in."""
        return {**self.__dict__, "_column_tiles": {}, "_spare_workspaces": []}

    def _tile_entries(self) -> int:
        """Entries of a tile: what fits the cache, less if the budget says so."""
        on_gpu = self.device.type != "cpu"
        preferred = _TILE_ENTRIES_GPU if on_gpu else _TILE_ENTRIES_CPU
        buffers = 1 + self.tile.scratch
        affordable = self.memory_budget // (buffers * self.x.element_size())
        return max(1, min(preferred, affordable))

    def _tiles_for(self, rows: int) -> _ColumnTiles:
        """Column tiles for strips of ``rows`` rows, cut once per power of two."""
        height = max(1, min(self._strip_rows, 1 << max(0, rows - 1).bit_length()))
        if height not in self._column_tiles:
            width = max(1, min(self._entries // height, self.shape[1]))
            cuts = list(slices(self.shape[1], width))
            self._column_tiles[height] = _ColumnTiles(
                width,
                tuple((cut, tuple(form[cut] for form in self._right)) for cut in cuts),
                torch.tensor([cut.start for cut in cuts], device=self.device),
            )
        return self._column_tiles[height]

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        length = index_length(index)
        # A product written transposed wastes nothing on a ragged last group of columns.
        out = v.new_zeros(v.shape[1], length).mT
        for rows in slices(length, self._strip_rows):
            self._add_strip(piece(index, rows), v, out[rows])
        return out.mul_(self.tile.factor)

    def _add_strip(self, index: RowIndex, v: Tensor, out: Tensor) -> None:
        """Add tile[index, :] v to ``out``, for at most ``_strip_rows`` rows."""
        length = out.shape[0]
        columns = self._tiles_for(length)
        left = tuple(take(form, index) for form in self._left)
        write_diagonal = self._diagonal_writer(index, columns.edges)
        flat = self._workspace()
        width = columns.width
        entry, *scratch = _buffers(flat, length, width)
        for cut, right in columns.tiles:
            if cut.stop - cut.start != width:
                entry, *scratch = _buffers(flat, length, cut.stop - cut.start)
            self.tile.tile(left, right, entry, scratch)
            if write_diagonal is not None:
                write_diagonal(entry, cut)
            out.mT.addmm_(v[cut].mT, entry.mT)
        self._spare_workspaces.append(flat)

    def _diagonal_writer(
        self, index: RowIndex, edges: Tensor
    ) -> Callable[[Tensor, slice], None] | None:
        """What overwrites entries on the diagonal; None for a cross operator."""
        if self._diagonal is None:
            return None
        if isinstance(index, slice):
            return partial(_write_consecutive, self._diagonal, index)
        return _IndexDiagonal(self._diagonal, index, edges).write

    def _workspace(self) -> Tensor:
        """A workspace (buffers, entries); kept between calls, one per caller."""
        if self._spare_workspaces:
            return self._spare_workspaces.pop()
        return self.x.new_empty(1 + self.tile.scratch, self._entries)

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        # Beside the block only one strip of it is in memory.
        right = tuple(take(form, j) for form in self._right)
        width = index_length(j)
        out = self.x.new_empty(index_length(i), width)
        for rows in slices(out.shape[0], max(1, self._entries // max(1, width))):
            strip = piece(i, rows)
            left = tuple(take(form, strip) for form in self._left)
            scratch = self.x.new_empty(self.tile.scratch, rows.stop - rows.start, width)
            self.tile.tile(left, right, out[rows], tuple(scratch))
            if self._diagonal is not None:
                _write_where_equal(self._diagonal, strip, out[rows], j)
        return out.mul_(self.tile.factor)

    def _diagonal_entries(self) -> Tensor:
        assert self._diagonal is not None
        return self.tile.factor * self._diagonal

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        tile = differentiable_tile(self.kernel)
        bound = None if tile is None else tile.bind(x, self.origin)
        if tile is None or bound is None:
            return super()._quadratic_form(a, b, x)
        kernel = FactoredTile(tile.factor, bound, x)
        if torch.is_grad_enabled() and misses_a_gradient(self.kernel, kernel, x):
            return super()._quadratic_form(a, b, x)
        return form_by_tiles(kernel, a, b, self.memory_budget, self.part)


def _buffers(flat: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Contiguous buffers (rows, columns) inside a workspace (buffers, entries)."""
    return tuple(flat[:, : rows * columns].unflatten(1, (rows, columns)).unbind())


def _mean(x: Tensor) -> Tensor:
    """The mean point (d,), summed in float64."""
    # In parts, as each sum copies what it sums to float64.
    parts = [part.sum(0, dtype=torch.float64) for part in x.split(_MEAN_ROWS)]
    return (torch.stack(parts).sum(0) / max(1, len(x))).to(x.dtype)


# Distances from a matrix product are off by rounding at zero distance, which is where a
# Matern-1/2 kernel feels it most, and the diagonal decides whether K + Sigma is
# positive definite: the entries of tiles that lie on it are overwritten by exact ones.


def _write_consecutive(
    diagonal: Tensor, rows: slice, tile: Tensor, columns: slice
) -> None:
    """Fix the tile K[rows, columns], given the exact diagonal (n,)."""
    start, stop = max(rows.start, columns.start), min(rows.stop, columns.stop)
    if start < stop:
        square = tile[
            start - rows.start : stop - rows.start,
            start - columns.start : stop - columns.start,
        ]
        square.diagonal().copy_(diagonal[start:stop])


class _IndexDiagonal:
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


def _write_where_equal(
    diagonal: Tensor, rows: Tensor | slice, tile: Tensor, columns: Tensor | slice
) -> None:
    """Fix the tile K[rows, columns] of any resolved rows and columns."""
    if isinstance(columns, slice) and isinstance(rows, slice):
        _write_consecutive(diagonal, rows, tile, columns)
        return
    i, j = (
        torch.arange(k.start, k.stop, device=tile.device) if isinstance(k, slice) else k
        for k in (rows, columns)
    )
    on_diagonal = i[:, None] == j[None, :]
    torch.where(on_diagonal, diagonal[i][:, None], tile, out=tile)
