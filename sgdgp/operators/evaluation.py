"""GPyTorch kernels as functions of two points: which are, their values, copies."""

from __future__ import annotations

from copy import deepcopy
from functools import reduce

import gpytorch
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    GridInterpolationKernel,
    GridKernel,
    InducingPointKernel,
    Kernel,
    ProductKernel,
    RBFKernelGradGrad,
    ScaleKernel,
)
from jaxtyping import Float
from torch import Tensor

_MARGIN = 1e-5
"""Share of its width by which a grid reaches beyond the data: a hundred roundings of
float32, and nothing beside the distance of two grid points."""

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


def evaluated(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """kernel(x1, x2) as a tensor; nothing lazy, nothing sent through Lanczos."""
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x1, x2).to_dense()


def differentiable_block(
    kernel: Kernel, x1: Float[Tensor, "*b m d"], x2: Float[Tensor, "*b n d"]
) -> Float[Tensor, "*b M N"]:
    """K(x1, x2) by GPyTorch itself, with a graph to the inputs and the parameters.

    Products are taken here, of dense matrices: where x1 equals x2, GPyTorch would send
    some of them (linear times index kernel) through root decompositions with jitter.
    """
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return _value(kernel, x1, x2)


def _value(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """``kernel(x1, x2)``: its active dims apply."""
    if type(kernel) not in (AdditiveKernel, ProductKernel, ScaleKernel):
        return kernel(x1, x2).to_dense()
    dims = kernel.active_dims
    if dims is not None:
        one, other = x1, x2
        x1 = one.index_select(-1, dims)
        x2 = x1 if other is one else other.index_select(-1, dims)
    return _forward_value(kernel, x1, x2)


def _forward_value(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """``kernel.forward(x1, x2)``: active dims of its own do not apply."""
    kind = type(kernel)
    if kind is ScaleKernel:
        return kernel.outputscale * _forward_value(kernel.base_kernel, x1, x2)
    if kind is AdditiveKernel:
        return reduce(torch.add, (_value(part, x1, x2) for part in kernel.kernels))
    if kind is ProductKernel:
        return reduce(torch.mul, (_value(part, x1, x2) for part in kernel.kernels))
    return gpytorch.kernels.kernel.to_dense(kernel.forward(x1, x2))


@torch.no_grad()
def evaluated_blocks(
    kernel: Kernel, points: Float[Tensor, "m k d"]
) -> Float[Tensor, "m k k"] | None:
    """Many small square blocks of a kernel matrix in one batched call of the kernel.

    In float64: GPyTorch's distances cancel, and between near neighbours, which are what
    is asked for, float32 would be off in the second digit. None for a kernel that knows
    no batches.
    """
    points = points.double()
    kernel = detached_copy(kernel).double()
    try:
        blocks = evaluated(kernel, points, points)
    except RuntimeError:  # a kernel that knows no batches
        return None
    return blocks if blocks.shape == (*points.shape[:2], points.shape[1]) else None


@torch.no_grad()
def with_fixed_grids(kernel: Kernel, x: Tensor, x_rows: Tensor) -> Kernel:
    """The kernel, its interpolation grids placed once for all the data.

    GPyTorch places a dynamic grid anew for the points of every call; seen block by
    block the kernel would change from one block to the next. A kernel that has such
    grids is copied, the caller's stays as it is; the copy shares its parameters, so
    that gradients reach the caller.
    """
    if not any(isinstance(m, GridInterpolationKernel) for m in kernel.modules()):
        return kernel
    both = (x, x_rows)
    lowest = torch.stack([points.amin(0) for points in both]).amin(0)
    highest = torch.stack([points.amax(0) for points in both]).amax(0)
    kernel = sharing_copy(kernel)
    for module in kernel.modules():
        if isinstance(module, GridKernel):
            # In eval mode it would keep the matrix of its grid from call to call,
            # without a graph and for the parameters it had then.
            module._clear_cache()
            module.training = True
    grids = [m for m in kernel.modules() if isinstance(m, GridInterpolationKernel)]
    before = [grid.grid_bounds for grid in grids]
    corners = torch.stack([lowest, highest])
    evaluated(kernel, corners, corners)
    if [grid.grid_bounds for grid in grids] != before:
        # A grid was placed. A margin, lest rounding of its bounds leave the outermost
        # points outside.
        margin = _MARGIN * (highest - lowest)
        corners = torch.stack([lowest - margin, highest + margin])
        evaluated(kernel, corners, corners)
    for grid in grids:
        grid.has_initialized_grid.fill_(True)
    return kernel


def tensors_with_graph(kernel: Kernel) -> tuple[Tensor, ...]:
    """Every tensor that the kernel depends on and that wants a gradient.

    Parameters, and other tensors with a graph that its modules hold as attributes
    (a lengthscale that a network computes, say). Each is listed once.
    """
    found: dict[int, Tensor] = {}
    for module in kernel.modules():
        held = vars(module)
        for tensors in (held["_parameters"], held["_buffers"], held):
            for tensor in tensors.values():
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    found[id(tensor)] = tensor
    return tuple(found.values())


def sharing_copy(kernel: Kernel) -> Kernel:
    """A copy with modules and buffers of its own, but the very same parameters."""
    shared = (*kernel.parameters(), *tensors_with_graph(kernel))
    return deepcopy(kernel, {id(tensor): tensor for tensor in shared})


def detached_copy(kernel: Kernel) -> Kernel:
    """A copy that shares nothing; a tensor with a graph becomes a constant."""
    traced = (tensor for tensor in tensors_with_graph(kernel) if not tensor.is_leaf)
    return deepcopy(kernel, {id(tensor): tensor.detach().clone() for tensor in traced})
