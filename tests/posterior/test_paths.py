"""Functions of several outputs, some of them or at points of their own; K(x, X) V."""

from __future__ import annotations

import gpytorch
import pytest
import torch

import sgdgp
from sgdgp.operators import choose_operator
from sgdgp.posterior.paths import PairPaths
from tests.models import FEATURE_KERNELS, toy_data

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


def test_function_transforms_give_derivatives_or_say_that_they_do_not(functions):
    x = _points(4)
    leaf = x.clone().requires_grad_()
    paths = functions.paths
    for value in (
        lambda z: paths.evaluate(paths.flattened(z)[0], deviations=False)[0].sum(),
        lambda z: paths.moments(paths.flattened(z)[0]).variance.sum(),
        lambda z: functions(z)[2].sum(),
    ):
        (slope,) = torch.autograd.grad(value(leaf), leaf)
        if isinstance(paths, PairPaths):
            with pytest.raises(TypeError, match=r"torch.func.*multitask"):
                torch.func.grad(value)(x)
        else:
            torch.testing.assert_close(torch.func.grad(value)(x), slope)
    for call in (functions, torch.func.grad(lambda z: functions(z).sum())):
        with pytest.raises(TypeError, match=r"x: torch.func.* is not supported"):
            torch.func.vmap(lambda z, call=call: call(z.unsqueeze(0)))(x)


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


@pytest.fixture(params=["matern_32", "periodic", "product", "active_dims"])
def problem(request, generator):
    kernel = FEATURE_KERNELS[request.param]().double().requires_grad_(False)
    x, _ = toy_data(40)
    x_new, _ = toy_data(9, seed=1)
    v = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    return choose_operator(kernel, x), x_new, v, kernel(x_new, x).to_dense() @ v


def gradient(operator, x_new, v):
    x_new = x_new.clone().requires_grad_()
    return torch.autograd.grad(operator.product_at(x_new, v).square().sum(), x_new)[0]


def test_product_is_that_of_the_dense_kernel(problem):
    operator, x_new, v, expected = problem
    product = operator.product_at(x_new, v)
    torch.testing.assert_close(product, expected)
    assert not product.requires_grad


def test_product_with_a_graph_is_the_same(problem):
    operator, x_new, v, expected = problem
    product = operator.product_at(x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product.detach(), expected)
    assert product.requires_grad


def test_no_graph_is_made_where_gradients_are_off(problem):
    operator, x_new, v, expected = problem
    with torch.no_grad():
        product = operator.product_at(x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product, expected)
    assert not product.requires_grad


@pytest.mark.parametrize("entries", [1, 9 * 7, 9 * 39])
def test_pieces_give_the_same_values_and_gradients(problem, monkeypatch, entries):
    operator, x_new, v, expected = problem
    whole = gradient(operator, x_new, v)
    monkeypatch.setattr("sgdgp.operators.base._ENTRIES_WITH_GRAPH", entries)
    product = operator.product_at(x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product.detach(), expected)
    torch.testing.assert_close(gradient(operator, x_new, v), whole)


def test_gradients_agree_with_finite_differences(problem):
    operator, x_new, v, _ = problem
    assert torch.autograd.gradcheck(
        lambda x: operator.product_at(x, v), x_new[:3].clone().requires_grad_()
    )


def test_no_points_give_an_empty_product(problem):
    operator, x_new, v, _ = problem
    assert operator.product_at(x_new[:0], v).shape == (0, 3)
    assert operator.product_at(x_new[:0].requires_grad_(), v).shape == (0, 3)
