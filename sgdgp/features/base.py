"""The contract of a feature map: finite features whose inner product is a kernel.

Every map can be scaled, restricted to some columns, and evaluated for functions at
points of their own; what it does not say itself is done by the maps below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import recomputed, slices

FEATURES_AT_ONCE = 2**21
"""Features held at once for points of functions' own: 16 MB in float64, in which a
batched product of some rows is already at full speed."""

# What every map takes and gives; how many rows r is said by ``FeatureMap``.
Points: TypeAlias = Float[Tensor, "n d"]
Features: TypeAlias = Float[Tensor, "r M"]
Weights: TypeAlias = Float[Tensor, "M s"]
Values: TypeAlias = Float[Tensor, "r s"]


class FeatureMap(ABC):
    """phi: R^d -> R^M with E[phi(x)^T phi(x')] = k(x, x').

    A point has one row of features, r = n, or C of them, r = n C. A prior function draw
    is a feature map and a standard normal weight vector: f(x) = phi(x)^T w. A map is
    ``exact`` when the identity holds without the expectation.
    """

    num_features: int
    exact: bool

    @abstractmethod
    def features(self, x: Points) -> Features:
        """The features themselves."""

    @abstractmethod
    def forward(self, x: Points, w: Weights) -> Values:
        """phi(x) w in bounded memory, differentiable in x."""

    @abstractmethod
    def adjoint(self, x: Points, v: Values) -> Weights:
        """phi(x)^T v in bounded memory."""

    def each(
        self, x: Float[Tensor, "g q d"], weights: Float[Tensor, "g M"]
    ) -> Float[Tensor, "g q"]:
        """phi(x_i) w_i of g functions, each at points of its own.

        In bounded memory, and differentiable in x.

        Args:
            x: Points of each function (g, q, d).
            weights: One row for each function (g, M).
        """
        count, own, dim = x.shape
        at_once = max(1, FEATURES_AT_ONCE // max(1, own * weights.shape[1]))

        def values(part: Tensor, rows: Tensor) -> Tensor:
            phi = self.features(part.reshape(-1, dim))
            phi = phi.view(*part.shape[:2], rows.shape[1])
            return (phi @ rows.unsqueeze(-1)).squeeze(-1)

        parts = [
            recomputed(values, x[rows], weights[rows])
            for rows in slices(count, at_once)
        ]
        return torch.cat(parts) if parts else x.new_zeros(count, own)

    def scaled(self, variance: float) -> FeatureMap:
        """The map of ``variance`` times the kernel."""
        return ScaledFeatures(self, variance)

    def restricted(self, dims: Int[Tensor, " k"]) -> FeatureMap:
        """The map of k(x[:, dims], x'[:, dims])."""
        return RestrictedFeatures(self, dims)

    def point_of_rows(self, x: Points) -> Int[Tensor, " r"] | None:
        """Number of the point that each row is evaluated with, None if of its own."""
        return None


class _MapAround(FeatureMap):
    """A map around another: what it does to inputs, and to what comes out."""

    def __init__(self, base: FeatureMap) -> None:
        self.base = base
        self.num_features = base.num_features
        self.exact = base.exact

    def _inputs(self, x: Tensor) -> Tensor:
        return x

    def _outputs(self, found: Tensor) -> Tensor:
        return found

    def features(self, x: Points) -> Features:
        return self._outputs(self.base.features(self._inputs(x)))

    def forward(self, x: Points, w: Weights) -> Values:
        return self._outputs(self.base.forward(self._inputs(x), w))

    def adjoint(self, x: Points, v: Values) -> Weights:
        return self._outputs(self.base.adjoint(self._inputs(x), v))

    def point_of_rows(self, x: Points) -> Tensor | None:
        return self.base.point_of_rows(self._inputs(x))


@register_stored_class
class ScaledFeatures(_MapAround):
    """sqrt(v) phi(x): v k(x, x').

    Args:
        base: phi.
        variance: The factor v.
    """

    def __init__(self, base: FeatureMap, variance: float) -> None:
        super().__init__(base)
        self.variance = float(variance)

    def _outputs(self, found: Tensor) -> Tensor:
        return found * math.sqrt(self.variance)

    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.base.each(x, weights) * self.variance**0.5

    def scaled(self, variance: float) -> FeatureMap:
        return ScaledFeatures(self.base, variance * self.variance)

    def restricted(self, dims: Tensor) -> FeatureMap:
        return ScaledFeatures(self.base.restricted(dims), self.variance)


@register_stored_class
class RestrictedFeatures(_MapAround):
    """phi(x[:, dims]): a map that sees some of the columns.

    Args:
        base: phi.
        dims: The columns of x that it sees.
    """

    def __init__(self, base: FeatureMap, dims: Int[Tensor, " k"]) -> None:
        super().__init__(base)
        self.dims = dims

    def _inputs(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.dims)

    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.base.each(x[..., self.dims], weights)

    def restricted(self, dims: Tensor) -> FeatureMap:
        return RestrictedFeatures(self.base, dims[self.dims])


class CastFeatures(FeatureMap):
    """A map of another dtype: evaluated in its own, handed on in the caller's.

    A network has the precision of its weights; its features can still take part in
    products and factors of a wider one.

    Args:
        base: The map.
        dtype: Data type that it is evaluated in.
    """

    def __init__(self, base: FeatureMap, dtype: torch.dtype) -> None:
        self.base = base
        self.dtype = dtype
        self.num_features = base.num_features
        self.exact = base.exact

    def features(self, x: Points) -> Features:
        return self.base.features(x.to(self.dtype)).to(x.dtype)

    def forward(self, x: Points, w: Weights) -> Values:
        return self.base.forward(x.to(self.dtype), w.to(self.dtype)).to(x.dtype)

    def adjoint(self, x: Points, v: Values) -> Weights:
        return self.base.adjoint(x.to(self.dtype), v.to(self.dtype)).to(x.dtype)
