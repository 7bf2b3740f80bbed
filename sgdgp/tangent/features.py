"""The exact features of a network's tangent kernel: its Jacobian times a prior root."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import check_product
from sgdgp.features.base import FeatureMap
from sgdgp.tangent.jacobian import Tangent


@runtime_checkable
class WeightRoot(Protocol):
    """A root of the prior covariance of the weights: Sigma_0 = R R^T (D, D)."""

    @property
    def num_weights(self) -> int:
        """D."""

    def root(self, z: Tensor) -> Tensor:
        """R z, (D, k) from (D, k)."""

    def root_adjoint(self, w: Tensor) -> Tensor:
        """R^T w, (D, k) from (D, k)."""


@dataclass(frozen=True)
class IdentityRoot:
    """Independent weights of unit variance: R = I."""

    num_weights: int

    def root(self, z: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """The same."""
        return z

    def root_adjoint(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """The same."""
        return w


class TangentFeatures(FeatureMap):
    """phi(x) = J(x) R, one row for each output: the features of a tangent kernel.

    A network with C outputs has C rows for each input; row i * C + c is output c of
    input i, as in GPyTorch's multi-output kernels.

    Args:
        tangent: The network's Jacobian.
        root: R, a root of the prior covariance of its weights. Default: the identity.
        input_shape: Shape of one of the network's inputs, which flat rows of x are
            reshaped to. Default: rows go to the network as they are.

    Raises:
        TypeError: The root is none, but settings of a prior for instance.
        ValueError: The root is one of another number of weights.
    """

    exact = True

    def __init__(
        self,
        tangent: Tangent,
        root: WeightRoot | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.tangent = tangent
        self.root = IdentityRoot(tangent.num_weights) if root is None else root
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if not isinstance(self.root, WeightRoot):
            raise TypeError(
                "prior: expected a root of the weights' covariance, such as the prior "
                f"of a posterior (posterior.prior), found {type(root).__name__}"
            )
        if self.root.num_weights != tangent.num_weights:
            raise ValueError(
                f"prior: expected a root of {tangent.num_weights} weights, found one "
                f"of {self.root.num_weights}"
            )
        self.num_features = tangent.num_weights
        self._num_outputs: int | None = None

    def num_outputs(self, x: Float[Tensor, "n d"]) -> int:
        """C, found by running the network on the first row of x."""
        if self._num_outputs is None:
            example = self.inputs(x[:1].detach())
            self._num_outputs = self.tangent.outputs(example).shape[1]
        return self._num_outputs

    def inputs(self, x: Float[Tensor, "n d"]) -> Tensor:
        """Rows of x as the network wants them, (n, *input_shape).

        Raises:
            ValueError: x has the wrong number of columns, dtype or device.
        """
        wrong = x.is_floating_point() and x.dtype != self.tangent.dtype
        if wrong or x.device != self.tangent.device:
            raise ValueError(
                f"x: expected integers or {self.tangent.dtype} on "
                f"{self.tangent.device} as the network's weights, found {x.dtype} on "
                f"{x.device}"
            )
        if self.input_shape is None:
            return x
        if x.shape[1] != math.prod(self.input_shape):
            raise ValueError(
                f"x: expected {math.prod(self.input_shape)} columns for inputs of "
                f"shape {self.input_shape}, found {x.shape[1]}"
            )
        return x.reshape(-1, *self.input_shape)

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "nC D"]:
        """J(x) R itself, for small networks.

        Raises:
            ValueError: It does not fit into the memory budget.
        """
        if not len(x):
            return x.new_zeros(0, self.num_features, dtype=self.tangent.dtype)
        rows = len(x) * self.num_outputs(x)
        needed = rows * self.num_features * self.tangent.dtype.itemsize
        budget = resolve_budget(self.tangent.memory_budget, x.device)
        if needed > budget:
            raise ValueError(
                f"x: the Jacobian of {rows} outputs in {self.num_features} weights "
                f"needs {needed / 1e9:.1f} GB, more than the memory budget of "
                f"{budget / 1e9:.1f} GB; sgdgp.condition does without it"
            )
        jacobian = self.tangent.at(self.inputs(x)).jacobian()
        return self.root.root_adjoint(jacobian.flatten(0, 1).mT).mT

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "D k"]
    ) -> Float[Tensor, "nC k"]:
        """J(x) R w by chunks of rows."""
        check_product("w", w, self.num_features)
        w = self.root.root(w)
        parts = [
            self.tangent.at(self.inputs(x[rows])).jvp(w).flatten(0, 1)
            for rows in self._rows(x)
        ]
        return torch.cat(parts) if parts else w.new_zeros(0, w.shape[1])

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "nC k"]
    ) -> Float[Tensor, "D k"]:
        """R^T J(x)^T v by chunks of rows."""
        if not len(x):
            return v.new_zeros(self.num_features, v.shape[1])
        outputs = self.num_outputs(x)
        check_product("v", v, len(x) * outputs)
        u = v.unflatten(0, (len(x), outputs))
        total = v.new_zeros(v.shape[1], self.num_features).mT
        for rows in self._rows(x):
            total = self.tangent.at(self.inputs(x[rows])).vjp(u[rows], out=total)
        return self.root.root_adjoint(total)

    def _rows(self, x: Tensor) -> Iterator[slice]:
        """Rows in parts that fit the memory budget; the first tells how many do."""
        start = 0
        while start < len(x):
            stop = start + self.tangent.examples_at_once()
            yield slice(start, stop)
            start = stop
