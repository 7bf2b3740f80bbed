"""Kernels that share their parameters with another, but differ in what they see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpytorch.kernels import Kernel
from torch import Tensor


def on_columns(kernel: Kernel, columns: Tensor | None) -> Kernel:
    """The same kernel with the same parameters, seeing these columns (None: all)."""
    shared = _shared(kernel)
    if columns is not None:
        columns = columns.to(next((p.device for p in kernel.parameters()), "cpu"))
    shared.active_dims = columns
    return shared


def with_parts(kernel: Kernel, parts: Mapping[str, Kernel]) -> Kernel:
    """The same kernel with the same parameters, some kernels inside it replaced."""
    shared = _shared(kernel)
    modules: dict[str, torch.nn.Module | None] = dict(kernel._modules)
    modules.update(parts)
    shared.__dict__["_modules"] = modules
    return shared


def _shared(kernel: Kernel) -> Kernel:
    # copy.copy will not do: GPyTorch's kernels hand on their __dict__ itself, so a
    # change of the copy is a change of the original.
    shared: Kernel = object.__new__(type(kernel))
    shared.__dict__ = dict(kernel.__dict__)
    shared.__dict__["_buffers"] = dict(kernel._buffers)
    return shared
