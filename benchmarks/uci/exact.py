"""The exact posterior in float64, against which every solver is measured.

With K + sigma^2 I = L L^T, z = L^-1 y and W = L^-1 K(X, X*),

    mean = W^T z,    variance = s^2 - sum_i W_i^2 + sigma^2,

so one factor and forward substitution are enough, also for the log marginal
likelihood, -(z^T z + n log(2 pi)) / 2 - sum_i log L_ii. The factor overwrites the lower
triangle block by block; the upper one is never touched, and so never resident.
The kernel is GPyTorch's own: nothing here is shared with what is being measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.memory import available_bytes
from benchmarks.uci.model import MaternGP, build_model, kernel_block

_BLOCK = 512
_TEST_BLOCK = 1024


class ExactPrediction(NamedTuple):
    """Closed-form mean and variance of the test targets (m,), noise included.

    ``log_likelihood`` is the log marginal likelihood of the training targets.
    """

    mean: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]
    log_likelihood: float


def exact_prediction(
    split: Split, values: Hyperparameters, *, block: int = _BLOCK
) -> ExactPrediction:
    """Exact Gaussian process prediction on the test rows of a split.

    Needs about 4.5 n^2 bytes and some blocks of n rows (in all 11 GB at n = 44,000),
    and n^3 / 3 multiply-adds.

    Args:
        split: The data, in float64.
        values: Kernel and noise.
        block: Columns factored at a time.

    Raises:
        TypeError: The data are not float64.
        ValueError: Not enough memory, or the matrix is not positive definite.
    """
    if split.x.dtype != torch.float64:
        raise TypeError(f"split: found {split.x.dtype}, expected torch.float64")
    n = len(split.x)
    _check_memory(n, split.x.device)
    model = build_model(split.x, split.y, values)
    noise = values.noise_scale**2
    factor = _factor_in_place(_lower_triangle(model, split.x, noise, block), block)
    z = _forward(factor, split.y[:, None].clone(), block)
    means, variances = [], []
    for x_test in split.x_test.split(_TEST_BLOCK):
        w = _forward(factor, kernel_block(model, split.x, x_test), block)
        means.append((w.T @ z).squeeze(1))
        variances.append(values.signal_scale**2 - w.square().sum(dim=0))
    variance = torch.cat(variances).clamp_min(0.0) + noise
    log_likelihood = -0.5 * (z.square().sum() + n * math.log(2 * math.pi))
    log_likelihood -= factor.diagonal().log().sum()
    return ExactPrediction(torch.cat(means), variance, float(log_likelihood))


def _check_memory(n: int, device: torch.device) -> None:
    # Half of the matrix (a GPU takes all that it is asked for), and blocks of rows with
    # the temporaries that make them.
    entry = 8.0 if device.type == "cuda" else 4.5
    needed, available = entry * n * n + 5e4 * n, available_bytes(device)
    if needed > available:
        raise ValueError(
            f"exact reference: needs {needed / 1e9:.1f} GB for n = {n}, found "
            f"{available / 1e9:.1f} GB available"
        )


def _lower_triangle(
    model: MaternGP, x: Float[Tensor, "n d"], noise: float, block: int
) -> Float[Tensor, "n n"]:
    n = len(x)
    matrix = x.new_empty(n, n)
    for start in range(0, n, block):
        end = min(start + block, n)
        matrix[start:end, :end] = kernel_block(model, x[start:end], x[:end])
    matrix.diagonal().add_(noise)
    return matrix


def _factor_in_place(matrix: Float[Tensor, "n n"], block: int) -> Float[Tensor, "n n"]:
    """Left-looking blocked Cholesky; reads and writes the lower blocks only."""
    n = len(matrix)
    starts = range(0, n, block)
    for start in tqdm(starts, desc=f"exact, n = {n}", disable=None, leave=False):
        end = min(start + block, n)
        panel = matrix[start:, start:end]
        if start:
            left = matrix[start:, :start]
            panel.addmm_(left, left[: end - start].T, alpha=-1.0)
        corner, info = torch.linalg.cholesky_ex(panel[: end - start])
        if info.item():
            raise ValueError(
                f"exact reference: K + sigma^2 I is not positive definite in float64 "
                f"at row {start + int(info.item()) - 1} of {n}"
            )
        panel[: end - start] = corner
        below = panel[end - start :]
        if len(below):
            below.copy_(
                torch.linalg.solve_triangular(corner.T, below, upper=True, left=False)
            )
    return matrix


def _forward(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int
) -> Float[Tensor, "n k"]:
    """L^-1 rhs, in the memory of ``rhs``."""
    n = len(factor)
    for start in range(0, n, block):
        end = min(start + block, n)
        rows = rhs[start:end]
        if start:
            rows.addmm_(factor[start:end, :start], rhs[:start], alpha=-1.0)
        corner = factor[start:end, start:end].tril()
        rows.copy_(torch.linalg.solve_triangular(corner, rows, upper=False))
    return rhs
