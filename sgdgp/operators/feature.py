"""K = phi(X1) phi(X2)^T for an exact feature map: no kernel entry is ever needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.features.base import CastFeatures, FeatureMap
from sgdgp.features.dispatch import FeatureRequest, exact_features
from sgdgp.kernels.registry import register_kernel, tile_kernel
from sgdgp.operators.arguments import (
    check_vectors,
    index_length,
    piece,
    points_behind,
    resolve_index,
    take,
)
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.tiled import TiledOperator
from sgdgp.operators.tracked import Move, TrackedVectors

_FEW_COLUMNS = 8
"""Points whose columns of K come from one forward pass of all rows together: with more
of them the rows' features themselves are worth making."""


class FeatureOperator(KernelOperator):
    """K(X1, X2) = phi(X1) phi(X2)^T, by products with the features of an exact map.

    A product is one adjoint over the columns' points and one forward over the rows':
    the work of 2 n M instead of n^2, and one evaluation of a network's Jacobian instead
    of n. Solvers that change V on blocks carry U = phi^T V along (``tracked``): then a
    block costs an adjoint and a forward on itself, and no other row is looked at.

    The map is read at construction, with the kernel's parameters of that time.

    Args:
        kernel: A GPyTorch kernel with an exact map, such as ``NeuralTangentKernel``,
            ``LinearKernel`` and sums, products and multiples of such.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes for features, where entries of K are asked for. Default:
            half of what is free. The map bounds the memory of products.

    Raises:
        ValueError: The kernel has no exact map, or none in the dtype of x.

    Example:
        >>> operator = FeatureOperator(LinearKernel(), torch.ones(9, 2))
        >>> operator.matmul(torch.ones(9, 1)).shape
        torch.Size([9, 1])
    """

    name = "features"
    has_features = True

    def _prepare(self) -> None:
        kernel = self.kernel
        features = exact_features(kernel, self.x)
        if features is None:
            raise ValueError(
                f"{type(kernel).__name__} has no exact feature map; use the tiled or "
                "row_blocks operator, or register_features"
            )
        outputs = int(kernel.num_outputs_per_input(self.x[:1], self.x[:1]))
        self._use(features, outputs)

    @classmethod
    def of_map(
        cls,
        features: FeatureMap,
        x: Float[Tensor, "n d"],
        *,
        outputs: int = 1,
        memory_budget: int | None = None,
    ) -> FeatureOperator:
        """The operator of an exact map that belongs to no kernel of GPyTorch's.

        Args:
            features: The map; row i C + c is output c of point i.
            x: Points (n, d), in the map's dtype.
            outputs: C.
            memory_budget: Bytes for features. Default: half of what is free.
        """
        kernel = FeatureKernel(features, x.dtype, outputs)
        return cls(kernel, x, memory_budget=memory_budget)

    def _use(self, features: FeatureMap, outputs: int) -> None:
        self.features = features
        self.outputs_per_input = outputs
        # The map cuts a sweep into chunks; cut twice, it would sweep too often.
        self.rows_per_step = max(1, self.shape[0])
        self._last = _LastAdjoint()

    @torch.no_grad()
    def tracked(self, v: Float[Tensor, "n k"]) -> TrackedVectors:
        check_vectors(v, self.shape[1], self.dtype)
        if bool(v.any()):
            return TrackedVectors(v.clone(), self.features.adjoint(self.x, v))
        phi_t_v = v.new_zeros(v.shape[1], self.features.num_features).mT
        return TrackedVectors(v.clone(), phi_t_v)

    @torch.no_grad()
    def move(self, rows: RowIndex, values: Float[Tensor, "b k"]) -> Move:
        index = resolve_index(rows, self.shape[1])
        return Move(index, values, self._adjoint(index, values))

    @torch.no_grad()
    def rows_of_product(self, rows: RowIndex, v: TrackedVectors) -> Tensor:
        assert v.phi_t_v is not None
        return self.rows_of_weights(rows, v.phi_t_v)

    @torch.no_grad()
    def rows_of_weights(
        self, rows: RowIndex, weights: Float[Tensor, "M k"]
    ) -> Float[Tensor, "b k"]:
        """phi(x_rows) W for any weights."""
        return self._forward(resolve_index(rows, self.shape[0]), weights)

    def random_order(self, generator: torch.Generator) -> Int[Tensor, " n"]:
        """The rows in random order; those evaluated together stay beside each other."""
        numbers = self.features.point_of_rows(self.x)
        if numbers is None or not len(numbers):
            return super().random_order(generator)
        count = int(numbers[-1]) + 1
        place = torch.randperm(count, generator=generator, device=generator.device)
        return place.to(self.device)[numbers].argsort(stable=True)

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        return self._forward(index, self._phi_t_v(v))

    def _columns_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        phi_t_v = self._adjoint(index, v)
        return self.features.forward(self.x_rows, phi_t_v)

    def product_at(
        self, x_new: Float[Tensor, "m d"], v: Float[Tensor, "n k"]
    ) -> Float[Tensor, "m k"]:
        """See ``KernelOperator.product_at``."""
        with torch.no_grad():
            phi_t_v = self._last.of(v, lambda: self.features.adjoint(self.x, v))
        return self.features.forward(x_new, phi_t_v)

    def _phi_t_v(self, v: Tensor) -> Tensor:
        """phi(X2)^T v; kept for predictions, which ask for the same v again."""
        if self.is_square:
            return self.features.adjoint(self.x, v)
        return self._last.of(v, lambda: self.features.adjoint(self.x, v))

    def _forward(self, index: Tensor | slice, phi_t_v: Tensor) -> Tensor:
        """phi(x_index) U."""
        if index_length(index) == 0:
            return phi_t_v.new_zeros(0, phi_t_v.shape[1])
        points, rows = points_behind(index, self.outputs_per_input)
        found = self.features.forward(take(self.x_rows, points), phi_t_v)
        return found if rows is None else take(found, rows)

    def _adjoint(self, index: Tensor | slice, v: Tensor) -> Tensor:
        """phi(x_index)^T v, over the columns' points."""
        points, rows = points_behind(index, self.outputs_per_input)
        x = take(self.x, points)
        if rows is not None:
            whole = v.new_zeros(len(x) * self.outputs_per_input, v.shape[1])
            if isinstance(rows, slice):
                whole[rows] = v
            else:
                whole.index_add_(0, rows, v)
            v = whole
        return self.features.adjoint(x, v)

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        if index_length(i) < index_length(j):
            return self._entries_of(self.x, j, self.x_rows, i).mT
        return self._entries_of(self.x_rows, i, self.x, j)

    def _entries_of(
        self, x: Tensor, i: Tensor | slice, other: Tensor, j: Tensor | slice
    ) -> Tensor:
        """K(x_i, other_j) from features within the budget; j is the shorter."""
        out = x.new_empty(index_length(i), index_length(j))
        few = index_length(j) <= _FEW_COLUMNS * self.outputs_per_input
        same = x is other and _are_same(i, j)
        for columns, right in self._features_of(other, j):
            if same and len(right) == len(out):
                torch.mm(right, right.mT, out=out)
            elif few:
                points, rows = points_behind(i, self.outputs_per_input)
                found = self.features.forward(take(x, points), right.mT)
                out[:, columns] = found if rows is None else take(found, rows)
            else:
                for rows_i, left in self._features_of(x, i):
                    out[rows_i, columns] = left @ right.mT
        return out

    def _features_of(
        self, x: Tensor, index: Tensor | slice
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the rows ``index``, and their features (s, M)."""
        outputs = self.outputs_per_input
        row = self.features.num_features * x.element_size()
        # Features of rows, of columns, and what a map takes to make either.
        affordable = max(1, self.memory_budget // (4 * row))
        if affordable < outputs:
            # Not even the outputs of one point: columns of phi^T one by one.
            for rows in slices(index_length(index), affordable):
                points, inner = points_behind(piece(index, rows), outputs)
                found = take(x, points)
                unit = x.new_zeros(len(found) * outputs, rows.stop - rows.start)
                unit[inner] = torch.eye(unit.shape[1], dtype=x.dtype, device=x.device)
                yield rows, self.features.adjoint(found, unit).mT
            return
        step = affordable // outputs
        if isinstance(index, slice):
            step *= outputs
        for rows in slices(index_length(index), step):
            points, inner = points_behind(piece(index, rows), outputs)
            found = self.features.features(take(x, points))
            yield rows, found if inner is None else take(found, inner)

    def _diagonal_entries(self) -> Tensor:
        everything = slice(0, self.shape[0])
        parts = (f.square().sum(1) for _, f in self._features_of(self.x, everything))
        return torch.cat([self.x.new_zeros(0), *parts])

    @torch.no_grad()
    def small_blocks(self, index: Int[Tensor, "m k"]) -> Float[Tensor, "m k k"]:
        """The blocks K[index[i], index[i]], each from its own features."""
        out = self.x.new_empty(*index.shape, index.shape[1])
        for rows, block in zip(index, out, strict=True):
            block.copy_(self.block(rows, rows))
        return out

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        if tile_kernel(self.kernel) is not None:
            tiled = TiledOperator(self.kernel, self.x, memory_budget=self.memory_budget)
            return tiled._quadratic_form(a, b, x)
        return super()._quadratic_form(a, b, x)

    def _rebuilt(
        self, x: Tensor, x_rows: Tensor | None, kernel: Kernel | None = None
    ) -> FeatureOperator:
        other = object.__new__(FeatureOperator)
        other._hold(kernel or self.kernel, x, x_rows, self.memory_budget)
        features = self.features
        if kernel is not None:
            features = _exact_map(kernel, x) or CastFeatures(features, self.dtype)
        other._use(features, self.outputs_per_input)
        if kernel is None and x is self.x:
            other._last = self._last
        return other


class _LastAdjoint:
    """phi(X)^T v of the last v: predictions in batches ask for the same one."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._key: tuple[object, ...] = ()
        self._found: Tensor | None = None

    def of(self, v: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """phi(X)^T v, computed unless v is the tensor of the last call."""
        if v.is_inference():
            return compute()
        # v is kept, so that no other tensor can have its place in memory.
        key = (v.data_ptr(), tuple(v.shape), v.stride(), v._version)
        if self._found is None or key != self._key:
            self._of, self._key, self._found = v, key, compute()
        return self._found


def _are_same(i: Tensor | slice, j: Tensor | slice) -> bool:
    if isinstance(i, slice) or isinstance(j, slice):
        return isinstance(i, slice) and isinstance(j, slice) and i == j
    return torch.equal(i, j)


def features_operator(
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    x_rows: Float[Tensor, "m d"] | None = None,
    memory_budget: int | None = None,
) -> FeatureOperator | None:
    """The operator of a kernel's exact features; None if it has none of this dtype."""
    if _exact_map(kernel, x) is None:
        return None
    return FeatureOperator(kernel, x, x_rows, memory_budget=memory_budget)


def _exact_map(kernel: Kernel, x: Tensor) -> FeatureMap | None:
    try:
        return exact_features(kernel, x)
    except ValueError:
        return None


class FeatureKernel(Kernel):
    """k(x, x') = phi(x)^T phi(x') of a feature map, as a GPyTorch kernel.

    Args:
        feature_map: phi; with C outputs per input its rows are i C + c.
        dtype: Data type of the map.
        outputs: C. Default: 1.
    """

    is_stationary = False
    has_lengthscale = False

    def __init__(
        self, feature_map: FeatureMap, dtype: torch.dtype, outputs: int = 1
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.feature_dtype = dtype
        self.outputs = outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureKernel:
        """A kernel of the same map, which may hold a data set and a network."""
        return FeatureKernel(self.feature_map, self.feature_dtype, self.outputs)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C."""
        return self.outputs

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any
    ) -> Tensor:
        """K (n C, m C), or its diagonal (n C,)."""
        left = self.feature_map.features(x1)
        right = left if torch.equal(x1, x2) else self.feature_map.features(x2)
        return (left * right).sum(-1) if diag else left @ right.mT


def _map_of(kernel: FeatureKernel, request: FeatureRequest) -> FeatureMap:
    if request.dtype != kernel.feature_dtype:
        raise ValueError(
            f"x: expected {kernel.feature_dtype} like the feature map, found "
            f"{request.dtype}"
        )
    return kernel.feature_map


register_kernel(FeatureKernel, features=_map_of)
