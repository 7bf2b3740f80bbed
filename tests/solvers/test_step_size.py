"""Spectral estimates and the step rule."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.solvers.step_size import Spectrum, estimate_spectrum, step_rule
from sgdgp.solvers.system import as_system
from tests.solvers.problems import KERNELS, problem

ONES = torch.ones(1, 1)
SPECTRUM = Spectrum(largest=100.0, smallest=0.01, diagonal=ONES)


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix scaled to unit diagonal."""
    scale = matrix.diagonal().rsqrt()
    return scale[:, None] * matrix * scale


@pytest.mark.parametrize("n", [300, 1500])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_eigenvalue_is_not_underestimated(kernel, n):
    p = problem(kernel, n, noise=0.05)
    spectrum = estimate_spectrum(
        as_system(p.operator, p.noise, p.rhs), torch.Generator().manual_seed(0)
    )
    true = torch.linalg.eigvalsh(scaled(p.matrix))
    assert 0.95 < spectrum.largest / float(true[-1]) < 4.0
    assert spectrum.smallest <= float(true[0]) * (1 + 1e-9)
    torch.testing.assert_close(spectrum.diagonal[:, 0], p.matrix.diagonal())


def test_noise_per_row_enters_every_estimate():
    noise = torch.logspace(-3, 2, 100).double()
    p = problem("matern12", 100, noise=noise)
    spectrum = estimate_spectrum(
        as_system(p.operator, p.noise, p.rhs), torch.Generator().manual_seed(0)
    )
    true = torch.linalg.eigvalsh(scaled(p.matrix))
    assert float(true[-1]) <= spectrum.largest < 4.0 * float(true[-1])
    assert spectrum.smallest == pytest.approx(1e-3 / 1.001)
    assert spectrum.smallest <= float(true[0])


def test_one_point_has_an_exact_spectrum():
    p = problem("rbf", 1, noise=0.5)
    spectrum = estimate_spectrum(
        as_system(p.operator, p.noise, p.rhs), torch.Generator().manual_seed(0)
    )
    assert spectrum.largest == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_step_is_the_fraction_of_the_smaller_limit(momentum):
    mean = 2 * (1 + momentum) / ((1 + 2 * momentum) * 100.0)
    for block, noise in ((1000, math.inf), (10, 2 * (1 - momentum) / 99)):
        rule = step_rule(SPECTRUM, 1000, block, momentum=momentum, fraction=0.3)
        assert rule.step_size == pytest.approx(0.3 * min(mean, noise))
        assert rule.momentum == momentum


def test_a_full_block_gets_the_momentum_of_deterministic_acceleration():
    q = math.sqrt(0.01 / 100.0)
    rule = step_rule(SPECTRUM, 1000, 1000)
    assert rule.momentum == pytest.approx((1 - q) / (1 + q))


def test_momentum_falls_with_the_block_and_never_below_zero():
    found = [step_rule(SPECTRUM, 1000, b).momentum for b in (1000, 100, 50, 20, 1)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0.0
    assert found[1] == pytest.approx(1 - (2 / 3) * 9 / 100.0)


def test_pure_noise_needs_no_momentum():
    flat = Spectrum(largest=2.0, smallest=2.0, diagonal=ONES)
    rule = step_rule(flat, 100, 100)
    assert rule.momentum == 0.0
    assert rule.step_size == pytest.approx(0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("fraction", "stable"), [(0.99, True), (1.01, False)])
def test_the_limit_of_full_blocks_is_the_one_of_the_recurrence(
    momentum, fraction, stable
):
    # On the eigenvector of lambda_1 = 1: v <- rho v - beta (a + rho v), a <- a + v.
    unit = Spectrum(largest=1.0, smallest=0.1, diagonal=ONES)
    rule = step_rule(unit, 10, 10, momentum=momentum, fraction=fraction)
    rho, beta = momentum, rule.step_size
    step = torch.tensor(
        [[rho - beta * rho, -beta], [rho - beta * rho, 1 - beta]], dtype=torch.float64
    )
    radius = float(torch.linalg.eigvals(step).abs().max())
    assert (radius < 1.0) == stable
