"""Every sample function at points of its own, as maximising each of them needs.

All functions at all points cost s columns for each kernel row; a function at its own
points needs one, so that s functions at q points each cost s q rows of K(x, X) and of
the features, and not s times as many products.

For a function of a scaled squared distance, k = f(|z - z'|^2), the gradient of
sum_j w_j k(x, X_j) is 2 sum_j w_j f'_j (z - Z_j): the same tiles give value and
gradient in one sweep, and nothing of the size of a tile is kept for a backward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.slices import recomputed, slices, tracks_gradient
from sgdgp.kernels.distance import (
    DIRECT_DIMENSIONS,
    StationaryTile,
    left_form,
    right_form,
    rounding_of_distances,
    squared_distances,
)
from sgdgp.kernels.registry import differentiable_tile
from sgdgp.operators.base import KernelOperator
from sgdgp.operators.evaluation import differentiable_block

_ENTRIES_CPU = 2**17
"""Entries of a tile: the four buffers of one stay in the cache."""

_ENTRIES = 2**23
"""Entries of a tile elsewhere: 32 MB a buffer in float32, enough to fill a GPU."""

_ROWS = 128
"""Rows of a tile, about: with few of them the training inputs are read too often, with
many a tile has few columns, and its products with single columns are short."""

_BLOCK = 2**21
"""Entries of a block that GPyTorch evaluates: 16 MB in float64, several of them with a
graph."""


def own_products(
    operator: KernelOperator, x: Float[Tensor, "s q d"], v: Float[Tensor, "n s"]
) -> Float[Tensor, "s q"]:
    """K(x_i, X) v_i of every column i with points of its own, differentiable in x.

    Args:
        operator: K over the training inputs (n, n).
        x: Points of each column (s, q, d).
        v: Columns (n, s).
    """
    columns = v.mT.contiguous()
    tile = differentiable_tile(operator.kernel)
    if isinstance(tile, StationaryTile):
        wanted = tracks_gradient(x)
        return _ClosedForm.apply(operator, tile, x, columns, wanted)
    return _by_blocks(operator, x, columns)


class _ClosedForm(torch.autograd.Function):
    """Values and gradients of a stationary kernel in one sweep."""

    @staticmethod
    def forward(ctx, operator, tile, x, columns, wanted):  # type: ignore[no-untyped-def]
        origin = operator.x.mean(0)
        with torch.set_grad_enabled(wanted):
            leaf = x.detach().requires_grad_(wanted)
            z = tile.scaled(leaf.reshape(-1, leaf.shape[-1]), origin)
        points = tile.scaled(operator.x, origin)
        values, slopes = _sweep(
            tile,
            z.detach().view(*x.shape[:2], z.shape[1]),
            points,
            columns,
            wanted=wanted,
        )
        if wanted:
            (gradient,) = torch.autograd.grad(z, leaf, slopes.view_as(z))
            ctx.operator = operator
            ctx.save_for_backward(x, columns, gradient)
        return values

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, columns, gradient = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, grad.unsqueeze(-1) * gradient, None, None
        # Somebody differentiates the gradient: that of GPyTorch has a graph.
        again = x.view_as(x)
        values = _by_blocks(ctx.operator, again, columns)
        (slope,) = torch.autograd.grad(values, again, grad, create_graph=True)
        return None, None, slope, None, None


def _sweep(
    tile: StationaryTile, z: Tensor, points: Tensor, columns: Tensor, *, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Values (s, q) and, if wanted, slopes (s, q, p) at scaled points z (s, q, p)."""
    count, q, width = z.shape
    n = len(points)
    values, slopes = z.new_zeros(count, q), z.new_zeros(width + 1, count * q)
    right = _padded(right_form(points)[0])
    displaced = torch.cat([points, torch.ones_like(points[:, :1])], 1).mT.contiguous()
    entries = _ENTRIES_CPU if z.device.type == "cpu" else _ENTRIES
    at_once = max(1, min(count, _ROWS // max(1, q)))
    step = max(1, min(n, entries // max(1, at_once * q)))
    buffers = z.new_empty(3, at_once * q * step)
    for rows in slices(count, at_once):
        flat = z[rows].reshape(-1, width)
        left = _padded(left_form(flat)[0])
        same = rounding_of_distances(flat)
        gradient = slopes[:, rows.start * q : rows.stop * q]
        for cut in slices(n, step):
            shape = (len(flat), cut.stop - cut.start)
            value, derivative, scratch = (
                buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers
            )
            squared_distances(left, right[cut], value, (scratch,))
            weights = columns[rows, cut].unsqueeze(1)
            grouped = (-1, q, shape[1])
            if wanted:
                tile.profile_with_derivative(value, derivative, scratch, same)
                derivative.view(grouped).mul_(weights)
                # Written transposed: a product with so few columns is slow.
                gradient.addmm_(displaced[:, cut], derivative.mT)
            else:
                tile.profile(value, (scratch,))
            values[rows].unsqueeze(-1).baddbmm_(value.view(grouped), weights.mT)
    factor = float(tile.factor)
    scale = 2 * factor * tile.derivative_scale
    slopes = slopes.mT.reshape(count, q, width + 1)
    return values.mul_(factor), (z * slopes[..., -1:] - slopes[..., :-1]).mul_(scale)


def _padded(form: Tensor) -> Tensor:
    """Zero columns up to a multiple of four: products with fewer are slower."""
    if form.shape[1] <= DIRECT_DIMENSIONS:
        return form
    return pad(form, (0, -form.shape[1] % 4))


def _by_blocks(operator: KernelOperator, x: Tensor, columns: Tensor) -> Tensor:
    """The same values (s, q) by kernel blocks, evaluated again in a backward pass."""
    count, q, dim = x.shape
    n = operator.x.shape[0]
    graph = tracks_gradient(x)

    def product(part: Tensor, weights: Tensor, cut: slice) -> Tensor:
        flat = part.reshape(-1, dim)
        if graph:
            block = differentiable_block(operator.kernel, flat, operator.x[cut])
        else:
            block = operator.cross(flat).block(slice(0, len(flat)), cut)
        return (block.view(*part.shape[:2], -1) @ weights.unsqueeze(-1)).squeeze(-1)

    step = max(1, min(n, _BLOCK // max(1, q)))
    at_once = max(1, _BLOCK // max(1, q * step))
    parts = []
    for rows in slices(count, at_once):
        total = x.new_zeros(rows.stop - rows.start, q)
        for cut in slices(n, step):
            total = total + recomputed(
                partial(product, cut=cut), x[rows], columns[rows, cut]
            )
        parts.append(total)
    return torch.cat(parts) if parts else x.new_zeros(count, q)
