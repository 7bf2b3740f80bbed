"""The GPyTorch model that a fit starts from, and what a fitted one has learnt."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.model import MaternGP


class TrainableGP(MaternGP):
    """As ``MaternGP``, with a constant mean that is learnt too."""

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, " n"],
        likelihood: GaussianLikelihood,
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = ConstantMean()


def default_model(x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> TrainableGP:
    """A model with GPyTorch's initial values and constraints, in the dtype of x.

    Lengthscales, output scale and noise variance log(2) = 0.693, mean 0; noise
    variances below 1e-4 are out of reach.
    """
    return TrainableGP(x, y, GaussianLikelihood()).to(x)


@dataclass(frozen=True)
class Learnt:
    """What was learnt, in z-scored units.

    Attributes:
        mean: The constant mean.
        values: Kernel and noise.
    """

    mean: float
    values: Hyperparameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"mean": self.mean, **asdict(self.values)}


def learnt(mean: Any, kernel: ScaleKernel, likelihood: GaussianLikelihood) -> Learnt:
    """Read the values of GPyTorch modules, exactly (in float64).

    Raises:
        ValueError: A value is not a finite, positive number.
    """
    base = kernel.base_kernel
    if not isinstance(base, MaternKernel):
        raise TypeError(f"kernel: found {type(base).__name__}, expected MaternKernel")
    with torch.no_grad():
        return Learnt(
            float(mean.constant.double()),
            Hyperparameters(
                float(likelihood.noise.double().sqrt()),
                float(kernel.outputscale.double().sqrt()),
                tuple(base.lengthscale.double().flatten().tolist()),
            ),
        )


def centred(split: Split, mean: float) -> Split:
    """The split with a constant taken off its targets."""
    return replace(split, y=split.y - mean, y_test=split.y_test - mean)
