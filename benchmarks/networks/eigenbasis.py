"""Linearised posteriors whose precision is known in an eigenbasis.

With a posterior precision Q diag(l + d) Q^T, l >= 0 and d the prior precision, the
rotated Jacobian J Q gives the variances for any prior precision and samples at the
cost of a row scaling: it is computed once per batch for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from benchmarks.networks.data import Images
from benchmarks.networks.prediction import Prediction, linearised
from sgdgp.networks.predictive import log_probit

Rotated: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From images to outputs (b, C) and their rotated Jacobian J Q (b, C, P)."""

GRID = torch.logspace(-4, 8, 61)
"""Prior precisions tried on the calibration images."""


@dataclass(frozen=True)
class Eigenbasis:
    """A Gaussian posterior of weights around a network's.

    Attributes:
        rotated: Outputs and rotated Jacobians.
        eigenvalues: Of the likelihood's curvature (P,).
    """

    rotated: Rotated
    eigenvalues: Float[Tensor, " P"]

    def variances(
        self, jacobian: Float[Tensor, "b C P"], precisions: Float[Tensor, " g"]
    ) -> Float[Tensor, "b C g"]:
        """Variance of each output for each prior precision."""
        return jacobian.square() @ (self.eigenvalues.unsqueeze(1) + precisions).pow(-1)

    def fluctuations(
        self,
        jacobian: Float[Tensor, "b C P"],
        precision: float,
        normal: Float[Tensor, "P k"],
    ) -> Float[Tensor, "b C k"]:
        """Samples of the linearised outputs, from standard normal draws."""
        scale = (self.eigenvalues + precision).rsqrt()
        return jacobian @ (scale.unsqueeze(1) * normal)

    def calibrated_precision(self, images: Images, batch: int = 50) -> float:
        """The prior precision of ``GRID`` of least cross-entropy on some images."""
        total = torch.zeros(len(GRID), dtype=torch.float64)
        for x, y in images.loader(batch):
            f, jacobian = self.rotated(x)
            total += _losses(f, self.variances(jacobian, GRID), y)
        return float(GRID[total.argmin()])


def _losses(
    f: Float[Tensor, "b C"], variances: Float[Tensor, "b C g"], y: Int[Tensor, " b"]
) -> Float[Tensor, " g"]:
    """Summed cross-entropy of the probit predictions for each column of variances."""
    each = [log_probit(f, variance) for variance in variances.unbind(-1)]
    return torch.stack(
        [functional.nll_loss(one.double(), y, reduction="sum") for one in each]
    )


@dataclass(frozen=True)
class EigenPredictor:
    """Predictions at several prior precisions, the same standard draws in all.

    Attributes:
        posterior: The posterior.
        precisions: Prior precision of each variant.
        num_samples: Samples for joint predictions.
        seed: Of the draws.
    """

    posterior: Eigenbasis
    precisions: Mapping[str, float]
    num_samples: int
    seed: int
    _normal: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        values = self.posterior.eigenvalues
        normal = torch.randn(len(values), self.num_samples, generator=generator)
        object.__setattr__(self, "_normal", normal.to(values))

    def __call__(self, x: Tensor) -> dict[str, Prediction]:
        """Probit predictions with exact variances, and samples."""
        f, jacobian = self.posterior.rotated(x)
        columns = torch.tensor(list(self.precisions.values())).to(f)
        variances = self.posterior.variances(jacobian, columns)
        return {
            name: linearised(
                f,
                self.posterior.fluctuations(jacobian, precision, self._normal),
                variances[..., i],
            )
            for i, (name, precision) in enumerate(self.precisions.items())
        }


def at_edge(precision: float) -> bool:
    """Whether a calibrated precision is the largest or smallest of ``GRID``."""
    ends = (float(GRID[0]), float(GRID[-1]))
    return any(math.isclose(precision, end, rel_tol=1e-6) for end in ends)
