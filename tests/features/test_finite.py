"""Exact maps reproduce their kernels to rounding."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import ConstantKernel, LinearKernel, PolynomialKernel

from sgdgp.features import NoRandomFeatures, has_features, random_features
from tests.features.kernels import dense, points


def linear():
    kernel = LinearKernel()
    kernel.variance = 0.6
    return kernel


def linear_ard():
    kernel = LinearKernel(ard_num_dims=3)
    kernel.variance = torch.tensor([[0.3, 1.7, 0.9]])
    return kernel


def constant():
    kernel = ConstantKernel()
    kernel.constant = torch.tensor(1.8)
    return kernel


def polynomial(power):
    kernel = PolynomialKernel(power)
    kernel.offset = 0.7
    return kernel


EXACT = {
    "linear": linear,
    "linear with ARD": linear_ard,
    "constant": constant,
    "polynomial 0": lambda: polynomial(0),
    "polynomial 1": lambda: polynomial(1),
    "polynomial 2": lambda: polynomial(2),
    "polynomial 5": lambda: polynomial(5),
}


def features(kernel, dim=3):
    return random_features(
        kernel.double(),
        dim=dim,
        num_features=4,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", EXACT)
def test_kernel_of_the_features_is_the_kernel(name):
    kernel, x, z = EXACT[name](), points(12, 3), points(9, 3, seed=2)
    phi = features(kernel)
    assert phi.exact
    exact = dense(kernel, x, z)
    torch.testing.assert_close(
        phi.features(x) @ phi.features(z).T, exact, rtol=1e-10, atol=1e-10
    )
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(
        phi.forward(x, phi.adjoint(z, eye)), exact, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", EXACT)
def test_products_by_chunks_are_the_products(name, monkeypatch):
    monkeypatch.setattr("sgdgp.core.slices.CPU_TILE", 30)
    phi = features(EXACT[name]())
    x, v = points(11, 3), points(11, 2, seed=2)
    w = points(phi.num_features, 2, seed=3)
    torch.testing.assert_close(phi.forward(x, w), phi.features(x) @ w)
    torch.testing.assert_close(phi.adjoint(x, v), phi.features(x).T @ v)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_agree_with_finite_differences(name):
    phi = features(EXACT[name]())
    x, w = points(4, 3).requires_grad_(), points(phi.num_features, 2)
    assert torch.autograd.gradcheck(lambda a: phi.forward(a, w), (x,))
    assert torch.autograd.gradcheck(lambda a: phi.adjoint(a, w.new_ones(4, 1)), (x,))


def test_polynomial_with_too_many_monomials_is_refused():
    kernel = PolynomialKernel(4)
    assert has_features(kernel)
    with pytest.raises(NoRandomFeatures, match=r"46376 monomials.*limit of 20000"):
        features(kernel, dim=30)


def test_polynomial_with_a_broken_power_is_refused():
    with pytest.raises(NoRandomFeatures, match=r"power 1\.5"):
        features(PolynomialKernel(1.5))
