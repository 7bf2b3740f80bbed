"""What every solver promises: agreement, honest ends, budgets, seeds, arguments.

A solver that is registered in ``SOLVERS`` gets all of this; ``SETTINGS`` has what small
systems ask of it, ``VARIANTS`` other forms of some.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from gpytorch.kernels import MaternKernel, MultitaskKernel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sgdgp
from sgdgp.core.codec import is_stored_class
from sgdgp.operators import RowBlocksOperator
from sgdgp.solvers import (
    ADASAP,
    CG,
    AlternatingProjections,
    Auto,
    ExactBlocks,
    IterativeSolver,
    Nystrom,
    RandomOrder,
    Refined,
    Solution,
    Solver,
    stopping,
)
from sgdgp.solvers.auto import SOLVERS
from sgdgp.solvers.base import Limits
from sgdgp.solvers.driver import StochasticSolver
from tests.solvers.problems import Problem, problem, relative_error

# Primal descent sees nothing where K is small, so it gets a step that is good there, no
# features, whose noise stays, and all rows as inducing points.
SETTINGS = {
    "sgd": {"num_features": 0, "momentum": 0.97},
    "inducing_sgd": {"inducing": 10**6, "gradient_tolerance": 1e-12, "momentum": 0.97},
}
VARIANTS = {
    "adasap-exact": ADASAP(preconditioner=ExactBlocks()),
    "auto": Auto(),
    "cg-none": CG(preconditioner=None),
    "cg-nystrom": CG(preconditioner=Nystrom()),
    "projections-random": AlternatingProjections(selection=RandomOrder()),
    "refined": Refined(CG()),
}
MEMBERS: dict[str, Solver] = {
    **{name: solver(**SETTINGS.get(name, {})) for name, solver in SOLVERS.items()},
    **VARIANTS,
}
STOCHASTIC = [n for n, s in MEMBERS.items() if isinstance(s, StochasticSolver)]
# On small systems "auto" is a direct solve.
ITERATIVE = [
    n for n, s in MEMBERS.items() if isinstance(s, IterativeSolver) and n != "auto"
]
PRIMAL = list(SETTINGS)
BUDGET = 60.0

# With all rows InducingSGD takes as many passes as SGD, and each costs more.
FULL = [name for name in MEMBERS if name != "inducing_sgd"]

every_solver = pytest.mark.parametrize("name", MEMBERS)
every_iterative = pytest.mark.parametrize("name", ITERATIVE)
every_stochastic = pytest.mark.parametrize("name", STOCHASTIC)
every_full = pytest.mark.parametrize("name", FULL)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def limited(name: str, **limits) -> Solver:
    """A member with other limits, as far as it has them."""
    solver = MEMBERS[name]
    return solver.with_limits(replace(solver.limits, **limits))


def stopped(name: str, **limits) -> Solver:
    """The same where the end comes before the answer: with few inducing points."""
    solver = limited(name, **limits)
    return replace(solver, inducing=40) if name == "inducing_sgd" else solver


def generator(seed: int) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def assert_honest(p: Problem, found: Solution, solver: Solver) -> None:
    """What is reported is true of the weights that are returned."""
    assert torch.isfinite(found.weights).all()
    assert found.weights.shape == p.rhs.shape
    assert found.weights.dtype == p.rhs.dtype
    # The direct solver answers for the kernel itself, the others for its entries.
    direct = found.solver in ("cholesky", "refined")
    matrix = p.exact_matrix if direct else p.matrix
    true = p.residuals(found.weights, matrix)
    slack = p.rounding(found.weights)
    assert bool(((true - found.residuals.double()).abs() <= slack + 1e-6 * true).all())
    default = 1e-8 if p.rhs.dtype == torch.float64 else 1e-3
    tolerance = solver.limits.tolerance or default
    if found.reason == "converged":
        assert bool((true <= tolerance + slack).all())
    below = float(found.residuals.max()) <= tolerance
    assert (found.reason == "converged") == below
    assert bool(found.warnings) or found.reason == "converged"
    passes = [entry.passes for entry in found.history]
    assert passes == sorted(passes)
    assert found.passes >= (passes[-1] if passes else 0.0)
    assert all(len(entry.residuals) == p.rhs.shape[1] for entry in found.history)


@every_full
def test_noise_per_row_is_the_diagonal_of_sigma(name):
    orders = 0.5 if name == "sgd" else 2.0
    noise = torch.logspace(-orders, 1.0, 150).double()
    p = problem("matern12", 150, noise=noise)
    found = p.solve(limited(name, tolerance=1e-8, max_passes=2000.0))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6


@every_solver
@each_dtype
def test_noise_per_row_over_six_orders_is_solved_honestly(name, dtype):
    noise = torch.logspace(-6, 0, 80, dtype=dtype)
    p = problem("matern12", 80, noise=noise, dtype=dtype)
    solver = limited(name, max_passes=BUDGET)
    found = p.solve(solver)
    assert_honest(p, found, solver)
    lost = name in PRIMAL or (name == "refined" and dtype == torch.float32)
    assert (found.reason == "converged") == (not lost)


@every_full
def test_several_outputs_per_input_are_solved(name):
    kernel = MultitaskKernel(MaternKernel(0.5), num_tasks=2, rank=1).double()
    x = torch.randn(40, 3, generator=generator(0), dtype=torch.float64)
    rhs = torch.randn(80, 2, generator=generator(1), dtype=torch.float64)
    p = Problem(RowBlocksOperator(kernel, x), torch.tensor(1.0).double(), rhs)
    found = p.solve(limited(name, tolerance=1e-6))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-4


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(MEMBERS)),
    kernel=st.sampled_from(["rbf", "matern12", "matern32", "linear", "scale"]),
    n=st.integers(1, 90),
    k=st.integers(1, 3),
    exponent=st.floats(-6.0, 0.0),
    double=st.booleans(),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
# A residual of 4 where 99.9 % of the energy is gained: rank three, noise 1e-6.
@example("cg", "linear", 4, 2, -5.996347427368167, False, False, 0)
def test_every_solver_is_honest(name, kernel, n, k, exponent, double, warm, seed):
    dtype = torch.float64 if double else torch.float32
    p = problem(kernel, n, k=k, noise=10.0**exponent, dtype=dtype, seed=seed)
    initial = 0.5 * p.answer.to(dtype) if warm else None
    solver = limited(name, max_passes=BUDGET)
    found = p.solve(solver, initial=initial)
    assert_honest(p, found, solver)
    if found.solver != "cholesky":
        start = torch.zeros_like(p.rhs) if initial is None else initial
        before = p.residuals(start) + p.rounding(start) + p.rounding(found.weights)
        is_nearer = p.errors(found.weights) <= p.errors(start)
        assert bool((is_nearer | (p.residuals(found.weights) <= before)).all())


@every_solver
@pytest.mark.parametrize("n", [1, 2, 3, 63, 65])
def test_small_systems_are_solved(name, n):
    p = problem("matern12", n, noise=0.1)
    found = p.solve(MEMBERS[name])
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 0.01


@every_solver
def test_zero_columns_have_zero_weights(name):
    kernel, noise = ("matern12", 1.0) if name in PRIMAL else ("matern32", 0.05)
    p = problem(kernel, 100, k=3, noise=noise)
    p.rhs[:, 1] = 0.0
    found = p.solve(limited(name, tolerance=1e-3))
    assert found.reason == "converged"
    assert not found.weights[:, 1].any()
    assert float(found.residuals[1]) == 0.0
    zeros = problem("matern32", 100)
    zeros.rhs.zero_()
    nothing = zeros.solve(MEMBERS[name])
    assert nothing.reason == "converged"
    assert not nothing.weights.any()


@pytest.mark.parametrize("name", [name for name in ITERATIVE if name in FULL])
def test_a_start_near_the_answer_saves_passes(name):
    p = (
        problem("matern12", 150, noise=1.0)
        if name == "sgd"
        else problem("matern32", 250)
    )
    solver = limited(name, tolerance=1e-4)
    cold = p.solve(solver)
    nearby = p.answer + 1e-3 * p.answer.roll(1, 0)
    warm = p.solve(solver, initial=nearby)
    assert warm.reason == cold.reason == "converged"
    assert warm.passes < (0.7 if name in STOCHASTIC else 0.8) * cold.passes
    again = p.solve(solver, initial=cold.weights)
    # The true residual of the start, a preconditioner or a few steps: no more.
    assert again.passes <= 5.0
    assert float(again.residuals.max()) <= 1e-4


@every_stochastic
def test_a_converged_start_ends_at_once(name):
    p = problem("matern32", 200)
    found = p.solve(MEMBERS[name], initial=p.answer)
    assert found.reason == "converged"
    torch.testing.assert_close(found.weights, p.answer)
    # Its residual, and for some the spectrum of what fits into one pass.
    looks = {"sdd": 2.0, "sgd": 2.0, "inducing_sgd": 6.0}.get(name, 1.0)
    assert found.passes == pytest.approx(looks)


@every_stochastic
def test_no_column_ends_worse_than_it_started(name):
    # The residual of white noise may grow at first although the error falls.
    p = problem("rbf", 300, noise=1e-6, k=3)
    start = torch.zeros_like(p.rhs)
    start[:, 1] = p.answer[:, 1]
    before = p.residuals(start)
    found = p.solve(stopped(name, max_passes=20.0), initial=start)
    after = p.residuals(found.weights)
    assert found.reason == "budget"
    assert bool((after <= before * (1 + 1e-9) + 1e-9).all())
    torch.testing.assert_close(found.residuals, after, rtol=1e-6, atol=1e-9)
    # The solved column was left alone.
    torch.testing.assert_close(found.weights[:, 1], start[:, 1])


@every_iterative
@pytest.mark.parametrize("budget", [1.0, 2.0, 5.5, 6.0, 20.0])
def test_a_budget_in_passes_is_kept_to_a_check(name, budget):
    p = problem("rbf", 200, noise=1e-6)
    found = p.solve(stopped(name, tolerance=1e-12, max_passes=budget))
    assert found.reason == "budget"
    assert found.passes <= budget + (3.0 if budget < 5.0 else 1.0)
    assert float(found.residuals.max()) > 1e-12
    if name in STOCHASTIC and name != "inducing_sgd":
        assert "more passes (max_passes)" in found.warnings[0]


@every_iterative
def test_a_budget_in_seconds_ends_a_solve(name):
    p = problem("rbf", 100, noise=1e-6)
    for seconds in (1e-6, 1e-4):
        solver = stopped(name, tolerance=1e-13, max_passes=1e6, max_seconds=seconds)
        found = p.solve(solver)
        assert found.reason == "budget"
        few = seconds < 1e-5 and name in STOCHASTIC
        assert found.passes < (4.0 if few else 20.0)


class Clocked(RowBlocksOperator):
    """A pass over K takes one second, of which it tells."""

    seconds = 0.0

    def _rows_matmul(self, index, v):
        found = super()._rows_matmul(index, v)
        Clocked.seconds += len(found) / self.shape[0]
        return found


@pytest.mark.parametrize(
    "name", ["cg", "sdd", "sgd", "adasap", "alternating_projections"]
)
def test_a_budget_in_seconds_is_kept_with_the_check_at_the_end(name, monkeypatch):
    p = problem("rbf", 300, noise=1e-6)
    monkeypatch.setattr(Clocked, "seconds", 0.0)
    clock = SimpleNamespace(perf_counter=lambda: Clocked.seconds)
    monkeypatch.setattr("sgdgp.solvers.base.time", clock)
    operator = Clocked(p.operator.kernel, p.operator.x)
    solver = stopped(name, tolerance=1e-13, max_passes=1e6, max_seconds=6.0)
    found = solver.solve(operator, p.noise, p.rhs)
    assert found.reason == "budget"
    assert 3.0 < found.seconds <= Clocked.seconds <= 6.1


@every_iterative
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_callback_can_stop_a_solve(name, stop_after):
    p = problem("matern32", 200, noise=1e-3)
    seen = []

    def callback(progress):
        seen.append(progress)
        return len(seen) >= stop_after

    found = p.solve(stopped(name, tolerance=1e-8), callback=callback)
    assert found.reason == "interrupted"
    assert len(seen) <= stop_after + 1
    assert len(found.history) == len(seen)
    torch.testing.assert_close(found.residuals, p.residuals(found.weights))
    # Who stopped it needs no advice how it would have gone on.
    assert not any("Give it" in sentence for sentence in found.warnings)


@every_iterative
def test_rows_keep_the_order_of_the_caller(name):
    p = problem("matern12", 120, noise=1.0 if name in PRIMAL else 0.1)
    seen = []
    found = p.solve(
        limited(name, tolerance=1e-6),
        callback=lambda q: seen.append((q.exact, q.residuals, q.weights())),
    )
    checked = [(residuals, weights) for exact, residuals, weights in seen if exact]
    assert checked
    for residuals, weights in checked:
        torch.testing.assert_close(p.residuals(weights), residuals)
    assert torch.equal(checked[-1][1], found.weights)


@every_solver
@each_dtype
def test_the_seed_decides_and_nothing_else(name, dtype):
    p = problem("matern32", 150, noise=0.5, dtype=dtype)
    solver = limited(name, max_passes=8.0)

    def solve(seed: int | None) -> Solution:
        torch.rand(5)
        return p.solve(solver, generator=None if seed is None else generator(seed))

    before = torch.random.get_rng_state()
    p.solve(solver)
    assert torch.equal(before, torch.random.get_rng_state())
    one, two = solve(1), solve(1)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.residuals, two.residuals)
    assert one.passes == two.passes
    assert torch.equal(solve(None).weights, solve(0).weights)
    if name in STOCHASTIC:
        assert not torch.equal(solve(1).weights, solve(2).weights)


@every_solver
def test_history_ends_with_the_residuals_of_the_solution(name):
    p = problem("matern32", 150, noise=1.0 if name in PRIMAL else 0.05)
    found = p.solve(MEMBERS[name])
    last = found.history[-1]
    assert last.exact
    assert last.residuals == pytest.approx(tuple(found.residuals.tolist()))
    seconds = [entry.seconds for entry in found.history]
    assert seconds == sorted(seconds)
    assert found.seconds >= seconds[-1]
    assert found.operator == "dense"
    if name in SOLVERS:
        assert found.solver == name


class Looks(TorchDispatchMode):
    """Counts what waits for a GPU: numbers that are read, sizes that depend on some."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("solver", "each_pass"),
    [
        # What a pass is judged by. Fifteen steps look at nothing.
        *((SOLVERS[name](block_size=20), 15) for name in ("sdd", "sgd")),
        # A pass is an iteration: what was kept, what is largest, who is done.
        (CG(preconditioner=None), 5),
    ],
)
def test_few_numbers_are_read_in_a_pass(solver, each_pass, monkeypatch):
    monkeypatch.setattr(stopping, "_calls_per_look", lambda device: 16)  # of a GPU
    p = problem("matern32", 300, k=3, noise=1e-3)
    counts = []
    for passes in (10.0, 20.0):
        with Looks() as looks:
            limits = Limits(1e-12, passes)
            solver.with_limits(limits).solve(p.operator, p.noise, p.rhs)
        counts.append(looks.count)
    assert counts[1] - counts[0] <= each_pass * 10


@each_dtype
@pytest.mark.parametrize("name", ["sdd", *PRIMAL])
def test_a_step_size_beyond_rescue_is_called_diverged(name, dtype):
    p = problem("matern32", 300, dtype=dtype)
    found = p.solve(replace(MEMBERS[name], momentum=None, step_size=1e30))
    assert found.reason == "diverged"
    assert torch.isfinite(found.weights).all()
    assert float(p.residuals(found.weights).max()) <= 1.0 + 1e-6
    assert "diverged" in found.warnings[0]
    few = p.solve(replace(MEMBERS[name], step_size=1e30, max_passes=5.0))
    assert few.passes <= 8.0


@pytest.mark.parametrize(
    ("name", "kernel", "n", "noise", "factor"),
    [
        ("sdd", "matern12", 300, 0.05, 20.0),
        ("sdd", "matern32", 300, 0.05, 20.0),
        ("sdd", "rbf", 300, 0.05, 20.0),
        ("sdd", "linear", 300, 0.05, 20.0),
        ("sgd", "matern12", 100, 1.0, 40.0),
        ("inducing_sgd", "matern12", 60, 1.0, 40.0),
    ],
)
def test_a_step_size_far_too_large_is_halved_until_it_works(
    name, kernel, n, noise, factor
):
    p = problem(kernel, n, noise=noise)
    large = factor * p.solve(MEMBERS[name]).settings["step_size"]
    found = p.solve(replace(MEMBERS[name], step_size=large))
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 0.01
    restarts = found.settings["restarts"]
    assert 2 <= restarts <= 6
    assert found.settings["step_size"] == pytest.approx(large / 2**restarts)
    assert f"halved its step size {restarts} times" in found.warnings[-1]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_can_be_stored_and_is_exported(name):
    assert is_stored_class(SOLVERS[name])
    assert SOLVERS[name].__name__ in sgdgp.solvers.__all__


BAD = {
    "tolerance": [0.0],
    "max_passes": [math.nan],
    "max_seconds": [-1.0],
    "block_size": [0],
    "momentum": [1.0, -0.1],
    "step_size": [0.0],
    "averaging": [0.0, 1.5],
    "mu": [0.0],
    "nu": [0.5],
    "num_features": [-1],
    "inducing": [0],
    "gradient_tolerance": [-1.0],
}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        (name, setting.name, value)
        for name, solver in SOLVERS.items()
        for setting in fields(solver)
        for value in BAD.get(setting.name, [])
    ],
)
def test_settings_out_of_range_are_named(name, setting, value):
    with pytest.raises(ValueError, match=setting):
        SOLVERS[name](**{setting: value})
    for wrong in ("a", True):
        with pytest.raises(TypeError, match=f"{setting}: "):
            SOLVERS[name](**{setting: wrong})


@pytest.mark.parametrize("limit", [limit.name for limit in fields(Limits)])
def test_limits_are_numbers(limit):
    for wrong in ("a", True):
        with pytest.raises(TypeError, match=f"{limit}: expected a number"):
            Limits(**{limit: wrong})
