"""Kernels of kernels: scales, sums and products."""

from __future__ import annotations

from gpytorch.kernels import AdditiveKernel, ProductKernel, ScaleKernel

from sgdgp.features.base import FeatureMap
from sgdgp.features.compose import TooManyFeatures, add, multiply
from sgdgp.features.dispatch import (
    FeatureRequest,
    NoRandomFeatures,
    features_of,
    forward_features_of,
    register_features,
)


@register_features(ScaleKernel, parts=lambda kernel: [kernel.base_kernel])
def scale_features(kernel: ScaleKernel, request: FeatureRequest) -> FeatureMap:
    """The base kernel's map, scaled.

    GPyTorch's scale kernel calls ``forward`` of its base: it takes over the
    base's ``active_dims`` and those of the base are not applied a second time.
    """
    base = forward_features_of(kernel.base_kernel, request)
    return base.scaled(float(request.parameter(kernel.outputscale)))


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
