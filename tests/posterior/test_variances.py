"""Variances against the closed form: exact, nearly exact, and honest about it."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    ScaleKernel,
)

import sgdgp
from sgdgp.posterior import variances
from tests.models import FEATURE_KERNELS, closed_form, gp, multitask_data, toy_data

SAMPLES = 64


def truth(model, x):
    """The closed form's covariance."""
    return closed_form(
        model.kernel,
        *model.train_inputs,
        model.train_targets,
        x,
        noise=float(model.likelihood.noise.detach()),
        mean=float(model.mean_module.constant.detach()),
    )[1]


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_variances_of_few_rows_are_exact(name):
    model, x = gp(FEATURE_KERNELS[name](), n=60), toy_data(9, seed=1)[0]
    posterior = sgdgp.condition(model, num_samples=1, num_features=8)
    covariance = truth(model, x)
    variance, error = posterior.variance(x, return_error=True)
    torch.testing.assert_close(variance, covariance.diagonal())
    assert not bool(error.any())
    torch.testing.assert_close(posterior.predict(x).covariance_matrix, covariance)
    # And where they all but vanish they are positive.
    assert bool((posterior.variance(model.train_inputs[0]) > 0).all())


def test_variances_of_few_rows_are_exact_in_float32():
    model, x = gp(n=60), toy_data(9, seed=1)[0]
    narrow = gp(n=60, dtype=torch.float32)
    variance = sgdgp.condition(narrow, num_samples=1).variance(x.float())
    expected = truth(model, x).diagonal()
    assert variance.dtype == torch.float32
    torch.testing.assert_close(variance.double(), expected, rtol=1e-4, atol=0)


class Problem:
    """A posterior of many functions over uniform points, and the true variances."""

    def __init__(self, kernel, noise, n=1_000, dim=4, **settings):
        generator = torch.Generator().manual_seed(3)
        x, self.x = (
            torch.rand(m, dim, generator=generator, dtype=torch.float64)
            for m in (n, 100)
        )
        self.model = gp(kernel, n=n, d=dim, noise=noise)
        self.model.set_train_data(x, torch.sin(3 * x.sum(1)), strict=False)
        self.posterior = sgdgp.condition(self.model, num_samples=SAMPLES, **settings)
        self.variance = truth(self.model, self.x).diagonal()

    def error(self, variance):
        """Root mean square of relative errors."""
        return float((variance / self.variance - 1).square().mean().sqrt())


@pytest.fixture
def not_exact(monkeypatch):
    monkeypatch.setattr(variances, "EXACT_ROWS", 0)


def matern(lengthscale):
    kernel = MaternKernel(nu=1.5)
    kernel.lengthscale = lengthscale
    return kernel


@pytest.mark.parametrize(
    ("lengthscale", "noise"), [(0.5, 0.1), (1.0, 0.01), (3.0, 0.01)]
)
def test_what_is_sampled_of_variances_is_little(not_exact, lengthscale, noise):
    problem = Problem(matern(lengthscale), noise, num_features=4096)
    variance, error = problem.posterior.variance(problem.x, return_error=True)
    # Functions alone: sqrt(2 / 64) = .18 and more, as features are not exact.
    assert problem.error(problem.posterior.variance(problem.x, from_samples=True)) > 0.1
    assert problem.error(variance) < 0.04
    covered = (variance - problem.variance).abs() < 2 * error
    # All points share the functions: their errors are correlated.
    assert 0.85 < float(covered.double().mean()) <= 1.0


def test_wrong_features_do_not_make_wrong_variances(not_exact):
    problem = Problem(matern(1.0), 0.01, num_features=128)
    assert problem.error(problem.posterior.variance(problem.x, from_samples=True)) > 0.4
    assert problem.error(problem.posterior.variance(problem.x)) < 0.1


@pytest.mark.parametrize(
    "kernel",
    [
        LinearKernel,
        lambda: ScaleKernel(RBFKernel()) + ScaleKernel(LinearKernel()),
        lambda: PeriodicKernel() * RBFKernel(active_dims=[1]),
    ],
    ids=["linear", "sum", "product"],
)
def test_variances_are_positive_and_below_the_priors(not_exact, kernel):
    problem = Problem(kernel(), 0.01, n=300)
    variance = problem.posterior.variance(problem.x)
    assert bool((variance > 0).all())
    prior = problem.model.kernel(problem.x, diag=True).detach()
    assert bool((variance <= prior * (1 + 1e-6)).all())
    assert problem.error(variance) < 0.15


def test_variances_of_several_outputs_are_those_of_each(not_exact):
    x, y = multitask_data(40)
    posterior = sgdgp.condition(gp(), x, y, num_samples=SAMPLES)
    at = toy_data(7, seed=1)[0]
    moments = posterior.paths.moments(at)
    for output, path in enumerate(posterior.paths.paths):
        for found, own in zip(moments, path.moments(at), strict=True):
            torch.testing.assert_close(found[:, output], own)


@pytest.mark.parametrize("rows", [0, 2_000])
def test_gradients_agree_with_finite_differences(monkeypatch, rows):
    monkeypatch.setattr(variances, "EXACT_ROWS", rows)
    x = toy_data(3, seed=1)[0].requires_grad_()
    posterior = sgdgp.condition(gp(n=50), num_samples=8, num_features=64)
    assert torch.autograd.gradcheck(posterior.variance, x)


def test_points_on_data_and_far_from_all(not_exact):
    model = gp(n=200, noise=1e-4)
    posterior = sgdgp.condition(model, num_samples=8)
    x = torch.cat([model.train_inputs[0][:5], model.train_inputs[0][:5] + 1e3])
    variance = posterior.variance(x)
    expected = truth(model, x).diagonal()
    torch.testing.assert_close(variance[5:], expected[5:])
    assert float(variance[:5].min()) > 0
    assert float(variance[:5].max()) < 1e-3


def test_duplicates_do_not_stop_it(not_exact):
    x = toy_data(30)[0].repeat(4, 1)
    model = gp(noise=1e-4)
    model.set_train_data(x, x.sum(1), strict=False)
    at = toy_data(7, seed=1)[0]
    variance = sgdgp.condition(model, num_samples=SAMPLES).variance(at)
    expected = truth(model, at).diagonal()
    torch.testing.assert_close(variance, expected, rtol=0.2, atol=0)


def test_a_prediction_leaves_no_matrix_behind(not_exact):
    posterior = sgdgp.condition(gp(n=60), num_samples=4, operator="dense")
    posterior.predict(toy_data(9, seed=1)[0])
    assert posterior.paths.operator._entries is None


def test_kernels_without_batches_have_no_neighbours(not_exact):
    class Stubborn(gpytorch.kernels.RBFKernel):
        def forward(self, x1, x2, **params):
            if x1.ndim > 2:
                raise RuntimeError("one matrix at a time")
            return super().forward(x1, x2, **params)

    problem = Problem(Stubborn(), 0.1, n=200)
    assert problem.posterior.paths.variances.kernel is None
    assert problem.error(problem.posterior.variance(problem.x)) < 0.2
