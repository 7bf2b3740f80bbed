"""Feature draws at points of each function's own, against the features themselves."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)

from sgdgp.features import fourier, random_features

COUNT, OWN, DIM = 5, 3, 3

KERNELS = {
    "matern": lambda: MaternKernel(nu=1.5),
    "scaled": lambda: ScaleKernel(RBFKernel()),
    "of some inputs": lambda: ScaleKernel(MaternKernel(active_dims=[2, 0])),
    "sum": lambda: ScaleKernel(RBFKernel()) + MaternKernel(active_dims=[1]),
    "product": lambda: LinearKernel() * RBFKernel(),
    "periodic": PeriodicKernel,
    "polynomial": lambda: PolynomialKernel(2),
}


def problem(name):
    generator = torch.Generator().manual_seed(0)
    phi = random_features(
        KERNELS[name]().double(),
        dim=DIM,
        num_features=64,
        generator=generator,
        dtype=torch.float64,
    )
    like = {"generator": generator, "dtype": torch.float64}
    x = torch.rand(COUNT, OWN, DIM, **like).requires_grad_()
    return phi, x, torch.randn(COUNT, phi.num_features, **like)


def written_out(phi, x, weights):
    return torch.stack([phi.features(x[i]) @ weights[i] for i in range(COUNT)])


def gradient(values, x, **settings):
    (found,) = torch.autograd.grad(values.sin().sum(), x, **settings)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients_are_those_of_the_features(name):
    phi, x, weights = problem(name)
    found, expected = phi.each(x, weights), written_out(phi, x, weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x))
    with torch.no_grad():
        torch.testing.assert_close(phi.each(x, weights), expected)


@pytest.mark.parametrize("name", ["matern", "sum", "product"])
def test_the_gradient_has_a_gradient(name):
    phi, x, weights = problem(name)
    found, expected = (
        gradient(gradient(values, x, create_graph=True), x)
        for values in (phi.each(x, weights), written_out(phi, x, weights))
    )
    torch.testing.assert_close(found, expected)


def test_tiles_add_up(monkeypatch):
    phi, x, weights = problem("matern")
    whole = phi.each(x, weights)
    slope = gradient(whole, x)
    monkeypatch.setattr(fourier, "_ROWS", 2 * OWN)
    monkeypatch.setattr(fourier, "_TILE_CPU", 40)
    parts = phi.each(x, weights)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, x), slope)


def test_no_functions_are_no_values():
    phi, x, weights = problem("scaled")
    assert phi.each(x[:0], weights[:0]).shape == (0, OWN)
