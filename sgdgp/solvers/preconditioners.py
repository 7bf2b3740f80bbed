"""Preconditioners for conjugate gradients: recipes, and inverses ready to apply.

A recipe's ``prepare(system, generator)`` returns P^-1. The recipes here find L (n, r)
with K ~ L L^T; ``two_level.py`` adds a sparse inverse of what L leaves. With
D = Sigma, the thin SVD  D^-1/2 L = Q S W^T and c_i = (1 + s_r^2) / (1 + s_i^2), s_r
the smallest singular value,

    P^-1 = D^-1/2 (I - Q diag(1 - c) Q^T) D^-1/2.

What the factor does not see is taken to be as large as the last thing it saw
(Frangella et al., 2023). With c_i = 1 / (1 + s_i^2), the textbook inverse, the
condition number would be the same, but 1 - c_i rounds to one in float32 as soon as
the noise is seven digits below the largest eigenvalue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_count
from sgdgp.solvers.system import System


class Inverse(ABC):
    """P^-1, ready to apply.

    Attributes:
        passes: Kernel entries that it took to build, divided by n^2.
        settings: What was chosen while it was built.
    """

    passes: float
    settings: Mapping[str, Any]

    @abstractmethod
    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """P^-1 r."""


class Preconditioner(ABC):
    """Recipe for the approximate inverse of a system's matrix."""

    @abstractmethod
    def cost(self, n: int) -> float:
        """Passes over K that preparing it takes, at most."""

    @abstractmethod
    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        """P^-1 for the system's matrix K + Sigma."""


class LowRank(Preconditioner):
    """Recipe for a low-rank factor of K."""

    @abstractmethod
    def factor(
        self, system: System, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n r"], float]:
        """L with K ~ L L^T in float64, and the passes over K it took."""

    def prepare(self, system: System, generator: torch.Generator) -> LowRankInverse:
        """See ``Preconditioner.prepare``."""
        factor, passes = self.factor(system, generator)
        return inverse_of(factor, system, passes)


@dataclass(frozen=True)
class PivotedCholesky(LowRank):
    """Randomly pivoted partial Cholesky in blocks (Chen et al., arXiv:2207.06503).

    Pivots are drawn with probability proportional to the diagonal of what is left,
    which needs no arbitrary choice where the kernel's diagonal is constant. Costs
    n r kernel entries: nothing beside one pass.

    Attributes:
        rank: Columns r. Default: n / 14, at least 100 and at most 1,000.
        block_size: Pivots drawn at a time.
    """

    rank: int | None = None
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        check_count("block_size", self.block_size, 1)

    def cost(self, n: int) -> float:
        """See ``Preconditioner.cost``."""
        return min(n, self.rank or default_rank(n)) / n

    def factor(
        self, system: System, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """See ``LowRank.factor``."""
        n = system.n
        rank = min(n, self.rank or default_rank(n))
        everything = slice(0, n)
        # Column-major: the columns found so far are one contiguous block.
        columns = system.rhs.new_zeros(rank, n, dtype=torch.float64)
        left = system.operator.diagonal().double().clone()
        total = float(left.sum())
        done = 0
        while done < rank and float(left.sum()) > 1e-12 * total:
            size = min(self.block_size, rank - done, int((left > 0).sum()))
            pivots = torch.multinomial(
                left.to(generator.device), size, generator=generator
            ).to(left.device)
            block = system.operator.block(pivots, everything).double()
            block -= columns[:done, pivots].mT @ columns[:done]
            corner = block[:, pivots]
            values, vectors = torch.linalg.eigh(0.5 * (corner + corner.mT))
            kept = values > 1e-10 * values[-1].clamp_min(0)
            found = (vectors[:, kept] / values[kept].sqrt()).mT @ block
            columns[done : done + len(found)] = found
            left -= found.square().sum(0)
            left[pivots] = 0.0
            left.clamp_(min=0.0)
            done += len(found)
            if len(found) == 0:
                break
        return columns[:done].mT, done / n


@dataclass(frozen=True)
class Nystrom(LowRank):
    """Randomised Nystrom approximation (Frangella, Tropp & Udell, 2023).

    K ~ (K O)(O^T K O)^-1 (K O)^T with a Gaussian sketch O (n, r). One pass over K
    with r columns; the best low-rank factor per rank, dear where r is large.

    Attributes:
        rank: Columns r of the sketch. Default: 100.
    """

    rank: int = 100

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)

    def cost(self, n: int) -> float:
        """See ``Preconditioner.cost``."""
        return 1.0

    def factor(
        self, system: System, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """See ``LowRank.factor``."""
        n = system.n
        sketch = torch.randn(
            n,
            min(n, self.rank),
            generator=generator,
            device=generator.device,
            dtype=system.rhs.dtype,
        ).to(system.rhs.device)
        sketch = torch.linalg.qr(sketch).Q
        image = system.operator.matmul(sketch).double()
        core = sketch.double().mT @ image
        core = 0.5 * (core + core.mT)
        # Rounding of the product, not of float64, limits what is known of K.
        shift = torch.finfo(system.rhs.dtype).eps * float(core.diagonal().sum())
        values, vectors = torch.linalg.eigh(core)
        kept = values > shift
        return image @ (vectors[:, kept] / values[kept].sqrt()), 1.0


@dataclass(frozen=True)
class LowRankInverse(Inverse):
    """D^-1/2 (I - A C A^T) D^-1/2 with A = D^-1/2 L."""

    scale: Float[Tensor, "n 1"]
    factor: Float[Tensor, "n r"]
    core: Float[Tensor, "r r"]
    passes: float = 0.0

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The rank that was found."""
        return {"rank": self.factor.shape[1]}

    def __call__(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        scaled = r * self.scale
        scaled -= self.factor @ (self.core @ (self.factor.mT @ scaled))
        return scaled.mul_(self.scale)


def inverse_of(
    factor: Float[Tensor, "n r"], system: System, passes: float = 0.0
) -> LowRankInverse:
    """The preconditioner's inverse in the system's dtype; overwrites ``factor``."""
    scale = system.noise.double().rsqrt()
    factor *= scale
    core = core_of(factor, lambda squares: 1.0 - (1.0 + squares[:1]) / (1.0 + squares))
    dtype = system.rhs.dtype
    return LowRankInverse(scale.to(dtype), factor.to(dtype), core.to(dtype), passes)


def core_of(
    factor: Float[Tensor, "n r"], shrinkage: Callable[[Tensor], Tensor]
) -> Float[Tensor, "r r"]:
    """C with A C A^T = Q h(S^2) Q^T for A = Q S W^T: no orthonormal basis is formed.

    Args:
        factor: A (n, r), in float64.
        shrinkage: h, of the squared singular values in ascending order.
    """
    gram = factor.mT @ factor
    squares, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
    kept = squares > 1e-12 * squares[-1:].clamp_min(0)
    squares, vectors = squares[kept], vectors[:, kept]
    return (vectors * (shrinkage(squares) / squares)) @ vectors.mT


def default_rank(n: int) -> int:
    """Rank whose setup and use stay small beside a pass over K."""
    return min(n, max(100, min(1000, n // 14)))
