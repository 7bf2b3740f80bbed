"""Spectral estimates of K = phi phi^T from a random subset of rows.

From the subset's features where they fit the memory; else, for the largest networks, by
Lanczos iterations: products with single vectors.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.arguments import whole_points
from sgdgp.operators.base import KernelOperator
from sgdgp.operators.feature import FeatureOperator

_SUBSET = 512
_ITERATIONS = 30
_PROBES = 16
_MOST_OUTPUTS = 32


def scale_diagonal(
    operator: FeatureOperator, generator: torch.Generator
) -> tuple[Float[Tensor, " n"], float]:
    """The diagonal of K, or what stands for it in a scale; and the passes it took.

    With many outputs per point the mean over the outputs, estimated from the squares of
    random functions phi(x) w: the exact one would take a sweep for each output.
    """
    outputs = operator.outputs_per_input
    if outputs <= _MOST_OUTPUTS:
        return operator.diagonal(), 0.5
    draws = torch.randn(
        _PROBES,
        operator.features.num_features,
        generator=generator,
        device=generator.device,
        dtype=operator.dtype,
    )
    values = operator.features.forward(operator.x, draws.to(operator.device).mT)
    means = values.square().mean(1).unflatten(0, (-1, outputs)).mean(1)
    return means.repeat_interleave(outputs), 0.5


def leading_eigenvalues(
    operator: FeatureOperator,
    scale: Float[Tensor, "n 1"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, " m"], float]:
    """Leading eigenvalues of S K S, S = diag(scale), ascending; and the passes.

    Args:
        operator: K (n, n).
        scale: Diagonal of S (n, 1).
        generator: Source of the subset and of the first vector.
    """
    n, outputs = operator.shape[0], operator.outputs_per_input
    size = min(n, outputs * max(1, math.ceil(_SUBSET / outputs)))
    rows = operator.random_order(generator)[:size]
    part, scale = operator.permuted(whole_points(rows, outputs)), scale[rows]
    needed = 2 * size * operator.features.num_features * scale.element_size()
    if needed <= operator.memory_budget:
        block = part.block(slice(0, size), slice(0, size)) * scale * scale.mT
        values = torch.linalg.eigvalsh(block).double().clamp_min(0.0)
        return values * (n / size), 0.5 * size / n
    values, sweeps = _lanczos(part, scale, generator)
    return values * (n / size), sweeps * size / n


def _lanczos(
    part: KernelOperator, scale: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Leading eigenvalues of S K S, ascending, and the products that it took."""
    size = len(scale)
    vector = torch.randn(
        size, 1, generator=generator, device=generator.device, dtype=part.dtype
    ).to(part.device)
    basis = vector.new_zeros(min(_ITERATIONS, size) + 1, size)
    basis[0] = vector[:, 0] / vector.norm()
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(len(basis) - 1):
        image = (scale * part.matmul(scale * basis[step].unsqueeze(1)))[:, 0]
        diagonal.append(float(image @ basis[step]))
        for _ in range(2):  # Gram and Schmidt, twice
            image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        off.append(float(image.norm()))
        if off[-1] <= 1e-6 * max(diagonal):
            break
        basis[step + 1] = image / off[-1]
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beside = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
    matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    values = torch.linalg.eigvalsh(matrix).clamp_min(0.0)
    return values.to(part.device), len(diagonal)
