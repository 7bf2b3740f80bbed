"""GPyTorch's own evaluation of a kernel: dense, and a function of two points."""

from __future__ import annotations

from copy import deepcopy

import gpytorch
import torch
from gpytorch.kernels import GridInterpolationKernel, GridKernel, Kernel
from torch import Tensor


def evaluated(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """kernel(x1, x2) as a tensor; nothing lazy, nothing sent through Lanczos."""
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x1, x2).to_dense()


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
        margin = 1e-5 * (highest - lowest)
        corners = torch.stack([lowest - margin, highest + margin])
        evaluated(kernel, corners, corners)
    for grid in grids:
        grid.has_initialized_grid.fill_(True)
    return kernel


def live_tensors(kernel: Kernel) -> tuple[Tensor, ...]:
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
    shared = (*kernel.parameters(), *live_tensors(kernel))
    return deepcopy(kernel, {id(tensor): tensor for tensor in shared})


def detached_copy(kernel: Kernel) -> Kernel:
    """A copy that shares nothing; a tensor with a graph becomes a constant."""
    traced = (tensor for tensor in live_tensors(kernel) if not tensor.is_leaf)
    return deepcopy(kernel, {id(tensor): tensor.detach().clone() for tensor in traced})
