"""Kernel algebra on feature maps: scale, restrict, add, multiply.

The operations keep the cheap structure of their arguments: a product of two
Fourier maps is a Fourier map, a product with a random sum is a sum of products.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import AdditiveKernel, ProductKernel, ScaleKernel
from torch import Tensor

from sgdgp.core.errors import SgdgpError
from sgdgp.features.base import FeatureMap
from sgdgp.features.composite import (
    RestrictedFeatures,
    ScaledFeatures,
    SumFeatures,
    TensorFeatures,
)
from sgdgp.features.dispatch import (
    FeatureRequest,
    NoRandomFeatures,
    features_of,
    forward_features_of,
    register_features,
)
from sgdgp.features.finite import ConstantFeatures
from sgdgp.features.fourier import FourierFeatures
from sgdgp.features.index import IndexFeatures, TaskFeatures

MAX_TENSOR_FEATURES = 2**20
"""Most features of a product that has to be formed as a tensor product."""


class TooManyFeatures(SgdgpError, ValueError):
    """A tensor product of two maps would be larger than the limit."""


def scale(base: FeatureMap, variance: float) -> FeatureMap:
    """The map of ``variance`` times the kernel of ``base``."""
    if isinstance(base, FourierFeatures):
        return FourierFeatures(base.frequencies, variance * base.variance, base.dims)
    if isinstance(base, ConstantFeatures):
        return ConstantFeatures(variance * base.variance)
    if isinstance(base, ScaledFeatures):
        return ScaledFeatures(base.base, variance * base.variance)
    return ScaledFeatures(base, variance)


def restrict(base: FeatureMap, dims: Tensor) -> FeatureMap:
    """The map of k(x[:, dims], x'[:, dims]); ``dims`` is an index tensor (k,)."""
    if isinstance(base, FourierFeatures):
        inner = dims if base.dims is None else dims[base.dims]
        return FourierFeatures(base.frequencies, base.variance, inner)
    if isinstance(base, ConstantFeatures):
        return base
    if isinstance(base, ScaledFeatures):
        return ScaledFeatures(restrict(base.base, dims), base.variance)
    if isinstance(base, RestrictedFeatures):
        return RestrictedFeatures(base.base, dims[base.dims])
    if isinstance(base, SumFeatures):
        return SumFeatures([restrict(part, dims) for part in base.parts])
    if isinstance(base, TaskFeatures):
        column = int(dims[base.column])
        return TaskFeatures(base.index, column, restrict(base.other, dims))
    if isinstance(base, TensorFeatures):
        return TensorFeatures(restrict(base.small, dims), restrict(base.large, dims))
    return RestrictedFeatures(base, dims)


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
            return scale(multiply(one.base, other, dim=dim), one.variance)
        if isinstance(one, ConstantFeatures):
            return scale(other, one.variance)
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


@register_features(ScaleKernel, parts=lambda kernel: [kernel.base_kernel])
def scale_features(kernel: ScaleKernel, request: FeatureRequest) -> FeatureMap:
    """The base kernel's map, scaled.

    GPyTorch's scale kernel calls ``forward`` of its base: it takes over the
    base's ``active_dims`` and those of the base are not applied a second time.
    """
    base = forward_features_of(kernel.base_kernel, request)
    return scale(base, float(request.parameter(kernel.outputscale)))


@register_features(AdditiveKernel, parts=lambda kernel: list(kernel.kernels))
def sum_features(kernel: AdditiveKernel, request: FeatureRequest) -> FeatureMap:
    """The maps of all terms side by side, each with all of ``num_features``."""
    return add(*(features_of(term, request) for term in kernel.kernels))


@register_features(ProductKernel, parts=lambda kernel: list(kernel.kernels))
def product_features(kernel: ProductKernel, request: FeatureRequest) -> FeatureMap:
    """The product of the factors' maps, each drawn independently.

    Raises:
        NoRandomFeatures: If a tensor product would be too large.
    """
    first, *rest = (features_of(factor, request) for factor in kernel.kernels)
    try:
        for factor in rest:
            first = multiply(first, factor, dim=request.dim)
    except TooManyFeatures as error:
        raise NoRandomFeatures(kernel, str(error)) from None
    return first
