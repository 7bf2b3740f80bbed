"""Feature maps made of feature maps: scaled, restricted, summed, multiplied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.slices import (
    CPU_TILE,
    DEVICE_TILE,
    check_product,
    slices,
    tracks_gradient,
)
from sgdgp.features.base import FeatureMap


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


class SumFeatures(FeatureMap):
    """(phi_1(x), ..., phi_q(x)): the sum of the kernels of the parts.

    Args:
        parts: The maps, in the order of their weights.
    """

    def __init__(self, parts: Sequence[FeatureMap]) -> None:
        self.parts = tuple(parts)
        self.sizes = [part.num_features for part in self.parts]
        self.num_features = sum(self.sizes)
        self.exact = all(part.exact for part in self.parts)

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "r M"]:
        """The features of all parts side by side."""
        return torch.cat([part.features(x) for part in self.parts], 1)

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "r s"]:
        """The sum of phi_i(x) w_i over the parts."""
        check_product("w", w, self.num_features)
        first, *rest = (
            part.forward(x, block)
            for part, block in zip(self.parts, w.split(self.sizes), strict=True)
        )
        return sum(rest, start=first)

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "r s"]
    ) -> Float[Tensor, "M s"]:
        """phi_i(x)^T v of all parts, one below the other."""
        return torch.cat([part.adjoint(x, v) for part in self.parts])


class TensorFeatures(FeatureMap):
    """All products large_j(x) small_i(x): the product of the two kernels.

    The products themselves are never formed: a product with weights is one
    product of the large map with (size of small) times as many columns, so its
    features are computed once. Feature (j, i) has index j * size(small) + i.

    Args:
        small: A map with few features (linear, constant, polynomial).
        large: Any map that is independent of ``small``.
    """

    def __init__(self, small: FeatureMap, large: FeatureMap) -> None:
        self.small = small
        self.large = large
        self.num_features = small.num_features * large.num_features
        self.exact = small.exact and large.exact

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n M"]:
        """All products of features."""
        large, small = self.large.features(x), self.small.features(x)
        return (large[:, :, None] * small[:, None, :]).flatten(1)

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "n s"]:
        """phi(x) w by chunks of rows."""
        check_product("w", w, self.num_features)
        columns = w.shape[1]
        w = w.reshape(self.large.num_features, -1)
        out = []
        for rows in self._rows(x, w.shape[1]):
            inner = self.large.forward(x[rows], w).view(
                -1, self.small.num_features, columns
            )
            factors = self.small.features(x[rows])
            out.append(torch.bmm(factors[:, None, :], inner)[:, 0, :])
        return torch.cat(out) if out else x.new_zeros(0, columns)

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "n s"]
    ) -> Float[Tensor, "M s"]:
        """phi(x)^T v by chunks of rows."""
        check_product("v", v, x.shape[0])
        width = self.small.num_features * v.shape[1]
        out = x.new_zeros(self.large.num_features, width)
        for rows in self._rows(x, width):
            factors = self.small.features(x[rows])
            outer = (factors[:, :, None] * v[rows][:, None, :]).flatten(1)
            block = self.large.adjoint(x[rows], outer)
            out = out + block if tracks_gradient(out, block) else out.add_(block)
        return out.reshape(self.num_features, v.shape[1])

    @staticmethod
    def _rows(x: Tensor, width: int) -> Iterator[slice]:
        size = CPU_TILE if x.device.type == "cpu" else DEVICE_TILE
        # Eight tiles (16 MB in float32): rows that are too few would make the
        # large map pass over its weights too often.
        return slices(x.shape[0], max(1, 8 * size // max(1, width)))
