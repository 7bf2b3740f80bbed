"""Small models to be trained, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import gpytorch
import torch
from torch import Tensor

from sgdgp.training.parameters import images_of, moved_by_optimiser
from sgdgp.training.probes import DrawnProbes, Probes


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


def rbf_model(n: int = 60, d: int = 2, seed: int = 0) -> Model:
    """A scaled RBF kernel on such data."""
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
    return Model(*data(n, d, seed), kernel)


@dataclass(frozen=True)
class UnitProbes(Probes):
    """All unit vectors: the trace, and so the gradient, without any randomness."""

    count: int = 0

    def draw(self, kernel, inputs, noise, generator):
        rhs = torch.eye(len(inputs), dtype=inputs.dtype) * len(inputs) ** 0.5
        return DrawnProbes(rhs, torch.zeros_like(rhs), False)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all raw parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], **tolerance):
    assert found.keys() == truth.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, truth[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def exact_loop(model, x, y, steps: int, *, lr: float = 0.1) -> None:
    """GPyTorch's tutorial loop with its exact marginal likelihood, by Cholesky.

    Bounded values that are parameters themselves go through softplus, as in a fit.
    """
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    images = images_of(model)
    moved = moved_by_optimiser(model.parameters(), images)
    optimiser = torch.optim.Adam(moved, lr=lr)
    inputs = x if isinstance(x, tuple) else (x,)
    with gpytorch.settings.fast_computations(False, False, False):
        for _ in range(steps):
            model.zero_grad()
            loss = -mll(model(*inputs), y, *inputs)
            loss.backward()
            for image in images:
                image.take_gradient()
            optimiser.step()
            for image in images:
                image.put_value()


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
