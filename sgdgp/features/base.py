"""The contract of a feature map: finite features whose inner product is a kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


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
