"""K in memory: computed once, at the first product, by a streaming operator."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.memory import named_if_too_large
from sgdgp.core.slices import slices
from sgdgp.kernels.registry import tile_kernel
from sgdgp.operators.arguments import check_vectors, take
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.evaluation import check_kernel
from sgdgp.operators.feature import features_operator
from sgdgp.operators.row_blocks import RowBlocksOperator
from sgdgp.operators.tiled import TiledOperator

_STRIP_ROWS = 128
"""Rows of K in one product: what it writes of the result stays in the cache."""


class DenseOperator(KernelOperator):
    """K(X, X) as one tensor (n, n), filled at the first product.

    Until then it costs nothing, so ``permuted`` before the first product is free.
    Slices of rows are views: no copy of K is made to multiply with them.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes for the operator that fills it and for what
            ``cross`` returns; K itself is as large as it is. Default: half of what
            is free.
    """

    name = "dense"

    def _prepare(self) -> None:
        x_rows = None if self.is_square else self.x_rows
        self._fill_from(
            streaming_operator(self.kernel, self.x, x_rows, self.memory_budget)
        )

    @classmethod
    def filled_by(cls, source: KernelOperator) -> DenseOperator:
        """The same matrix as ``source``, in memory from the first product on."""
        operator = cls.__new__(cls)
        operator._fill_from(source)
        return operator

    def _fill_from(self, source: KernelOperator) -> None:
        self._hold_as(source)
        self.source = source
        self._entries: Tensor | None = None

    @property
    def entries(self) -> Float[Tensor, "m n"]:
        """K itself, computed on first use."""
        if self._entries is None:
            m, n = self.shape
            with named_if_too_large(f"the dense operator's kernel matrix ({m} x {n})"):
                self._entries = self.source.block(slice(0, m), slice(0, n))
        return self._entries

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        return take(self.entries, index) @ v

    def _columns_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        if self.is_square:
            # Rows of a symmetric matrix are its columns but for rounding, and
            # contiguous: 7 % (17 columns) to 45 % (one) faster at n = 10,000 and
            # b = 1,000.
            return take(self.entries, index).mT @ v
        return self.entries[:, index] @ v

    @torch.no_grad()
    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """K v, in one pass over the stored entries."""
        check_vectors(v, self.shape[1], self.dtype)
        # Written transposed and in strips of rows: faster than one thin product.
        out = v.new_zeros(v.shape[1], self.shape[0])
        left = v.mT.contiguous()
        for rows in slices(self.shape[0], _STRIP_ROWS):
            out[:, rows].addmm_(left, self.entries[rows].mT)
        return out.mT

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        if isinstance(i, Tensor) and isinstance(j, Tensor):
            return self.entries[i.unsqueeze(1), j]  # without whole rows
        return take(self.entries, i)[:, j]  # a view of K when both are slices

    def small_blocks(self, index: Int[Tensor, "m k"]) -> Float[Tensor, "m k k"]:
        """The blocks K[index[i], index[i]], gathered from K."""
        return self.entries[index.unsqueeze(2), index.unsqueeze(1)]

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return self.source._quadratic_form(a, b, x)

    def _diagonal_entries(self) -> Tensor:
        return self.source.diagonal()

    def unfilled(self) -> DenseOperator:
        """The same operator, to be filled at its first product again."""
        return type(self).filled_by(self.source)

    def streaming(self) -> KernelOperator:
        """The operator that fills K."""
        return self.source

    def cross(self, x_new: Float[Tensor, "m d"]) -> KernelOperator:
        """K(X_new, X) as a streaming operator (m, n): used once, so not stored."""
        return self.source.cross(x_new)

    def product_at(
        self, x_new: Float[Tensor, "m d"], v: Float[Tensor, "n k"]
    ) -> Float[Tensor, "m k"]:
        """See ``KernelOperator.product_at``."""
        return self.source.product_at(x_new, v)

    def _rebuilt(
        self, x: Tensor, x_rows: Tensor | None, kernel: Kernel | None = None
    ) -> DenseOperator:
        return DenseOperator.filled_by(self.source._rebuilt(x, x_rows, kernel))


def streaming_operator(
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    x_rows: Float[Tensor, "m d"] | None = None,
    memory_budget: int | None = None,
) -> KernelOperator:
    """The operator that needs no n x n; checks the kernel.

    Tiles where the kernel has a tile form. Else its exact features, where it has them
    (a network's tangent kernel): an entry costs as much as they do. Else row blocks.
    """
    check_kernel(kernel)
    if tile_kernel(kernel) is not None:
        return TiledOperator(kernel, x, x_rows, memory_budget=memory_budget)
    features = features_operator(kernel, x, x_rows, memory_budget)
    if features is not None:
        return features
    return RowBlocksOperator(kernel, x, x_rows, memory_budget=memory_budget)
