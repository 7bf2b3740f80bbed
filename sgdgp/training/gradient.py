"""The gradient of the log marginal likelihood as one scalar with a graph.

With r = y - m(X), H = K + Sigma, v = H^-1 r and pairs (a_s, b_s) from the probes,

    dL = v^T dm + 1/2 v^T dH v - 1/2 tr(H^-1 dH),   tr(H^-1 dH) ~ mean_s a_s^T dH b_s.

Every term with dH is a quadratic form of an operator, so nothing is n x n. A small
system is factorised instead, which needs no probes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.gpytorch_adapter import TracedProblem
from sgdgp.operators import KernelOperator
from sgdgp.operators.evaluation import differentiable_block

EXACT_ROWS = 1_000
"""Up to here one factorisation costs less than the solves of a few probes."""


def surrogate(
    problem: TracedProblem,
    operator: KernelOperator,
    v: Float[Tensor, "n c"],
    a: Float[Tensor, "n s"],
    b: Float[Tensor, "n s"],
) -> Tensor:
    """A scalar whose gradient is that of the log marginal likelihood (not over n).

    Args:
        problem: The system, with its graph.
        operator: K over ``problem.inputs``.
        v: H^-1 (y - m) (n, c).
        a: Left probe vectors (n, s).
        b: Right probe vectors (n, s), mean_s a_s b_s^T ~ H^-1.
    """
    columns, count = v.shape[1], a.shape[1]
    left = torch.cat([v, a], dim=1)
    right = torch.cat([0.5 * v, (-0.5 * columns / count) * b], dim=1)
    return (
        operator.quadratic_form(left, right, x=problem.inputs)
        + problem.noise @ (left * right).sum(1)
        + problem.mean @ v.sum(1)
    )


def residual(problem: TracedProblem) -> Float[Tensor, "n c"]:
    """The targets less the prior mean, without a graph."""
    return problem.targets - problem.mean.detach().unsqueeze(1)


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
