"""Sums and products of feature maps, and of the kernels behind them.

The operations keep the cheap structure of their arguments: a product of two
Fourier maps is a Fourier map, a product with a random sum is a sum of products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import SgdgpError
from sgdgp.core.slices import check_product, slices, tile_size, tracks_gradient
from sgdgp.features.base import (
    FeatureMap,
    Features,
    Points,
    RestrictedFeatures,
    ScaledFeatures,
    Values,
    Weights,
)
from sgdgp.features.finite import ConstantFeatures
from sgdgp.features.fourier import FourierFeatures
from sgdgp.features.tasks import IndexFeatures, TaskFeatures

MAX_TENSOR_FEATURES = 2**20
"""Most features of a product that has to be formed as a tensor product: weights of 64
functions then take 0.5 GB in float64."""


@register_stored_class
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

    def features(self, x: Points) -> Features:
        return torch.cat([part.features(x) for part in self.parts], 1)

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, self.num_features)
        first, *rest = (
            part.forward(x, block)
            for part, block in zip(self.parts, w.split(self.sizes), strict=True)
        )
        return sum(rest, start=first)

    def adjoint(self, x: Points, v: Values) -> Weights:
        return torch.cat([part.adjoint(x, v) for part in self.parts])

    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        first, *rest = (
            part.each(x, rows)
            for part, rows in zip(self.parts, weights.split(self.sizes, 1), strict=True)
        )
        return sum(rest, start=first)

    def restricted(self, dims: Tensor) -> FeatureMap:
        return SumFeatures([part.restricted(dims) for part in self.parts])

    def point_of_rows(self, x: Points) -> Tensor | None:
        return _first_point_of_rows(self.parts, x)


@register_stored_class
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

    def features(self, x: Points) -> Features:
        large, small = self.large.features(x), self.small.features(x)
        return (large[:, :, None] * small[:, None, :]).flatten(1)

    def forward(self, x: Points, w: Weights) -> Values:
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

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        width = self.small.num_features * v.shape[1]
        out = x.new_zeros(self.large.num_features, width)
        for rows in self._rows(x, width):
            factors = self.small.features(x[rows])
            outer = (factors[:, :, None] * v[rows][:, None, :]).flatten(1)
            block = self.large.adjoint(x[rows], outer)
            out = out + block if tracks_gradient(out, block) else out.add_(block)
        return out.reshape(self.num_features, v.shape[1])

    def restricted(self, dims: Tensor) -> FeatureMap:
        return TensorFeatures(self.small.restricted(dims), self.large.restricted(dims))

    def point_of_rows(self, x: Points) -> Tensor | None:
        return _first_point_of_rows((self.large, self.small), x)

    @staticmethod
    def _rows(x: Tensor, width: int) -> Iterator[slice]:
        # Eight tiles (16 MB in float32): rows that are too few would make the
        # large map pass over its weights too often.
        return slices(x.shape[0], max(1, 8 * tile_size(x.device) // max(1, width)))


def _first_point_of_rows(maps: Iterable[FeatureMap], x: Tensor) -> Tensor | None:
    found = (part.point_of_rows(x) for part in maps)
    return next((numbers for numbers in found if numbers is not None), None)


class TooManyFeatures(SgdgpError, ValueError):
    """A tensor product of two maps would be larger than the limit."""


def scale(base: FeatureMap, variance: float) -> FeatureMap:
    """The map of ``variance`` times the kernel of ``base``."""
    return base.scaled(variance)


def restrict(base: FeatureMap, dims: Tensor) -> FeatureMap:
    """The map of k(x[:, dims], x'[:, dims]); ``dims`` is an index tensor (k,)."""
    return base.restricted(dims)


def add(*maps: FeatureMap) -> FeatureMap:
    """The map of the sum of kernels: features side by side."""
    parts: list[FeatureMap] = []
    for part in maps:
        parts.extend(part.parts if isinstance(part, SumFeatures) else [part])
    return parts[0] if len(parts) == 1 else SumFeatures(parts)


def multiply(a: FeatureMap, b: FeatureMap, *, dim: int) -> FeatureMap:
    """The map of the product of two kernels whose maps are independent.

    Two Fourier maps add their frequencies pair by pair: the spectral
    distribution of a product is the convolution of the spectral distributions.
    An exact finite map times any map is their tensor product. A product with a
    sum of random maps is the sum of the products.

    Args:
        a: A map.
        b: A map drawn independently of ``a``.
        dim: Number of columns of the inputs of both.

    Raises:
        TooManyFeatures: If a tensor product would have more than
            ``MAX_TENSOR_FEATURES`` features.
    """
    for one, other in ((a, b), (b, a)):
        if isinstance(one, ScaledFeatures):
            return multiply(one.base, other, dim=dim).scaled(one.variance)
        if isinstance(one, ConstantFeatures):
            return other.scaled(one.variance)
    for one, other in ((a, b), (b, a)):
        if isinstance(one, TaskFeatures):
            rest = multiply(one.other, other, dim=dim)
            return _of_tasks(one.index, one.column, rest)
        table = _table(one)
        if table is not None:
            return _of_tasks(*table, other)
    for one, other in ((a, b), (b, a)):
        # An exact sum is one finite map: distributing it over a random map would
        # compute that map's features once for each term.
        if isinstance(one, SumFeatures) and not one.exact:
            return add(*(multiply(part, other, dim=dim) for part in one.parts))
    if isinstance(a, FourierFeatures) and isinstance(b, FourierFeatures):
        return _convolve(a, b, dim)
    for one, other in ((a, b), (b, a)):
        if isinstance(one, TensorFeatures) and not one.exact:
            if other.exact:
                return _tensor(multiply(one.small, other, dim=dim), one.large)
            return _tensor(one.small, multiply(one.large, other, dim=dim))
    small, large = sorted((a, b), key=lambda m: (not m.exact, m.num_features))
    return _tensor(small, large)


def _table(features: FeatureMap) -> tuple[IndexFeatures, int] | None:
    """A table between tasks, and the column that they are in."""
    if isinstance(features, IndexFeatures):
        return features, 0
    if isinstance(features, RestrictedFeatures):
        base = features.base
        if isinstance(base, IndexFeatures):
            return base, int(features.dims[0])
    return None


def _of_tasks(index: IndexFeatures, column: int, other: FeatureMap) -> FeatureMap:
    _check_count(index, other)
    return TaskFeatures(index, column, other)


def _tensor(small: FeatureMap, large: FeatureMap) -> FeatureMap:
    _check_count(small, large)
    return TensorFeatures(small, large)


def _check_count(small: FeatureMap, large: FeatureMap) -> None:
    if small.num_features * large.num_features > MAX_TENSOR_FEATURES:
        raise TooManyFeatures(
            f"needs a tensor product of {small.num_features} by "
            f"{large.num_features} features, more than the limit of "
            f"{MAX_TENSOR_FEATURES}"
        )


def _convolve(a: FourierFeatures, b: FourierFeatures, dim: int) -> FourierFeatures:
    """Sums of independent frequencies; the pairs of each map are exchangeable."""
    count = min(a.frequencies.shape[1], b.frequencies.shape[1])
    columns = sorted(set(_columns(a, dim)) | set(_columns(b, dim)))
    total = a.frequencies.new_zeros(len(columns), count)
    for part in (a, b):
        for row, column in enumerate(_columns(part, dim)):
            total[columns.index(column)] += part.frequencies[row, :count]
    every = columns == list(range(dim))
    dims = None if every else torch.tensor(columns, device=total.device)
    return FourierFeatures(total, a.variance * b.variance, dims)


def _columns(features: FourierFeatures, dim: int) -> list[int]:
    return list(range(dim)) if features.dims is None else features.dims.tolist()
