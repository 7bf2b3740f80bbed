"""Models in training: own kernel and parameters, right gradients, right systems."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter import (
    prior_at,
    traced_prior,
    training_problems,
)
from sgdgp.gpytorch_adapter.data import training_data
from tests.models import gp, hadamard_gp, multitask_data, multitask_gp, toy_data, uneven


def network():
    layers = torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers)


def plain():
    return gp(ScaleKernel(RBFKernel(ard_num_dims=2)))


def active_dims():
    return gp(ScaleKernel(RBFKernel(active_dims=[1])) * MaternKernel(active_dims=[0]))


def deep_kernel_scaled_to_bounds():
    """GPyTorch's tutorial on deep kernels: bounds of the batch, in train mode."""
    return gp(
        ScaleKernel(RBFKernel()),
        covariance=lambda m, x: m.kernel(m.bounds(m.net(x))),
        net=network(),
        bounds=gpytorch.utils.grid.ScaleToBounds(-1.0, 1.0),
    )


def learned_constants():
    def covariance(m, x):
        weight = m.amount.weight.exp().squeeze()
        return weight * (m.kernel(x) + 3.0 * m.second(torch.tanh(x))) / 2.0

    return gp(
        covariance=covariance,
        second=MaternKernel(active_dims=[1]),
        amount=torch.nn.Linear(1, 1),
    )


def products():
    def covariance(m, x):
        first = m.kernel(m.net(x)) + 0.5 * m.second(x)
        return m.amount.weight.exp().squeeze() * (first * m.kernel(x)) + m.second(x)

    return gp(
        covariance=covariance,
        second=LinearKernel(),
        net=network(),
        amount=torch.nn.Linear(1, 1),
    )


def jitter():
    return gp(covariance=lambda m, x: 3.0 * m.kernel(x).add_jitter(1e-3))


TRACED = [
    plain,
    active_dims,
    deep_kernel_scaled_to_bounds,
    learned_constants,
    products,
    jitter,
]


def gradients(model, covariance, mean):
    generator = torch.Generator().manual_seed(1)
    n = len(mean)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    value = (a * covariance).sum() + b @ mean
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def same_gradients(one, other):
    for name, value in one.items():
        assert (value is None) == (other[name] is None), name
        if value is not None:
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("build", TRACED, ids=lambda build: build.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_models_own_with_its_gradients(build, training):
    model = uneven(build()).train(training)
    x = model.train_inputs[0]
    own = gpytorch.Module.__call__(model, x)
    traced = traced_prior(prior_at(model, x))
    eye = torch.eye(len(x), dtype=x.dtype)
    ours = traced.kernel(traced.inputs).to_dense() + traced.nugget * eye
    torch.testing.assert_close(ours, own.covariance_matrix, rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(traced.mean, own.loc)
    same_gradients(
        gradients(model, own.covariance_matrix, own.loc),
        gradients(model, ours, traced.mean),
    )


@pytest.mark.parametrize("build", TRACED, ids=lambda build: build.__name__)
def test_its_parameters_are_the_models(build):
    model = build()
    traced = traced_prior(prior_at(model.train(), model.train_inputs[0]))
    own = {id(p) for p in model.parameters()}
    learned = [p for p in traced.kernel.parameters() if p.requires_grad]
    assert learned
    assert all(id(p) in own for p in learned)


def test_what_the_model_returns_in_train_mode_is_traced():
    model = plain().train()
    x = model.train_inputs[0]
    traced = traced_prior(model(x))
    assert traced.kernel is model.kernel
    assert traced.inputs is x


def test_changes_in_place_reach_the_kernel():
    model = plain().train()
    x = model.train_inputs[0]
    traced = traced_prior(model(x))
    model.kernel.base_kernel.lengthscale = 0.3
    torch.testing.assert_close(traced.kernel(x).to_dense(), model.kernel(x).to_dense())


def test_rows_can_be_left_out():
    model = deep_kernel_scaled_to_bounds().double().train()
    x = model.train_inputs[0]
    rows = torch.tensor([3, 0, 17])
    own, traced = model(x), traced_prior(model(x), rows)
    torch.testing.assert_close(
        traced.kernel(traced.inputs).to_dense(),
        own.covariance_matrix[rows][:, rows],
    )
    torch.testing.assert_close(traced.mean, own.loc[rows])


def test_products_of_covariances_are_not_evaluated():
    model = hadamard_gp().train()
    x, i = model.train_inputs
    traced = traced_prior(prior_at(model, (x, i)))
    own = model(x, i)
    torch.testing.assert_close(
        traced.kernel(traced.inputs).to_dense(), own.covariance_matrix
    )
    same_gradients(
        gradients(model, own.covariance_matrix, own.loc),
        gradients(model, traced.kernel(traced.inputs).to_dense(), traced.mean),
    )
    with pytest.raises(UnsupportedModelError, match="DenseLinearOperator"):
        traced_prior(own)


def test_products_elsewhere_are_evaluated_as_ever():
    x, _ = toy_data(5)
    before = type(RBFKernel().double()(x) * MaternKernel().double()(x))
    prior_at(gp(), x)
    assert type(RBFKernel().double()(x) * MaternKernel().double()(x)) is before


@pytest.mark.parametrize("training", [True, False])
def test_botorch_models_transform_inputs_in_either_mode(training):
    x, y = toy_data(20)
    x = 5.0 + 40.0 * x
    model = SingleTaskGP(x, y[:, None], input_transform=Normalize(2)).train(training)
    expected = model.covar_module(model.input_transform(x)).to_dense()
    traced = traced_prior(prior_at(model, x))
    torch.testing.assert_close(traced.kernel(traced.inputs).to_dense(), expected)


def test_botorch_multitask_models_are_traced():
    x, y = toy_data(20)
    x = torch.cat([x, (torch.arange(20) % 3).double().unsqueeze(1)], dim=1)
    model = MultiTaskGP(x, y[:, None], task_feature=-1).train()
    traced = traced_prior(prior_at(model, x))
    own = model(x)
    torch.testing.assert_close(
        traced.kernel(traced.inputs).to_dense(), own.covariance_matrix
    )
    torch.testing.assert_close(traced.mean, own.loc)


def test_batches_are_refused_with_what_to_do():
    x, y = toy_data(20)
    model = SingleTaskGP(x, torch.stack([y, -y], 1)).train()
    with pytest.raises(UnsupportedModelError, match=r"y of shape \(n, outputs\)"):
        traced_prior(model(model.train_inputs[0]))


def test_evaluated_covariances_are_refused():
    x, _ = toy_data(5)
    distribution = MultivariateNormal(torch.zeros(5), torch.eye(5))
    with pytest.raises(UnsupportedModelError, match="not a function of two points"):
        traced_prior(distribution)
    with pytest.raises(TypeError, match="Tensor"):
        traced_prior(x)


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


def test_targets_must_have_the_models_outputs():
    model = multitask_gp()
    x, y = multitask_data()
    with pytest.raises(ValueError, match=r"expected shape \(24, 3\), found \(24, 2\)"):
        problems_of(model, x, y[:, :2])
    with pytest.raises(ValueError, match=r"expected shape \(24, 3\), found \(24,\)"):
        problems_of(model, x, y[:, 0])


def test_targets_in_one_column_may_be_missing():
    x, y = toy_data(30)
    y[4] = NAN
    there = ~torch.isnan(y)
    (found,) = problems_of(gp(), x, y)
    (expected,) = problems_of(gp(), x[there], y[there])
    assert found.rows.tolist() == there.nonzero().flatten().tolist()
    for name in ("inputs", "mean", "noise", "targets"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
