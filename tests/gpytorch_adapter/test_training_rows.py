"""Rows of linear systems: with them the marginal likelihood is the model's own."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood

from sgdgp.gpytorch_adapter import observed_rows, prior_at, training_problems
from sgdgp.gpytorch_adapter.data import training_data
from tests.models import gp, hadamard_gp, multitask_data, multitask_gp, toy_data, uneven

NAN = math.nan


def problems_of(model, x=None, y=None):
    x, y = training_data(model, x, y)
    return training_problems(prior_at(model.train(), x), model.likelihood, x, y)


def log_marginal_likelihood(problem):
    """Of one system, densely: the sum over its columns."""
    system = problem.kernel(problem.inputs).to_dense() + torch.diag(problem.noise)
    factor = torch.linalg.cholesky(system)
    centred = problem.targets - problem.mean.unsqueeze(1)
    half = torch.linalg.solve_triangular(factor, centred, upper=False)
    n, columns = centred.shape
    constant = factor.diagonal().log().sum() + 0.5 * n * math.log(2.0 * math.pi)
    return -0.5 * half.square().sum() - columns * constant


def jittered():
    return uneven(gp(covariance=lambda m, x: m.kernel(x).add_jitter(0.01)))


MODELS = {
    "single": lambda: uneven(gp(ScaleKernel(RBFKernel(ard_num_dims=2)))),
    "jitter": jittered,
    "fixed": lambda: gp(
        likelihood=FixedNoiseGaussianLikelihood(torch.linspace(0.1, 0.6, 30))
    ),
    "multitask": multitask_gp,
    "hadamard": hadamard_gp,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_marginal_likelihood_and_its_gradient_are_the_models(name):
    model = MODELS[name]()
    (problem,) = problems_of(model)
    ours = log_marginal_likelihood(problem)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    own = mll(model(*model.train_inputs), model.train_targets)
    # GPyTorch divides by the number of inputs, which differs between versions.
    count = model.train_targets.numel()
    torch.testing.assert_close(ours, own * count, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(ours, parameters, allow_unused=True),
        torch.autograd.grad(own * count, parameters, allow_unused=True),
        strict=True,
    ):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_missing_targets_of_tasks_are_rows_left_out():
    model = multitask_gp()
    x, y = multitask_data()
    y[3, 1] = y[5] = y[7, 2] = NAN
    (problem,) = problems_of(model, x, y)
    expected = [row for row in range(72) if row not in (10, 15, 16, 17, 23)]
    assert problem.rows.tolist() == expected
    assert torch.equal(problem.targets[:, 0], y.flatten()[expected])
    (whole,) = problems_of(model)
    dense = whole.kernel(whole.inputs).to_dense()[expected][:, expected]
    torch.testing.assert_close(problem.kernel(problem.inputs).to_dense(), dense)
    torch.testing.assert_close(problem.mean, whole.mean[expected])
    torch.testing.assert_close(problem.noise, whole.noise[expected])
    assert problem.columns == (0, 1, 2)


def test_independent_outputs_are_columns_of_one_system():
    x, y = multitask_data(30)
    (problem,) = problems_of(gp(), x, y)
    assert problem.columns == (0, 1, 2)
    assert torch.equal(problem.targets, y)
    assert problem.inputs.shape == (30, 2)


def test_outputs_observed_in_different_rows_are_different_systems():
    x, y = multitask_data(30)
    y[3, 1] = y[5] = NAN
    y[3, 2] = NAN
    noise = torch.linspace(0.1, 0.6, 30).double()
    model = gp(likelihood=FixedNoiseGaussianLikelihood(noise))
    first, second = sorted(problems_of(model, x, y), key=lambda p: p.columns)
    assert first.columns == (0,)
    assert second.columns == (1, 2)
    there = [row for row in range(30) if row not in (3, 5)]
    assert second.rows.tolist() == there
    assert torch.equal(second.targets, y[there][:, 1:])
    torch.testing.assert_close(second.noise, noise[there])
    total = sum(log_marginal_likelihood(p) for p in (first, second))
    by_column = sum(
        log_marginal_likelihood(
            problems_of(
                gp(likelihood=FixedNoiseGaussianLikelihood(noise[seen])),
                x[seen],
                y[seen, column],
            )[0]
        )
        for column in range(3)
        for seen in [~torch.isnan(y[:, column])]
    )
    torch.testing.assert_close(total, by_column)


@pytest.mark.parametrize(
    ("y", "tasks", "message"),
    [
        (torch.full((4, 2), NAN), 1, "NaN in every row"),
        (torch.full((4, 2), NAN), 2, "NaN in every row"),
        (torch.tensor([[1.0, NAN], [2.0, NAN]]), 1, "only NaN in column 1"),
    ],
)
def test_nothing_observed_is_refused(y, tasks, message):
    with pytest.raises(ValueError, match=message):
        observed_rows(y, tasks)


def test_a_task_without_observations_is_fine():
    (seen,) = observed_rows(torch.tensor([[1.0, NAN], [2.0, NAN]]), 2)
    assert seen.rows.tolist() == [0, 2]


def test_targets_must_have_the_models_outputs():
    model = multitask_gp()
    x, y = multitask_data()
    with pytest.raises(ValueError, match=r"expected shape \(24, 3\), found \(24, 2\)"):
        problems_of(model, x, y[:, :2])
    with pytest.raises(ValueError, match=r"expected shape \(24, 3\), found \(24,\)"):
        problems_of(model, x, y[:, 0])


def test_targets_in_one_column_may_not_be_missing():
    x, y = toy_data(30)
    y[4] = NAN
    with pytest.raises(ValueError, match="y: expected finite values"):
        problems_of(gp(), x, y)
