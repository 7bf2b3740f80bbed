"""Solvers by name; the plan of "auto", and what happens when its stages end early."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from gpytorch.kernels import MultitaskKernel, RBFKernel

from sgdgp.operators import DenseOperator, RowBlocksOperator, TiledOperator
from sgdgp.solvers import (
    CG,
    SDD,
    Auto,
    Cholesky,
    IterativeSolver,
    PivotedCholesky,
    Stage,
    TwoLevel,
    auto,
    choose_solver,
    plan,
)
from sgdgp.solvers.auto import SOLVERS, Refined
from sgdgp.solvers.system import as_system
from tests.solvers.problems import problem, relative_error

GB = 10**9


def dense(n: int) -> DenseOperator:
    return DenseOperator(RBFKernel(), torch.zeros(n, 1))


def tiled(n: int) -> TiledOperator:
    return TiledOperator(RBFKernel(), torch.zeros(n, 1))


def names(operator, columns: int, budget: int) -> list[str]:
    return [stage.solver.name for stage in plan(operator, 0.01, columns, budget)]


@pytest.mark.parametrize(
    ("operator", "columns", "budget", "expected"),
    [
        (dense(100), 17, GB, ["cholesky"]),
        (dense(2_000), 17, 8 * 2_000**2, ["cholesky"]),
        (dense(2_001), 17, GB, ["cg", "cholesky"]),
        (tiled(50_000), 17, GB, ["cg", "sdd"]),
        (tiled(50_000), 17, 21 * GB, ["cg", "cholesky"]),
        (tiled(50_000), 17, 50_000 * 40 * 100 - 1, ["sdd"]),
    ],
)
def test_the_plan_follows_size_and_memory(operator, columns, budget, expected):
    assert names(operator, columns, budget) == expected


def test_seconds_for_a_few_passes_go_to_stochastic_dual_descent():
    def stages(n, passes):
        return [
            stage.solver.name for stage in plan(dense(n), 1e-2, 65, 10 * GB, passes)
        ]

    assert stages(5_000, 30.0) == ["cg", "cholesky"]
    assert stages(5_000, 14.0) == ["sdd"]
    assert stages(1_000, 14.0) == ["cholesky"]


def test_a_factor_comes_first_where_noise_is_small_and_it_costs_few_passes():
    def stages(n, noise, columns=65):
        return [stage.solver.name for stage in plan(dense(n), noise, columns, GB)]

    assert stages(5_500, 1e-4) == ["cholesky"]
    assert stages(5_500, 1e-2) == ["cg", "cholesky"]
    assert stages(5_500, 1e-4, columns=1) == ["cg", "cholesky"]
    assert stages(8_000, 1e-4) == ["cg", "cholesky"]


def test_a_factorisation_that_outlasts_the_seconds_is_not_planned():
    def last(passes):
        return plan(dense(20_000), 1e-4, 65, 10 * GB, passes)[-1].solver

    assert isinstance(last(1_000.0), Cholesky)
    assert isinstance(last(30.0), SDD)


def test_nothing_follows_a_stage_that_was_stopped_by_the_clock():
    @dataclass(frozen=True)
    class Late(IterativeSolver):
        """Gives up after one of its many passes."""

        name = "late"

        def solve(self, operator, noise, rhs, **settings):
            found = CG(tolerance=1e-9, max_passes=3.0, preconditioner=None)
            return found.solve(operator, noise, rhs)

    p = problem("matern32", 100)
    stages = (Stage(Late()), Stage(Cholesky()))
    found = p.solve(Auto(max_seconds=100.0, stages=stages))
    assert found.reason == "budget"
    assert found.solver == "cg"


def preconditioner(operator, columns, budget=10 * GB, noise=0.01):
    solver = plan(operator, noise, columns, budget)[0].solver
    assert isinstance(solver, CG)
    return solver.preconditioner


def test_neighbours_are_for_work_that_is_worth_their_setup():
    assert isinstance(preconditioner(dense(10_000), 1), PivotedCholesky)
    assert isinstance(preconditioner(dense(13_500), 17), TwoLevel)
    assert isinstance(preconditioner(dense(13_500), 65), TwoLevel)
    assert isinstance(preconditioner(tiled(50_000), 1), TwoLevel)


def test_neighbours_are_for_noise_below_a_tenth_of_the_prior_variance():
    operator = dense(13_500)
    assert isinstance(preconditioner(operator, 17, noise=0.09), TwoLevel)
    assert isinstance(preconditioner(operator, 17, noise=0.11), PivotedCholesky)
    per_row = torch.linspace(0.0, 0.18, 13_500)
    assert isinstance(preconditioner(operator, 17, noise=per_row), TwoLevel)


def test_rows_of_one_point_are_no_neighbours():
    kernel = MultitaskKernel(RBFKernel(), num_tasks=2)
    operator = RowBlocksOperator(kernel, torch.zeros(40_000, 1))
    assert isinstance(preconditioner(operator, 65), PivotedCholesky)
    assert "sdd" not in names(operator, 65, GB)


def test_the_rank_is_what_fits_the_budget():
    low = preconditioner(tiled(200_000), 17, 200_000 * 40 * 150)
    assert low == PivotedCholesky(rank=150)


@dataclass(frozen=True)
class Unlucky(IterativeSolver):
    """Gets somewhere and stops for a given reason."""

    reason: str = "stagnated"
    name = "unlucky"

    def solve(self, operator, noise, rhs, **arguments):
        from dataclasses import replace

        found = CG(tolerance=0.3, preconditioner=None, max_passes=self.max_passes)
        return replace(
            found.solve(operator, noise, rhs, **arguments),
            solver=self.name,
            reason=self.reason,
        )


@pytest.mark.parametrize("reason", ["stagnated", "diverged", "budget"])
def test_a_stage_that_fails_hands_its_iterate_on(reason):
    p = problem("matern32", 300)
    seen = []
    solver = Auto(tolerance=1e-6, stages=(Stage(Unlucky(reason=reason)), Stage(CG())))
    found = p.solve(solver, callback=lambda q: seen.append((q.passes, q.seconds)))
    first = p.solve(Unlucky())
    alone = p.solve(CG(tolerance=1e-6), initial=first.weights)
    assert found.reason == "converged"
    assert found.solver == "unlucky+cg"
    assert "unlucky" in found.warnings[0]
    assert relative_error(found.weights, p.answer) < 1e-5
    assert found.passes == pytest.approx(first.passes + alone.passes, abs=1.0)
    assert seen == sorted(seen)
    assert [entry.passes for entry in found.history] == [passes for passes, _ in seen]


def test_an_interrupted_stage_ends_it():
    p = problem("matern32", 300)
    solver = Auto(stages=(Stage(Unlucky(reason="interrupted")), Stage(CG())))
    assert p.solve(solver).solver == "unlucky"


def test_a_budget_is_shared_by_all_stages():
    p = problem("matern32", 300, noise=1e-4)
    stages = (
        Stage(CG(preconditioner=None), share=20.0),
        Stage(CG(preconditioner=None)),
    )
    found = p.solve(Auto(tolerance=1e-9, max_passes=50.0, stages=stages))
    assert found.reason == "budget"
    assert 45.0 <= found.passes <= 50.0


def test_a_direct_stage_keeps_its_own_tolerance():
    p = problem("matern32", 300)
    found = p.solve(Auto(tolerance=0.5, stages=(Stage(Cholesky()),)))
    assert float(p.residuals(found.weights).max()) < 1e-8


def test_no_column_is_worse_after_a_later_stage():
    p = problem("matern32", 200, k=3)
    first = p.solve(CG(tolerance=1e-3))
    solver = Auto(
        tolerance=1e-9,
        max_passes=first.passes + 4.0,
        stages=(Stage(CG(tolerance=1e-3), share=first.passes), Stage(SDD())),
    )
    found = p.solve(solver)
    assert bool((p.residuals(found.weights) <= 1.01 * first.residuals).all())


def test_a_plan_without_stages_is_refused():
    with pytest.raises(ValueError, match="stages"):
        Auto(stages=())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_name_gives_that_solver_with_its_defaults(name):
    found = choose_solver(name, tiled(3), 1)
    assert found == SOLVERS[name]()
    assert found.name == name


def test_the_family_has_the_names_of_the_papers():
    assert {
        "adasap",
        "alternating_projections",
        "cg",
        "cholesky",
        "sdd",
        "sgd",
    } <= set(SOLVERS)
    assert SOLVERS["cg"] is CG
    assert SOLVERS["cholesky"] is Cholesky


def test_auto_gets_the_memory_budget():
    assert choose_solver("auto", tiled(3), 123) == Auto(memory_budget=123)


def test_a_solver_is_passed_through_whatever_the_memory():
    solver = SDD(tolerance=0.3)
    assert choose_solver(solver, tiled(3), 1) is solver


@pytest.mark.parametrize("name", ["", "CG", "lbfgs"])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"solver.*cg.*cholesky.*sdd"):
        choose_solver(name, tiled(3), 10**9)


def test_what_is_neither_a_solver_nor_a_name_is_refused():
    with pytest.raises(TypeError, match="solver: expected a Solver"):
        choose_solver(None, tiled(3), 10**9)


def test_refined_is_its_inner_solver_with_the_same_tolerance():
    with pytest.warns(DeprecationWarning, match="CG"):
        found = Refined(max_passes=7.0)
    assert found == CG(tolerance=1e-8, max_passes=7.0)
    with pytest.warns(DeprecationWarning, match="SDD"):
        assert Refined(SDD(), 1e-3) == SDD(tolerance=1e-3)


def test_what_is_done_once_is_no_part_of_a_pass(monkeypatch):
    """A matrix that has to be filled first does not make every pass look dear."""
    p = problem("matern32", 200, noise=0.05, operator="dense")
    operator = DenseOperator.filled_by(p.operator.source)
    filled = []

    def clock() -> float:
        filled.append(operator._entries is not None)
        return float(len(filled))

    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=clock))
    auto._seconds_of_a_pass(as_system(operator, p.noise, p.rhs))
    assert filled == [True, True]
