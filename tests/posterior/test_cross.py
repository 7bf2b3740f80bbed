"""K(X_new, X) V for prediction: the same with a graph, without, and in pieces."""

from __future__ import annotations

import pytest
import torch

from sgdgp.operators import choose_operator
from sgdgp.posterior.paths import cross_product
from tests.models import FEATURE_KERNELS, toy_data


@pytest.fixture(params=["matern_32", "periodic", "product", "active_dims"])
def problem(request, generator):
    kernel = FEATURE_KERNELS[request.param]().double().requires_grad_(False)
    x, _ = toy_data(40)
    x_new, _ = toy_data(9, seed=1)
    v = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    return choose_operator(kernel, x), x_new, v, kernel(x_new, x).to_dense() @ v


def gradient(operator, x_new, v):
    x_new = x_new.clone().requires_grad_()
    return torch.autograd.grad(cross_product(operator, x_new, v).square().sum(), x_new)[
        0
    ]


def test_product_is_that_of_the_dense_kernel(problem):
    operator, x_new, v, expected = problem
    product = cross_product(operator, x_new, v)
    torch.testing.assert_close(product, expected)
    assert not product.requires_grad


def test_product_with_a_graph_is_the_same(problem):
    operator, x_new, v, expected = problem
    product = cross_product(operator, x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product.detach(), expected)
    assert product.requires_grad


def test_no_graph_is_made_where_gradients_are_off(problem):
    operator, x_new, v, expected = problem
    with torch.no_grad():
        product = cross_product(operator, x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product, expected)
    assert not product.requires_grad


@pytest.mark.parametrize("entries", [1, 9 * 7, 9 * 39])
def test_pieces_give_the_same_values_and_gradients(problem, monkeypatch, entries):
    operator, x_new, v, expected = problem
    whole = gradient(operator, x_new, v)
    monkeypatch.setattr("sgdgp.posterior.paths._ENTRIES", entries)
    product = cross_product(operator, x_new.clone().requires_grad_(), v)
    torch.testing.assert_close(product.detach(), expected)
    torch.testing.assert_close(gradient(operator, x_new, v), whole)


def test_gradients_agree_with_finite_differences(problem):
    operator, x_new, v, _ = problem
    assert torch.autograd.gradcheck(
        lambda x: cross_product(operator, x, v), x_new[:3].clone().requires_grad_()
    )


def test_no_points_give_an_empty_product(problem):
    operator, x_new, v, _ = problem
    assert cross_product(operator, x_new[:0], v).shape == (0, 3)
    assert cross_product(operator, x_new[:0].requires_grad_(), v).shape == (0, 3)
