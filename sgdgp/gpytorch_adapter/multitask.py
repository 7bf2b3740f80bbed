"""Kernels with several outputs per input, as kernels over (input, task) pairs.

    k((x, t), (x', t')) = k_data(x, x') B[t, t']

(intrinsic coregionalisation; sums of such products for the linear model of
coregionalisation). A pair is a row [x, t], so an output that was not observed is a row
left out, and everything that holds for kernels of two points holds here.

Outputs of other kernels with features, such as those of a network's tangent kernel, are
rows of one feature map: the pair (x, t) has the features of output t.

Hadamard multitask models, whose inputs are such pairs already, multiply what two
kernels return: ``covar_x.mul(covar_i)``. linear_operator would evaluate both matrices
on the spot. While a forward is traced here (``products_kept``), such a product is only
written down.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LCMKernel,
    MultitaskKernel,
    ProductKernel,
    ScaleKernel,
)
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator.operators import (
    ConstantMulLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.features import FeatureMap, FeatureRequest, has_features, register_features
from sgdgp.features.dispatch import forward_features_of
from sgdgp.features.tasks import PairFeatures, points_and_rows


def multitask_kernel(kernel: Kernel, columns: int) -> Kernel:
    """The kernel over rows [x, t] of a kernel with several outputs per input.

    It shares the kernel's parameters. Its own active dims count as applied already.

    Args:
        kernel: A ``MultitaskKernel``, ``LCMKernel``, a kernel with features (such as
            ``NeuralTangentKernel``), or sums, products and multiples.
        columns: Columns of x.

    Raises:
        UnsupportedModelError: There is no such form.
    """
    # The rule of the exact type: a subclass may have another forward.
    rules = _pairs.registry
    return rules.get(type(kernel), rules[object])(kernel, columns)


class OutputPairsKernel(Kernel):
    """k((x, t), (x', t')) = k(x, x')[t, t'] of a kernel with several outputs.

    Args:
        base_kernel: The kernel; it sees all columns but the last.
    """

    def __init__(self, base_kernel: Kernel) -> None:
        super().__init__()
        self.base_kernel = base_kernel

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any
    ) -> Tensor:
        """K (n, m), or its diagonal (n,)."""
        base = self.base_kernel
        outputs = int(base.num_outputs_per_input(x1[:1, :-1], x2[:1, :-1]))
        if diag and not torch.equal(x1, x2):
            return self.forward(x1, x2).diagonal()
        points, rows = points_and_rows(x1, outputs)
        if diag:
            return base(points, points, diag=True)[rows]
        others, columns = (points, rows)
        if x2 is not x1:
            others, columns = points_and_rows(x2, outputs)
        return base(points, others).to_dense()[rows][:, columns]


@register_features(OutputPairsKernel, parts=lambda kernel: [kernel.base_kernel])
def _(kernel: OutputPairsKernel, request: FeatureRequest) -> FeatureMap:
    inner = replace(request, dim=request.dim - 1)
    example = request.like.new_zeros(1, inner.dim)
    outputs = kernel.base_kernel.num_outputs_per_input(example, example)
    return PairFeatures(forward_features_of(kernel.base_kernel, inner), int(outputs))


@singledispatch
def _pairs(kernel: Kernel, columns: int) -> Kernel:
    if has_features(kernel):
        return OutputPairsKernel(on_columns(kernel, None))
    raise UnsupportedModelError(
        f"model: {type(kernel).__name__} has several outputs per input that are not "
        "tasks; expected MultitaskKernel or LCMKernel, their sums, products and "
        "multiples, or a kernel with registered features (kernels of derivatives are "
        "not supported)"
    )


@_pairs.register
def _(kernel: MultitaskKernel, columns: int) -> Kernel:
    # GPyTorch calls the data kernel's forward here: its active dims do not count.
    data = on_columns(kernel.data_covar_module, torch.arange(columns))
    task = on_columns(kernel.task_covar_module, torch.tensor([columns]))
    return ProductKernel(data, task)


@_pairs.register
def _(kernel: LCMKernel, columns: int) -> Kernel:
    return AdditiveKernel(
        *(multitask_kernel(part, columns) for part in kernel.covar_module_list)
    )


@_pairs.register
def _(kernel: ScaleKernel, columns: int) -> Kernel:
    base = multitask_kernel(kernel.base_kernel, columns)
    return on_columns(with_parts(kernel, {"base_kernel": base}), None)


@_pairs.register(AdditiveKernel)
@_pairs.register(ProductKernel)
def _(kernel: AdditiveKernel | ProductKernel, columns: int) -> Kernel:
    return type(kernel)(*(_called(part, columns) for part in kernel.kernels))


def _called(kernel: Kernel, columns: int) -> Kernel:
    """A part that is called, not only its forward: its active dims count."""
    dims = torch.arange(columns) if kernel.active_dims is None else kernel.active_dims
    task = torch.tensor([columns], device=dims.device)
    return on_columns(
        multitask_kernel(kernel, dims.numel()), torch.cat([dims.long(), task])
    )


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


_TRACING = threading.RLock()
_READABLE = (LazyEvaluatedKernelTensor, SumLinearOperator, ConstantMulLinearOperator)


class ProductOperator(LinearOperator):
    """The elementwise product of two covariances, to be read and not computed with."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        super().__init__(first, second)
        self.factors = (first, second)

    def _size(self) -> Any:
        return self.factors[0].shape

    def _transpose_nonbatch(self) -> ProductOperator:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        first, second = (factor.to_dense() for factor in self.factors)
        return (first * second) @ rhs


@contextmanager
def products_kept() -> Iterator[None]:
    """Within it, this thread's products of unevaluated covariances stay as they are.

    linear_operator has no hook for products, so its method is wrapped meanwhile; for
    all other threads the wrapper does nothing.
    """
    with _TRACING:
        here, original = threading.get_ident(), LinearOperator._mul_matrix

        def kept(self: LinearOperator, other: LinearOperator) -> LinearOperator:
            readable = (*_READABLE, ProductOperator)
            if (
                threading.get_ident() == here
                and isinstance(self, readable)
                and isinstance(other, readable)
            ):
                return ProductOperator(self, other)
            return original(self, other)

        LinearOperator._mul_matrix = kept
        try:
            yield
        finally:
            LinearOperator._mul_matrix = original
