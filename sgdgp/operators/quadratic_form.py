"""a^T K b with gradients, found block by block: never n x n, never kept for later.

Legend: S = sum_c a_c^T K b_c = sum_ij W_ij K_ij with W = a b^T. K is symmetric, so
(a b^T + b a^T) may stand for W, and blocks on and above the diagonal suffice.

The gradient is found while the blocks are there, in the forward pass; what autograd
keeps for the backward pass is one number per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.arguments import check_vectors
from sgdgp.operators.evaluation import evaluated, live_tensors

if TYPE_CHECKING:
    from sgdgp.operators.base import KernelOperator

# Blocks that suit the cache; autograd keeps about so many copies of one.
_MOST_ENTRIES = 512 * 1024
_COPIES = 12


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient with respect to some tensors is already known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The known gradients are numbers here: what was computed with them could
            # be differentiated once more, and would be wrong.
            raise RuntimeError(
                "a quadratic form of an operator can be differentiated only once; "
                "call backward or autograd.grad without create_graph"
            )
        scaled = (None if g is None else outer.to(g) * g for g in ctx.gradients)
        return None, None, *scaled


def with_gradient(
    value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """``value`` as a function of ``inputs`` whose gradients are known.

    Args:
        value: 0-dim, without a graph.
        inputs: Tensors, each a parameter or with a graph of its own.
        gradients: d value / d input for each of them, or None where it is zero.

    Returns:
        ``value`` with a graph; it can be differentiated once.
    """
    if not inputs:
        return value
    return _KnownGradient.apply(value, gradients, *inputs)


def check_quadratic(
    operator: KernelOperator, a: Tensor, b: Tensor, x: Tensor | None
) -> None:
    """Check the arguments of ``quadratic_form``.

    Raises:
        ValueError: The operator is not square, or a shape, dtype or device does not
            fit.
    """
    if not operator.is_square:
        raise ValueError(
            "quadratic_form needs a square operator, this one is a cross "
            f"{operator.shape[0]} x {operator.shape[1]}"
        )
    for name, vectors in (("a", a), ("b", b)):
        check_vectors(vectors, operator.shape[1], operator.dtype, name)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a and b must have as many columns, found {a.shape[1]} and {b.shape[1]}"
        )
    if x is None:
        return
    expected = operator.x
    if x.shape != expected.shape or x.dtype != expected.dtype:
        raise ValueError(
            f"x must be {tuple(expected.shape)} and {expected.dtype} like the "
            f"operator's, found {tuple(x.shape)} and {x.dtype}"
        )
    if x.device != expected.device:
        raise ValueError(f"x must be on {expected.device}, found {x.device}")


@torch.no_grad()
def symmetric_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (n, k') of a b^T + b a^T: with rows i and j, W_ij = left_i . right_j."""
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return a, 2 * a
    return torch.cat([a, b], 1), torch.cat([b, a], 1)


def generic_quadratic_form(
    operator: KernelOperator,
    a: Float[Tensor, "n k"],
    b: Float[Tensor, "n k"],
    x: Float[Tensor, "p d"] | None,
    memory_budget: int,
) -> Float[Tensor, ""]:
    """S for any kernel: its own blocks, differentiated by autograd one by one.

    Args:
        operator: A square operator; only its kernel and points are used.
        a: Left vectors (n, k).
        b: Right vectors (n, k).
        x: The points with a graph of their own, or None.
        memory_budget: Bytes that a block with its derivatives may take.

    Returns:
        S, 0-dim, with a graph to the kernel's live tensors and to ``x``.
    """
    kernel, points = operator.kernel, operator.x if x is None else x.detach()
    wants_x = x is not None and x.requires_grad and torch.is_grad_enabled()
    leaves = live_tensors(kernel) if torch.is_grad_enabled() else ()
    sums = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    x_sum = torch.zeros_like(points, dtype=torch.float64) if wants_x else None
    total = torch.zeros((), dtype=torch.float64, device=points.device)
    left, right = symmetric_factors(a, b)
    outputs = operator.outputs_per_input
    for rows, columns in _blocks(operator, memory_budget):
        i, j = (slice(s.start * outputs, s.stop * outputs) for s in (rows, columns))
        weight = left[i].detach() @ right[j].mT.detach()
        if rows == columns:
            weight *= 0.5
        x1 = points[rows].requires_grad_(wants_x)
        x2 = x1 if rows == columns else points[columns].requires_grad_(wants_x)
        ends = [(rows, x1)] if rows == columns else [(rows, x1), (columns, x2)]
        with torch.set_grad_enabled(wants_x or bool(leaves)):
            part = (weight * evaluated(kernel, x1, x2).to(weight)).sum()
        total += part.detach()
        if not part.requires_grad:
            continue
        wanted = [*leaves, *(end for _, end in ends if wants_x)]
        gradients = torch.autograd.grad(part, wanted, allow_unused=True)
        for leaf_sum, gradient in zip(sums, gradients, strict=False):
            if gradient is not None:
                leaf_sum.add_(gradient)
        for (where, _), gradient in zip(ends, gradients[len(leaves) :], strict=False):
            if x_sum is not None and gradient is not None:
                x_sum[where] += gradient
    inputs = [*leaves, x] if wants_x and x is not None else [*leaves]
    found = sums if x_sum is None else [*sums, x_sum]
    return with_gradient(
        total.to(operator.dtype),
        inputs,
        [g.to(t.dtype) for g, t in zip(found, inputs, strict=True)],
    )


def _blocks(
    operator: KernelOperator, memory_budget: int
) -> Iterator[tuple[slice, slice]]:
    """Blocks of points on and above the diagonal; those on it are square."""
    n, d = operator.x.shape
    size = operator.x.element_size() * operator.outputs_per_input**2
    largest = max((p.numel() for p in operator.kernel.parameters()), default=1)
    # Kernels that sum over inputs or components keep one copy per one of them.
    per_entry = size * (_COPIES + 4 * max(largest, d))
    entries = min(_MOST_ENTRIES, max(1, memory_budget // per_entry))
    height = max(1, int(entries**0.5))
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        yield rows, rows
        for column in range(rows.stop, n, height):
            yield rows, slice(column, min(column + height, n))
