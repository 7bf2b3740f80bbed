"""Export to the GPyTorch world: a kernel operator as a ``LinearOperator``."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor

from sgdgp.operators.base import KernelOperator

_ENTRIES_PER_PIECE = 1024


class KernelLinearOperator(LinearOperator):
    """K(X1, X2) for ``linear_operator``: Lanczos, pivoted Cholesky, CG, ...

    No gradients flow through it: hyperparameters and inputs are constants.

    Args:
        operator: The kernel operator to export.

    Example:
        >>> exported = TiledOperator(kernel, x).to_linear_operator()
        >>> exported.pivoted_cholesky(rank=20)
    """

    def __init__(
        self,
        operator: KernelOperator | Tensor,
        *,
        source: KernelOperator | None = None,
    ) -> None:
        # linear_operator takes operators apart into tensors and puts them together
        # as cls(*tensors, **kwargs): there the inputs stand for the operator, which
        # travels beside them as ``source``.
        if isinstance(operator, Tensor):
            if source is None:
                raise TypeError("operator must be a KernelOperator, found a Tensor")
            operator = source
        super().__init__(operator.x, source=operator)
        self.operator = operator

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the entries."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Device that computes the entries."""
        return self.operator.device

    def _size(self) -> torch.Size:
        return torch.Size(self.operator.shape)

    def _matmul(self, rhs: Tensor) -> Tensor:
        """K rhs for rhs (n,), (n, k) or (..., n, k)."""
        if rhs.ndim == 1:
            return self.operator.matmul(rhs.unsqueeze(-1)).squeeze(-1)
        if rhs.ndim == 2:
            return self.operator.matmul(rhs)
        columns = rhs.movedim(-2, 0)
        product = self.operator.matmul(columns.reshape(columns.shape[0], -1))
        return product.view(-1, *columns.shape[1:]).movedim(0, -2)

    def _transpose_nonbatch(self) -> KernelLinearOperator:
        operator = self.operator
        if operator.is_square:
            return self
        return KernelLinearOperator(operator._rebuilt(operator.x_rows, operator.x))

    def _diagonal(self) -> Tensor:
        if self.operator.is_square:
            return self.operator.diagonal()
        i = torch.arange(min(self.operator.shape), device=self.device)
        return self._get_indices(i, i)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        """K[rows, columns] over the selected points, still an operator."""
        operator = self.operator
        if operator.outputs_per_input > 1 or batch_indices:
            return super()._getitem(row_index, col_index, *batch_indices)
        x, x_rows = operator.x[col_index], operator.x_rows[row_index]
        same = (
            isinstance(row_index, slice)
            and row_index == col_index
            and operator.is_square
        )
        return KernelLinearOperator(operator._rebuilt(x, None if same else x_rows))

    def _get_indices(
        self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor
    ) -> Tensor:
        """Single entries K[row_k, col_k], from the small blocks that hold them."""
        row_index, col_index = torch.broadcast_tensors(row_index, col_index)
        rows, columns = row_index.reshape(-1), col_index.reshape(-1)
        found = [
            _entries(self.operator, some_rows, some_columns)
            for some_rows, some_columns in zip(
                rows.split(_ENTRIES_PER_PIECE),
                columns.split(_ENTRIES_PER_PIECE),
                strict=True,
            )
        ]
        return torch.cat(found).view(row_index.shape)

    def to_dense(self) -> Tensor:
        """K itself (m, n)."""
        rows, columns = self.operator.shape
        return self.operator.block(slice(0, rows), slice(0, columns))


def _entries(operator: KernelOperator, rows: Tensor, columns: Tensor) -> Tensor:
    i, row_position = torch.unique(rows, return_inverse=True)
    j, column_position = torch.unique(columns, return_inverse=True)
    return operator.block(i, j)[row_position, column_position]
