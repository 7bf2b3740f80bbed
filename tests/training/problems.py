"""Small models to be trained, and the truth about them."""

from __future__ import annotations

import gpytorch
import torch
from torch import Tensor


class Model(gpytorch.models.ExactGP):
    """A kernel with a constant mean, in float64."""

    def __init__(self, x, y, kernel, likelihood=None, network=None):
        super().__init__(x, y, likelihood or gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = kernel
        self.network = network
        self.to(x.dtype)

    def forward(self, x):
        mean = self.mean_module(x)
        inputs = x if self.network is None else self.network(x)
        return gpytorch.distributions.MultivariateNormal(
            mean, self.covar_module(inputs)
        )


def data(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, torch.sin(2.0 * x[:, 0]) + 0.3 * noise


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def dense_log_likelihood(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """log p(y | X) by a float64 Cholesky factor plus log priors, with a graph."""
    with gpytorch.settings.lazily_evaluate_kernels(False):
        prior = gpytorch.Module.__call__(model, x)
    noisy = model.likelihood(prior, [x])
    normal = torch.distributions.MultivariateNormal(
        noisy.loc, noisy.lazy_covariance_matrix.to_dense()
    )
    priors = [
        prior.log_prob(closure(module)).sum()
        for _, module, prior, closure, _ in model.named_priors()
    ]
    return normal.log_prob(y) + sum(priors)


def true_gradients(model: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of log p(y | X) / n by autograd through the Cholesky factor."""
    model.zero_grad()
    (dense_log_likelihood(model, x, y) / len(y)).backward()
    return gradients(model)
