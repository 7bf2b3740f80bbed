"""(K + Sigma)^-1 V with a graph to V.

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
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import Solver

TOLERANCE = 1e-4
"""Relative residual of solves without a factor: what is made of them is a small
difference, of the prior covariance and of what data explain."""

FACTOR_ROWS = 8192
"""Up to here a Cholesky factor is kept, if the memory budget allows: a fantasy model
asks for many solves of a few columns."""


class DifferentiableSolve:
    """H^-1 as a function of its right-hand sides, H = K + Sigma (n, n).

    Args:
        operator: K (n, n).
        noise: The diagonal of Sigma (n,).
        solver: Solver where there is no factor; made more accurate, if need be.
        memory_budget: Bytes, of which a factor and its matrix may take all.
        seed: Where the randomness of the solves is derived from.

    Attributes:
        is_direct: Whether a Cholesky factor is kept, from the first solve on.
    """

    def __init__(
        self,
        operator: KernelOperator,
        noise: Float[Tensor, " n"],
        solver: Solver,
        memory_budget: int,
        seed: int,
    ) -> None:
        """Nothing is computed before the first solve."""
        self._operator = operator
        self._noise = noise
        self._solver = solver
        limits = solver.limits
        if limits.tolerance is not None and limits.tolerance > TOLERANCE:
            self._solver = solver.with_limits(replace(limits, tolerance=TOLERANCE))
        self._seed = seed
        self._factor: Tensor | None = None
        n = len(noise)
        # The matrix and its factor, in double precision.
        self.is_direct = n <= FACTOR_ROWS and 2 * 8 * n * n <= memory_budget

    def solve(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """H^-1 V, differentiable in V."""
        if not self.is_direct:
            return _Symmetric.apply(v, self._iterate)
        if self._factor is None:
            self._factor = self._factorise()
        return torch.cholesky_solve(v.double(), self._factor).to(v.dtype)

    def product(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """H V, differentiable in V."""
        return _Symmetric.apply(v, self._multiply)

    @torch.no_grad()
    def _factorise(self) -> Tensor:
        every = slice(0, len(self._noise))
        matrix = self._operator.block(every, every).double()
        return psd_safe_cholesky(matrix + torch.diag(self._noise.double()))

    def _iterate(self, v: Tensor) -> Tensor:
        generator = derived_generator(self._seed, "fantasies")
        solution = self._solver.solve(
            self._operator, self._noise, v, generator=generator
        )
        return solution.weights

    def _multiply(self, v: Tensor) -> Tensor:
        return self._operator.matmul(v) + self._noise.unsqueeze(1) * v


class _Symmetric(torch.autograd.Function):
    """A symmetric linear map: its own derivative."""

    @staticmethod
    def forward(ctx, v, linear: Callable[[Tensor], Tensor]):  # type: ignore[no-untyped-def]
        ctx.linear = linear
        return linear(v.detach())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Symmetric.apply(grad.contiguous(), ctx.linear), None
