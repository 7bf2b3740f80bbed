"""Linear maps as products with rows of vectors: of a matrix, or of functions."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgdgp.core.checks import check_finite
from sgdgp.core.codec import register_stored_class
from sgdgp.core.seeds import generator_of, standard_normal

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}
"""By how much inner products of a map and its adjoint may differ."""


class LinearMap(ABC):
    """A matrix A (m, d) that vectors are multiplied with; never changed.

    Attributes:
        shape: (m, d).
        dtype: Of what it takes and gives.
        device: Where that lies.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        """A x of each row."""

    @abstractmethod
    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        """A^T y of each row."""

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device) -> LinearMap:
        """The same map for vectors of another kind."""

    def rows(self, index: Tensor) -> LinearMap:
        """The map to some entries of A x."""
        return SomeRows(self, index)

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearMap:
        """Itself: it never changes."""
        return self


@register_stored_class
class SparseMatrix(LinearMap):
    """A matrix of which only entries that are not zero are held.

    The transpose is held as well, made when it is first needed: products with rows that
    lie one after the other are several times as fast.

    Args:
        starts: Where rows begin among the entries (m + 1).
        columns: Columns of the entries (nnz).
        values: The entries (nnz).
        num_columns: d.
    """

    def __init__(
        self, starts: Tensor, columns: Tensor, values: Tensor, num_columns: int
    ) -> None:
        self.starts, self.columns, self.values = starts, columns, values
        self.num_columns = num_columns
        self.shape = (len(starts) - 1, num_columns)
        self.dtype, self.device = values.dtype, values.device
        self._forward: Tensor | None = None
        self._transposed: Tensor | None = None

    @classmethod
    def of(cls, matrix: Any, dtype: torch.dtype, device: torch.device) -> SparseMatrix:
        """That of a sparse matrix of SciPy."""
        csr = sp.csr_array(matrix)
        csr.sum_duplicates()
        # Products are faster with short indices.
        small = max(csr.nnz, *csr.shape) < 2**31
        kind = torch.int32 if small else torch.int64
        return cls(
            torch.from_numpy(csr.indptr).to(device, kind),
            torch.from_numpy(csr.indices).to(device, kind),
            torch.from_numpy(csr.data).to(device, dtype),
            csr.shape[1],
        )

    def scipy(self) -> sp.csr_array:
        """The matrix as one of SciPy, on a CPU with the same memory."""
        parts = (self.values, self.columns, self.starts)
        return sp.csr_array(tuple(p.cpu().numpy() for p in parts), shape=self.shape)

    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        if self._forward is None:
            self._forward = _csr(self)
        return _rows_times(x, self._forward)

    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        if self._transposed is None:
            matrix = self.scipy().T
            self._transposed = _csr(SparseMatrix.of(matrix, self.dtype, self.device))
        return _rows_times(y, self._transposed)

    def to(self, dtype: torch.dtype, device: torch.device) -> SparseMatrix:
        parts = (self.starts.to(device), self.columns.to(device))
        return SparseMatrix(*parts, self.values.to(device, dtype), self.num_columns)

    def rows(self, index: Tensor) -> SparseMatrix:
        some = self.scipy()[index.cpu().numpy()]
        return SparseMatrix.of(some, self.dtype, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forward": None, "_transposed": None}


@register_stored_class
class DenseMatrix(LinearMap):
    """A matrix of which all entries are held.

    Args:
        matrix: A (m, d).
    """

    def __init__(self, matrix: Float[Tensor, "m d"]) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        return x @ self.matrix.mT

    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        return y @ self.matrix

    def to(self, dtype: torch.dtype, device: torch.device) -> DenseMatrix:
        return DenseMatrix(self.matrix.to(device, dtype))

    def rows(self, index: Tensor) -> DenseMatrix:
        return DenseMatrix(self.matrix[index.to(self.device)])


class SomeRows(LinearMap):
    """Some entries of what a map gives; the others are computed, too.

    Args:
        whole: The map.
        index: Which entries.
    """

    def __init__(self, whole: LinearMap, index: Tensor) -> None:
        self.whole, self.index = whole, index.to(whole.device)
        self.shape = (len(index), whole.shape[1])
        self.dtype, self.device = whole.dtype, whole.device

    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        return self.whole.times(x)[:, self.index]

    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        padded = y.new_zeros(len(y), self.whole.shape[0])
        return self.whole.adjoint_times(padded.index_add_(1, self.index, y))

    def to(self, dtype: torch.dtype, device: torch.device) -> SomeRows:
        return SomeRows(self.whole.to(dtype, device), self.index)


class TorchFunction(LinearMap):
    """A linear function of torch, such as a convolution.

    Args:
        function: Takes a batch of images (b, *image_shape) to (b, *data_shape).
        image_shape: Of one image.
        data_shape: Of what is measured of one.
        adjoint: Takes the latter to the former. Default: derived from the function.
        dtype: Of both.
        device: Of both.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        image_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        adjoint: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.function, self.adjoint = function, adjoint
        self.image_shape, self.data_shape = image_shape, data_shape
        self.shape = (math.prod(data_shape), math.prod(image_shape))
        self.dtype, self.device = dtype, device

    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        found = self.function(x.reshape(-1, *self.image_shape))
        return found.reshape(len(x), -1)

    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        if self.adjoint is not None:
            found = self.adjoint(y.reshape(-1, *self.data_shape))
            return found.reshape(len(y), -1)
        point = y.new_zeros(len(y), self.shape[1])
        return torch.func.vjp(self.times, point)[1](y)[0]

    def to(self, dtype: torch.dtype, device: torch.device) -> TorchFunction:
        function, adjoint = (
            copy.deepcopy(f).to(device, dtype) if isinstance(f, nn.Module) else f
            for f in (self.function, self.adjoint)
        )
        assert function is not None
        shapes = (self.image_shape, self.data_shape)
        found = TorchFunction(function, *shapes, adjoint, dtype, device)
        if (dtype, device) != (self.dtype, self.device):
            found._check_converted(self.dtype, self.device)
        return found

    @torch.no_grad()
    def _check_converted(self, dtype: torch.dtype, device: torch.device) -> None:
        """Refuse a function with tensors of its own that stay what they were.

        Args:
            dtype: Of what it took before.
            device: Of that.
        """
        zero = torch.zeros(2, self.shape[1], dtype=self.dtype, device=self.device)
        try:
            data = self.times(zero)
            images = self.adjoint_times(data)
            kind = f"data of {data.dtype} and images of {images.dtype}"
            if {data.dtype, images.dtype} == {self.dtype}:
                return
        except (RuntimeError, TypeError, ValueError) as error:
            kind = str(error)
        raise TypeError(
            f"A: the function takes {dtype} on {device} only, found {self.dtype} on "
            f"{self.device} ({kind}); convert its tensors by .to(x) for images x, or "
            f"give dtype={dtype} to linearise"
        )


class Columns(LinearMap):
    """A linear operator of SciPy, or of the package of that name.

    Args:
        operator: Multiplies columns, as an operator of SciPy.
        transpose: The same for its transpose.
        dtype: Of vectors.
        device: Where they lie.
    """

    def __init__(
        self, operator: Any, transpose: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.operator, self.transpose = operator, transpose
        self.shape = (int(operator.shape[-2]), int(operator.shape[-1]))
        self.dtype, self.device = dtype, device

    def times(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        return self._product(self.operator, x)

    def adjoint_times(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k d"]:
        return self._product(self.transpose, y)

    def _product(self, operator: Any, rows: Tensor) -> Tensor:
        if hasattr(operator, "matmat"):  # of SciPy: in NumPy
            found = torch.from_numpy(operator.matmat(rows.mT.cpu().numpy()))
        else:
            found = operator.matmul(rows.mT)
        return found.mT.to(self.device, self.dtype)

    def to(self, dtype: torch.dtype, device: torch.device) -> Columns:
        operator, transpose = (
            part if hasattr(part, "matmat") else part.to(device, dtype)
            for part in (self.operator, self.transpose)
        )
        return Columns(operator, transpose, dtype, device)


def check_linear(linear: LinearMap) -> None:
    """Refuse functions that are no linear map.

    Raises:
        ValueError: f(x + 2 z) is not f(x) + 2 f(z).
    """
    x, z = _normal(linear, 1, 0), _normal(linear, 1, 1)
    both, x, z = linear.times(x + 2 * z), linear.times(x), linear.times(z)
    check_finite("A x for a random x", both)
    error = float((both - x - 2 * z).norm())
    size = float(both.norm() + x.norm() + z.norm())
    if error > _ROUNDING[linear.dtype] * size:
        raise ValueError(
            "A: expected a linear function, found |f(x + 2 z) - f(x) - 2 f(z)| = "
            f"{error:.6g} where |f(x + 2 z)| = {float(both.norm()):.6g}; give what is "
            "constant in it to the data instead"
        )


def check_adjoint(linear: LinearMap) -> None:
    """Refuse an adjoint that is another map's, by a random inner product.

    Raises:
        ValueError: <A x, y> is not <x, A^T y>; says both.
    """
    x, z = _normal(linear, 1, 0), _normal(linear, 0, 2)
    image = linear.times(x)
    # Half along A x, so that the products are no sums of both signs.
    y = image / image.norm().clamp_min(1e-30) + z / z.norm()
    back = linear.adjoint_times(y)
    if back.shape != x.shape:
        raise ValueError(
            f"adjoint: expected {x.numel()} numbers of an image, found {back.numel()}"
        )
    check_finite("A^T y for a random y", back)
    left = float((image.double() * y).sum())
    right = float((x.double() * back).sum())
    size = float(image.norm() * y.norm() + x.norm() * back.norm())
    if abs(left - right) > _ROUNDING[linear.dtype] * size:
        raise ValueError(
            "adjoint: expected <A x, y> = <x, A^T y>, found "
            f"{left:.8g} and {right:.8g} for random x and y; it is not the adjoint of "
            "this map"
        )


def _normal(linear: LinearMap, axis: int, seed: int) -> Tensor:
    like = torch.zeros((), dtype=linear.dtype, device=linear.device)
    shape = (1, linear.shape[axis])
    return standard_normal(*shape, like=like, generator=generator_of(seed))


def _csr(matrix: SparseMatrix) -> Tensor:
    parts = (matrix.starts, matrix.columns, matrix.values)
    with warnings.catch_warnings():
        # torch's sparse tensors say that they may change.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(*parts, matrix.shape, device=matrix.device)


def _rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    # A product with one column takes three times as long as one with a vector.
    if len(rows) == 1:
        return (matrix @ rows[0])[None]
    return (matrix @ rows.mT).mT


def as_scipy(matrix: Any) -> Any:
    """A matrix of SciPy's from a sparse one of torch."""
    flat = matrix.detach().cpu().to_sparse_coo().coalesce()
    parts = (flat.values().numpy(), tuple(flat.indices().numpy()))
    return sp.coo_array(parts, shape=tuple(flat.shape))


def is_real(dtype: Any) -> bool:
    """Whether numbers of this kind of NumPy's are real."""
    return np.dtype(dtype).kind in "fiub"
