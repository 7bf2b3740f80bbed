"""Products of every column at points of its own, against dense kernels."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

from sgdgp.operators import choose_operator
from sgdgp.posterior import own_points
from sgdgp.posterior.own_points import own_products

N, COUNT, OWN = 83, 4, 3

STATIONARY = {
    "matern-1/2": lambda d: MaternKernel(nu=0.5),
    "matern-3/2 scaled": lambda d: ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=d)),
    "matern-5/2": lambda d: MaternKernel(nu=2.5),
    "rbf of some inputs": lambda d: ScaleKernel(RBFKernel(active_dims=[1, 0])),
    "rational quadratic": lambda d: ScaleKernel(RQKernel()),
}
OTHERS = {
    "sum": lambda d: ScaleKernel(RBFKernel()) + LinearKernel(),
    "periodic": lambda d: PeriodicKernel(),
}


def problem(kernel, d, seed=0):
    kernel = kernel(d).double().requires_grad_(requires_grad=False)
    for part in kernel.modules():
        if getattr(part, "has_lengthscale", False):
            part.lengthscale = torch.linspace(0.5, 0.9, part.lengthscale.shape[-1])
        if isinstance(part, ScaleKernel):
            part.outputscale = 1.7
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, d, generator=generator, dtype=torch.float64)
    v = torch.randn(N, COUNT, generator=generator, dtype=torch.float64)
    own = torch.rand(COUNT, OWN, d, generator=generator, dtype=torch.float64)
    return kernel, x, v, own.requires_grad_()


def dense(kernel, x, v, own):
    products = [kernel(own[i], x).to_dense() @ v[:, i] for i in range(COUNT)]
    return torch.stack(products)


def gradient(values, own, **settings):
    (found,) = torch.autograd.grad(values.sin().sum(), own, **settings)
    return found


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("name", [*STATIONARY, *OTHERS])
def test_values_and_gradients_are_those_of_the_dense_kernel(name, d):
    kernel, x, v, own = problem({**STATIONARY, **OTHERS}[name], d)
    found = own_products(choose_operator(kernel, x), own, v)
    expected = dense(kernel, x, v, own)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        gradient(found, own), gradient(expected, own), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("name", [*STATIONARY, *OTHERS])
def test_values_without_a_graph_are_the_same(name):
    kernel, x, v, own = problem({**STATIONARY, **OTHERS}[name], 4)
    operator = choose_operator(kernel, x)
    with torch.no_grad():
        without = own_products(operator, own, v)
    assert not without.requires_grad
    torch.testing.assert_close(without, own_products(operator, own, v).detach())


@pytest.mark.parametrize("name", ["rbf of some inputs", "matern-5/2", "sum"])
def test_the_gradient_has_a_gradient(name):
    kernel, x, v, own = problem({**STATIONARY, **OTHERS}[name], 4)
    operator = choose_operator(kernel, x)
    curvatures = [
        gradient(gradient(values, own, create_graph=True), own)
        for values in (own_products(operator, own, v), dense(kernel, x, v, own))
    ]
    torch.testing.assert_close(*curvatures, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", STATIONARY)
def test_tiles_add_up(name, monkeypatch):
    kernel, x, v, own = problem(STATIONARY[name], 4)
    operator = choose_operator(kernel, x)
    whole = own_products(operator, own, v)
    slope = gradient(whole, own)
    monkeypatch.setattr(own_points, "_ROWS", 2 * OWN)
    monkeypatch.setattr(own_points, "_ENTRIES_CPU", 100)
    parts = own_products(operator, own, v)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, own), slope)


def test_blocks_add_up(monkeypatch):
    kernel, x, v, own = problem(OTHERS["sum"], 4)
    operator = choose_operator(kernel, x)
    whole = own_products(operator, own, v)
    slope = gradient(whole, own)
    monkeypatch.setattr(own_points, "_BLOCK", 50)
    parts = own_products(operator, own, v)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, own), slope)


@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("name", ["matern-1/2", "matern-3/2 scaled", "matern-5/2"])
def test_a_training_point_itself_has_a_finite_gradient_without_its_own_part(name, d):
    kernel, x, v, own = problem(STATIONARY[name], d)
    with torch.no_grad():
        own[0, 0] = x[7]
    others = torch.arange(N) != 7
    found = gradient(own_products(choose_operator(kernel, x), own, v), own)[0, 0]
    # The kernel is flat there, or has a kink whose directions cancel.
    part = kernel(own[0, :1], x[others]).to_dense() @ v[others, 0]
    (slope,) = torch.autograd.grad(part, own)
    value = kernel(own[0, :1], x).to_dense() @ v[:, 0]
    torch.testing.assert_close(found, value.cos() * slope[0, 0], rtol=1e-6, atol=1e-6)


def test_in_single_precision_the_error_is_that_of_rounding():
    kernel, x, v, own = problem(STATIONARY["matern-3/2 scaled"], 8)
    expected = dense(kernel, x, v, own)
    single = own.detach().float().requires_grad_()
    operator = choose_operator(kernel.float(), x.float())
    found = own_products(operator, single, v.float())
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    error = gradient(found, single) - gradient(expected, own)
    assert (
        error.abs().max()
        < 5e-5 * gradient(dense(kernel.double(), x, v, own), own).abs().max()
    )


def test_no_columns_are_no_values():
    kernel, x, v, own = problem(STATIONARY["matern-5/2"], 3)
    operator = choose_operator(kernel, x)
    assert own_products(operator, own[:0], v[:, :0]).shape == (0, OWN)
