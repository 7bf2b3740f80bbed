import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

from sgdgp.training.history import parameter_values
from tests.training.problems import Model, data, rbf_model


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
