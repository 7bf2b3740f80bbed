"""Means where the noise is small, or float32 too narrow: right, or with a warning."""

from __future__ import annotations

import warnings

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel

import sgdgp
from sgdgp.solvers import CG, SDD
from sgdgp.solvers.prediction_error import prediction_errors


class Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, noise, kernel):
        positive = gpytorch.constraints.Positive()
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=positive)
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel
        likelihood.noise = noise

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


@pytest.fixture
def data(generator):
    """A smooth function of 300 points with little noise, in float32, and the truth."""
    x = torch.rand(300, 2, generator=generator)
    xs = torch.rand(200, 2, generator=generator)
    noise, kernel = 1e-6, MaternKernel(1.5)
    kernel.lengthscale = 2.0
    y = torch.sin(5 * x).sum(1) + noise**0.5 * torch.randn(300, generator=generator)
    wide = MaternKernel(1.5).double()
    wide.lengthscale = 2.0
    with torch.no_grad():
        h = wide(x.double()).to_dense() + noise * torch.eye(300)
        cross = wide(xs.double(), x.double()).to_dense()
        truth = cross @ torch.linalg.solve(h, y.double())
        variance = 1 + noise - (cross * torch.linalg.solve(h, cross.mT).mT).sum(1)
    return Model(x, y, noise, kernel), xs, truth, variance.clamp_min(noise).sqrt()


def test_means_are_evaluated_in_float64_where_float32_rounds_them_off(data):
    model, xs, truth, deviation = data
    posterior = sgdgp.condition(model, num_samples=16, num_features=256)
    with torch.no_grad():
        weights = posterior.solution.weights[:, :1]
        narrow = posterior.problem.operator.product_at(xs, weights)[:, 0]
        predicted = posterior.predict(xs, batch_size=50).mean

        def off(mean):
            return float(((mean.double() - truth) / deviation).square().mean().sqrt())

        assert off(narrow) > 0.03
        assert off(posterior.mean(xs)) < 0.015
        assert off(predicted) < 0.015
    x = xs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(posterior.mean(x).sum(), x)
    assert torch.isfinite(slope).all()


def test_a_mean_that_is_off_is_warned_of_once_and_says_by_how_much(data):
    model, *_ = data
    model.likelihood.noise = 1e-4
    solver = CG(tolerance=1e-2)
    with pytest.warns(UserWarning, match=r"sgdgp\.condition: .*mean is off by") as told:
        posterior = sgdgp.condition(
            model, solver=solver, num_samples=16, num_features=256
        )
    (sentence,) = [str(w.message) for w in told if "sgdgp." in str(w.message)]
    solution = posterior.solution
    assert solution.reason == "converged"
    assert solution.prediction_error > 0.1
    assert f"{solution.prediction_error:.2g}" in sentence


def test_a_solve_out_of_budget_is_warned_of_and_a_good_one_is_not(data):
    model, *_ = data
    with pytest.warns(UserWarning, match="stopped .budget."):
        sgdgp.condition(model, solver=CG(max_passes=3.0), num_samples=0)
    model.likelihood.noise = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sgdgp.condition(model, num_samples=4).solution.prediction_error < 0.01


def test_targets_that_float32_cannot_resolve_are_warned_of(data):
    model, *_ = data
    y = model.train_targets + 1e3
    with pytest.warns(UserWarning, match="float64 data"):
        sgdgp.condition(model, model.train_inputs[0], y, num_samples=2)


def test_points_where_the_kernel_overflows_are_refused(generator):
    x = torch.randn(20, 1, generator=generator)
    kernel = gpytorch.kernels.PolynomialKernel(power=4)
    posterior = sgdgp.condition(Model(x, x[:, 0], 0.1, kernel), num_samples=2)
    for verb in (posterior.mean, posterior.variance, posterior.samples):
        with pytest.raises(ValueError, match=r"leaves the range of torch\.float32"):
            verb(torch.full((1, 1), 1e10))


def test_an_outlier_that_is_missed_while_all_others_fit_is_warned_of(generator):
    x = torch.randn(300, 20, generator=generator).double() * 1e3
    y = torch.randn(300, generator=generator).double()
    y[0] = 1e6
    model = Model(x, y, 0.3, MaternKernel(2.5)).double()
    with pytest.warns(UserWarning, match="mean is off by"):
        posterior = sgdgp.condition(model, solver=SDD(tolerance=1e-5), num_samples=4)
    problem, solution = posterior.problem, posterior.solution
    assert solution.reason == "converged"
    # Such points know nothing of each other: the truth is y / (1 + noise).
    noise = float(model.likelihood.noise)
    deviation = (noise + noise / (1 + noise)) ** 0.5
    off = float((posterior.mean(x) - y / (1 + noise)).abs().max()) / deviation
    assert 0.3 < off < 4.0 * solution.prediction_error
    # The norm of the residual, over all rows, does not show it.
    by_norm = prediction_errors(
        problem.noise, problem.rhs, problem.noise_draws, solution
    )
    assert float(by_norm[0]) < 0.1 < solution.prediction_error


def test_rounding_of_the_kernel_itself_is_part_of_the_error(generator):
    x = 1e6 + torch.randn(50, 2, generator=generator).double()
    x[25:] = x[:25]
    y = torch.randn(50, generator=generator).double()
    y[0] = 1e6
    kernel = gpytorch.kernels.PeriodicKernel()
    kernel.period_length = 0.06
    model = Model(x, y, 3e-5, kernel).double()
    with pytest.warns(UserWarning, match=r"mean is off by|even in float64"):
        posterior = sgdgp.condition(model, num_samples=4)
    assert posterior.solution.prediction_error > 0.1
    y[0] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = sgdgp.condition(model, x - 1e6, y, num_samples=4)
    assert posterior.solution.prediction_error < 1e-6
