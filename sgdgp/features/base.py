"""The contract of a feature map: finite features whose inner product is a kernel.

Every map can be scaled, restricted to some columns, and evaluated for functions at
points of their own; what it does not say itself is done by the maps below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import recomputed, slices

FEATURES_AT_ONCE = 2**21
"""Features held at once for points of functions' own: 16 MB in float64, in which a
batched product of some rows is already at full speed."""


class FeatureMap(ABC):
    """phi: R^d -> R^M with E[phi(x)^T phi(x')] = k(x, x').

    A prior function draw is a feature map and a standard normal weight vector:
    f(x) = phi(x)^T w. A map is ``exact`` when the identity holds without the
    expectation.
    """

    num_features: int
    exact: bool

    @abstractmethod
    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n M"]:
        """The features themselves, (n, num_features)."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "n s"]:
        """phi(x) w in bounded memory, differentiable in x."""

    @abstractmethod
    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "n s"]
    ) -> Float[Tensor, "M s"]:
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

    def point_of_rows(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"] | None:
        """Number of the point that each row is evaluated with, None if of its own."""
        return None


@register_stored_class
class ScaledFeatures(FeatureMap):
    """sqrt(v) phi(x): v k(x, x').

    Args:
        base: phi.
        variance: The factor v.
    """

    def __init__(self, base: FeatureMap, variance: float) -> None:
        self.base = base
        self.variance = float(variance)
        self.num_features = base.num_features
        self.exact = base.exact

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "r M"]:
        """The scaled features."""
        return self.base.features(x) * math.sqrt(self.variance)

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "r s"]:
        """sqrt(v) phi(x) w."""
        return self.base.forward(x, w) * math.sqrt(self.variance)

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "r s"]
    ) -> Float[Tensor, "M s"]:
        """sqrt(v) phi(x)^T v."""
        return self.base.adjoint(x, v) * math.sqrt(self.variance)

    def each(
        self, x: Float[Tensor, "g q d"], weights: Float[Tensor, "g M"]
    ) -> Float[Tensor, "g q"]:
        """sqrt(v) phi(x_i) w_i."""
        return self.base.each(x, weights) * self.variance**0.5

    def scaled(self, variance: float) -> FeatureMap:
        """One factor for both."""
        return ScaledFeatures(self.base, variance * self.variance)

    def restricted(self, dims: Int[Tensor, " k"]) -> FeatureMap:
        """The restricted map, scaled."""
        return ScaledFeatures(self.base.restricted(dims), self.variance)

    def point_of_rows(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"] | None:
        """As without the factor."""
        return self.base.point_of_rows(x)


@register_stored_class
class RestrictedFeatures(FeatureMap):
    """phi(x[:, dims]): a map that sees some of the columns.

    Args:
        base: phi.
        dims: The columns of x that it sees.
    """

    def __init__(self, base: FeatureMap, dims: Int[Tensor, " k"]) -> None:
        self.base = base
        self.dims = dims
        self.num_features = base.num_features
        self.exact = base.exact

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "r M"]:
        """The features of the selected columns."""
        return self.base.features(x.index_select(1, self.dims))

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "r s"]:
        """phi(x[:, dims]) w."""
        return self.base.forward(x.index_select(1, self.dims), w)

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "r s"]
    ) -> Float[Tensor, "M s"]:
        """phi(x[:, dims])^T v."""
        return self.base.adjoint(x.index_select(1, self.dims), v)

    def each(
        self, x: Float[Tensor, "g q d"], weights: Float[Tensor, "g M"]
    ) -> Float[Tensor, "g q"]:
        """phi(x_i[:, dims]) w_i."""
        return self.base.each(x[..., self.dims], weights)

    def restricted(self, dims: Int[Tensor, " k"]) -> FeatureMap:
        """One selection for both."""
        return RestrictedFeatures(self.base, dims[self.dims])

    def point_of_rows(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"] | None:
        """As of the selected columns."""
        return self.base.point_of_rows(x.index_select(1, self.dims))


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

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "r M"]:
        """The features, widened."""
        return self.base.features(x.to(self.dtype)).to(x.dtype)

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "r s"]:
        """phi(x) w, with w rounded."""
        return self.base.forward(x.to(self.dtype), w.to(self.dtype)).to(x.dtype)

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "r s"]
    ) -> Float[Tensor, "M s"]:
        """phi(x)^T v, with v rounded."""
        return self.base.adjoint(x.to(self.dtype), v.to(self.dtype)).to(x.dtype)
