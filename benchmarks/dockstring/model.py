"""The Gaussian process of a target as a plain GPyTorch model."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from jaxtyping import Float
from torch import Tensor

from benchmarks.dockstring.targets import Target
from sgdgp.kernels import TanimotoKernel


class TanimotoGP(gpytorch.models.ExactGP):
    """Constant mean and scaled Tanimoto kernel."""

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, " n"],
        likelihood: GaussianLikelihood,
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(TanimotoKernel())

    def forward(self, x: Float[Tensor, "n d"]) -> MultivariateNormal:
        """The prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def build_model(
    x: Float[Tensor, "n d"], y: Float[Tensor, " n"], target: Target
) -> TanimotoGP:
    """The model of a target over fingerprints x (n, d) and scores y (n,)."""
    model = TanimotoGP(x, y, GaussianLikelihood()).to(x)
    with torch.no_grad():
        # As tensors: GPyTorch rounds plain floats to float32 on the way.
        model.likelihood.noise = x.new_tensor(target.noise)
        model.covar_module.outputscale = x.new_tensor(target.amplitude)
        model.mean_module.constant = x.new_tensor(target.mean)
    return model


def values_of(model: TanimotoGP) -> dict[str, float]:
    """Its hyperparameters as plain numbers."""
    return {
        "mean": model.mean_module.constant.item(),
        "amplitude": model.covar_module.outputscale.item(),
        "noise": model.likelihood.noise.item(),
    }
