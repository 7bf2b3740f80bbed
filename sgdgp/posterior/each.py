"""Every sample function at points of its own, as maximising each of them needs.

All functions at all points cost s columns for each kernel row; a function at its own
points needs one, so that s functions at q points each cost s q rows of K(x, X) and of
the features, and not s times as many products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.features.chunks import recomputed, tracks_gradient
from sgdgp.gpytorch_adapter import differentiable_block
from sgdgp.operators.base import KernelOperator, row_slices

_ENTRIES = 2**21
"""Kernel entries held at once."""


def own_products(
    operator: KernelOperator, x: Float[Tensor, "s q d"], v: Float[Tensor, "n s"]
) -> Float[Tensor, "s q"]:
    """K(x_i, X) v_i of every column i with points of its own, differentiable in x.

    Args:
        operator: K over the training inputs (n, n).
        x: Points of each column (s, q, d).
        v: Columns (n, s).
    """
    count, own, dim = x.shape
    graph = tracks_gradient(x)
    points = operator.x

    def product(part: Tensor, weights: Tensor) -> Tensor:
        flat = part.reshape(-1, dim)
        if graph:
            block = differentiable_block(operator.kernel, flat, points)
        else:
            block = operator.cross(flat).block(slice(0, len(flat)), slice(0, n))
        return (block.view(*part.shape[:2], n) @ weights.unsqueeze(-1)).squeeze(-1)

    n = points.shape[0]
    columns = v.mT.contiguous()
    at_once = max(1, _ENTRIES // max(1, own * n))
    parts = [
        recomputed(product, x[rows], columns[rows])
        for rows in row_slices(count, at_once)
    ]
    return torch.cat(parts) if parts else x.new_zeros(count, own)
