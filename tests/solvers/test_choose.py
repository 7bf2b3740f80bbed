"""What "auto" means."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import RBFKernel

from sgdgp.operators import TiledOperator
from sgdgp.solvers import CG, SDD, Cholesky, PivotedCholesky, choose_solver

GB = 10**9


def operator(n: int) -> TiledOperator:
    return TiledOperator(RBFKernel(), torch.zeros(n, 1))


@pytest.mark.parametrize(
    ("n", "budget", "expected"),
    [
        (100, GB, Cholesky),
        (5_000, 8 * 5_000**2, Cholesky),
        (5_000, 8 * 5_000**2 - 1, CG),
        (20_000, 4 * GB, Cholesky),
        (20_001, 100 * GB, CG),
        (50_000, 40 * 50_000 * 100, CG),
        (50_000, 40 * 50_000 * 100 - 1, SDD),
        (100, 1, SDD),
    ],
)
def test_auto_follows_size_and_memory(n, budget, expected):
    assert type(choose_solver("auto", operator(n), budget)) is expected


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(100 * GB, 1000), (40 * 50_000 * 700, 700), (40 * 50_000 * 100, 100)],
)
def test_the_rank_of_the_preconditioner_is_what_fits(budget, rank):
    chosen = choose_solver("auto", operator(50_000), budget)
    assert chosen == CG(preconditioner=PivotedCholesky(rank=rank))


@pytest.mark.parametrize(
    ("name", "expected"), [("cholesky", Cholesky()), ("cg", CG()), ("sdd", SDD())]
)
def test_a_name_gives_that_solver_with_its_defaults(name, expected):
    assert choose_solver(name, operator(3), 1) == expected


def test_a_solver_is_passed_through_whatever_the_memory():
    solver = SDD(tolerance=0.3)
    assert choose_solver(solver, operator(3), 1) is solver


@pytest.mark.parametrize("name", ["", "CG", "lbfgs", None])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"solver.*cg.*cholesky.*sdd"):
        choose_solver(name, operator(3), GB)
