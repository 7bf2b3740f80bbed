"""Features of one output at a time: a map of C outputs over pairs (input, output)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.slices import check_product, tracks_gradient
from sgdgp.features.base import FeatureMap
from sgdgp.features.composite import (
    RestrictedFeatures,
    ScaledFeatures,
    SumFeatures,
    TensorFeatures,
)


class PairFeatures(FeatureMap):
    """phi([x, t]) = phi_t(x), for a map with C rows phi_1(x) ... phi_C(x) per input.

    Rows that follow one another and have the same x are evaluated as one point: all
    outputs of an input cost what one of them does.

    Args:
        base: A map whose row i C + c is output c of input i.
        outputs: C.
    """

    def __init__(self, base: FeatureMap, outputs: int) -> None:
        self.base = base
        self.outputs = outputs
        self.num_features = base.num_features
        self.exact = base.exact

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n M"]:
        """The features of each pair."""
        points, rows = self._points(x)
        return self.base.features(points)[rows]

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "n s"]:
        """phi(x) w, one forward for each point."""
        points, rows = self._points(x)
        return self.base.forward(points, w)[rows]

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "n s"]
    ) -> Float[Tensor, "M s"]:
        """phi(x)^T v, one adjoint for each point."""
        check_product("v", v, len(x))
        points, rows = self._points(x)
        whole = v.new_zeros(len(points) * self.outputs, v.shape[1])
        return self.base.adjoint(points, whole.index_add(0, rows, v))

    def _points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return points_and_rows(x, self.outputs)


def points_and_rows(
    x: Float[Tensor, "n d"], outputs: int
) -> tuple[Float[Tensor, "p k"], Int[Tensor, " n"]]:
    """The points behind pairs, and the row of each pair among those of the points.

    Args:
        x: Rows [x, t].
        outputs: Rows of a point.

    Raises:
        ValueError: A pair is of an output that there is not.
    """
    output = x[:, -1].detach().round().long()
    if len(x) and not 0 <= int(output.min()) <= int(output.max()) < outputs:
        raise ValueError(
            f"x: expected outputs from 0 to {outputs - 1} in its last column, found "
            f"{int(output.min())} to {int(output.max())}"
        )
    if tracks_gradient(x):
        # Rows of one point are different leaves of the graph.
        number = torch.arange(len(x), device=x.device)
        return x[:, :-1], number * outputs + output
    number = _numbers(x)
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    return x[first, :-1], number * outputs + output


def _numbers(x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """Number of the point that each pair belongs to, counted from the first row."""
    if not len(x):
        return torch.zeros(0, dtype=torch.long, device=x.device)
    inputs = x[:, :-1].detach()
    changes = (inputs[1:] != inputs[:-1]).any(1)
    return torch.cat([changes.new_zeros(1), changes]).cumsum(0)


def point_of_rows(
    features: FeatureMap, x: Float[Tensor, "n d"]
) -> Int[Tensor, " n"] | None:
    """Number of the point that each row is evaluated with, None if of its own.

    Args:
        features: Any map; looked for is a ``PairFeatures`` inside it.
        x: Rows.
    """
    if isinstance(features, PairFeatures):
        return _numbers(x)
    if isinstance(features, ScaledFeatures):
        return point_of_rows(features.base, x)
    if isinstance(features, RestrictedFeatures):
        return point_of_rows(features.base, x.index_select(1, features.dims))
    parts: tuple[FeatureMap, ...] = ()
    if isinstance(features, SumFeatures):
        parts = features.parts
    elif isinstance(features, TensorFeatures):
        parts = (features.large, features.small)
    found = (point_of_rows(part, x) for part in parts)
    return next((numbers for numbers in found if numbers is not None), None)
