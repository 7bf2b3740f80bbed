"""Sides of Kronecker products: symmetric matrices, or diagonals of such.

The best single product of a sum is that of Van Loan and Pitsianis (1993): the factors,
flattened, are columns of two matrices, and sum_k a_k b_k^T is a matrix of rank one at
best, by QR and a small singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sgdgp.core.checks import check_finite

Term: TypeAlias = tuple[Tensor, Tensor]
"""Factors A (out, out) and B (rest, rest) of A (x) B, or their diagonals."""

_INDEFINITE = -1e-5
"""An eigenvalue below this, relative to the largest, is no rounding of float32."""


def check_factor(name: str, side: Tensor, n: int) -> None:
    """Refuse what is no factor of a precision; its eigenvalues are not looked at.

    Raises:
        ValueError: Says what was expected.
    """
    if side.shape not in ((n, n), (n,)):
        raise ValueError(
            f"{name}: expected factors of shape {(n, n)} or {(n,)}, found "
            f"{tuple(side.shape)}"
        )
    check_finite(name, side)
    # Most are so exactly, which is known in a quarter of the time.
    if (
        side.ndim == 2
        and not torch.equal(side, side.mT)
        and not torch.allclose(side, side.mT, atol=1e-6 * float(side.abs().max()))
    ):
        raise ValueError(f"{name}: expected symmetric matrices")
    diagonal = side if side.ndim == 1 else side.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(
            f"{name}: expected positive semi-definite factors, found "
            f"{float(diagonal.min()):.3g} on a diagonal"
        )


def times(left: Tensor, x: Tensor, right: Tensor | None) -> Tensor:
    """Left x right^T, sides that may be diagonals."""
    x = left[:, None] * x if left.ndim == 1 else left @ x
    if right is None:
        return x
    return x * right if right.ndim == 1 else x @ right.mT


def gram(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, a diagonal if both are."""
    if a.ndim == b.ndim == 1:
        return a * b
    if b.ndim == 1:
        return a.mT * b
    return a[:, None] * b if a.ndim == 1 else a.mT @ b


def quadratic(a: Tensor, root: Tensor) -> Tensor:
    """The diagonal of root^T a root."""
    if root.ndim == 1:
        return root.square() * (a if a.ndim == 1 else a.diagonal())
    return (root * times(a, root, None)).sum(0)


def in_float64(term: Term) -> Term:
    """Both sides in float64."""
    return term[0].double(), term[1].double()


def symmetric(side: Tensor) -> Tensor:
    """Without the rounding by which it is not."""
    return side if side.ndim == 1 else (side + side.mT) / 2


def trace_of(side: Tensor) -> Tensor:
    """Its trace in float64."""
    return (side if side.ndim == 1 else side.diagonal()).double().sum()


def bound_of(side: Tensor) -> float:
    """No less than the largest eigenvalue: the largest sum of a row."""
    return float(side.abs().reshape(len(side), -1).sum(1).max())


def log_abs_det(side: Tensor) -> float:
    """Log of the absolute value of its determinant."""
    side = side.double()
    if side.ndim == 1:
        return float(side.abs().log().sum())
    return float(torch.linalg.slogdet(side)[1])


def as_matrix(side: Tensor) -> Tensor:
    """A diagonal as a matrix."""
    return torch.diag(side) if side.ndim == 1 else side


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is."""
    return torch.where(x != 0, 1 / x, 0.0)


_EIGEN, _MULTIPLES = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
"""Eigenvalues and eigenvectors of factors as long as these live, and the factor and
number that another is the product of: all strengths of a prior share what is long."""


def multiple(side: Tensor, factor: float) -> Tensor:
    """The side times a number, whose eigenvectors are the side's."""
    found = side * factor
    origin, before = _MULTIPLES.get(side, (side, 1.0))
    _MULTIPLES[found] = origin, before * factor
    return found


def eigen(side: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in float64, not negative, and eigenvectors; of a diagonal ones.

    Raises:
        ValueError: An eigenvalue is negative beyond rounding.
    """
    if side.ndim == 1:
        return side.double(), torch.ones_like(side)
    side, factor = _MULTIPLES.get(side, (side, 1.0))
    if side not in _EIGEN:
        values, vectors = torch.linalg.eigh(side.double())
        _EIGEN[side] = values, vectors.to(side)
    values, vectors = _EIGEN[side]
    if float(values[0]) < _INDEFINITE * float(values[-1].abs()):
        raise ValueError(
            "terms: expected positive semi-definite factors, found eigenvalue "
            f"{float(values[0]):.3g} beside {float(values[-1]):.3g}"
        )
    return factor * values.clamp_min(0.0), vectors


def root_and_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    smallest = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(values > smallest, 1 / roots, 0)
    return (vectors * roots) @ vectors.mT, (vectors * inverse) @ vectors.mT


def nearest_product(terms: Sequence[Term]) -> Term:
    """A and B with the smallest |sum_k A_k (x) B_k - A (x) B|, Frobenius."""
    sides = []
    for factors in zip(*terms, strict=True):
        full = any(factor.ndim == 2 for factor in factors)
        same = [torch.diag(f) if full and f.ndim == 1 else f for f in factors]
        sides.append((same[0].shape, torch.stack([f.flatten() for f in same], 1)))
    (left_shape, lefts), (right_shape, rights) = sides
    q, r = torch.linalg.qr(lefts)
    p, s = torch.linalg.qr(rights)
    u, sizes, vh = torch.linalg.svd(r @ s.mT)
    left = (q @ u[:, 0]).reshape(left_shape) * sizes[0].sqrt()
    right = (p @ vh[0]).reshape(right_shape) * sizes[0].sqrt()
    trace = left.trace() if left.ndim == 2 else left.sum()
    for side in (left, right):
        side.mul_(trace.sign())
        # Rounding leaves less than nothing of an input that is always zero.
        (side.diagonal() if side.ndim == 2 else side).clamp_(min=0.0)
    return symmetric(left), symmetric(right)


def upper_product(terms: Sequence[Term]) -> Term:
    """(sum_k A_k) (x) (sum_k B_k) with balanced factors: above sum_k A_k (x) B_k."""
    sides = []
    for k in (0, 1):
        own = [term[k] * (term[1 - k].norm() / term[k].norm()).sqrt() for term in terms]
        full = any(side.ndim == 2 for side in own)
        sides.append(sum(as_matrix(side) if full else side for side in own))
    left, right = sides
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return left, right
