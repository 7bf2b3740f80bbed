"""Maps of scaled, restricted, added and multiplied kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    LinearKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from hypothesis import given
from hypothesis import strategies as st

from sgdgp.features import (
    FourierFeatures,
    NoRandomFeatures,
    add,
    multiply,
    random_features,
    restrict,
    scale,
)
from sgdgp.features.compose import SumFeatures, TensorFeatures
from tests.features.kernels import dense, matern, periodic, points, rbf

DIM = 3


def scaled(kernel, value, **kwargs):
    outer = ScaleKernel(kernel, **kwargs)
    outer.outputscale = value
    return outer


def restricted(kernel, dims):
    kernel.register_buffer("active_dims", torch.tensor(dims))
    return kernel


COMPOSITES = {
    "scale": lambda: scaled(rbf(3), 2.5),
    "scale of scale": lambda: scaled(scaled(rbf(3), 0.5), 3.0),
    "active dims": lambda: restricted(matern(1.5, 2), [2, 0]),
    "scale of active dims": lambda: scaled(restricted(rbf(2), [2, 0]), 1.5),
    "scale with active dims": lambda: scaled(rbf(2), 1.5, active_dims=(2, 0)),
    "scale and base with other active dims": lambda: restricted(
        scaled(restricted(rbf(2), [2, 0]), 1.5), [0, 1]
    ),
    "outer and inner active dims": lambda: restricted(
        AdditiveKernel(restricted(rbf(1), [1]), restricted(LinearKernel(), [0])),
        [2, 0],
    ),
    "sum": lambda: scaled(rbf(3), 0.8) + scaled(matern(0.5, 3), 0.5) + LinearKernel(),
    "scale of sum": lambda: scaled(rbf(3) + periodic(3), 0.4),
    "stationary product": lambda: rbf(3) * periodic(3),
    "product over dimensions": lambda: (
        restricted(rbf(1), [0]) * restricted(matern(2.5, 2), [2, 1])
    ),
    "product that leaves a dimension out": lambda: (
        restricted(rbf(1), [2]) * restricted(periodic(1), [0])
    ),
    "product of scales": lambda: scaled(rbf(3), 2.0) * scaled(matern(1.5, 3), 0.3),
    "linear times stationary": lambda: LinearKernel() * rbf(3),
    "linear times two stationary": lambda: LinearKernel() * rbf(3) * periodic(3),
    "stationary times polynomial": lambda: rbf(3) * scaled(PolynomialKernel(2), 0.1),
    "two exact and one stationary": lambda: (
        restricted(LinearKernel(), [1]) * rbf(3) * PolynomialKernel(1)
    ),
    "constant times stationary": lambda: ConstantKernel() * rbf(3),
    "product of sums": lambda: (
        AdditiveKernel(scaled(rbf(3), 0.5), LinearKernel())
        * AdditiveKernel(matern(2.5, 3), ConstantKernel())
    ),
    "exact sum times stationary": lambda: (
        AdditiveKernel(LinearKernel(), ConstantKernel()) * rbf(3)
    ),
}


def features(kernel, num_features=20_000, seed=0):
    return random_features(
        kernel.double(),
        dim=DIM,
        num_features=num_features,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", COMPOSITES)
def test_kernel_of_the_features_is_within_its_error_bars(name):
    kernel = COMPOSITES[name]()
    x = points(15, DIM)
    exact = dense(kernel, x)
    phi = features(kernel)
    eye = torch.eye(15, dtype=torch.float64)
    error = phi.forward(x, phi.adjoint(x, eye)) - exact
    size = exact.diagonal().sqrt()
    assert (error / (size[:, None] * size)).abs().max() < 5.0 / math.sqrt(10_000)


@pytest.mark.parametrize("name", COMPOSITES)
def test_products_agree_with_the_features_themselves(name, monkeypatch):
    monkeypatch.setattr("sgdgp.core.slices.CPU_TILE", 4)
    phi = features(COMPOSITES[name](), 6)
    x, v = points(9, DIM), points(9, 2, seed=2)
    w = points(phi.num_features, 2, seed=3)
    full = phi.features(x)
    assert full.shape == (9, phi.num_features)
    torch.testing.assert_close(phi.forward(x, w), full @ w)
    torch.testing.assert_close(phi.adjoint(x, v), full.T @ v)


@pytest.mark.parametrize("name", COMPOSITES)
def test_gradients_agree_with_finite_differences(name, monkeypatch):
    monkeypatch.setattr("sgdgp.core.slices.CPU_TILE", 4)
    phi = features(COMPOSITES[name](), 4)
    x, w = points(3, DIM).requires_grad_(), points(phi.num_features, 1)
    assert torch.autograd.gradcheck(lambda a: phi.forward(a, w), (x,))
    assert torch.autograd.gradgradcheck(lambda a: phi.forward(a, w), (x,))
    v = points(3, 1, seed=5)
    assert torch.autograd.gradcheck(lambda a: phi.adjoint(a, v), (x,))


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("scale", FourierFeatures, 100),
        ("stationary product", FourierFeatures, 100),
        ("product over dimensions", FourierFeatures, 100),
        ("sum", SumFeatures, 203),
        ("linear times two stationary", TensorFeatures, 300),
        ("two exact and one stationary", TensorFeatures, 400),
        ("constant times stationary", FourierFeatures, 100),
        ("exact sum times stationary", TensorFeatures, 400),
        ("product of sums", SumFeatures, 100 + 100 + 300 + 3),
    ],
)
def test_products_keep_the_cheapest_structure(name, kind, count):
    phi = features(COMPOSITES[name](), 100)
    assert isinstance(phi, kind)
    assert phi.num_features == count


def test_exact_composites_are_exact():
    kernel = (
        scaled(LinearKernel(), 0.4) * PolynomialKernel(2)
        + restricted(LinearKernel(), [1]) * ConstantKernel()
    )
    phi, x = features(kernel, 5), points(8, DIM)
    assert phi.exact
    full = phi.features(x)
    torch.testing.assert_close(full @ full.T, dense(kernel, x), rtol=1e-10, atol=1e-10)


def test_factors_of_a_power_are_independent():
    base = PeriodicKernel()
    kernel, x = base * base, points(10, DIM)
    phi = features(kernel).features(x)
    assert (phi @ phi.T - dense(kernel, x)).abs().max() < 0.05


def test_tensor_product_above_the_limit_is_refused():
    kernel = PolynomialKernel(5) * RBFKernel()
    with pytest.raises(NoRandomFeatures, match="tensor product of 56 by 20000"):
        features(kernel)


def test_active_dims_outside_of_the_inputs_are_refused():
    with pytest.raises(ValueError, match=r"active_dims \[3\]"):
        features(RBFKernel(active_dims=[3]))


@given(st.floats(0.1, 4.0), st.floats(0.1, 4.0), st.integers(0, 50))
def test_algebra_of_maps_is_the_algebra_of_kernels(a, b, seed):
    """For the finite kernels of the maps themselves, without any randomness."""

    def gram(phi):
        full = phi.features(x)
        return full @ full.T

    x = points(6, DIM, seed)
    first, second = features(LinearKernel(), 2), features(PolynomialKernel(2), 2)
    third = features(rbf(3), 8, seed)
    torch.testing.assert_close(gram(scale(third, a)), a * gram(third))
    torch.testing.assert_close(
        gram(add(scale(first, a), scale(second, b), third)),
        a * gram(first) + b * gram(second) + gram(third),
    )
    torch.testing.assert_close(
        gram(multiply(add(first, second), scale(third, b), dim=DIM)),
        b * (gram(first) + gram(second)) * gram(third),
    )
    dims = torch.tensor([1, 2, 0])
    whole = multiply(first, third, dim=DIM)
    permuted, original = restrict(whole, dims).features(x), whole.features(x[:, dims])
    torch.testing.assert_close(permuted, original)
