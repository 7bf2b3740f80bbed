"""Spectral estimates of K = phi phi^T from products on a few rows, without entries.

An entry of a network's kernel costs a Jacobian; a product with a vector two sweeps. So
the leading eigenvalues come from Lanczos iterations on a random subset of rows.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.base import KernelOperator
from sgdgp.operators.feature import FeatureOperator

_SUBSET = 512
_ITERATIONS = 30
_PROBES = 16
_MOST_OUTPUTS = 32


def has_dear_features(operator: KernelOperator) -> bool:
    """Whether entries cost so much more than products that they are to be avoided."""
    return (
        isinstance(operator, FeatureOperator)
        and operator.features.num_features > _SUBSET
    )


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
    part, scale = operator.permuted(rows), scale[rows]
    vector = torch.randn(
        size, 1, generator=generator, device=generator.device, dtype=operator.dtype
    ).to(operator.device)
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
    values = torch.linalg.eigvalsh(matrix).clamp_min(0.0) * (n / size)
    return values.to(operator.device), len(diagonal) * size / n
