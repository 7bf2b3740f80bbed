"""Stochastic dual descent: agreement, its own settings, and the guard."""

from __future__ import annotations

import pytest
import torch

from sgdgp.solvers import SDD
from sgdgp.solvers.sdd import default_block_size
from sgdgp.solvers.step_size import estimate_spectrum, step_rule
from sgdgp.solvers.system import as_system
from tests.solvers.problems import (
    KERNELS,
    Problem,
    problem,
    relative_error,
)

# A few large eigenvalues far above the noise are what a stochastic method is slow
# at: full blocks, hence the acceleration of a deterministic method, are needed for
# eight digits (14,000 passes and more with the default block; 6,058 with this one).
# Nearly all but the noise of the polynomial kernel is in a few large eigenvalues: the
# slowest case there is, so it gets more noise and larger blocks.
SETTINGS = {"polynomial": {"block_size": 150, "max_passes": 5000.0}}
NOISE = {"polynomial": 1.0}

# Passes to a residual of 1e-8 at n = 300 and noise 0.1 with the default settings.
MEASURED = {"linear": 2000, "constant": 1200, "active_dims": 1000, "scale": 800}


# Tiles of every kernel are compared in tests/operators; three are enough to solve with.
@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        *((kernel, "dense") for kernel in KERNELS),
        *((kernel, "tiled") for kernel in ("ard", "scale", "sum")),
    ],
)
def test_it_agrees_with_the_dense_solution(kernel, operator):
    p = problem(kernel, 300, noise=NOISE.get(kernel, 0.1), operator=operator)
    settings = {"max_passes": 3000.0, **SETTINGS.get(kernel, {})}
    found = p.solve(SDD(tolerance=2e-8, **settings))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6
    assert found.settings["restarts"] == 0
    if kernel not in SETTINGS:
        assert found.passes <= MEASURED.get(kernel, 500)


@pytest.mark.parametrize("kernel", ["matern12", "constant"])
def test_it_agrees_with_the_dense_solution_at_a_thousand_points(kernel):
    p = problem(kernel, 1000, noise=0.1)
    found = p.solve(SDD(tolerance=2e-8))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [1, 7, 33, 50, 100])
def test_any_block_size_and_momentum_reach_the_same_answer(block_size, momentum):
    p = problem("matern12", 50, noise=0.3)
    found = p.solve(SDD(tolerance=1e-8, block_size=block_size, momentum=momentum))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6
    assert found.settings["momentum"] == momentum
    assert found.settings["block_size"] <= min(block_size, 50)


@pytest.mark.parametrize(("n", "block"), [(10, 64), (6400, 100), (10**6, 512)])
def test_the_default_block_grows_with_n_within_bounds(n, block):
    assert default_block_size(n) == block


def _limit(p: Problem, block_size: int, momentum: float) -> float:
    system = as_system(p.operator, p.noise, p.rhs)
    spectrum = estimate_spectrum(system, torch.Generator().manual_seed(0))
    rule = step_rule(spectrum, block_size, momentum=momentum, fraction=1.0)
    return rule.step_size


# With full blocks the limit is exact; with small ones the prediction is on the safe
# side, the more so the longer the momentum remembers.
@pytest.mark.parametrize(
    ("block_size", "stable", "unstable"),
    [(300, 0.95, 1.1), (100, 0.9, 1.6), (30, 0.9, 2.2)],
)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kernel", ["matern32", "rbf"])
def test_the_predicted_limit_of_the_step_size_holds(
    kernel, momentum, block_size, stable, unstable
):
    p = problem(kernel, 300, noise=0.05)
    limit = _limit(p, block_size, momentum)
    restarts = [
        p.solve(
            SDD(
                block_size=block_size,
                momentum=momentum,
                step_size=fraction * limit,
                tolerance=1e-3,
                max_passes=60.0,
            )
        ).settings["restarts"]
        for fraction in (stable, unstable)
    ]
    assert restarts[0] == 0
    assert restarts[1] > 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_restart_never_goes_back_to_something_worse_than_the_start(momentum):
    p = problem("matern32", 300)
    limit = _limit(p, 100, momentum)
    found = p.solve(SDD(block_size=100, momentum=momentum, step_size=2.0 * limit))
    assert found.reason == "converged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["rbf", "matern32", "scale"])
def test_noise_of_one_thousandth_diverges_nowhere(kernel, dtype):
    p = problem(kernel, 300, noise=1e-6, dtype=dtype)
    found = p.solve(SDD(max_passes=120.0))
    assert torch.isfinite(found.weights).all()
    assert found.settings["restarts"] == 0
    true = p.residuals(found.weights)
    assert (found.reason == "converged") == (float(true.max()) <= 0.01)
    assert float(true.max()) < 0.8
    torch.testing.assert_close(found.residuals.double(), true, rtol=1e-2, atol=1e-5)


def test_columns_that_are_done_keep_their_weights():
    p = problem("matern12", 300, k=4, noise=0.1)
    p.rhs[:, 1:] = p.matrix @ p.matrix[:, :3] / 300.0
    near = p.answer.clone()
    near[:, 0] = 0.0
    found = p.solve(SDD(tolerance=1e-4), initial=near)
    assert found.reason == "converged"
    torch.testing.assert_close(found.weights[:, 1:], near[:, 1:])
    assert float(p.residuals(found.weights).max()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_float32_is_blamed_for_its_rounding(dtype):
    p = problem("rbf", 300, noise=1e-6, dtype=dtype)
    found = p.solve(SDD(tolerance=1e-9, max_passes=50.0))
    assert found.reason == "budget"
    blamed = any("float64" in w and "Rounding" in w for w in found.warnings)
    assert blamed == (dtype == torch.float32)
