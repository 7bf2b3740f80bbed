"""The tangent kernel of a network as a GPyTorch kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from sgdgp.features.dispatch import FeatureRequest
from sgdgp.kernels.registry import register_kernel
from sgdgp.tangent import Tangent, TangentFeatures, WeightRoot, Weights


class NeuralTangentKernel(Kernel):
    """k(x, x') = J(x) Sigma_0 J(x')^T, with J the Jacobian of a trained network.

    The prior covariance, over inputs, of the network linearised in its weights. The
    network has C outputs and the kernel C rows for each input, output after output
    (GPyTorch's multi-output convention). It has no parameters of its own: put it into
    a ``ScaleKernel`` to learn a scale. The network is no submodule: it is neither
    trained, nor moved, nor saved with the model.

    Args:
        network: A trained network in evaluation mode; never changed.
        input_shape: Shape of one of its inputs, for rows of x that are flattened
            ones. Default: rows go to the network as they are.
        prior: A root of Sigma_0, such as a weight prior. Default: the identity.
        weights: The uncertain weights, see :class:`sgdgp.tangent.Tangent`.
        output: Takes what the network returns to a tensor.
        memory_budget: Bytes for temporaries. Default: half of what is free.
        **kwargs: ``active_dims``.

    Raises:
        TypeError: Not a network that can be linearised, or an unknown argument.
        ValueError: The same, or a batch shape.
    """

    is_stationary = False
    has_lengthscale = False

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: Sequence[int] | None = None,
        prior: WeightRoot | None = None,
        weights: Weights = None,
        output: Callable[[Any], Tensor] | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(kwargs) - {"active_dims", "batch_shape"})
        if unknown:
            raise TypeError(f"NeuralTangentKernel has no argument {unknown[0]!r}")
        if len(kwargs.get("batch_shape", ())):
            raise ValueError(
                "batch_shape: a network has one tangent kernel, found "
                f"{tuple(kwargs['batch_shape'])}"
            )
        super().__init__(**kwargs)
        tangent = Tangent(
            network, weights=weights, output=output, memory_budget=memory_budget
        )
        self.feature_map = TangentFeatures(tangent, prior, input_shape)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C."""
        return self.feature_map.num_outputs(self._rows(x1))

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        """K (..., n C, m C), or its diagonal (..., n C)."""
        if last_dim_is_batch:
            raise ValueError("a network has no kernel for each of its inputs' columns")
        same = x1.shape == x2.shape and torch.equal(x1, x2)
        left = self._features(x1)
        right = left if same else self._features(x2)
        return (left * right).sum(-1) if diag else left @ right.mT

    def _rows(self, x: Tensor) -> Tensor:
        """Inputs for the network, which stays as it is in a model made float64."""
        flat = x.flatten(0, -2)
        is_double = x.dtype == torch.float64
        return flat.to(self.feature_map.tangent.dtype) if is_double else flat

    def _features(self, x: Tensor) -> Tensor:
        phi = self.feature_map.features(self._rows(x))
        phi = phi.to(x.dtype) if x.is_floating_point() else phi
        return phi.reshape(*x.shape[:-2], -1, phi.shape[-1])


def _features(kernel: NeuralTangentKernel, request: FeatureRequest) -> TangentFeatures:
    """The exact map that the kernel itself uses.

    Raises:
        ValueError: Another dtype or device than the network's is asked for.
    """
    kernel.feature_map.inputs(request.like.new_zeros(1, request.dim))
    return kernel.feature_map


register_kernel(NeuralTangentKernel, features=_features)
