"""Evidence against dense linear algebra, and the mean that it speaks for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sgdgp.networks import (
    Categorical,
    Gaussian,
    GPrior,
    Isotropic,
    Kronecker,
    WeightCG,
    linearise,
)
from sgdgp.networks.curvature import TangentData

N = 40
EXACT = {"solver": WeightCG(tolerance=1e-6), "final_samples": 2, "progress": False}
QUICK = {"num_samples": 4, "steps": 3, "final_samples": 2, "progress": False}


def data(noise: float = 0.2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    added = noise * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    return x, (2 * x[:, :1]).sin() + x[:, 1:2] + added


def network_of(hidden: int, outputs: int = 1, steps: int = 200) -> nn.Module:
    """A regression network for ``data``, trained for a moment."""
    x, y = data()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    network = network.double()
    optimiser = torch.optim.Adam(network.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(steps if outputs == 1 else 0):
        optimiser.zero_grad()
        (network(x) - y).square().mean().backward()
        optimiser.step()
    return network.eval()


def features_of(posterior, x):
    """J R, (N, C, D)."""
    jacobian = posterior.tangent.at(x).jacobian()
    return posterior.prior.root_adjoint(jacobian.flatten(0, 1).mT).mT.view_as(jacobian)


def density_of(posterior, x, y) -> float:
    """Log N(y | 0, J R R^T J^T + noise I)."""
    features = features_of(posterior, x)[:, 0]
    covariance = features @ features.mT + posterior.noise * torch.eye(N).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros(N).double(), covariance)
    return float(normal.log_prob(y[:, 0]))


def error_of(posterior, x, num_probes: int) -> float:
    """Standard error of v^T A v / 2 over signs v, for A = log(phi^T phi + I)."""
    phi = features_of(posterior, x)[:, 0] / posterior.noise**0.5
    _, values, vectors = torch.linalg.svd(phi, full_matrices=False)
    logs = values.square().log1p()
    diagonal = logs @ vectors.square()
    variance = 2 * (logs.square().sum() - diagonal.square().sum())
    return 0.5 * math.sqrt(float(variance) / num_probes)


@pytest.mark.parametrize("prior", [Isotropic(), GPrior(), Kronecker()], ids=str)
def test_few_weights_have_the_density_of_the_targets(prior):
    x, y = data()
    posterior = linearise(network_of(12), Gaussian(noise=0.05), prior).fit(
        TensorDataset(x, y), steps=0, precision=0.7, **EXACT
    )
    found = posterior.log_marginal_likelihood(TensorDataset(x, y))
    assert found.value == pytest.approx(density_of(posterior, x, y), abs=1e-4)
    assert found.standard_error == 0.0


def test_many_weights_have_an_estimate_that_its_error_covers(monkeypatch):
    x, y = data()
    posterior = linearise(network_of(450), Gaussian(noise=0.05), Isotropic()).fit(
        TensorDataset(x, y), steps=0, precision=4.0, **EXACT
    )
    exact = density_of(posterior, x, y)
    few = posterior.log_marginal_likelihood(TensorDataset(x, y))
    assert few.value == pytest.approx(exact, abs=1e-4)
    assert few.standard_error == 0.0
    # As if there were many rows, too.
    monkeypatch.setattr(TangentData, "is_wide", False)
    found = posterior.log_marginal_likelihood(TensorDataset(x, y), num_probes=64)
    assert abs(found.value - exact) < 4 * error_of(posterior, x, 64)
    # p probes know their spread to 1 / sqrt(2 p), 9 and 18 %: more than three of these.
    assert found.standard_error == pytest.approx(error_of(posterior, x, 64), rel=0.4)
    few = posterior.log_marginal_likelihood(TensorDataset(x, y), num_probes=16)
    assert few.standard_error == pytest.approx(error_of(posterior, x, 16), rel=0.6)


def test_classes_have_the_laplace_approximation():
    x, y = data()
    labels = (y[:, 0] > 0).long() + (y[:, 0] > 1)
    likelihood = Categorical()
    posterior = linearise(network_of(10, outputs=3), likelihood, Isotropic()).fit(
        TensorDataset(x, labels), steps=0, precision=0.7, **EXACT
    )
    jacobian = features_of(posterior, x)
    mean = posterior.weight_mean * 0.7**0.5
    outputs = (jacobian @ mean)[..., 0]
    phi = likelihood.hessian_root_transpose(outputs, jacobian).flatten(0, 1)
    logs = (torch.eye(len(phi)).double() + phi @ phi.mT).logdet()
    exact = -likelihood.loss(outputs, labels).sum() - 0.5 * (mean.square().sum() + logs)
    found = posterior.log_marginal_likelihood(TensorDataset(x, labels))
    assert found.value == pytest.approx(float(exact), abs=1e-4)


@pytest.mark.parametrize("mean", ["linear", "network"])
def test_noise_is_learned_for_the_mean_that_predicts(mean):
    """It is at the fixed point |y - mean|^2 / (N - gamma), gamma by the eigenvalues."""
    x, y = data()
    network = network_of(12)
    posterior = linearise(network, Gaussian(), Isotropic(), mean=mean).fit(
        TensorDataset(x, y), steps=40, num_samples=32, **EXACT
    )
    assert posterior.mean_of == mean
    prediction = posterior.predict(x)
    expected = network(x) if mean == "network" else posterior.linear_mean(x)
    torch.testing.assert_close(prediction.mean, expected.detach())
    features = features_of(posterior, x)[:, 0]
    squares = torch.linalg.eigvalsh(features @ features.mT) / posterior.noise
    gamma = float((squares / (squares + 1)).sum())
    error = float((y - prediction.mean).square().sum())
    assert posterior.noise == pytest.approx(error / (N - gamma), rel=0.1)
    assert prediction.noise == posterior.noise


def test_evidence_chooses_the_linear_model_of_all_weights():
    x, y = data()
    network = network_of(12, steps=1500)  # fits the noise, too
    posterior = linearise(network, Gaussian()).fit(TensorDataset(x, y), **QUICK)
    assert posterior.mean_of == "linear"


def test_evidence_chooses_a_network_that_its_uncertain_weights_cannot_make():
    """Without the other weights' share of the outputs the linear model fits nothing."""
    x, y = data()
    network = network_of(12)
    linear = linearise(network, Gaussian(), Isotropic(), weights="2.bias")
    posterior = linear.fit(TensorDataset(x, y), **QUICK)
    assert posterior.mean_of == "network"
    error = float((y - network(x).detach()).square().mean())
    assert posterior.noise == pytest.approx(error, rel=0.1)


def test_classes_are_those_of_the_network_unless_asked_otherwise():
    x, y = data()
    labels = TensorDataset(x, (y[:, 0] > 0).long())
    network = network_of(6, outputs=2)
    assert linearise(network, Categorical()).fit(labels, **QUICK).mean_of == "network"
    linear = linearise(network, Categorical(), mean="linear").fit(labels, **QUICK)
    expected = linear.linear_mean(x)
    torch.testing.assert_close(linear.fluctuations(x)[0], expected)


def test_calibration_compares_the_linear_mean_with_the_network():
    x, y = data()
    network = network_of(12)
    posterior = linearise(network, Gaussian(), mean="linear").fit(
        TensorDataset(x[:30], y[:30]), **QUICK
    )
    held_out = TensorDataset(x[30:], y[30:])
    comparison = posterior.calibrate(held_out)
    found = {name: scores["rmse"] for name, scores in comparison.scores.items()}
    errors = [y[30:] - mean(x[30:]) for mean in (network, posterior.linear_mean)]
    alone, linear = (float(error.square().mean().sqrt()) for error in errors)
    assert found["network"] == pytest.approx(alone)
    assert found["posterior (evidence)"] == pytest.approx(linear)
    assert not math.isclose(alone, linear, rel_tol=1e-3)


def test_a_mean_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match='mean: expected "network", "linear" or None'):
        linearise(network_of(4), Gaussian(), mean="zero")
