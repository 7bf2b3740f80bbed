"""Priors that are Kronecker products within each weight matrix, or sums of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
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
from sgdgp.networks.priors.blocks import (
    Block,
    KroneckerSum,
    MatrixRoot,
    root_of_sum,
)
from sgdgp.networks.priors.factors import root_and_inverse
from sgdgp.tangent import Tangent

Factors: TypeAlias = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]
"""Covariance factors (out, out) and (rest, rest) of a matrix, or two such pairs."""

LARGEST_FACTOR = 4096
"""A side of a matrix that is longer has a diagonal factor: its eigenvectors would take
64 MiB in float32, and time with the cube of its length."""


@register_stored_class
@dataclass(eq=False, repr=False)
class KroneckerPrior(WeightPrior):
    """Each block of weights has a precision of its own; P and R are block-diagonal.

    A block is a parameter tensor, or several in a row. Groups never split one.

    Attributes:
        blocks: In order: standard deviations of independent weights (m,), or a block.
    """

    blocks: Sequence[Tensor | Block] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = [
            MatrixRoot.independent(b) if isinstance(b, Tensor) else b
            for b in self.blocks
        ]
        self.blocks = blocks
        self._own = blocks
        sizes = [b.num_weights for b in blocks]
        if sum(sizes) != self.num_weights:
            raise ValueError(
                f"blocks: expected {self.num_weights} weights in all, found "
                f"{sum(sizes)}"
            )
        self._slices = list(starmap(slice, pairwise(accumulate(sizes, initial=0))))
        self._group_of_block = _groups_of(self._slices, self.groups, self.group_of)

    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        found = self._by_pieces(
            rows, lambda b, _, x: b.adjoint(x) if adjoint else b.apply(x)
        )
        # Precisions are constant within a block, so they commute with its root.
        return found.mul_(self._factor)

    def whiten(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        found = self._by_pieces(self._rows(w), lambda b, _, x: b.whiten(x))
        return found.div_(self._factor).mT

    def pieces(self) -> list[tuple[Block, float]]:
        return [
            (b, self._alphas[g])
            for b, g in zip(self._own, self._group_of_block, strict=True)
        ]

    def folded(self) -> KroneckerPrior:
        return replace(
            self,
            precisions=torch.ones_like(self.precisions),
            blocks=[b if a == 1.0 else b.scaled(a) for b, a in self.pieces()],
        )

    def compressed(self) -> KroneckerPrior:
        """The best single Kronecker product in place of those of a block.

        Multiples of the identity stay as they are.
        """
        blocks = [
            b.compressed() if isinstance(b, KroneckerSum) else b for b in self._own
        ]
        return replace(self, blocks=blocks)


def precision_sum(*priors: WeightPrior) -> KroneckerPrior:
    """The prior whose precision is the sum of those of several: P = sum_k P_k.

    That is how knowledge adds up: the precision of a prior and the curvature of a
    task's loss are that of its posterior. Its groups are those of the first, or one
    where these would split a block.

    Raises:
        ValueError: They are not over the same weights, in the same blocks, or one has
            no precision of few terms.
    """
    first = priors[0]
    shapes = next((p.shapes for p in priors if not p.is_diagonal), first.shapes)
    sums = [[b.scaled(a).as_sum() for b, a in p.pieces_of(shapes)] for p in priors]
    blocks = [reduce(KroneckerSum.plus, parts) for parts in zip(*sums, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    slices = list(starmap(slice, pairwise(accumulate(sizes, initial=0))))
    try:
        _groups_of(slices, first.groups, first.group_of)
        groups, group_of = first.groups, first.group_of
    except ValueError:
        groups, group_of = (), ()
    ones = first.precisions.new_ones(max(group_of, default=0) + 1)
    return KroneckerPrior(first.num_weights, ones, groups, group_of, blocks=blocks)


def _groups_of(
    blocks: Sequence[slice], groups: Sequence[slice], group_of: Sequence[int]
) -> list[int]:
    """The group that each block stands in.

    Raises:
        ValueError: A group splits one.
    """
    found = []
    for s in blocks:
        inside = [
            number
            for group, number in zip(groups, group_of, strict=True)
            if group.start <= s.start and s.stop <= group.stop
        ]
        if not inside:
            raise ValueError(f"groups: expected none to split the block {s}")
        found += inside
    return found


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
            blocks.append(root_of_sum(*pairs))
        else:
            blocks.append(MatrixRoot(*(root_and_inverse(s)[0] for s in pairs[0])))
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
