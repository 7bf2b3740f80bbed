"""Spectral estimates and the step rule."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.solvers.step_size import Spectrum, estimate_spectrum, step_rule
from sgdgp.solvers.system import as_system
from tests.solvers.problems import KERNELS, problem

ONES = torch.ones(1000, 1, dtype=torch.float64)


def spectrum_of(leading: list[float], rest: float, smallest: float) -> Spectrum:
    """A thousand eigenvalues, all but the leading ones the same."""
    return Spectrum(
        leading=torch.tensor(leading, dtype=torch.float64),
        rest=rest,
        smallest=smallest,
        diagonal=ONES,
    )


SPECTRUM = spectrum_of([100.0], 900.0 / 999.0, 0.01)


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
def test_the_step_is_the_fraction_of_the_joint_limit(momentum):
    mean = 2 * (1 + momentum) / ((1 + 2 * momentum) * 100.0)
    assert SPECTRUM.tail(20.0) == pytest.approx(0.92)
    for block, noise in ((1000, math.inf), (10, 2 * (1 - momentum) / (99 * 0.92))):
        rule = step_rule(SPECTRUM, block, momentum=momentum, fraction=0.3)
        assert rule.step_size == pytest.approx(0.3 / (1 / mean + 1 / noise))
        assert rule.momentum == momentum


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("block", [1000, 100, 10])
def test_the_default_step_keeps_a_distance_from_the_limit(momentum, block):
    limit = step_rule(SPECTRUM, block, momentum=momentum, fraction=1.0).step_size
    found = step_rule(SPECTRUM, block, momentum=momentum).step_size
    assert 0.59 < found / limit < 0.81


def test_a_subset_gives_the_tail_of_all():
    p = problem("rbf", 3000, noise=0.1, dtype=torch.float32)
    system = as_system(p.operator, p.noise, p.rhs)
    spectrum = estimate_spectrum(system, torch.Generator().manual_seed(0))
    true = torch.linalg.eigvalsh(scaled(p.matrix))
    for threshold in (1.0, 10.0, 1e6):
        expected = float(true.clamp_max(threshold).mean())
        assert spectrum.tail(threshold) == pytest.approx(expected, rel=0.1)


def test_a_full_block_ends_with_the_momentum_of_deterministic_acceleration():
    q = math.sqrt(0.01 / 100.0)
    rule = step_rule(SPECTRUM, 1000)
    assert rule.momentum == pytest.approx((1 - q) / (1 + q))


def test_a_full_block_begins_with_the_schedule_of_nesterov():
    for passes in (1.0, 10.0, 50.0):
        rule = step_rule(SPECTRUM, 1000, passes)
        assert rule.momentum == pytest.approx(passes / (passes + 3.0))


def test_momentum_grows_with_the_passes_and_the_step_falls():
    rules = [step_rule(SPECTRUM, 20, float(p)) for p in (1, 4, 16, 64, 256, 4096)]
    momenta = [rule.momentum for rule in rules]
    steps = [rule.step_size for rule in rules]
    assert momenta == sorted(momenta)
    assert steps == sorted(steps, reverse=True)
    # Four times the passes, twice the memory.
    memories = [1.0 / (1.0 - momentum) for momentum in momenta]
    assert memories[3] / memories[2] == pytest.approx(2.0)


def test_a_long_memory_needs_a_large_eigenvalue():
    small, large = (
        step_rule(spectrum_of([value], 0.5, 0.01), 20, 10.0).momentum
        for value in (20.0, 500.0)
    )
    assert small < large


def test_pure_noise_needs_no_momentum():
    flat = spectrum_of([1.0], 1.0, 1.0)
    rule = step_rule(flat, 1000)
    assert rule.momentum == 0.0
    # On H = I, one step with beta = 1 is exact.
    assert rule.step_size == pytest.approx(1.04)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("fraction", "stable"), [(0.99, True), (1.01, False)])
def test_the_limit_of_full_blocks_is_the_one_of_the_recurrence(
    momentum, fraction, stable
):
    # On the eigenvector of lambda_1 = 1: v <- rho v - beta (a + rho v), a <- a + v.
    unit = spectrum_of([1.0], 1.0, 0.1)
    rule = step_rule(unit, 1000, momentum=momentum, fraction=fraction)
    rho, beta = momentum, rule.step_size
    step = torch.tensor(
        [[rho - beta * rho, -beta], [rho - beta * rho, 1 - beta]], dtype=torch.float64
    )
    radius = float(torch.linalg.eigvals(step).abs().max())
    assert (radius < 1.0) == stable
