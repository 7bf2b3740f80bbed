"""Kernels with several outputs per input, as kernels over (input, task) pairs.

    k((x, t), (x', t')) = k_data(x, x') B[t, t']

(intrinsic coregionalisation; sums of such products for the linear model of
coregionalisation). A pair is a row [x, t], so an output that was not observed is a row
left out, and everything that holds for kernels of two points holds here.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LCMKernel,
    MultitaskKernel,
    ProductKernel,
    ScaleKernel,
)

from sgdgp.gpytorch_adapter.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.sharing import on_columns, with_parts


def pairs_kernel(kernel: Kernel, columns: int) -> Kernel:
    """The kernel over rows [x, t] of a kernel with several outputs per input.

    It shares the kernel's parameters. Its own active dims count as applied already.

    Args:
        kernel: A ``MultitaskKernel``, ``LCMKernel``, or sums, products and multiples.
        columns: Columns of x.

    Raises:
        UnsupportedModelError: There is no such form.
    """
    rule = _rule(type(kernel))
    return rule(kernel, columns)


@singledispatch
def _pairs(kernel: Kernel, columns: int) -> Kernel:
    raise UnsupportedModelError(
        f"model: {type(kernel).__name__} has several outputs per input that are not "
        "tasks; expected MultitaskKernel or LCMKernel, their sums, products and "
        "multiples (kernels of derivatives are not supported)"
    )


def _rule(kind: type[Kernel]):  # type: ignore[no-untyped-def]
    """The rule of the exact type: a subclass may have another forward."""
    return _pairs.registry.get(kind, _pairs.registry[object])


@_pairs.register
def _(kernel: MultitaskKernel, columns: int) -> Kernel:
    # GPyTorch calls the data kernel's forward here: its active dims do not count.
    data = on_columns(kernel.data_covar_module, torch.arange(columns))
    task = on_columns(kernel.task_covar_module, torch.tensor([columns]))
    return ProductKernel(data, task)


@_pairs.register
def _(kernel: LCMKernel, columns: int) -> Kernel:
    return AdditiveKernel(
        *(pairs_kernel(part, columns) for part in kernel.covar_module_list)
    )


@_pairs.register
def _(kernel: ScaleKernel, columns: int) -> Kernel:
    base = pairs_kernel(kernel.base_kernel, columns)
    return on_columns(with_parts(kernel, {"base_kernel": base}), None)


@_pairs.register
def _(kernel: AdditiveKernel, columns: int) -> Kernel:
    return AdditiveKernel(*(_called(part, columns) for part in kernel.kernels))


@_pairs.register
def _(kernel: ProductKernel, columns: int) -> Kernel:
    return ProductKernel(*(_called(part, columns) for part in kernel.kernels))


def _called(kernel: Kernel, columns: int) -> Kernel:
    """A part that is called, not only its forward: its active dims count."""
    dims = torch.arange(columns) if kernel.active_dims is None else kernel.active_dims
    task = torch.tensor([columns], device=dims.device)
    return on_columns(
        pairs_kernel(kernel, dims.numel()), torch.cat([dims.long(), task])
    )
