"""K in tiles that stay in cache: distance, profile and product fused per tile."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.slices import slices
from sgdgp.core.threads import share
from sgdgp.kernels.registry import FactoredTile, differentiable_tile, tile_kernel
from sgdgp.operators.arguments import check_vectors, index_length, piece, take
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.gradients import form_by_tiles, misses_a_gradient

_TILE_ROWS = 512
"""Rows of a tile: enough for fast products with both sides of it."""

_LEAST_ROWS = 128
"""Rows of a tile where threads share few of them; of fewer, they share the columns."""

_TILE_ENTRIES_CPU = 512 * 512
"""Entries of a tile: 1 MB in float32, half of what a core's own cache holds."""

_TILE_ENTRIES_GPU = 1024 * 8192
"""Entries of a tile on a GPU: 32 MB in float32, so that few launches fill it."""

_WORTH_A_THREAD = 512 * 1024
"""Entries that are worth a thread of their own: half a millisecond, ten times what it
takes to hand them over."""

_MEAN_ROWS = 4096
"""Rows that are copied to float64 at a time to find their mean."""


class TiledOperator(KernelOperator):
    """K(X1, X2) streamed in tiles; memory O(n d) and a small workspace per thread.

    A tile is one matrix product (the distances), one compiled pass or a few in-place
    ones (the profile; in few dimensions a compiled pass makes the distances too), and
    one matrix product with the right factor. Where all of a
    symmetric K is multiplied, only tiles on and above its diagonal are made, and each
    serves both of its blocks. Threads, as many as torch may use, share the tiles.
    Hyperparameters are those at construction.

    Args:
        kernel: A GPyTorch kernel that has a tile form (see ``tile_kernel``).
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes that the workspaces may take. Default: half of what is
            free; far less is used in any case.

    Raises:
        ValueError: The kernel has no tile form.

    Example:
        >>> operator = TiledOperator(gpytorch.kernels.RBFKernel(), torch.randn(100, 3))
        >>> operator.rows(slice(0, 10)).matmul(torch.randn(100, 2)).shape
        torch.Size([10, 2])
    """

    name = "tiled"
    sums_tiles = True

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
        self._spare_workspaces: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickles hold what the operator is, not what it works in."""
        return {**self.__dict__, "_spare_workspaces": []}

    @torch.no_grad()
    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """K v: one pass over the kernel matrix for all columns of v (n, k)."""
        check_vectors(v, self.shape[1], self.dtype)
        rows, columns = self.shape
        if self.is_square and self.sums_tiles:
            part = self.part
            workers = self._workers(rows * columns // 2 // part.size)
            edges = _equal_areas(rows, workers * part.size)
            edges = edges[part.rank * workers : (part.rank + 1) * workers + 1]
            # The rows that all sums of ``_half_matmul`` have together.
            summed = sum(rows - edge for edge in edges[:-1])
            affordable = 2 * summed * v.shape[1] * v.element_size()
            if part.size > 1 or affordable <= self.memory_budget:
                return self._half_matmul(v, edges)
        return self._rows_matmul(slice(0, rows), v)

    def _half_matmul(self, v: Tensor, edges: Sequence[int]) -> Tensor:
        """K v of a square operator by the tiles on and above its diagonal.

        Args:
            v: Right factor (n, k).
            edges: Where the rows of every worker begin, and where the last ones end;
                of a part these are not all rows.
        """
        n, workers = len(v), len(edges) - 1
        entries = self._entries(workers)
        height = min(_TILE_ROWS, math.isqrt(entries))
        # One for each worker, of all rows that its tiles have a part in. Products that
        # are written transposed waste nothing on a ragged last group of columns.
        sums = [v.new_zeros(v.shape[1], n - edge) for edge in edges[:-1]]

        def band(first: int, stop: int, out: Tensor) -> Iterator[None]:
            with self._workspace(entries) as flat:
                for rows in slices(stop, height, first):
                    own = out[:, rows.start - first : rows.stop - first]
                    for tile, _ in self._tiles(rows, rows, flat):
                        own.addmm_(v[rows].mT, tile.mT)
                    for tile, cut in self._tiles(rows, slice(rows.stop, n), flat):
                        own.addmm_(v[cut].mT, tile.mT)
                        other = out[:, cut.start - first : cut.stop - first]
                        other.addmm_(v[rows].mT, tile)
                        yield

        share(map(band, edges[:-1], edges[1:], sums), workers)
        for edge, other in zip(edges[1:-1], sums[1:], strict=True):
            sums[0][:, edge - edges[0] :] += other
        # A part has nothing above its first row.
        return pad(sums[0].mul_(self.tile.factor), (edges[0], 0)).mT

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        length, own = index_length(index), self.part.share(self.shape[1])
        width = len(own)
        workers = self._workers(length * width)
        entries = self._entries(workers)
        strips, parts = _grid(length, width, workers, min(_TILE_ROWS, entries))
        parts = [slice(own.start + p.start, own.start + p.stop) for p in parts]
        sums = v.new_zeros(len(parts), v.shape[1], length)

        def product(rows: slice, columns: slice, out: Tensor) -> Iterator[None]:
            with self._workspace(entries) as flat:
                for tile, cut in self._tiles(piece(index, rows), columns, flat):
                    out[:, rows].addmm_(v[cut].mT, tile.mT)
                    yield

        pairs = ((rows, j) for j in range(len(parts)) for rows in strips)
        share((product(rows, parts[j], sums[j]) for rows, j in pairs), workers)
        total = sums[0] if len(sums) == 1 else sums.sum(0)
        return total.mul_(self.tile.factor).mT

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        # Tiles are written where they stay. Both halves of a symmetric block are made,
        # the same but for rounding: turning one over takes longer.
        length, width = index_length(i), index_length(j)
        out = self.x.new_empty(length, width)
        workers = self._workers(length * width)
        entries = self._entries(workers)
        strips, parts = _grid(length, width, workers, min(_TILE_ROWS, entries))

        def fill(rows: slice, columns: slice) -> Iterator[None]:
            with self._workspace(entries) as flat:
                index, strip = piece(i, rows), out[rows]
                for tile, _ in self._tiles(index, columns, flat, j, strip):
                    if self.tile.factor != 1.0:
                        tile.mul_(self.tile.factor)
                    yield

        share((fill(rows, columns) for columns in parts for rows in strips), workers)
        return out

    def _tiles(
        self,
        rows: RowIndex,
        columns: slice,
        flat: Tensor,
        of: RowIndex | None = None,
        out: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, slice]]:
        """Tiles that fit a workspace, their diagonal exact, one after another.

        Args:
            rows: Rows of all of them (a,).
            columns: Columns that they cover together.
            flat: Workspace (buffers, entries).
            of: What ``columns`` counts. Default: the columns of K.
            out: Where they are written, at their columns. Default: the workspace, in
                which each is until the next one is asked for.

        Yields:
            A tile (a, b) and the columns it covers.
        """
        height = index_length(rows)
        if height == 0:
            return
        left = tuple(take(form, rows) for form in self._left)
        cuts = list(slices(columns.stop, flat.shape[1] // height, columns.start))
        indices = [cut if of is None else piece(of, cut) for cut in cuts]
        write_diagonal = self._diagonal_writer(rows, indices)
        for cut, index in zip(cuts, indices, strict=True):
            right = tuple(take(form, index) for form in self._right)
            tile, *scratch = _buffers(flat, height, cut.stop - cut.start)
            tile = tile if out is None else out[:, cut]
            self.tile.tile(left, right, tile, scratch)
            if write_diagonal is not None:
                write_diagonal(tile, index)
            yield tile, cut

    def _diagonal_writer(
        self, rows: RowIndex, columns: Sequence[RowIndex]
    ) -> Callable[[Tensor, Any], None] | None:
        """What overwrites entries on the diagonal of tiles of these columns, if any."""
        if self._diagonal is None or not columns:
            return None
        if isinstance(columns[0], Tensor):
            return partial(_write_where_equal, self._diagonal, rows)
        if isinstance(rows, slice):
            return partial(_write_consecutive, self._diagonal, rows)
        return _IndexDiagonal(self._diagonal, rows, columns).write

    def _workers(self, entries: int) -> int:
        """Threads for so many entries of K."""
        if self.device.type != "cpu":
            return 1
        return max(1, min(torch.get_num_threads(), entries // _WORTH_A_THREAD))

    def _entries(self, workers: int) -> int:
        """Entries of a tile: what fits the cache, less if the budget says so."""
        on_gpu = self.device.type != "cpu"
        preferred = _TILE_ENTRIES_GPU if on_gpu else _TILE_ENTRIES_CPU
        # Half of the budget is for sums.
        tiles = 2 * workers * (1 + self.tile.scratch)
        affordable = self.memory_budget // (tiles * self.x.element_size())
        return max(1, min(preferred, affordable))

    @contextlib.contextmanager
    def _workspace(self, entries: int) -> Iterator[Tensor]:
        """A workspace (buffers, entries) for one worker, kept for the next."""
        try:
            flat = self._spare_workspaces.pop()
        except IndexError:
            flat = self.x.new_empty(0, 0)
        if flat.shape[1] != entries:
            # Made in inference mode, it could be written into nowhere else.
            with torch.inference_mode(False):
                flat = self.x.new_empty(1 + self.tile.scratch, entries)
        try:
            yield flat
        finally:
            self._spare_workspaces.append(flat)

    def _diagonal_entries(self) -> Tensor:
        assert self._diagonal is not None
        return self.tile.factor * self._diagonal

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        tile = differentiable_tile(self.kernel)
        kernels = []
        for _ in range(self._workers(len(x) ** 2 // 2 // self.part.size)):
            bound = None if tile is None else tile.bind(x, self.origin)
            if tile is None or bound is None:
                return super()._quadratic_form(a, b, x)
            kernels.append(FactoredTile(tile.factor, bound, x))
        if torch.is_grad_enabled() and misses_a_gradient(self.kernel, kernels[0], x):
            return super()._quadratic_form(a, b, x)
        return self._form_by_tiles(kernels, a, b, x)

    def _form_by_tiles(
        self, kernels: Sequence[FactoredTile], a: Tensor, b: Tensor, x: Tensor
    ) -> Tensor:
        """``quadratic_form`` of a tile kernel whose derivatives are analytic."""
        return form_by_tiles(kernels, a, b, self.memory_budget, self.part)


def _buffers(flat: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Contiguous buffers (rows, columns) inside a workspace (buffers, entries)."""
    return tuple(flat[:, : rows * columns].unflatten(1, (rows, columns)).unbind())


def _equal_areas(n: int, workers: int) -> list[int]:
    """Rows that cut what is on and above a diagonal into equal parts, and n."""
    return [round(n * (1 - (1 - i / workers) ** 0.5)) for i in range(workers + 1)]


def _grid(
    length: int, width: int, workers: int, highest: int
) -> tuple[list[slice], list[slice]]:
    """Strips of rows, and parts of the columns, whose tiles workers share evenly.

    There is one part, and nothing to add up, unless there are too few rows for all.
    """
    strips = workers * -(-length // (workers * highest))
    strips = max(min(strips, length // _LEAST_ROWS), -(-length // highest), 1)
    parts = 1 if strips >= workers else workers // strips
    rows, columns = -(-length // strips), -(-width // parts)
    return list(slices(length, max(1, rows))), list(slices(width, max(1, columns)))


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
        columns: The columns of the tiles, consecutive slices.
    """

    def __init__(self, diagonal: Tensor, rows: Tensor, columns: Sequence[Any]) -> None:
        self._columns, self._positions = torch.sort(rows)
        self._values = diagonal[self._columns]
        edges = [columns[0].start, *(cut.stop for cut in columns)]
        limits = torch.tensor(edges, device=rows.device)
        found = torch.searchsorted(self._columns, limits).tolist()
        self._bounds = dict(zip(edges, pairwise(found), strict=False))

    def write(self, tile: Tensor, columns: slice) -> None:
        """Fix the tile whose columns are ``columns`` of the kernel matrix."""
        start, stop = self._bounds[columns.start]
        if start < stop:
            inside = self._columns[start:stop] - columns.start
            tile[self._positions[start:stop], inside] = self._values[start:stop]


def _write_where_equal(
    diagonal: Tensor, rows: RowIndex, tile: Tensor, columns: Tensor
) -> None:
    """Fix the tile K[rows, columns] of columns in any order."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=tile.device)
    on_diagonal = rows[:, None] == columns[None, :]
    torch.where(on_diagonal, diagonal[rows][:, None], tile, out=tile)
