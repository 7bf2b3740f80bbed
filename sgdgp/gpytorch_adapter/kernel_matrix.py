"""Kernel matrices by GPyTorch itself."""

from __future__ import annotations

from functools import reduce

import gpytorch
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor


def differentiable_block(
    kernel: Kernel, x1: Float[Tensor, "m d"], x2: Float[Tensor, "n d"]
) -> Float[Tensor, "M N"]:
    """K(x1, x2) by GPyTorch itself, with a graph to the inputs and the parameters.

    Products are taken here, of dense matrices: where x1 equals x2, GPyTorch would send
    some of them (linear times index kernel) through root decompositions with jitter.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x1: Row inputs (m, d).
        x2: Column inputs (n, d).
    """
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return _called(kernel, x1, x2)


def _called(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """``kernel(x1, x2)``: its active dims apply."""
    if type(kernel) not in (AdditiveKernel, ProductKernel, ScaleKernel):
        return kernel(x1, x2).to_dense()
    dims = kernel.active_dims
    if dims is not None:
        one, other = x1, x2
        x1 = one.index_select(-1, dims)
        x2 = x1 if other is one else other.index_select(-1, dims)
    return _forward(kernel, x1, x2)


def _forward(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """``kernel.forward(x1, x2)``: active dims of its own do not apply."""
    kind = type(kernel)
    if kind is ScaleKernel:
        return kernel.outputscale * _forward(kernel.base_kernel, x1, x2)
    if kind is AdditiveKernel:
        return reduce(torch.add, (_called(part, x1, x2) for part in kernel.kernels))
    if kind is ProductKernel:
        return reduce(torch.mul, (_called(part, x1, x2) for part in kernel.kernels))
    return gpytorch.kernels.kernel.to_dense(kernel.forward(x1, x2))
