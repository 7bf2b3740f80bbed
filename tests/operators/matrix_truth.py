"""An operator beside the dense matrix that it stands for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgdgp.operators import KernelOperator


def is_the_matrix(
    operator: KernelOperator,
    truth: Tensor,
    k: int,
    rows: list[int],
    columns: list[int],
    cuts: tuple[int, int],
    agree: Callable[[Tensor, Tensor], None],
) -> None:
    """Products, rows, columns, blocks and diagonal of a square operator.

    Args:
        operator: The operator.
        truth: The matrix in float64 (N, N).
        k: Columns to multiply with.
        rows: Any numbers that stand for rows.
        columns: Any numbers that stand for columns.
        cuts: Any two numbers that stand for a slice.
        agree: Compares what was found with the truth.
    """
    size, dtype = len(truth), operator.dtype
    i = torch.tensor(rows) % size
    j = torch.tensor(columns, dtype=torch.int32) % size
    cut = slice(min(cuts) % size, max(cuts) % size + 1)
    some = i.unique()
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(size, k, generator=generator, dtype=torch.float64).to(dtype)
    w = v.double()
    assert operator.shape == truth.shape
    agree(operator.matmul(v), truth @ w)
    agree(operator.rows(i).matmul(v), truth[i] @ w)
    agree(operator.rows(cut) @ v, truth[cut] @ w)
    agree(operator.rows(i).to_dense(), truth[i])
    agree(operator.columns(cut).matmul(v[cut]), truth[:, cut] @ w[cut])
    agree(operator.columns(some).matmul(v[some]), truth[:, some] @ w[some])
    agree(operator.block(i, j), truth[i][:, j.long()])
    agree(operator.block(cut, j), truth[cut][:, j.long()])
    agree(operator.block(i, cut), truth[i][:, cut])
    agree(operator.block(cut, cut), truth[cut, cut])
    agree(operator.diagonal(), truth.diagonal())


def is_the_cross_matrix(
    cross: KernelOperator,
    truth: Tensor,
    k: int,
    columns: list[int],
    agree: Callable[[Tensor, Tensor], None],
) -> None:
    """The same for what new points have in common with those of an operator (m, N)."""
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(truth.shape[1], k, generator=generator, dtype=torch.float64)
    v = v.to(cross.dtype)
    j = torch.tensor(columns) % truth.shape[1]
    assert cross.shape == truth.shape
    agree(cross.matmul(v), truth @ v.double())
    agree(cross.block(slice(None), j), truth[:, j])
    agree(cross.block(slice(0, 1), j), truth[:1, j])
