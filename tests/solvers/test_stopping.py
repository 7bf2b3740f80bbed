"""When solves end, and whether what they say about it is true."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgdgp.solvers import CG, SDD, Cholesky, Nystrom, Solution
from sgdgp.solvers.stopping import Monitor, rounding_floor
from tests.solvers.problems import Problem, problem

BUDGET = 60.0
SOLVERS = {
    "cholesky": Cholesky(),
    "cg": CG(max_passes=BUDGET),
    "cg-nystrom": CG(max_passes=BUDGET, preconditioner=Nystrom()),
    "cg-none": CG(max_passes=BUDGET, preconditioner=None),
    "sdd": SDD(max_passes=BUDGET),
}
ITERATIVE = [name for name in SOLVERS if name != "cholesky"]
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_iterative = pytest.mark.parametrize("name", ITERATIVE)


def assert_honest(p: Problem, found: Solution, tolerance: float, name: str) -> None:
    """What is reported is true of the weights that are returned."""
    assert torch.isfinite(found.weights).all()
    assert found.weights.shape == p.rhs.shape
    assert found.weights.dtype == p.rhs.dtype
    # The direct solver answers for the kernel itself, the others for its entries.
    matrix = p.exact_matrix if name == "cholesky" else p.matrix
    true = p.residuals(found.weights, matrix)
    slack = p.rounding(found.weights)
    assert bool(((true - found.residuals.double()).abs() <= slack + 1e-6 * true).all())
    if found.reason == "converged":
        assert bool((true <= tolerance + slack).all())
    below = float(found.residuals.max()) <= tolerance
    assert (found.reason == "converged") == below
    assert bool(found.warnings) or found.reason == "converged"
    passes = [entry.passes for entry in found.history]
    assert passes == sorted(passes)
    assert found.passes >= (passes[-1] if passes else 0.0)
    assert all(len(entry.residuals) == p.rhs.shape[1] for entry in found.history)


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    kernel=st.sampled_from(["rbf", "matern12", "matern32", "linear", "scale"]),
    n=st.integers(1, 90),
    k=st.integers(1, 3),
    exponent=st.floats(-6.0, 0.0),
    double=st.booleans(),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_solver_is_honest(name, kernel, n, k, exponent, double, warm, seed):
    dtype = torch.float64 if double else torch.float32
    p = problem(kernel, n, k=k, noise=10.0**exponent, dtype=dtype, seed=seed)
    initial = 0.5 * p.answer.to(dtype) if warm else None
    found = p.solve(SOLVERS[name], initial=initial)
    tolerance = SOLVERS[name].tolerance or (1e-8 if double else 1e-3)
    assert_honest(p, found, tolerance, name)
    if name != "cholesky":
        start = torch.zeros_like(p.rhs) if initial is None else initial
        before = p.residuals(start) + p.rounding(start) + p.rounding(found.weights)
        assert bool((p.residuals(found.weights) <= before).all())


@each_solver
@pytest.mark.parametrize("n", [1, 2, 3, 63, 65])
def test_small_systems_are_solved(name, n):
    p = problem("matern12", n, noise=0.1)
    found = p.solve(SOLVERS[name])
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 0.01


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_per_row_over_six_orders_is_solved_honestly(name, dtype):
    noise = torch.logspace(-6, 0, 80, dtype=dtype)
    p = problem("matern12", 80, noise=noise, dtype=dtype)
    found = p.solve(SOLVERS[name])
    default = 1e-8 if dtype == torch.float64 else 1e-3
    assert_honest(p, found, SOLVERS[name].tolerance or default, name)
    assert found.reason == "converged"


@each_solver
def test_zero_columns_have_zero_weights(name):
    p = problem("matern32", 100, k=3)
    p.rhs[:, 1] = 0.0
    found = p.solve(replace(SOLVERS[name], tolerance=1e-3))
    assert found.reason == "converged"
    assert not found.weights[:, 1].any()
    assert float(found.residuals[1]) == 0.0
    zeros = problem("matern32", 100)
    zeros.rhs.zero_()
    nothing = zeros.solve(SOLVERS[name])
    assert nothing.reason == "converged"
    assert not nothing.weights.any()


@each_iterative
def test_a_start_near_the_answer_saves_passes(name):
    p = problem("matern32", 250)
    solver = replace(SOLVERS[name], tolerance=1e-4, max_passes=1000.0)
    cold = p.solve(solver)
    nearby = p.answer + 1e-3 * p.answer.roll(1, 0)
    warm = p.solve(solver, initial=nearby)
    assert warm.reason == cold.reason == "converged"
    assert warm.passes < 0.8 * cold.passes
    again = p.solve(solver, initial=cold.weights)
    # The true residual of the start, a preconditioner or a few steps: no more.
    assert again.passes <= 5.0
    assert float(again.residuals.max()) <= 1e-4


@each_iterative
@pytest.mark.parametrize("budget", [1.0, 2.0, 5.5, 20.0])
def test_a_budget_in_passes_is_kept_to_a_check(name, budget):
    p = problem("rbf", 200, noise=1e-6)
    found = p.solve(replace(SOLVERS[name], tolerance=1e-12, max_passes=budget))
    assert found.reason == "budget"
    assert found.passes <= budget + 3.0
    assert float(found.residuals.max()) > 1e-12


@each_iterative
def test_a_budget_in_seconds_ends_a_solve(name):
    p = problem("rbf", 100, noise=1e-6)
    solver = replace(SOLVERS[name], tolerance=1e-13, max_passes=1e6, max_seconds=1e-4)
    found = p.solve(solver)
    assert found.reason == "budget"
    assert found.passes < 20.0


@each_iterative
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_callback_can_stop_a_solve(name, stop_after):
    p = problem("matern32", 200, noise=1e-3)
    seen = []

    def callback(progress):
        seen.append(progress)
        return len(seen) >= stop_after

    found = p.solve(replace(SOLVERS[name], tolerance=1e-8), callback=callback)
    assert found.reason == "interrupted"
    assert len(seen) <= stop_after + 1
    assert len(found.history) == len(seen)
    torch.testing.assert_close(found.residuals, p.residuals(found.weights))


@each_solver
def test_the_same_seed_gives_the_same_bits(name):
    p = problem("matern12", 150, dtype=torch.float32)
    one, two = (
        p.solve(SOLVERS[name], generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.residuals, two.residuals)
    assert one.passes == two.passes


@each_solver
def test_history_ends_with_the_residuals_of_the_solution(name):
    p = problem("matern32", 150)
    found = p.solve(SOLVERS[name])
    last = found.history[-1]
    assert last.exact
    assert last.residuals == pytest.approx(tuple(found.residuals.tolist()))
    seconds = [entry.seconds for entry in found.history]
    assert seconds == sorted(seconds)
    assert found.seconds >= seconds[-1]
    assert found.solver == SOLVERS[name].name
    assert found.operator == "dense"


def test_a_running_residual_asks_for_a_check_and_ends_nothing():
    monitor = Monitor(0.01, torch.ones(2))
    assert not monitor.wants_check(torch.tensor([0.005, 0.011]), 3.0)
    assert monitor.wants_check(torch.tensor([0.005, 0.0099]), 3.0)
    assert monitor.verdict(torch.tensor([0.009, 0.0101]), 4.0) is None
    # A claim that was refuted is not checked again at once.
    assert not monitor.wants_check(torch.tensor([0.005, 0.006]), 5.0)
    assert monitor.wants_check(torch.tensor([0.005, 0.006]), 6.0)
    assert monitor.verdict(torch.tensor([0.009, 0.010]), 7.0) == "converged"


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.5])
def test_a_check_tells_how_far_the_running_residual_is_off(ratio):
    monitor = Monitor(0.01, torch.ones(1))
    assert monitor.wants_check(torch.ones(1), 25.0)
    assert monitor.verdict(torch.tensor([ratio]), 26.0) is None
    for true, wanted in ((0.0107, False), (0.0095, True)):
        assert monitor.wants_check(torch.tensor([true / ratio]), 28.0) == wanted
    # What it has told wears off.
    assert monitor.wants_check(torch.tensor([0.0107 / ratio]), 33.0)


def test_refuted_claims_cost_a_bounded_share_of_the_passes():
    monitor = Monitor(0.01, torch.ones(1))
    passes, checks = 1.0, []
    while passes < 300.0:
        passes += 1.0
        if monitor.wants_check(torch.tensor([1e-6]), passes):
            passes += 1.0
            checks.append(passes)
            monitor.verdict(torch.tensor([0.02 - 1e-5 * passes]), passes)
    assert len(checks) < 50
    assert sum(c > 100.0 for c in checks) < 15


def test_columns_are_worth_a_check_when_half_of_them_seem_done():
    done, far = 0.005, 0.5
    for columns, wanted in (([done, done, far, far], True), ([done, far, far], False)):
        monitor = Monitor(0.01, torch.ones(len(columns)))
        assert not monitor.wants_check(torch.tensor(columns), 5.0)
        assert monitor.wants_check(torch.tensor(columns), 12.0) == wanted


def test_a_true_residual_is_checked_regularly_without_any_claim():
    monitor = Monitor(0.01, torch.ones(1))
    assert not monitor.wants_check(torch.ones(1), 24.0)
    assert monitor.wants_check(torch.ones(1), 25.0)


def test_no_gain_over_the_patience_is_stagnation():
    monitor = Monitor(0.01, torch.ones(1), patience=50.0)
    assert monitor.verdict(torch.tensor([0.500]), 10.0) is None
    assert monitor.verdict(torch.tensor([0.499]), 40.0) is None
    assert monitor.verdict(torch.tensor([0.499]), 60.0) == "stagnated"
    steady = Monitor(0.01, torch.ones(1), patience=50.0)
    for i in range(20):
        assert steady.verdict(torch.tensor([0.9 * 0.95**i]), 50.0 * i) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_divergence(bad):
    monitor = Monitor(0.01, torch.ones(1))
    assert monitor.is_diverging(torch.full((4, 1), bad), 10)


def test_the_guard_needs_a_residual_three_times_the_first_one():
    num_blocks = 10
    for factor, diverging in ((2.9, False), (3.1, True)):
        monitor = Monitor(0.01, torch.ones(1))
        block = torch.full((5, 1), factor / math.sqrt(5 * num_blocks))
        assert any(monitor.is_diverging(block, num_blocks) for _ in range(60)) == (
            diverging
        )


def test_one_unlucky_block_is_no_divergence():
    monitor = Monitor(0.01, torch.ones(1))
    unlucky = torch.full((5, 1), 10.0 / math.sqrt(5 * 200))
    assert not monitor.is_diverging(unlucky, 200)


def test_the_rounding_floor_is_what_rounding_the_weights_does():
    p = problem("matern32", 400, noise=1e-3)
    found = p.answer / p.rhs.norm(dim=0)
    rounded = found.float().double()
    change = (p.matrix @ (rounded - found)).norm(dim=0)
    diagonal = p.matrix.diagonal().unsqueeze(1)
    largest = float(torch.linalg.eigvalsh(p.matrix)[-1] / diagonal.mean())
    floor = rounding_floor(largest, diagonal, found.float())
    assert 1.0 < floor / float(change.max()) < 100.0
