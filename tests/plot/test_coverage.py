"""The curve of coverage is that of the metrics, noise included."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import nn

import sgdgp
from sgdgp.metrics import CALIBRATION_LEVELS, calibration_error, interval_coverage
from sgdgp.networks import Gaussian, linearise
from tests.models import gp, toy_data


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def curves(ax):
    """Coverage of each curve, without the diagonal."""
    return [
        list(line.get_ydata()) for line in ax.get_lines() if line.get_marker() == "o"
    ]


def coverage(mean, variance, y):
    return [interval_coverage(mean, variance, y, level) for level in CALIBRATION_LEVELS]


def test_one_output_has_the_likelihoods_noise():
    posterior = sgdgp.condition(gp(noise=0.3), num_samples=4)
    x, y = toy_data(50, seed=1)
    ax = sgdgp.plot.calibration(posterior, x, y)
    mean, variance = posterior.mean(x), posterior.variance(x)
    (found,) = curves(ax)
    assert found == coverage(mean, variance + 0.3, y)
    assert found != coverage(mean, variance, y)
    error = calibration_error(mean, variance + 0.3, y)
    assert ax.get_title() == f"calibration error {error:.3f}, n = 50"
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "expected coverage",
        "observed coverage",
    )
    (diagonal,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]


def test_noise_may_be_given_and_curves_compared():
    posterior = sgdgp.condition(gp(), num_samples=4)
    x, y = toy_data(50, seed=1)
    noise = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    ax = sgdgp.plot.calibration(posterior, x, y, label="the likelihood's")
    sgdgp.plot.calibration(
        posterior, x, y, observation_noise=noise, label="given", ax=ax
    )
    assert curves(ax)[1] == coverage(
        posterior.mean(x), posterior.variance(x) + noise, y
    )
    names = ax.get_legend_handles_labels()[1]
    assert [name.split(", error")[0] for name in names] == ["the likelihood's", "given"]
    assert sum(line.get_linestyle() == "--" for line in ax.get_lines()) == 1


def test_every_output_has_a_curve_of_the_targets_it_has():
    x, y = toy_data(30)
    posterior = sgdgp.condition(gp(), x, torch.stack([y, -y], 1), num_samples=4)
    x, y = toy_data(40, seed=1)
    targets = torch.stack([y, -y], 1)
    targets[:5, 1] = torch.nan
    ax = sgdgp.plot.calibration(posterior, x, targets)
    mean, variance = posterior.predict(x, observation_noise=True, batch_size=7)
    first, second = curves(ax)
    assert first == coverage(mean[:, 0], variance[:, 0], targets[:, 0])
    assert second == coverage(mean[5:, 1], variance[5:, 1], targets[5:, 1])
    assert [name[:8] for name in ax.get_legend_handles_labels()[1]] == [
        "output 0",
        "output 1",
    ]


@pytest.mark.parametrize("noise", [None, 0.5, torch.linspace(0.1, 1, 40)])
def test_a_regression_network_adds_its_noise(noise):
    x, y = toy_data(40)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    p = linearise(network, Gaussian(noise=0.2)).fit(
        [(x, y[:, None])], steps=1, final_samples=4, progress=False
    )
    ax = sgdgp.plot.calibration(p, x, y, observation_noise=noise)
    (found,) = curves(ax)
    prediction = p.predict(x)
    variance = prediction.variance[:, 0] + (0.2 if noise is None else noise)
    assert found == coverage(prediction.mean[:, 0], variance, y)


def test_noise_that_nobody_knows_is_asked_for_by_its_name():
    likelihood = FixedNoiseGaussianLikelihood(torch.full((30,), 0.1).double())
    posterior = sgdgp.condition(gp(likelihood=likelihood), num_samples=2)
    x, y = toy_data(10)
    with pytest.raises(ValueError, match=r"observation_noise: .*10 noise variances"):
        sgdgp.plot.calibration(posterior, x, y)
    sgdgp.plot.calibration(posterior, x, y, observation_noise=0.1)


def test_bad_input_is_named():
    posterior = sgdgp.condition(gp(), num_samples=2)
    x, y = toy_data(10)
    with pytest.raises(ValueError, match=r"y: expected targets \(10,\).*found \(9,\)"):
        sgdgp.plot.calibration(posterior, x, y[1:])
    with pytest.raises(TypeError, match=r"y: expected a torch.Tensor, found list"):
        sgdgp.plot.calibration(posterior, x, y.tolist())
    with pytest.raises(TypeError, match=r"p: .*found GP"):
        sgdgp.plot.calibration(gp(), x, y)
