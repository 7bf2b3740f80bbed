"""Blocked forward and backward substitution with a Cholesky factor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.slices import slices


def solve_factored(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """(L L^T)^-1 B by blocked forward and backward substitution."""
    return backward_substitute(factor, forward_substitute(factor, rhs, block), block)


def forward_substitute(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """L^-1 B."""
    out = rhs.clone()
    for rows in slices(len(factor), block):
        out[rows] -= factor[rows, : rows.start] @ out[: rows.start]
        corner = factor[rows, rows]
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=False)
    return out


def backward_substitute(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """L^-T B."""
    out = rhs.clone()
    for rows in reversed(list(slices(len(factor), block))):
        out[rows] -= factor[rows.stop :, rows].mT @ out[rows.stop :]
        corner = factor[rows, rows].mT
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=True)
    return out
