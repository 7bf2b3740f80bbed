"""Which GPyTorch kernels are functions of two points, and which are not."""

from __future__ import annotations

import torch
from gpytorch.kernels import InducingPointKernel, Kernel, RBFKernelGradGrad

_REFUSED: dict[type[Kernel], str] = {
    InducingPointKernel: (
        "its value depends on whether the two sets of points are the same, so it is "
        "not a function of two points; use its base_kernel, sgdgp needs no inducing "
        "points"
    ),
    RBFKernelGradGrad: (
        "GPyTorch cannot evaluate it between two different sets of points; "
        "RBFKernelGrad works"
    ),
}


def check_kernel(kernel: Kernel) -> None:
    """Refuse kernels that cannot be evaluated block by block.

    Args:
        kernel: A GPyTorch kernel; sub-kernels are checked too.

    Raises:
        TypeError: ``kernel`` is not a GPyTorch kernel.
        ValueError: It, or a kernel inside it, is not a function of two points, has
            a batch shape, or has a parameter that is not finite.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel must be a gpytorch.kernels.Kernel, found {type(kernel).__name__}"
        )
    for name, module in kernel.named_modules():
        for refused, reason in _REFUSED.items():
            if isinstance(module, refused):
                raise ValueError(f"{type(module).__name__} is not supported: {reason}")
        if isinstance(module, Kernel) and len(module.batch_shape) > 0:
            raise ValueError(
                f"{type(module).__name__} has batch_shape "
                f"{tuple(module.batch_shape)}; only kernels without a batch shape are "
                "supported, condition each batch element on its own"
            )
        for own, parameter in module.named_parameters(name, recurse=False):
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise ValueError(f"kernel parameter {own} is not finite: {parameter}")
