"""A lazy covariance as one kernel over one matrix of kernel inputs.

``forward`` may add and multiply kernels, scale them by constants and put a network in
front of them. What it returns is a tree of linear operators whose leaves are kernels
that have not been evaluated yet; each leaf gets columns of its own in the matrix of
kernel inputs. Nothing is copied or detached: kernels are the model's own, and inputs
and constants keep their graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    ProductKernel,
    ScaleKernel,
)
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator.operators import (
    BlockLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.pairs import pairs_kernel
from sgdgp.gpytorch_adapter.products import ProductOperator
from sgdgp.gpytorch_adapter.sharing import on_columns


@dataclass(frozen=True)
class Leaf:
    """A kernel that ``forward`` has called, and the constant in front of it.

    Attributes:
        kernel: The kernel; its active dims are applied already.
        inputs: What it was called on (n, p).
        scale: Product of the constants around it, or None.
    """

    kernel: Kernel
    inputs: Tensor
    scale: Tensor | None

    @property
    def outputs(self) -> int:
        """Outputs per input."""
        found = self.kernel.num_outputs_per_input(self.inputs, self.inputs)
        return int(found)

    def frozen(self) -> Leaf:
        """The same with a constant that has no graph."""
        return self if self.scale is None else replace(self, scale=self.scale.detach())


@dataclass(frozen=True)
class Branch:
    """A sum or product of covariances."""

    kind: type[AdditiveKernel] | type[ProductKernel]
    parts: tuple[Tree, ...]

    def frozen(self) -> Branch:
        """The same with constants that have no graph."""
        return Branch(self.kind, tuple(part.frozen() for part in self.parts))


Tree: TypeAlias = Leaf | Branch


@dataclass(frozen=True)
class Rows:
    """Which rows of a covariance: the points behind them, and their tasks.

    Attributes:
        points: Index of each row's point (N,), or None for all in order.
        tasks: Task of each row (N,), or None where there is one output.
    """

    points: Tensor | None = None
    tasks: Tensor | None = None


def tree_of(covariance: LinearOperator, scale: Tensor | None = None) -> Tree:
    """The covariance's kernels.

    Raises:
        UnsupportedModelError: Something in it is not a function of two points.
    """
    if isinstance(covariance, LazyEvaluatedKernelTensor):
        return _leaf(covariance, scale)
    if isinstance(covariance, SumLinearOperator):
        terms = [
            tree_of(term, scale)
            for term in covariance.linear_ops
            if not isinstance(term, ConstantDiagLinearOperator)
        ]
        return terms[0] if len(terms) == 1 else Branch(AdditiveKernel, tuple(terms))
    if isinstance(covariance, ProductOperator):
        first, second = covariance.factors
        if nugget_of(first) or nugget_of(second):
            raise UnsupportedModelError(
                "model: forward multiplies a covariance to whose diagonal it has added "
                "something; add jitter to the product"
            )
        return Branch(ProductKernel, (tree_of(first, scale), tree_of(second)))
    if isinstance(covariance, ConstantMulLinearOperator):
        constant = covariance._constant
        return tree_of(
            covariance.base_linear_op, constant if scale is None else scale * constant
        )
    if isinstance(covariance, BlockLinearOperator):
        raise UnsupportedModelError(
            f"model: forward returned a {type(covariance).__name__}, a batch of "
            "kernels, one for each output; batch models are not supported. For "
            "independent outputs that share a kernel give a single-output model and y "
            "of shape (n, outputs); for correlated ones use a MultitaskKernel"
        )
    raise UnsupportedModelError(
        f"model: forward returned a covariance with a {type(covariance).__name__},"
        " which is not a function of two points. Build it from kernels called on"
        " inputs, their sums, products and constant multiples; write a product of"
        " kernels as (kernel_1 * kernel_2)(x), and put noise into the likelihood."
    )


def _leaf(covariance: LazyEvaluatedKernelTensor, scale: Tensor | None) -> Leaf:
    if covariance.x1 is not covariance.x2:
        raise UnsupportedModelError(
            f"model: forward calls a {type(covariance.kernel).__name__} on two "
            "different sets of points; expected kernel(x)"
        )
    if covariance.x1.ndim != 2:
        raise UnsupportedModelError(
            f"model: forward calls a kernel on inputs of shape "
            f"{tuple(covariance.x1.shape)}; batch models are not supported, condition "
            "on each element of the batch by itself"
        )
    if scale is not None and (scale.numel() != 1 or float(scale.detach()) <= 0):
        raise UnsupportedModelError(
            f"model: a kernel is multiplied by {scale.tolist()} in forward; expected "
            "one positive number"
        )
    return Leaf(covariance.kernel, covariance.x1, scale)


def nugget_of(covariance: LinearOperator) -> float:
    """Variance that ``forward`` itself adds to the diagonal (``add_jitter``)."""
    if isinstance(covariance, ConstantDiagLinearOperator):
        return float(covariance.diag_values.detach().flatten()[0])
    if isinstance(covariance, SumLinearOperator):
        return sum(nugget_of(term) for term in covariance.linear_ops)
    if isinstance(covariance, ConstantMulLinearOperator):
        constant = float(covariance._constant.detach())
        return constant * nugget_of(covariance.base_linear_op)
    return 0.0


def is_plain(tree: Tree, inputs: Tensor) -> bool:
    """Whether the kernel is called on the model's inputs themselves.

    Equal values would not be enough: relu(x) equals x on some inputs and not on
    others. Kernels with active dims see a selection, never the inputs themselves.
    """
    return (
        isinstance(tree, Leaf)
        and tree.kernel.active_dims is None
        and tree.inputs is inputs
        and tree.outputs == 1
        and not _is_traced(tree.scale)
    )


def columns_of(tree: Tree, rows: Rows) -> Tensor:
    """The matrix of kernel inputs (N, p): every leaf's columns side by side.

    A constant with a graph is a column of its own, its square root: so its gradient is
    one of the inputs, for which every operator has a path.
    """
    found = []
    for leaf in _leaves(tree):
        inputs = leaf.inputs if rows.points is None else leaf.inputs[rows.points]
        found.append(inputs)
        if leaf.outputs > 1:
            assert rows.tasks is not None
            found.append(rows.tasks.to(inputs).unsqueeze(1))
        if leaf.scale is not None and _is_traced(leaf.scale):
            root = leaf.scale.sqrt().reshape(1, 1)
            found.append(root.to(inputs).expand(len(inputs), 1))
    if len(found) == 1:
        return found[0]
    kept = next((f for f in found if f.is_floating_point()), None)
    return torch.cat([f if kept is None else f.to(kept) for f in found], dim=-1)


def kernel_of(tree: Tree) -> Kernel:
    """One kernel over ``columns_of(tree)``."""
    if isinstance(tree, Leaf) and tree.outputs == 1 and not _is_traced(tree.scale):
        plain = tree.kernel.active_dims is None
        kernel = tree.kernel if plain else on_columns(tree.kernel, None)
        return _scaled(kernel, tree.scale)
    return _kernel_from(tree, 0)[0]


def _kernel_from(tree: Tree, start: int) -> tuple[Kernel, int]:
    """The kernel over columns from ``start`` on, and where those end."""
    if isinstance(tree, Branch):
        kernels = []
        for part in tree.parts:
            kernel, start = _kernel_from(part, start)
            kernels.append(kernel)
        return tree.kind(*kernels), start
    width = tree.inputs.shape[-1]
    kernel = tree.kernel
    if tree.outputs > 1:
        kernel = pairs_kernel(kernel, width)
        width += 1
    device = tree.inputs.device
    kernel = on_columns(kernel, torch.arange(start, start + width, device=device))
    start += width
    if not _is_traced(tree.scale):
        return _scaled(kernel, tree.scale), start
    return ProductKernel(kernel, _square_of_column(start, tree.inputs)), start + 1


def _leaves(tree: Tree) -> Iterator[Leaf]:
    if isinstance(tree, Leaf):
        yield tree
    else:
        for part in tree.parts:
            yield from _leaves(part)


def _is_traced(scale: Tensor | None) -> bool:
    return scale is not None and scale.requires_grad


def _scaled(kernel: Kernel, scale: Tensor | None) -> Kernel:
    """The kernel times a constant without a graph."""
    if scale is None:
        return kernel
    # It takes over the kernel's active dims and calls its forward past them.
    outer = ScaleKernel(kernel)
    outer.raw_outputscale.requires_grad_(False)
    outer.raw_outputscale.data = outer.raw_outputscale.data.to(scale)
    outer.outputscale = scale
    return outer


def _square_of_column(column: int, like: Tensor) -> Kernel:
    """k(x, x') = x_c x'_c."""
    kernel = LinearKernel(active_dims=[column]).to(like)
    kernel.variance = torch.ones(1, 1).to(like)
    return kernel.requires_grad_(False)
