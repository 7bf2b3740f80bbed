"""The linear system and its checks."""

from __future__ import annotations

import gpytorch
import pytest
import torch

from sgdgp.operators import DenseOperator, RowBlocksOperator
from sgdgp.operators.base import nudged
from sgdgp.solvers import CG, SDD, Cholesky
from sgdgp.solvers.auto import SOLVERS as BY_NAME
from sgdgp.solvers.auto import choose_solver
from sgdgp.solvers.system import (
    as_system,
    believed_norms,
    float32_warnings,
    float64_residual,
    float64_rounding,
    initial_weights,
    rounding_level,
    rounding_shows,
    true_residual,
)
from tests.operators.kernel_cases import CASES
from tests.solvers.problems import OPERATORS, problem, rbf

SOLVERS = [Cholesky(), CG(), SDD()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)


def accurate_residual(system, v):
    return believed_norms(system, v, true_residual(system, v))


def test_columns_have_unit_norm_and_a_zero_column_stays_zero():
    p = problem(k=3)
    p.rhs[:, 1] = 0.0
    p.rhs[:, 2] *= 1e6
    system = as_system(p.operator, p.noise, p.rhs)
    torch.testing.assert_close(
        system.rhs.norm(dim=0), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(system.rhs * system.scale, p.rhs)


@pytest.mark.parametrize("heteroscedastic", [False, True])
def test_product_and_residual_agree_with_the_dense_matrix(heteroscedastic):
    noise = torch.linspace(0.01, 1.0, 50).double() if heteroscedastic else 0.3
    p = problem("matern32", 50, k=2, noise=noise)
    system = as_system(p.operator, p.noise, p.rhs)
    v = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).double()
    kept = v.clone()
    torch.testing.assert_close(system.product(v), p.matrix @ v)
    expected = p.rhs / p.rhs.norm(dim=0) - p.matrix @ v
    torch.testing.assert_close(system.residual(v), expected)
    torch.testing.assert_close(accurate_residual(system, v), expected.norm(dim=0))
    assert torch.equal(v, kept)


def test_a_permuted_system_is_the_same_system():
    noise = torch.linspace(0.01, 1.0, 40).double()
    p = problem("matern12", 40, noise=noise)
    system = as_system(p.operator, p.noise, p.rhs)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    v = p.rhs.cos()
    torch.testing.assert_close(
        system.permuted(order).residual(v[order]), system.residual(v)[order]
    )


def test_initial_weights_are_brought_to_the_scale_of_the_system():
    p = problem()
    system = as_system(p.operator, p.noise, p.rhs * 100.0)
    start = initial_weights(system, 100.0 * p.answer)
    assert float(system.residual(start).norm(dim=0).max()) < 1e-10
    assert not initial_weights(system, None).any()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["constant", "linear"])
def test_the_residual_is_true_where_float32_alone_lies(kernel, operator):
    p = problem(kernel, 1000, k=4, noise=1e-4, dtype=torch.float32, operator=operator)
    system = as_system(p.operator, p.noise, p.rhs)
    # As good as float32 can hold it: measured 1e-3 to 1e-2.
    answer = torch.linalg.solve(p.exact_matrix, p.rhs.double()).float()
    weights = answer / system.scale
    true = p.residuals(weights * system.scale, p.exact_matrix)
    naive = system.residual(weights).norm(dim=0)
    assert float((naive.double() / true - 1.0).abs().max()) > 0.5
    assert rounding_shows(system, weights, naive)
    for found in (
        accurate_residual(system, weights),
        float64_residual(system, weights).norm(dim=0),
    ):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, true, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("kernel", "factor"), [("constant", 30.0), ("linear", 5.0)])
def test_what_rounding_adds_is_measured(kernel, factor, operator):
    p = problem(kernel, 1000, k=4, noise=1e-4, dtype=torch.float32, operator=operator)
    system = as_system(p.operator, p.noise, p.rhs)
    weights = torch.linalg.solve(p.exact_matrix, p.rhs.double()).float() / system.scale
    product = system.product(weights).double()
    wide = system.to(torch.float64)
    added = (product - wide.product(weights.double())).norm(dim=0)
    level = rounding_level(system, weights)
    # Rows of a constant are rounded alike: one draw, which may happen to be small.
    assert float((level / added).min()) > 1 / 5
    assert float((level / added).max()) < factor
    assert float(level.max() / level.min()) < 10.0
    assert "float64 data" in float32_warnings(system, weights, 1e-2)[0]
    assert float32_warnings(system, weights, 10.0) == ()
    assert float32_warnings(wide, weights.double(), 1e-12) == ()
    assert not rounding_shows(wide, weights.double(), torch.zeros(4).double())


def test_a_nudge_is_a_last_digit_and_tells_no_equal_values_apart():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 1e6, -1.5, 1e6, 1e-300]).double()
    moved = nudged(values)
    step = (moved - values).abs()
    assert bool((step <= 2.3e-16 * values.abs()).all())
    assert bool((moved.abs() >= values.abs()).all())
    assert bool(step.any())
    assert moved[0] == 0.0
    assert moved[5] == moved[7]
    # Indices of tasks and categories stay the same ones.
    assert torch.equal(moved[:5].long(), values[:5].long())


def far_periods():
    """Periods of points so far from zero that float64 hardly resolves them."""
    kernel = gpytorch.kernels.PeriodicKernel().double()
    kernel.period_length = 0.06
    x = 1e6 + torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    return gpytorch.kernels.ScaleKernel(kernel).double(), x


@pytest.mark.parametrize("name", ["cholesky", "cg", "adasap"])
def test_what_float64_cannot_resolve_is_not_converged(name):
    kernel, x = far_periods()
    kernel.outputscale = 1e9
    x[15:] = x[:15]  # singular but for the noise
    rhs = torch.randn(30, 2, generator=torch.Generator().manual_seed(1)).double()
    solver = BY_NAME[name](tolerance=1e-2)
    found = solver.solve(DenseOperator(kernel, x), 1e-4, rhs)
    assert found.reason != "converged"
    assert float(found.residuals.max()) > 1e-2
    assert any("even in float64" in w for w in found.warnings)
    # The same shape, where float64 resolves it.
    kernel.outputscale = 1.0
    found = solver.solve(DenseOperator(kernel, x - 1e6), 1e-4, rhs)
    assert found.reason == "converged"
    assert found.warnings == ()


def test_rounding_of_float64_is_measured():
    kernel, x = far_periods()
    operator = DenseOperator(kernel, x)
    system = as_system(operator, 0.1, x.cos())
    v = x.sin()
    # GPyTorch divides by the period before it takes differences, operators after it.
    change = (operator.matmul(v) - kernel(x).to_dense().detach() @ v).norm(dim=0)
    level = float64_rounding(system, v, 1e-12)
    assert bool((level > 0.2 * change).all())
    assert bool((level < 20.0 * change).all())
    assert bool((float64_rounding(system, v, 1.0) < 1e-12).all())


def test_rounding_does_not_show_in_an_easy_system():
    p = problem("matern32", 300, noise=0.1, dtype=torch.float32)
    system = as_system(p.operator, p.noise, p.rhs)
    weights = (p.answer + 0.1).float() / system.scale
    naive = system.residual(weights).norm(dim=0)
    assert not rounding_shows(system, weights, naive)
    torch.testing.assert_close(
        accurate_residual(system, weights),
        p.residuals(weights * system.scale),
        rtol=1e-3,
        atol=0.0,
    )


def test_the_system_in_float64_has_the_kernel_of_float64():
    p = problem("rbf", 60, noise=1e-2, dtype=torch.float32)
    wide = as_system(p.operator, p.noise, p.rhs).to(torch.float64)
    identity = torch.eye(60).double()
    assert wide.operator.name == "tiled"
    torch.testing.assert_close(
        wide.product(identity), p.exact_matrix, rtol=1e-13, atol=1e-13
    )


def test_rows_of_several_outputs_have_residuals_too():
    case = CASES["multitask"]
    operator = RowBlocksOperator(case.kernel().float(), case.x(20).float())
    rhs = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    system = as_system(operator, 1e-3, rhs)
    weights = system.rhs.cos()
    wide = system.to(torch.float64)
    true = wide.residual(weights.double()).norm(dim=0)
    torch.testing.assert_close(
        accurate_residual(system, weights), true, rtol=1e-4, atol=0.0
    )
    assert float(rounding_level(system, weights).max()) < 1e-3


@pytest.mark.parametrize("chosen", [torch.tensor([2, 0]), torch.arange(3) > 0])
def test_columns_of_a_system_are_a_system(chosen):
    p = problem("rbf", 30, k=3)
    p.rhs[:, 1] *= 5.0
    some = as_system(p.operator, p.noise, p.rhs).columns(chosen)
    torch.testing.assert_close(some.rhs * some.scale, p.rhs[:, chosen])


@each_solver
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rhs": torch.zeros(9, 1).double()}, r"rhs.*\(10, k\).*\(9, 1\)"),
        ({"rhs": torch.zeros(10, 0).double()}, r"rhs.*\(10, 0\)"),
        ({"rhs": torch.zeros(10).double()}, r"rhs.*\(10,\)"),
        ({"rhs": torch.zeros(10, 1)}, "rhs.*float64.*float32"),
        ({"rhs": torch.full((10, 1), torch.nan).double()}, r"rhs.*10 NaN.*\(0, 0\)"),
        ({"noise": 0.0}, "noise.*positive"),
        ({"noise": -1.0}, "noise.*positive"),
        ({"noise": float("nan")}, "noise.*positive"),
        ({"noise": float("inf")}, "noise.*positive"),
        ({"noise": torch.ones(9).double()}, r"noise.*\(10,\).*\(9,\)"),
        ({"noise": torch.ones(10, 1).double()}, r"noise.*\(10, 1\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(solver, change, message):
    p = problem(n=10, k=1)
    arguments = {"noise": p.noise, "rhs": p.rhs, **change}
    with pytest.raises(ValueError, match=message):
        solver.solve(p.operator, **arguments)


@pytest.mark.parametrize("solver", [CG(), SDD()], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (torch.zeros(10, 2).double(), r"initial.*\(10, 1\).*\(10, 2\)"),
        (torch.zeros(10, 1), "initial.*float64.*float32"),
        (torch.full((10, 1), torch.inf).double(), "initial.*10 NaN or inf"),
    ],
)
def test_a_starting_point_that_does_not_fit_is_named(solver, initial, message):
    p = problem(n=10, k=1)
    with pytest.raises(ValueError, match=message):
        p.solve(solver, initial=initial)


@each_solver
def test_an_operator_that_is_not_square_is_refused(solver):
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"square.*3 x 4"):
        solver.solve(DenseOperator(rbf(), x, x[:3]), 0.1, torch.zeros(3, 1))


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_a_column_changes_nothing_but_its_scale(solver, dtype):
    p = problem("matern12", 50, k=4, dtype=dtype)
    p.rhs[:] = p.rhs[:, :1]
    scales = torch.tensor([1.0, 2.0**-40, 2.0**40, -1.0], dtype=dtype)
    p.rhs.mul_(scales)
    found = p.solve(solver)
    assert found.reason == "converged"
    assert torch.isfinite(found.weights).all()
    relative = found.weights / scales
    spread = (relative - relative[:, :1]).norm(dim=0) / relative[:, 0].norm()
    assert float(spread.max()) < 1e4 * torch.finfo(dtype).eps


@each_solver
def test_columns_whose_squares_overflow_are_solved_too(solver):
    p = problem("matern12", 50, dtype=torch.float32)
    p.rhs[:, 0] *= 1e25
    found = p.solve(solver)
    assert torch.isfinite(found.weights).all()
    assert float(p.residuals(found.weights).max()) <= 0.01


@pytest.mark.parametrize("solver", [CG(), SDD()], ids=lambda s: s.name)
def test_columns_whose_squares_underflow_are_solved_too(solver):
    p = problem("matern12", 50, dtype=torch.float32)
    p.rhs[:, 0] *= 1e-28
    found = p.solve(solver)
    assert float(p.residuals(found.weights).max()) <= 0.01


@pytest.mark.parametrize("name", ["auto", *BY_NAME])
def test_a_kernel_beyond_the_float_range_is_refused_by_every_solver(name):
    x = 1e10 * torch.ones(5, 1)
    kernel = gpytorch.kernels.PolynomialKernel(power=4)
    solver = choose_solver(name, None, 2**30)
    with pytest.raises(ValueError, match="kernel: its values leave the range"):
        solver.solve(DenseOperator(kernel, x), 0.1, torch.ones(5, 1))
