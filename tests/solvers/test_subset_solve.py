"""The starting point of an update: true residuals, honest costs, no wrong claims."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import MaternKernel

from sgdgp.operators import choose_operator
from sgdgp.solvers import Limits
from sgdgp.solvers.subset_solve import largest_block, solve_on_subset
from sgdgp.solvers.system import as_system
from tests.models import toy_data

N, NEW = 400, 8
BUDGET = 2**30


@pytest.fixture(params=[torch.float64, torch.float32])
def problem(request):
    """An operator, noise, targets, and weights that solve all but the last rows."""
    x, y = toy_data(N, 3, dtype=request.param)
    kernel = MaternKernel(nu=1.5).to(request.param).requires_grad_(False)
    kernel.lengthscale = 0.25
    operator = choose_operator(kernel, x, memory_budget=BUDGET)
    noise = torch.full((N,), 1e-2, dtype=request.param)
    rhs = torch.stack([y, y.flip(0)], dim=1)
    system = kernel(x).to_dense().double() + torch.diag(noise.double())
    old = torch.zeros(N, 2, dtype=torch.float64)
    left = N - NEW
    old[:left] = torch.linalg.solve(system[:left, :left], rhs[:left].double())
    return operator, noise, rhs, old.to(request.param), system


def residuals(problem, weights):
    _, _, rhs, _, system = problem
    left = rhs.double() - system @ weights.double()
    return left.norm(dim=0) / rhs.double().norm(dim=0)


def corrected(problem, tolerance=1e-2, factor_passes=1e6, **settings):
    operator, noise, rhs, old, _ = problem
    return solve_on_subset(
        as_system(operator, noise, rhs),
        old,
        NEW,
        Limits(tolerance),
        factor_passes=factor_passes,
        memory_budget=BUDGET,
        **settings,
    )


@pytest.mark.parametrize("tolerance", [3e-2, 1e-2, 3e-3])
def test_what_it_calls_converged_is(problem, tolerance):
    found = corrected(problem, tolerance)
    assert found.reason == "converged"
    truth = residuals(problem, found.weights)
    assert float(truth.max()) <= 1.01 * tolerance
    torch.testing.assert_close(found.residuals.double(), truth, rtol=0.1, atol=0)


def test_it_costs_few_passes_and_says_how_many(problem):
    found = corrected(problem, 1e-2)
    rows = found.settings["rows"]
    assert NEW < rows < 0.85 * N
    # The residual, the neighbours' search, and at least the last round.
    assert found.passes >= 1.0 + NEW / N + rows / N + (rows / N) ** 2
    assert found.passes < 4.0
    assert found.passes == found.history[-1].passes or found.passes == (
        pytest.approx(found.history[-1].passes + 1.0)
    )


def test_weights_that_are_good_enough_are_left_alone(problem):
    operator, noise, rhs, _, system = problem
    solved = torch.linalg.solve(system, rhs.double()).to(rhs)
    found = solve_on_subset(
        as_system(operator, noise, rhs),
        solved,
        NEW,
        Limits(1e-2),
        factor_passes=1e6,
        memory_budget=BUDGET,
    )
    assert found.reason == "converged"
    assert found.settings["rows"] == 0
    torch.testing.assert_close(found.weights, solved)


def test_rows_outside_of_the_corrected_ones_keep_their_weights(problem):
    found = corrected(problem, 3e-2)
    # The solver's scale, once undone, rounds every weight.
    changed = ~torch.isclose(found.weights, problem[3], rtol=1e-5, atol=0).all(dim=1)
    assert bool(changed[N - NEW :].all())
    assert int(changed.sum()) <= found.settings["rows"]


def test_a_small_budget_is_said_and_still_leads_in_the_right_direction(problem):
    _, _, rhs, old, system = problem
    found = corrected(problem, 1e-3, factor_passes=1e-6)
    assert found.reason == "budget"
    truth = residuals(problem, found.weights)
    torch.testing.assert_close(found.residuals.double(), truth, rtol=1e-2, atol=1e-5)
    # Exact on a set of rows: the error in the norm of H can only have fallen.
    exact = torch.linalg.solve(system, rhs.double())

    def energy(weights):
        error = weights.double() - exact
        return (error * (system @ error)).sum(0)

    assert bool((energy(found.weights) < energy(old)).all())


def test_a_callback_sees_every_size_and_may_stop(problem):
    seen = []

    def stop(progress):
        seen.append((progress.passes, progress.exact))
        return len(seen) == 3

    found = corrected(problem, 1e-9, callback=stop)
    assert found.reason == "interrupted"
    assert len(seen) == len(found.history) == 3
    assert all(exact for _, exact in seen)


@pytest.mark.parametrize("worth", [1.0, 30.0])
def test_the_largest_block_grows_with_what_a_solve_costs_and_fits_the_memory(
    problem, worth
):
    operator, noise, rhs, _, _ = problem
    system = as_system(operator, noise, rhs)
    size = largest_block(system, BUDGET, worth)
    assert size <= largest_block(system, BUDGET, 8 * worth) <= 0.85 * N
    tight = largest_block(system, 10_000, 1e9)
    assert 4 * 2 * tight**2 * rhs.element_size() <= 10_000
    assert math.isclose(tight, (10_000 / 8 / rhs.element_size()) ** 0.5, abs_tol=1)


def test_more_new_rows_than_a_block_may_hold(problem):
    operator, noise, rhs, _, _ = problem
    old = torch.zeros_like(rhs)
    found = solve_on_subset(
        as_system(operator, noise, rhs),
        old,
        N - 1,
        Limits(1e-3),
        factor_passes=1e-3,
        memory_budget=BUDGET,
    )
    assert found.reason == "budget"
    assert found.settings["rows"] < N - 1
    torch.testing.assert_close(
        found.residuals.double(), residuals(problem, found.weights), rtol=1e-2, atol=0
    )


def test_budgets_in_passes_and_seconds_hold(problem):
    operator, noise, rhs, old, _ = problem
    for settings in ({"max_passes": 2.3}, {"max_seconds": 1e-9}):
        found = solve_on_subset(
            as_system(operator, noise, rhs),
            old,
            NEW,
            Limits(1e-9, **settings),
            factor_passes=1e6,
            memory_budget=BUDGET,
        )
        assert found.reason == "budget"
        assert found.passes < 3.0
        torch.testing.assert_close(
            found.residuals.double(),
            residuals(problem, found.weights),
            rtol=1e-2,
            atol=0,
        )


def test_an_interruption_keeps_the_better_of_every_column(problem):
    seen = []

    def stop(progress):
        seen.append(progress.residuals)
        return len(seen) == 2

    found = corrected(problem, 1e-9, callback=stop)
    torch.testing.assert_close(
        found.residuals.double(), torch.minimum(*seen).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        found.residuals.double(), residuals(problem, found.weights), rtol=1e-2, atol=0
    )


def test_a_block_without_a_factor_leaves_the_weights_as_they_were(problem, monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda block: (block, torch.tensor(1))
    )
    found = corrected(problem)
    assert found.reason == "budget"
    torch.testing.assert_close(found.weights, problem[3])
    torch.testing.assert_close(
        found.residuals.double(), residuals(problem, found.weights), rtol=1e-2, atol=0
    )
