"""Priors that are Kronecker products within each weight matrix, or sums of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, starmap
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite
from sgdgp.core.codec import register_stored_class
from sgdgp.core.hashes import digest
from sgdgp.core.processes import current_processes
from sgdgp.networks.priors.base import (
    ProbedPrior,
    Probes,
    WeightPrior,
    grouped,
    median_of,
    own_levels,
)
from sgdgp.tangent import Tangent

Factors: TypeAlias = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]
"""Covariance factors (out, out) and (rest, rest) of a matrix, or two such pairs."""

LARGEST_FACTOR = 4096
"""A side of a matrix that is longer has a diagonal factor: its eigenvectors would take
64 MiB in float32, and time with the cube of its length."""


@register_stored_class
@dataclass(frozen=True)
class MatrixRoot:
    """Root over one weight matrix: X -> left (inner * X) right^T.

    A Kronecker product, when there is no ``inner``; with it also the sum of two, or
    any other covariance with Kronecker-factored eigenvectors.

    Attributes:
        left: (out, out), or the diagonal of one (out,).
        right: (rest, rest), or the diagonal of one (rest,).
        inner: Entrywise factors (out, rest), or none.
    """

    left: Tensor
    right: Tensor
    inner: Tensor | None = None

    def apply(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R x for each of k matrices."""
        x = x if self.inner is None else self.inner * x
        x = self.left[:, None] * x if self.left.ndim == 1 else self.left @ x
        return x * self.right if self.right.ndim == 1 else x @ self.right.mT

    def adjoint(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R^T x for each of k matrices."""
        x = self.left[:, None] * x if self.left.ndim == 1 else self.left.mT @ x
        x = x * self.right if self.right.ndim == 1 else x @ self.right
        return x if self.inner is None else self.inner * x

    def inverse(self) -> MatrixRoot:
        """The root whose adjoint is the pseudo-inverse of this one."""
        left, right = (
            _reciprocal(side) if side.ndim == 1 else torch.linalg.pinv(side).mT
            for side in (self.left, self.right)
        )
        inner = None if self.inner is None else _reciprocal(self.inner)
        return MatrixRoot(left, right, inner)


@register_stored_class
@dataclass(eq=False, repr=False)
class KroneckerPrior(WeightPrior):
    """Each parameter tensor has a root of its own; R is block-diagonal.

    Parameter tensors are never split between groups.

    Attributes:
        blocks: For each parameter tensor, in order, its standard deviations (m,) or
            the root over its matrix.
    """

    blocks: Sequence[Tensor | MatrixRoot] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks = tuple(self.blocks)
        sizes = [
            b.shape[0] if isinstance(b, Tensor) else b.left.shape[0] * b.right.shape[0]
            for b in self.blocks
        ]
        if sum(sizes) != self.num_weights:
            raise ValueError(
                f"blocks: expected {self.num_weights} weights in all, found "
                f"{sum(sizes)}"
            )
        self._slices = list(starmap(slice, pairwise(accumulate(sizes, initial=0))))

    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for s, block in zip(self._slices, self.blocks, strict=True):
            x = rows[:, s]
            if isinstance(block, Tensor):
                found[:, s] = x * block
                continue
            x = x.reshape(-1, block.left.shape[0], block.right.shape[0])
            x = block.adjoint(x) if adjoint else block.apply(x)
            found[:, s] = x.reshape(rows.shape[0], -1)
        # Precisions are constant within a block, so they commute with its root.
        return found.mul_(self._factor)

    def whiten(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        inverse = replace(
            self,
            precisions=self.precisions.reciprocal(),
            blocks=[
                _reciprocal(b) if isinstance(b, Tensor) else b.inverse()
                for b in self.blocks
            ],
        )
        return inverse.root_adjoint(w)


@dataclass(frozen=True)
class Kronecker(ProbedPrior):
    """Within each weight matrix, N(0, (B (x) A)^-1 / alpha): a g-prior with structure.

    A matrix (out, rest), a convolution's kernel flattened to (out, in x kh x kw), has
    the moments B = E[M M^T] and A = E[M^T M] of its probes M, and B (x) A / tr A
    stands for its block of G. A side longer than 4096 has a diagonal factor, and
    parameters that are no matrices have the g-prior's.

    Attributes:
        probes: Probes per batch; fewer where they would fill more than 1 GiB.
        floor: Smallest eigenvalue of a factor, relative to their mean. The default is
            about the root of the g-prior's, because two factors multiply.
        layerwise: As in ``GPrior``.
        factors: Covariance factors (out, out) and (rest, rest) of matrices by name, in
            place of estimates: Cov(W_ij, W_kl) = first_ik second_jl. A list of two
            pairs is the sum of both. No probes are drawn then, and parameters that
            are not named have unit variance.
    """

    floor: float = 0.3
    factors: Mapping[str, Factors] | None = field(default=None, repr=False)

    def identity(self) -> str:
        """The settings, with hashes of the factors."""
        found = [
            (name, digest(factor))
            for name, given in sorted((self.factors or {}).items())
            for pair in ((given,) if isinstance(given[0], Tensor) else given)
            for factor in pair
        ]
        return f"{self!r} {found}"

    def build(self, tangent: Tangent, probes: Probes) -> KroneckerPrior:
        """R = sqrt(tr A) B^-1/2 . A^-1/2 in each matrix.

        Raises:
            ValueError: All probes are zero, or ``factors`` do not fit the network.
        """
        if self.factors is None:
            count = self.affordable(tangent)
            blocks = _estimated_blocks(tangent, probes, count, self.floor)
        else:
            blocks = _given_blocks(tangent, self.factors)
        return KroneckerPrior(*grouped(tangent, self.grouping), blocks=blocks)


def _estimated_blocks(
    tangent: Tangent, probes: Probes, count: int, floor: float
) -> list[Tensor | MatrixRoot]:
    """Roots of the inverse Kronecker-factored curvature, one for each parameter tensor.

    Raises:
        ValueError: All probes are zero, or some are not finite.
    """
    shapes = [_matrix_shape(shape) for shape in tangent.shapes]
    moments = [
        tuple(
            torch.zeros(
                (n, n) if n <= LARGEST_FACTOR and len(shape) == 2 else (n,),
                dtype=tangent.dtype,
                device=tangent.device,
            )
            for n in shape
        )
        for shape in shapes
    ]
    for probe in probes(count):
        rows = probe.mT
        for s, shape, found in zip(
            tangent.slices.values(), shapes, moments, strict=True
        ):
            x = rows[:, s].reshape(len(rows), shape[0], -1)
            for moment, side in zip(found, (x, x.mT), strict=False):
                _add_moment(moment, side)
    every = [moment for found in moments for moment in found]
    current_processes().sum_(*every)
    for moment in every:
        check_finite("moments of the probes", moment)
    levels = [
        median_of(found[0]) if len(found) == 1 else _mean_square(found[0], shape)
        for found, shape in zip(moments, shapes, strict=True)
    ]
    blocks: list[Tensor | MatrixRoot] = []
    for found, level, own in zip(
        moments, levels, own_levels(levels, tangent.dtype), strict=True
    ):
        if len(found) == 1:
            blocks.append(found[0].clamp_min(floor * own).rsqrt())
        elif own == level:
            left, right = (_inverse_root(moment, floor) for moment in found)
            blocks.append(MatrixRoot(left / math.sqrt(own), right))
        else:
            left, right = (moment.new_ones(moment.shape[0]) for moment in found)
            # Both factors at their floors, at the level of the other tensors.
            blocks.append(MatrixRoot(left / (floor * math.sqrt(own)), right))
    return blocks


def _given_blocks(
    tangent: Tangent, factors: Mapping[str, Factors]
) -> list[Tensor | MatrixRoot]:
    """Roots of covariances that a user gives; other parameters have unit variance.

    Raises:
        ValueError: A name is unknown, no matrix, or its factors are of wrong sizes or
            no covariances.
    """
    unknown = sorted(set(factors) - set(tangent.names))
    if unknown:
        raise ValueError(
            f"factors: {unknown} are no parameters of the tangent model; expected "
            f"names out of {list(tangent.names)}"
        )
    blocks: list[Tensor | MatrixRoot] = []
    for name, shape in zip(tangent.names, tangent.shapes, strict=True):
        like = torch.ones(shape.numel(), dtype=tangent.dtype, device=tangent.device)
        if name not in factors:
            blocks.append(like)
            continue
        pairs = _checked_pairs(name, factors[name], _matrix_shape(shape))
        pairs = [(left.to(like), right.to(like)) for left, right in pairs]
        if len(pairs) == 2:
            blocks.append(_root_of_sum(*pairs))
        else:
            blocks.append(MatrixRoot(*(_root_and_inverse(s)[0] for s in pairs[0])))
    return blocks


def _matrix_shape(shape: torch.Size) -> tuple[int, ...]:
    """(out, rest), or (m,) of what is no matrix."""
    if len(shape) < 2 or min(shape[0], shape[1:].numel()) == 1:
        return (shape.numel(),)
    return (shape[0], shape[1:].numel())


def _add_moment(moment: Tensor, x: Tensor) -> None:
    """Add the mean of X X^T over the probes (p, n, m), or its diagonal."""
    if moment.ndim == 1:
        moment.add_(x.square().sum(-1).mean(0))
        return
    for one in x:
        moment.addmm_(one, one.mT, alpha=1 / len(x))


def _inverse_root(moment: Tensor, floor: float) -> Tensor:
    """(moment / mean eigenvalue)^-1/2, eigenvalues floored."""
    if moment.ndim == 1:
        return (moment / moment.mean()).clamp_min(floor).rsqrt()
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean())
    return (vectors * values.clamp_min(floor).rsqrt()) @ vectors.mT


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / x, 0.0)


def _mean_square(moment: Tensor, shape: tuple[int, ...]) -> float:
    trace = moment.sum() if moment.ndim == 1 else moment.trace()
    return float(trace) / math.prod(shape)


def _checked_pairs(
    name: str, given: Factors, shape: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    name = f"factors[{name!r}]"
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, the parameter is none")
    sides = [
        side
        for part in given
        for side in ((part,) if isinstance(part, Tensor) else part)
    ]
    if len(sides) not in (2, 4):
        raise ValueError(
            f"{name}: expected one or two pairs of factors, found {len(sides)} tensors"
        )
    for i, side in enumerate(sides):
        n = shape[i % 2]
        if side.shape != (n, n):
            raise ValueError(
                f"{name}: expected shapes {[(n, n) for n in shape]}, found "
                f"{[tuple(side.shape) for side in sides]}"
            )
        check_finite(name, side)
        if not torch.allclose(side, side.mT, atol=1e-6 * float(side.abs().max())):
            raise ValueError(f"{name}: expected symmetric matrices")
        if (values := torch.linalg.eigvalsh(side))[0] < -1e-5 * values[-1].abs():
            raise ValueError(
                f"{name}: expected covariances, found eigenvalue {float(values[0]):.3g}"
            )
    return list(zip(sides[::2], sides[1::2], strict=True))


def _root_of_sum(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> MatrixRoot:
    """A root of one (x) one' + two (x) two'.

    On each side, with S the sum of both factors, S = F F^T, and F^-1 one F^-T =
    U diag(a) U^T, the second factor is I - a in the basis F U: the sum is
    (F U (x) F' U') diag(a a' + (1 - a)(1 - a')) (F U (x) F' U')^T.
    """
    sides = []
    for first, second in zip(one, two, strict=True):
        factor, inverse = _root_and_inverse(first + second)
        values, vectors = torch.linalg.eigh(inverse @ first @ inverse)
        sides.append((factor @ vectors, values.clamp(0, 1)))
    (left, a), (right, b) = sides
    inner = torch.outer(a, b) + torch.outer(1 - a, 1 - b)
    return MatrixRoot(left, right, inner.sqrt())


def _root_and_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    smallest = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(values > smallest, 1 / roots, 0)
    return (vectors * roots) @ vectors.mT, (vectors * inverse) @ vectors.mT
