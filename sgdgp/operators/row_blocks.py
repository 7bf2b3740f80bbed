"""K in row blocks that GPyTorch evaluates: the fallback for every other kernel."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.operators.arguments import index_length, piece, points_behind, take
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.evaluation import evaluated, with_fixed_grids

_BASE_COPIES = 6
"""Copies of a block that GPyTorch keeps to evaluate it, about: distances, their parts,
exponentials, products."""

_MOST_ROWS = 4096
"""Points of a block at most: higher ones make no product faster."""

_DIAGONAL_POINTS = 256
"""Points whose diagonal is asked for at once: kernels without a diagonal of their own
are evaluated at all pairs of them."""


class RowBlocksOperator(KernelOperator):
    """K(X1, X2) through ``kernel(x1, x2).to_dense()``, a few rows at a time.

    Works for every GPyTorch kernel that is a function of two points, those with
    several outputs per point included: with T of them the operator has T n rows, and
    row r belongs to point r // T. The kernel is evaluated as it is at the time of a
    product; do not change its hyperparameters while a solve is running.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes that a row block and what GPyTorch needs to evaluate it
            may take. Default: half of what is free. At least the rows of one point
            are evaluated at a time.
    """

    name = "row_blocks"

    def _prepare(self) -> None:
        self.outputs_per_input = _outputs_per_input(self.kernel, self.x)
        self.kernel = with_fixed_grids(self.kernel, self.x, self.x_rows)
        self._points_per_block = self._affordable_points()
        self.rows_per_step = self._points_per_block * self.outputs_per_input

    def _affordable_points(self) -> int:
        """Row points per block, such that GPyTorch's temporaries fit as well.

        Beside the block itself there are distances, exponentials and, for kernels
        like spectral mixtures, one copy per entry of their largest parameter.
        """
        largest = max((p.numel() for p in self.kernel.parameters()), default=1)
        copies = _BASE_COPIES + 2 * largest
        per_entry = copies * self.x.element_size()
        row = self.shape[1] * self.outputs_per_input * per_entry
        return max(1, min(_MOST_ROWS, self.memory_budget // max(1, row)))

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        length = index_length(index)
        out = v.new_empty(length, v.shape[1])
        everything = slice(0, self.shape[1])
        for rows in slices(length, self.rows_per_step):
            torch.mm(self._dense(piece(index, rows), everything), v, out=out[rows])
        return out

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        length = index_length(i)
        if length <= self.rows_per_step:
            return self._dense(i, j)
        out = self.x.new_empty(length, index_length(j))
        for rows in slices(length, self.rows_per_step):
            out[rows] = self._dense(piece(i, rows), j)
        return out

    def _dense(self, i: Tensor | slice, j: Tensor | slice) -> Tensor:
        """K[i, j] in one call of the kernel."""
        if index_length(i) == 0 or index_length(j) == 0:
            return self.x.new_zeros(index_length(i), index_length(j))
        row_points, rows = points_behind(i, self.outputs_per_input)
        column_points, columns = points_behind(j, self.outputs_per_input)
        x1, x2 = take(self.x_rows, row_points), take(self.x, column_points)
        dense = evaluated(self.kernel, x1, x2).to(self.dtype)
        if rows is not None:
            dense = take(dense, rows)
        if columns is not None:
            dense = dense[:, columns]
        return dense

    def _diagonal_entries(self) -> Tensor:
        # From the kernel's own ``diag=True``.
        size = max(1, min(_DIAGONAL_POINTS, self._points_per_block))
        parts = [self._diagonal_of(x) for x in self.x.split(size)]
        return torch.cat(parts)

    def _diagonal_of(self, x: Tensor) -> Tensor:
        with gpytorch.settings.lazily_evaluate_kernels(False):
            found = gpytorch.kernels.kernel.to_dense(self.kernel(x, diag=True))
        expected = self.outputs_per_input * x.shape[0]
        if found.shape != (expected,):
            found = evaluated(self.kernel, x, x).diagonal()
        return found.to(self.dtype)


def _outputs_per_input(kernel: Kernel, x: Tensor) -> int:
    outputs = kernel.num_outputs_per_input(x, x)
    if not isinstance(outputs, int):
        raise ValueError(
            f"{type(kernel).__name__} must have one number of outputs per input, "
            f"found {outputs}"
        )
    return outputs
