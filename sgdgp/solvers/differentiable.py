"""(K + Sigma)^-1 V with a graph to V, by the solver of a posterior.

The derivative of a solve is another solve: H^-1 is symmetric, so what comes back
through V -> H^-1 V is H^-1 times what arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from sgdgp.core.seeds import derived_generator
from sgdgp.posterior.problem import Problem
from sgdgp.solvers import Solver

TOLERANCE = 1e-4
"""Relative residual of solves without a factor."""

FACTOR_ROWS = 8192
"""Up to here a Cholesky factor is kept, if the memory budget allows: a fantasy model
asks for many solves of a few columns."""


class Inverse:
    """H^-1 of a conditioned problem, H = K + Sigma (n, n)."""

    def __init__(self, problem: Problem) -> None:
        """Nothing is computed before the first solve.

        Args:
            problem: What a posterior was conditioned on.
        """
        self._problem = problem
        self._factor: Tensor | None = None
        n = len(problem.noise)
        # The matrix and its factor, in double precision.
        bytes_needed = 2 * 8 * n * n
        self.is_direct = (
            n <= FACTOR_ROWS and bytes_needed <= problem.settings.memory_budget
        )

    def solve(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """H^-1 V, differentiable in V."""
        if not self.is_direct:
            return _Symmetric.apply(v, self._iterate)
        if self._factor is None:
            self._factor = self._factorised()
        return torch.cholesky_solve(v.double(), self._factor).to(v.dtype)

    def product(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """H V, differentiable in V."""
        return _Symmetric.apply(v, self._multiply)

    def _factorised(self) -> Tensor:
        problem = self._problem
        every = slice(0, len(problem.noise))
        with torch.no_grad():
            matrix = problem.operator.block(every, every).double()
            matrix = matrix + torch.diag(problem.noise.double())
            return psd_safe_cholesky(matrix)

    def _iterate(self, v: Tensor) -> Tensor:
        problem = self._problem
        return (
            _accurate(problem.solver)
            .solve(
                problem.operator,
                problem.noise,
                v,
                generator=derived_generator(problem.settings.seed, "fantasies"),
            )
            .weights
        )

    def _multiply(self, v: Tensor) -> Tensor:
        problem = self._problem
        return problem.operator.matmul(v) + problem.noise.unsqueeze(1) * v


def _accurate(solver: Solver) -> Solver:
    """The solver, more accurate than a posterior needs it.

    A gain is a small difference: of the prior covariance and of what data explain.
    """
    limits = solver.limits
    if limits.tolerance is None or limits.tolerance <= TOLERANCE:
        return solver
    return solver.with_limits(replace(limits, tolerance=TOLERANCE))


class _Symmetric(torch.autograd.Function):
    """A symmetric linear map: its own derivative."""

    @staticmethod
    def forward(ctx, v, linear: Callable[[Tensor], Tensor]):  # type: ignore[no-untyped-def]
        ctx.linear = linear
        return linear(v.detach())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Symmetric.apply(grad.contiguous(), ctx.linear), None
