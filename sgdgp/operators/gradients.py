"""a^T K b with gradients, found tile by tile: never n x n, never kept for later.

Legend: S = sum_c a_c^T K b_c = sum_ij W_ij K_ij with W = a b^T. K is symmetric, so
(a b^T + b a^T) may stand for W, and tiles on and above the diagonal suffice.

The gradient is found while the tiles are there, in the forward pass; what autograd
keeps for the backward pass is one number per parameter.

Kernels with analytic derivatives: per tile one product for what the kernel is a
function of, one for W, a few passes, and one thin product for the gradients of rows and
one for those of columns. In all about the work of K v with as many columns. Every other
kernel: autograd through GPyTorch's own evaluation, one block after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.processes import Processes
from sgdgp.core.slices import slices
from sgdgp.core.threads import share
from sgdgp.kernels.registry import Buffers, FactoredTile
from sgdgp.operators.evaluation import evaluated, tensors_with_graph

_TILE_ROWS = 512
"""Rows of a tile: enough for fast products, and at this height it is 512 wide too."""

_TILE_ENTRIES_CPU = 256 * 1024
"""Entries of a tile: half of what products take, as it comes with its derivatives."""

_TILE_ENTRIES_GPU = 1024 * 8192
"""Entries of a tile on a GPU: 32 MB in float32, so that few launches fill it."""

_BLOCK_ENTRIES = 512 * 1024
"""Entries of a block for autograd, so that one stays in the cache."""

_BLOCK_COPIES = 12
"""Copies of a block that GPyTorch and autograd keep, about."""


def form_by_tiles(
    kernels: Sequence[FactoredTile],
    a: Float[Tensor, "n k"],
    b: Float[Tensor, "n k"],
    memory_budget: int,
    part: Processes = Processes(),  # noqa: B008 (frozen)
) -> Float[Tensor, ""]:
    """S of a kernel with analytic derivatives, bound to its points once per thread.

    In the dtype of ``a``, with a graph to the kernel's tensors and the points. The
    tiles are those of a ``part``; those of all parts add up, and so do those of
    threads.
    """
    workers = len(kernels)
    with torch.no_grad():
        left, right = _symmetric_factors(a, b)
        budget = memory_budget // workers
        pieces = (
            _sum_over_tiles(
                kernel,
                left,
                right,
                budget,
                Processes(part.rank * workers + i, part.size * workers),
            )
            for i, kernel in enumerate(kernels)
        )
        share(pieces, workers)
        total = torch.stack([kernel.total for kernel in kernels]).sum()
        value = (total * kernels[0].number).to(a.dtype)
        gradients = [
            found
            for kernel in kernels
            if kernel.wants_gradient
            for found in kernel.gradients(1.0)
        ]
    return with_gradient(
        value,
        [tensor for tensor, _ in gradients],
        [gradient.to(tensor) for tensor, gradient in gradients],
    )


def misses_a_gradient(kernel: Kernel, tiles: FactoredTile, x: Tensor) -> bool:
    """Whether GPyTorch's forward depends on a parameter that no tile pulls back to.

    That is so where a tile of a user's own leaves one out, or takes it as a number.
    """
    held = [tensor for tensor, _ in tiles.gradients(0.0)]
    missed = _independent(held, tensors_with_graph(kernel))
    # Mostly none are, and the kernel is never evaluated here.
    if not missed:
        return False
    value = evaluated(kernel, x[:1].detach(), x[:1].detach())
    return len(_independent([value], missed)) < len(missed)


def _independent(outputs: list[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that no output depends on."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not leaves:
        return list(leaves)
    zeros = [torch.zeros_like(output) for output in outputs]
    found = torch.autograd.grad(
        outputs, leaves, zeros, retain_graph=True, allow_unused=True
    )
    return [leaf for leaf, g in zip(leaves, found, strict=True) if g is None]


def _sum_over_tiles(
    kernel: FactoredTile,
    left: Tensor,
    right: Tensor,
    memory_budget: int,
    part: Processes,
) -> Iterator[None]:
    """Add to a kernel what the tiles of a part pull back, one after another."""
    on_cpu = left.device.type == "cpu"
    preferred = _TILE_ENTRIES_CPU if on_cpu else _TILE_ENTRIES_GPU
    count = 1 + kernel.tile.buffers
    entries = max(1, min(preferred, memory_budget // (count * left.element_size())))
    buffers = Buffers(left, entries)
    height = max(1, min(_TILE_ROWS, int(entries**0.5)))
    blocks = _upper_blocks(len(left), height, max(1, entries // height))
    for rows, columns in islice(blocks, part.rank, None, part.size):
        buffers.clear(rows.stop - rows.start, columns.stop - columns.start)
        weight = torch.mm(left[rows], right[columns].mT, out=buffers.take())
        if rows == columns:
            weight.mul_(0.5)
        kernel.pull(weight, kernel.tile.evaluate(rows, columns, buffers), buffers)
        yield


def form_by_autograd(
    kernel: Kernel,
    points: Float[Tensor, "p d"],
    a: Float[Tensor, "n k"],
    b: Float[Tensor, "n k"],
    memory_budget: int,
    *,
    outputs: int = 1,
    part: Processes = Processes(),  # noqa: B008 (frozen)
) -> Float[Tensor, ""]:
    """S of any kernel: its blocks, differentiated by autograd one by one.

    In the dtype of ``a``, with a graph to the kernel's parameters and the points, each
    of which has ``outputs`` rows. A block with its derivatives fits the budget; the
    blocks are those of a ``part``.
    """
    x, points = points, points.detach()
    wants_x = x.requires_grad and torch.is_grad_enabled()
    leaves = tensors_with_graph(kernel) if torch.is_grad_enabled() else ()
    sums = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    x_sum = torch.zeros_like(points, dtype=torch.float64) if wants_x else None
    total = torch.zeros((), dtype=torch.float64, device=points.device)
    left, right = _symmetric_factors(a, b)
    height = _block_height(kernel, points, outputs, memory_budget)
    blocks = _upper_blocks(len(points), height, height)
    for rows, columns in islice(blocks, part.rank, None, part.size):
        i, j = (slice(s.start * outputs, s.stop * outputs) for s in (rows, columns))
        weight = left[i].detach() @ right[j].mT.detach()
        if rows == columns:
            weight *= 0.5
        x1 = points[rows].requires_grad_(wants_x)
        x2 = x1 if rows == columns else points[columns].requires_grad_(wants_x)
        ends = [(rows, x1)] if rows == columns else [(rows, x1), (columns, x2)]
        with torch.set_grad_enabled(wants_x or bool(leaves)):
            term = (weight * evaluated(kernel, x1, x2).to(weight)).sum()
        total += term.detach()
        if not term.requires_grad:
            continue
        wanted = [*leaves, *(end for _, end in ends if wants_x)]
        gradients = torch.autograd.grad(term, wanted, allow_unused=True)
        for leaf_sum, gradient in zip(sums, gradients, strict=False):
            if gradient is not None:
                leaf_sum.add_(gradient)
        for (where, _), gradient in zip(ends, gradients[len(leaves) :], strict=False):
            if x_sum is not None and gradient is not None:
                x_sum[where] += gradient
    inputs = [*leaves, x] if wants_x else [*leaves]
    found = sums if x_sum is None else [*sums, x_sum]
    return with_gradient(
        total.to(a.dtype),
        inputs,
        [g.to(t.dtype) for g, t in zip(found, inputs, strict=True)],
    )


def _block_height(
    kernel: Kernel, points: Tensor, outputs: int, memory_budget: int
) -> int:
    """Points of a block, such that what autograd keeps of it fits as well."""
    size = points.element_size() * outputs**2
    largest = max((p.numel() for p in kernel.parameters()), default=1)
    # Kernels that sum over inputs or components keep one copy per one of them.
    per_entry = size * (_BLOCK_COPIES + 4 * max(largest, points.shape[1]))
    entries = min(_BLOCK_ENTRIES, max(1, memory_budget // per_entry))
    return max(1, int(entries**0.5))


@torch.no_grad()
def _symmetric_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (n, k') of a b^T + b a^T: with rows i and j, W_ij = left_i . right_j."""
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return a, 2 * a
    return torch.cat([a, b], 1), torch.cat([b, a], 1)


def _upper_blocks(n: int, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Blocks on and above the diagonal; those on it are square."""
    for rows in slices(n, height):
        yield rows, rows
        for columns in slices(n - rows.stop, width):
            yield rows, slice(rows.stop + columns.start, rows.stop + columns.stop)


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient with respect to some tensors is already known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor
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
        return None, None, *(outer.to(g) * g for g in ctx.gradients)


def with_gradient(
    value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """``value`` (0-dim) as a function of ``inputs``; can be differentiated once."""
    if not inputs:
        return value
    return _KnownGradient.apply(value, gradients, *inputs)
