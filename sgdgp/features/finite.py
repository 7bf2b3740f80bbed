"""Exact finite feature maps: linear, constant and polynomial kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import check_product, check_width, recomputed, slices, tile_size
from sgdgp.features.base import FeatureMap, Features, Points, Values, Weights


@register_stored_class
class LinearFeatures(FeatureMap):
    """phi(x) = sqrt(v) x, entry by entry: k(x, x') = sum_i v_i x_i x'_i.

    Args:
        variance: (d,), the prior variance of each weight.
    """

    exact = True

    def __init__(self, variance: Float[Tensor, " d"]) -> None:
        self.variance = variance
        self.num_features = variance.shape[0]

    def features(self, x: Points) -> Features:
        check_width(x, self.num_features)
        return x * self.variance.sqrt()

    def forward(self, x: Points, w: Weights) -> Values:
        check_width(x, self.num_features)
        check_product("w", w, self.num_features)
        return x @ (self.variance.sqrt()[:, None] * w)

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_width(x, self.num_features)
        check_product("v", v, x.shape[0])
        return self.variance.sqrt()[:, None] * (x.T @ v)


@register_stored_class
class ConstantFeatures(FeatureMap):
    """phi(x) = sqrt(c): k(x, x') = c.

    Args:
        variance: The constant c.
    """

    exact = True
    num_features = 1

    def __init__(self, variance: float) -> None:
        self.variance = float(variance)

    def features(self, x: Points) -> Features:
        column = x.new_full((x.shape[0], 1), math.sqrt(self.variance))
        # Tied to x in the graph; its gradient is zero.
        return column + 0 * x[:, :1] if x.requires_grad else column

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, 1)
        return self.features(x) @ w

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        return self.features(x).T @ v

    def scaled(self, variance: float) -> FeatureMap:
        return ConstantFeatures(variance * self.variance)

    def restricted(self, dims: Tensor) -> FeatureMap:
        return self


@register_stored_class
class PolynomialFeatures(FeatureMap):
    """Monomials of the expansion of (x^T x' + c)^p.

    With z = (sqrt(c), x), the kernel is (z^T z')^p = sum over multi-indices a,
    |a| = p, of the multinomial coefficient p! / a! times z^a z'^a.

    Args:
        indices: (M, p), the factors of each monomial: 0 is sqrt(c), i + 1 is x_i.
        coefficients: (M,), square roots of the multinomial coefficients.
        offset: The constant c.
        dim: Number of columns of the inputs.
    """

    exact = True

    def __init__(
        self,
        indices: Int[Tensor, "M p"],
        coefficients: Float[Tensor, " M"],
        offset: float,
        dim: int,
    ) -> None:
        self.indices = indices
        self.coefficients = coefficients
        self.offset = float(offset)
        self.dim = dim
        self.num_features = indices.shape[0]

    def features(self, x: Points) -> Features:
        check_width(x, self.dim)
        constant = x.new_full((x.shape[0], 1), math.sqrt(self.offset))
        z = torch.cat([constant, x], 1)
        out = self.coefficients.expand(x.shape[0], -1)
        for factor in self.indices.unbind(1):
            out = out * z.index_select(1, factor)
        # A power of zero does not touch x, yet its gradient is defined (zero).
        return out + 0 * x[:, :1] if x.requires_grad else out

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, self.num_features)
        parts = [
            recomputed(lambda a, b: self.features(a) @ b, x[rows], w)
            for rows in self._rows(x)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0, w.shape[1])

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        out = x.new_zeros(self.num_features, v.shape[1])
        for rows in self._rows(x):
            out = out + recomputed(
                lambda a, b: self.features(a).T @ b, x[rows], v[rows]
            )
        return out

    def _rows(self, x: Tensor) -> Iterator[slice]:
        rows = max(1, tile_size(x.device) // self.num_features)
        return slices(x.shape[0], rows)
