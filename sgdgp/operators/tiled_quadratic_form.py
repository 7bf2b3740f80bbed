"""a^T K b with gradients in fused tiles, for kernels with analytic derivatives.

Per tile on or above the diagonal: one product for what the kernel is a function of,
one for W = a b^T + b a^T, a few passes, and one thin product for the gradients of
rows and one for those of columns. In all about the work of K v with as many columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.kernels.tile_gradients import LiveTile, Pad, WeightedTerm
from sgdgp.operators.quadratic_form import symmetric_factors, with_gradient

_TILE_ROWS = 512
_TILE_ENTRIES_CPU = 256 * 1024
_TILE_ENTRIES_GPU = 1024 * 8192


def tiled_quadratic_form(
    live: LiveTile,
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "n k"],
    b: Float[Tensor, "n k"],
    origin: Float[Tensor, " d"],
    memory_budget: int,
) -> Float[Tensor, ""]:
    """sum_c a_c^T K(x, x) b_c with a graph to the kernel's tensors and to ``x``.

    Args:
        live: The kernel with its hyperparameters' graph.
        x: Points (n, d), with a graph where they have one.
        a: Left vectors (n, k).
        b: Right vectors (n, k).
        origin: What stationary kernels centre inputs by, (d,).
        memory_budget: Bytes that the tiles may take.

    Returns:
        0-dim, in the dtype of ``x``.
    """
    form = WeightedTerm(live, x, origin)
    with torch.no_grad():
        _sum_over_tiles(form, a, b, memory_budget)
        value = (form.total * form.number).to(x.dtype)
        gradients = list(form.gradients(1.0)) if form.wants_gradient else []
    return with_gradient(
        value,
        [tensor for tensor, _ in gradients],
        [gradient.to(tensor) for tensor, gradient in gradients],
    )


def _sum_over_tiles(
    form: WeightedTerm, a: Tensor, b: Tensor, memory_budget: int
) -> None:
    n = a.shape[0]
    preferred = _TILE_ENTRIES_CPU if a.device.type == "cpu" else _TILE_ENTRIES_GPU
    buffers = 1 + form.term.buffers
    entries = max(1, min(preferred, memory_budget // (buffers * a.element_size())))
    left, right = symmetric_factors(a, b)
    pad = Pad(a, entries)
    for rows, columns in _tiles(n, entries):
        pad.clear(rows.stop - rows.start, columns.stop - columns.start)
        weight = torch.mm(left[rows], right[columns].mT, out=pad.take())
        if rows == columns:
            weight.mul_(0.5)
        form.pull(weight, form.term.evaluate(rows, columns, pad), pad)


def _tiles(n: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Tiles on and above the diagonal; those on it are square."""
    height = max(1, min(_TILE_ROWS, int(entries**0.5)))
    for rows in slices(n, height):
        yield rows, rows
        width = max(1, entries // height)
        for start in range(rows.stop, n, width):
            yield rows, slice(start, min(start + width, n))
