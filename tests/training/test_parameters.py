import gpytorch
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.kernels import RBFKernel, ScaleKernel

from sgdgp.training.parameters import (
    images_of,
    parameter_values,
    put_state,
    scatter,
    state_of,
)
from tests.training.problems import Model, assert_same, data, parameters, rbf_model
from tests.training.test_marginal_likelihood import deep


def test_parameters_are_told_through_their_constraints():
    model = rbf_model()
    model.covar_module.outputscale = 1.7
    model.covar_module.base_kernel.lengthscale = 0.4
    model.likelihood.noise = 0.05
    model.mean_module.constant = -0.3
    assert parameter_values(model) == {
        "likelihood.noise_covar.noise": pytest.approx((0.05,)),
        "mean_module.constant": pytest.approx((-0.3,)),
        "covar_module.outputscale": pytest.approx((1.7,)),
        "covar_module.base_kernel.lengthscale": pytest.approx((0.4,)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (GreaterThan(0.01, transform=None), 0.5),
        (GreaterThan(0.01, transform=None), 0.01),  # on its bound
        (GreaterThan(100.0, transform=None), 100.0),
        (GreaterThan(1e-10, transform=None), 1e-8),
        (Positive(transform=None), 3.0),
        (LessThan(2.0, transform=None), -1.0),
        (Interval(0.1, 0.9, transform=None), 0.3),
        (Interval(50.0, 100.0, transform=None), 100.0),
    ],
    ids=str,
)
def test_a_bounded_value_has_an_image_that_is_free(constraint, value, dtype):
    model = Model(*data(10, 2), RBFKernel(lengthscale_constraint=constraint)).to(dtype)
    raw = model.covar_module.raw_lengthscale
    raw.data.fill_(value)
    (image,) = images_of(model)
    assert image.parameter is raw
    assert float(raw.detach()) == pytest.approx(value, rel=1e-6)  # it has not moved
    near = pytest.approx(value, rel=1e-5, abs=2e-6 if value != 1e-8 else 1e-12)
    assert float(image.value().detach()) == near
    assert bool(torch.isfinite(image.leaf).all())
    raw.grad = torch.full_like(raw, 2.0)
    image.take_gradient()
    (truth,) = torch.autograd.grad(image.value(), image.leaf)
    torch.testing.assert_close(image.leaf.grad, 2.0 * truth)
    for far in (-300.0, 600.0):  # wherever an optimiser goes
        image.leaf.data += far
        image.put_value()
        assert constraint.check(raw)
    assert not constraint.enforced


def test_what_is_transformed_frozen_or_shared_has_no_image_more():
    model = Model(*data(10, 2), RBFKernel())
    assert images_of(model) == []
    shared = Positive(transform=None)
    both = RBFKernel(lengthscale_constraint=shared) + RBFKernel()
    both.kernels[1].register_constraint("raw_lengthscale", Positive(transform=None))
    both.kernels[1].raw_lengthscale = both.kernels[0].raw_lengthscale
    model = Model(*data(10, 2), both)
    assert len(images_of(model)) == 1
    both.kernels[0].raw_lengthscale.requires_grad_(False)
    assert images_of(model) == []


def test_every_lengthscale_is_told():
    kernel = ScaleKernel(RBFKernel(ard_num_dims=3))
    kernel.base_kernel.lengthscale = torch.tensor([[0.2, 0.5, 1.5]])
    model = Model(*data(10, 3), kernel)
    found = parameter_values(model)["covar_module.base_kernel.lengthscale"]
    assert found == pytest.approx((0.2, 0.5, 1.5))


def test_frozen_parameters_networks_empty_and_large_ones_are_left_out():
    kernel = RBFKernel(ard_num_dims=80)
    model = Model(*data(10, 80), kernel, network=torch.nn.Linear(80, 80))
    model.likelihood.raw_noise.requires_grad_(False)
    model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
    assert set(parameter_values(model)) == {"mean_module.constant"}


def test_a_parameter_of_the_model_itself_has_its_own_name():
    model = rbf_model()
    model.register_parameter("raw_amplitude", torch.nn.Parameter(torch.zeros(2)))
    model.register_constraint("raw_amplitude", gpytorch.constraints.Positive())
    assert parameter_values(model)["amplitude"] == pytest.approx((0.6931, 0.6931), 1e-3)


def test_a_state_is_a_copy_of_parameters_and_buffers():
    model = deep(torch.nn.BatchNorm1d(2)).double().train()
    before = state_of(model)
    assert {"network.3.running_mean", "mean_module.raw_constant"} <= before.keys()
    model(model.train_inputs[0])  # moves the running mean
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    after = state_of(model)
    for name in ("network.3.running_mean", "mean_module.raw_constant"):
        assert not torch.equal(before[name], after[name])
    put_state(model, before)
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_data_of_a_botorch_model_are_not_rounded_by_it(mode):
    x, y = data(40, 2)
    model = SingleTaskGP(
        4.0 + 3.0 * x,
        9.0 + 5.0 * y.unsqueeze(1),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    ).train(mode)
    inputs, targets = model.train_inputs[0].clone(), model.train_targets.clone()
    put_state(model, state_of(model))
    assert torch.equal(model.train_inputs[0], inputs)
    assert torch.equal(model.train_targets, targets)


def test_another_models_state_is_refused():
    state = state_of(rbf_model())
    state["covar_module.other"] = state.pop("covar_module.raw_outputscale")
    with pytest.raises(RuntimeError, match="raw_outputscale"):
        put_state(rbf_model(), state)


def test_scatter_keeps_to_constraints_and_leaves_means_and_frozen_ones():
    interval = gpytorch.constraints.Interval(0.2, 0.7)
    above = gpytorch.constraints.GreaterThan(0.05)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=above)
    kernel = ScaleKernel(RBFKernel(ard_num_dims=40, lengthscale_constraint=interval))
    model = Model(*data(5, 40), kernel, likelihood)
    model.covar_module.raw_outputscale.requires_grad_(False)
    before = parameters(model)
    for seed in range(20):
        scatter(model, torch.Generator().manual_seed(seed))
        lengthscales = kernel.base_kernel.lengthscale.detach()
        assert float(lengthscales.min()) > 0.2
        assert float(lengthscales.max()) < 0.7
        assert float(lengthscales.std()) > 0.05
        assert float(model.likelihood.noise.detach()) > 0.05
    after = parameters(model)
    for name in ("mean_module.raw_constant", "covar_module.raw_outputscale"):
        assert torch.equal(before[name], after[name])


def test_scattered_positive_parameters_are_log_normal_about_where_they_were():
    kernel = RBFKernel(ard_num_dims=4000)
    model = Model(*data(2, 4000), kernel)
    kernel.lengthscale = 0.3
    scatter(model, torch.Generator().manual_seed(0))
    logarithm = (kernel.lengthscale.detach() / 0.3).log()
    assert abs(float(logarithm.mean())) < 4.0 / 4000**0.5
    assert float(logarithm.std()) == pytest.approx(1.0, abs=0.06)


def test_a_seed_scatters_the_same_way():
    models = [rbf_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        scatter(model, torch.Generator().manual_seed(seed))
    one, again, other = map(parameters, models)
    assert_same(one, again, rtol=0.0, atol=0.0)
    name = "likelihood.noise_covar.raw_noise"
    assert not torch.equal(one[name], other[name])
