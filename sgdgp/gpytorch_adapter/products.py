"""Elementwise products that ``forward`` takes of covariances, kept unevaluated.

Hadamard multitask models multiply what two kernels return: ``covar_x.mul(covar_i)``.
linear_operator would evaluate both matrices on the spot. While a forward is traced
here, such a product is only written down.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator.operators import (
    ConstantMulLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

_TRACING = threading.RLock()
_READABLE = (LazyEvaluatedKernelTensor, SumLinearOperator, ConstantMulLinearOperator)


class ProductOperator(LinearOperator):
    """The elementwise product of two covariances, to be read and not computed with."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        super().__init__(first, second)
        self.factors = (first, second)

    def _size(self) -> Any:
        return self.factors[0].shape

    def _transpose_nonbatch(self) -> ProductOperator:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        first, second = (factor.to_dense() for factor in self.factors)
        return (first * second) @ rhs


@contextmanager
def products_kept() -> Iterator[None]:
    """Within it, this thread's products of unevaluated covariances stay as they are.

    linear_operator has no hook for products, so its method is wrapped meanwhile; for
    all other threads the wrapper does nothing.
    """
    with _TRACING:
        here, original = threading.get_ident(), LinearOperator._mul_matrix

        def kept(self: LinearOperator, other: LinearOperator) -> LinearOperator:
            readable = (*_READABLE, ProductOperator)
            if (
                threading.get_ident() == here
                and isinstance(self, readable)
                and isinstance(other, readable)
            ):
                return ProductOperator(self, other)
            return original(self, other)

        LinearOperator._mul_matrix = kept
        try:
            yield
        finally:
            LinearOperator._mul_matrix = original
