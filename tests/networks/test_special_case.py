"""A linearised regression network is ``condition`` with its tangent kernel."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sgdgp
from sgdgp.kernels import NeuralTangentKernel
from sgdgp.networks import Gaussian, GPrior, WeightCG, linearise

NOISE, SAMPLES = 0.04, 256


class TangentModel(gpytorch.models.ExactGP):
    """Zero mean, and a network's tangent kernel under a weight prior."""

    def __init__(self, x, y, network, prior):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = NOISE
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ZeroMean()
        self.kernel = NeuralTangentKernel(network, prior=prior)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


@pytest.mark.parametrize("solver", [sgdgp.SDD(tolerance=1e-4), sgdgp.CG(1e-6)])
def test_both_have_the_same_mean_and_variance(solver):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(50, 1, generator=generator, dtype=torch.float64) - 2
    noise = torch.randn(50, generator=generator, dtype=torch.float64)
    y = (2 * x[:, 0]).sin() + NOISE**0.5 * noise
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    x_new = torch.linspace(-3, 3, 40, dtype=torch.float64).unsqueeze(1)

    linearised = linearise(network.eval(), Gaussian(noise=NOISE), GPrior()).fit(
        TensorDataset(x, y),
        steps=0,
        precision=0.05,
        final_samples=SAMPLES,
        solver=WeightCG(tolerance=1e-7),
    )
    model = TangentModel(x, y, network, linearised.prior)
    posterior = sgdgp.condition(model, solver=solver, num_samples=SAMPLES)
    assert posterior.solution.reason == "converged"

    mean = posterior.mean(x_new)
    difference = linearised.linear_mean(x_new)[:, 0] - mean
    assert float(difference.abs().max()) < 2e-3 * float(mean.abs().max())

    kernel = model.kernel
    with torch.no_grad():
        cross = kernel(x_new, x).to_dense()
        matrix = kernel(x, x).to_dense() + NOISE * torch.eye(50, dtype=x.dtype)
        prior = kernel(x_new, x_new, diag=True)
    exact = prior - (cross @ torch.linalg.solve(matrix, cross.T)).diagonal()
    error = (2 / SAMPLES) ** 0.5  # relative standard error of each variance
    for found in (posterior.variance(x_new), linearised.predict(x_new).variance[:, 0]):
        assert float((found / exact - 1).abs().max()) < 4.5 * error
