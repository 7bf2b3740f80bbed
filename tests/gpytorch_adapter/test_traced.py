"""The prior of a model in training: own kernel, own parameters, right gradients."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter import prior_at, traced_prior
from tests.models import gp, hadamard_gp, toy_data, uneven


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


MODELS = [
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


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
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


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
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
