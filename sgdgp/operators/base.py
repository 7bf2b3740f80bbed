"""The contract of a kernel operator: row blocks of a kernel matrix times a matrix.

Everything downstream (solvers, posterior, training) sees a kernel matrix only
through this interface, so none of it knows whether the matrix is in memory,
streamed in tiles, or summed by KeOps.

Whether K is held. Most operators are streaming: they hold the points and make entries
anew in every product. ``DenseOperator`` holds K beside a streaming operator that fills
it, from its first product on. So there are three ways from an operator to another over
the same points: ``streaming()`` never holds K, for a few of its entries or rows;
``unfilled()`` holds none yet, for a solve to come whose matrix is given back with it;
``to(dtype)`` is in another precision, and has made none of its entries either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from linear_operator import LinearOperator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgdgp.core.memory import resolve_budget
from sgdgp.core.processes import Processes
from sgdgp.core.slices import slices, tracks_gradient
from sgdgp.core.team import Found, alone
from sgdgp.operators.arguments import (
    check_inputs,
    check_vectors,
    index_length,
    resolve_index,
)
from sgdgp.operators.evaluation import (
    check_kernel,
    detached_copy,
    differentiable_block,
    evaluated_blocks,
)
from sgdgp.operators.gradients import form_by_autograd
from sgdgp.operators.tracked import Move, TrackedVectors

RowIndex: TypeAlias = Tensor | slice
"""Rows of an operator: an integer tensor (b,), or a slice with step 1."""

_BLOCK_ROWS = 8192
"""Rows of a block that is stored: operators that fuse their products take all rows at
once, and their blocks would be as high."""

_ENTRIES_WITH_GRAPH = 2**21
"""Kernel entries whose graph is held at once: 16 MB in float64."""

_ENTRIES_PER_PIECE = 1024
"""Single entries asked for at a time: their rows and columns make one small block."""


class KernelOperator(ABC):
    """K(X1, X2) for a GPyTorch kernel, without saying how it is stored.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: the same tensor as ``x``, which
            makes the operator square and symmetric.
        memory_budget: Bytes that temporaries may take. Default: half of what is free.

    Raises:
        TypeError: ``kernel`` is not a GPyTorch kernel.
        ValueError: It is not a function of two points, has a batch shape or a parameter
            that is not finite, or an argument does not fit.
    """

    name: str
    """Short name shown in results: "dense", "tiled", "triton", "keops", ..."""

    outputs_per_input: int = 1
    """Rows per point, T: row r belongs to point r // T (multitask, derivatives)."""

    has_features: bool = False
    """Whether rows are known from a feature map: see ``tracked``."""

    rows_per_step: int = 1024
    """Rows that ``matmul`` asks for at a time (Ctrl-C is heard between them)."""

    is_recordable: bool = False
    """Whether a product is launches on a GPU and nothing else, the same for all rows:
    these may be recorded once and replayed."""

    part: Processes = Processes()
    """Whose share of the tiles ``quadratic_form`` sums, and ``matmul`` of an operator
    that ``sums_tiles``; one process has all."""

    sums_tiles: bool = False
    """Whether ``matmul`` of a square operator is by tiles: those above the diagonal
    serve both of their blocks, and the sums of all parts add up to K v."""

    def __init__(
        self,
        kernel: Kernel,
        x: Float[Tensor, "n d"],
        x_rows: Float[Tensor, "m d"] | None = None,
        *,
        memory_budget: int | None = None,
    ) -> None:
        check_kernel(kernel)
        self._hold(kernel, x, x_rows, memory_budget)
        self._prepare()

    def _hold(
        self,
        kernel: Kernel,
        x: Tensor,
        x_rows: Tensor | None,
        memory_budget: int | None,
    ) -> None:
        """What every operator has; ``_prepare`` adds what it makes of that."""
        check_inputs(x, x_rows)
        self.memory_budget = resolve_budget(memory_budget, x.device)
        self.kernel = kernel
        self.x = x.detach()
        if x_rows is None or x_rows is x:
            self.x_rows = self.x
        else:
            self.x_rows = x_rows.detach()

    def _hold_as(self, other: KernelOperator) -> None:
        """The same of another operator, which this one stands for."""
        x_rows = None if other.is_square else other.x_rows
        self._hold(other.kernel, other.x, x_rows, other.memory_budget)
        self.outputs_per_input = other.outputs_per_input

    def _prepare(self) -> None:  # noqa: B027
        """Prepare kernel and points for products, once."""

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

    # What an operator is made of. Arguments are checked and indices resolved, and no
    # graph is recorded.

    @abstractmethod
    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        """K[index, :] v (b, k), never more than the memory budget at a time."""

    @abstractmethod
    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        """The dense block K[i, j] (a, b)."""

    @abstractmethod
    def _diagonal_entries(self) -> Tensor:
        """See ``diagonal``."""

    def _columns_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        """K[:, index] v (m, k), for some rows of the block at a time."""
        out = v.new_empty(self.shape[0], v.shape[1])
        for rows in slices(self.shape[0], min(self.rows_per_step, _BLOCK_ROWS)):
            out[rows] = self.block(rows, index) @ v
        return out

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        """``quadratic_form`` at the points x, which may have a graph."""
        outputs, budget = self.outputs_per_input, self.memory_budget
        return form_by_autograd(
            self.kernel, x, a, b, budget, outputs=outputs, part=self.part
        )

    def _rebuilt(
        self, x: Tensor, x_rows: Tensor | None, kernel: Kernel | None = None
    ) -> KernelOperator:
        """The same kind of operator over other inputs (``x_rows=None``: square).

        ``kernel`` replaces the kernel; by default it stays.
        """
        kernel = self.kernel if kernel is None else kernel
        return type(self)(kernel, x, x_rows, memory_budget=self.memory_budget)

    @torch.no_grad()
    def block(self, i: RowIndex, j: RowIndex) -> Float[Tensor, "a b"]:
        """The dense block K[i, j]; beside it the memory budget holds."""
        rows, columns = self.shape
        return self._block(resolve_index(i, rows, "i"), resolve_index(j, columns, "j"))

    @torch.no_grad()
    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal of a square operator, exact (never by differences)."""
        if not self.is_square:
            raise ValueError("diagonal needs a square operator, this one is a cross")
        return self._diagonal_entries()

    @torch.no_grad()
    def small_blocks(self, index: Int[Tensor, "m k"]) -> Float[Tensor, "m k k"]:
        """The square blocks K[index[i], index[i]] of a square operator, for all i.

        Evaluated by the kernel in batches; kernels that cannot take batches, or have
        several outputs per point, are evaluated block by block.
        """
        if self.outputs_per_input == 1:
            blocks = evaluated_blocks(self.kernel, self.x[index])
            if blocks is not None:
                return blocks.to(self.dtype).contiguous()
        return torch.stack([self.block(rows, rows) for rows in index])

    def rows(self, index: RowIndex) -> RowBlock:
        """The rows ``index`` (b,) as an operator with ``matmul``."""
        return RowBlock(self, index)

    def columns(self, index: RowIndex) -> ColumnBlock:
        """The columns ``index`` (b,) as an operator with ``matmul``."""
        return ColumnBlock(self, index)

    @torch.no_grad()
    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """K v: one pass over the kernel matrix for all columns of v (n, k)."""
        check_vectors(v, self.shape[1], self.dtype)
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
        if not self.is_square:
            raise ValueError(
                "quadratic_form needs a square operator, this one is a cross "
                f"{self.shape[0]} x {self.shape[1]}"
            )
        for name, vectors in (("a", a), ("b", b)):
            check_vectors(vectors, self.shape[1], self.dtype, name)
        if a.shape[1] != b.shape[1]:
            raise ValueError(
                f"a and b must have as many columns, found {a.shape[1]} and "
                f"{b.shape[1]}"
            )
        if x is not None and (x.shape != self.x.shape or x.dtype != self.dtype):
            raise ValueError(
                f"x must be {tuple(self.x.shape)} and {self.dtype} like the "
                f"operator's, found {tuple(x.shape)} and {x.dtype}"
            )
        if x is not None and x.device != self.device:
            raise ValueError(f"x must be on {self.device}, found {x.device}")
        return self._quadratic_form(a, b, self.x if x is None else x)

    def quadratic_gradient(
        self, a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]
    ) -> None:
        """Add d/dtheta ``quadratic_form(a, b)`` to ``.grad`` of the parameters."""
        with torch.enable_grad():
            form = self.quadratic_form(a, b)
        if form.requires_grad:
            form.backward()

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matmul(v)

    def cross(self, x_new: Float[Tensor, "m d"]) -> KernelOperator:
        """K(X_new, X) as an operator (m, n), for prediction."""
        return self._rebuilt(self.x, x_new)

    def product_at(
        self, x_new: Float[Tensor, "m d"], v: Float[Tensor, "n k"]
    ) -> Float[Tensor, "m k"]:
        """K(X_new, X) v in bounded memory, differentiable in X_new.

        Without a graph the operator streams its own tiles. With one, GPyTorch evaluates
        the kernel block by block, and blocks are evaluated again in the backward pass,
        so the memory never holds more than a few blocks. Exact features need no block.
        """
        if not tracks_gradient(x_new):
            return self.cross(x_new).matmul(v)

        def product(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
            return differentiable_block(self.kernel, x, points) @ weights

        outputs = self.outputs_per_input
        columns = max(1, _ENTRIES_WITH_GRAPH // max(1, x_new.shape[0]))
        if columns >= len(self.x):
            return product(x_new, self.x, v)
        total = x_new.new_zeros(outputs * x_new.shape[0], v.shape[1])
        for points in slices(len(self.x), columns):
            rows = slice(outputs * points.start, outputs * points.stop)
            total = total + checkpoint(
                product, x_new, self.x[points], v[rows], use_reentrant=False
            )
        return total

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
        return self.rows(rows).matmul(v.values)

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
        """The same operator, holding no entries yet (itself, where it never does)."""
        return self

    def streaming(self) -> KernelOperator:
        """An operator over the same points that never holds K (itself, mostly)."""
        return self

    @property
    def is_shared(self) -> bool:
        """Whether other processes do a share of its work."""
        return False

    def everywhere(
        self,
        function: Callable[..., Found],
        *args: Any,
        by: Literal["rows", "sum"] = "rows",
    ) -> Found:
        """``function(processes, operator, *args)`` by all who do a share of its work.

        See ``together`` in ``core/team.py``.
        """
        return alone(function, self, *args, by=by)

    def nudged(self) -> KernelOperator:
        """The square operator over points rounded otherwise; see ``nudged`` below."""
        return self._rebuilt(nudged(self.x), None)

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
        return KernelLinearOperator(self)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"{type(self).__name__}({type(self.kernel).__name__}, "
            f"{rows} x {columns}, {self.dtype}, {self.device})"
        )


def nudged(values: Tensor) -> Tensor:
    """Every other float64 by its last digit away from zero; equal values stay equal."""
    bits = values.double().view(torch.int64)
    moved = bits + ((bits * 0x2545F4914F6CDD1D >> 63) & 1)
    return torch.where(values == 0, 0.0, moved.view(torch.float64))


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a kernel operator: ``operator.rows(i).matmul(v)`` = K[i, :] v."""

    operator: KernelOperator
    index: RowIndex

    @torch.no_grad()
    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "b k"]:
        """K[index, :] v for v (n, k)."""
        rows, columns = self.operator.shape
        check_vectors(v, columns, self.operator.dtype)
        return self.operator._rows_matmul(resolve_index(self.index, rows), v)

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

    @torch.no_grad()
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
        self, operator: KernelOperator | Tensor, *, source: KernelOperator | None = None
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
        size = _ENTRIES_PER_PIECE
        pieces = zip(rows.split(size), columns.split(size), strict=True)
        found = [_entries(self.operator, i, j) for i, j in pieces]
        return torch.cat(found).view(row_index.shape)

    def to_dense(self) -> Tensor:
        """K itself (m, n)."""
        rows, columns = self.operator.shape
        return self.operator.block(slice(0, rows), slice(0, columns))


def _entries(operator: KernelOperator, rows: Tensor, columns: Tensor) -> Tensor:
    i, row_position = torch.unique(rows, return_inverse=True)
    j, column_position = torch.unique(columns, return_inverse=True)
    return operator.block(i, j)[row_position, column_position]
