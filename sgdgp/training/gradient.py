"""The gradient of the log marginal likelihood as one scalar with a graph.

With r = y - m(X), H = K + Sigma, v = H^-1 r and pairs (a_s, b_s) from the probes,

    dL = v^T dm + 1/2 v^T dH v - 1/2 tr(H^-1 dH),   tr(H^-1 dH) ~ mean_s a_s^T dH b_s.

Every term with dH is a quadratic form of an operator, so nothing is n x n.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.gpytorch_adapter import TracedProblem
from sgdgp.operators import KernelOperator


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
