"""Blocks of equations: how a system is cut into them, and inverses of H[I, I]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.codec import register_stored_class
from sgdgp.core.seeds import standard_normal
from sgdgp.core.slices import slices
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.system import System

_JITTERS = (0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7, 1e-5)  # the first that is enough
_POWER_ITERATIONS, _POWER_VECTORS = 10, 4  # the paper's, from more than one start


def partition(n: int, size: int, outputs: int = 1) -> list[slice]:
    """Cut n equations into blocks of almost equal size, at most ``size`` each.

    The ``outputs`` equations of a point stay in one block.
    """
    points = n // outputs
    count = math.ceil(points / min(max(1, size // outputs), points))
    return list(slices(n, math.ceil(points / count) * outputs))


@dataclass(frozen=True)
class Shuffled:
    """A system with its equations in random blocks.

    Attributes:
        system: The system, in the order of rows that blocks refer to.
        order: Position in the caller's order of every row of ``system`` (n,).
        blocks: Rows of each block; those of a point stay together.
    """

    system: System
    order: Tensor
    blocks: Sequence[RowIndex]

    @property
    def block_size(self) -> int:
        """Rows of the first block; none has more."""
        first = self.blocks[0]
        return first.stop if isinstance(first, slice) else len(first)

    def unshuffled(self, v: Tensor) -> Tensor:
        """Rows (n, k) in the caller's order."""
        out = torch.empty_like(v)
        out[self.order] = v
        return out


def shuffle(system: System, size: int, generator: torch.Generator) -> Shuffled:
    """Reorder a system at random and cut it into blocks of at most ``size`` rows.

    A block is then a sample of all inputs whatever the order they came in, and its
    rows are contiguous: of a kernel in memory nothing is copied.
    """
    order = system.operator.random_order(generator)
    blocks = partition(system.n, size, system.operator.outputs_per_input)
    return Shuffled(system.permuted(order), order, blocks)


def in_random_order(
    blocks: Sequence[RowIndex], generator: torch.Generator
) -> Iterator[RowIndex]:
    """Every block once."""
    order = torch.randperm(len(blocks), generator=generator, device=generator.device)
    for index in order.tolist():
        yield blocks[index]


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
    size = float(matrix.abs().sum(1, dtype=torch.float64).max())
    attempts = [(torch.float64, jitter) for jitter in _JITTERS]
    if float(system.noise[block].min()) > 10.0 * torch.finfo(matrix.dtype).eps * size:
        attempts.insert(0, (matrix.dtype, 0.0))
    for dtype, jitter in attempts:
        matrix = matrix.to(dtype)
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


Step: TypeAlias = tuple[Callable[[Tensor], Tensor], float]


class BlockPreconditioner(ABC):
    """Recipe for P ~ H[I, I] and the step eta <= 1 / lambda_max(P^-1 H[I, I])."""

    @abstractmethod
    def step(self, system: System, block: RowIndex, generator: torch.Generator) -> Step:
        """P^-1 of one block, ready to apply, and eta."""


@register_stored_class
@dataclass(frozen=True)
class ExactBlocks(BlockPreconditioner):
    """P = H[I, I] by Cholesky, eta = 1: sketch-and-project without approximation."""

    def step(self, system: System, block: RowIndex, generator: torch.Generator) -> Step:
        return factorise_block(system, block), 1.0


@register_stored_class
@dataclass(frozen=True)
class NystromBlocks(BlockPreconditioner):
    """P = K^ + Sigma + s_r I with a randomised Nystrom K^ of K[I, I] (the paper's).

    K^ = (K O)(O^T K O)^-1 (K O)^T with a Gaussian sketch O (b, r); s_r, the smallest
    eigenvalue that it kept, stands for all it did not see. The factorisations are in
    float64: b r numbers are little beside the block's rows.

    Attributes:
        rank: Columns r of the sketch; no more than the block has rows.
    """

    rank: int = 100

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)

    def step(self, system: System, block: RowIndex, generator: torch.Generator) -> Step:
        matrix = block_matrix(system, block)
        noise = system.noise[block]
        inverse = nystrom_inverse(matrix, noise, self.rank, generator)
        largest = _largest_eigenvalue(matrix, inverse, generator)
        return inverse, 1.0 / largest


@dataclass(frozen=True)
class LowRankInverse:
    """The inverse of D + F F^T, ready to apply.

    Everything is in float64: where F F^T is seven digits above D, float32 would lose
    what the two differ in.

    Attributes:
        diagonal: 1 / D (b, 1).
        factor: F (b, r).
        corner: Cholesky factor of I + F^T D^-1 F (r, r).
    """

    diagonal: Float[Tensor, "b 1"]
    factor: Float[Tensor, "b r"]
    corner: Float[Tensor, "r r"]

    def __call__(self, g: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """(D + F F^T)^-1 g."""
        scaled = self.diagonal * g
        inner = torch.cholesky_solve(self.factor.mT @ scaled, self.corner)
        return scaled.sub_(self.diagonal * (self.factor @ inner)).to(g.dtype)


def nystrom_inverse(
    matrix: Float[Tensor, "b b"],
    noise: Float[Tensor, "b 1"],
    rank: int,
    generator: torch.Generator,
) -> LowRankInverse:
    """Inverse of K^ + s_r I + Sigma for a block ``matrix`` of H = K + Sigma."""
    sketch = standard_normal(
        len(matrix), min(rank, len(matrix)), like=matrix, generator=generator
    )
    sketch = torch.linalg.qr(sketch).Q
    image = (matrix @ sketch).double() - noise.double() * sketch.double()
    core = sketch.double().mT @ image
    core = 0.5 * (core + core.mT)
    # What is below the rounding of the entries is not known of K.
    shift = torch.finfo(matrix.dtype).eps * float(core.diagonal().sum().clamp_min(0))
    shift = max(shift, torch.finfo(matrix.dtype).tiny)
    corner, shift = _shifted_factor(core, shift)
    factor = torch.linalg.solve_triangular(corner.mT, image, upper=True, left=False)
    spectrum = torch.linalg.eigvalsh(factor.mT @ factor)
    damping = (spectrum[0] - shift).clamp_min(0.0)
    diagonal = 1.0 / (noise.double() + damping)
    inner = factor.mT @ (diagonal * factor)
    # More than the identity where that is below the rounding of what it is added to.
    corner, _ = _shifted_factor(inner, 1.0)
    return LowRankInverse(diagonal, factor, corner)


def _shifted_factor(matrix: Tensor, shift: float) -> tuple[Tensor, float]:
    """Cholesky factor of a matrix, changed in place, with the shift that it took.

    That is the given one, or what has to be added until there is a factor.
    """
    matrix.diagonal().add_(shift)
    corner, info = torch.linalg.cholesky_ex(matrix)
    while int(info) and math.isfinite(shift):
        shift *= 10.0
        matrix.diagonal().add_(shift)
        corner, info = torch.linalg.cholesky_ex(matrix)
    return corner, shift


def _largest_eigenvalue(
    matrix: Tensor, inverse: Callable[[Tensor], Tensor], generator: torch.Generator
) -> float:
    """lambda_max(P^-1 H) by power iterations from a few starts, at least one.

    P^-1 H is self-adjoint in the inner product of H: Rayleigh quotients are taken
    there, and only ever approach the eigenvalue from below.
    """
    vectors = standard_normal(
        len(matrix), _POWER_VECTORS, like=matrix, generator=generator
    )
    quotient = torch.ones_like(vectors[0])
    for _ in range(_POWER_ITERATIONS):
        image = matrix @ vectors
        following = inverse(image)
        quotient = (image * following).sum(0) / (image * vectors).sum(0)
        vectors = following / following.norm(dim=0)
    largest = float(torch.nan_to_num(quotient, 1.0, 1.0, 1.0).max())
    return max(largest, torch.finfo(matrix.dtype).tiny)
