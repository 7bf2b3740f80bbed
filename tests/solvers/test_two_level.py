"""Low rank plus sparse: the documented inverse, and what it does to the spectrum.

The sparse factor is compared with dense regressions and the inverse Cholesky factor.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from gpytorch.kernels import MaternKernel

from sgdgp.operators import DenseOperator, RowBlocksOperator
from sgdgp.operators.tiled import TiledOperator
from sgdgp.operators.triton import TritonOperator
from sgdgp.solvers import CG, Nystrom, PivotedCholesky, two_level
from sgdgp.solvers.costs import STORED
from sgdgp.solvers.preconditioners import inverse_of
from sgdgp.solvers.system import System, as_system
from sgdgp.solvers.two_level import (
    Neighbours,
    TwoLevel,
    default_neighbours,
    nearest_earlier,
    neighbours_pay,
    sparse_factor,
)
from tests.operators.kernel_cases import CASES
from tests.solvers.problems import OPERATORS, Problem, problem

LOW = PivotedCholesky(rank=10)
triton_is_installed = find_spec("triton") is not None


def system_of(p: Problem) -> System:
    return as_system(p.operator, p.noise, p.rhs)


def dense(inverse, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return inverse(torch.eye(n, dtype=dtype)).double()


def condition(p: Problem, inverse: torch.Tensor) -> float:
    root = torch.linalg.cholesky(0.5 * (inverse + inverse.mT))
    spectrum = torch.linalg.eigvalsh(root.mT @ p.matrix @ root)
    return float(spectrum[-1] / spectrum[0])


@pytest.mark.parametrize("low", [LOW, Nystrom(rank=10)], ids=repr)
@pytest.mark.parametrize("kernel", ["matern12", "rbf", "polynomial", "linear", "sum"])
def test_it_is_the_inverse_of_the_low_rank_plus_the_sparse_part(kernel, low):
    n = 60
    p = problem(kernel, n, noise=torch.logspace(-2, 0, n).double())
    recipe = TwoLevel(low, neighbours=8)
    inverse = recipe.prepare(system_of(p), torch.Generator().manual_seed(3))
    factor, _ = low.factor(system_of(p), torch.Generator().manual_seed(3))
    g = inverse.sparse.rows.to_dense()
    preconditioner = factor @ factor.mT + torch.linalg.inv(g.mT @ g)
    found = dense(inverse, n)
    torch.testing.assert_close(found @ preconditioner, torch.eye(n).double())
    torch.testing.assert_close(found, found.mT)
    assert float(torch.linalg.eigvalsh(0.5 * (found + found.mT))[0]) > 0


@pytest.mark.parametrize("kernel", ["matern12", "rbf", "polynomial", "linear"])
def test_with_all_neighbours_it_is_the_inverse_of_the_matrix(kernel, generator):
    n = 50
    p = problem(kernel, n, noise=0.1)
    for count in (n - 1, n, 10 * n):
        inverse = TwoLevel(LOW, neighbours=count).prepare(system_of(p), generator)
        found = dense(inverse, n) @ p.matrix
        torch.testing.assert_close(found, torch.eye(n).double(), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("kernel", ["matern12", "matern32", "rbf", "polynomial"])
@pytest.mark.parametrize("noise", [1e-4, 1e-1])
def test_it_conditions_better_than_either_part(kernel, noise, generator):
    n = 300
    p = problem(kernel, n, noise=noise)
    recipe = TwoLevel(PivotedCholesky(rank=30), neighbours=16)
    both = recipe.prepare(system_of(p), generator)
    factor, _ = recipe.low_rank.factor(system_of(p), generator)
    low = condition(p, dense(inverse_of(factor, system_of(p)), n))
    g = TwoLevel(PivotedCholesky(rank=1), 16).prepare(system_of(p), generator).sparse
    near = condition(p, g.rows.to_dense().mT @ g.rows.to_dense())
    assert condition(p, dense(both, n)) <= 1.02 * min(low, near)


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "constant", "linear"])
@pytest.mark.parametrize("noise", [1e-2, 1e-5])
def test_in_float32_it_stays_positive_definite(kernel, noise, generator):
    n = 200
    p = problem(kernel, n, noise=noise, dtype=torch.float32)
    inverse = TwoLevel().prepare(system_of(p), generator)
    found = dense(inverse, n, torch.float32)
    assert torch.isfinite(found).all()
    # What CG sees: r^T P^-1 r > 0, in every direction that noise leaves.
    values = torch.linalg.eigvalsh(0.5 * (found + found.mT))
    assert float(values[0]) > -1e-4 * float(values[-1])
    r = torch.randn(n, 50, generator=generator)
    assert bool(((r * inverse(r)).sum(0) > 0).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", ["matern12", "linear", "constant"])
def test_tiny_systems_are_solved(kernel, n):
    p = problem(kernel, n, noise=0.1)
    for recipe in (TwoLevel(), TwoLevel(neighbours=50)):
        found = p.solve(CG(tolerance=1e-10, preconditioner=recipe))
        assert found.reason == "converged"
        assert float(p.residuals(found.weights).max()) <= 1e-10


def test_a_kernel_of_zeros_leaves_the_noise(generator):
    p = problem("linear", 20, noise=0.5)
    operator = DenseOperator(p.operator.kernel, torch.zeros_like(p.operator.x))
    inverse = TwoLevel().prepare(as_system(operator, 0.5, p.rhs), generator)
    torch.testing.assert_close(inverse(p.rhs), p.rhs / 0.5)


def test_rows_of_several_outputs_are_preconditioned(generator):
    case = CASES["multitask"]
    operator = RowBlocksOperator(case.kernel(), case.x(40))
    rhs = torch.ones(80, 1).double()
    p = Problem(operator, torch.tensor(1e-2).double(), rhs)
    inverse = TwoLevel(neighbours=20).prepare(system_of(p), generator)
    plain = condition(p, torch.eye(80).double())
    assert condition(p, dense(inverse, 80)) < 0.02 * plain


def test_choices_and_passes_are_reported(generator):
    p = problem("matern32", 200)
    inverse = TwoLevel(LOW, neighbours=7).prepare(system_of(p), generator)
    assert inverse.settings == {"rank": 10, "neighbours": 7}
    assert inverse.passes == pytest.approx(10 / 200 + 1.0 + 8**2 / 200)
    default = TwoLevel().prepare(system_of(p), generator)
    assert default.settings["neighbours"] == default_neighbours(200)
    for recipe in (TwoLevel(LOW, neighbours=7), TwoLevel(), TwoLevel(neighbours=999)):
        prepared = recipe.prepare(system_of(p), generator)
        assert recipe.cost(200) == pytest.approx(prepared.passes)
    # The budget of a solve of a small system is not spent on the preconditioner.
    assert default.passes <= 2.5


@pytest.mark.parametrize(
    ("n", "count"), [(1, 1), (4, 1), (100, 9), (1000, 30), (2601, 40), (10**6, 40)]
)
def test_the_default_count_grows_with_n_up_to_forty(n, count):
    assert default_neighbours(n) == count


def test_the_same_generator_gives_the_same_inverse():
    p = problem("matern12", 100, dtype=torch.float32)
    one, two = (
        TwoLevel().prepare(system_of(p), torch.Generator().manual_seed(2))
        for _ in range(2)
    )
    assert torch.equal(one(p.rhs), two(p.rhs))


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (2.5, TypeError)])
def test_a_count_that_is_none_is_refused(bad, error):
    with pytest.raises(error, match="neighbours"):
        TwoLevel(neighbours=bad)


def no_factor(n: int) -> torch.Tensor:
    return torch.zeros(n, 0, dtype=torch.float64)


def random_order(n: int, seed: int) -> torch.Tensor:
    # What is drawn is every row's place in the order.
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator).argsort()


def found_neighbours(nearest: Neighbours, row: int) -> set[int]:
    return set(nearest.index[row][nearest.known[row]].tolist())


def correlations(p: Problem) -> torch.Tensor:
    n = len(p.rhs)
    k = p.operator.block(slice(0, n), slice(0, n)).double()
    scale = k.diagonal().clamp_min(1e-30).rsqrt()
    return (scale.unsqueeze(1) * k * scale).abs()


@pytest.mark.parametrize("kernel", ["matern12", "polynomial", "linear", "ard"])
@pytest.mark.parametrize("tile", [2**22, 60 * 7])
def test_neighbours_are_the_most_correlated_earlier_rows(kernel, tile, monkeypatch):
    # With the smaller tiles seven rows are looked at a time.
    monkeypatch.setattr(two_level, "_TILE_ENTRIES", tile)
    n, count = 60, 5
    p = problem(kernel, n)
    nearest = nearest_earlier(system_of(p), count, torch.Generator().manual_seed(3))
    order = random_order(n, 3).tolist()
    correlation = correlations(p)
    for position, row in enumerate(order):
        earlier = order[:position]
        found = found_neighbours(nearest, row)
        assert found <= set(earlier)
        assert len(found) == min(count, position)
        values = sorted((float(correlation[row, j]) for j in earlier), reverse=True)
        chosen = sorted((float(correlation[row, j]) for j in found), reverse=True)
        assert chosen == pytest.approx(values[:count], abs=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["matern12", "rbf", "linear", "polynomial"])
def test_with_all_neighbours_it_is_the_inverse_cholesky_factor(kernel, operator):
    n = 40
    noise = torch.logspace(-2, 0, n).double()
    p = problem(kernel, n, noise=noise, operator=operator)
    nearest = nearest_earlier(system_of(p), n - 1, torch.Generator().manual_seed(3))
    factor = sparse_factor(system_of(p), no_factor(n), nearest)
    order = random_order(n, 3)
    lower = torch.linalg.cholesky(p.matrix[order][:, order])
    expected = torch.linalg.inv(lower)
    dense = factor.rows.to_dense()[order][:, order]
    torch.testing.assert_close(dense, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(factor.transposed.to_dense(), factor.rows.to_dense().mT)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("kernel", ["matern12", "polynomial", "scale"])
def test_every_row_is_a_regression_on_its_neighbours(kernel, rank, generator):
    n, count = 50, 6
    noise = torch.logspace(-2, 0, n).double()
    p = problem(kernel, n, noise=noise)
    system = system_of(p)
    low = no_factor(n)
    if rank:
        low, _ = PivotedCholesky(rank=rank).factor(system, generator)
    nearest = nearest_earlier(system, count, generator)
    g = sparse_factor(system, low, nearest).rows.to_dense()
    a = p.matrix - low @ low.mT
    for row in range(n):
        near = sorted(found_neighbours(nearest, row))
        c = torch.linalg.solve(a[near][:, near], a[near, row])
        d = a[row, row] - a[row, near] @ c
        expected = torch.zeros(n, dtype=torch.float64)
        expected[near] = -c / d.sqrt()
        expected[row] = 1.0 / d.sqrt()
        torch.testing.assert_close(g[row], expected, rtol=1e-6, atol=1e-8)


def test_what_neighbours_tell_is_the_mean_log_ratio_of_variances(generator):
    n = 40
    p = problem("matern32", n, noise=0.1)
    nearest = nearest_earlier(system_of(p), n - 1, generator)
    factor = sparse_factor(system_of(p), no_factor(n), nearest)
    expected = p.matrix.diagonal().log().mean() - torch.logdet(p.matrix) / n
    assert factor.explained == pytest.approx(float(expected), rel=1e-9)


def test_more_neighbours_are_closer_to_the_inverse(generator):
    p = problem("matern32", 200, noise=1e-2)
    spread = []
    for count in (2, 10, 40):
        nearest = nearest_earlier(system_of(p), count, generator)
        g = sparse_factor(system_of(p), no_factor(200), nearest).rows.to_dense()
        values = torch.linalg.eigvalsh(g @ p.matrix @ g.mT)
        spread.append(float(values[-1] / values[0]))
        assert (g != 0).sum(1).max() <= count + 1
    assert spread[0] > 2 * spread[1] > 4 * spread[2]


@pytest.mark.parametrize("noise", [1e-2, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_leave_a_finite_factor_bounded_by_the_noise(dtype, noise, generator):
    p = problem("rbf", 30, noise=noise, dtype=dtype)
    operator = DenseOperator(p.operator.kernel, p.operator.x.repeat(4, 1))
    rhs = torch.ones(120, 1, dtype=dtype)
    system = as_system(operator, noise, rhs)
    nearest = nearest_earlier(system, 20, generator)
    factor = sparse_factor(system, no_factor(120), nearest)
    values = factor.rows.to_dense()
    assert torch.isfinite(values).all()
    # 1 / d_i <= 2 / sigma_i^2, the floor.
    assert float(values.diagonal().square().max()) <= 2.0 / noise * (1 + 1e-5)


def test_rows_of_several_outputs_regress_on_each_other(generator):
    case = CASES["multitask"]
    operator = RowBlocksOperator(case.kernel(), case.x(12))
    rhs = torch.ones(24, 1).double()
    system = as_system(operator, 0.1, rhs)
    nearest = nearest_earlier(system, 23, generator)
    g = sparse_factor(system, no_factor(24), nearest).rows.to_dense()
    matrix = operator.block(slice(0, 24), slice(0, 24)) + 0.1 * torch.eye(24).double()
    torch.testing.assert_close(g.mT @ g @ matrix, torch.eye(24).double())


def test_the_same_generator_gives_the_same_neighbours():
    system = system_of(problem("matern12", 80))
    one, two = (
        nearest_earlier(system, 7, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.known, two.known)


def test_small_batches_of_regressions_change_nothing(generator, monkeypatch):
    p = problem("matern12", 50)
    nearest = nearest_earlier(system_of(p), 6, generator)
    whole = sparse_factor(system_of(p), no_factor(50), nearest)
    monkeypatch.setattr(two_level, "_BLOCK_ENTRIES", 49 * 8)
    parts = sparse_factor(system_of(p), no_factor(50), nearest)
    torch.testing.assert_close(parts.rows.to_dense(), whole.rows.to_dense())
    assert parts.explained == pytest.approx(whole.explained)


@pytest.mark.skipif(not triton_is_installed, reason="needs triton, made for Linux")
def test_neighbours_do_not_pay_where_products_are_on_tensor_cores(generator):
    """A search among n^2 candidates takes as long as hundreds of these products."""
    x = torch.rand(4000, 2, generator=generator)
    kernel = MaternKernel(nu=1.5)
    assert neighbours_pay(TiledOperator(kernel, x), 0.01, 65)
    assert not neighbours_pay(TritonOperator(kernel, x), 0.01, 65)


@pytest.mark.parametrize(
    ("noise", "columns", "pay"), [(0.01, 65, True), (0.3, 65, False), (0.01, 1, False)]
)
def test_neighbours_are_left_out_where_they_do_not_pay(
    noise, columns, pay, generator, monkeypatch
):
    monkeypatch.setattr(two_level, "_MANY_ROWS", 100)
    costs = replace(STORED, regression=STORED.regression * 300 / 4000)
    monkeypatch.setattr(two_level, "costs_of", lambda _: costs)
    case = CASES["matern12"]
    operator = DenseOperator(case.kernel(), case.x(300))
    scale = float(operator.diagonal().mean())
    system = as_system(operator, noise * scale, torch.ones(300, columns).double())
    assert ("neighbours" in TwoLevel().prepare(system, generator).settings) == pay
    assert "neighbours" in TwoLevel(neighbours=5).prepare(system, generator).settings
