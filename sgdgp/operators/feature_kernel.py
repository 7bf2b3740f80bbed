"""Feature maps as kernels, and kernels as exact feature maps."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.features import (
    FeatureMap,
    FeatureRequest,
    NoRandomFeatures,
    has_features,
    random_features,
    register_features,
)


class FeatureKernel(Kernel):
    """k(x, x') = phi(x)^T phi(x') of a feature map, as a GPyTorch kernel.

    Args:
        feature_map: phi; with C outputs per input its rows are i C + c.
        dtype: Data type of the map.
        outputs: C. Default: 1.
    """

    is_stationary = False
    has_lengthscale = False

    def __init__(
        self, feature_map: FeatureMap, dtype: torch.dtype, outputs: int = 1
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.feature_dtype = dtype
        self.outputs = outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureKernel:
        """A kernel of the same map, which may hold a data set and a network."""
        return FeatureKernel(self.feature_map, self.feature_dtype, self.outputs)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C."""
        return self.outputs

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any
    ) -> Tensor:
        """K (n C, m C), or its diagonal (n C,)."""
        left = self.feature_map.features(x1)
        right = left if torch.equal(x1, x2) else self.feature_map.features(x2)
        return (left * right).sum(-1) if diag else left @ right.mT


@register_features(FeatureKernel)
def _(kernel: FeatureKernel, request: FeatureRequest) -> FeatureMap:
    if request.dtype != kernel.feature_dtype:
        raise ValueError(
            f"x: expected {kernel.feature_dtype} like the feature map, found "
            f"{request.dtype}"
        )
    return kernel.feature_map


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


def exact_map(kernel: Kernel, x: Float[Tensor, "n d"]) -> FeatureMap | None:
    """The exact features of a kernel, in the dtype of x; None if it has none.

    Raises:
        ValueError: The kernel's features do not have that dtype, or do not fit x.
    """
    if x.shape[1] == 0 or not has_features(kernel):
        return None
    try:
        found = random_features(
            kernel,
            dim=x.shape[1],
            num_features=1,
            generator=torch.Generator(),
            dtype=x.dtype,
            device=x.device,
        )
    except NoRandomFeatures:
        return None
    return found if found.exact else None
