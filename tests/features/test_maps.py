"""What every feature map promises: products, gradients, restriction, scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.features.kernels import points
from tests.features.maps import MAPS

EVERY = pytest.mark.parametrize("name", MAPS)
DIFFERENTIABLE = pytest.mark.parametrize(
    "name", [name for name, case in MAPS.items() if case.continuous]
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of an entry or two: every loop over them has several turns."""
    monkeypatch.setattr("sgdgp.core.slices.CPU_TILE", 2)


def moving(name, n, seed=1):
    """The continuous columns of points, and a function that puts in the others."""
    x = MAPS[name].points(n, seed)
    columns = MAPS[name].continuous
    fixed = x[:, columns:]
    return x[:, :columns].requires_grad_(), lambda free: torch.cat([free, fixed], 1)


@EVERY
@pytest.mark.parametrize("n", [0, 9])
@pytest.mark.usefixtures("small_tiles")
def test_products_are_those_of_the_features(name, n):
    phi, x = MAPS[name].make(12), MAPS[name].points(n, 1)
    w, v = points(phi.num_features, 2, 3), points(n, 2, 2)
    full = phi.features(x)
    assert full.shape == (n, phi.num_features)
    torch.testing.assert_close(phi.forward(x, w), full @ w)
    torch.testing.assert_close(phi.adjoint(x, v), full.mT @ v)


@given(
    st.sampled_from(list(MAPS)),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_adjoint_is_the_adjoint_of_forward(name, n, num_features, columns, seed):
    phi = MAPS[name].make(num_features)
    x, v = MAPS[name].points(n, seed), points(n, columns, seed + 1)
    w = points(phi.num_features, columns, seed + 2)
    left = (phi.forward(x, w) * v).sum()
    right = (w * phi.adjoint(x, v)).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(list(MAPS)), st.floats(-3, 3), st.floats(-3, 3))
def test_forward_is_linear_in_the_weights(name, a, b):
    phi, x = MAPS[name].make(12), MAPS[name].points(7, 1)
    w, u = points(phi.num_features, 2, 2), points(phi.num_features, 2, 3)
    torch.testing.assert_close(
        phi.forward(x, a * w + b * u),
        a * phi.forward(x, w) + b * phi.forward(x, u),
    )


@DIFFERENTIABLE
@pytest.mark.usefixtures("small_tiles")
def test_gradients_and_double_gradients_agree_with_finite_differences(name):
    phi = MAPS[name].make(4)
    x, whole = moving(name, 2)
    w, v = points(phi.num_features, 1, 2), points(2, 1, 5)
    for function, other in ((phi.forward, w), (phi.adjoint, v)):
        product = lambda x, y, f=function: f(whole(x), y)  # noqa: E731
        both = x, other.requires_grad_()
        assert torch.autograd.gradcheck(product, both)
        # All directions of a large map would take long: random ones.
        many = phi.num_features > 10
        assert torch.autograd.gradgradcheck(product, both, fast_mode=many)


@EVERY
def test_products_are_differentiable_in_weights_and_vectors(name):
    phi, x = MAPS[name].make(6), MAPS[name].points(4, 1)
    full = phi.features(x)
    w, v = points(phi.num_features, 2, 3), points(4, 2, 2)
    for product, other, size in (
        (phi.forward, w, full),
        (phi.adjoint, v, full.mT),
    ):
        other.requires_grad_()
        (gradient,) = torch.autograd.grad(product(x, other).square().sum(), other)
        truth = 2 * size.mT @ (size @ other)
        torch.testing.assert_close(gradient, truth.detach())


@EVERY
def test_functions_at_points_of_their_own_are_those_of_the_features(name):
    phi, count, own = MAPS[name].make(6), 4, 3
    x = MAPS[name].points(count * own, 1)
    x = x.view(count, own, x.shape[1])
    weights = points(count, phi.num_features, 2)
    found = phi.each(x, weights)
    assert found.shape == (count, own)
    for i in range(count):
        torch.testing.assert_close(found[i], phi.features(x[i]) @ weights[i])
    torch.testing.assert_close(phi.each(x[:1], weights[:1]), found[:1])
    assert phi.each(x[:0], weights[:0]).shape == (0, own)


@DIFFERENTIABLE
def test_functions_at_points_of_their_own_have_two_gradients(name):
    phi, count, own = MAPS[name].make(6), 3, 2
    free, whole = moving(name, count * own)
    weights = points(count, phi.num_features, 2)

    def together(free):
        return phi.each(whole(free).view(count, own, -1), weights)

    def one_by_one(free):
        parts = whole(free).view(count, own, -1)
        return torch.stack([phi.features(parts[i]) @ weights[i] for i in range(count)])

    (first, second), (one, two) = (
        gradients(function(free).sin().sum(), free)
        for function in (together, one_by_one)
    )
    torch.testing.assert_close(first, one)
    torch.testing.assert_close(second, two)
    # Without a graph of its own, the gradient may take another way.
    (plain,) = torch.autograd.grad(together(free).sin().sum(), free)
    torch.testing.assert_close(plain, one)


def gradients(value, x):
    """The gradient, and that of a function of it."""
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first.cos().sum(), x)
    return first.detach(), second


@EVERY
def test_a_restricted_map_is_the_map_of_these_columns(name):
    phi, x = MAPS[name].make(6), MAPS[name].points(5, 1)
    order = torch.arange(x.shape[1]).roll(1)
    wider = torch.cat([torch.full_like(x[:, :1], 0.5), x[:, order.argsort()]], 1)
    dims = 1 + order
    for restricted in (
        phi.restricted(dims),
        phi.restricted(order).restricted(1 + torch.arange(x.shape[1])),
    ):
        assert restricted.exact == phi.exact
        torch.testing.assert_close(restricted.features(wider), phi.features(x))


@EVERY
def test_a_scaled_map_is_that_of_a_multiple_of_the_kernel(name):
    phi, x = MAPS[name].make(6), MAPS[name].points(5, 1)
    w = points(phi.num_features, 2, 3)
    for scaled in (phi.scaled(2.5), phi.scaled(5.0).scaled(0.5)):
        assert scaled.exact == phi.exact
        assert scaled.num_features == phi.num_features
        torch.testing.assert_close(scaled.forward(x, w), 2.5**0.5 * phi.forward(x, w))


@EVERY
def test_wrong_shapes_are_named(name):
    phi, x = MAPS[name].make(6), MAPS[name].points(3, 1)
    count = phi.num_features
    with pytest.raises(ValueError, match=f"w must be a matrix with {count} rows"):
        phi.forward(x, points(count + 1, 1))
    with pytest.raises(ValueError, match="v must be a matrix with 3 rows"):
        phi.adjoint(x, points(2, 1))
