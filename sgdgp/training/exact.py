"""Small systems: the log marginal likelihood and its gradient without probes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgdgp.gpytorch_adapter import TracedProblem, differentiable_block
from sgdgp.training.gradient import residual

EXACT_ROWS = 1_000
"""Up to here one factorisation costs less than the solves of a few probes."""


def exact_log_likelihood(problem: TracedProblem) -> tuple[Tensor, float]:
    """A scalar with the exact gradient of log p(y | X), and its value.

    dL = v^T dm + sum_ij W_ij dH_ij with W = (V V^T - c H^-1) / 2, in one block: an
    n x n matrix is what the factorisation has anyway.

    Args:
        problem: A system of at most about ``EXACT_ROWS`` rows.

    Raises:
        torch.linalg.LinAlgError: K + Sigma is not positive definite in float64.
    """
    block = differentiable_block(problem.kernel, problem.inputs, problem.inputs)
    matrix = block.detach().to(torch.float64, copy=True)
    matrix.diagonal().add_(problem.noise.detach().double())
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise torch.linalg.LinAlgError(
            "the covariance of the training data is not positive definite in float64 "
            "(K + noise); give the noise a larger lower bound"
        )
    rhs = residual(problem).double()
    n, columns = rhs.shape
    v = torch.cholesky_solve(rhs, factor)
    value = -0.5 * float((rhs * v).sum()) - columns * (
        float(factor.diagonal().log().sum()) + 0.5 * n * math.log(2.0 * math.pi)
    )
    weight = torch.cholesky_inverse(factor).mul_(-0.5 * columns)
    weight.addmm_(v, v.mT, alpha=0.5)
    weight, v = weight.to(block), v.to(block)
    scalar = (
        (weight * block).sum()
        + weight.diagonal() @ problem.noise
        + problem.mean @ v.sum(1)
    )
    return scalar, value
