"""Lanczos runs: quadratures of the spectrum of a matrix, and its inverse root.

From a unit vector q_1 a run finds M Q = Q T + (one column), T tridiagonal. Without
reorthogonalisation eigenvalues repeat and split their weights: neither use minds, and
three blocks of vectors are all that is kept.

- Gauss quadrature (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017): with
  q_1 of random signs, n q_1^T f(M) q_1 = n (f(T))_11 estimates tr f(M).
- M^-1/2 z = |z| Q T^-1/2 e_1, from q_1 = z / |z| (Druskin and Knizhnerman, 1991). Q is
  not kept: a second run, with the coefficients known, adds its columns up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

_MOST_STEPS = 2000
"""Of an inverse root; one takes about the root of the condition number, times ten."""

_FIRST_LOOK, _LATER = 5, 1.2
"""Steps before the first look at whether an inverse root has converged, and how many
times as many before the next: a look takes the cube of the steps."""


class Lanczos:
    """Lanczos runs side by side, each from a vector of its own.

    Args:
        product: M times a matrix (n, k), M symmetric.
        start: Unit vectors (n, k).

    Attributes:
        vector: The latest vectors (n, k).
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], start: Float[Tensor, "n k"]
    ) -> None:
        self._product = product
        self.vector = start
        self._before = torch.zeros_like(start)
        self._image = torch.zeros_like(start)
        self._length = start.new_zeros(start.shape[1])
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Products so far."""
        return len(self._diagonal)

    @property
    def has_ended(self) -> bool:
        """Whether a run has found all that its start can."""
        return not bool(self._length.all())

    def step(self) -> None:
        """One product for all runs."""
        if self.steps:
            self._beside.append(self._length)
            tiny = torch.finfo(self._length.dtype).tiny
            following = self._image / self._length.clamp_min(tiny)
            self._before, self.vector = self.vector, following
        image = self._product(self.vector).sub_(self._length * self._before)
        self._diagonal.append((self.vector * image).sum(0))
        image -= self._diagonal[-1] * self.vector
        self._image, self._length = image, image.norm(dim=0)

    def eigen(self) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m m"]]:
        """Eigenvalues and eigenvectors of every run's T, in float64."""
        matrix = torch.diag_embed(torch.stack(self._diagonal, 1).double())
        if self._beside:
            beside = torch.stack(self._beside, 1).double()
            matrix += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors

    def quadrature(self) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m"]]:
        """Nodes, and weights that add up to n."""
        values, vectors = self.eigen()
        return values, len(self.vector) * vectors[:, 0].square()


def random_signs(
    size: int, generators: Sequence[torch.Generator], like: Tensor
) -> Float[Tensor, "n k"]:
    """Independent signs +-1, a generator for each column, laid out as weights are."""
    rows = torch.empty(len(generators), size, dtype=like.dtype, device="cpu")
    for row, generator in zip(rows, generators, strict=True):
        row.bernoulli_(generator=generator)
    return (2 * rows - 1).to(like.device).mT


def inverse_root(
    product: Callable[[Tensor], Tensor], z: Float[Tensor, "n k"], tolerance: float
) -> Float[Tensor, "n k"]:
    """M^-1/2 z.

    Args:
        product: M times a matrix, M symmetric and positive definite.
        z: Vectors (n, k).
        tolerance: Relative change between two looks that is small enough.

    Raises:
        ValueError: M has an eigenvalue below zero, or it did not converge.
    """
    lengths = z.norm(dim=0)
    start = z / lengths.clamp_min(torch.finfo(z.dtype).tiny)
    run, last = Lanczos(product, start), z.new_zeros(z.shape[1], 0).double()
    look = _FIRST_LOOK
    for step in count(1):
        run.step()
        if step < look:
            continue
        look = int(_LATER * look) + 1
        values, vectors = run.eigen()
        # What has no weight is behind the end of a run.
        seen = vectors[:, 0].abs() > torch.finfo(torch.float64).eps
        seen &= lengths.unsqueeze(1) > 0
        if bool((values[seen] <= 0).any()):
            raise ValueError(
                "precision: expected a positive definite one, found eigenvalues from "
                f"{float(values[seen].min()):.3g} to {float(values.max()):.3g}"
            )
        if step > _MOST_STEPS:
            raise ValueError(
                f"precision: its root has not converged after {step} products; add a "
                "larger multiple of the identity, or compress it"
            )
        roots = torch.where(seen, values.abs(), 1.0).rsqrt()
        found = (vectors * (vectors[:, 0] * roots).unsqueeze(1)).sum(2)
        change = found.clone()
        change[:, : last.shape[1]] -= last
        small = change.norm(dim=1) <= tolerance * found.norm(dim=1)
        last = found
        if bool(small.all()):
            break
    again, total = Lanczos(product, start), torch.zeros_like(z.mT).mT
    for coefficients in (last * lengths.unsqueeze(1)).to(z).mT:
        again.step()
        total.add_(again.vector * coefficients)
    return total
