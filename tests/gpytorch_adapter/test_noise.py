"""Noise variances of every Gaussian likelihood, with their gradients."""

from __future__ import annotations

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    HadamardGaussianLikelihood,
    MultitaskGaussianLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import HeteroskedasticNoise, HomoskedasticNoise
from linear_operator.operators import DiagLinearOperator

from sgdgp.gpytorch_adapter import noise_of, noise_variances
from tests.models import GP, toy_data, uneven

N = 6


def by_a_model():
    inputs, _ = toy_data(8, seed=4)
    return _GaussianLikelihoodBase(
        noise_covar=HeteroskedasticNoise(GP(inputs, inputs[:, 0].clone(), RBFKernel()))
    )


LIKELIHOODS = {
    "gaussian": GaussianLikelihood,
    "fixed": lambda: FixedNoiseGaussianLikelihood(torch.linspace(0.1, 0.6, N)),
    "fixed_and_more": lambda: FixedNoiseGaussianLikelihood(
        torch.linspace(0.1, 0.6, N), learn_additional_noise=True
    ),
    "by_a_model": by_a_model,
}


class OwnMultitask(MultitaskGaussianLikelihood):
    """A user's likelihood: a tenth more noise."""

    def _shaped_noise_covar(self, *arguments, **settings):
        return super()._shaped_noise_covar(*arguments, **settings) * 1.1


MULTITASK = {
    "own": lambda: OwnMultitask(3),
    "both": lambda: MultitaskGaussianLikelihood(3),
    "global": lambda: MultitaskGaussianLikelihood(3, has_task_noise=False),
    "by_task": lambda: MultitaskGaussianLikelihood(3, has_global_noise=False),
}


def gradients(likelihood, noise):
    weights = torch.arange(1.0, 1.0 + len(noise)).double()
    parameters = [p for p in likelihood.parameters() if p.requires_grad]
    if not parameters:
        return []
    return torch.autograd.grad(weights @ noise, parameters, allow_unused=True)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_noise_is_what_the_likelihood_adds(name):
    likelihood = uneven(LIKELIHOODS[name]())
    x, _ = toy_data(N)
    zero = MultivariateNormal(torch.zeros(N).double(), DiagLinearOperator(0 * x[:, 0]))
    own = likelihood(zero, [x]).covariance_matrix.diagonal()
    noise = noise_variances(likelihood, x, N)
    torch.testing.assert_close(noise, own)
    same(gradients(likelihood, noise), gradients(likelihood, own))
    assert not noise_of(likelihood, x).requires_grad


@pytest.mark.parametrize("name", MULTITASK)
def test_multitask_noise_is_interleaved(name):
    likelihood = uneven(MULTITASK[name]())
    x, _ = toy_data(N)
    zero = MultitaskMultivariateNormal(
        torch.zeros(N, 3).double(), DiagLinearOperator(torch.zeros(3 * N).double())
    )
    own = likelihood(zero).covariance_matrix.diagonal()
    noise = noise_variances(likelihood, x, N)
    torch.testing.assert_close(noise, own)
    same(gradients(likelihood, noise), gradients(likelihood, own))


def test_multitask_noise_is_that_of_the_task_and_the_global_one():
    likelihood = MultitaskGaussianLikelihood(3).double()
    likelihood.task_noises = torch.tensor([0.1, 0.2, 0.3])
    likelihood.noise = 0.05
    found = noise_variances(likelihood, toy_data(2)[0], 2)
    expected = torch.tensor([0.15, 0.25, 0.35, 0.15, 0.25, 0.35]).double()
    torch.testing.assert_close(found, expected)


class NoiseOfAColumn(HomoskedasticNoise):
    """A user's noise model: the variance over a weight in the last column."""

    def forward(self, *params, shape=None, **settings):
        x = params[0] if torch.is_tensor(params[0]) else params[0][0]
        return DiagLinearOperator(self.noise / x[:, -1])


def test_a_noise_model_of_ones_own_is_asked():
    likelihood = GaussianLikelihood().double()
    likelihood.noise_covar = NoiseOfAColumn().double()
    likelihood.noise = 0.6
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]).double()
    noise = noise_variances(likelihood, x, 3)
    torch.testing.assert_close(noise, torch.tensor([0.6, 0.3, 0.2]).double())
    assert noise.requires_grad


def test_noise_by_task_reads_the_task_of_a_column_or_of_an_input():
    x, _ = toy_data(N)
    i = torch.tensor([[0], [1], [1], [0], [1], [0]])
    likelihood = HadamardGaussianLikelihood(num_tasks=2, task_feature_index=2).double()
    likelihood.noise = torch.tensor([0.1, 0.7])
    expected = torch.tensor([0.1, 0.7, 0.7, 0.1, 0.7, 0.1]).double()
    column = noise_variances(likelihood, torch.cat([x, i], 1), N)
    torch.testing.assert_close(column, expected)
    for inputs in ((x, i), (i, x)):
        torch.testing.assert_close(noise_variances(likelihood, inputs, N), expected)
    assert column.requires_grad


def test_fixed_noise_may_differ_between_outputs():
    noise = torch.linspace(0.1, 0.9, 3 * N).double()
    likelihood = FixedNoiseGaussianLikelihood(noise.reshape(N, 3))
    x, _ = toy_data(N)
    torch.testing.assert_close(noise_variances(likelihood, x, N), noise)


def test_correlated_noise_of_tasks_is_refused():
    likelihood = MultitaskGaussianLikelihood(3, rank=1)
    with pytest.raises(ValueError, match=r"rank=1.*expected rank=0"):
        noise_variances(likelihood, torch.zeros(N, 2), N)


def test_likelihoods_that_are_not_gaussian_are_refused():
    with pytest.raises(TypeError, match="StudentTLikelihood"):
        noise_variances(StudentTLikelihood(), torch.zeros(N, 2), N)


def test_a_batch_of_noises_is_refused():
    likelihood = GaussianLikelihood(batch_shape=torch.Size([2]))
    with pytest.raises(ValueError, match="batch"):
        noise_variances(likelihood, torch.zeros(N, 2), N)
