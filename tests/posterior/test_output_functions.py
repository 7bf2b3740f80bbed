"""Functions of several outputs: some of them, and each at points of its own."""

from __future__ import annotations

import gpytorch
import pytest
import torch

import sgdgp

CASES = ("independent", "gaps", "multitask")


class _Correlated(gpytorch.models.ExactGP):
    def __init__(self) -> None:
        likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2)
        super().__init__(None, None, likelihood)
        self.mean_module = gpytorch.means.MultitaskMean(
            gpytorch.means.ConstantMean(), num_tasks=2
        )
        self.covar_module = gpytorch.kernels.MultitaskKernel(
            gpytorch.kernels.MaternKernel(), num_tasks=2, rank=1
        )

    def forward(self, x):
        return gpytorch.distributions.MultitaskMultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


class _Single(gpytorch.models.ExactGP):
    def __init__(self) -> None:
        super().__init__(None, None, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.RBFKernel()

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


@pytest.fixture(scope="module", params=CASES)
def functions(request):
    """Six functions of two outputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sum(1).sin(), 3 + x.prod(1)], dim=1)
    if request.param == "gaps":
        y[:5, 1] = float("nan")
    torch.manual_seed(0)
    model = (_Correlated() if request.param == "multitask" else _Single()).double()
    return sgdgp.condition(model, x, y, num_samples=6, num_features=64).functions


def _points(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, 3, generator=generator, dtype=torch.float64)


def test_each_function_is_evaluated_at_its_own_points(functions):
    x = _points(6, 4)
    expected = torch.stack([functions(x[i])[i] for i in range(6)])
    torch.testing.assert_close(functions.each(x), expected)


def test_each_is_differentiable(functions):
    x = _points(6, 2).requires_grad_()
    (slope,) = torch.autograd.grad(functions.each(x).sum(), x)
    together = sum(functions(x[i])[i].sum() for i in range(6))
    (expected,) = torch.autograd.grad(together, x)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_some_functions_are_those_of_these_numbers(functions):
    x, numbers = _points(4), [4, 0, 4]
    some = functions.subset(numbers)
    assert (functions.num_functions, some.num_functions) == (6, 3)
    torch.testing.assert_close(some(x), functions(x)[numbers])
    own = _points(3, 2)
    expected = torch.stack([some(own[i])[i] for i in range(3)])
    torch.testing.assert_close(some.each(own), expected)


def test_numbers_and_shapes_that_do_not_fit_are_named(functions):
    with pytest.raises(IndexError, match="0 to 5"):
        functions.subset([6])
    with pytest.raises(ValueError, match=r"\(6, q, 3\)"):
        functions.each(_points(5, 4))
    with pytest.raises(ValueError, match=r"\(6, q, 3\)"):
        functions.each(_points(6, 4)[..., :2])
