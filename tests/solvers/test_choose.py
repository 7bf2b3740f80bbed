"""Solvers by name."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import RBFKernel

from sgdgp.operators import TiledOperator
from sgdgp.solvers import CG, SDD, Auto, Cholesky, choose_solver
from sgdgp.solvers.choose import SOLVERS

OPERATOR = TiledOperator(RBFKernel(), torch.zeros(3, 1))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_name_gives_that_solver_with_its_defaults(name):
    found = choose_solver(name, OPERATOR, 1)
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
    assert choose_solver("auto", OPERATOR, 123) == Auto(memory_budget=123)


def test_a_solver_is_passed_through_whatever_the_memory():
    solver = SDD(tolerance=0.3)
    assert choose_solver(solver, OPERATOR, 1) is solver


@pytest.mark.parametrize("name", ["", "CG", "lbfgs", None])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"solver.*cg.*cholesky.*sdd"):
        choose_solver(name, OPERATOR, 10**9)
