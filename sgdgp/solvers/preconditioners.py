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

from sgdgp.core.checks import check_count
from sgdgp.core.codec import register_stored_class
from sgdgp.core.processes import Processes
from sgdgp.core.seeds import standard_normal
from sgdgp.core.slices import slices
from sgdgp.core.team import Found, alone, follow, is_kept, keep, together
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.system import System

_ROWS = 8192
"""Of a basis made at a time: enough for a fast product, little beside the whole."""

_WORTH_MESSAGES = 2**26
"""Entries of a basis, times columns, whose product takes longer than to send it: some
10 ms on a core."""


class Inverse(ABC):
    """P^-1, ready to apply.

    Attributes:
        passes: Kernel entries that it took to build, divided by n^2.
        settings: What was chosen while it was built.
        magnitude: How many times as large as the inverse it stands for; no matter to
            conjugate gradients.
    """

    passes: float
    settings: Mapping[str, Any]
    magnitude: float = 1.0

    @abstractmethod
    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """P^-1 r."""

    def __deepcopy__(self, memo: object) -> Inverse:
        """Itself: it never changes, and PyTorch cannot copy compressed rows so."""
        return self


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
        factor, passes = self.factor(system, generator)
        return inverse_of(factor, system, passes)


@register_stored_class
@dataclass(frozen=True)
class PivotedCholesky(LowRank):
    """Randomly pivoted partial Cholesky in blocks (Chen et al., arXiv:2207.06503).

    Pivots are drawn with probability proportional to the diagonal of what remains,
    which needs no arbitrary choice where the kernel's diagonal is constant. Costs
    n r kernel entries: nothing beside one pass.

    Attributes:
        rank: Columns r. Default: n / 20, at least 100 and at most 1,000.
        block_size: Pivots drawn at a time.
    """

    rank: int | None = None
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        check_count("block_size", self.block_size, 1)

    def cost(self, n: int) -> float:
        return min(n, self.rank or default_rank(n)) / n

    def factor(
        self, system: System, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        n, operator = system.n, system.operator
        rank = min(n, self.rank or default_rank(n))
        # Column-major: the columns found so far are one contiguous block.
        columns = _room(system.rhs[:0], rank, n, torch.float64)
        if operator.is_shared:
            # Every process has its rows of the factor, this one all of them.
            keep(columns, _room, system.rhs[:0], rank, n, torch.float64)
        remaining = operator.diagonal().double().clone()
        total = float(remaining.sum())
        done = 0
        while done < rank and float(remaining.sum()) > 1e-12 * total:
            size = min(self.block_size, rank - done, int((remaining > 0).sum()))
            pivots = torch.multinomial(
                remaining.to(generator.device), size, generator=generator
            ).to(remaining.device)
            known = columns[:done, pivots].contiguous()
            corner = operator.block(pivots, pivots).double() - known.mT @ known
            values, vectors = torch.linalg.eigh(0.5 * (corner + corner.mT))
            kept = values > 1e-10 * values[-1].clamp_min(0)
            turn = vectors[:, kept] / values[kept].sqrt()
            (found,) = operator.everywhere(_new_columns, columns, pivots, known, turn)
            new = columns[done : done + found.shape[1]].copy_(found.mT)
            remaining -= new.square().sum(0)
            remaining[pivots] = 0.0
            remaining.clamp_(min=0.0)
            done += len(new)
            if len(new) == 0:
                break
        factor = columns[:done].mT
        if operator.is_shared:
            keep(factor, _first_columns, columns, done)
        return factor, done / n


def _room(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Room for a matrix, of which memory is taken as it is written."""
    return like.new_empty(rows, columns, dtype=dtype)


def _new_columns(
    processes: Processes,
    operator: KernelOperator,
    columns: Tensor,
    pivots: Tensor,
    known: Tensor,
    turn: Tensor,
) -> Found:
    """A share of the rows of what pivots add to a factor (m, b), which is kept too.

    Args:
        processes: Whose share it is.
        operator: K (n, n).
        columns: The factor (rank, n), its rows of this share.
        pivots: Rows of K (p,).
        known: The factor so far at the pivots (r, p).
        turn: What makes columns of a factor of the pivots' remainder (p, b).
    """
    own, done = processes.rows(columns.shape[1]), len(known)
    block = operator.block(pivots, own).double()
    block -= known.mT @ columns[:done, own]
    new = turn.mT @ block
    columns[done : done + len(new), own] = new
    return (new.mT,)


def _first_columns(columns: Tensor, count: int) -> Tensor:
    """The factor (n, count)."""
    return columns[:count].mT


@register_stored_class
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
        return 1.0

    def factor(
        self, system: System, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        matmul, like = system.operator.matmul, system.rhs
        return nystrom_factor(matmul, self.rank, like, generator), 1.0


def nystrom_factor(
    product: Callable[[Tensor], Tensor],
    rank: int,
    like: Float[Tensor, "n k"],
    generator: torch.Generator,
) -> Float[Tensor, "n r"]:
    """L with K ~ L L^T in float64, by one product with ``rank`` columns.

    Args:
        product: K times a matrix, K symmetric and positive semi-definite.
        rank: Columns of the sketch.
        like: What K is multiplied with.
        generator: Of the sketch.
    """
    n = like.shape[0]
    sketch = standard_normal(n, min(n, rank), like=like, generator=generator)
    sketch = torch.linalg.qr(sketch).Q
    image = product(sketch).double()
    core = sketch.double().mT @ image
    core = 0.5 * (core + core.mT)
    # Rounding of the product, not of float64, limits what is known of K.
    shift = torch.finfo(like.dtype).eps * float(core.diagonal().sum())
    values, vectors = torch.linalg.eigh(core)
    kept = values > shift
    return image @ (vectors[:, kept] / values[kept].sqrt())


@register_stored_class
@dataclass(frozen=True)
class LowRankInverse(Inverse):
    """The damped inverse of L L^T + Sigma."""

    scale: Float[Tensor, "n 1"]
    basis: Float[Tensor, "n r"]
    shrinkage: Float[Tensor, "r 1"]
    passes: float = 0.0
    magnitude: float = 1.0

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The rank that was found."""
        return {"rank": self.basis.shape[1]}

    def __call__(self, r: Tensor) -> Tensor:
        scaled = r * self.scale
        scaled -= low_rank_product(self.basis, self.shrinkage, scaled)
        return scaled.mul_(self.scale)


def low_rank_product(
    basis: Float[Tensor, "n r"],
    weights: Float[Tensor, "r 1"],
    v: Float[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Q diag(w) Q^T v, Q the ``basis`` and w the ``weights``."""
    is_shared = is_kept(basis) and basis.numel() * v.shape[1] >= _WORTH_MESSAGES
    join = together if is_shared else alone
    (inner,) = join(_inner_products, basis, v, by="sum")
    (found,) = join(_combination, basis, inner * weights.mT)
    return found


# Transposed: BLAS works on groups of columns, which few leave partly empty; in float64
# half of the time.


def _inner_products(processes: Processes, basis: Tensor, v: Tensor) -> Found:
    """A share of v^T Q (k, r)."""
    own = processes.rows(len(basis))
    return (v[own].mT.contiguous() @ basis[own],)


def _combination(processes: Processes, basis: Tensor, inner: Tensor) -> Found:
    """A share of the rows of Q C^T, C (k, r)."""
    return ((inner @ basis[processes.rows(len(basis))].mT).mT,)


def inverse_of(
    factor: Float[Tensor, "n r"], system: System, passes: float = 0.0
) -> LowRankInverse:
    """The preconditioner's inverse in the system's dtype; overwrites ``factor``."""
    return damped_inverse(factor, system.noise, system.rhs.dtype, passes)


def damped_inverse(
    factor: Float[Tensor, "n r"],
    noise: Float[Tensor, "n 1"],
    dtype: torch.dtype,
    passes: float = 0.0,
) -> LowRankInverse:
    """The inverse of L L^T + Sigma in a dtype; overwrites ``factor``."""
    scale = noise.double().rsqrt()
    basis, squares = left_singular(factor, dtype, scale)
    shrinkage = (1.0 - (1.0 + squares[:1]) / (1.0 + squares)).unsqueeze(1)
    return LowRankInverse(
        scale.to(dtype),
        basis,
        shrinkage.to(dtype),
        passes,
        1.0 + float(squares[:1].sum()),
    )


def left_singular(
    factor: Float[Tensor, "n r"],
    dtype: torch.dtype,
    scale: Float[Tensor, "n 1"] | None = None,
) -> tuple[Float[Tensor, "n q"], Float[Tensor, " q"]]:
    """Left singular vectors and squared singular values, ascending; q <= r kept.

    The vectors are rounded to ``dtype`` as they are made, by rows: nothing else is in
    memory beside ``factor``. The values are float64.

    From the Gram matrix, which squares the condition number: vectors of the smallest
    values are orthogonal to a few digits only. They are hardly shrunk, so that is
    enough.

    Args:
        factor: L, in float64; overwritten by scale * L, whose vectors they are.
        dtype: Of the vectors.
        scale: Of the rows. Default: one.
    """
    is_shared = is_kept(factor)
    join = together if is_shared else alone
    if scale is not None:
        if is_shared:
            follow(Tensor.mul_, factor, scale)
        factor *= scale
    (gram,) = join(_gram, factor, by="sum")
    values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
    kept = values > 1e-12 * values[-1:].clamp_min(0)
    turn = vectors[:, kept] / values[kept].sqrt()
    room = factor[:0], len(factor), turn.shape[1], dtype
    basis = _room(*room)
    if is_shared:
        keep(basis, _room, *room)
    (found,) = join(_turned, factor, turn, basis)
    return (basis.copy_(found) if is_shared else basis), values[kept]


def _gram(processes: Processes, factor: Tensor) -> Found:
    """A share of L^T L."""
    own = factor[processes.rows(len(factor))]
    return (own.mT @ own,)


def _turned(processes: Processes, factor: Tensor, turn: Tensor, out: Tensor) -> Found:
    """A share of the rows of L T, which are kept too; rounded as they are made."""
    own = processes.rows(len(factor))
    for rows in slices(own.stop, _ROWS, own.start):
        out[rows] = factor[rows] @ turn
    return (out[own],)


def default_rank(n: int) -> int:
    """Rank whose setup and use stay small beside a pass over K."""
    return min(n, max(100, min(1000, n // 20)))


class CachedPreconditioner(Preconditioner):
    """A recipe whose result is used for several systems of the same rows.

    From one step of an optimiser to the next the matrix changes little, so the last
    approximate inverse still serves: a few more iterations against a setup that takes
    longer than they do.

    Args:
        recipe: What it is made by.
        uses: For how many systems.
    """

    def __init__(self, recipe: Preconditioner, uses: int) -> None:
        self.recipe = recipe
        self._uses = uses
        self._inverse: Inverse | None = None
        self._rows, self._remaining = 0, 0

    def __repr__(self) -> str:
        return repr(self.recipe)

    def cost(self, n: int) -> float:
        return 0.0 if self._fits(n) else self.recipe.cost(n)

    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        if self._inverse is not None and self._fits(system.n):
            self._remaining -= 1
            return CachedInverse(self._inverse)
        self._inverse = self.recipe.prepare(system, generator)
        self._rows, self._remaining = system.n, self._uses - 1
        return self._inverse

    def _fits(self, n: int) -> bool:
        return self._remaining > 0 and self._rows == n


class CachedInverse(Inverse):
    """An inverse that cost nothing, because it was there already."""

    passes = 0.0

    def __init__(self, inverse: Inverse) -> None:
        self._inverse = inverse
        self.settings = {**inverse.settings, "reused": True}
        self.magnitude = inverse.magnitude

    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """P^-1 r, with the P of an earlier system."""
        return self._inverse(r)
