"""Many small square blocks of a kernel matrix at once, for sparse factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gpytorch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.operators.evaluation import detached_copy

if TYPE_CHECKING:
    from sgdgp.operators.base import KernelOperator


@torch.no_grad()
def small_blocks(
    operator: KernelOperator, index: Int[Tensor, "m k"]
) -> Float[Tensor, "m k k"]:
    """The blocks K[index[i], index[i]], in one batched call of the kernel.

    Args:
        operator: A square operator.
        index: Rows of each block (m, k).

    Returns:
        The dense blocks (m, k, k).
    """
    expected = (*index.shape, index.shape[1])
    if operator.outputs_per_input == 1:
        # GPyTorch's distances cancel: between near neighbours float32 would be off in
        # the second digit, and near neighbours are what is asked for.
        points = operator.x[index].double()
        kernel = detached_copy(operator.kernel).double()
        with gpytorch.settings.lazily_evaluate_kernels(False):
            try:
                blocks = kernel(points, points).to_dense()
            except RuntimeError:  # a kernel that knows no batches
                blocks = None
        if blocks is not None and blocks.shape == expected:
            return blocks.to(operator.dtype).contiguous()
    return torch.stack([operator.block(rows, rows) for rows in index])
