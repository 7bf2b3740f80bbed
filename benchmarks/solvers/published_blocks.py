"""Alternating projections and ADASAP as they were published.

Alternating projections (Wu et al., AISTATS 2024, arXiv:2310.17137), on a fixed
partition into blocks J, the Cholesky factors of all H_JJ kept:

    J = the block with the largest residual, summed over columns
    u = H_JJ^-1 r_J;   a_J += u;   r -= H[:, J] u

ADASAP (Rathore et al., 2025, arXiv:2505.13723), with nu = n / b, mu = min(s, 1 / nu),
beta = 1 - sqrt(mu / nu), gamma = 1 / sqrt(mu nu), alpha = 1 / (1 + gamma nu):

    I = b coordinates, uniformly without replacement
    P = rank-r Nystrom approximation of K_II, damped by s plus its last eigenvalue
    eta = 1 / lambda_max(P^-1 H_II), by ten power iterations
    D = P^-1 (K[I, :] Z + s Z_I - b_I)
    W = Z - eta scatter_I(D)
    V = beta V + (1 - beta) Z - gamma eta scatter_I(D)
    Z = alpha V + (1 - alpha) W

with b = n / 100 and r = 100; W is returned, without averaging, as in its public code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.solvers.off_the_clock import operator_of, run_method, unit_columns
from benchmarks.solvers.task import Outcome, Task
from sgdgp.core.slices import slices
from sgdgp.operators import KernelOperator

_POWER_ITERATIONS = 10
_POWER_TOLERANCE = 1e-3


class PublishedAP:
    """Greedy alternating projections.

    Args:
        operator: K (n, n).
        noise: s.
        rhs: b, with unit columns (n, k).
        block_size: Of all blocks but the last.
    """

    def __init__(
        self, operator: KernelOperator, noise: float, rhs: Tensor, block_size: int
    ) -> None:
        self.operator, self.noise, self.rhs = operator, noise, rhs
        n = rhs.shape[0]
        self.weights = torch.zeros_like(rhs)
        self.residual = rhs.clone()
        self._block_size = block_size
        self._blocks = list(slices(n, block_size))
        self._factors = []
        self._entries = 0
        for block in self._blocks:
            corner = operator.block(block, block).clone()
            corner.diagonal().add_(noise)
            # In float64, as GPyTorch's own factorisations are.
            self._factors.append(torch.linalg.cholesky(corner.double()).to(rhs.dtype))
            self._entries += corner.numel()

    @property
    def passes(self) -> float:
        """Kernel entries used so far, over n^2."""
        return self._entries / self.rhs.shape[0] ** 2

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was chosen."""
        return {"block_size": self._block_size, "rule": "greedy"}

    def step(self) -> None:
        """Solve for the block with the largest residual."""
        norms = [float(self.residual[b].norm(dim=0).sum()) for b in self._blocks]
        chosen = max(range(len(norms)), key=norms.__getitem__)
        block = self._blocks[chosen]
        update = torch.cholesky_solve(self.residual[block], self._factors[chosen])
        self.weights[block] += update
        columns = self.operator.block(block, slice(0, self.rhs.shape[0]))
        self.residual -= columns.mT @ update
        self.residual[block] -= self.noise * update
        self._entries += columns.numel()


class PublishedADASAP:
    """Accelerated approximate sketch-and-project.

    Args:
        operator: K (n, n).
        noise: s.
        rhs: b, with unit columns (n, k).
        block_size: b.
        rank: r.
        generator: Source of blocks and sketches.
    """

    def __init__(
        self,
        operator: KernelOperator,
        noise: float,
        rhs: Tensor,
        *,
        block_size: int,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        self.operator, self.noise, self.rhs = operator, noise, rhs
        nu = rhs.shape[0] / block_size
        mu = min(noise, 1.0 / nu)
        self._beta = 1.0 - math.sqrt(mu / nu)
        self._gamma = 1.0 / math.sqrt(mu * nu)
        self._alpha = 1.0 / (1.0 + self._gamma * nu)
        self._block_size, self._rank = block_size, min(rank, block_size)
        self._generator = generator
        self._steps = 0
        self.weights = torch.zeros_like(rhs)
        self._v = torch.zeros_like(rhs)
        self._z = torch.zeros_like(rhs)

    @property
    def passes(self) -> float:
        """Kernel entries used so far, over n^2."""
        n, size = self.rhs.shape[0], self._block_size
        return self._steps * size * (n + size) / n**2

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was chosen."""
        return {"block_size": self._block_size, "rank": self._rank}

    def step(self) -> None:
        """One accelerated step on a random block."""
        n = self.rhs.shape[0]
        block = torch.randperm(n, generator=self._generator)[: self._block_size]
        corner = self.operator.block(block, block).clone()
        apply = nystrom_inverse(corner, self.noise, self._rank, self._generator)
        corner.diagonal().add_(self.noise)
        eta = 1.0 / largest_eigenvalue(lambda v: apply(corner @ v), self._start())
        gradient = self.operator.rows(block).matmul(self._z)
        gradient += self.noise * self._z[block] - self.rhs[block]
        direction = eta * apply(gradient)
        self.weights = self._z.clone()
        self.weights[block] -= direction
        self._v.lerp_(self._z, 1.0 - self._beta)
        self._v[block] -= self._gamma * direction
        self._z = torch.lerp(self.weights, self._v, self._alpha)
        self._steps += 1

    def _start(self) -> Tensor:
        return torch.randn(
            self._block_size, 1, generator=self._generator, dtype=self.rhs.dtype
        )


def nystrom_inverse(
    corner: Tensor, noise: float, rank: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """P^-1 of a block K_II (b, b): (1 / rho) (I - U (rho S^-1 + U^T U)^-1 U^T).

    Args:
        corner: K_II without noise.
        noise: s.
        rank: r of the sketch.
        generator: Source of the sketch.
    """
    sketch = torch.randn(len(corner), rank, generator=generator, dtype=corner.dtype)
    sketch = torch.linalg.qr(sketch).Q
    image = corner @ sketch
    core = sketch.mT @ image
    core = 0.5 * (core + core.mT)
    shift = torch.finfo(corner.dtype).eps * float(core.diagonal().sum())
    core.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(core)
    while int(info):  # the shift is a guess at the rounding
        core.diagonal().add_(9.0 * shift)
        shift *= 10.0
        factor, info = torch.linalg.cholesky_ex(core)
    half = torch.linalg.solve_triangular(factor, image.mT, upper=False)
    u, singular, _ = torch.linalg.svd(half.mT, full_matrices=False)
    values = (singular.square() - shift).clamp_min(torch.finfo(corner.dtype).tiny)
    rho = noise + float(values[-1])
    inner = u.mT @ u
    inner.diagonal().add_(rho / values.clamp_min(1e-6 * shift))
    solve = torch.linalg.cholesky(inner)

    def apply(g: Tensor) -> Tensor:
        return (g - u @ torch.cholesky_solve(u.mT @ g, solve)) / rho

    return apply


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Largest eigenvalue by power iterations from a start (b, 1)."""
    v, value = start / start.norm(), 0.0
    for _ in range(_POWER_ITERATIONS):
        image = product(v)
        before, value = value, float((v * image).sum())
        v = image / image.norm()
        if abs(value - before) < _POWER_TOLERANCE * abs(value):
            break
    return value


def published_ap(task: Task, block_size: int = 1000) -> Outcome:
    """Alternating projections until the true mean residual is below the tolerance."""
    rhs, scale = unit_columns(task)
    size = min(block_size, task.problem.n)
    method = PublishedAP(operator_of(task), task.problem.noise, rhs, size)
    return run_method(task, method, scale, "published AP")


def published_adasap(task: Task, rank: int = 100) -> Outcome:
    """ADASAP until the true mean residual is below the tolerance."""
    rhs, scale = unit_columns(task)
    method = PublishedADASAP(
        operator_of(task),
        task.problem.noise,
        rhs,
        block_size=max(1, task.problem.n // 100),
        rank=rank,
        generator=torch.Generator().manual_seed(task.seed),
    )
    return run_method(task, method, scale, "published ADASAP")
