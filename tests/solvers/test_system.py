"""The linear system and its checks."""

from __future__ import annotations

import pytest
import torch

from sgdgp.operators import DenseOperator
from sgdgp.solvers import CG, SDD, Cholesky
from sgdgp.solvers.system import accurate_residual, as_system, initial_weights
from tests.solvers.problems import problem, rbf

SOLVERS = [Cholesky(), CG(), SDD()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)


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
