"""Second moments of probes of the curvature, as scales of a weight prior.

A probe J_b^T L_b e of a batch b, e of independent random signs, has mean zero and
covariance sum_{n in b} J_n^T H_n J_n, because signs of different examples and outputs
are uncorrelated. So squares of probes, added up over the batches, estimate the diagonal
of G = sum_n J_n^T H_n J_n without per-example gradients; and for one weight matrix
M M^T and M^T M estimate the two factors of a Kronecker product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median_low
from typing import TypeAlias

import torch
from torch import Tensor

from sgdgp.core.checks import check_finite
from sgdgp.core.processes import current_processes
from sgdgp.networks.priors.base import MatrixRoot
from sgdgp.tangent import Tangent

Probes: TypeAlias = Callable[[int], Iterator[Tensor]]
"""From p to J_b^T L_b e (D, p) for each batch b of this process."""

Factors: TypeAlias = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]
"""Covariance factors (out, out) and (rest, rest) of a matrix, or two such pairs."""

LARGEST_FACTOR = 4096
"""A side of a matrix that is longer has a diagonal factor."""


def floored_squares(
    tangent: Tangent, probes: Probes, count: int, floor: float
) -> Tensor:
    """diag(G) (D,), estimated from ``count`` probes per batch and floored.

    Raises:
        ValueError: All probes are zero, or some are not finite.
    """
    squares = torch.zeros(
        tangent.num_weights, dtype=tangent.dtype, device=tangent.device
    )
    for probe in probes(count):
        for row in probe.mT:
            squares.addcmul_(row, row, value=1 / count)
    current_processes().sum_(squares)
    check_finite("squares of the probes", squares)
    parts = [squares[s] for s in tangent.slices.values()]
    levels = [_level(part) for part in parts]
    whole = _whole_level(levels)
    for part, level in zip(parts, levels, strict=True):
        part.clamp_min_(floor * _own_level(level, whole, part.dtype))
    return squares


def estimated_blocks(
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
            x = rows[:, s].reshape(-1, *shape)
            if len(shape) == 1:
                found[0].add_(x.square().mean(0))
                continue
            _add_moment(found[0], x)
            _add_moment(found[1], x.mT)
    every = [moment for found in moments for moment in found]
    current_processes().sum_(*every)
    for moment in every:
        check_finite("moments of the probes", moment)
    levels = [
        _level(found[0]) if len(found) == 1 else _mean_square(found[0], shape)
        for found, shape in zip(moments, shapes, strict=True)
    ]
    whole = _whole_level(levels)
    blocks: list[Tensor | MatrixRoot] = []
    for found, level in zip(moments, levels, strict=True):
        own = _own_level(level, whole, tangent.dtype)
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


def given_blocks(
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
        blocks.append(_root(pairs[0]) if len(pairs) == 1 else _root_of_sum(*pairs))
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


def _level(squares: Tensor) -> float:
    """Median of the entries that are not zero; zero if all are."""
    positive = squares[squares > 0]
    return float(positive.median()) if len(positive) else 0.0


def _mean_square(moment: Tensor, shape: tuple[int, ...]) -> float:
    trace = moment.sum() if moment.ndim == 1 else moment.trace()
    return float(trace) / math.prod(shape)


def _whole_level(levels: Sequence[float]) -> float:
    positive = [level for level in levels if level > 0]
    if not positive:
        raise ValueError(
            "prior: all probes of the curvature are zero, so on these data the outputs "
            "do not depend on the chosen weights, or the loss is flat in the outputs; "
            "use Isotropic() or other weights"
        )
    return median_low(positive)


def _own_level(level: float, whole: float, dtype: torch.dtype) -> float:
    """The tensor's own level, or that of all where it is but rounding error.

    A bias that attention's softmax cancels has a Jacobian that is zero in theory and
    1e-8 in float32; scaled to unit size it would be noise.
    """
    rounding = 100 * torch.finfo(dtype).eps
    return level if level > rounding**2 * whole else whole


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


def _root(pair: tuple[Tensor, Tensor]) -> MatrixRoot:
    left, right = (_symmetric_root(side) for side in pair)
    return MatrixRoot(left, right)


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


def _symmetric_root(covariance: Tensor) -> Tensor:
    return _root_and_inverse(covariance)[0]


def _root_and_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    smallest = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(values > smallest, 1 / roots, 0)
    return (vectors * roots) @ vectors.mT, (vectors * inverse) @ vectors.mT
