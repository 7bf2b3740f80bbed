"""Maps of scaled, restricted, added and multiplied kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import (
    ConstantKernel,
    LinearKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
)
from hypothesis import given
from hypothesis import strategies as st

from sgdgp.features import (
    FourierFeatures,
    NoRandomFeatures,
    add,
    multiply,
    restrict,
    scale,
)
from sgdgp.features.compose import SumFeatures, TensorFeatures
from tests.features.kernels import (
    COMPOSITES,
    dense,
    features,
    points,
    rbf,
    restricted,
    scaled,
)

DIM = 3


@pytest.mark.parametrize("name", COMPOSITES)
def test_kernel_of_the_features_is_within_its_error_bars(name):
    kernel = COMPOSITES[name]()
    x = points(15, DIM)
    exact = dense(kernel, x)
    phi = features(kernel, DIM, 20_000)
    eye = torch.eye(15, dtype=torch.float64)
    error = phi.forward(x, phi.adjoint(x, eye)) - exact
    size = exact.diagonal().sqrt()
    assert (error / (size[:, None] * size)).abs().max() < 5.0 / math.sqrt(10_000)


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
    phi = features(COMPOSITES[name](), DIM, 100)
    assert isinstance(phi, kind)
    assert phi.num_features == count


def test_exact_composites_are_exact():
    kernel = (
        scaled(LinearKernel(), 0.4) * PolynomialKernel(2)
        + restricted(LinearKernel(), [1]) * ConstantKernel()
    )
    phi, x = features(kernel), points(8, DIM)
    assert phi.exact
    full = phi.features(x)
    torch.testing.assert_close(full @ full.T, dense(kernel, x), rtol=1e-10, atol=1e-10)


def test_factors_of_a_power_are_independent():
    base = PeriodicKernel()
    kernel, x = base * base, points(10, DIM)
    phi = features(kernel, DIM, 20_000).features(x)
    assert (phi @ phi.T - dense(kernel, x)).abs().max() < 0.05


def test_tensor_product_above_the_limit_is_refused():
    kernel = PolynomialKernel(5) * RBFKernel()
    with pytest.raises(NoRandomFeatures, match="tensor product of 56 by 20000"):
        features(kernel, DIM, 20_000)


def test_active_dims_outside_of_the_inputs_are_refused():
    with pytest.raises(ValueError, match=r"active_dims \[3\]"):
        features(RBFKernel(active_dims=[3]), DIM)


@given(st.floats(0.1, 4.0), st.floats(0.1, 4.0), st.integers(0, 50))
def test_algebra_of_maps_is_the_algebra_of_kernels(a, b, seed):
    """For the finite kernels of the maps themselves, without any randomness."""

    def gram(phi):
        full = phi.features(x)
        return full @ full.T

    x = points(6, DIM, seed)
    first, second = features(LinearKernel()), features(PolynomialKernel(2))
    third = features(rbf(3), DIM, 8, seed)
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
