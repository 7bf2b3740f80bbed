"""Refinement: float64 accuracy from float32 solves, counted and reported honestly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sgdgp.operators import DenseOperator, RowBlocksOperator, TiledOperator
from sgdgp.solvers import CG, SDD, Cholesky, PivotedCholesky
from sgdgp.solvers.refinement import Refined
from sgdgp.solvers.two_level import TwoLevel
from tests.operators.kernel_cases import CASES
from tests.solvers.problems import OPERATORS, Problem, problem, relative_error


class Watched(DenseOperator):
    """Notes the dtype of every product and every operator built from it."""

    log: list[tuple[torch.dtype, int]]
    built: list[torch.dtype]

    def matmul(self, v):
        self.log.append((v.dtype, v.shape[1]))
        return super().matmul(v)

    def streaming(self):
        return self

    def _rebuilt(self, x, x_rows, kernel=None):
        other = Watched(self.kernel if kernel is None else kernel, x, x_rows)
        other.log, other.built = self.log, self.built
        self.built.append(x.dtype)
        return other


def watched(p: Problem) -> Watched:
    operator = Watched(p.operator.kernel, p.operator.x)
    operator.log, operator.built = [], []
    return operator


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "kernel", ["rbf", "matern12", "linear", "constant", "polynomial", "ard"]
)
def test_it_reaches_what_float32_cannot(kernel, operator):
    p = problem(kernel, 300, noise=1e-2, operator=operator)
    found = p.solve(Refined())
    assert found.reason == "converged"
    assert found.weights.dtype == torch.float64
    assert float(p.residuals(found.weights).max()) <= 1.01e-8
    assert relative_error(found.weights, p.answer) < 1e-4
    # Each step is asked for two digits.
    assert 2 <= found.settings["refinements"] <= 6


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
def test_low_noise_is_solved_where_float32_alone_fails(noise):
    p = problem("scale", 400, noise=noise)
    found = p.solve(Refined())
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 1.01e-8
    # Measured 24 and 55.
    assert found.passes < 80


@pytest.mark.parametrize(
    "inner",
    [CG(preconditioner=None), CG(preconditioner=PivotedCholesky()), SDD(), Cholesky()],
    ids=lambda s: s.name,
)
def test_any_solver_can_be_refined(inner):
    p = problem("matern32", 150, noise=0.1)
    found = p.solve(Refined(inner, tolerance=1e-7))
    assert found.reason == "converged"
    assert found.solver == f"refined:{inner.name}"
    assert float(p.residuals(found.weights).max()) <= 1e-7


def test_one_operator_serves_all_steps_and_only_checks_are_in_float64():
    p = problem("matern32", 200, noise=1e-2)
    operator = watched(p)
    found = Refined().solve(operator, p.noise, p.rhs)
    steps = found.settings["refinements"]
    assert steps >= 3
    wide = [dtype for dtype, _ in operator.log if dtype == torch.float64]
    # One residual per step: the inner solver's look at rounding is of a few rows.
    assert len(wide) == steps
    assert len(operator.log) > 2 * steps
    # One for the steps. What looks at rounding in float64 comes and goes.
    assert operator.built.count(torch.float32) == 1


def test_the_preconditioner_is_prepared_once():
    p = problem("matern32", 200, noise=1e-3)
    calls = []

    class Counting(TwoLevel):
        def prepare(self, system, generator):
            calls.append(system.rhs.dtype)
            return super().prepare(system, generator)

    found = p.solve(Refined(CG(preconditioner=Counting())))
    assert found.settings["refinements"] >= 3
    assert calls == [torch.float32]
    assert found.settings["rank"] == 100
    # Its passes are counted once as well.
    entries = [entry for entry in found.history if entry.exact]
    setup = 1.0 + (100 + (found.settings["neighbours"] + 1) ** 2) / 200
    # Every step's own check shares the entries of its last product.
    products = len(found.history) - found.settings["refinements"]
    assert entries[-1].passes == found.passes
    assert found.passes == pytest.approx(products + setup, abs=1.0)


def test_columns_that_are_done_leave():
    p = problem("matern32", 200, k=3, noise=1e-2)
    start = p.answer.clone()
    start[:, 0] = 0.0
    operator = watched(p)
    found = Refined().solve(operator, p.noise, p.rhs, initial=start)
    assert found.reason == "converged"
    assert operator.log[0] == (torch.float64, 3)
    # One column, and with it the weights where its last product checks them.
    assert {width for _, width in operator.log[1:]} == {1, 2}
    torch.testing.assert_close(found.weights[:, 1:], start[:, 1:], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("kernel", ["rbf", "scale", "linear"])
def test_float32_data_get_the_best_weights_that_float32_can_hold(kernel):
    p = problem(kernel, 300, noise=1e-3, dtype=torch.float32)
    found = p.solve(Refined())
    assert found.weights.dtype == torch.float32
    true = p.residuals(found.weights, p.exact_matrix)
    torch.testing.assert_close(found.residuals.double(), true, rtol=1e-2, atol=0.0)
    assert found.reason == "stagnated"
    assert "float32" in found.warnings[0]
    answer = torch.linalg.solve(p.exact_matrix, p.rhs.double())
    rounded = p.residuals(answer.float(), p.exact_matrix)
    assert bool((true < 3 * rounded).all())


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "rbf", "constant"])
@pytest.mark.parametrize("noise", [1e-6, 1e-9])
def test_what_float32_cannot_begin_is_given_up_soon_and_honestly(kernel, noise):
    p = problem(kernel, 200, noise=noise)
    found = p.solve(Refined(max_passes=600.0))
    true = p.residuals(found.weights)
    slack = p.rounding(found.weights)
    assert bool(((true - found.residuals).abs() <= slack + 1e-6).all())
    assert bool((true <= 1.0 + slack).all())
    assert found.passes <= 603.0
    if found.reason != "converged":
        assert found.reason in {"stagnated", "budget"}
        assert found.reason in found.warnings[0]
    if kernel in {"polynomial", "linear"}:
        assert found.reason == "stagnated"
        assert "in float64" in found.warnings[0]
        assert found.passes < 250


def test_a_start_near_the_answer_saves_passes():
    p = problem("matern32", 200)
    cold = p.solve(Refined(tolerance=1e-6))
    near = p.answer * (1 + 1e-5)
    warm = p.solve(Refined(tolerance=1e-6), initial=near)
    assert warm.reason == cold.reason == "converged"
    assert warm.passes < 0.7 * cold.passes
    again = p.solve(Refined(tolerance=1e-6), initial=cold.weights)
    assert (again.passes, again.settings["refinements"]) == (1.0, 0)
    assert torch.equal(again.weights, cold.weights)


@pytest.mark.parametrize("budget", [1.0, 3.0, 8.0, 15.5])
def test_a_budget_in_passes_is_kept_to_a_check(budget):
    p = problem("rbf", 200, noise=1e-4)
    found = p.solve(Refined(tolerance=1e-12, max_passes=budget))
    assert found.reason == "budget"
    # At least: a preconditioner, one step, its check, and the check of the sum.
    assert found.passes <= max(6.5, budget + 3.0)
    assert float(p.residuals(found.weights).max()) <= 1.0


def test_other_budgets_end_a_solve():
    p = problem("rbf", 150, noise=1e-4)
    timed = p.solve(Refined(tolerance=1e-13, max_seconds=1e-4))
    assert timed.reason == "budget"
    assert timed.passes < 20.0
    one = p.solve(Refined(tolerance=1e-13, max_refinements=1))
    assert (one.reason, one.settings["refinements"]) == ("budget", 1)
    assert "max_passes" in one.warnings[0]


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_the_callback_sees_all_passes_and_can_stop_it(stop_after):
    p = problem("matern32", 200, noise=1e-3)
    seen = []

    def callback(progress):
        true = p.residuals(progress.weights())
        seen.append((progress.passes, progress.exact))
        # float32's word for the inner residual is good to a percent or so here.
        tolerance = 1e-6 if progress.exact else 0.05
        torch.testing.assert_close(progress.residuals, true, rtol=tolerance, atol=1e-12)
        return len(seen) >= stop_after

    found = p.solve(Refined(), callback=callback)
    assert found.reason == "interrupted"
    assert len(seen) <= stop_after + 2
    assert len(found.history) == len(seen)
    passes = [entry for entry, _ in seen]
    assert passes == sorted(passes)
    assert found.passes >= passes[-1]
    torch.testing.assert_close(found.residuals, p.residuals(found.weights))


def test_a_zero_column_stays_zero():
    p = problem("matern32", 100, k=3)
    p.rhs[:, 1] = 0.0
    found = p.solve(Refined())
    assert found.reason == "converged"
    assert not found.weights[:, 1].any()
    p.rhs.zero_()
    assert p.solve(Refined()).passes == 0.0


def test_a_step_that_makes_it_worse_is_shortened():
    class Overshooting(CG):
        def solve(self, *arguments, **settings):
            found = super().solve(*arguments, **settings)
            return replace(found, weights=-7.0 * found.weights)

    p = problem("matern32", 100)
    found = p.solve(Refined(Overshooting()))
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 1e-8


def test_the_same_seed_gives_the_same_bits():
    p = problem("matern12", 150)
    one, two = (
        p.solve(Refined(), generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.weights, two.weights)


def test_the_callers_operator_is_left_as_it_is():
    p = problem("rbf", 100)
    p.solve(Refined())
    assert isinstance(p.operator, DenseOperator)
    assert p.operator._entries is None
    assert p.operator.kernel.lengthscale.dtype == torch.float64


def test_kernels_with_several_outputs_are_refined():
    case = CASES["multitask"]
    operator = RowBlocksOperator(case.kernel(), case.x(30))
    rhs = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)).double()
    p = Problem(operator, torch.tensor(0.01).double(), rhs)
    found = p.solve(Refined())
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-5


def test_tiny_systems_are_refined():
    for n in (1, 2, 3):
        p = problem("matern12", n, noise=0.1)
        found = Refined().solve(
            TiledOperator(p.operator.kernel, p.operator.x), p.noise, p.rhs
        )
        assert found.reason == "converged"
        assert relative_error(found.weights, p.answer) < 1e-7


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tolerance": 0.0}, ValueError),
        ({"max_passes": -1.0}, ValueError),
        ({"max_seconds": 0.0}, ValueError),
        ({"max_refinements": 0}, ValueError),
        ({"solver": "cg"}, TypeError),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        Refined(**settings)
