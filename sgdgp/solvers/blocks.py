"""Fixed blocks of equations: the partition, cached factors, and true residuals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import slices
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.system import System

_JITTERS = (0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7, 1e-5)

T = TypeVar("T")


def partition(n: int, size: int, outputs: int = 1) -> list[slice]:
    """Cut n equations into blocks of almost equal size, at most ``size`` each.

    Args:
        n: Number of equations.
        size: Most equations of a block.
        outputs: Equations of a point, which stay in one block.
    """
    points = n // outputs
    count = math.ceil(points / min(max(1, size // outputs), points))
    return list(slices(n, math.ceil(points / count) * outputs))


def in_random_order(blocks: list[slice], generator: torch.Generator) -> Iterator[slice]:
    """Every block once."""
    order = torch.randperm(len(blocks), generator=generator, device=generator.device)
    for index in order.tolist():
        yield blocks[index]


def fresh_partition(
    system: System, size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A random partition of the equations, in blocks of almost equal size."""
    order = system.operator.random_order(generator)
    return order.tensor_split(math.ceil(system.n / size))


def memory_for_factors(device: torch.device) -> int:
    """Bytes that the factors of all blocks may take: half of what others may."""
    return resolve_budget(None, device) // 2


class PerBlock(Generic[T]):
    """Something computed from a block at its first use; kept if memory allows.

    Args:
        compute: Called with a block.
        keep: Whether to keep what it returns; else it is computed at every use.
    """

    def __init__(self, compute: Callable[[slice], T], *, keep: bool) -> None:
        self._compute = compute
        self._keep = keep
        self._kept: dict[int, T] = {}
        self.computed = 0

    def __call__(self, block: slice) -> T:
        """What belongs to a block."""
        if block.start in self._kept:
            return self._kept[block.start]
        value = self._compute(block)
        self.computed += 1
        if self._keep:
            self._kept[block.start] = value
        return value


@dataclass(frozen=True)
class CholeskyInverse:
    """The inverse of one diagonal block of K + Sigma, ready to apply."""

    factor: Float[Tensor, "b b"]

    def __call__(self, r: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """(K[I, I] + Sigma[I, I])^-1 r."""
        return torch.cholesky_solve(r.to(self.factor.dtype), self.factor).to(r.dtype)


def factorise_block(system: System, block: RowIndex) -> CholeskyInverse:
    """Cholesky factor of the diagonal block H[I, I].

    In the system's dtype where its rounding, eps times the block's norm, stays below
    the noise; else in float64. A block that is not positive definite there gets the
    smallest sufficient jitter from a short list, relative to its norm.

    Raises:
        RuntimeError: Not positive definite even with the largest jitter.
    """
    matrix = block_matrix(system, block)
    size = float(matrix.abs().sum(1).max())
    dtype = matrix.dtype
    if float(system.noise[block].min()) > 10.0 * torch.finfo(dtype).eps * size:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return CholeskyInverse(factor)
    matrix = matrix.double()
    for jitter in _JITTERS:
        matrix.diagonal().add_(jitter * size)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return CholeskyInverse(factor)
    raise RuntimeError(
        f"a block of {len(matrix)} rows of K + Sigma is not positive definite even "
        f"with a jitter of {_JITTERS[-1]:.0e} times its norm; expected a valid kernel"
    )


def block_matrix(system: System, block: RowIndex) -> Float[Tensor, "b b"]:
    """H[I, I], a copy."""
    matrix = system.operator.block(block, block).clone()
    matrix.diagonal().add_(system.noise[block, 0])
    return matrix


class BestChecked:
    """The weights with the best true residual of every column so far.

    Args:
        start: Weights (n, k) to begin with.
        norms: Their true relative residuals (k,).
    """

    def __init__(self, start: Tensor, norms: Tensor) -> None:
        self.weights = start.clone()
        self.norms = norms.to(torch.float64, copy=True)

    def offer(self, weights: Tensor, norms: Tensor) -> None:
        """Take the columns whose true residual (k,) is better; NaN never is."""
        better = norms < self.norms
        self.weights[:, better] = weights[:, better]
        self.norms = torch.where(better, norms, self.norms)

    def with_columns(self, columns: Tensor, weights: Tensor) -> Tensor:
        """The best weights (n, k) with some columns replaced by others."""
        out = self.weights.clone()
        out[:, columns] = weights
        return out

    def is_within(self, tolerance: float) -> bool:
        """Whether all columns have reached a tolerance."""
        return float(self.norms.max()) <= tolerance
