"""Every feature map with points of its own. A map that is added here is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.features import FeatureMap, TanimotoFeatures
from sgdgp.features.base import CastFeatures, RestrictedFeatures, ScaledFeatures
from sgdgp.features.tasks import PairFeatures
from tests.features.kernels import (
    COMPOSITES,
    EXACT,
    PRODUCTS_WITH_TABLES,
    STATIONARY,
    TABLES,
    features,
    matern,
    points,
    polynomial,
    products_with_tables,
    tasks,
)
from tests.kernels.test_tanimoto import DIM as BINS
from tests.kernels.test_tanimoto import fingerprints
from tests.models import uneven


@dataclass(frozen=True)
class Case:
    """A feature map, and what it can be tested at.

    Attributes:
        make: The map, of about so many features where that is free.
        points: Inputs (n, d) of n and a seed.
        continuous: Leading columns of them that it is differentiable in.
    """

    make: Callable[[int], FeatureMap]
    points: Callable[[int, int], Tensor]
    continuous: int


class Outputs(FeatureMap):
    """A map with two rows per input: sines, and cosines, of another's features."""

    exact = True

    def __init__(self, base: FeatureMap) -> None:
        self.base = base
        self.num_features = base.num_features

    def features(self, x: Tensor) -> Tensor:
        phi = self.base.features(x)
        return torch.stack([phi.sin(), phi.cos()], 1).flatten(0, 1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if w.shape[0] != self.num_features:
            raise ValueError(f"w must be a matrix with {self.num_features} rows")
        return self.features(x) @ w

    def adjoint(self, x: Tensor, v: Tensor) -> Tensor:
        return self.features(x).mT @ v


def continuous(kernel: Callable[..., Kernel], *arguments: Any) -> Case:
    """A kernel's map on three continuous columns."""
    return Case(
        lambda count: features(kernel(*arguments), 3, count),
        lambda n, seed: points(n, 3, seed),
        3,
    )


def with_task(make: Callable[[int], FeatureMap], columns: int, count: int) -> Case:
    """A map on continuous columns and one of ``count`` tasks."""
    return Case(
        make,
        lambda n, seed: torch.cat(
            [points(n, columns, seed), tasks(n, seed) % count], 1
        ),
        columns,
    )


MAPS: dict[str, Case] = {
    **{name: continuous(STATIONARY[name], 3) for name in ("rbf", "matern 5/2")},
    **{name: continuous(make) for name, make in EXACT.items()},
    **{name: continuous(make) for name, make in COMPOSITES.items()},
    **{
        f"table, {name}": with_task(
            lambda count, make=TABLES[name]: features(make(), 1), 0, 4
        )
        for name in ("rank 4", "scaled")
    },
    **{
        f"product with a table, {name}": with_task(
            lambda count, name=name: features(
                uneven(products_with_tables()[name]), 3, count
            ),
            2,
            4,
        )
        for name in PRODUCTS_WITH_TABLES
    },
    "scaled": Case(
        lambda count: ScaledFeatures(features(polynomial(2)), 0.7),
        lambda n, seed: points(n, 3, seed),
        3,
    ),
    "restricted": Case(
        lambda count: RestrictedFeatures(
            features(polynomial(2), 2), torch.tensor([2, 0])
        ),
        lambda n, seed: points(n, 3, seed),
        3,
    ),
    "cast": Case(
        lambda count: CastFeatures(features(matern(1.5, 3), 3, count), torch.float64),
        lambda n, seed: points(n, 3, seed),
        3,
    ),
    "pairs": with_task(
        lambda count: PairFeatures(Outputs(features(polynomial(2), 2)), 2), 2, 2
    ),
    "fingerprints": Case(
        lambda count: TanimotoFeatures(7, BINS, count),
        lambda n, seed: fingerprints(n, seed) if n else fingerprints(1)[:0],
        0,
    ),
}
"""Maps by name."""
