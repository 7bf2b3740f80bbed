"""Effective dimensions from samples, and the fixed point of the precisions."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.networks.expectation_maximisation import (
    SMALLEST_DIMENSION,
    PrecisionUpdate,
    effective_dimension,
)


def ridge(alpha: float, features: torch.Tensor, y: torch.Tensor):
    """Exact gamma and |v|^2 of Bayesian linear regression with unit noise."""
    scaled = features / math.sqrt(alpha)
    gram = scaled.T @ scaled
    eye = torch.eye(len(gram), dtype=gram.dtype)
    covariance = torch.linalg.inv(gram + eye)
    mean = covariance @ scaled.T @ y
    return torch.trace(covariance @ gram), mean.square().sum()


def evidence(alpha: torch.Tensor, features: torch.Tensor, y: torch.Tensor):
    covariance = features @ features.T / alpha + torch.eye(len(y), dtype=y.dtype)
    zero = torch.zeros_like(y)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(y)


@pytest.fixture
def regression():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 25, generator=generator, dtype=torch.float64)
    features *= torch.linspace(0.1, 2.0, 25, dtype=torch.float64)
    weights = torch.randn(25, generator=generator, dtype=torch.float64) / 2
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    return features, features @ weights + noise


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e5])
def test_updates_reach_the_stationary_point_of_the_evidence(regression, start):
    features, y = regression
    update, alpha = PrecisionUpdate(), torch.tensor([start], dtype=torch.float64)
    for steps in range(30):  # noqa: B007
        gamma, squares = ridge(float(alpha), features, y)
        alpha = update(alpha, gamma.reshape(1), squares.reshape(1))
        if update.has_settled:
            break
    assert steps < 12
    alpha = alpha.clone().requires_grad_()
    (slope,) = torch.autograd.grad(evidence(alpha, features, y), alpha)
    (steep,) = torch.autograd.grad(
        evidence(2 * alpha, features, y), alpha, retain_graph=False
    )
    assert abs(float(slope)) < 0.03 * abs(float(steep))


def test_swinging_maps_are_damped():
    # alpha -> alpha^-0.9: plain iteration needs dozens of steps to settle at one.
    update, alpha = PrecisionUpdate(), torch.tensor([50.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for steps in range(20):  # noqa: B007
        alpha = update(alpha, alpha**-1.9 * one, one)
        if update.has_settled:
            break
    assert steps < 6
    torch.testing.assert_close(alpha, one, rtol=0.02, atol=0.0)


def test_groups_without_evidence_do_not_keep_it_from_settling():
    update = PrecisionUpdate()
    alpha = torch.ones(2, dtype=torch.float64)
    for _ in range(8):
        # The second group's weights are all but undetermined, its optimum near zero.
        gamma = torch.tensor([10.0, 1e-2 / float(alpha[1])], dtype=torch.float64)
        squares = torch.tensor([10.0, 1e-9], dtype=torch.float64)
        alpha = update(alpha, gamma, squares)
    assert update.has_settled
    assert bool(torch.isfinite(alpha).all())


def test_data_that_determine_nothing_settle_at_a_finite_precision():
    update, alpha = PrecisionUpdate(), torch.ones(1, dtype=torch.float64)
    for _ in range(12):
        gamma = (1.0 / alpha).clamp_min(SMALLEST_DIMENSION)
        alpha = update(alpha, gamma, 0.5 / alpha)
    assert update.has_settled
    assert 1e3 <= float(alpha) < 1e6


def test_effective_dimension_of_exact_samples(regression):
    features, y = regression
    gamma, _ = ridge(1.0, features, y)
    gram = features.T @ features
    covariance = torch.linalg.inv(gram + torch.eye(25, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(covariance)
    noise = torch.randn(25, 4000, generator=generator, dtype=torch.float64)
    samples = root @ noise
    products = samples * (gram @ samples)
    groups = torch.stack([products[:10].sum(0), products[10:].sum(0)])
    found = effective_dimension(groups, [10, 15])
    assert abs(found.total - float(gamma)) < 4 * found.standard_error
    assert found.standard_error < 0.02 * float(gamma)
    blocks = (covariance @ gram).diagonal()
    torch.testing.assert_close(
        found.groups,
        torch.stack([blocks[:10].sum(), blocks[10:].sum()]),
        rtol=0.03,
        atol=0.0,
    )


def test_estimates_stay_within_the_size_of_a_group():
    products = torch.tensor([[-1.0, -2.0], [30.0, 40.0]])
    found = effective_dimension(products, [5, 20])
    assert found.groups.tolist() == [1e-3, 20.0]
