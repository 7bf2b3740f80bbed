"""Exact maps reproduce their kernels to rounding."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import PolynomialKernel

from sgdgp.features import NoRandomFeatures, has_features
from tests.features.kernels import EXACT, dense, features, points


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


def test_polynomial_with_too_many_monomials_is_refused():
    kernel = PolynomialKernel(4)
    assert has_features(kernel)
    with pytest.raises(NoRandomFeatures, match=r"46376 monomials.*limit of 20000"):
        features(kernel, dim=30)


def test_polynomial_with_a_broken_power_is_refused():
    with pytest.raises(NoRandomFeatures, match=r"power 1\.5"):
        features(PolynomialKernel(1.5))
