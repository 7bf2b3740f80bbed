"""K(X_new, X) times a matrix, with or without a graph to X_new."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgdgp.core.slices import slices
from sgdgp.gpytorch_adapter import differentiable_block
from sgdgp.operators import FeatureOperator
from sgdgp.operators.base import KernelOperator

_ENTRIES = 2**21
"""Kernel entries whose graph is held at once."""


def cross_product(
    operator: KernelOperator,
    x_new: Float[Tensor, "m d"],
    v: Float[Tensor, "n k"],
) -> Float[Tensor, "m k"]:
    """K(X_new, X) v in bounded memory, differentiable in X_new.

    Without a graph the operator streams its own tiles. With one, GPyTorch evaluates
    the kernel block by block, and blocks are evaluated again in the backward pass,
    so the memory never holds more than a few blocks. Exact features need no block.
    """
    if not (torch.is_grad_enabled() and x_new.requires_grad):
        return operator.cross(x_new).matmul(v)
    source = operator.streaming()
    if isinstance(source, FeatureOperator):
        return source.product_at(x_new, v)
    columns = max(1, _ENTRIES // max(1, x_new.shape[0]))

    def product(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return differentiable_block(operator.kernel, x, points) @ weights

    pieces = list(slices(operator.x.shape[0], columns))
    if len(pieces) == 1:
        return product(x_new, operator.x, v)
    total = x_new.new_zeros(x_new.shape[0], v.shape[1])
    for rows in pieces:
        total = total + checkpoint(
            product, x_new, operator.x[rows], v[rows], use_reentrant=False
        )
    return total
