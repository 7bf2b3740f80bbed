"""Approximate inverses of the diagonal blocks of H = K + Sigma, with a step size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.solvers.blocks import block_matrix, factorise_block
from sgdgp.solvers.system import System

_POWER_ITERATIONS = 10
_POWER_VECTORS = 4


@dataclass(frozen=True)
class BlockStep:
    """A preconditioned step on one block: ``step(g)`` is eta P^-1 g."""

    inverse: Callable[[Tensor], Tensor]
    size: float

    def __call__(self, g: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Eta P^-1 g."""
        return self.inverse(g) * self.size


class BlockPreconditioner(ABC):
    """Recipe for P ~ H[I, I] and the step eta <= 1 / lambda_max(P^-1 H[I, I])."""

    @abstractmethod
    def step(
        self, system: System, block: Tensor, generator: torch.Generator
    ) -> BlockStep:
        """The preconditioned step on one block."""


@dataclass(frozen=True)
class ExactBlocks(BlockPreconditioner):
    """P = H[I, I] by Cholesky, eta = 1: sketch-and-project without approximation."""

    def step(
        self, system: System, block: Tensor, generator: torch.Generator
    ) -> BlockStep:
        """See ``BlockPreconditioner.step``."""
        return BlockStep(factorise_block(system, block), 1.0)


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

    def step(
        self, system: System, block: Tensor, generator: torch.Generator
    ) -> BlockStep:
        """See ``BlockPreconditioner.step``."""
        matrix = block_matrix(system, block)
        noise = system.noise[block]
        inverse = nystrom_inverse(matrix, noise, self.rank, generator)
        largest = _largest_eigenvalue(matrix, inverse, generator)
        return BlockStep(inverse, 1.0 / largest)


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
    sketch = _gaussian(matrix, min(rank, len(matrix)), generator)
    sketch = torch.linalg.qr(sketch).Q
    image = (matrix @ sketch).double() - noise.double() * sketch.double()
    core = sketch.double().mT @ image
    core = 0.5 * (core + core.mT)
    # What is below the rounding of the entries is not known of K.
    shift = torch.finfo(matrix.dtype).eps * float(core.diagonal().sum().clamp_min(0))
    shift = max(shift, torch.finfo(matrix.dtype).tiny)
    core.diagonal().add_(shift)
    corner, info = torch.linalg.cholesky_ex(core)
    while int(info):
        shift *= 10.0
        core.diagonal().add_(shift)
        corner, info = torch.linalg.cholesky_ex(core)
    factor = torch.linalg.solve_triangular(corner.mT, image, upper=True, left=False)
    spectrum = torch.linalg.eigvalsh(factor.mT @ factor)
    damping = (spectrum[0] - shift).clamp_min(0.0)
    diagonal = 1.0 / (noise.double() + damping)
    inner = factor.mT @ (diagonal * factor)
    inner.diagonal().add_(1.0)
    return LowRankInverse(diagonal, factor, torch.linalg.cholesky(inner))


def _largest_eigenvalue(
    matrix: Tensor, inverse: Callable[[Tensor], Tensor], generator: torch.Generator
) -> float:
    """lambda_max(P^-1 H) by power iterations from a few starts, at least one.

    P^-1 H is self-adjoint in the inner product of H: Rayleigh quotients are taken
    there, and only ever approach the eigenvalue from below.
    """
    vectors = _gaussian(matrix, _POWER_VECTORS, generator)
    largest = 1.0
    for _ in range(_POWER_ITERATIONS):
        image = matrix @ vectors
        following = inverse(image)
        quotient = (image * following).sum(0) / (image * vectors).sum(0)
        largest = float(torch.nan_to_num(quotient, 1.0, 1.0, 1.0).max())
        vectors = following / following.norm(dim=0)
    return max(largest, torch.finfo(matrix.dtype).tiny)


def _gaussian(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(
        len(like),
        columns,
        generator=generator,
        device=generator.device,
        dtype=like.dtype,
    ).to(like.device)
