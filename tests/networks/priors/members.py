"""One prior of each kind of precision, with the dense matrix that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgdgp.networks.priors import (
    DiagonalPrior,
    KroneckerPrior,
    KroneckerSum,
    MatrixRoot,
    WeightPrior,
)

SHAPES = [(5, 4), (5, 1), (2, 5), (1, 2)]
"""A two-layer network 4-5-2: matrices (out, rest) and biases."""

SIZES = [math.prod(shape) for shape in SHAPES]
NUM_WEIGHTS = sum(SIZES)

Member = tuple[WeightPrior, Tensor]


def factor(
    n: int, g: torch.Generator, condition: float = 30.0, rank: int = 0
) -> Tensor:
    """A random positive semi-definite matrix (n, n) with that condition number."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if rank:
        values[rank:] = 0
    found = (basis * values) @ basis.mT
    return (found + found.mT) / 2


def terms(
    shape: tuple[int, int], count: int, g: torch.Generator, condition: float = 30.0
) -> list[tuple[Tensor, Tensor]]:
    """Random pairs of factors, of sizes that differ."""
    return [
        (factor(shape[0], g, condition), 3.0**k * factor(shape[1], g, condition))
        for k in range(count)
    ]


def dense(
    pairs: Sequence[tuple[Tensor, Tensor]], diagonal: float | Tensor = 0
) -> Tensor:
    """sum_k A_k (x) B_k + diag(d)."""
    found = sum(torch.kron(a, b) for a, b in pairs)
    assert isinstance(found, Tensor)
    own = torch.as_tensor(diagonal, dtype=found.dtype).expand(len(found))
    return found + torch.diag(own)


def _diagonal(groups: bool, scales: bool) -> Member:
    g = torch.Generator().manual_seed(1)
    own = torch.rand(NUM_WEIGHTS, generator=g, dtype=torch.float64) + 0.3
    stops = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    slices = [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]
    alpha = torch.rand(len(SIZES) if groups else 1, generator=g).double() + 0.5
    prior = DiagonalPrior(
        NUM_WEIGHTS, alpha, slices if groups else (), scales=own if scales else None
    )
    each = alpha.repeat_interleave(torch.tensor(SIZES)) if groups else alpha
    return prior, torch.diag(each.expand(NUM_WEIGHTS) * (own**-2 if scales else 1))


def _sums(count: int, delta: float | str) -> Member:
    g = torch.Generator().manual_seed(count)
    alpha = torch.tensor([1.7], dtype=torch.float64)
    blocks, matrices = [], []
    for shape in SHAPES:
        pairs = terms(shape, count, g)
        own: float | Tensor = delta if isinstance(delta, float) else 0.0
        if isinstance(delta, str):
            own = torch.rand(shape, generator=g, dtype=torch.float64) + 0.1
        blocks.append(KroneckerSum(pairs, own))
        flat = own.flatten() if isinstance(own, Tensor) else own
        matrices.append(dense(pairs, flat))
    prior = KroneckerPrior(NUM_WEIGHTS, alpha, blocks=blocks)
    return prior, 1.7 * torch.block_diag(*matrices)


def _roots(inner: bool) -> Member:
    g = torch.Generator().manual_seed(7)
    blocks, matrices = [], []
    for m, n in SHAPES:
        left, right = (
            torch.randn(k, k, generator=g, dtype=torch.float64) + 2 * torch.eye(k)
            for k in (m, n)
        )
        within = torch.rand(m, n, generator=g).double() + 0.5 if inner else None
        blocks.append(MatrixRoot(left, right, within))
        root = torch.kron(left, right)
        root = root * within.flatten() if within is not None else root
        matrices.append(torch.linalg.inv(root @ root.mT))
    alpha = torch.tensor([0.6], dtype=torch.float64)
    prior = KroneckerPrior(NUM_WEIGHTS, alpha, blocks=blocks)
    return prior, 0.6 * torch.block_diag(*matrices)


def _mixed() -> Member:
    g = torch.Generator().manual_seed(9)
    scales = torch.rand(5, generator=g, dtype=torch.float64) + 0.5
    pairs, three = terms(SHAPES[0], 1, g), terms(SHAPES[2], 3, g)
    root = torch.randn(2, 2, generator=g, dtype=torch.float64) + 2 * torch.eye(2)
    one = torch.ones(1, dtype=torch.float64)
    blocks = [
        KroneckerSum(pairs, 0.2),
        scales,
        KroneckerSum(three, 0.1),
        MatrixRoot(one, root),
    ]
    stops = [sum(SIZES[:2]), NUM_WEIGHTS]
    alpha = torch.tensor([0.5, 2.0], dtype=torch.float64)
    prior = KroneckerPrior(
        NUM_WEIGHTS,
        alpha,
        [slice(0, stops[0]), slice(stops[0], stops[1])],
        blocks=blocks,
    )
    parts = [
        0.5 * dense(pairs, 0.2),
        0.5 * torch.diag(scales**-2),
        2.0 * dense(three, 0.1),
        2.0 * torch.linalg.inv(root @ root.mT),
    ]
    return prior, torch.block_diag(*parts)


def _full() -> Member:
    g = torch.Generator().manual_seed(11)
    matrix = factor(NUM_WEIGHTS, g, rank=12)
    one = torch.ones(1, dtype=torch.float64)
    prior = KroneckerPrior(
        NUM_WEIGHTS, one, blocks=[KroneckerSum([(one, matrix)], 0.3)]
    )
    return prior, dense([(one[:, None], matrix)], 0.3)


MEMBERS: dict[str, Callable[[], Member]] = {
    "isotropic": lambda: _diagonal(False, False),
    "layerwise": lambda: _diagonal(True, False),
    "diagonal": lambda: _diagonal(False, True),
    "layerwise diagonal": lambda: _diagonal(True, True),
    "Kronecker root": lambda: _roots(False),
    "root with inner factors": lambda: _roots(True),
    "Kronecker product": lambda: _sums(1, 0.0),
    "Kronecker and identity": lambda: _sums(1, 0.3),
    "Kronecker and diagonal": lambda: _sums(1, "diagonal"),
    "two products": lambda: _sums(2, 0.0),
    "two products and identity": lambda: _sums(2, 0.3),
    "three products": lambda: _sums(3, 0.0),
    "five products and diagonal": lambda: _sums(5, "diagonal"),
    "one of each": _mixed,
    "full": _full,
}
"""A new kind of precision gets every statement that holds for all by standing here."""

CLOSED = [
    "isotropic",
    "layerwise",
    "diagonal",
    "layerwise diagonal",
    "Kronecker root",
    "root with inner factors",
    "Kronecker product",
    "Kronecker and identity",
    "two products",
    "full",
]
"""Those whose root is in closed form however many weights there are."""
