"""The papers' Gaussian process as a plain GPyTorch model."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.hyperparameters import Hyperparameters

# GPyTorch's own floor is 1e-4; the low-noise rows of the papers need 1e-6.
_NOISE_FLOOR = 1e-12


class MaternGP(gpytorch.models.ExactGP):
    """Zero mean, scaled Matern-3/2 kernel with one lengthscale per input."""

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, " n"],
        likelihood: GaussianLikelihood,
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = ZeroMean()
        self.covar_module = ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=x.shape[1]))

    def forward(self, x: Float[Tensor, "n d"]) -> MultivariateNormal:
        """The prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def build_model(
    x: Float[Tensor, "n d"], y: Float[Tensor, " n"], values: Hyperparameters
) -> MaternGP:
    """A GPyTorch model over the data with the given hyperparameters.

    Args:
        x: Training inputs (n, d); their dtype is the model's.
        y: Training targets (n,).
        values: Kernel and noise, both scales as standard deviations.
    """
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(_NOISE_FLOOR))
    model = MaternGP(x, y, likelihood).to(x)
    with torch.no_grad():
        # As tensors: GPyTorch rounds plain floats to float32 on the way.
        likelihood.noise = x.new_tensor(values.noise_scale**2)
        model.covar_module.outputscale = x.new_tensor(values.signal_scale**2)
        model.covar_module.base_kernel.lengthscale = x.new_tensor(values.lengthscale)
    model.requires_grad_(False)
    return model.eval()


def kernel_block(
    model: MaternGP, a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]
) -> Float[Tensor, "m n"]:
    """The dense kernel matrix K(a, b) from GPyTorch itself, without gradients."""
    with torch.no_grad():
        block: Tensor = model.covar_module(a, b).to_dense()
    return block
