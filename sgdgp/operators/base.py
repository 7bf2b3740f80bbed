"""The contract of a kernel operator: row blocks of a kernel matrix times a matrix.

Everything downstream (solvers, posterior, training) sees a kernel matrix only
through this interface, so none of it knows whether the matrix is in memory,
streamed in tiles, or summed by KeOps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import slices
from sgdgp.operators.arguments import (
    check_inputs,
    check_vectors,
    index_length,
    resolve_index,
)
from sgdgp.operators.evaluation import detached_copy
from sgdgp.operators.quadratic_form import check_quadratic, generic_quadratic_form
from sgdgp.operators.small_blocks import small_blocks
from sgdgp.operators.tracked import Move, TrackedVectors

if TYPE_CHECKING:
    from gpytorch.kernels import Kernel
    from linear_operator import LinearOperator

RowIndex: TypeAlias = Tensor | slice
"""Rows of an operator: an integer tensor (b,), or a slice with step 1."""

# Operators that fuse their products ask for all rows at once; a block is stored.
_BLOCK_ROWS = 8192


class KernelOperator(ABC):
    """K(X1, X2) for a GPyTorch kernel, without saying how it is stored.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: the same tensor as ``x``, which
            makes the operator square and symmetric.
    """

    name: str
    """Short name shown in results: "dense", "tiled", "keops", "row_blocks",
    "features"."""

    outputs_per_input: int = 1
    """Rows per point, T: row r belongs to point r // T (multitask, derivatives)."""

    has_features: bool = False
    """Whether rows are known from a feature map: see ``tracked``."""

    def __init__(
        self,
        kernel: Kernel,
        x: Float[Tensor, "n d"],
        x_rows: Float[Tensor, "m d"] | None = None,
    ) -> None:
        check_inputs(x, x_rows)
        self.kernel = kernel
        self.x = x.detach()
        if x_rows is None or x_rows is x:
            self.x_rows = self.x
        else:
            self.x_rows = x_rows.detach()

    @property
    def is_square(self) -> bool:
        """Whether rows and columns are the same points."""
        return self.x_rows is self.x

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the kernel matrix."""
        outputs = self.outputs_per_input
        return outputs * self.x_rows.shape[0], outputs * self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the entries and of every product."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Device that holds the inputs and computes the entries."""
        return self.x.device

    @abstractmethod
    def _rows_matmul(
        self, index: RowIndex, v: Float[Tensor, "n k"]
    ) -> Float[Tensor, "b k"]:
        """K[index, :] v, never more than the memory budget at a time."""

    @abstractmethod
    def block(self, i: RowIndex, j: RowIndex) -> Float[Tensor, "a b"]:
        """The dense block K[i, j]."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal of a square operator, exact (never by differences)."""

    def small_blocks(self, index: Int[Tensor, "m k"]) -> Float[Tensor, "m k k"]:
        """The square blocks K[index[i], index[i]] of a square operator, for all i.

        Evaluated by the kernel in batches; kernels that cannot take batches, or have
        several outputs per point, are evaluated block by block.
        """
        return small_blocks(self, index)

    @abstractmethod
    def _rebuilt(
        self, x: Tensor, x_rows: Tensor | None, kernel: Kernel | None = None
    ) -> KernelOperator:
        """The same kind of operator over other inputs (``x_rows=None``: square).

        ``kernel`` replaces the kernel; by default it stays.
        """

    def rows(self, index: RowIndex) -> RowBlock:
        """The rows ``index`` (b,) as an operator with ``matmul``."""
        return RowBlock(self, index)

    def columns(self, index: RowIndex) -> ColumnBlock:
        """The columns ``index`` (b,) as an operator with ``matmul``."""
        return ColumnBlock(self, index)

    def _columns_matmul(
        self, index: RowIndex, v: Float[Tensor, "b k"]
    ) -> Float[Tensor, "m k"]:
        """K[:, index] v, for some rows of the block at a time."""
        out = v.new_empty(self.shape[0], v.shape[1])
        for rows in slices(self.shape[0], min(self.rows_per_step, _BLOCK_ROWS)):
            out[rows] = self.block(rows, index) @ v
        return out

    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """K v: one pass over the kernel matrix for all columns of v (n, k)."""
        out = v.new_empty(self.shape[0], v.shape[1])
        for rows in slices(self.shape[0], self.rows_per_step):
            out[rows] = self._rows_matmul(rows, v)
        return out

    def quadratic_form(
        self,
        a: Float[Tensor, "n k"],
        b: Float[Tensor, "n k"],
        *,
        x: Float[Tensor, "p d"] | None = None,
    ) -> Float[Tensor, ""]:
        """sum_c a_c^T K b_c of a square operator, with a graph to the kernel.

        K is that of the kernel's parameters as they are now, even where products use
        those of construction. The gradient is found in this call, block by block;
        ``backward`` on what it returns costs next to nothing, and K is never stored.

        Args:
            a: Left vectors (n, k); constants.
            b: Right vectors (n, k); constants.
            x: The operator's points with a graph of their own (the output of a deep
                kernel's network): the gradient reaches it too. Default: constants.

        Returns:
            0-dim, in the operator's dtype. It can be differentiated once; where
            gradients are disabled it is only a number.

        Raises:
            ValueError: The operator is not square, or an argument does not fit.
        """
        check_quadratic(self, a, b, x)
        return self._quadratic_form(a, b, x)

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor | None) -> Tensor:
        """``quadratic_form`` with checked arguments."""
        return generic_quadratic_form(self, a, b, x, resolve_budget(None, self.device))

    def quadratic_gradient(
        self, a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]
    ) -> None:
        """Add d/dtheta sum_c a_c^T K b_c to ``.grad`` of the kernel's parameters.

        Args:
            a: Left vectors (n, k).
            b: Right vectors (n, k).

        Raises:
            ValueError: The operator is not square, or an argument does not fit.
        """
        with torch.enable_grad():
            form = self.quadratic_form(a, b)
        if form.requires_grad:
            form.backward()

    rows_per_step: int = 1024
    """Rows that ``matmul`` asks for at a time (Ctrl-C is heard between them)."""

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmul(v)

    def cross(self, x_new: Float[Tensor, "m d"]) -> KernelOperator:
        """K(X_new, X) as an operator (m, n), for prediction."""
        return self._rebuilt(self.x, x_new)

    def tracked(self, v: Float[Tensor, "n k"]) -> TrackedVectors:
        """Coefficients V that will change on blocks; a copy of v.

        An operator with features sweeps over the rows of v once, unless v is zero.
        """
        return TrackedVectors(v.clone())

    def move(self, rows: RowIndex, values: Float[Tensor, "b k"]) -> Move:
        """A change of some rows of V; with features one adjoint on these rows."""
        return Move(rows, values)

    def rows_of_product(
        self, rows: RowIndex, v: TrackedVectors
    ) -> Float[Tensor, "b k"]:
        """K[rows, :] V; with features one forward on these rows."""
        return self._rows_matmul(rows, v.values)

    def random_order(self, generator: torch.Generator) -> Int[Tensor, " n"]:
        """The rows in random order; those of one point stay beside each other."""
        outputs = self.outputs_per_input
        points = torch.randperm(
            self.shape[0] // outputs, generator=generator, device=generator.device
        ).to(self.device)
        if outputs == 1:
            return points
        rows = torch.arange(outputs, device=points.device)
        return (points.unsqueeze(1) * outputs + rows).flatten()

    def permuted(self, order: Int[Tensor, " m"]) -> KernelOperator:
        """The square operator over the points ``x[order]``."""
        return self._rebuilt(self.x[order], None)

    def unfilled(self) -> KernelOperator:
        """The same operator without entries it may have stored (itself, mostly)."""
        return self

    def streaming(self) -> KernelOperator:
        """An operator over the same points that holds no matrix (itself, mostly)."""
        return self

    def to(self, dtype: torch.dtype) -> KernelOperator:
        """The same operator with inputs, parameters and entries in ``dtype``.

        Itself where all of them are already; else its kernel is a copy.
        """
        parameters = self.kernel.parameters()
        if self.dtype == dtype and all(p.dtype == dtype for p in parameters):
            return self
        return self._rebuilt(
            self.x.to(dtype),
            None if self.is_square else self.x_rows.to(dtype),
            detached_copy(self.kernel).to(dtype),
        )

    def to_linear_operator(self) -> LinearOperator:
        """Export to the GPyTorch world (Lanczos, pivoted Cholesky, ...)."""
        from sgdgp.operators.export import KernelLinearOperator

        return KernelLinearOperator(self)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"{type(self).__name__}({type(self.kernel).__name__}, "
            f"{rows} x {columns}, {self.dtype}, {self.device})"
        )


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a kernel operator: ``operator.rows(i).matmul(v)`` = K[i, :] v."""

    operator: KernelOperator
    index: RowIndex

    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "b k"]:
        """K[index, :] v for v (n, k)."""
        return self.operator._rows_matmul(self.index, v)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmul(v)

    def to_dense(self) -> Float[Tensor, "b n"]:
        """The rows themselves."""
        return self.operator.block(self.index, slice(0, self.operator.shape[1]))


@dataclass(frozen=True)
class ColumnBlock:
    """Some columns of an operator: ``operator.columns(i).matmul(v)`` = K[:, i] v."""

    operator: KernelOperator
    index: RowIndex

    def matmul(self, v: Float[Tensor, "b k"]) -> Float[Tensor, "m k"]:
        """K[:, index] v for v (b, k)."""
        index = resolve_index(self.index, self.operator.shape[1])
        check_vectors(v, index_length(index), self.operator.dtype)
        return self.operator._columns_matmul(index, v)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmul(v)

    def to_dense(self) -> Float[Tensor, "m b"]:
        """The columns themselves."""
        return self.operator.block(slice(0, self.operator.shape[0]), self.index)
