"""Low rank plus sparse: the documented inverse, and what it does to the spectrum."""

from __future__ import annotations

import pytest
import torch

from sgdgp.operators import DenseOperator, RowBlocksOperator
from sgdgp.solvers import CG, Nystrom, PivotedCholesky
from sgdgp.solvers.preconditioners import inverse_of
from sgdgp.solvers.system import System, as_system
from sgdgp.solvers.two_level import TwoLevel, default_neighbours
from tests.operators.kernel_cases import CASES
from tests.solvers.problems import Problem, problem

LOW = PivotedCholesky(rank=10)


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
